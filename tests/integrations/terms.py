"""Regularizers of the tests of verl and OpenRLHF."""

import torch

from offrl.regularizers import RegOutput, Regularizer
from offrl.regularizers.reductions import keep


class Drift(Regularizer):
    """Half the squared log-ratio to the sampler."""

    requires = frozenset({"logp", "old_logp"})

    def forward(self, x):
        drift = keep(x.logp, x.mask) - keep(x.old_logp, x.mask)
        return RegOutput(
            per_element=self.weight * drift.square() / 2, metrics={"drift": drift.abs().max()}
        )


class SequenceDrift(Drift):
    """A scalar: the mean over sequences of the squared log-ratio of the sequence."""

    def forward(self, x):
        drift = keep(x.logp, x.mask) - keep(x.old_logp, x.mask)
        return RegOutput(loss=self.weight * drift.sum(-1).square().mean())


class Half(Regularizer):
    hook = "token"

    def forward(self, x):
        return RegOutput(token_weight=torch.full_like(x.logp.detach(), 0.5))
