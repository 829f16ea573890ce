"""Environments stepped together in one process, with automatic restarts and exact snapshots."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

Makers = Sequence[Callable[[], gymnasium.Env]]
Options = dict[str, Any] | None  # of a reset
POSITIONS = ("xpos", "xipos")  # of body frames (Ant, Pusher) and centers of mass (Humanoid)
CLOCK = "_elapsed_steps"  # of Gymnasium's time limit


class Vector:
    """n environments stepped one after the other; on few cores faster than worker processes.

    Observations are float32, actions come in [-1, 1] and are rescaled to the environment's own
    range by `offrl.envs.make`, or are int64 numbers of discrete actions. An episode that ends
    restarts at once: `step` returns the true last observation and, apart from it, the one to act
    on next.

    Args:
        makers: of the environments.
        seeds: one per environment, for its first reset; later resets continue its own stream.
        options: of every reset, one per environment.

    Attributes:
        obs_dim, act_dim, discrete: as in `engine.method.Spec`.
        players: widths of the players' parts of an action, if the innermost environment has such an
            attribute; else ().
        goal: (n, g) goals of the running episodes, where the environments name them in the info of
            a reset; else None.
        on_episode: number of an environment -> options of its reset, asked whenever an episode
            begins; gives `options` unless another is set.
    """

    def __init__(
        self, makers: Makers, seeds: Sequence[int], options: Sequence[Options] | None = None
    ):
        self.envs = [make() for make in makers]
        self.seeds, self.count = list(seeds), len(self.envs)
        own = [None] * self.count if options is None else list(options)
        self.on_episode: Callable[[int], Options] = own.__getitem__
        self.goals = [torch.zeros(0)] * self.count
        self.obs_dim, self.act_dim, self.discrete = sizes(self.envs[0])
        self.players = tuple(getattr(self.envs[0].unwrapped, "players", ()))
        self.act_shape = self.envs[0].action_space.shape or ()
        if len(self.seeds) != self.count:
            raise ValueError(f"{self.count} environments need as many seeds, got {self.seeds}")

    def reset(self) -> Tensor:
        """First observations (n, o) of episodes started from the seeds."""
        return flat([self.restart(i, seed) for i, seed in enumerate(self.seeds)])

    @property
    def goal(self) -> Tensor | None:
        return torch.stack(self.goals) if len(self.goals[0]) else None

    def restart(self, i: int, seed: int | None = None) -> Any:
        """Begin an episode in environment i and keep its goal (g,), g 0 if none."""
        obs, info = self.envs[i].reset(seed=seed, options=self.on_episode(i))
        self.goals[i] = flat([info.get("goal", ())])[0]
        return obs

    def step(self, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Apply actions (n, a), or (n,) if discrete.

        Returns next_obs (n, o): the true successors; reward, terminal, timeout (n,): terminal is 1
        where the process ended, timeout where a limit cut it off (never both); now (n, o): the
        observations to act on next, which differ from next_obs where an episode restarted.
        """
        actions = act.view(self.count, *self.act_shape).numpy()
        rows, now = [], []
        scalars = np.zeros((3, self.count), dtype=np.float32)
        for i, (env, a) in enumerate(zip(self.envs, actions, strict=True)):
            obs, reward, terminated, truncated, _ = env.step(a)
            scalars[:, i] = reward, terminated, truncated and not terminated
            rows.append(obs)
            if terminated or truncated:
                obs = self.restart(i)
            now.append(obs)
        rewards, terminal, timeout = torch.from_numpy(scalars)
        return flat(rows), rewards, terminal, timeout, flat(now)

    def state(self) -> dict[str, Any]:
        """Exact snapshot of every environment, with its goal."""
        pairs = enumerate(zip(self.envs, self.goals, strict=True))
        return {str(i): snapshot(env) | {"goal": goal} for i, (env, goal) in pairs}

    def load(self, state: dict[str, Any], obs: Tensor) -> tuple[Tensor, Tensor]:
        """Continue from a `state` and the observations (n, o) to act on next that belong to it.

        Options of the episodes that go on are not asked for again. Returns obs, except in rows
        whose environment cannot be restored: there an episode starts anew; and (n,), 1 in these
        rows, else 0.
        """
        rows, anew = obs.clone(), torch.zeros(self.count)
        for i, (env, seed) in enumerate(zip(self.envs, self.seeds, strict=True)):
            env.reset(seed=seed)
            self.goals[i] = state[str(i)]["goal"]
            if not restore(env, state[str(i)]):
                rows[i], anew[i] = flat([self.restart(i)])[0], 1.0
        return rows, anew

    def close(self) -> None:
        for env in self.envs:
            env.close()


def sizes(env: gymnasium.Env) -> tuple[int, int, bool]:
    """Numbers of an observation, numbers or count of actions, and whether these are discrete."""
    space = env.action_space
    obs_dim = int(np.prod(env.observation_space.shape or ()))
    if isinstance(space, gymnasium.spaces.Discrete):
        return obs_dim, int(space.n), True
    return obs_dim, int(np.prod(space.shape or ())), False


def flat(rows: Sequence[Any]) -> Tensor:
    """Observations as rows of float32, images too."""
    return torch.from_numpy(np.stack(rows).astype(np.float32)).flatten(1)


def snapshot(env: gymnasium.Env) -> dict[str, Any]:
    """What decides the future of an environment: its state, clock and generator.

    Of Gymnasium's and OGBench's robots MuJoCo's integration state with the body positions that
    rewards read before a step (of the last substep, so nothing computes them anew); of Gymnasium's
    classic control its `state`. An environment that has `snapshot` and `restore` of its own is
    asked. Of others, Box2D's among them, the state is missing, and `restore` says so.
    """
    core: Any = env.unwrapped
    elapsed = env.get_wrapper_attr(CLOCK) or 0 if env.has_wrapper_attr(CLOCK) else 0
    if hasattr(core, "snapshot"):
        own = stored(core.snapshot)
        return {"elapsed": elapsed} if own is None else {"own": own, "elapsed": elapsed}
    generator = stored(lambda: generator_state(core.np_random))
    if generator is None:
        return {"elapsed": elapsed}
    found = {"generator": generator, "elapsed": elapsed}
    suite = core.__module__.partition(".")[0] in ("gymnasium", "ogbench")
    if suite and hasattr(core, "model") and hasattr(core, "data"):
        found |= {name: torch.tensor(getattr(core.data, name)) for name in POSITIONS}
        found["physics"] = physics(core.model, core.data)
    elif core.__module__.startswith("gymnasium.envs.classic_control"):
        found["state"] = torch.tensor(np.asarray(core.state))
    return found


def stored(take: Callable[[], Any]) -> Any:
    """What is taken, if a checkpoint can hold it: tensors and plain values; else None."""
    try:
        found, buffer = take(), io.BytesIO()
        torch.save(found, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # of a user's own environment, whatever it does; `resumes` tells in advance
        return None
    return found


def resumes(env: gymnasium.Env) -> bool:
    """Whether a `snapshot` restores it exactly, tried at the beginning of an episode."""
    env.reset(seed=0)
    return restore(env, snapshot(env))


def restore(env: gymnasium.Env, state: dict[str, Any]) -> bool:
    """Continue from a `snapshot`; the environment must have been reset before.

    False if at most the generator could be restored, so that the episode must start anew.
    """
    core: Any = env.unwrapped
    if "own" in state:
        core.restore(state["own"])
    elif "generator" in state:
        set_generator_state(core.np_random, state["generator"])
    if "physics" in state:
        set_physics(core.model, core.data, state["physics"])
        for name in POSITIONS:
            getattr(core.data, name)[:] = state[name].numpy()
    elif "state" in state:
        core.state = state["state"].numpy().copy()
        if hasattr(core, "steps_beyond_terminated"):  # CartPole's own mark of an episode's end
            core.steps_beyond_terminated = None
    elif "own" not in state:
        return False
    if env.has_wrapper_attr(CLOCK):
        env.set_wrapper_attr(CLOCK, state["elapsed"])
    return True


def physics(model: Any, data: Any) -> Tensor:
    """MuJoCo's integration state."""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return torch.from_numpy(state)


def set_physics(model: Any, data: Any, state: Tensor) -> None:
    import mujoco

    mujoco.mj_setState(model, data, state.numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)


def generator_state(generator: np.random.Generator) -> str:
    """As text: integers may have 128 bits, and some generators keep arrays."""
    return json.dumps(generator.bit_generator.state, default=lambda array: array.tolist())


def set_generator_state(generator: np.random.Generator, state: str) -> None:
    generator.bit_generator.state = json.loads(state)
