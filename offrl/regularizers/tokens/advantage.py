"""Advantages: shaped by entropy or length, made of token and turn rewards, of cut episodes.

Everything returned is free of gradient, except by `bgpo_objective`. The modules act at the
advantage hook, where advantages are (B,) or (B, T). Steps and turns of a trajectory are the same
thing: `turn` (B, T) holds 0, 1, 2, ... below T, and -1 outside the policy's tokens.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.reductions import (
    group_mean,
    group_sum,
    keep,
    log_ratio,
    masked_mean,
    masked_reduce,
    over_tokens,
    real,
    times,
)
from offrl.regularizers.tokens.kl import kl_in_reward

Baseline = Literal["turn", "reward", "position"]


def backward_scan(value: Tensor, decay: Tensor) -> Tensor:
    """x_t = value_t + decay_t x_(t+1) along the last axis, x = 0 beyond it; in log2 T passes."""
    step = 1
    while step < value.shape[-1]:
        value = value + decay * F.pad(value[..., step:], (0, step))
        decay = decay * F.pad(decay[..., step:], (0, step))
        step *= 2
    return value


def inside(turn: Tensor, mask: Tensor | None) -> Tensor:
    return turn >= 0 if mask is None else (turn >= 0) & mask.bool()


def turn_means(x: Tensor, turn: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of `x` over the valid tokens of every turn, (B, T) with a column per turn; and whether
    there is such a turn."""
    valid = inside(turn, mask)
    x, column = keep(x.detach(), valid), torch.where(valid, turn, 0)
    total = torch.zeros_like(x).scatter_add(1, column, x)
    count = torch.zeros_like(x).scatter_add(1, column, valid.to(x.dtype))
    return total / count.clamp(min=1), count > 0


def mean_over_turns(per_turn: Tensor, there: Tensor) -> Tensor:
    return masked_mean(per_turn.reshape(-1), there.reshape(-1))


def to_tokens(per_turn: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
    """For every token the number of its turn, 0 outside of turns."""
    return keep(per_turn.gather(1, turn.clamp(min=0)), inside(turn, mask))


def entropy_modulation(
    entropy: Tensor, turn: Tensor, mask: Tensor | None = None, k: float = 1.0, k_next: float = 1.0
) -> tuple[Tensor, Tensor]:
    """EMPG's gain of a step and the clarity of the step that follows.

    With h in [0, 1] the mean token entropy of a step, min-max scaled over all steps of the batch
    (1e-8 added to the range), the gain is exp(-k h) over its mean over steps, and the clarity is
    exp(-k_next h) of the next step.

    Args:
        entropy: (B, T), nats. turn: (B, T) int64. mask: (B, T), 1 where a token counts.
        k, k_next: with 0 the gain, or the clarity, is 1 whatever the entropy.

    Returns:
        Two of (B, T), one number for all tokens of a step, 0 outside of steps. Gain: positive, of
        mean 1 over steps, largest for the most certain one; 1 if all are alike. Clarity: 1 before
        the most certain step, exp(-k_next) before the least certain, 0 in the last step.

    >>> entropy, turn = torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([[0, 1, 1]])
    >>> gain, clarity = entropy_modulation(entropy, turn)
    >>> gain, clarity
    (tensor([[1.4621, 0.5379, 0.5379]]), tensor([[0.3679, 0.0000, 0.0000]]))
    """
    mean, there = turn_means(entropy, turn, mask)
    low, high = keep(mean, there, torch.inf).amin(), keep(mean, there, -torch.inf).amax()
    h = keep((mean - low) / (high - low + 1e-8), there)
    gain = torch.exp(-k * h) / mean_over_turns(torch.exp(-k * h), there).clamp(min=1e-8)
    following = F.pad(keep(torch.exp(-k_next * h), there)[:, 1:], (0, 1))
    return to_tokens(gain, turn, mask), to_tokens(following, turn, mask)


class EMPG(Regularizer):
    """Advantage hook: A gain + zeta clarity, less its mean over the steps of the batch.

    The gain strengthens certain steps and weakens uncertain ones, and never changes the sign of A;
    the bonus favors steps that lead to a certain next one. See `entropy_modulation`. Scaling the
    rewards does not scale the bonus.

    Args:
        k, k_next: 0 switches the gain, or the dependence of the bonus on entropy, off.
        zeta: weight of the bonus. With k = zeta = 0 only the mean is subtracted.

    Output (B, T), 0 outside of steps.

    Source: Wang et al., "Harnessing Uncertainty: Entropy-Modulated Policy Gradients", 2025,
    arXiv:2509.09265. There is no official code: the defaults are those of a re-implementation,
    which pays the bonus for the step's own entropy, here it is the next step's; that the final mean
    is over steps is our reading.
    """

    hook = "advantage"
    requires = frozenset({"advantages", "entropy", "turn"})

    def __init__(self, k: float = 1.0, k_next: float = 1.0, zeta: float = 0.05):
        super().__init__()
        self.k, self.k_next, self.zeta = k, k_next, zeta

    def forward(self, x: RegInputs) -> RegOutput:
        turn, entropy = x.need("turn"), x.need("entropy")
        gain, clarity = entropy_modulation(entropy, turn, x.mask, self.k, self.k_next)
        valid = inside(turn, x.mask)
        advantages = keep(over_tokens(x.need("advantages").detach(), gain), valid)
        shaped = advantages * gain + self.zeta * clarity
        mean = mean_over_turns(*turn_means(shaped, turn, x.mask))
        return RegOutput(
            advantages=keep(shaped - mean, valid),
            metrics={
                "gain": masked_reduce(gain, valid),
                "bonus": masked_reduce(self.zeta * clarity, valid),
            },
        )


def overlength_factor(
    lengths: Tensor, correct: Tensor, group: Tensor, base: float = 1.00001
) -> Tensor:
    """Factor of the advantage of wrong responses that are longer than the group's correct ones.

    2 - base^-D for D tokens beyond the mean length of the group's correct responses; 1 for correct
    responses, for shorter ones, and in groups without a correct one.

    Args:
        lengths: (B,), policy tokens. correct: (B,) bool. group: (B,) int64.
        base: at the released 1.00001 almost inert: 1.00995 for D = 1000, 1.040 for D = 4096.

    Returns:
        (B,), from 1 for D = 0 to 2 as D grows.

    Source: STCR of "APO: Enhancing Reasoning of MLLMs via Asymmetric Policy Optimization", 2025,
    arXiv:2506.21655, and its code, which reads correctness off int(reward), so that rewards of
    correct responses have to lie in [1, 2); here it is an input.

    >>> lengths, correct = torch.tensor([1000, 2000]), torch.tensor([True, False])
    >>> overlength_factor(lengths, correct, torch.tensor([0, 0]), base=1.001)
    tensor([1.0000, 1.6319])
    """
    lengths, right = real(lengths), correct.bool()
    excess = (lengths - group_mean(lengths, group, right)).clamp(min=0)
    factor = 1 - torch.expm1(-math.log(base) * excess)
    solved = group_sum(right.to(factor.dtype), group) > 0
    return torch.where(~right & solved, factor, 1.0)


class STCR(Regularizer):
    """Advantage hook: A times `overlength_factor`, which pushes overlong wrong responses harder.

    Args:
        base: 1 leaves the advantages alone; larger ones reach the factor 2 sooner.
    """

    hook = "advantage"
    requires = frozenset({"advantages", "lengths", "correct", "group"})

    def __init__(self, base: float = 1.00001):
        super().__init__()
        self.base = base

    def forward(self, x: RegInputs) -> RegOutput:
        factor = overlength_factor(x.need("lengths"), x.need("correct"), x.need("group"), self.base)
        advantages = x.need("advantages").detach()
        kept = keep(advantages, x.mask if advantages.dim() == 2 else None)
        return RegOutput(
            advantages=kept * over_tokens(factor, kept), metrics={"factor": factor.mean()}
        )


def rto_rewards(
    rewards: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    dpo_logp: Tensor,
    mask: Tensor | None = None,
    beta_dpo: float = 0.05,
    beta_kl: float = 0.01,
    clip: float = 0.05,
    clip_reward: float = 10.0,
) -> Tensor:
    """Token rewards of Reinforced Token Optimization: what a DPO policy likes, spread over tokens.

    clip(beta_dpo (log pi_dpo - log ref)) - beta_kl (log pi - log ref), and the clipped outcome
    reward on the last valid token.

    Args:
        rewards: (B,), of a reward model, normalized by the caller.
        logp, ref_logp, dpo_logp: (B, T), of the sampling policy, the reference, and a policy
            trained by DPO against that reference.
        clip: bound of the first part per token; math.inf makes it add up to beta_dpo times the log
            ratio of the sequence, the implicit reward of DPO.
        clip_reward: bound of the outcome reward.

    Returns:
        (B, T), 0 at padding; for `truncated_gae`. With beta_dpo = 0 those of `kl_in_reward`.

    Source: Zhong et al., "DPO Meets PPO: Reinforced Token Optimization for RLHF", 2024,
    arXiv:2404.18922; the numbers are those of its code.

    >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
    >>> rto_rewards(torch.tensor([2.0]), -one, -one, zero, clip=1.0)
    tensor([[0.0500, 2.0500]])
    """
    ratio = log_ratio(keep(dpo_logp.detach(), mask), keep(ref_logp.detach(), mask))
    liked = times(beta_dpo, ratio)
    outcome = keep(rewards, None).clamp(-clip_reward, clip_reward)
    return liked.clamp(-clip, clip) + kl_in_reward(outcome, logp, ref_logp, beta_kl, mask)


def turn_rewards(answer_logp: Tensor, rewards: Tensor, last: Tensor) -> Tensor:
    """IGPO's reward of every turn: how much likelier it made the true answer; the last: outcome.

    Args:
        answer_logp: (B, S), mean log-probability of the tokens of the true answer if it were given
            after 0, 1, ..., S - 1 turns; entries of turns that were not played do not matter.
        rewards: (B,), outcome, F1 in the paper.
        last: (B,) int64 below S, index of the row's last turn; -1 for no turn.

    Returns:
        (B, S): p_(k+1) - p_k in turn k with p = exp(answer_logp), in [-1, 1], so that turns j to
        k - 1 add up to p_k - p_j; `rewards` in the last turn; 0 after it.

    >>> p = torch.tensor([[0.1, 0.3, 0.7]])
    >>> turn_rewards(p.log(), torch.tensor([1.0]), torch.tensor([2]))
    tensor([[0.2000, 0.4000, 1.0000]])
    """
    last = last.unsqueeze(-1)
    place = torch.arange(answer_logp.shape[1], device=answer_logp.device)
    p = keep(answer_logp.detach(), place <= last, -torch.inf).exp()
    gain = F.pad(p[:, 1:] - p[:, :-1], (0, 1))
    outcome = keep(rewards.detach(), None).unsqueeze(-1)
    return torch.where(place < last, gain, torch.where(place == last, outcome, 0.0))


def igpo_advantages(
    answer_logp: Tensor,
    rewards: Tensor,
    turn: Tensor,
    group: Tensor,
    mask: Tensor | None = None,
    discount: float = 1.0,
    baseline: Baseline = "turn",
) -> Tensor:
    """Return of a token's turn, from `turn_rewards`, less a baseline of its group.

    Args:
        answer_logp: (B, S), see `turn_rewards`; S above every index in `turn`.
        rewards: (B,). turn: (B, T). group: (B,) int64 in [0, B).
        discount: per turn.
        baseline: what is subtracted:
            turn      the mean return at the same turn, over the group's rows that played it
            reward    nothing from the return: before it is formed, rewards of all turns of the
                      group are standardized (mean and population std, 1e-6 added), as in the paper
                      and a later version of its code
            position  the mean return at the same position in the text over all rows of the group,
                      0 beyond a row's end, as in the first release; positions of different
                      responses have nothing in common: reproduction only

    Returns:
        (B, T), 0 outside of turns and for a group of one row.

    Source: "Information Gain-based Policy Optimization", 2025, arXiv:2510.14967, and its code.
    """
    valid = inside(turn, mask)
    last = torch.where(valid, turn, -1).amax(-1)
    reward = turn_rewards(answer_logp, rewards, last)
    played = torch.arange(reward.shape[1], device=turn.device) <= last.unsqueeze(-1)
    if baseline == "reward":
        reward = keep(standardized_in_group(reward, group, played), played)
    returns = backward_scan(reward, torch.full_like(reward, discount))
    if baseline == "turn":
        returns = returns - group_mean(returns, group, played)
    tokens = to_tokens(returns, turn, mask)
    if baseline == "position":
        tokens = keep(tokens - group_mean(tokens, group), valid)
    return tokens


def standardized_in_group(x: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-6) over all valid entries (B, S) of a group together."""
    count = group_sum(mask.to(x.dtype).sum(-1), group).clamp(min=1)
    mean = group_sum(keep(x, mask).sum(-1), group) / count
    centered = keep(x - mean.unsqueeze(-1), mask)
    std = (group_sum(centered.square().sum(-1), group) / count).sqrt()
    return centered / (std.unsqueeze(-1) + 1e-6)


class IGPO(Regularizer):
    """Advantage hook: replaces the advantages by `igpo_advantages`, one number per turn.

    The trainer provides extra["answer_logp"] (B, S). The paper trains with 16 samples per prompt,
    up to 10 turns and a KL coefficient of 1e-3, values of its code.
    """

    hook = "advantage"
    requires = frozenset({"rewards", "turn", "group", "extra.answer_logp"})

    def __init__(self, discount: float = 1.0, baseline: Baseline = "turn"):
        super().__init__()
        self.discount, self.baseline = discount, baseline

    def forward(self, x: RegInputs) -> RegOutput:
        turn = x.need("turn")
        advantages = igpo_advantages(
            x.need("extra.answer_logp"),
            x.need("rewards"),
            turn,
            x.need("group"),
            x.mask,
            self.discount,
            self.baseline,
        )
        size = masked_reduce(advantages.abs(), inside(turn, x.mask))
        return RegOutput(advantages=advantages, metrics={"size": size})


def truncated_gae(
    rewards: Tensor,
    values: Tensor,
    terminal: Tensor,
    discount: float,
    lam: float,
    cut: Tensor | None = None,
    next_values: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Generalized advantages where an episode may be cut off without having ended.

    delta_t = r_t + discount V_(t+1) - V_t and A_t = delta_t + discount lam A_(t+1). After a
    terminal step V is 0. After a cut one, the true next value, if given; else the step's own V
    stands in for it, delta = r + (discount - 1) V, which makes it possible to train on windows of
    unfinished responses. Where nothing is cut this is plain GAE.

    Args:
        rewards, values: (..., T), V of the state before the action or token; detached.
        terminal: 1 where the process ended: (..., T), or (...) for its last valid step, such as
            `finished` of token policies.
        discount, lam: in [0, 1]. lam = 0 gives delta. With lam = 1, A + V is the Monte Carlo
            return of what ended, a target for values.
        cut: (..., T), 1 where an episode was cut after the step (a time limit, the last step of a
            rollout, the end of a window). The last valid step of a row always is one.
        next_values: (..., T), V of the true next observation where it is known, as in control at a
            time limit; used everywhere in place of the shifted `values`.
        mask: (..., T), 1 where a step counts. The others are skipped: the step before a tool's
            output is followed by the one after it.

    Returns:
        (..., T), 0 where the mask is.

    Source: Schulman et al., 2015, arXiv:1506.02438; the stand-in: "Truncated Proximal Policy
    Optimization", 2025, arXiv:2506.15050 (EGAE; no code), which trains values on finished
    responses only, by their Monte Carlo returns.

    >>> rewards, values = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]])
    >>> truncated_gae(rewards, values, torch.tensor([False]), discount=1.0, lam=1.0)
    tensor([[3., 2., 0.]])
    """
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    rewards, values = keep(rewards.detach(), valid), keep(values.detach(), valid)
    place = torch.arange(values.shape[-1], device=values.device)
    last = place == torch.where(valid, place, -1).amax(-1, keepdim=True)
    if terminal.dim() < values.dim():
        terminal = terminal.bool().unsqueeze(-1) & last
    terminal = terminal.bool()
    end = terminal | last if cut is None else terminal | last | cut.bool()
    if next_values is None:
        coming = backward_scan(values, (~valid).to(values.dtype))  # V of the next valid step
        follow = torch.where(end, values, F.pad(coming[..., 1:], (0, 1)))
    else:
        follow = keep(next_values.detach(), valid)
    delta = keep(rewards + discount * torch.where(terminal, 0.0, follow) - values, valid)
    decay = torch.where(valid, discount * lam * (~end).to(delta.dtype), 1.0)
    return keep(backward_scan(delta, decay), valid)


def bgpo_objective(elbo: Tensor, old_elbo: Tensor, advantages: Tensor) -> Tensor:
    """Terms whose mean over samples bounds A exp(mean_j x_j) from below, x_j = elbo_j - old_elbo_j.

    A (1 + x_j) where A >= 0, by e^x >= 1 + x, and A exp(x_j) where A < 0, by Jensen's inequality.
    Value and gradient are those of the bounded quantity where all x are 0, and every sample stands
    alone, so that gradients may be accumulated sample by sample in constant memory.

    Args:
        elbo: (B, n), Monte Carlo samples of the bound on the log-likelihood of a masked diffusion
            model; receives the gradient. old_elbo: (B, n), of the sampling policy with the same
            masks; detached. Exponents are held within +-20.
        advantages: (B,), detached.

    Returns:
        (B, n), to be maximized. 0 for A = 0.

    Source: Lin et al., "Boundary-Guided Policy Optimization", 2025, arXiv:2510.11683; derived from
    the properties that its abstract states, no code seen.

    >>> x = torch.tensor([[0.5, -0.5]])
    >>> bgpo_objective(x.expand(2, 2), torch.zeros(2, 2), torch.tensor([1.0, -1.0]))
    tensor([[ 1.5000,  0.5000],
            [-1.6487, -0.6065]])
    """
    x = log_ratio(keep(elbo, None), keep(old_elbo.detach(), None))
    gain = keep(advantages.detach(), None).unsqueeze(-1)
    return times(gain, torch.where(gain >= 0, 1 + x, x.clamp(-20, 20).exp()))
