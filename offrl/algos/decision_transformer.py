"""Decision Transformer: the next action from past returns-to-go, states and actions.

Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas and Mordatch, "Decision Transformer:
Reinforcement Learning via Sequence Modeling", NeurIPS 2021, arXiv:2106.01345.

    tokens   R_1, s_1, a_1, R_2, s_2, a_2, ... of K steps, each embedded linearly, with a learned
             embedding of the step in the episode added, then LayerNorm
    action   a_t = tanh(W h(s_t) + b), h a causal transformer of three GPT blocks
    loss     mean over real steps and dimensions of (a_t - action in the data)^2

R_t is the undiscounted sum of the rewards from step t to the end of the episode, divided by
`scale`. In evaluation it begins with a target return and loses every reward that comes in; each
target is a scenario, played beside the others, and the score is that of the best one.

Shapes: B batch, K steps, d width. The network carries no seed axis: one seed per process.

`size` names the width with as many parameters in the transformer as Decision Mamba's size of that
name has in its blocks (within 2 %); `release` is the published model.

Differences from the authors' code:
- Heads that predict the next state and return, which their loss leaves out, are not built.
- Actions are clipped to [-1, 1], in the history too; theirs are not, but their environments clip.
- Their windows hold one more return, behind the last step; nothing reads it, so it is not made.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from offrl.data import Dataset, prepare
from offrl.data.windows import act_taken, extend, windows
from offrl.engine.method import Batch, Metrics, Run, Spec, Stage, load_modules, modules_state
from offrl.engine.optim import adamw, descend, warm_up
from offrl.nets import Linear, Standardize
from offrl.nets.sequence.transformer import Transformer
from offrl.regularizers.reductions import masked_reduce

FIELDS = ("obs", "act", "reward")
STACKS = False  # no seed axis: one process per seed on every device
WIDTHS = {"tiny": 80, "small": 152, "base": 296, "release": 128}


@dataclass(frozen=True)
class Config:
    steps: int = 100_000  # updates
    batch: int = 64  # windows
    context: int = 20  # K; steps of a window
    # widths 80, 152, 296 (parameters of Decision Mamba's), 128 (the authors')
    size: Literal["tiny", "small", "base", "release"] = "small"
    layers: int = 3  # blocks
    dropout: float = 0.1  # probability
    lr: float = 1e-4  # AdamW
    lr_warmup: int = 10_000  # updates of linear warm-up
    weight_decay: float = 1e-4  # of all parameters
    clip: float = 0.25  # largest norm of the gradient
    targets: tuple[float, ...] = ()  # returns to ask for in evaluation; per task
    scale: float = 1000.0  # returns are divided by it
    max_step: int = 1000  # rows of the embedding of steps; later steps share the last one


class Net(nn.Module):
    """A window of K steps -> actions (B, K, a) read from the state tokens."""

    def __init__(self, config: Config, spec: Spec, generator: Generator):
        super().__init__()
        c, width = config, WIDTHS[config.size]
        self.embed_return = Linear(1, width, generator=generator)
        self.embed_obs = Linear(spec.obs_dim, width, generator=generator)
        self.embed_act = Linear(spec.act_dim, width, generator=generator)
        steps = torch.empty(c.max_step, width, device=generator.device)
        self.embed_step = nn.Parameter(steps.normal_(generator=generator))
        self.norm = nn.LayerNorm(width, device=generator.device)
        self.transformer = Transformer(width, c.layers, dropout=c.dropout, generator=generator)
        self.head = Linear(width, spec.act_dim, generator=generator)

    def forward(self, window: Batch) -> Tensor:
        step = self.embed_step[window["step_in_episode"].clamp(max=len(self.embed_step) - 1)]
        parts = [
            self.embed_return(window["return_to_go"].unsqueeze(-1)),
            self.embed_obs(window["obs"]),
            self.embed_act(window["act"]),
        ]
        tokens = self.norm(torch.stack(parts, 2) + step.unsqueeze(2)).flatten(1, 2)  # (B, 3K, d)
        hidden = self.transformer(tokens, window["mask"].repeat_interleave(3, 1))
        return self.head(hidden[:, 1::3]).tanh()


class DecisionTransformer:
    NAMES = ("standardize", "net", "opt")

    def __init__(
        self, config: Config, spec: Spec, generator: Generator, seeds: tuple[int, ...] = ()
    ):
        if seeds:
            raise ValueError("decision_transformer carries no seed axis: make one per seed")
        if not config.targets:
            raise ValueError(
                "decision_transformer has no target returns for this task; give the returns to ask "
                "for, such as algo.targets=[3600,1800]"
            )
        self.config, self.generator, self.cycle = config, generator, 1
        self.act_dim = spec.act_dim
        self.scenarios = tuple(f"target-{target:g}" for target in config.targets)
        self.targets = torch.tensor(config.targets, device=generator.device) / config.scale
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.net = Net(config, spec, generator)
        self.opt = adamw([(self.net.parameters(), config.weight_decay)])

    def update(self, batch: Batch, step: int) -> Metrics:
        c = self.config
        warm_up(self.opt, c.lr, c.lr_warmup)
        return descend(self.opt, *self.loss(batch), clip=c.clip)

    def loss(self, window: Batch) -> tuple[Tensor, Metrics]:
        act = self.net.train()(window)  # (B, K, a)
        error = (act - window["act"]).square().mean(-1)
        loss = masked_reduce(error, window["mask"])
        return loss, {"actor/loss": loss}

    @torch.no_grad()
    def act(
        self,
        now: Batch,
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]:
        c, goal = self.config, self.targets[now["scenario"]]
        now = now | {"obs": self.standardize(now["obs"])}
        window = extend(memory, now, goal, c.scale, c.context, self.act_dim)
        act = self.net.eval()(window)[:, -1].clamp(-1, 1)
        return act, act_taken(window, act)

    def state(self) -> dict[str, Any]:
        return modules_state(self, self.NAMES)

    def load(self, state: dict[str, Any]) -> None:
        load_modules(self, self.NAMES, state)


make = DecisionTransformer


def stages(algo: DecisionTransformer, data: Dataset, run: Run) -> list[Stage]:
    c = algo.config
    # the authors add 1e-6 to the std, where the engine's statistics have 1e-3
    algo.standardize = Standardize(data.obs_dim, *data.statistics(eps=1e-6), run.device)

    def start():
        ready = prepare(algo.standardize)
        return windows(data, c.batch, c.context, c.scale, run.seeds, run.device, ready)

    return [Stage("train", run.steps, start, algo.update, algo.cycle)]
