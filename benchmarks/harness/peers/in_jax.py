"""TD3+BC in JAX: one compiled function makes a block of updates by a scan, batches drawn inside.

It computes what `offrl.algos.td3bc` computes: an update of the critics, and every second time of
the actor and the targets, so a block holds pairs of updates. Needs the extra `peers`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

Params = list[tuple[Any, Any]]


def init(key: Any, dims: tuple[int, ...]) -> Params:
    layers = []
    for i, o in pairwise(dims):
        key, one, other = jax.random.split(key, 3)
        bound = i**-0.5
        layers.append(
            (
                jax.random.uniform(one, (i, o), minval=-bound, maxval=bound),
                jax.random.uniform(other, (o,), minval=-bound, maxval=bound),
            )
        )
    return layers


def mlp(params: Params, x: Any) -> Any:
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return x @ weight + bias


def policy(params: Params, obs: Any) -> Any:
    return jnp.tanh(mlp(params, obs))


def value(params: Params, obs: Any, act: Any) -> Any:
    return mlp(params, jnp.concatenate([obs, act], -1))[..., 0]


def td3bc(fields: dict[str, np.ndarray], batch: int, block: int) -> Callable[[int], None]:
    """`run` over standardized transitions: obs, act, reward, next_obs, terminal, (N, ...) each.

    Args:
        block: updates per dispatch, even; `run` takes multiples of it.
    """
    data = {name: jnp.asarray(array) for name, array in fields.items()}
    size, obs_dim = data["obs"].shape
    act_dim = data["act"].shape[-1]
    adam = optax.adam(3e-4)

    def start(key: Any) -> dict[str, Any]:
        keys = jax.random.split(key, 3)
        actor = init(keys[0], (obs_dim, 256, 256, act_dim))
        critics = [init(k, (obs_dim + act_dim, 256, 256, 1)) for k in keys[1:]]
        return {
            "actor": actor,
            "critics": critics,
            "actor_target": actor,
            "critics_target": critics,
            "actor_opt": adam.init(actor),
            "critics_opt": adam.init(critics),
            "key": key,
        }

    def update(state: dict[str, Any], with_actor: bool) -> dict[str, Any]:
        key, draw, shake = jax.random.split(state["key"], 3)
        index = jax.random.randint(draw, (batch,), 0, size)
        rows = {name: array[index] for name, array in data.items()}
        noise = jnp.clip(0.2 * jax.random.normal(shake, (batch, act_dim)), -0.5, 0.5)
        next_act = jnp.clip(policy(state["actor_target"], rows["next_obs"]) + noise, -1, 1)
        smaller = jnp.minimum(
            *(value(c, rows["next_obs"], next_act) for c in state["critics_target"])
        )
        y = rows["reward"] + 0.99 * (1 - rows["terminal"]) * smaller

        def critics_loss(critics: list[Params]) -> Any:
            return sum(((value(c, rows["obs"], rows["act"]) - y) ** 2).mean() for c in critics)

        def actor_loss(actor: Params) -> Any:
            act = policy(actor, rows["obs"])
            q = value(state["critics"][0], rows["obs"], act)
            scale = 2.5 / jax.lax.stop_gradient(jnp.abs(q).mean())
            return ((act - rows["act"]) ** 2).mean() - scale * q.mean()

        def descend(loss: Any, name: str) -> None:
            grads = jax.grad(loss)(state[name])
            change, state[f"{name}_opt"] = adam.update(grads, state[f"{name}_opt"])
            state[name] = optax.apply_updates(state[name], change)

        state = dict(state, key=key)
        descend(critics_loss, "critics")
        if with_actor:
            descend(actor_loss, "actor")
            for name in ("actor", "critics"):
                state[f"{name}_target"] = optax.incremental_update(
                    state[name], state[f"{name}_target"], 0.005
                )
        return state

    def pair(state: dict[str, Any], _: None) -> tuple[dict[str, Any], None]:
        return update(update(state, False), True), None

    def many(state: dict[str, Any]) -> dict[str, Any]:
        return jax.lax.scan(pair, state, None, block // 2)[0]

    state = jax.jit(start)(jax.random.key(0))
    step = jax.jit(many, donate_argnums=0)

    def run(updates: int) -> None:
        nonlocal state
        if updates % block:
            raise ValueError(f"updates come in blocks of {block}, got {updates}")
        for _ in range(updates // block):
            state = step(state)
        jax.block_until_ready(state)

    return run
