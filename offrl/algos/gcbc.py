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

from torch import Generator, Tensor

from offrl.data.goals import GOALS, Trajectories, goal_stages
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, descend
from offrl.engine.ranges import Count, Positive, Share, Whole
from offrl.nets.goal import GoalActor, GoalColumns, sampled


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # the state itself, its trajectory, any state
    goal_columns: tuple[Whole, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class GCBC:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o = config, spec.obs_dim
        self.config, self.generator = c, generator
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        g = self.goal.size
        self.actor = GoalActor((o, g), spec.act_dim, c.hidden, seeds, generator, 2 * c.images)
        self.opt = adam(self.actor, c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        return descend(self.opt, *self.loss(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        goal = self.goal(batch["goal"])
        loss = -self.actor.log_prob(batch["obs"], goal, batch["act"]).mean(-1)  # (*S,)
        return loss, {"actor/loss": loss}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return sampled(self.actor(now["obs"], self.goal(now["goal"])), now).clamp(-1, 1), memory


def draw(c: Config, states: Trajectories, i: Tensor, generator: Generator) -> tuple[Batch, Batch]:
    """Goals ahead on the trajectory."""
    return {"goal": states.goals(i, c.actor_goals, generator)}, {}


METHOD = Method(GCBC, Config, stages=goal_stages(draw), **GOALS)
