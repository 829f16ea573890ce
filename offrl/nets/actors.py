"""Policies: deterministic and squashed Gaussian over [-1, 1], plain Gaussian and categorical."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.nets.linear import Dims, Source, device_of
from offrl.nets.mlp import MLP

HALF = 0.5 * math.log(2 * math.pi)


class Actor(nn.Module):
    """Deterministic policy: obs (*S, B, o) -> tanh action (*S, B, a)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Dims, seeds: Dims, generator: Source):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, act_dim), seeds, generator)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).tanh()


class GaussianActor(nn.Module):
    """Tanh-squashed diagonal Gaussian: obs (*S, B, o) -> mean and log std before the tanh.

    The log std is clamped to [-20, 2] (Haarnoja et al. 2018, as in Stable-Baselines3).
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: Dims, seeds: Dims, generator: Source):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, 2 * act_dim), seeds, generator)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Reparameterized action (*S, B, a) and its log-probability (*S, B) in [-1, 1]^a."""
        mean, log_std = self(obs)
        noise = torch.empty_like(mean).normal_(generator=generator)
        raw = mean + log_std.exp() * noise
        return raw.tanh(), squashed_log_prob(raw, noise, log_std)


class Gaussian(nn.Module):
    """Diagonal Gaussian whose log std, 0 at first, does not depend on obs; not squashed.

    Actions beyond [-1, 1] are clipped by the environment, and judged as they were drawn.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: Dims, seeds: Dims, generator: Source):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, act_dim), seeds, generator, "tanh", last=0.01)
        self.log_std = nn.Parameter(torch.zeros(*seeds, 1, act_dim, device=device_of(generator)))

    def best(self, obs: Tensor) -> Tensor:
        return self.net(obs)

    def sample(self, obs: Tensor, generator: Generator) -> Tensor:
        mean = self.net(obs)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + self.log_std.exp() * noise

    def judge(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of act (*S, B, a), and the entropy, (*S, B) both."""
        noise = (act - self.net(obs)) * (-self.log_std).exp()
        entropy = (self.log_std + 0.5 + HALF).sum(-1)
        log_prob = (-0.5 * noise.square() - self.log_std - HALF).sum(-1)
        return log_prob, entropy.expand_as(log_prob)


class Categorical(nn.Module):
    """Distribution over discrete actions by logits."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Dims, seeds: Dims, generator: Source):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, act_dim), seeds, generator, "tanh", last=0.01)

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


def squashed_log_prob(raw: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of tanh(raw) where raw = mean + exp(log_std) noise, summed over the last axis.

    The log-determinant of tanh, 2 (log 2 - u - softplus(-2 u)), is stable in this form.
    """
    normal = -0.5 * noise.square() - log_std - HALF
    log_det = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
    return (normal - log_det).sum(-1)
