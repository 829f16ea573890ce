"""Policies of untrained methods, and runs that hold them."""

import json
from dataclasses import asdict, replace

import numpy as np

from offrl.config import Resolved, Settings
from offrl.engine import checkpoint
from offrl.engine.state import state_of
from offrl.runs.export import Step
from offrl.runs.policy import Policy
from offrl.runs.signature import FILE, Signature
from tests.algos.cases import CASES, make, method

LOW, HIGH, FIRST = -2.0, 3.0, 5  # of actions; discrete ones count from FIRST


def signature(name: str) -> Signature:
    case = CASES[name]
    spec, found = case.spec, method(name)
    units = {"low": (LOW,) * spec.act_dim, "high": (HIGH,) * spec.act_dim}
    return Signature(
        method=name,
        obs_shape=(spec.obs_dim,),
        act_shape=() if spec.discrete else (spec.act_dim,),
        actions=spec.act_dim,
        discrete=spec.discrete,
        goals=found.goals,
        targets=tuple(getattr(case.config, "targets", ())),
        **({"start": FIRST} if spec.discrete else units),
    )


def seen(name: str) -> dict[str, np.ndarray]:
    """As of training data between -1 and 1."""
    wide = CASES[name].spec.obs_dim
    one = np.ones(wide, np.float32)
    sample = np.random.default_rng(1).uniform(-1, 1, (1000, wide)).astype(np.float32)
    return {"low": -one, "high": one, "std": one / 2, "sample": sample}


def policy(name: str, **options) -> Policy:
    """Of fresh weights; its actions are far from 0 and from the bounds."""
    algo, about = make(name, replace(CASES[name].config, **options)), signature(name)
    return Policy(Step(algo, about), asdict(about) | {"versions": {"offrl": "0"}}, seen(name))


def stored(folder, name: str, seeds=(0,)):
    """A run directory with the method's checkpoint, of stacked seeds if there are several."""
    case = CASES[name]
    algo = make(name, seeds=(len(seeds),) if len(seeds) > 1 else ())
    place = folder / ("seed-0" if len(seeds) == 1 else f"seeds-{seeds[0]}-{seeds[-1]}")
    place.mkdir()
    resolved = Resolved(Settings(env="none"), name, asdict(case.config))
    (folder / "config.yaml").write_text(resolved.to_yaml())
    (folder / FILE).write_text(json.dumps(asdict(signature(name))))
    content = {"label": name, "seeds": list(seeds), "step": 3, "algo": state_of(algo)}
    checkpoint.save(place / "checkpoint.pt", content)
    return algo
