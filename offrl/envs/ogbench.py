"""OGBench's goal-conditioned tasks (extra `ogbench`): their names and sizes.

Park, Frans, Eysenbach and Levine, "OGBench: Benchmarking Offline Goal-Conditioned RL", ICLR 2025,
arXiv:2410.20092. Every environment has five tasks, chosen by `reset(options={"task_id": 1})` to 5;
the reset's info holds the `goal`, an observation; a step pays 1 and ends the episode at the goal.
"""

import warnings

VERSION = "v0"
MAZES: dict[str, tuple[str, ...]] = {
    "pointmaze": ("medium", "large", "giant", "teleport"),
    "antmaze": ("medium", "large", "giant", "teleport"),
    "humanoidmaze": ("medium", "large", "giant"),
    "antsoccer": ("arena", "medium"),
}
MANIPULATION: dict[str, tuple[str, ...]] = {
    "cube": ("single", "double", "triple", "quadruple", "octuple"),
    "scene": (),
    "puzzle": ("3x3", "4x4", "4x5", "4x6"),
}
STATE_NAMES = tuple(
    f"{family}-{size}".removesuffix("-")
    for family, sizes in (MAZES | MANIPULATION).items()
    for size in sizes or ("",)
)
NAMES = STATE_NAMES + tuple(
    f"visual-{name}" for name in STATE_NAMES if not name.startswith(("pointmaze", "antsoccer"))
)


def known(name: str) -> bool:
    """Whether `name` is one of OGBench's environments, such as `pointmaze-giant`."""
    return name in NAMES


def default_dataset(name: str) -> str:
    """`play` for the manipulation tasks, `navigate` for the mazes."""
    return "play" if family(name) in MANIPULATION else "navigate"


def family(name: str) -> str:
    """`cube` of `visual-cube-single`."""
    return name.removeprefix("visual-").partition("-")[0]


def register() -> None:
    """Make OGBench's environments known to Gymnasium; raises ValueError without the extra."""
    try:
        import ogbench  # noqa: F401
    except ImportError as error:
        extra = "pip install 'offrl[ogbench]'"
        raise ValueError(f"OGBench's environments need the extra: {extra}") from error
    # of a viewer that the manipulation tasks import and nobody opens
    warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing")
