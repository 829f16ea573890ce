"""One rank of the tests of two processes: three sets of numbers from rows fixed in advance."""

import os
import sys
from pathlib import Path

import torch

import tests.integrations.conftest  # noqa: F401, sets the environment
from offrl.regularizers import (
    DADS,
    DRPO,
    LDDPO,
    RPO,
    Chi2Occupancy,
    DualVariable,
    EntropyAnchor,
    EntropyBonus,
    KLCov,
    KLToReference,
    LengthShaper,
    LowProbability,
    NLLAnchor,
    PeakEntropyMask,
    PromptHistory,
)
from tests.integrations.test_trl import DPO, GRPO, RLOO, Bonus, Near, Short, gradients, make
from tests.integrations.test_trl_modules import NOTHING, moved

folder, out = sys.argv[1:]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
LENGTHS = [1, 6, 3, 4, 2, 5, 4, 2]
GROUP = 4
END = 2


def fixed(trainer, rows):
    """Row i of the global batch at every step has the same completion in any number of ranks."""

    def generate(prompt_ids, *args):
        first = rank * len(prompt_ids)
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        drawn = torch.randint(4, 8, (rows, 6), generator=generator).tolist()
        ids = [drawn[i][: LENGTHS[i]] for i in range(first, first + len(prompt_ids))]
        ids = [row if i + first == 1 else [*row[:-1], END] for i, row in enumerate(ids)]
        return (ids, None) if isinstance(trainer, GRPO) else ids

    trainer._generate_single_turn = generate
    return trainer


def mean_gradient(trainer, batch):
    """Of all ranks, as data parallelism takes it."""
    loss, gradient = gradients(trainer, batch)
    return trainer.accelerator.reduce(torch.cat([loss[None], gradient]), "sum") / world


def three_steps():
    """Multipliers, gathered rewards and a history; the group spans the ranks."""
    coef = DualVariable(0.02, rule="sgd", lr=0.05, bounds=(0.0, 1.0))
    short, history = Short(0.3), PromptHistory(11, "mean")
    shaper = LengthShaper("hapo", coef=0.2, history=history)
    trainer = make(
        GRPO,
        folder,
        out,
        [Bonus(coef, target=2.5), short, shaper, Near(0.1)],
        extra={"correct": ("share_of_a", 0.01)},
        per_device_train_batch_size=GROUP // world,
        num_generations=GROUP,
        max_steps=8,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        ddp_backend="gloo" if world > 1 else None,
    )
    start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    fixed(trainer, GROUP).train()
    return {
        "start": start,
        "model": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
        "state": trainer.reg.state_dict(),
        "groups": short.seen.group.tolist(),
        "lengths": short.seen.lengths.tolist(),
        "change": [row["reg/2_LengthShaper/change"] for row in trainer.state.log_history[:8]],
    }


def anchor(**options):
    module = EntropyAnchor(0.5, **options)
    module.anchor.fill_(1.0)
    module.anchored.fill_(1)
    return [module]


MODULES = {
    "alone": list,
    "anchor": anchor,
    "anchor of the batch": lambda: anchor(scope="batch", mass=None),
    "chi2": lambda: [Chi2Occupancy(0.1)],
    "drpo": lambda: [DRPO(max_length=6.0, over="all", beta=1.0)],
    "dads": lambda: [DADS(0.1)],
    "low probability": lambda: [LowProbability(0.5, share=0.7)],
    "covariance": lambda: [KLCov(0.5, fraction=0.3)],
    "peaks": lambda: [PeakEntropyMask(0.8), EntropyBonus(0.1)],
    "sequences": lambda: [KLToReference(0.1, reduction="seq-mean-token-mean")],
    "tokens": lambda: [KLToReference(0.1)],
}


def one_rollout(base, name):
    """Gradient of one batch: a group of eight on all ranks, one of them cut off."""
    trainer = moved(
        make(
            base,
            folder,
            out,
            MODULES[name](),
            extra={"correct": ("share_of_a", 0.01)},
            per_device_train_batch_size=8 // world,
            num_generations=8,
            **({"mask_truncated_completions": True} if base is GRPO else {}),
        ),
        0.3,
    )
    rows = next(iter(fixed(trainer, 8).get_train_dataloader()))
    trainer.model.train()
    batch = trainer._prepare_inputs(rows)
    ids = batch["completion_ids"].double() * batch["completion_mask"]
    batch["advantages"] = ids.sum(1).sin().float()  # of the row, whatever rank it is on
    if name == "covariance":
        batch["reg_old_logp"] = (ids.sin() - 3).float()
    return mean_gradient(trainer, batch)


PAIRS = {
    "nll": lambda: NLLAnchor(0.2),
    "dpo": lambda: LDDPO(beta=0.1, alpha=0.5),
    "rpo": lambda: RPO(beta=0.1, eta=0.2, sft_reduction="token-mean"),
    "kl": lambda: KLToReference(0.1, grad="path"),
    "chi2": lambda: Chi2Occupancy(0.1),
}


def one_batch_of_pairs(name):
    trainer = moved(
        make(DPO, folder, out, [PAIRS[name]()], per_device_train_batch_size=4 // world, **NOTHING)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return mean_gradient(trainer, batch)


result = three_steps()
for name in MODULES:
    result[f"GRPO {name}"] = one_rollout(GRPO, name)
result["RLOO anchor"] = one_rollout(RLOO, "anchor")
for name in PAIRS:
    result[f"DPO {name}"] = one_batch_of_pairs(name)
torch.save(result, Path(out) / f"{rank}.pt")
