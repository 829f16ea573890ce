"""Terms on selected tokens."""

import torch
from torch import Generator

from offrl.regularizers import ClipCov, KLCov, LowProbability, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    logp, old = (-torch.rand(rows, tokens, generator=g) * 3 for _ in range(2))
    filtered = torch.rand(rows, tokens, generator=g) < 0.2
    proxy = torch.where(filtered, -torch.inf, old + torch.rand(rows, tokens, generator=g))
    return RegInputs(
        logp=logp.requires_grad_(),
        old_logp=old,
        stats={"proxy_logp": proxy},
        advantages=torch.randn(rows, generator=g) * 3,
        mask=mask_of(g, rows, tokens),
        extra={"noise": torch.rand(rows, tokens, generator=g)},
    )


CASES = [
    Case(
        "low-probability",
        lambda: LowProbability(0.5, share=0.6),
        inputs,
        control=True,
        rows_mix=True,
    ),
    Case(
        "clip-cov", lambda: ClipCov(fraction=0.2, low=0.0), inputs, (), control=True, rows_mix=True
    ),
    Case("kl-cov", lambda: KLCov(0.5, fraction=0.2), inputs, control=True, rows_mix=True),
]
