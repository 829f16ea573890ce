"""Advantage modulation."""

import torch
from torch import Generator

from offrl.regularizers import EMPG, IGPO, STCR, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    turn = torch.randint(0, 3, (rows, tokens), generator=g).sort(dim=1).values
    return RegInputs(
        entropy=torch.rand(rows, tokens, generator=g),
        turn=turn.clamp(max=tokens - 1),
        mask=mask_of(g, rows, tokens),
        advantages=torch.randn(rows, generator=g),
        rewards=torch.rand(rows, generator=g),
        lengths=torch.randint(1, 4000, (rows,), generator=g),
        correct=torch.rand(rows, generator=g) > 0.5,
        group=torch.arange(rows) // 2,
        extra={"answer_logp": -torch.rand(rows, 4, generator=g)},
    )


def per_token(g: Generator, rows: int, tokens: int) -> RegInputs:
    x = inputs(g, rows, tokens)
    x.advantages = torch.randn(rows, tokens, generator=g)
    return x


CASES = [
    Case("empg", EMPG, inputs, (), rows_mix=True),
    Case("empg-per-token", EMPG, per_token, (), rows_mix=True),
    Case("stcr", lambda: STCR(base=1.001), inputs, (), rows_mix=True),
    Case("stcr-per-token", lambda: STCR(base=1.001), per_token, (), rows_mix=True),
    Case("igpo-turn", lambda: IGPO(discount=0.9), inputs, (), rows_mix=True),
    Case("igpo-reward", lambda: IGPO(baseline="reward"), inputs, (), rows_mix=True),
    Case("igpo-position", lambda: IGPO(baseline="position"), inputs, (), rows_mix=True),
]
