"""Peers by name: what they need, and how each is set up on a data set."""

import importlib.util
from collections.abc import Callable, Iterable

import torch

from offrl import config as configuration
from offrl.data import Dataset, prepare
from offrl.engine.method import TRANSITION
from offrl.errors import ConfigError
from offrl.nets import Standardize

# what `peers` may name: the packages behind each
PEERS = {
    "plain": (),
    "jax": ("jax", "optax"),
    "sb3-td3": ("stable-baselines3",),
    "sb3-sac": ("stable-baselines3",),
    "d3rlpy": (),  # lives in `peer_python`
}


def packages(names: Iterable[str]) -> list[str]:
    return sorted({package for name in names for package in PEERS[name]})


def rival(
    name: str, data: Dataset, batch: int, updates: int, device: torch.device, python: str | None
) -> Callable[[int], None]:
    """The peer's function that makes n updates. Two layers of 256 units.

    Args:
        updates: that are asked for at a time.
        python: an interpreter that has d3rlpy.

    Raises:
        ConfigError: for an unknown peer, one that is not installed, or an odd number of updates
            beside jax.
    """
    if name not in PEERS:
        raise ConfigError(
            f"there is no peer {name!r}{configuration.nearest(name, PEERS)}; "
            f"known: {', '.join(PEERS)}"
        )
    for package in packages([name]):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ConfigError(
                f"the peer {name} needs {package}: pip install -c constraints.txt -e '.[peers]'"
            )
    fields = {key: data[key] for key in TRANSITION}
    if name.startswith("sb3"):
        from benchmarks.harness.peers import sb3

        arrays = {key: value.numpy() for key, value in fields.items()}
        run = sb3.filled(name.removeprefix("sb3-").upper(), arrays, batch, device)
    else:
        fields = prepare(Standardize(data.obs_dim, *data.statistics(), None))(fields)
        arrays = {key: value.numpy() for key, value in fields.items()}
        if name == "d3rlpy":
            from benchmarks.harness.peers import in_d3rlpy

            if python is None:
                raise ConfigError(
                    "d3rlpy pins another gymnasium: name a Python that has it, peer_python=PATH"
                )
            run = in_d3rlpy.td3bc(arrays, batch, str(device), python)
        elif name == "plain":
            from benchmarks.harness.peers import plain

            run = plain.td3bc(fields, batch, device)
        else:
            if updates % 2:
                raise ConfigError("jax takes pairs of updates: updates must be even")
            from benchmarks.harness.peers import in_jax

            run = in_jax.td3bc(arrays, batch, updates)
    return run
