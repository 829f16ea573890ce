"""PPO: policy gradient on fresh rollouts with a clipped probability ratio.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347; advantages by
GAE, Schulman et al., ICLR 2016, arXiv:1506.02438.

    delta_t  = r_t + discount (1 - terminal_t) V(s_{t+1}) - V(s_t)
    A_t      = delta_t + discount trace (1 - end_t) A_{t+1},   R_t = A_t + V(s_t)
    policy   L = mean_b max(-A rho, -A clip(rho, 1 - c, 1 + c)),   rho = pi(a|s) / pi_old(a|s)
    value    L = 1/2 mean_b max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)
    both     L = policy + value_weight value - entropy mean_b H(pi(.|s))

Per iteration `rollout` steps of every environment, then `epochs` passes over them in minibatches;
one update is one minibatch, whose advantages are standardized. With `normalize` observations and
rewards are divided by running standard deviations (rewards by that of the discounted return),
clipped to +-10.

Shapes: *S optional leading seed axes, B rows of a minibatch, T steps, n environments per seed.

Differences from the authors' code: the settings are CleanRL's. A time limit is no end: its step
bootstraps from its true last observation (`bootstrap_timeouts=false` is CleanRL). Statistics move
once per iteration, not at every step, so that a rollout is from one policy; they begin with a
rollout that is not learned from. The noise is of actions in [-1, 1], CleanRL's in the environment's
own units (the half-range is 0.4 in Humanoid).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.collector import Collector
from offrl.data.table import pack, unpack, widths
from offrl.engine.method import Batch, Method, Metrics, Now, Run, Sampler, Seeds, Spec, Stage, Task
from offrl.engine.optim import adamw, descend
from offrl.engine.ranges import Bound, Count, NonNegative, Positive, Several, Share
from offrl.nets.actors import Categorical, Gaussian
from offrl.nets.mlp import MLP, Running


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # environment steps, a first rollout for statistics included
    rollout: Count = 2048  # steps of every environment per iteration
    epochs: Count = 10  # passes over a rollout
    batch: Several = 64  # rows of a minibatch; divides rollout * envs
    lr: Positive = 3e-4  # Adam; falls linearly to 0 over the iterations
    discount: Share = 0.99  # per step
    trace: Share = 0.95  # GAE's lambda
    clip: Bound = 0.2  # of the ratio, and of the change of a value
    clip_value: bool = True  # clip the change of a value too
    value_weight: NonNegative = 0.5  # of the value's loss
    entropy: NonNegative = 0.0  # weight of the policy's entropy
    max_norm: Bound = 0.5  # of the joint gradient
    bootstrap_timeouts: bool = True  # go on from the last observation where an episode was cut off
    normalize: bool = True  # observations and rewards
    hidden: tuple[Count, ...] = (64, 64)  # tanh units, policy and value apart


MADE = ("log_prob", "advantage", "return", "value")  # fields that a rollout is given


class PPO:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        head = Categorical if spec.discrete else Gaussian
        self.actor = head(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.critic = MLP((spec.obs_dim, *c.hidden, 1), seeds, generator, "tanh")
        both = [*self.actor.parameters(), *self.critic.parameters()]
        self.opt = adamw([(both, 0.0)], c.lr, eps=1e-5)
        self.observations = Running(spec.obs_dim, seeds, generator.device)
        self.returns = Running(1, seeds, generator.device)  # discounted, of plain rewards

    def update(self, batch: Batch, turn: int) -> Metrics:
        return descend(self.opt, *self.loss(batch), clip=self.config.max_norm)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        c, advantage = self.config, standardized(batch["advantage"])
        log_prob, entropy = self.actor.judge(batch["obs"], batch["act"])  # (*S, B)
        change = log_prob - batch["log_prob"]
        ratio = change.exp()
        near = ratio.clamp(1 - c.clip, 1 + c.clip)
        policy = torch.maximum(-advantage * ratio, -advantage * near).mean(-1)  # (*S,)
        value, old = self.critic(batch["obs"]).squeeze(-1), batch["value"]
        error = (value - batch["return"]).square()
        if c.clip_value:
            close = old + (value - old).clamp(-c.clip, c.clip)
            error = torch.maximum(error, (close - batch["return"]).square())
        error, entropy = 0.5 * error.mean(-1), entropy.mean(-1)
        loss = policy + c.value_weight * error - c.entropy * entropy
        return loss, {
            "policy/loss": policy,
            "value/loss": error,
            "policy/entropy": entropy,
            "policy/kl": (ratio - 1 - change).mean(-1),
            "policy/clipped": (near != ratio).float().mean(-1),
        }

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        obs = self.seen(now["obs"])
        if now.get("explore"):
            return self.actor.sample(obs, now["generator"]), memory
        return self.actor.best(obs), memory

    def estimate(self, now: Now, act: Tensor) -> Tensor:
        """V(s) in units of the plain rewards."""
        value = self.critic(self.seen(now["obs"])).squeeze(-1)
        return value * self.returns.std().squeeze(-1) if self.config.normalize else value

    def seen(self, obs: Tensor) -> Tensor:
        """Observations as the networks see them."""
        return self.observations(obs) if self.config.normalize else obs


class Rollouts:
    """The rows that an iteration learns from, (*S, T n) in the order of time, and their making.

    Raises:
        ValueError: if minibatches do not divide a rollout, or `run.steps` hold none to learn from.
    """

    def __init__(self, algo: PPO, data: Collector, run: Run):
        c, self.algo, self.data = algo.config, algo, data
        self.rows = c.rollout * data.group
        if self.rows % c.batch:
            raise ValueError(f"batch={c.batch} does not divide a rollout of {self.rows} rows")
        self.first = self.rows if c.normalize else 0  # for the statistics
        self.iterations = (run.steps - self.first) // self.rows
        if self.iterations < 1:
            raise ValueError(
                f"steps={run.steps} is too little: a rollout has {self.rows} steps"
                + (", and the first is for the statistics" if self.first else "")
            )
        self.minibatches = self.rows // c.batch
        data.keep(self.rows)
        names = {"obs": "obs", "act": "act"} | dict.fromkeys(MADE, "reward")
        self.columns = {name: data.replay.columns[n] for name, n in names.items()}
        seeds, device = run.seeds, data.device
        self.table = torch.zeros(*seeds, self.rows, sum(widths(self.columns)), device=device)
        self.order = torch.zeros(*seeds, self.rows, dtype=torch.int64, device=device)
        self.place = torch.zeros((), dtype=torch.int64, device=device)  # of the next minibatch
        self.running = torch.zeros(*seeds, data.group, device=device)  # discounted returns
        self.iteration = 0

    def begin(self) -> None:
        """A rollout of the first policy, for the statistics, where there are any."""
        if self.first:
            rows = self.play()
            self.scaled_reward(rows)
            self.algo.observations.add(rows["obs"].flatten(-3, -2))

    @torch.no_grad()
    def collect(self) -> None:
        """A rollout of the current policy, its advantages, and the learning rate that is due."""
        algo, c, rows = self.algo, self.algo.config, self.play()
        reward = self.scaled_reward(rows) if c.normalize else rows["reward"]  # (*S, T, n)
        obs, next_obs = (algo.seen(rows[name].flatten(-3, -2)) for name in ("obs", "next_obs"))
        shape = reward.shape
        value, later = (algo.critic(x).squeeze(-1).view(shape) for x in (obs, next_obs))
        end = (rows["terminal"] + rows["timeout"]).clamp(max=1)
        last = rows["terminal"] if c.bootstrap_timeouts else end
        delta = reward + c.discount * (1 - last) * later - value
        advantage = accumulated(delta.flip(-2), c.discount * c.trace * (1 - end).flip(-2)).flip(-2)
        act = rows["act"].flatten(len(shape) - 2, len(shape) - 1)
        made = (x.flatten(-2) for x in (advantage, advantage + value, value))
        log_prob = algo.actor.judge(obs, act)[0]
        fields = {"obs": obs, "act": act} | dict(zip(MADE, (log_prob, *made), strict=True))
        self.table.copy_(pack(fields, self.columns, len(shape) - 1))
        if c.normalize:
            algo.observations.add(rows["obs"].flatten(-3, -2))
        for group in algo.opt.param_groups:
            group["lr"].fill_(c.lr * (1 - self.iteration / self.iterations))
        self.iteration += 1

    def play(self) -> Batch:
        """A rollout as it was paid: fields (*S, T, n, ...)."""
        for _ in range(self.algo.config.rollout):
            self.data.step_policy(self.algo)
        rows, at = unpack(self.data.replay.table, self.data.replay.columns), len(self.data.seeds)
        return {name: x.unflatten(at, (-1, self.data.group)) for name, x in rows.items()}

    def scaled_reward(self, rows: Batch) -> Tensor:
        """Rewards over the standard deviation of discounted returns so far; moves it."""
        end = (rows["terminal"] + rows["timeout"]).clamp(max=1)
        goes_on = torch.cat([torch.ones_like(end[..., :1, :]), 1 - end[..., :-1, :]], -2)
        keep = self.algo.config.discount * goes_on
        running = accumulated(rows["reward"], keep, self.running)
        self.running.copy_(running[..., -1, :] * (1 - end[..., -1, :]))
        self.algo.returns.add(running.flatten(-2).unsqueeze(-1))
        return (rows["reward"] / self.algo.returns.std()).clamp(-10, 10)

    def shuffle(self) -> None:
        """A new order for the next pass."""
        uniform = torch.empty(self.order.shape, dtype=torch.float64, device=self.order.device)
        self.order.copy_(uniform.uniform_(generator=self.algo.generator).argsort(-1))
        self.place.zero_()

    def sampler(self) -> Sampler:
        """The minibatches of a pass in turn."""
        offset = torch.arange(self.algo.config.batch, device=self.order.device)
        seeds = self.order.shape[:-1]
        first = (torch.arange(seeds.numel(), device=offset.device) * self.rows).view(*seeds, 1)

        def sample(generator: Generator) -> Batch:
            place = (self.place + offset).expand(*seeds, -1)
            index = self.order.gather(-1, place) + first  # (*S, B)
            self.place.add_(self.algo.config.batch)
            rows = self.table.flatten(0, -2).index_select(0, index.flatten())
            return unpack(rows.view(*index.shape, -1), self.columns)

        return sample

    def save(self, place: Path) -> dict[str, Any]:
        names = ("table", "order", "place", "running", "iteration")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any], place: Path) -> None:
        for name in ("table", "order", "place", "running"):
            getattr(self, name).copy_(state[name])
        self.iteration = state["iteration"]


def accumulated(x: Tensor, keep: Tensor, start: Tensor | None = None) -> Tensor:
    """y_t = x_t + keep_t y_{t-1} along the axis before the last, y_{-1} = start or 0."""
    out, y = [], torch.zeros_like(x[..., 0, :]) if start is None else start
    for now, share in zip(x.unbind(-2), keep.unbind(-2), strict=True):
        y = now + share * y
        out.append(y)
    return torch.stack(out, -2)


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)


def stages(algo: PPO, task: Task, run: Run) -> list[Stage]:
    rollouts = Rollouts(algo, data := Collector.of(task, run), run)
    updates = algo.config.epochs * rollouts.minibatches  # of an iteration
    return [
        Stage(
            "train",
            rollouts.iterations * updates,
            start=rollouts.sampler,
            update=algo.update,
            before=rollouts.begin,
            between=[(updates, rollouts.collect), (rollouts.minibatches, rollouts.shuffle)],
            clock=lambda step: rollouts.first + step * rollouts.rows // updates,
            parts={"collector": data, "rollouts": rollouts},
        )
    ]


KINDS = ("continuous", "discrete")
METHOD = Method(PPO, Config, stages=stages, actions=KINDS, scheduled=True)
