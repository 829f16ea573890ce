"""What the tests of goal-conditioned methods share."""

import torch

from tests.algos.cases import OBS
from tests.algos.cases import two_goals as batch

PIXELS = 3 * 64**2


def trained_apart(target):
    """Move a target network away from the online one, which it equals at first."""
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.3)


def slopes(loss, module):
    """Largest gradient entry of every parameter, None where there is no path."""
    found = torch.autograd.grad(
        loss.sum(), list(module.parameters()), allow_unused=True, retain_graph=True
    )
    return [None if g is None else float(g.abs().max()) for g in found]


def reaches(loss, module):
    return any(slopes(loss, module))


def climbs_while_it_imitates(algo, critic):
    """The actor's loss and gradient are those of DDPG+BC.

    Args:
        critic: obs, act, goal -> Q (B,), in the method's own networks.
    """
    b = batch(dtype=torch.float64)
    with torch.no_grad():
        algo.actor.net.layers[-1].weight.mul_(100)
    mean = algo.actor(b["obs"], b["goal"])
    assert 0.1 < float((mean.abs() > 1).double().mean()) < 0.9  # the clip of actions matters
    q = critic(b["obs"], mean.clamp(-1, 1), b["goal"])
    log_prob = torch.distributions.Normal(mean, 1.0).log_prob(b["act"]).sum(-1)
    formula = -q.mean() / (q.abs().mean().detach() + 1e-6) - algo.config.alpha * log_prob.mean()
    loss, params = algo.actor_loss(b)[0], list(algo.actor.parameters())
    torch.testing.assert_close(loss, formula, rtol=1e-10, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(x, params) for x in (loss, formula)), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def with_images(b, seed=0):
    """The batch with images for its states and goals."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 256, (n, PIXELS), generator=g, dtype=torch.uint8)  # noqa: E731
    return {name: draw(len(v)) if v.shape[-1:] == (OBS,) else v for name, v in b.items()}
