"""One rank of `test_two_processes_are_one`: three steps on completions fixed in advance."""

import os
import sys
from pathlib import Path

import torch

import tests.integrations.conftest  # noqa: F401, sets the environment
from offrl.regularizers import DualVariable
from tests.integrations.test_trl import GRPO, Bonus, Near, Short, make

folder, out = sys.argv[1:]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
coef = DualVariable(0.02, rule="sgd", lr=0.05, bounds=(0.0, 1.0))
short = Short(0.3)
trainer = make(
    GRPO, folder, out, [Bonus(coef, target=2.5), short, Near(0.1)],
    per_device_train_batch_size=4 // world, num_generations=4, max_steps=3, optim="sgd",
    learning_rate=0.1, ddp_backend="gloo" if world > 1 else None, max_grad_norm=0.0,
)  # fmt: skip


def fixed(prompt_ids, *args):
    """Row i of the global batch at every step has the same completion in any number of ranks."""
    first = rank * len(prompt_ids)
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    drawn = torch.randint(4, 16, (4, 6), generator=generator).tolist()
    lengths = [1, 6, 3, 4]
    rows = range(first, first + len(prompt_ids))
    return [drawn[i][: lengths[i]] for i in rows], None


trainer._generate_single_turn = fixed
start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
trainer.train()
result = {
    "start": start,
    "model": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
    "state": trainer.reg.state_dict(),
    "groups": short.seen.group.tolist(),
    "lengths": short.seen.lengths.tolist(),
}
torch.save(result, Path(out) / f"{rank}.pt")
