"""Gated cloning, smooth values, targets of an earlier self."""

import torch
from torch import Generator

from offrl.regularizers import AdvantageGatedClone, LipschitzPenalty, ProgressiveTarget, RegInputs
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of

WEIGHT = torch.tensor([0.5, -1.0, 2.0])


def values(states: torch.Tensor) -> torch.Tensor:
    return (states * WEIGHT).sum(-1).sin()


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(rows, tokens, *shape, generator=g)

    return RegInputs(
        logp=normal().abs().neg().requires_grad_(),
        logits=normal(7).requires_grad_(),
        advantages=torch.randn(rows, generator=g),
        mask=mask_of(g, rows, tokens),
        extra={
            "act": normal(3).requires_grad_(),
            "candidate": normal(3),
            "data_act": normal(3),
            "q_candidate": normal(),
            "q_data": normal(),
            "value": normal(),
            "value_function": values,
            "inputs": normal(3),
            "start": torch.rand(rows, tokens, 3, generator=g) * 2 - 1,
            "prediction": normal(3).requires_grad_(),
            "previous": normal(3),
            "previous_logits": normal(7),
            "tokens": torch.randint(7, (rows, tokens), generator=g),
        },
    )


def evolved(form: str) -> ProgressiveTarget:
    return ProgressiveTarget(0.5, form, stages=4, stage_steps=1)


CASES = [
    Case("clone-likelihood", lambda: AdvantageGatedClone(0.1), inputs, control=True),
    Case(
        "clone-action",
        lambda: AdvantageGatedClone(0.1, "action"),
        inputs,
        ("extra.act",),
        control=True,
    ),
    Case("lipschitz-signs", LipschitzPenalty, inputs, (), control=True),
    Case(
        "lipschitz-fgsm",
        lambda: LipschitzPenalty(norm="2", random_start=True),
        inputs,
        (),
        control=True,
    ),
    Case(
        "lipschitz-pgd",
        lambda: LipschitzPenalty(random_start=True, steps=3, detach_clean=True),
        inputs,
        (),
        control=True,
    ),
    Case(
        "evolution-action", lambda: evolved("action"), inputs, ("extra.prediction",), control=True
    ),
    Case("evolution-token", lambda: evolved("token"), inputs, ("logits",), control=True),
]
