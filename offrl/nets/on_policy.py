"""Networks of on-policy methods: tanh layers, plain action distributions, running statistics."""

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.nets.linear import Linear, matrices


class TanhMLP(nn.Module):
    """Affine layers with tanh between them: (*S, B, dims[0]) -> (*S, B, dims[-1]).

    Orthogonal weights of gain sqrt 2, `gain` in the last layer, biases 0.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        gain: float,
        seeds: tuple[int, ...] = (),
        generator: Generator | None = None,
    ):
        super().__init__()
        layers = [Linear(i, o, seeds, generator) for i, o in pairwise(dims)]
        for i, layer in enumerate(layers):
            for weight in matrices(layer.weight.detach()):
                last = i == len(layers) - 1
                nn.init.orthogonal_(weight, gain if last else math.sqrt(2), generator=generator)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = layer(x).tanh()
        return last(x)


class Gaussian(nn.Module):
    """Diagonal Gaussian whose log std, 0 at first, does not depend on obs; not squashed.

    Actions beyond [-1, 1] are clipped by the environment, and judged as they were drawn.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: tuple[int, ...],
        seeds: tuple[int, ...] = (),
        generator: Generator | None = None,
    ):
        super().__init__()
        self.net = TanhMLP((obs_dim, *hidden, act_dim), 0.01, seeds, generator)
        device = None if generator is None else generator.device
        self.log_std = nn.Parameter(torch.zeros(*seeds, 1, act_dim, device=device))

    def best(self, obs: Tensor) -> Tensor:
        return self.net(obs)

    def sample(self, obs: Tensor, generator: Generator) -> Tensor:
        mean = self.net(obs)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + self.log_std.exp() * noise

    def judge(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of act (*S, B, a), and the entropy, (*S, B) both."""
        noise = (act - self.net(obs)) * (-self.log_std).exp()
        half = 0.5 * math.log(2 * math.pi)
        entropy = (self.log_std + 0.5 + half).sum(-1)
        log_prob = (-0.5 * noise.square() - self.log_std - half).sum(-1)
        return log_prob, entropy.expand_as(log_prob)


class Categorical(nn.Module):
    """Distribution over discrete actions by logits."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: tuple[int, ...],
        seeds: tuple[int, ...] = (),
        generator: Generator | None = None,
    ):
        super().__init__()
        self.net = TanhMLP((obs_dim, *hidden, act_dim), 0.01, seeds, generator)

    def best(self, obs: Tensor) -> Tensor:
        return self.net(obs).argmax(-1)

    def sample(self, obs: Tensor, generator: Generator) -> Tensor:
        logits = self.net(obs)
        waiting = torch.empty_like(logits).exponential_(generator=generator)
        return (logits - waiting.log()).argmax(-1)  # Gumbel

    def judge(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of act, int64 (*S, B), and the entropy, (*S, B) both."""
        log_probs = F.log_softmax(self.net(obs), -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, act.unsqueeze(-1)).squeeze(-1), entropy


class Running(nn.Module):
    """Standardizes by the mean and variance of all rows seen so far, clipped to +-10.

    The identity (mean 0, variance 1) until rows are added; the state holds the statistics.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, width: int, seeds: tuple[int, ...], device: torch.device):
        super().__init__()
        self.register_buffer("mean", torch.zeros(*seeds, 1, width, device=device))
        self.register_buffer("variance", torch.ones(*seeds, 1, width, device=device))
        self.register_buffer("count", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(*S, B, width), each seed by its own statistics."""
        return ((x - self.mean) / self.std()).clamp(-10, 10)

    def std(self) -> Tensor:
        return (self.variance + 1e-8).sqrt()  # (*S, 1, width)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows (*S, N, width)."""
        mean, variance = rows.mean(-2, keepdim=True), rows.var(-2, keepdim=True, unbiased=False)
        total = self.count + rows.shape[-2]
        share, apart = rows.shape[-2] / total, mean - self.mean
        spread = (variance - self.variance) * share + apart.square() * share * (1 - share)
        self.variance.copy_(torch.where(self.count > 0, self.variance + spread, variance))
        self.mean.copy_(self.mean + apart * share)
        self.count.copy_(total)
