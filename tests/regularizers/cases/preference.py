"""Preference pairs: row i is preferred to row i + B/2, so rows may only move in pairs."""

import torch
from torch import Generator

from offrl.regularizers import (
    INPO,
    LDDPO,
    RPO,
    SPO,
    GenARM,
    NLLAnchor,
    RegInputs,
    Schedule,
    XPOTerm,
)
from tests.regularizers.cases import Case
from tests.regularizers.cases.kl import mask_of


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    logp, ref, old = (-torch.rand(rows, tokens, generator=g) for _ in range(3))
    return RegInputs(
        logp=logp.requires_grad_(),
        ref_logp=ref,
        old_logp=old,
        mask=mask_of(g, rows, tokens),
        chosen=torch.arange(rows) < rows // 2,
        rewards=torch.randn(rows, generator=g),
        group=torch.arange(rows) // 2,
        extra={
            "from_reference": torch.rand(rows, generator=g) > 0.5,
            "preferences": torch.rand(rows, rows, generator=g),
        },
    )


CASES = [
    Case("dpo", LDDPO, inputs, control=True, rows_mix=True),
    Case("ld-dpo", lambda: LDDPO(alpha=0.5), inputs, rows_mix=True),
    Case(
        "f-dpo", lambda: LDDPO(divergence="alpha", order=0.5), inputs, control=True, rows_mix=True
    ),
    Case("rpo-sum", lambda: RPO(eta=0.1), inputs, control=True, rows_mix=True),
    Case(
        "rpo-seq-mean",
        lambda: RPO(eta=0.1, sft_reduction="seq-mean"),
        inputs,
        control=True,
        rows_mix=True,
    ),
    Case(
        "rpo-token-mean",
        lambda: RPO(eta=0.1, sft_reduction="token-mean"),
        inputs,
        control=True,
        rows_mix=True,
    ),
    Case(
        "xpo",
        lambda: XPOTerm(Schedule("linear", 0.1, steps=3)),
        inputs,
        control=True,
        rows_mix=True,
    ),
    Case("inpo", lambda: INPO(eta=0.5), inputs, control=True, rows_mix=True),
    Case("genarm", GenARM, inputs, control=True, rows_mix=True),
    Case("spo", SPO, inputs, (), rows_mix=True),
    Case("nll-chosen", lambda: NLLAnchor(0.1), inputs, control=True, rows_mix=True),
    Case(
        "nll-chosen-sum",
        lambda: NLLAnchor(0.1, "seq-mean-token-sum"),
        inputs,
        control=True,
        rows_mix=True,
    ),
    Case("nll-all", lambda: NLLAnchor(0.1, rows="all"), inputs, control=True),
]
