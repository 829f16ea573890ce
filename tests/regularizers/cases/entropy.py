"""Entropy terms."""

import torch
from torch import Generator

from offrl.regularizers import (
    DualVariable,
    EntropyAnchor,
    EntropyBand,
    EntropyBonus,
    PeakEntropyMask,
    RegInputs,
    Regularizer,
    Schedule,
    TemperatureController,
)
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    entropy, nucleus = (torch.rand(rows, tokens, generator=g).mul(2) for _ in range(2))
    return RegInputs(
        logp=-torch.rand(rows, tokens, generator=g),
        entropy=entropy.requires_grad_(),
        stats={"nucleus_entropy": nucleus.requires_grad_()},
        mask=mask_of(g, rows, tokens),
        turn=torch.randint(0, 4, (rows, tokens), generator=g),
    )


def anchored(**options) -> Regularizer:
    module = EntropyAnchor(**options)
    module.update({"entropy": torch.tensor(0.5), "count": torch.tensor(1)})
    return module


def banded(**options) -> Regularizer:
    module = EntropyBand(0.1, turns=4, low=0.8, high=1.2, **options)
    module.update({"entropy": torch.full((4,), 3.0), "count": torch.full((4,), 3.0)})
    return module


def adaptive() -> DualVariable:
    return DualVariable(0.1, rule="additive", bounds=(0, 1))


ANCHORED = ("stats.nucleus_entropy",)

CASES = [
    Case("entropy-bonus", lambda: EntropyBonus(0.1), inputs, ("entropy",), control=True),
    Case(
        "entropy-bonus-scheduled",
        lambda: EntropyBonus(Schedule("linear", 0.1, steps=3)),
        inputs,
        ("entropy",),
        control=True,
    ),
    Case(
        "entropy-bonus-adaptive",
        lambda: EntropyBonus(adaptive(), target=0.2),
        inputs,
        ("entropy",),
        control=True,
    ),
    Case("entropy-anchor-first-step", EntropyAnchor, inputs, ANCHORED),
    Case("entropy-anchor", anchored, inputs, ANCHORED),
    Case(
        "entropy-anchor-batch",
        lambda: anchored(scope="batch"),
        inputs,
        ANCHORED,
        control=True,
        rows_mix=True,
    ),
    Case("entropy-band-hinge", banded, inputs, ("entropy",)),
    Case("entropy-band-square", lambda: banded(mode="square"), inputs, ("entropy",)),
    Case("entropy-band-indicator", lambda: banded(mode="indicator"), inputs, ("entropy",)),
    Case("entropy-band-one-turn", lambda: EntropyBand(0.1), inputs, ("entropy",), control=True),
    Case("peak-entropy-batch", PeakEntropyMask, inputs, (), control=True, rows_mix=True),
    Case("peak-entropy-sequence", lambda: PeakEntropyMask(scope="sequence"), inputs, ()),
    Case("temperature", lambda: TemperatureController(0.5), inputs, (), control=True),
]
