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

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.data.windows import SEQUENCE, asked, asked_returns, renewed, window_stages
from offrl.engine.method import Batch, Method, Metrics, Now, Run, Seeds, Spec, Stage, Task
from offrl.engine.optim import adamw, descend, target_copy, warm_up
from offrl.engine.ranges import Bound, Count, NonNegative, Positive, Real, Share, Whole
from offrl.nets import Linear, Standardize
from offrl.nets.sequence.mamba import decayed
from offrl.nets.sequence.multigrained import Backbone, Grouping
from offrl.nets.sequence.tokens import StepTokens
from offrl.regularizers import ProgressiveTarget, RegInputs
from offrl.regularizers.reductions import masked_reduce

SIZES = {"tiny": (3, 64), "small": (3, 128), "base": (3, 256), "release": (24, 768)}  # layers, d
STAGES = 40  # of self-evolution; the authors evaluate and count one every 2,500 updates


@dataclass(frozen=True)
class Config:
    steps: Count = 100_000  # updates
    batch: Count = 64  # windows
    context: Count = 20  # K; steps of a window
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
    act_weight: NonNegative = 0.9  # of the action's loss with `inverse`; without, it is 1
    obs_weight: NonNegative = 0.05  # of the loss of the next state
    return_weight: NonNegative = 0.05  # of the loss of the next return
    # share of an earlier policy's action in the label of the last stage; the released example's,
    # hopper-medium
    final_blend: Share = 0.85
    blend_cap: Share = 0.5  # largest share in any stage
    lr: Positive = 1e-4  # AdamW with eps 1e-6
    lr_warmup: Whole = 2_500  # updates of linear warm-up
    weight_decay: NonNegative = 1e-5  # of weights; not of biases and norms
    decay_all: bool = False  # decay A_log, D and RMSNorm weights too
    clip: Bound = 0.25  # largest norm of the gradient
    targets: tuple[Real, ...] = ()  # returns to ask for in evaluation; per task
    scale: Positive = 1000.0  # returns are divided by it
    max_step: Count = 1000  # rows of the embedding of steps; later steps share the last one


class Net(nn.Module):
    """A window of K steps -> what its tokens say."""

    def __init__(self, config: Config, spec: Spec, generator: Generator):
        super().__init__()
        c, (layers, width) = config, SIZES[config.size]
        self.mask_pads = c.mask_pads
        o, a = spec.obs_dim, spec.act_dim
        self.tokens = StepTokens((o, a), width, c.max_step, c.mlp_embedding, True, generator)
        self.backbone = Backbone(layers, width, c.fine, c.grouping, generator)
        self.head_hidden = Linear(width, width, generator=generator) if c.mlp_head else None
        self.head_act = Linear(width, a, generator=generator)
        self.head_obs = Linear(width, o, generator=generator)
        self.head_return = Linear(width, 1, generator=generator)

    def forward(self, window: Batch) -> Tensor:
        """Outputs (B, K, 3, d) at the tokens R, s, a of every step."""
        mask = window["mask"] if self.mask_pads else None
        return self.backbone(self.tokens(window).flatten(1, 2), mask).unflatten(1, (-1, 3))

    def action(self, hidden: Tensor) -> Tensor:
        """The action (*L, a) from outputs (*L, d) at s-tokens."""
        if self.head_hidden is None:
            return self.head_act(hidden).tanh()
        return self.head_act(F.gelu(self.head_hidden(hidden)))


class DecisionMamba:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        if c.eval_mode == "recurrent" and (c.grouping, c.mask_pads) != ("causal", True):
            raise ValueError(
                "eval_mode=recurrent needs grouping=causal and mask_pads=true: with others the "
                "network has no form that goes step by step"
            )
        self.config, self.generator, self.act_dim = c, generator, spec.act_dim
        self.targets = asked_returns("decision_mamba", c, seeds, generator.device)
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.net = Net(c, spec, generator)
        self.teacher = target_copy(self.net)
        self.evolution = ProgressiveTarget(
            final=c.final_blend if c.self_evolution else 0.0,
            cap=c.blend_cap,
            stages=STAGES,
            stage_steps=max(1, c.steps // STAGES),
        ).to(generator.device)
        self.opt = adamw(decayed(self.net, c.weight_decay, c.decay_all), eps=1e-6)

    def update(self, batch: Batch, turn: int) -> Metrics:
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

    def refresh(self) -> None:
        """The policy becomes the earlier one; done at the end of every stage."""
        self.teacher.load_state_dict(self.net.state_dict())

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        """The action given the last `context` steps, whose embedded tokens are remembered.

        `eval_mode=recurrent` is the same policy on the whole episode so far, at a cost that does
        not grow. It equals the windowed one while an episode is shorter than a window; from there
        on it remembers more than the network was trained with.
        """
        c, net, goal = self.config, self.net, asked(self, now)
        obs, start = self.standardize(now["obs"]), now["start"].bool()
        window = c.eval_mode == "window"
        if memory is None:
            past: Any = self.pads(obs) if window else net.backbone.start(len(goal))
            memory = {"past": past, "rest": goal, "step": torch.zeros_like(goal).long()}
        rest = torch.where(start, goal, memory["rest"] - now["reward"] / c.scale)
        step = torch.where(start, 0, memory["step"] + 1)
        content = [net.tokens.embed_return(rest.unsqueeze(-1)), net.tokens.embed_obs(obs)]
        pair = net.tokens.placed(torch.stack(content, 1), step)  # (B, 2, d)
        if window:
            hidden, past = self.observe(pair, memory["past"], start)
        else:
            hidden, past = net.backbone.observe(pair, renewed(memory["past"], start))
        act = net.action(hidden).clamp(-1, 1)
        token = net.tokens.placed(net.tokens.embed_act(act).unsqueeze(1), step).squeeze(1)
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


def stages(algo: DecisionMamba, task: Task, run: Run) -> list[Stage]:
    """As usual, with a new teacher at every stage of self-evolution."""
    renewal = (algo.evolution.stage_steps, algo.refresh)
    return window_stages(algo, task, run, [renewal] if algo.config.self_evolution else [])


METHOD = Method(DecisionMamba, Config, stages=stages, scheduled=True, **SEQUENCE)
