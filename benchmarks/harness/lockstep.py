"""Decision Mamba's evaluation in lock-step against one episode at a time: time, and same actions.

    python scripts/lockstep.py --env hopper --episodes 20

All episodes of all targets are played as one batch, by a policy with its first weights; then some
rows are played again on the observations that they met, each alone, and the actions compared: once
by the same code (`alone`), once as training computes a window (`plain`: all outputs of the whole
window from its raw fields, in torch's operators, only the scan compiled). Times are of the policy;
the environments' own time, the same either way, stands beside them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from offrl import config, system
from offrl.data.windows import act_taken, extend
from offrl.engine.method import Batch, Policy, Spec
from offrl.envs.make import factory
from offrl.envs.vector import Vector
from offrl.nets.kernels import fused_backbone
from offrl.runs.task import pick_device
from offrl.seeding import derive, generator
from offrl.system import cpu_name

ALGO = "decision_mamba"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="hopper")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--eval_mode", help="of the batch, never of the rows")
    parser.add_argument("--episodes", type=int, default=20, help="per target")
    parser.add_argument("--steps", type=int, default=100, help="of every episode")
    parser.add_argument("--alone", type=int, default=3, help="rows that are played alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    system.prepare(given.threads, keep_memory=True)
    device = pick_device(given.device)
    policy, window = make(given, given.eval_mode, device), make(given, None, device)
    seen, acts, envs_seconds, together = play(policy, given, device)
    rows = torch.linspace(0, acts.shape[1] - 1, given.alone).long().tolist()
    alone, plain, worst = 0.0, 0.0, torch.zeros(len(acts))
    for row in rows:
        own, seconds = replay(window, seen, slice(row, row + 1))
        with patch.object(fused_backbone, "serves", lambda x: False):
            whole, whole_seconds = replay(Plain(window), seen, slice(row, row + 1))
        alone, plain = alone + seconds / len(rows), plain + whole_seconds / len(rows)
        for one in (own, whole):
            worst = torch.maximum(worst, (one[:, 0] - acts[:, row]).abs().amax(-1))
    batch = acts.shape[1]
    found = {
        **{name: value for name, value in vars(given).items() if name != "out"},
        "batch": batch,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "lockstep_ms_per_step": 1000 * together / given.steps / batch,
        "alone_ms_per_step": 1000 * alone / given.steps,
        "plain_ms_per_step": 1000 * plain / given.steps,
        "windows_filled": filled(torch.stack([told["start"] for told in seen]), policy),
        "environment_ms_per_step": 1000 * envs_seconds / given.steps / batch,
        "times_faster_than_plain": plain * batch / together,
        "times_faster_than_alone": alone * batch / together,
        "times_faster_than_plain_with_environments": (plain * batch + envs_seconds)
        / (together + envs_seconds),
        "largest_difference": {"first_window": float(worst[:20].max()), "all": float(worst.max())},
    }
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


def make(given: argparse.Namespace, mode: str | None, device: torch.device) -> Any:
    """The method with its first weights, the same in every call."""
    own = {"env": given.env, "algo.size": given.size} | ({"algo.eval_mode": mode} if mode else {})
    options = config.configured(ALGO, own).config()
    example = Vector([factory(given.env)], [0])
    spec = Spec(example.obs_dim, example.act_dim)
    example.close()
    return config.method(ALGO).make(options, spec, generator(0, "lockstep", device=device), ())


class Plain:
    """A policy that computes all outputs of every window from its raw fields, as training does."""

    def __init__(self, algo: Any):
        self.algo = algo

    def act(self, now: Batch, memory: Any = None) -> tuple[torch.Tensor, Any]:
        algo, c = self.algo, self.algo.config
        now, goal = now | {"obs": algo.standardize(now["obs"])}, algo.targets[now["scenario"]]
        window = extend(memory, now, goal, c.scale, c.context, algo.act_dim)
        act = algo.net.action(algo.net(window)[:, -1, 1]).clamp(-1, 1)
        return act, act_taken(window, act)


@torch.no_grad()
def play(
    policy: Any, given: argparse.Namespace, device: torch.device
) -> tuple[list[Batch], torch.Tensor, float, float]:
    """Everything in one batch: what the policy was told, its actions, both times."""
    targets = len(config.method(ALGO).scenarios(policy.config))
    starts = [derive(0, "lockstep", i) for i in range(given.episodes)]
    envs = Vector([factory(given.env)] * (given.episodes * targets), starts * targets)
    obs, start, reward = envs.reset(), torch.ones(envs.count), torch.zeros(envs.count)
    scenario = torch.arange(envs.count) // given.episodes
    seen, acts, playing, acting, memory = [], [], 0.0, 0.0, None
    for _ in range(given.steps):
        told = {"obs": obs, "start": start, "reward": reward, "scenario": scenario}
        seen.append({name: value.to(device) for name, value in told.items()})
        if memory is None:
            policy.act(seen[-1])  # compiles what is compiled
        began = time.perf_counter()
        act, memory = policy.act(seen[-1], memory)
        acts.append(act.cpu())
        acted = time.perf_counter()
        _, reward, terminal, timeout, obs = envs.step(acts[-1])
        acting, playing = acting + acted - began, playing + time.perf_counter() - acted
        start = terminal + timeout
    envs.close()
    return seen, torch.stack(acts), playing, acting


def filled(starts: torch.Tensor, policy: Any) -> float:
    """Share of real steps in all windows, of starts (T, B); the rest is padding."""
    length, steps, known = policy.config.context, torch.zeros(starts.shape[1]), 0.0
    for start in starts:
        steps = torch.where(start.bool(), 1, steps + 1)
        known += float(steps.clamp(max=length).mean()) / length / len(starts)
    return known


@torch.no_grad()
def replay(policy: Policy, seen: list[Batch], row: slice) -> tuple[torch.Tensor, float]:
    """One row's actions on what it was told, and the time they took."""
    policy.act({name: value[row] for name, value in seen[0].items()})  # compiles what is compiled
    acts, memory, began = [], None, time.perf_counter()
    for told in seen:
        act, memory = policy.act({name: value[row] for name, value in told.items()}, memory)
        acts.append(act.cpu())
    return torch.stack(acts), time.perf_counter() - began
