"""Environment steps per second of the online methods: collecting alone, and learning on the way.

    python scripts/online_speed.py --env halfcheetah --algos ddpg beer td3 sac ppo --peers

With --peers (extra `peers`) Stable-Baselines3 learns the same task beside: same networks, batch,
learning rate and updates per step. Methods take turns in short rounds, and seconds are the
processor's on one thread, since machines are shared; compare the ratios of one run.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import torch

from offrl import config, system
from offrl.data.dataset import home
from offrl.engine.capture.updates import Updates
from offrl.engine.method import Run
from offrl.envs.make import factory
from offrl.nets.kernels import matmul
from offrl.runs.task import make_task
from offrl.seeding import generator
from offrl.system import cpu_name

WARM_UP = 300  # environment steps before the clock starts
PEERS = ("TD3", "SAC", "PPO", "DQN", "DDPG")


class Ours:
    """One of our methods, captured where that is possible."""

    def __init__(self, name: str, env: str):
        method = config.method(name)
        given: dict[str, Any] = {"env": env, "env_workers": 0}
        if "warmup" in get_type_hints(method.config):
            given["algo.warmup"] = WARM_UP
        resolved = config.configured(name, given)
        options, task = resolved.config(), make_task(resolved, None, [0], torch.device("cpu"))
        self.algo = method.make(options, task.spec, generator(0, "speed"), ())
        (self.stage,) = method.stages(self.algo, task, Run(options.steps))
        self.collector: Any = self.stage.parts["collector"]
        if self.stage.before:
            self.stage.before()
        stage = self.stage
        self.update = Updates(stage.update, stage.start(), stage.turn, self.algo, "graph")
        self.unit = math.lcm(*(period for period, _ in stage.between))
        self.stride = (stage.clock(self.unit) - stage.clock(0)) / self.unit  # steps per update
        self.step = 0

    def collect(self, steps: int) -> int:
        """About so many environment steps; returns how many."""
        for _ in range(0, steps, self.collector.group):
            self.collector.step_policy(self.algo)
        return steps

    def learn(self, steps: int) -> int:
        """The same with updates on the way, in whole periods of the stage's eager work."""
        count = math.ceil(steps / (self.unit * self.stride)) * self.unit
        for _ in range(count):
            for period, work in self.stage.between:
                if self.step % period == 0:
                    work()
            self.update(self.step)
            self.step += 1
        return int(count * self.stride)


def peer(name: str, env: str) -> Callable[[int], int]:
    """`learn` of Stable-Baselines3's method, on as many of the environments as ours has."""
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import Logger

    resolved = config.configured(name.lower(), {"env": env})
    options, envs = resolved.config(), make_vec_env(factory(env), resolved.settings.envs)
    shared = {
        "learning_rate": options.lr,
        "batch_size": options.batch,
        "device": "cpu",
        "seed": 0,
        "policy_kwargs": {"net_arch": list(options.hidden)},
    }
    if name == "PPO":
        shared |= {"n_steps": options.rollout, "n_epochs": options.epochs}
    else:
        every = getattr(options, "update_every", 1)
        shared |= {
            "learning_starts": WARM_UP,
            "train_freq": every,
            "gradient_steps": 1,
            "buffer_size": options.capacity,
        }
    model = getattr(stable_baselines3, name)("MlpPolicy", envs, **shared)
    model.set_logger(Logger(folder=None, output_formats=[]))

    def learn(steps: int) -> int:
        before = model.num_timesteps
        model.learn(steps, reset_num_timesteps=False, log_interval=None)
        return model.num_timesteps - before

    return learn


def rate(run: Callable[[int], int], steps: int) -> float:
    start = time.process_time()
    return run(steps) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="halfcheetah")
    parser.add_argument("--algos", nargs="+", default=["td3", "sac"])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    system.prepare(1, keep_memory=True)
    print(matmul.select_backend(home(), cpu_name()))
    ours = {name: Ours(name, given.env) for name in given.algos}
    runs: dict[str, Callable[[int], int]] = {
        f"{name} collects": method.collect for name, method in ours.items()
    }
    runs |= {name: method.learn for name, method in ours.items()}
    if given.peers:
        names = [name for name in PEERS if name.lower() in given.algos]
        runs |= {f"sb3-{name.lower()}": peer(name, given.env) for name in names}
    for name, run in runs.items():
        if not name.endswith("collects"):
            run(WARM_UP + given.steps)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.rounds):
        for name, run in runs.items():
            rates[name].append(rate(run, given.steps))
    found: dict[str, Any] = {
        "env": given.env,
        "hardware": cpu_name(),
        "threads": 1,
        "torch": torch.__version__,
        "rounds": given.rounds,
        "steps": given.steps,
        "rows": {},
    }
    if given.peers:
        found["stable-baselines3"] = metadata.version("stable-baselines3")
    print(f"{'':<16} {'steps/s':>9} {'range':>15} {'updates/s':>10} {'over SB3':>9}")
    for name, values in rates.items():
        middle = statistics.median(values)
        row = found["rows"][name] = {
            "steps_per_second": round(middle, 1),
            "range": [round(min(values), 1), round(max(values), 1)],
        }
        updates = against = ""
        if name in ours:
            row["updates_per_second"] = round(middle / ours[name].stride, 1)
            updates = f"{row['updates_per_second']:.0f}"
        if f"sb3-{name}" in rates:
            pairs = zip(values, rates[f"sb3-{name}"], strict=True)
            row["over_sb3"] = round(statistics.median(a / b for a, b in pairs), 2)
            against = f"{row['over_sb3']:.2f}"
        print(
            f"{name:<16} {middle:>9.0f} {min(values):>7.0f}-{max(values):<7.0f} "
            f"{updates:>10} {against:>9}"
        )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
