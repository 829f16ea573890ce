"""Length shaping."""

from typing import Any

import torch
from torch import Generator

from offrl.regularizers import DLER, DRPO, LengthShaper, PromptHistory, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    return RegInputs(
        rewards=torch.rand(rows, generator=g),
        lengths=torch.randint(1, 400, (rows,), generator=g),
        correct=torch.rand(rows, generator=g) > 0.5,
        finished=torch.rand(rows, generator=g) > 0.2,
        group=torch.arange(rows) // 2,
        prompt_id=torch.arange(rows) // 2,
        level=torch.randint(0, 3, (rows,), generator=g),
    )


def scored(g: Generator, rows: int, tokens: int) -> RegInputs:
    x = inputs(g, rows, tokens)
    x.correct = torch.arange(rows) % 2 == (torch.arange(rows) // 4) % 2
    x.mask = mask_of(g, rows, tokens)
    x.logp = (-torch.rand(rows, tokens, generator=g)).requires_grad_()
    x.old_logp = -torch.rand(rows, tokens, generator=g)
    return x


KINDS: dict[str, dict[str, Any]] = {
    "truncate": dict(max_length=200),
    "truncate_adaptive": dict(max_length=300, easy_length=100),
    "grpo_lambda": dict(share=0.5),
    "kimi": {},
    "curriculum": {},
    "levels": dict(targets=(50, 100, 200)),
    "overlong": dict(max_length=300, buffer=100),
    "cosine": dict(max_length=300),
}


def shaper(kind: str, **options):
    return lambda: LengthShaper(kind, coef=0.5, **options)


CASES = [
    *(
        Case(f"length-{kind}", shaper(kind, **options), inputs, (), rows_mix=True)
        for kind, options in KINDS.items()
    ),
    Case("length-hapo", lambda: LengthShaper("hapo", history=PromptHistory(8)), inputs, ()),
    Case(
        "length-hapo-mean",
        lambda: LengthShaper("hapo", history=PromptHistory(8, "mean")),
        inputs,
        (),
    ),
    Case("dler", DLER, inputs, (), rows_mix=True),
    Case("dler-tokens", lambda: DLER("tokens"), inputs, (), rows_mix=True),
    Case("drpo", lambda: DRPO(max_length=400, delta=1e9), scored, rows_mix=True),
    # The weight of its penalty is detached, so that the gradient is not that of the value.
    Case("drpo-constrained", lambda: DRPO(max_length=400, over="all"), scored, (), rows_mix=True),
]
