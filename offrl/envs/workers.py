"""Environments stepped by worker processes, where a machine has cores to spare for them."""

import io
import math
import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.envs.vector import Makers, Options, Vector

EXCHANGE = 2e-4  # seconds to send actions to a worker and to wait for what it sends back
GAIN = 1.2  # workers must be so many times faster


def environments(makers: Makers, seeds: Sequence[int], processes: int | None, cores: int) -> Any:
    """A `Vector`, or `Workers` that give the same.

    With 0 processes it is the first; with None whichever is faster on the cores that this process
    and its workers have, by thirty measured steps.
    """
    if processes is None:
        processes = min(len(makers), cores - 1)
        processes = processes if processes > 1 and worthwhile(makers, processes) else 0
    return Workers(makers, seeds, processes) if processes else Vector(makers, seeds)


def worthwhile(makers: Makers, workers: int) -> bool:
    env = makers[0]()
    env.reset(seed=0)
    env.action_space.seed(0)
    start, steps = time.perf_counter(), 30
    for _ in range(steps):
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset()
    each = (time.perf_counter() - start) / steps
    env.close()
    return each * len(makers) > GAIN * (each * math.ceil(len(makers) / workers) + EXCHANGE)


class Workers:
    """The interface, the order and the results of `Vector`, in processes that own a share each.

    The makers can be pickled. Every method raises OSError if a worker died.
    """

    def __init__(self, makers: Makers, seeds: Sequence[int], processes: int):
        self.count = len(makers)
        self.places = np.array_split(np.arange(self.count), min(processes, self.count))
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for places in self.places:
            ours, theirs = context.Pipe()
            share = pickle.dumps([(makers[i], seeds[i]) for i in places])
            process = context.Process(target=serve, args=(share, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.goal: Tensor | None = None
        self.on_episode: Callable[[int], Options] = lambda i: None
        names = ("obs_dim", "act_dim", "discrete", "players")
        self.obs_dim, self.act_dim, self.discrete, self.players = (self.ask(n)[0] for n in names)

    def reset(self) -> Tensor:
        return torch.cat(self.ask("reset"))

    def step(self, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = self.ask("step", [act[places] for places in self.places])
        next_obs, reward, terminal, timeout, now = map(torch.cat, zip(*found, strict=True))
        return next_obs, reward, terminal, timeout, now

    def state(self) -> dict[str, Any]:
        pairs = zip(self.places, self.ask("state"), strict=True)
        return {str(i): part[str(k)] for places, part in pairs for k, i in enumerate(places)}

    def load(self, state: dict[str, Any], obs: Tensor) -> tuple[Tensor, Tensor]:
        own = [{str(k): state[str(i)] for k, i in enumerate(places)} for places in self.places]
        found = self.ask("load", own, [obs[places] for places in self.places])
        rows, anew = map(torch.cat, zip(*found, strict=True))
        return rows, anew

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def ask(self, name: str, *given: Iterable[Any]) -> list[Any]:
        """Each worker's answer, by an attribute or method of its `Vector`; keeps their goals."""
        parts = zip(*given, strict=True) if given else [()] * len(self.pipes)
        try:
            for pipe, part in zip(self.pipes, parts, strict=True):
                pipe.send(packed((name, part)))
            answers = [self.answer(*pair) for pair in zip(self.pipes, self.places, strict=True)]
        except (EOFError, OSError) as error:
            raise OSError("a process that steps environments died; resume the run") from error
        found, goals = zip(*answers, strict=True)
        self.goal = None if goals[0] is None else torch.cat(goals)
        return list(found)

    def answer(self, pipe: Any, places: np.ndarray) -> Any:
        """What a worker sends, once its questions are answered: options of episodes that begin.

        Questions wait until the workers before have answered, so they come in `Vector`'s order.
        """
        while isinstance(found := pipe.recv(), int):
            pipe.send(self.on_episode(int(places[found])))
        return pickle.loads(found)


def packed(value: Any) -> bytes:
    """Pickled, tensors as arrays, which takes a fraction of the time of torch's own way."""
    pickler = pickle.Pickler(file := io.BytesIO())
    pickler.dispatch_table = {Tensor: lambda x: (torch.from_numpy, (x.numpy(),))}
    pickler.dump(value)
    return file.getvalue()


def serve(share: bytes, orders: Any) -> None:
    """Body of a worker, which ends with the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training decides when to stop
    torch.set_num_threads(1)
    makers, seeds = zip(*pickle.loads(share), strict=True)
    envs = Vector(makers, seeds)

    def ask(i: int) -> Options:
        orders.send(i)
        return orders.recv()

    envs.on_episode = ask
    while True:
        try:
            name, given = pickle.loads(orders.recv())
        except EOFError:
            return
        found = getattr(envs, name)
        orders.send(packed((found(*given) if callable(found) else found, envs.goal)))
