"""The loss of OTA term by term: what the joined passes of `offrl.algos.ota` are held against.

Every term calls every network it names, one head after the other, as the formulas stand, in torch's
own operators; targets and advantages are computed without a graph. Same parameters, same value,
same gradient. As the formulas stand, V_e(s, g) = MLP_e([s; phi([s; g])]), every head computes its
phi: 22 passes of phi and 20 of heads. With `shared` the heads of a term have one phi, as in the
authors' code: 12 passes of phi.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.algos.ota import HEADS, OTA, WEIGHT_CAP
from offrl.engine.method import Batch, Metrics
from offrl.engine.optim import descend, polyak
from offrl.nets.goal import normal_log_prob, normalized
from offrl.nets.kernels.gelu import EPS
from offrl.nets.mlp import MLP

LOW, HIGH = 0, 1


def update(algo: OTA, batch: Batch, turn: int, shared: bool = False) -> Metrics:
    """One update of OTA by the terms of its loss; for an algorithm without seed axes."""
    total = loss(algo, batch, shared)
    polyak(algo.values_target, algo.values, algo.config.tau)
    return descend(algo.opt, total, {"loss": total})


def loss(algo: OTA, batch: Batch, shared: bool = False) -> Tensor:
    """The four losses, summed."""
    value, mean = partial(value_loss, algo, shared), partial(mean_value, algo, shared)
    c, s, w, g = algo.config, batch["obs"], batch["waypoint"], batch["goal"]
    ahead = batch["ahead"]
    low_success, high_success = batch["low_success"], batch["high_success"]
    total = value(LOW, s, batch["next_obs"], batch["low_goal"], low_success)
    total = total + value(HIGH, s, batch["option_end"], batch["high_goal"], high_success)
    with torch.no_grad():
        advantage = mean(LOW, batch["next_obs"], w) - mean(LOW, s, w)
        low_weight = (c.low_alpha * advantage).exp().clamp(max=WEIGHT_CAP)
        advantage = mean(HIGH, ahead, g) - mean(HIGH, s, g)
        high_weight = (c.high_alpha * advantage).exp().clamp(max=WEIGHT_CAP)
        rep_w, subgoal = rep(algo, s, w), rep(algo, s, ahead)
    act = mlp(algo.low.net, torch.cat([s, rep_w], -1))
    total = total - (low_weight * normal_log_prob(batch["act"], act)).mean()
    named = mlp(algo.high.net, torch.cat([s, algo.goal(g)], -1))
    return total - (high_weight * normal_log_prob(subgoal, named)).mean()


def value_loss(
    algo: OTA, shared: bool, level: int, s: Tensor, end: Tensor, goal: Tensor, success: Tensor
) -> Tensor:
    c, online, target = algo.config, algo.values.net, algo.values_target.net
    reward, discount = success - 1, c.discount * (1 - success)
    with torch.no_grad():
        later = heads(algo, shared, target, level, end, goal)
        here = heads(algo, shared, target, level, s, goal)
        advantage = reward + discount * torch.minimum(*later) - (here[0] + here[1]) / 2
        weight = torch.where(advantage >= 0, c.expectile, 1 - c.expectile)
        targets = [reward + discount * value for value in later]
    values = heads(algo, shared, online, level, s, goal)
    pairs = zip(targets, values, strict=True)
    return torch.stack([(weight * (q - v).square()).mean() for q, v in pairs]).sum()


def mean_value(algo: OTA, shared: bool, level: int, s: Tensor, goal: Tensor) -> Tensor:
    return torch.stack(heads(algo, shared, algo.values.net, level, s, goal)).mean(0)


def heads(algo: OTA, shared: bool, net: MLP, level: int, s: Tensor, goal: Tensor) -> list[Tensor]:
    x = torch.cat([s, rep(algo, s, goal)], -1)
    out = []
    for e in range(HEADS):
        if e > 0 and not shared:
            x = torch.cat([s, rep(algo, s, goal)], -1)
        out.append(mlp(net, x, (level, e)).squeeze(-1))
    return out


def rep(algo: OTA, s: Tensor, goal: Tensor) -> Tensor:
    return normalized(mlp(algo.rep.net, torch.cat([s, algo.goal(goal)], -1)))


def mlp(net: MLP, x: Tensor, member: tuple[int, ...] = ()) -> Tensor:
    """One member of a stack of networks, in torch's own operators."""
    layers: Any = net.layers
    norms: Any = net.norms
    for i, layer in enumerate(layers):
        x = F.linear(x, layer.weight[member].T, layer.bias[member][0])
        if i < len(layers) - 1:
            x = F.gelu(x, approximate="tanh")
            if norms:
                weight, bias = (p[member][0] for p in (norms[i].weight, norms[i].bias))
                x = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return x
