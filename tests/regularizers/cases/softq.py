"""Inverse soft Q-learning."""

import torch
from torch import Generator

from offrl.regularizers import InverseSoftQ, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of

NAMES = ("logp", "stats.lse")


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    return RegInputs(
        logp=(-torch.rand(rows, tokens, generator=g)).requires_grad_(),
        stats={"lse": torch.randn(rows, tokens, generator=g).requires_grad_()},
        mask=mask_of(g, rows, tokens),
        finished=torch.rand(rows, generator=g) > 0.3,
        extra={"next_lse": torch.randn(rows, tokens, generator=g)},
    )


CASES = [
    Case("softq-chi2", lambda: InverseSoftQ(0.5, 0.9), inputs, NAMES, control=True),
    Case(
        "softq-truncated",
        lambda: InverseSoftQ(0.5, following="truncated"),
        inputs,
        NAMES,
        control=True,
    ),
    Case(
        "softq-given",
        lambda: InverseSoftQ(0.5, 0.9, following="given"),
        inputs,
        NAMES,
        control=True,
    ),
    Case(
        "softq-hellinger",
        lambda: InverseSoftQ(divergence="hellinger"),
        inputs,
        NAMES,
        control=True,
        exact_gradient=False,
    ),
    Case(
        "softq-kl",
        lambda: InverseSoftQ(divergence="kl"),
        inputs,
        NAMES,
        control=True,
        exact_gradient=False,
    ),
    Case(
        "softq-kl-shifted",
        lambda: InverseSoftQ(divergence="kl-shifted"),
        inputs,
        NAMES,
        control=True,
        exact_gradient=False,
    ),
    Case(
        "softq-js",
        lambda: InverseSoftQ(divergence="js"),
        inputs,
        NAMES,
        control=True,
        exact_gradient=False,
    ),
]
