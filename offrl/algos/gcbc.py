"""Goal-conditioned behavior cloning: imitate what led to where the data went.

Lynch et al., "Learning Latent Plans from Play", CoRL 2019, arXiv:1903.01973, and Ghosh et al.,
"Learning to Reach Goals via Iterated Supervised Learning", ICLR 2021, arXiv:1912.06088; as in
OGBench (Park et al., ICLR 2025, arXiv:2410.20092).

    actor  L = -mean_b log pi(a | s, g),  g uniform over the rest of the trajectory

pi is a Gaussian of standard deviation 1 around a mean that is clipped to [-1, 1] in acting.

Shapes: *S optional leading seed axes, B batch. Observations are not standardized.
Images of state and goal go through one encoder together.

Differences from the authors' code: none known against OGBench's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data import Dataset
from offrl.data.goals import check_mixture, trajectories
from offrl.engine.method import Batch, Metrics, Run, Spec, Stage, load_modules, modules_state
from offrl.engine.optim import adam, descend
from offrl.nets.encoders import cropped
from offrl.nets.goal import GoalActor, GoalColumns

FIELDS = ("obs", "act", "next_obs")
GOALS = True  # the environment must name goals


@dataclass(frozen=True)
class Config:
    steps: int = 1_000_000  # updates
    batch: int = 1024  # rows per update, each with its goals
    lr: float = 3e-4  # Adam
    hidden: tuple[int, ...] = (512, 512, 512)  # widths of the hidden layers
    actor_goals: tuple[float, ...] = (0.0, 1.0, 0.0)  # the state itself, its trajectory, any state
    goal_columns: tuple[int, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: float = 0.0  # of batches whose images are moved by up to three pixels


class GCBC:
    NAMES = ("actor", "opt")

    def __init__(
        self, config: Config, spec: Spec, generator: Generator, seeds: tuple[int, ...] = ()
    ):
        c, o = config, spec.obs_dim
        check_mixture("actor_goals", c.actor_goals)
        self.config, self.generator, self.cycle = c, generator, 1
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        self.actor = GoalActor(
            o, self.goal.size, spec.act_dim, c.hidden, seeds, generator, 2 * c.images
        )
        self.opt = adam(self.actor, c.lr)

    def update(self, batch: Batch, step: int) -> Metrics:
        return descend(self.opt, *self.loss(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        goal = self.goal(batch["goal"])
        loss = -self.actor.log_prob(batch["obs"], goal, batch["act"]).mean(-1)  # (*S,)
        return loss, {"actor/loss": loss}

    @torch.no_grad()
    def act(
        self,
        now: Batch,
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]:
        act = self.actor.act(now["obs"], self.goal(now["goal"]), explore, generator)
        return act, memory

    def state(self) -> dict[str, Any]:
        return modules_state(self, self.NAMES)

    def load(self, state: dict[str, Any]) -> None:
        load_modules(self, self.NAMES, state)


make = GCBC


def stages(algo: GCBC, data: Dataset, run: Run) -> list[Stage]:
    c = algo.config

    def start():
        states = trajectories(data, run.device)

        def sample(generator: Generator) -> Batch:
            i = states.anchors((*run.seeds, c.batch), generator)
            found, act = states.gather(i, states.goals(i, c.actor_goals, generator))
            obs, goal = cropped(found, c.images * c.crop_share, generator)
            return {"obs": obs, "act": act, "goal": goal}

        return sample

    return [Stage("train", run.steps, start, algo.update, algo.cycle)]
