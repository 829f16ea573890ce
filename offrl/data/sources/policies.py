"""The behaviour policies that ship with the library: snapshots of its own SAC, and an expert.

`behavior/<env>.safetensors` holds the actors in fp16, `behavior/manifest.json` what they are:
environment, training step, returns, the command that trained them, versions. `tools.packing`
chose them among the snapshots of training runs and wrote both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from offrl.engine.method import Now
from offrl.errors import DataError

FOLDER = Path(__file__).parent / "behavior"
Weights = list[tuple[Tensor, Tensor]]  # (in, out) and (1, out) of every layer


@dataclass(frozen=True)
class Behavior:
    """A tanh-squashed Gaussian policy for inference, equal to `GaussianActor` with its weights."""

    layers: Weights  # float32
    about: dict[str, Any]  # role ("early", "medium", "expert"), step, return; see `tools.packing`

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        """Actions (B, a) in [-1, 1] for now["obs"] (B, o): sampled, or the tanh of the mean."""
        x = now["obs"]
        for weight, bias in self.layers[:-1]:
            x = torch.addmm(bias, x, weight).relu_()
        weight, bias = self.layers[-1]
        mean, log_std = torch.addmm(bias, x, weight).chunk(2, -1)
        if not now.get("explore"):
            return mean.tanh(), memory
        noise = torch.empty_like(mean).normal_(generator=now["generator"])
        return (mean + log_std.clamp(-20, 2).exp() * noise).tanh(), memory

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, 64 hex digits."""
        parts = (part.numpy().tobytes() for layer in self.layers for part in layer)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """What is shipped. A folder without policies has an empty manifest."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"format": 1, "robots": {}}


def load(env: str, folder: Path = FOLDER) -> list[Behavior]:
    """The policies of an environment: the early ones by step, then medium, then the expert.

    Raises DataError if there are none, or the files are damaged.
    """
    robots = manifest(folder)["robots"]
    if env not in robots:
        raise DataError(
            f"no behaviour policies ship for {env!r} (there are: {', '.join(robots) or 'none'}); "
            "roll out your own with scripts/collect.py run=DIR, or choose dataset=random"
        )
    try:
        tensors = load_file(folder / f"{env}.safetensors")
        return [
            Behavior(layers(tensors, f"{about['role']}/{about['step']}/"), about)
            for about in robots[env]["policies"]
        ]
    except Exception as error:  # safetensors raises a type of its own
        raise DataError(
            f"the behaviour policies in {folder} are damaged ({error}); install offrl again"
        ) from error


def layers(tensors: Mapping[str, Tensor], prefix: str = "") -> Weights:
    """Layers of an actor's state, rounded to fp16 as they ship and widened to float32."""
    count = sum(name.startswith(prefix) and name.endswith("weight") for name in tensors)
    half = lambda i, kind: tensors[f"{prefix}net.layers.{i}.{kind}"].half().float()  # noqa: E731
    return [(half(i, "weight"), half(i, "bias")) for i in range(count)]
