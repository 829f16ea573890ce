"""What a run without an environment is watched by: the method's own losses on held-out episodes."""

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.config import Resolved
from offrl.data.dataset import Dataset, home
from offrl.engine.method import Run, Sampler, Seeds, Spec, Task, turns_of
from offrl.engine.state import load_state, state_of
from offrl.errors import Diverged
from offrl.seeding import generator

PATTERNS = 64  # updates within which every pattern of a method's appears


class Losses:
    """The metrics of a method's update on batches of other data; a `Task.evaluate`.

    A second algorithm takes the state of the one that is trained and makes the update with learning
    rates of 0, so that every loss is that of the networks as they are. Nothing is drawn from the
    run's generator, and every call draws the same batches. What a method prepares of its data, such
    as nearest neighbors, it prepares of these.

    Args:
        held: episodes that are not learned from.
        spec: of the run.
    """

    def __init__(
        self, resolved: Resolved, held: Dataset, spec: Spec, seeds: Seeds, device: torch.device
    ):
        method, config = resolved.method, resolved.config()
        self.seeds, self.device, self.episodes = seeds, device, held.episodes
        self.algo = method.make(config, spec, generator(0, "validation", device=device), seeds)
        run = Run(config.steps, seeds, device, method.fields, str(home()), progress=False)
        self.stage = method.stages(self.algo, Task(spec, held), run)[-1]
        self.turns = sorted({turns_of(self.algo)(step) for step in range(PATTERNS)})
        self.sampler: Sampler | None = None

    def __call__(self, algo: Any, batches: int) -> dict[str, Tensor]:
        """Values (*S, batches) of every metric.

        Raises:
            Diverged: naming the first one that is NaN or infinite.
        """
        state = deepcopy(state_of(algo))  # an optimizer would share the moments that it loads
        if self.sampler is None:
            load_state(self.algo, state)  # observations are standardized by what is in it
            self.sampler = self.stage.start()
        draws = Generator(self.device).manual_seed(0)
        rows: dict[str, list[Tensor]] = defaultdict(list)
        for i in range(batches):
            batch, found = self.sampler(draws), dict[str, Tensor]()
            for turn in self.turns:
                load_state(self.algo, state)
                self.rest()
                self.algo.generator.manual_seed(i)
                found |= self.stage.update(batch, turn)
            for name, value in found.items():
                rows[f"validation/{name}"].append(value.detach().cpu().expand(self.seeds).clone())
        out = {name: torch.stack(values, -1) for name, values in rows.items()}
        for name, values in out.items():
            if not bool(values.isfinite().all()):
                raise Diverged(f"{name} is NaN or infinite on the held-out episodes")
        return out

    def rest(self) -> None:
        """No step of an optimizer changes anything."""
        for part in vars(self.algo).values():
            for group in getattr(part, "param_groups", ()):
                rate = group["lr"]
                group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
