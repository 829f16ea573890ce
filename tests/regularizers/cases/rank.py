"""Rank of features."""

import torch
from torch import Generator

from offrl.regularizers import FeatureRank, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    now, after, online = (torch.rand(rows, tokens, 6, generator=g) for _ in range(3))
    return RegInputs(
        features=now.requires_grad_(),
        next_features=after,
        rewards=torch.randn(rows, tokens, generator=g) * 3,
        mask=mask_of(g, rows, tokens),
        extra={
            "weight": torch.randn(6, generator=g),
            "bias": torch.randn(1, generator=g),
            "online_next_features": online,
            "terminal": (torch.rand(rows, tokens, generator=g) > 0.8).float(),
        },
    )


NAMES = ("features",)

CASES = [
    Case("beer-mixed", lambda: FeatureRank(0.1), inputs, NAMES, control=True, exact_gradient=False),
    Case(
        "beer-target",
        lambda: FeatureRank(0.1, norm_source="target", skip_terminal=False),
        inputs,
        NAMES,
        control=True,
        exact_gradient=False,
    ),
    Case(
        "beer-bias",
        lambda: FeatureRank(0.1, 0.9, bias_aware=True),
        inputs,
        NAMES,
        control=True,
        exact_gradient=False,
    ),
    Case("dr3", lambda: FeatureRank(0.1, kind="dr3"), inputs, NAMES, control=True),
    Case("infer", lambda: FeatureRank(0.1, kind="infer"), inputs, NAMES, control=True),
]
