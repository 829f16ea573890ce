"""KL to a reference."""

import torch
from torch import Generator, Tensor

from offrl.regularizers import DADS, DualVariable, KLReward, KLToReference, RegInputs
from tests.regularizers.cases import Case


def mask_of(g: Generator, rows: int, tokens: int) -> Tensor:
    mask = torch.rand(rows, tokens, generator=g) > 1 / 3
    mask[:, 0] = True
    return mask


def inputs(g: Generator, rows: int, tokens: int) -> RegInputs:
    logp, ref, old = (-torch.rand(rows, tokens, generator=g) * 3 for _ in range(3))
    return RegInputs(
        logp=logp.requires_grad_(),
        ref_logp=ref,
        old_logp=old,
        mask=mask_of(g, rows, tokens),
        advantages=torch.randn(rows, generator=g),
        rewards=torch.randn(rows, generator=g),
        correct=torch.rand(rows, generator=g) > 0.5,
        group=torch.arange(rows) // 2,
    )


def exact(g: Generator, rows: int, tokens: int) -> RegInputs:
    kl = torch.rand(rows, tokens, generator=g).requires_grad_()
    return RegInputs(stats={"kl": kl}, mask=mask_of(g, rows, tokens))


def adaptive() -> DualVariable:
    return DualVariable(0.1, rule="proportional", clip=0.2, scale=0.5)


CASES = [
    Case("kl-k1-ratio", lambda: KLToReference(0.1, "k1", "ratio"), inputs, control=True),
    Case("kl-k2-path", lambda: KLToReference(0.1, "k2", "path"), inputs, control=True),
    Case("kl-k3-ratio", lambda: KLToReference(0.1), inputs, control=True),
    # Its gradient is that of another value, by design.
    Case("kl-k3-straight", lambda: KLToReference(0.1, "k3", "straight"), inputs, (), control=True),
    Case("kl-adaptive", lambda: KLToReference(adaptive(), target=0.05), inputs, control=True),
    Case("kl-exact", lambda: KLToReference(0.1, "exact"), exact, ("stats.kl",), control=True),
    Case("kl-reward", lambda: KLReward(adaptive(), target=0.05), inputs, ()),
    Case("dads", DADS, inputs, rows_mix=True),
]
