"""D4RL-normalized scores: 100 (return - random) / (expert - random).

Fu, Kumar, Nachum, Tucker, Levine, "D4RL: Datasets for Deep Data-Driven RL", 2020,
arXiv:2004.07219; numbers from the released code (Farama-Foundation/D4RL). Every published number
uses them as they stand, also where a measurement disagrees: a uniformly random policy earns about
19 on Hopper, which scores 1.2, not 0.
"""

import re
from typing import TypeVar

import numpy as np
from torch import Tensor

Returns = TypeVar("Returns", float, Tensor, np.ndarray)

# (random, expert) undiscounted returns of one episode. They depend on the environment only, not
# on the quality or version of a data set; Maze2D's version 0 had another horizon.
REFERENCES: dict[str, tuple[float, float]] = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze-umaze": (0.0, 1.0),
    "antmaze-medium": (0.0, 1.0),
    "antmaze-large": (0.0, 1.0),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "maze2d-eval-umaze": (36.63, 141.4),
    "maze2d-eval-medium": (13.07, 204.93),
    "maze2d-eval-large": (16.4, 302.22),
    "maze2d-umaze-v0": (0.94, 62.6),
    "maze2d-medium-v0": (5.77, 85.14),
    "maze2d-large-v0": (4.83, 191.99),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "door": (-56.512833, 2880.5693087298737),
    "kitchen": (0.0, 4.0),
    "minigrid-fourrooms": (0.01442, 2.89685),
    "flow-ring": (-165.22, 24.42),
    "flow-merge": (118.67993, 330.03179),
    "carla-lane": (-0.8503839912088142, 1023.5784385429523),
    "carla-town": (-114.81579500772153, 2440.1772022247314),
}

GYM = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
HAND = ("human", "cloned", "expert")
DATASETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("hopper", "halfcheetah", "walker2d", "ant"), GYM),
    **dict.fromkeys(("pen", "hammer", "relocate", "door"), HAND),
    "antmaze-umaze": ("diverse",),
    "antmaze-medium": ("play", "diverse"),
    "antmaze-large": ("play", "diverse"),
    "kitchen": ("complete", "partial", "mixed"),
    "minigrid-fourrooms": ("random",),
    "flow-ring": ("random", "controller"),
    "flow-merge": ("random", "controller"),
    "carla-town": ("full",),
}


def reference(env: str, dataset: str = "") -> tuple[float, float] | None:
    """D4RL's (random, expert) returns of an environment, or None where D4RL has none.

    Args:
        env: our name (`hopper`, `d4rl-antmaze-large`, `d4rl-antmaze-large-play`) or D4RL's own
            (`hopper-medium-v2`, `maze2d-umaze-dense-v1`). A bare `antmaze-large` is OGBench's
            maze, which is another task and has no reference here.
        dataset: name within the environment; it matters for Maze2D, where `dense` has its own row.
            Names unknown to D4RL, such as paths, leave the environment's row.
    """
    return lookup(f"{env}-{dataset}") or lookup(env)


def lookup(name: str) -> tuple[float, float] | None:
    bare = name.removeprefix("d4rl-")
    if bare == name and re.fullmatch(r"antmaze-(medium|large)(-v\d)?", name):
        return None
    if bare in REFERENCES:
        return REFERENCES[bare]
    bare = re.sub(r"-v\d$", "", bare)
    for env, row in REFERENCES.items():
        if bare == env or bare in [f"{env}-{dataset}" for dataset in DATASETS.get(env, ())]:
            return row
    return None


def score(returns: Returns, env: str, dataset: str = "") -> Returns:
    """100 (returns - random) / (expert - random), elementwise; below 0 and above 100 are legal.

    Of undiscounted returns of whole episodes, or their mean. Raises ValueError if D4RL has no
    reference returns for the environment; for that and the data set see `reference`.
    """
    row = reference(env, dataset)
    if row is None:
        raise ValueError(
            f"D4RL has no reference returns for {env!r}, so it has no normalized score; "
            f"report the plain return (known: {', '.join(REFERENCES)})"
        )
    low, high = row
    return 100 * ((returns - low) / (high - low))  # the references map to 0 and 100 exactly
