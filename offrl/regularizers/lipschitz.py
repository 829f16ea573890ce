"""Smooth value functions: a penalty on adversarial noise in the input, and bounded layers.

Zheng et al., "Is Model Ensemble Necessary? Model-based RL via a Single Model with Lipschitz
Regularized Value Function", ICLR 2023, arXiv:2302.01244. No code of the authors is public; the
objective, the solver and the radius of the layers are from memory of the paper, not checked.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import keep, masked_reduce

Norm = Literal["inf", "2"]


def lipschitz_penalty(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    radius: float,
    norm: Norm = "inf",
    start: Tensor | None = None,
    steps: int = 1,
    detach_clean: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """|f(x + delta) - f(x)|^2 with delta the worst of its ball around each x, held fixed.

    Without `start` delta is the better of +-radius sign(grad f): no randomness, exact for linear f.
    With it delta is climbed from there on the squared difference: one step of 2 radius (FGSM), or
    several of 2.5 radius / steps (PGD), kept in the ball. At delta = 0 that objective has gradient
    0 and the penalty would vanish, so the start must be random.

    Args:
        f: values of inputs, (..., d) -> (...), every row from its own input; what else it depends
            on (actions, weights) it closes over. Weights receive the gradient at both points, with
            `detach_clean` at the moved one only. No buffer may change in it (batch norm that
            trains), and it is called three or four times, or twice and `steps` times more.
        x: inputs (..., d), states or embeddings of tokens; detached.
        radius: of the ball around each row, in the units of x.
        norm: "inf": each coordinate within +-radius; "2": |delta| <= radius.
        start: uniform numbers in [-1, 1] of the shape of `x`, times radius; None: both signs.
        mask: (...), 1 where a row counts.

    Returns:
        (...): 0 for a constant f; radius^2 |w|_1^2 ("inf") or radius^2 |w|_2^2 ("2") for f = w . x.

    >>> w = torch.tensor([1.0, -2.0])
    >>> lipschitz_penalty(lambda x: x @ w, torch.zeros(1, 2), 0.1)
    tensor([0.0900])
    """
    x = keep(x.detach(), None if mask is None else mask.unsqueeze(-1))
    with torch.no_grad():
        if start is None:
            delta = two_signs(f, x, radius, norm, mask)
        else:
            start = keep(start.detach(), None if mask is None else mask.unsqueeze(-1))
            delta = ascend(f, x, radius, norm, start, steps, mask)
    clean = keep(f(x), mask)
    return (keep(f(x + delta), mask) - (clean.detach() if detach_clean else clean)).square()


def two_signs(f, x: Tensor, radius: float, norm: Norm, mask: Tensor | None) -> Tensor:
    slope = torch.func.grad(lambda z: keep(f(z), mask).sum())(x)
    delta = radius * direction(slope, norm)
    clean = f(x)
    gaps = [keep((f(x + side * delta) - clean).abs(), mask) for side in (1, -1)]
    return torch.where((gaps[0] >= gaps[1]).unsqueeze(-1), delta, -delta)


def ascend(
    f, x: Tensor, radius: float, norm: Norm, start: Tensor, steps: int, mask: Tensor | None
) -> Tensor:
    clean, delta = f(x), into_ball(radius * start, radius, norm)
    length = 2 * radius if steps == 1 else 2.5 * radius / steps
    for _ in range(steps):
        gain = torch.func.grad(lambda z: keep(f(x + z) - clean, mask).square().sum())(delta)
        # One step in the 2-norm ends at radius gain / |gain|, in the other norm it does anyway.
        kept = 0 if norm == "2" and steps == 1 else delta
        delta = into_ball(kept + length * direction(gain, norm), radius, norm)
    return delta


def direction(slope: Tensor, norm: Norm) -> Tensor:
    if norm == "inf":
        return slope.sign()
    return slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def into_ball(delta: Tensor, radius: float, norm: Norm) -> Tensor:
    if norm == "inf":
        return delta.clamp(-radius, radius)
    return delta * (radius / delta.norm(dim=-1, keepdim=True).clamp(min=radius))


class LipschitzPenalty(Regularizer):
    """Model hook: coef mean of `lipschitz_penalty` of a value function.

    Inputs: extra["value_function"], (*L, d) -> L, which the caller builds around its critic (no
    weights are kept here); extra["inputs"] (*L, d); with random_start extra["start"], uniform in
    [-1, 1]. For a value head on tokens the inputs are embeddings and L is (B, T); a value that sees
    earlier tokens is moved by their noise too.

    Args:
        coef, radius: 0.1 and 0.1, in raw units of the states, are starting points for sweeps over
            (0.01, 0.1, 1) and (0.01, ..., 0.2); 0.01 for wide states.
        random_start, steps: FGSM or PGD; without, both signs of the gradient are tried.
    """

    hook = "model"

    def __init__(
        self,
        coef: Coefficient = 0.1,
        radius: float = 0.1,
        norm: Norm = "inf",
        random_start: bool = False,
        steps: int = 1,
        detach_clean: bool = False,
    ):
        super().__init__(coef)
        self.radius, self.steps, self.detach_clean = radius, steps, detach_clean
        self.norm: Norm = norm
        start = {"extra.start"} if random_start else set()
        self.requires = frozenset({"extra.value_function", "extra.inputs"} | start)

    def forward(self, x: RegInputs) -> RegOutput:
        penalty = lipschitz_penalty(
            x.need("extra.value_function"),
            x.need("extra.inputs"),
            self.radius,
            self.norm,
            x.need("extra.start") if "extra.start" in self.requires else None,
            self.steps,
            self.detach_clean,
            x.mask,
        )
        return RegOutput(
            per_element=self.weight * penalty,
            metrics={"slope": masked_reduce(penalty.detach().sqrt(), x.mask) / self.radius},
        )


class SpectralClip(nn.Module):
    """Parametrization of a weight (*lead, m, n) whose largest singular value is at most `bound`.

    The estimate u . W v comes from power iterations: one per `spectral_refresh`, never in the
    forward pass, so that all passes of an optimizer step see the same weights. u and v are buffers
    without gradient; the gradient flows through u . W v by W. Leading axes are separate layers.

    Args:
        weight: the weight it will stand for.
        bound: allowed norm of the layer; L layers make |f(x) - f(y)| <= bound^L |x - y|. About 5 to
            20 for returns of hundreds (derived; not the paper's).
        mode: "clip": W / max(1, sigma / bound), untouched below the bound; "hard": bound W / sigma.
        iterations: to begin with.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        bound: float,
        mode: Literal["clip", "hard"] = "clip",
        iterations: int = 20,
    ):
        super().__init__()
        if mode not in ("clip", "hard"):
            raise ValueError(f"mode must be clip or hard, got {mode!r}")
        self.bound, self.mode = bound, mode
        *lead, rows, columns = weight.shape
        # A start without randomness that is orthogonal to a singular vector only by accident.
        ramp = torch.linspace(1, 2, columns, device=weight.device)
        self.register_buffer("v", unit(ramp.expand(*lead, columns)).clone())
        self.register_buffer("u", weight.new_zeros(*lead, rows, dtype=torch.float32))
        for _ in range(iterations):
            self.refresh(weight)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """One power iteration."""
        weight = keep(weight, None)
        self.u.copy_(unit((weight * self.v.unsqueeze(-2)).sum(-1)))
        self.v.copy_(unit((weight * self.u.unsqueeze(-1)).sum(-2)))

    def sigma(self, weight: Tensor) -> Tensor:
        """Estimate of the largest singular value, (*lead): at most the true one."""
        # Copies, so that a refresh between forward and backward does not spoil the graph.
        u, v = self.u.clone().unsqueeze(-1), self.v.clone().unsqueeze(-2)
        return (u * keep(weight, None) * v).sum((-2, -1))

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.sigma(weight)[..., None, None] / self.bound
        return (weight / scale.clamp(min=1 if self.mode == "clip" else 1e-12)).to(weight.dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def spectral_clip(
    module: nn.Module, bound: float, mode: Literal["clip", "hard"] = "clip"
) -> nn.Module:
    """Put `SpectralClip` on every parameter named "weight" with two axes or more; in place.

    Biases stay free. Call `spectral_refresh` after every optimizer step; a target network keeps raw
    weights under averaging and power iterations of its own.

    >>> layer = spectral_clip(nn.Linear(2, 2, bias=False), 1.0)
    >>> layer.parametrizations.weight.original.data.copy_(torch.diag(torch.tensor([4.0, 0.5])))
    tensor([[4.0000, 0.0000],
            [0.0000, 0.5000]])
    >>> spectral_refresh(layer, 20)
    >>> layer(torch.eye(2)).detach().diag()
    tensor([1.0000, 0.1250])
    """
    for part in list(module.modules()):
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() >= 2:
            parametrize.register_parametrization(
                part, "weight", SpectralClip(weight, bound, mode), unsafe=True
            )
    return module


def clips(module: nn.Module) -> Iterator[tuple[SpectralClip, Tensor]]:
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList):
            yield from ((c, part.original) for c in part if isinstance(c, SpectralClip))


def spectral_refresh(module: nn.Module, iterations: int = 1) -> None:
    """Power iterations for every `SpectralClip` of a module; once per optimizer step."""
    for clip, weight in clips(module):
        for _ in range(iterations):
            clip.refresh(weight)


@torch.no_grad()
def lipschitz_bound(module: nn.Module) -> Tensor:
    """Product of the estimated norms of the clipped layers: a bound in the 2-norm, (*lead).

    Holds for stacks of these layers and activations of slope at most 1; 1 if there are none.
    """
    norms = [clip.sigma(clip(weight)) for clip, weight in clips(module)]
    return math.prod(norms, start=torch.ones(()))
