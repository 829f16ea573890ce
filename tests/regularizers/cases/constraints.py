"""Constraints with multipliers."""

import torch
from torch import Generator

from offrl.regularizers import ConstrainedRewards, LagrangianPenalty, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def mixed(g: Generator, rows: int, tokens: int) -> RegInputs:
    return RegInputs(
        mask=mask_of(g, rows, tokens),
        advantages=torch.randn(rows, generator=g),
        extra={
            "reward_advantages": torch.randn(rows, 3, generator=g),
            "objectives": torch.rand(rows, 3, generator=g),
        },
    )


def mixed_per_token(g: Generator, rows: int, tokens: int) -> RegInputs:
    x = mixed(g, rows, tokens)
    x.advantages = torch.randn(rows, tokens, generator=g)
    x.extra["reward_advantages"] = torch.randn(rows, tokens, 3, generator=g)
    return x


def cost(g: Generator, rows: int, tokens: int) -> RegInputs:
    return RegInputs(
        mask=mask_of(g, rows, tokens),
        extra={"cost": torch.randn(rows, tokens, generator=g).requires_grad_()},
    )


THETA = (0.2, 0.5, 0.8)

CASES = [
    Case("crlhf", lambda: ConstrainedRewards(THETA), mixed, (), rows_mix=True),
    Case("crlhf-equality", lambda: ConstrainedRewards(THETA, "equality"), mixed, (), rows_mix=True),
    Case("crlhf-per-token", lambda: ConstrainedRewards(THETA), mixed_per_token, (), rows_mix=True),
    Case("lagrangian", lambda: LagrangianPenalty(0.1), cost, ("extra.cost",), control=True),
]
