"""A small case of every method: its config, the shape of its task, batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from offrl import config
from offrl.data.neighbors import StateNeighbors
from offrl.engine.method import Batch, Spec

OBS, ACT = 3, 2
TASK = Spec(OBS, ACT)
G = torch.Generator().manual_seed(5)
STATES = torch.randn(300, OBS, generator=G)  # of the data set that PRDC searches
ACTIONS = torch.randn(300, ACT, generator=G).tanh()


def transitions(seeds=(), size=64, seed=1):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*seeds, size, *shape, generator=g)  # noqa: E731
    return dict(
        obs=normal(OBS),
        act=normal(ACT).tanh(),
        reward=normal(),
        next_obs=normal(OBS),
        terminal=(normal() > 1).float(),
    )


def pairs(seeds=(), size=64, seed=1):
    """States and the actions of a policy that can be learned."""
    obs = torch.randn(*seeds, size, OBS, generator=torch.Generator().manual_seed(seed))
    return {"obs": obs, "act": torch.tanh(obs[..., :ACT] - obs[..., 1:])}


def known(seeds=(), size=64, seed=1):
    """Transitions from rows of the data set whose numbers they hold."""
    g = torch.Generator().manual_seed(seed + 100)
    index = torch.randint(len(STATES), (*seeds, size), generator=g)
    rows = {"index": index, "obs": STATES[index], "act": ACTIONS[index]}
    return transitions(seeds, size, seed) | rows


def discrete(seeds=(), size=64, seed=1):
    g = torch.Generator().manual_seed(seed + 100)
    act = torch.randint(4, (*seeds, size), generator=g)
    return transitions(seeds, size, seed) | {"act": act}


def minibatch(seeds=(), size=64, seed=1, discrete=False):
    """Rows of a rollout of PPO."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*seeds, size, *shape, generator=g)  # noqa: E731
    act = torch.randint(2, (*seeds, size), generator=g) if discrete else normal(ACT)
    return {
        "obs": normal(OBS),
        "act": act,
        "log_prob": normal() - 2,
        "advantage": normal(),
        "return": normal(),
        "value": normal(),
    }


def goals(seeds=(), size=32, seed=1, dtype=torch.float32, states=(), flags=("success",)):
    """States with goals, all whole observations."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*seeds, size, *shape, generator=g, dtype=dtype)  # noqa: E731
    flag = lambda: (torch.rand(*seeds, size, generator=g) < 0.2).to(dtype)  # noqa: E731
    found = {name: draw(OBS) for name in ("obs", "next_obs", *states, "goal")}
    return found | {"act": draw(ACT).tanh()} | {name: flag() for name in flags}


two_goals = partial(goals, states=("value_goal",))
subgoals = partial(goals, size=64, states=("value_goal", "waypoint", "ahead"))
options = partial(
    goals,
    size=64,
    states=("option_end", "low_goal", "high_goal", "waypoint", "ahead"),
    flags=("low_success", "high_success"),
)


def window(count=4, length=6, short=True, seed=1):
    """A batch of windows; with `short`, row i lacks i of its steps."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, length)
    for i in range(count if short else 0):
        mask[i, :i] = 0
    return {
        "obs": torch.randn(count, length, 2, generator=g),
        "act": torch.randn(count, length, 2, generator=g).tanh(),
        "return_to_go": torch.randn(count, length, generator=g),
        "step_in_episode": torch.arange(length).expand(count, length) + 3,
        "mask": mask,
    }


def near(algo: Any) -> None:
    """Neighbors of the data set, of which an update searches a fixed number in full."""
    device = algo.generator.device
    table = StateNeighbors.build(STATES, ACTIONS, "toy", k=8, device=device)
    algo.neighbors = replace(table, budget=16)


@dataclass(frozen=True)
class Case:
    config: Any
    batch: Callable[..., Batch]  # (seeds=, seed=), without `seeds` where the method has none
    spec: Spec = TASK
    prepare: Callable[[Any], None] = lambda algo: None


def case(
    name: str, small: dict[str, Any], draw: Callable[..., Batch], *more: Any, **others: Any
) -> Case:
    return Case(config.method(name).config(**small | others), draw, *more)


MLP = {"hidden": (32, 32)}
GOALS = {"hidden": (16, 16), "batch": 16}
HIGH = GOALS | {"subgoal_steps": 4, "rep_dim": 5}
ROLLOUT = {"hidden": (16, 16), "rollout": 32, "batch": 16, "epochs": 3, "entropy": 0.01}
WINDOWS = {"size": "tiny", "context": 4, "batch": 8, "targets": (3.0, 1.0), "scale": 1.0}
CASES = {
    "bc": case("bc", MLP, pairs),
    "td3bc": case("td3bc", MLP, transitions),
    "prdc": case("prdc", MLP, known, TASK, near),
    "ddpg": case("ddpg", MLP, transitions),
    "td3": case("td3", MLP, transitions),
    "sac": case("sac", MLP, transitions),
    "beer": case("beer", MLP, transitions),
    "dqn": case("dqn", MLP, discrete, Spec(OBS, 4, discrete=True), beer=1e-3, double=True),
    "ppo": case("ppo", ROLLOUT, minibatch),
    "gcbc": case("gcbc", GOALS, two_goals),
    "gcivl": case("gcivl", GOALS, two_goals),
    "gciql": case("gciql", GOALS, two_goals),
    "crl": case("crl", GOALS, two_goals, latent=16),
    "qrl": case("qrl", GOALS, two_goals, latent=16),
    "hiql": case("hiql", HIGH, subgoals),
    "ota": case("ota", HIGH, options, option_steps=2),
    "decision_transformer": case("decision_transformer", WINDOWS, window, Spec(2, 2)),
    "decision_mamba": case("decision_mamba", WINDOWS, window, Spec(2, 2), steps=400),
}


def make(name, config=None, seeds=(), device="cpu", dtype=torch.float32, spec=None):
    """The method of a case, with its config and task unless others are given."""
    case = CASES[name]
    generator = torch.Generator(device).manual_seed(0)
    algo = method(name).make(config or case.config, spec or case.spec, generator, seeds)
    case.prepare(algo)
    for module in modules(algo).values():
        module.to(dtype)
    return algo


def method(name):
    return config.method(name)


def modules(algo) -> dict[str, nn.Module]:
    return {name: part for name, part in vars(algo).items() if isinstance(part, nn.Module)}
