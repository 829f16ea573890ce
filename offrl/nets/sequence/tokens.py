"""Windows of returns-to-go, states and actions as embedded tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offrl.nets.linear import Dims, Linear, Source, device_of


class Embedding(nn.Module):
    """(..., n) -> (..., width): affine, with `mlp` plus an affine map of its GELU."""

    def __init__(self, fan_in: int, width: int, mlp: bool, generator: Source):
        super().__init__()
        self.first = Linear(fan_in, width, generator=generator)
        self.second = Linear(width, width, generator=generator) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.second is None else x + self.second(F.gelu(x))


class StepTokens(nn.Module):
    """Windows of K steps -> tokens (B, K, 3, width): R, s and a of every step.

    What they hold is embedded apart; a learned embedding of the step in the episode is added, and
    LayerNorm stands behind that or, with `norm_first`, before it.

    Args:
        sizes: of an observation and of an action.
        steps: rows of the embedding of steps; later steps share the last one.
        mlp: see `Embedding`.
    """

    def __init__(
        self, sizes: Dims, width: int, steps: int, mlp: bool, norm_first: bool, generator: Source
    ):
        super().__init__()
        device = device_of(generator)
        self.norm_first = norm_first
        self.embed_return = Embedding(1, width, mlp, generator)
        self.embed_obs, self.embed_act = (Embedding(n, width, mlp, generator) for n in sizes)
        table = torch.empty(steps, width, device=device)
        self.embed_step = nn.Parameter(table.normal_(generator=generator))
        self.norm = nn.LayerNorm(width, device=device)

    def forward(self, window: dict[str, Tensor]) -> Tensor:
        """Of return_to_go (B, K), obs (B, K, o), act (B, K, a) and step_in_episode (B, K)."""
        parts = [
            self.embed_return(window["return_to_go"].unsqueeze(-1)),
            self.embed_obs(window["obs"]),
            self.embed_act(window["act"]),
        ]
        return self.placed(torch.stack(parts, 2), window["step_in_episode"])

    def placed(self, content: Tensor, step: Tensor) -> Tensor:
        """Embedded tokens (*L, n, width) of the step in the episode `step` (*L)."""
        place = self.embed_step[step.clamp(max=len(self.embed_step) - 1)].unsqueeze(-2)
        return self.norm(content) + place if self.norm_first else self.norm(content + place)
