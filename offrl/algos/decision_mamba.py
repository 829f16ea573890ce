"""Decision Mamba: actions from past returns-to-go, states and actions, mixed at two grains.

Lv, Deng, Chen, Wang and Nie, "Decision Mamba: A Multi-Grained State Space Model with
Self-Evolution Regularization for Offline RL", NeurIPS 2024, arXiv:2406.05427.

    tokens     R_1, s_1, a_1, R_2, s_2, a_2, ... of K steps, each embedded and normalized, then a
               learned embedding of the step in the episode is added
    block      x + coarse(n) + f,  n = RMSNorm(x),  f = LayerNorm(fine(groups of n))
               coarse: a Mamba mixer over the 3K tokens; fine: another over K groups of a step,
               (a_{t-1}, R_t, s_t) as one linear map; f_t is added to all three tokens of step t
    heads      action from the s-token, next state and next return-to-go from the a-token
    target     (1 - blend) action in the data + blend action of the policy one stage ago
    loss       0.9 |a_t - target|^2 + 0.05 smoothL1(s_{t+1}) + 0.05 smoothL1(R_{t+1})
               each the mean over real steps (and dimensions)
    blend      min(cap, final k / 40) in stage k = 0, 1, ... of steps / 40 updates each

Its three ingredients go off one by one: `fine`, `self_evolution`, `inverse`. R_t is the sum of the
rewards to the end of the episode, divided by `scale`. In evaluation it begins with a target return
and loses every reward that comes in; each target is a scenario, played beside the others, and the
score is that of the best one. Scores of the two `grouping`s are of different models.

Shapes: B batch, K steps, d width. The network carries no seed axis: one seed per process.

Differences from the authors' code (`grouping="release"`, `mask_pads=false`, `decay_all=true`,
`self_evolution=false` and `size=release` undo the first five):
- Their fine groups hold (R_t, s_t, a_t) and their outputs are tiled over the tokens instead of
  repeated. In one block half of the positions then see their own label, in a stack of blocks all
  but the last one, at which they evaluate. Figure 1 of the paper shows the default's groups.
- Pads enter neither the states nor the convolutions; theirs enter both.
- A_log, D and the RMSNorm weights are not decayed, as is usual for Mamba.
- Their self-evolution computes its blend and sets it to 0, and takes the current policy for the
  earlier one; here is what the paper describes (from secondary text; not checked).
- Their network has 24 blocks of width 768, 224 million parameters; the default is smaller.
- They drop the episode of the highest return by mistake.
- Actions are clipped to [-1, 1], in the history too; theirs are not, but their environments clip.
- The convolutions inside the mixers begin with a bias of 0, theirs with torch's uniform one.
- Figure 1 shares the gate and the last map between coarse and fine; their code has two whole
  mixers, and so has this one.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.data import Dataset, prepare
from offrl.data.windows import per_step, windows
from offrl.engine.method import Batch, Metrics, Run, Spec, Stage, load_modules, modules_state
from offrl.engine.optim import adamw, descend, frozen, warm_up
from offrl.nets import Linear, Standardize
from offrl.nets.sequence.multigrained import Backbone, Grouping
from offrl.regularizers import ProgressiveTarget, RegInputs
from offrl.regularizers.reductions import masked_reduce

FIELDS = ("obs", "act", "reward")
STACKS = False  # no seed axis: one process per seed on every device
SIZES = {"tiny": (3, 64), "small": (3, 128), "base": (3, 256), "release": (24, 768)}  # layers, d
STAGES = 40  # of self-evolution; the authors evaluate and count one every 2,500 updates


@dataclass(frozen=True)
class Config:
    steps: int = 100_000  # updates
    batch: int = 64  # windows
    context: int = 20  # K; steps of a window
    # layers and width: 3 x 64, 3 x 128, 3 x 256, 24 x 768
    size: Literal["tiny", "small", "base", "release"] = "small"
    fine: bool = True  # mix step groups beside tokens
    self_evolution: bool = True  # blend labels with an earlier policy
    inverse: bool = True  # predict the next state and return too
    grouping: Grouping = "causal"  # release: the authors' groups, which leak labels
    mask_pads: bool = True  # pads of a window enter no state
    eval_mode: Literal["window", "recurrent"] = "window"  # recurrent: from the episode's start
    mlp_embedding: bool = True  # tokens through a residual MLP; else one linear map
    mlp_head: bool = True  # actions from an MLP without tanh; else one linear map with tanh
    act_weight: float = 0.9  # of the action's loss with `inverse`; without, it is 1
    obs_weight: float = 0.05  # of the loss of the next state
    return_weight: float = 0.05  # of the loss of the next return
    # share of an earlier policy's action in the label of the last stage; the released example's,
    # hopper-medium
    final_blend: float = 0.85
    blend_cap: float = 0.5  # largest share in any stage
    lr: float = 1e-4  # AdamW with eps 1e-6
    lr_warmup: int = 2_500  # updates of linear warm-up
    weight_decay: float = 1e-5  # of weights; not of biases and norms
    decay_all: bool = False  # decay A_log, D and RMSNorm weights too
    clip: float = 0.25  # largest norm of the gradient
    targets: tuple[float, ...] = ()  # returns to ask for in evaluation; per task
    scale: float = 1000.0  # returns are divided by it
    max_step: int = 1000  # rows of the embedding of steps; later steps share the last one


class Embedding(nn.Module):
    """(..., n) -> (..., width): affine, with `mlp` plus an affine map of its GELU."""

    def __init__(self, fan_in: int, width: int, mlp: bool, generator: Generator | None):
        super().__init__()
        self.first = Linear(fan_in, width, generator=generator)
        self.second = Linear(width, width, generator=generator) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.second is None else x + self.second(F.gelu(x))


class Net(nn.Module):
    """A window of K steps -> what its tokens say."""

    def __init__(self, config: Config, spec: Spec, generator: Generator):
        super().__init__()
        c, (layers, width) = config, SIZES[config.size]
        self.mask_pads = c.mask_pads
        self.embed_return = Embedding(1, width, c.mlp_embedding, generator)
        self.embed_obs = Embedding(spec.obs_dim, width, c.mlp_embedding, generator)
        self.embed_act = Embedding(spec.act_dim, width, c.mlp_embedding, generator)
        steps = torch.empty(c.max_step, width, device=generator.device)
        self.embed_step = nn.Parameter(steps.normal_(generator=generator))
        self.norm = nn.LayerNorm(width, device=generator.device)
        self.backbone = Backbone(layers, width, c.fine, c.grouping, generator)
        self.head_hidden = Linear(width, width, generator=generator) if c.mlp_head else None
        self.head_act = Linear(width, spec.act_dim, generator=generator)
        self.head_obs = Linear(width, spec.obs_dim, generator=generator)
        self.head_return = Linear(width, 1, generator=generator)

    def forward(self, window: Batch) -> Tensor:
        """Outputs (B, K, 3, d) at the tokens R, s, a of every step."""
        mask = window["mask"] if self.mask_pads else None
        return self.backbone(self.tokens(window).flatten(1, 2), mask).unflatten(1, (-1, 3))

    def tokens(self, window: Batch) -> Tensor:
        """The embedded window (B, K, 3, d): tokens R, s, a of every step."""
        parts = [
            self.embed_return(window["return_to_go"].unsqueeze(-1)),
            self.embed_obs(window["obs"]),
            self.embed_act(window["act"]),
        ]
        return self.placed(torch.stack(parts, 2), window["step_in_episode"])

    def placed(self, content: Tensor, step: Tensor) -> Tensor:
        """Embedded tokens (*L, n, d) of the step in the episode `step` (*L)."""
        last = len(self.embed_step) - 1
        return self.norm(content) + self.embed_step[step.clamp(max=last)].unsqueeze(-2)

    def action(self, hidden: Tensor) -> Tensor:
        """The action (*L, a) from outputs (*L, d) at s-tokens."""
        if self.head_hidden is None:
            return self.head_act(hidden).tanh()
        return self.head_act(F.gelu(self.head_hidden(hidden)))


class DecisionMamba:
    NAMES = ("standardize", "net", "teacher", "evolution", "opt")

    def __init__(
        self, config: Config, spec: Spec, generator: Generator, seeds: tuple[int, ...] = ()
    ):
        c = config
        if seeds:
            raise ValueError("decision_mamba carries no seed axis: make one per seed")
        if not c.targets:
            raise ValueError(
                "decision_mamba has no target returns for this task; give the returns to ask for, "
                "such as algo.targets=[3600]"
            )
        if c.eval_mode == "recurrent" and (c.grouping, c.mask_pads) != ("causal", True):
            raise ValueError(
                "eval_mode=recurrent needs grouping=causal and mask_pads=true: with others the "
                "network has no form that goes step by step"
            )
        self.config, self.generator, self.cycle = c, generator, 1
        self.act_dim = spec.act_dim
        self.scenarios = tuple(f"target-{target:g}" for target in c.targets)
        self.targets = torch.tensor(c.targets, device=generator.device) / c.scale
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.net = Net(c, spec, generator)
        self.teacher = frozen(deepcopy(self.net))
        self.stage_steps = max(1, c.steps // STAGES)
        self.evolution = ProgressiveTarget(
            final=c.final_blend if c.self_evolution else 0.0,
            cap=c.blend_cap,
            stages=STAGES,
            stage_steps=self.stage_steps,
        ).to(generator.device)
        self.opt = adamw(decayed(self.net, c.weight_decay, c.decay_all), eps=1e-6)

    def update(self, batch: Batch, step: int) -> Metrics:
        c = self.config
        warm_up(self.opt, c.lr, c.lr_warmup)
        metrics = descend(self.opt, *self.loss(batch), clip=c.clip)
        self.evolution.update({})
        return metrics

    def loss(self, window: Batch) -> tuple[Tensor, Metrics]:
        c, mask = self.config, window["mask"]
        hidden = self.net(window)  # (B, K, 3, d)
        given = {
            "prediction": self.net.action(hidden[:, :, 1]),
            "act": window["act"],
            "previous": self.previous(window),
        }
        out = self.evolution(RegInputs(mask=mask, extra=given))
        act = masked_reduce(out.per_element, mask)
        metrics = {"actor/loss": act, "actor/blend": out.metrics["blend"]}
        if not c.inverse:
            return act, metrics
        after = hidden[:, :-1, 2]  # a-tokens that have a next step
        obs = F.smooth_l1_loss(self.net.head_obs(after), window["obs"][:, 1:], reduction="none")
        rest = F.smooth_l1_loss(
            self.net.head_return(after).squeeze(-1), window["return_to_go"][:, 1:], reduction="none"
        )
        both = mask[:, :-1] * mask[:, 1:]
        obs, rest = masked_reduce(obs.mean(-1), both), masked_reduce(rest, both)
        metrics |= {"model/obs": obs, "model/return": rest}
        return c.act_weight * act + c.obs_weight * obs + c.return_weight * rest, metrics

    @torch.no_grad()
    def previous(self, window: Batch) -> Tensor:
        """Actions (B, K, a) of the policy at the end of the stage before; the data's when off."""
        if not self.config.self_evolution:
            return window["act"]
        return self.teacher.action(self.teacher(window)[:, :, 1])

    @torch.no_grad()
    def refresh(self) -> None:
        """The policy becomes the earlier one; done at the end of every stage."""
        self.teacher.load_state_dict(self.net.state_dict())

    @torch.no_grad()
    def act(
        self,
        now: Batch,
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]:
        """The action given the last `context` steps, whose embedded tokens are remembered.

        `eval_mode=recurrent` is the same policy on the whole episode so far, at a cost that does
        not grow. It equals the windowed one while an episode is shorter than a window; from there
        on it remembers more than the network was trained with.
        """
        c, net, goal = self.config, self.net, self.targets[now["scenario"]]
        obs, start = self.standardize(now["obs"]), now["start"].bool()
        window = c.eval_mode == "window"
        if memory is None:
            past: Any = self.pads(obs) if window else net.backbone.start(len(goal))
            memory = {"past": past, "rest": goal, "step": torch.zeros_like(goal).long()}
        rest = torch.where(start, goal, memory["rest"] - now["reward"] / c.scale)
        step = torch.where(start, 0, memory["step"] + 1)
        content = [net.embed_return(rest.unsqueeze(-1)), net.embed_obs(obs)]
        pair = net.placed(torch.stack(content, 1), step)  # (B, 2, d)
        if window:
            hidden, past = self.observe(pair, memory["past"], start)
        else:
            hidden, past = net.backbone.observe(pair, renewed(memory["past"], start))
        act = net.action(hidden).clamp(-1, 1)
        token = net.placed(net.embed_act(act).unsqueeze(1), step).squeeze(1)
        if window:
            past["tokens"][:, -1] = token
        else:
            past = net.backbone.decide(token, past)
        return act, {"past": past, "rest": rest, "step": step}

    def pads(self, obs: Tensor) -> dict[str, Tensor]:
        """Windows of pads for obs (B, o): tokens (B, 3K, d), mask (B, K), pads (1, 3K, d)."""
        zero = obs.new_zeros(1, self.config.context)
        fields = {
            "return_to_go": zero,
            "obs": zero.unsqueeze(-1).expand(-1, -1, obs.shape[-1]),
            "act": zero.unsqueeze(-1).expand(-1, -1, self.act_dim),
            "step_in_episode": zero.long(),
        }
        pads, count = self.net.tokens(fields).flatten(1, 2), len(obs)
        return {"tokens": pads.expand(count, -1, -1), "mask": zero.expand(count, -1), "pads": pads}

    def observe(
        self, pair: Tensor, window: dict[str, Tensor], start: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Move on by the R- and s-token (B, 2, d): the output (B, d) at the s-token, the window.

        The place of the a-token stays empty, for no output that is read depends on it.
        """
        begins = start.unsqueeze(-1)
        past = torch.where(begins.unsqueeze(-1), window["pads"][:, 3:], window["tokens"][:, 3:])
        mask = torch.where(begins, 0, window["mask"][:, 1:])
        tokens = torch.cat([past, pair, torch.zeros_like(pair[:, :1])], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        hidden = self.net.backbone(tokens, mask if self.config.mask_pads else None, kept=1)
        return hidden[:, 1], window | {"tokens": tokens, "mask": mask}

    def state(self) -> dict[str, Any]:
        return modules_state(self, self.NAMES)

    def load(self, state: dict[str, Any]) -> None:
        load_modules(self, self.NAMES, state)


def renewed(memory: Any, start: Tensor) -> Any:
    """Memory of tensors in dicts, tuples and lists, with zeros in the rows where start (B,) is."""
    if isinstance(memory, Tensor):
        return torch.where(per_step(start, memory), 0, memory)
    if isinstance(memory, dict):
        return {name: renewed(part, start) for name, part in memory.items()}
    return type(memory)(renewed(part, start) for part in memory)


def decayed(net: nn.Module, decay: float, everything: bool) -> list[tuple[list[Tensor], float]]:
    """Parameters with their weight decay: none for biases, norms, A_log and D.

    Args:
        everything: exempt only biases and LayerNorms, as the authors do.
    """
    norms: Any = nn.LayerNorm if everything else (nn.LayerNorm, nn.RMSNorm)
    exempt = () if everything else ("A_log", "D")
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for module in net.modules():
        for name, value in module.named_parameters(recurse=False):
            free = name.endswith("bias") or isinstance(module, norms) or name in exempt
            groups[not free].append(value)
    return [(groups[True], decay), (groups[False], 0.0)]


make = DecisionMamba


def stages(algo: DecisionMamba, data: Dataset, run: Run) -> list[Stage]:
    c = algo.config
    # the authors add 1e-6 to the std, where the engine's statistics have 1e-3
    algo.standardize = Standardize(data.obs_dim, *data.statistics(eps=1e-6), run.device)

    def start():
        ready = prepare(algo.standardize)
        return windows(data, c.batch, c.context, c.scale, run.seeds, run.device, ready)

    between = [(algo.stage_steps, algo.refresh)] if c.self_evolution else []
    return [Stage("train", run.steps, start, algo.update, algo.cycle, between)]
