"""Occupancy: sequence chi2 and a discriminator in the reward."""

import torch
from torch import Generator

from offrl.regularizers import Chi2Occupancy, OccupancyReward, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    logp, ref = (-torch.rand(rows, tokens, generator=g) for _ in range(2))
    return RegInputs(
        logp=logp.requires_grad_(),
        ref_logp=ref,
        mask=mask_of(g, rows, tokens),
        rewards=torch.randn(rows, generator=g),
        extra={"discriminator": torch.randn(rows, generator=g)},
    )


CASES = [
    Case("chi2-path", lambda: Chi2Occupancy(0.1), inputs, control=True, rows_mix=True),
    Case(
        "chi2-ratio",
        lambda: Chi2Occupancy(0.1, grad="ratio"),
        inputs,
        control=True,
        rows_mix=True,
        exact_gradient=False,
    ),
    Case("occupancy-kl", lambda: OccupancyReward(0.1, "kl"), inputs, ()),
    Case("occupancy-sqrt-chi2", lambda: OccupancyReward(0.1), inputs, (), rows_mix=True),
]
