"""Environments by name: Gymnasium's robots, other suites' tasks and any registered id."""

import functools
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from offrl.envs import dm_control, grid, ogbench, own
from offrl.envs.observations import FlatObservation
from offrl.envs.randomness import OwnRandomness
from offrl.errors import ConfigError
from offrl.own import absolute, is_env, one_line

logger = logging.getLogger(__name__)

ROBOTS = {
    "halfcheetah": "HalfCheetah",
    "hopper": "Hopper",
    "walker2d": "Walker2d",
    "ant": "Ant",
    "humanoid": "Humanoid",
    "humanoid-standup": "HumanoidStandup",
    "swimmer": "Swimmer",
    "reacher": "Reacher",
    "pusher": "Pusher",
    "inverted-pendulum": "InvertedPendulum",
    "inverted-double-pendulum": "InvertedDoublePendulum",
}
VERSIONS = ("v5", "v4")
PHYSICS = ("mass", "friction", "force")  # settings of what MuJoCo simulates; see `changed`
UNBOUNDED = 1e10  # a bound of an action that says that there is none, as in dm-control
LONGEST = 10_000  # actions of an episode where nothing limits it
OURS = ("gymnasium", "offrl")  # packages whose versions every run keeps


class ScaleAction(gymnasium.ActionWrapper):
    """Actions in [-1, 1], clipped and stretched to the environment's own range and type.

    -1 is its low and 1 its high; whole numbers are the nearest ones. Clipping comes first, since
    Gymnasium takes the control cost from the action as it is given.

    Raises:
        ConfigError: for a space without bounds that mean something.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box):
            raise ConfigError(
                f"{env} has actions of {space}; known are Box and Discrete. Make one of these of "
                "them, in the environment or in a wrapper"
            )
        # float64 holds float32's products exactly, so that one rounding is left, to the own type
        self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
        if not bounded(self.low, self.high):
            raise ConfigError(
                f"{env} has actions of {space}, in which -1 and 1 have no meaning; give it the "
                "bounds that its actions need, with gymnasium.wrappers.RescaleAction or in its "
                "action_space"
            )
        self.half, self.middle = (self.high - self.low) / 2, (self.high + self.low) / 2
        self.type = space.dtype
        self.whole = not np.issubdtype(self.type, np.floating)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, space.shape, np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        inner = np.clip(action, -1.0, 1.0) * self.half + self.middle
        own = np.where(action <= -1, self.low, np.where(action >= 1, self.high, inner))
        return (own.round() if self.whole else own).astype(self.type)


class CountAction(gymnasium.ActionWrapper):
    """Discrete actions that count from 0, in an environment where they count from another."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.own = cast(gymnasium.spaces.Discrete, env.action_space)
        self.action_space = gymnasium.spaces.Discrete(int(self.own.n))

    def action(self, action: Any) -> Any:
        return self.own.dtype.type(int(action) + int(self.own.start))


def bounded(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether these are bounds, and not infinity or the largest number of a type."""
    return bool((np.abs([low, high]) < UNBOUNDED).all())


def own_actions(env: gymnasium.Env) -> gymnasium.Space:
    """The action space of what `factory` makes as it was before scaling or counting."""
    return env.env.action_space if isinstance(env, (ScaleAction, CountAction)) else env.action_space


class CutOff(gymnasium.wrappers.TimeLimit):
    """Cuts off episodes where the environment states no limit, so that none goes on forever."""


def cut_off(env: gymnasium.Env) -> bool:
    """Whether `factory` limits the episodes because nothing else does."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, CutOff):
            return True
        env = env.env
    return False


class RepeatAction(gymnasium.Wrapper):
    """Takes every action `times` times and sums the rewards; stops where the episode ends."""

    def __init__(self, env: gymnasium.Env, times: int):
        super().__init__(env)
        self.times = times

    def step(self, action: Any):
        total = 0.0
        for _ in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Push(gymnasium.Wrapper):
    """A steady force (x, y, z) in newtons on the first body that moves, a robot's torso."""

    def __init__(self, env: gymnasium.Env, force: Sequence[float]):
        super().__init__(env)
        if np.shape(force) != (3,):
            raise ValueError(f"force is three numbers, got {force}")
        self.force = force

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        found = self.env.reset(seed=seed, options=options)
        model, data = cast(tuple[Any, Any], simulator(self.env))
        data.xfrc_applied[(model.body_dofnum > 0).argmax(), :3] = self.force
        return found


def env_id(name: str, version: str | None = None) -> str:
    """The Gymnasium id of a name such as `halfcheetah`; registered ids pass through.

    The version is a robot's; None is v5, or what an id says.

    It is `module:Id` of a user's own, or `/path/to/file.py:Class` with the whole path.

    Raises ValueError for a version that contradicts an id, an unknown name or version (naming the
    nearest), the tasks of D4RL that have data only, and a user's own that cannot be found.
    """
    if version not in (None, *VERSIONS):
        raise ValueError(f"env_version must be one of {', '.join(VERSIONS)}, got {version!r}")
    if name in ROBOTS:
        return f"{ROBOTS[name]}-{version or 'v5'}"
    if name == grid.NAME:
        return grid.ID
    bare = name.removesuffix("-v0")  # of the two suites
    if ogbench.known(bare):
        ogbench.register()
        return f"{bare}-v0"
    if name.startswith(dm_control.PREFIX) and name not in gymnasium.registry:
        return dm_control.register(bare)
    if name in gymnasium.registry:
        named = name.rpartition("-")[2]
        if version and named in VERSIONS and named != version:
            raise ValueError(f"env={name} contradicts env_version={version}; leave one of them out")
        return name
    if is_env(name):
        own.spec_of(name)
        return absolute(name)
    if name.startswith("d4rl-"):
        raise ValueError(
            f"there is no environment for {name!r} yet, so training on it could not be scored; "
            "offrl.data.sources.d4rl.load reads its data"
        )
    known = [*ROBOTS, grid.NAME, *ogbench.NAMES, *gymnasium.registry]
    raise ValueError(
        f"unknown environment {name!r}{dm_control.nearest(name, known)}. "
        f"Known are the robots {', '.join(ROBOTS)}; "
        f"{dm_control.PREFIX}<domain>-<task> such as dmc-cheetah-run; OGBench's such as "
        f"{ogbench.NAMES[0]}; {grid.NAME}; every id registered with Gymnasium; and your own as "
        "module:Id or path/to/file.py:Class"
    )


def factory(
    name: str,
    version: str | None = None,
    legacy_mass: bool = False,
    render: bool = False,
    action_repeat: int = 1,
    episode_limit: int | None = None,
) -> Callable[..., gymnasium.Env]:
    """A picklable maker of the environment, with actions in [-1, 1] or discrete ones.

    The maker takes settings of the environment as keywords: what its constructor names, such as
    Gymnasium's `reset_noise_scale` or LunarLander's `wind_power`, and `mass`, `friction` and
    `force` of a MuJoCo model (see `changed`). It raises ValueError for any other.

    Args:
        name: a robot such as `halfcheetah`, `dmc-<domain>-<task>`, a Gymnasium id, or a user's own
            `module:Id` or `path/to/file.py:Class`.
        version: of the MuJoCo robots, v5 (default) or v4; must not contradict an id.
        legacy_mass: give capsules the mass rho pi r^2 (L + r) of the engines that D4RL's data
            came from, instead of the exact rho pi r^2 (L + 4r/3): Hopper 15.26 instead of 15.82.
        render: make RGB frames available.
        action_repeat: simulator's steps per action; the time limit counts the simulator's.
        episode_limit: actions of an episode at most; None is the environment's own limit, and
            `LONGEST` where it states none.
    """
    id = env_id(name, version)
    return functools.partial(build, id, legacy_mass, render, action_repeat, episode_limit)


def simulator_warning(message: str) -> None:
    """MuJoCo's warnings go to the log, not to a MUJOCO_LOG.TXT in the working folder.

    Gymnasium's HalfCheetah model uses a deprecated attribute, which no user can change.
    """
    if "settotalmass" not in message:
        logger.warning("mujoco: %s", message)


def build(
    id: str,
    legacy_mass: bool,
    render: bool,
    action_repeat: int,
    episode_limit: int | None = None,
    **settings: Any,
) -> gymnasium.Env:
    import mujoco

    mujoco.set_mju_user_warning(simulator_warning)
    env_id(id)  # in a process of its own nobody has registered it
    spec = own.spec_of(id) if is_env(id) else gymnasium.spec(id)
    from_ogbench = ogbench.known(id.removesuffix("-v0"))
    named = constructor_settings(spec) if settings else []
    given = {name: settings.pop(name) for name in named if name in settings}
    given |= {"render_mode": "rgb_array"} if render else {}
    if episode_limit is not None:
        given["max_episode_steps"] = episode_limit * action_repeat
    env = made(spec, id, given)
    if legacy_mass:
        lighten(env)
    if render:
        track_camera(env)
    env = OwnRandomness(env) if from_ogbench else env
    if settings:
        if from_ogbench:
            env.reset(seed=0)  # its arms have no model before
        env = changed(env, settings, named)
    if not env.has_wrapper_attr("_max_episode_steps"):
        env = CutOff(env, LONGEST * action_repeat)
    env = RepeatAction(env, action_repeat) if action_repeat > 1 else env
    if not isinstance(env.observation_space, gymnasium.spaces.Box):
        env = FlatObservation(env, id)
    if not isinstance(space := env.action_space, gymnasium.spaces.Discrete):
        return ScaleAction(env)
    return env if space.start == 0 and space.dtype == np.int64 else CountAction(env)


def made(spec: EnvSpec, id: str, given: dict[str, Any]) -> gymnasium.Env:
    """What Gymnasium makes.

    Raises:
        ConfigError: with Gymnasium's text if it cannot be made.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of date.*")  # v4, chosen on purpose
        try:
            env = gymnasium.make(spec, disable_env_checker=True, **given)
            env.observation_space, env.action_space  # noqa: B018  # every environment must say them
        except gymnasium.error.DependencyNotInstalled as error:
            raise ConfigError(
                f"{id} needs a package that is not installed ({error}); LunarLander and "
                "BipedalWalker come with the extra: pip install 'offrl[box2d]'"
            ) from error
        except Exception as error:  # whatever a constructor does
            told = one_line(error)
            if "render_mode" in given and "unexpected keyword argument 'render_mode'" in told:
                told = "its constructor takes no render_mode, so it cannot be filmed"
            raise ConfigError(f"{id} cannot be made: {told}") from error
    return env


def engines(env: gymnasium.Env) -> dict[str, str]:
    """Packages besides Gymnasium on which an environment's dynamics rest -> their versions."""
    core = env.unwrapped
    root = type(core).__module__.partition(".")[0]
    names = metadata.packages_distributions().get(root, []) if root not in OURS else []
    if isinstance(core, dm_control.DMControl) or ".manipspace." in type(core).__module__:
        names = [*names, "dm_control"]
    if "dm_control" in names or simulator(env):
        names = [*names, "mujoco"]
    if ".box2d." in type(core).__module__:
        names = metadata.packages_distributions().get("Box2D", [])
    return {name: metadata.version(name) for name in names}


def tasks(env: gymnasium.Env) -> tuple[dict[str, Any], ...]:
    """The reset options of an environment's goals to be scored at, which OGBench calls tasks.

    Any environment can have them: `num_tasks`, `reset(options={"task_id": 1})` and so on, whose
    info holds the `goal`, an observation. () for others.
    """
    return tuple({"task_id": i + 1} for i in range(getattr(env.unwrapped, "num_tasks", 0)))


def constructor_settings(spec: EnvSpec) -> list[str]:
    """Arguments that the constructor of an environment names."""
    point = spec.entry_point
    creator: Any = load_env_creator(point) if isinstance(point, str) else point
    names = inspect.signature(creator).parameters
    return [name for name in names if name not in ("render_mode", "args", "kwargs")]


def simulator(env: gymnasium.Env) -> tuple[Any, Any] | None:
    """MuJoCo's model and data of an environment; None for one that has none."""
    import mujoco

    core: Any = env.unwrapped
    if isinstance(core, dm_control.DMControl):
        return core.env.physics.model.ptr, core.env.physics.data.ptr
    model = getattr(core, "model", None)
    return (model, core.data) if isinstance(model, mujoco.MjModel) else None


def changed(
    env: gymnasium.Env, settings: dict[str, Any], also: Sequence[str] = ()
) -> gymnasium.Env:
    """A MuJoCo environment with other physics from its next reset on.

    Args:
        settings: `mass`, a factor of all bodies' masses and inertias, while motors, springs and
            dampers stay; `friction`, a factor of the sliding friction of all geoms and explicit
            pairs, and so of every contact, while torsional and rolling friction and that in joints
            stay; `force`, see `Push`.
        also: other settings that the environment has, for the message.

    Raises ValueError for another name, an environment without a MuJoCo model, a factor that is not
    positive, or a force that is not three numbers.
    """
    import mujoco

    found = simulator(env)
    known = PHYSICS if found else ()
    if unknown := [name for name in settings if name not in known]:
        names = ", ".join((*known, *also)) or "none"
        raise ValueError(f"{env} has no setting {unknown[0]!r}; known: {names}")
    model, data = cast(tuple[Any, Any], found)
    mass, friction = settings.get("mass", 1.0), settings.get("friction", 1.0)
    if not (mass > 0 and friction > 0):
        raise ValueError(f"mass and friction are positive factors, got {mass} and {friction}")
    model.body_mass[:] *= mass
    model.body_inertia[:] *= mass
    model.geom_friction[:, 0] *= friction
    model.pair_friction[:, :2] *= friction
    mujoco.mj_setConst(model, data)  # inverse weights and subtree masses follow from the masses
    return Push(env, settings["force"]) if "force" in settings else env


def track_camera(env: gymnasium.Env) -> None:
    """Film with the model's camera `track`, where there is one: Gymnasium's own stands still."""
    import mujoco

    core: Any = env.unwrapped
    if hasattr(core, "mujoco_renderer"):
        camera = mujoco.mj_name2id(core.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        core.mujoco_renderer.camera_id = camera  # -1 if there is none, which is the default


def lighten(env: gymnasium.Env) -> None:
    """Set every capsule's contribution to its body to the mass formula of older engines.

    A body's mass and inertia scale by the ratio of its geoms' old to new masses. Bodies of a model
    that pins its total mass (HalfCheetah) are rescaled to that total. Raises ValueError for an
    environment without a MuJoCo model, or a body of other shapes.
    """
    import mujoco

    found = simulator(env)
    if found is None:
        raise ValueError(f"legacy_mass needs a MuJoCo environment, not {env}")
    model, data = found
    kinds = mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_SPHERE
    capsule, sphere = (model.geom_type == int(kind) for kind in kinds)
    if (others := np.flatnonzero(~capsule & ~sphere & (model.geom_bodyid > 0))).size:
        raise ValueError(f"legacy_mass knows capsules and spheres only, see geom {others[0]}")
    (radius, half, _), total = model.geom_size.T, model.body_mass.sum()
    ball, rod = 4 / 3 * math.pi * radius**3, math.pi * radius**2
    volumes = [np.where(capsule, rod * (2 * half + end * radius), ball) for end in (1, 4 / 3)]
    old, new = (np.bincount(model.geom_bodyid, v, model.nbody) for v in volumes)
    ratio = np.divide(old, new, out=np.ones(model.nbody), where=new > 0)
    ratio[0] = 1  # the world
    model.body_mass[:] *= ratio
    model.body_inertia[:] *= ratio[:, None]
    if "HalfCheetah" in str(env.spec.id if env.spec else ""):
        mujoco.mj_setTotalmass(model, total)
    mujoco.mj_setConst(model, data)
