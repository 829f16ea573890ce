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

from offrl.data.windows import SEQUENCE, act_taken, asked, asked_returns, extend, window_stages
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adamw, descend, warm_up
from offrl.engine.ranges import Bound, Count, NonNegative, Positive, Real, Share, Whole
from offrl.nets import Linear, Standardize
from offrl.nets.sequence.tokens import StepTokens
from offrl.nets.sequence.transformer import Transformer
from offrl.regularizers.reductions import masked_reduce

WIDTHS = {"tiny": 80, "small": 152, "base": 296, "release": 128}


@dataclass(frozen=True)
class Config:
    steps: Count = 100_000  # updates
    batch: Count = 64  # windows
    context: Count = 20  # K; steps of a window
    # widths 80, 152, 296 (parameters of Decision Mamba's), 128 (the authors')
    size: Literal["tiny", "small", "base", "release"] = "small"
    layers: Count = 3  # blocks
    dropout: Share = 0.1  # probability
    lr: Positive = 1e-4  # AdamW
    lr_warmup: Whole = 10_000  # updates of linear warm-up
    weight_decay: NonNegative = 1e-4  # of all parameters
    clip: Bound = 0.25  # largest norm of the gradient
    targets: tuple[Real, ...] = ()  # returns to ask for in evaluation; per task
    scale: Positive = 1000.0  # returns are divided by it
    max_step: Count = 1000  # rows of the embedding of steps; later steps share the last one


class Net(nn.Module):
    """A window of K steps -> actions (B, K, a) read from the state tokens."""

    def __init__(self, config: Config, spec: Spec, generator: Generator):
        super().__init__()
        c, width = config, WIDTHS[config.size]
        o, a = spec.obs_dim, spec.act_dim
        self.tokens = StepTokens((o, a), width, c.max_step, False, False, generator)
        self.transformer = Transformer(width, c.layers, 1, c.dropout, generator)
        self.head = Linear(width, spec.act_dim, generator=generator)

    def forward(self, window: Batch) -> Tensor:
        tokens = self.tokens(window).flatten(1, 2)  # (B, 3K, d)
        hidden = self.transformer(tokens, window["mask"].repeat_interleave(3, 1))
        return self.head(hidden[:, 1::3]).tanh()

    @torch.no_grad()
    def predict(self, window: Batch) -> Tensor:
        """The same without dropout; the network is in training mode before and after."""
        self.eval()
        act = self(window)
        self.train()
        return act


class DecisionTransformer:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator, self.act_dim = c, generator, spec.act_dim
        self.targets = asked_returns("decision_transformer", c, seeds, generator.device)
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.net = Net(c, spec, generator)
        self.opt = adamw([(self.net.parameters(), c.weight_decay)])

    def update(self, batch: Batch, turn: int) -> Metrics:
        c = self.config
        warm_up(self.opt, c.lr, c.lr_warmup)
        return descend(self.opt, *self.loss(batch), clip=c.clip)

    def loss(self, window: Batch) -> tuple[Tensor, Metrics]:
        act = self.net(window)  # (B, K, a)
        error = (act - window["act"]).square().mean(-1)
        loss = masked_reduce(error, window["mask"])
        return loss, {"actor/loss": loss}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        c, goal = self.config, asked(self, now)
        seen = now | {"obs": self.standardize(now["obs"])}
        window = extend(memory, seen, goal, c.scale, c.context, self.act_dim)
        act = self.net.predict(window)[:, -1].clamp(-1, 1)
        return act, act_taken(window, act)


METHOD = Method(DecisionTransformer, Config, stages=window_stages, **SEQUENCE)
