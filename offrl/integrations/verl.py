"""Regularizers inside verl: advantage estimators, policy losses and the full loss of the actor.

    # regularized.py, run in every process: OFFRL_VERL=$PWD/regularized.py (see verl_plugin)
    register_advantage("grpo_kimi", [LengthShaper("kimi", coef=0.1)], correct=0.5)
    register_loss("vanilla_cov", [KLCov(coef=0.1)])

    algorithm.adv_estimator=grpo_kimi actor_rollout_ref.actor.policy_loss.loss_mode=vanilla_cov

No loss or estimator of verl is copied. Each of the three calls verl's own and adds to it:

    register_advantage  reward and advantage hook; runs once per rollout batch, on the driver, with
                        all rows of all groups: the place of all length and group shaping
    register_loss       token and loss hook, on one micro-batch; terms in the log-probabilities of
                        the policy and of the sampler
    RegularizedLoss     the same with the entropy and the reference's log-probabilities

Weights of the token hook multiply the advantages that verl's loss reads, which must be linear in
them for weights >= 0; geo_mean, dro, clip_cov and kl_cov are not, and are refused. Terms are
reduced by verl's `agg_loss` with the module's own `reduction` (the names are verl's) and the sizes
of the whole mini-batch, so that they do not depend on micro-batches or shards.

Limits. verl passes no group, reward or reference to a policy loss and no log-probabilities to an
estimator; its `uid` is drawn anew whenever a prompt is sampled, so that histories of prompts find
nothing; nobody says where generation was cut off. Workers neither learn of optimizer steps nor save
anything: at the loss only constant coefficients are taken. On the driver modules learn once per
rollout batch; verl's checkpoints do not contain them, see `state`. Estimators other than "grpo"
skip verl's handling of rollouts with several outputs: every output is a row of its group. Rewards
contain the KL where `use_kl_in_reward` is set. verl cuts its k3 at 10, where the gradient of its
own ends; ours goes on. Metrics of terms are means over micro-batches. Written for verl 0.9.1 and
its `trainer.use_v1`; tried on its functions, not in a training run.
"""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offrl.integrations import host
from offrl.regularizers import Compose, RegInputs, Regularizer

logger = logging.getLogger(__name__)

RELEASE = "0.9.1"
Regularizers = Iterable[Regularizer] | Mapping[str, Regularizer]

NONLINEAR = {"geo_mean", "dro", "clip_cov", "kl_cov"}  # in the advantage of a token

LOSS = "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
CORE = {
    "register_adv_est": "name_or_enum",
    "get_adv_estimator_fn": "name_or_enum",
    "register_policy_loss": "name",
    "get_policy_loss_fn": "name",
    "compute_policy_loss_vanilla": LOSS,
    "agg_loss": "loss_mat loss_mask loss_agg_mode dp_size batch_num_tokens global_batch_size "
    "loss_scale_factor",
}
FULL = {"ppo_loss": "config model_output data dp_group"}
METRIC = {"Metric": "aggregation value"}
PADDING = {"no_padding_2_padding": "tensor data", "response_to_nested": "tensor response_mask"}
PASSED = frozenset({"token_level_rewards", "response_mask", "config", "index"})

ROWS = frozenset({"rewards", "lengths", "group", "mask", "step"})
RATIO = frozenset({"logp", "old_logp", "advantages", "mask", "lengths"})
ROW_REMEDIES = {
    "correct": "pass correct=, the reward from which on a response counts as correct",
    "prompt_id": "verl names a prompt anew whenever it samples it",
    "finished": "verl does not say where generation was cut off",
}
RATIO_REMEDIES = {
    "entropy": "use RegularizedLoss in place of register_loss",
    "ref_logp": "use RegularizedLoss in place of register_loss",
}

core_algos = partial(host.load, "verl", RELEASE, "verl.trainer.ppo.core_algos", CORE)
losses = partial(host.load, "verl", RELEASE, "verl.workers.utils.losses", FULL)
metric = partial(host.load, "verl", RELEASE, "verl.utils.metric", METRIC)
padding = partial(host.load, "verl", RELEASE, "verl.workers.utils.padding", PADDING)


def register_advantage(
    name: str,
    regularizers: Regularizers,
    base: str = "grpo",
    correct: float | None = None,
    state: str | os.PathLike | None = None,
) -> "Advantage":
    """Register an estimator that shapes rewards, calls another one, and shapes its advantages.

    Args:
        name: for `algorithm.adv_estimator`.
        regularizers: of the reward and the advantage hook.
        base: verl's estimator in between; not one that needs values ("gae") or statistics of the
            policy, which verl passes to its own estimators only.
        correct: responses whose reward reaches it count as correct.
        state: a file, on the machine of verl's task runner, that keeps the modules' state: read
            before the first batch if it exists, replaced after every batch. A resumed run continues
            from the last batch, also where verl's own checkpoint is older.

    Returns:
        The estimator; its `reg` is the `Compose`.

    Raises:
        ImportError, TypeError: verl is missing or not as expected.
        ValueError: a module, or `base`, needs what verl does not pass.
    """
    core = core_algos()
    estimator = Advantage(regularizers, core.get_adv_estimator_fn(base), correct, state)
    core.register_adv_est(name)(estimator)
    return estimator


class Advantage:
    """An advantage estimator of verl, see `register_advantage`."""

    def __init__(
        self,
        regularizers: Regularizers,
        base: Callable,
        correct: float | None = None,
        state: str | os.PathLike | None = None,
    ):
        offered = ROWS if correct is None else ROWS | {"correct"}
        offers = host.batch_offers(offered)
        self.reg = host.compose(regularizers, offers, ROW_REMEDIES, "verl's advantage")
        self.base, self.correct, self.state, self.step = base, correct, state, 0
        taken = inspect.signature(base).parameters
        needed = {
            n
            for n, p in taken.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        } | (taken.keys() & {"non_tensor_batch"})  # gdpo falls back to one reward without
        if lacking := sorted(needed - PASSED):
            raise ValueError(
                f"the estimator {getattr(base, '__name__', base)} needs {', '.join(lacking)}, "
                "which verl passes to it under its own name only: choose another base"
            )
        self.scaled = "norm_adv_by_std_in_grpo" in taken

    def __call__(
        self, token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns, both (B, T), without gradient; returns are those of the base.

        Args:
            token_level_rewards: (B, T); their sum is the reward. Not changed.
            response_mask: (B, T), 1 where the policy produced the token.
            rest: `index` names the prompt of every row; handed on to the base.
        """
        if self.scaled and config is not None:
            rest["norm_adv_by_std_in_grpo"] = config.get("norm_adv_by_std_in_grpo", True)
        if self.step == 0 and self.state is not None and os.path.exists(self.state):
            saved = torch.load(self.state, weights_only=True)
            self.step = saved["step"]
            self.reg.load_state_dict(saved["reg"])
            logger.warning(
                "regularizers continue from batch %d of %s; a new run needs a file of its own",
                self.step,
                self.state,
            )
        x = self.describe(token_level_rewards, response_mask, rest.get("index"))
        shaped: Any = self.reg.run("reward", x)
        rewards = token_level_rewards.clone()
        if shaped.rewards is not None:
            last = last_token(response_mask)
            change = (shaped.rewards - x.need("rewards")).unsqueeze(1).to(rewards.dtype)
            rewards = rewards.scatter_add(1, last, change)
            x = replace(x, rewards=shaped.rewards)
        advantages, returns = self.base(
            token_level_rewards=rewards, response_mask=response_mask, config=config, **rest
        )
        final: Any = self.reg.run("advantage", replace(x, advantages=advantages))
        if final.advantages is not None:
            advantages = final.advantages * response_mask
        self.reg.update(shaped.sync | final.sync)
        self.step += 1
        if self.state is not None:
            part = f"{self.state}.part"
            torch.save({"step": self.step, "reg": self.reg.state_dict()}, part)
            os.replace(part, self.state)
        return advantages, returns

    def describe(self, rewards: Tensor, mask: Tensor, index: Any) -> RegInputs:
        total = rewards.sum(-1)
        numbers: dict[Any, int] = {}
        names = range(len(total)) if index is None else index
        group = [numbers.setdefault(name, len(numbers)) for name in names]
        return RegInputs(
            rewards=total,
            lengths=mask.sum(-1),
            mask=mask,
            group=torch.tensor(group, device=total.device),
            correct=None if self.correct is None else total >= self.correct,
            step=torch.tensor(self.step, device=total.device),
        )


def last_token(mask: Tensor) -> Tensor:
    """Index (B, 1) of the last 1 of every row; 0 in a row without one.

    >>> last_token(torch.tensor([[1, 1, 0], [0, 0, 0]])).squeeze(1)
    tensor([1, 0])
    """
    place = torch.arange(mask.size(1), device=mask.device)
    return torch.where(mask.bool(), place, 0).amax(1, keepdim=True)


def register_loss(name: str, regularizers: Regularizers, base: str = "vanilla") -> "PolicyLoss":
    """Register a policy loss: another one plus terms in log-probabilities and their ratios.

    Args:
        name: for `actor_rollout_ref.actor.policy_loss.loss_mode`.
        regularizers: of the token and the loss hook, without state.
        base: verl's loss that is added to; without regularizers the result is bit-identical to it.

    Raises:
        ImportError, TypeError: verl is missing or not as expected.
        ValueError: a module keeps a state or needs what verl does not pass to a policy loss, or
            weighs tokens of a loss that is not linear in their advantages.
    """
    core = core_algos()
    loss = PolicyLoss(regularizers, core.get_policy_loss_fn(base), core.agg_loss)
    check_linear(loss.reg, base)
    core.register_policy_loss(name)(loss)
    return loss


def check_linear(reg: Compose, loss_mode: str) -> None:
    """Raise ValueError where weights of tokens would not factor out of verl's loss."""
    if "token" in reg.hooks and loss_mode in NONLINEAR:
        raise ValueError(
            f"verl's loss {loss_mode!r} is not linear in the advantage of a token, so that weights "
            "of the token hook do not weigh it: choose another loss, or no such module"
        )


class PolicyLoss:
    """A policy loss of verl, see `register_loss`."""

    def __init__(self, regularizers: Regularizers, base: Callable, agg_loss: Callable):
        offers = dict.fromkeys(host.LOSS_HOOKS, RATIO)
        self.reg = host.compose(regularizers, offers, RATIO_REMEDIES, "verl's policy loss")
        self.base, self.agg_loss = base, agg_loss

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss and its metrics; all tensors (B, T), gradient flows into `log_prob`."""
        x = RegInputs(
            logp=log_prob,
            old_logp=old_log_prob,
            advantages=advantages,
            mask=response_mask,
            lengths=response_mask.sum(-1),
        )
        token = self.reg.run("token", x)
        weight = token.token_weight
        loss, metrics = self.base(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages if weight is None else advantages * weight,
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )
        reduce = partial(reduced, self.agg_loss, response_mask, config)
        extra, seen = host.extra_loss(self.reg, x, token, reduce)
        return loss + extra, metrics | {f"actor/reg/{k}": v.item() for k, v in seen.items()}


def reduced(agg_loss: Callable, mask: Tensor, config: Any, x: Tensor, mode: str) -> Tensor:
    return agg_loss(loss_mat=x, loss_mask=mask, loss_agg_mode=mode, **config.global_batch_info)


class RegularizedLoss:
    """The actor's full loss plus terms in log-probabilities, entropy and reference.

    Takes the place of verl's `ppo_loss`, through `set_loss_fn` of the workers:

        LOSS = RegularizedLoss([EntropyBonus(0.01), KLToReference(0.02, kind="k2", grad="path")])

        @register_trainer("regularized")  # of verl.trainer.ppo.v1; trainer.v1.trainer_mode
        class Trainer(PPOTrainerSync):
            def init(self):
                super().init()
                config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
                self.actor_rollout_wg.set_loss_fn(functools.partial(LOSS, config=config))

    It replaces what the worker had: with distillation on, give verl's `distillation_ppo_loss` with
    its configuration as `base`, or that term is gone.

    The entropy is there if `actor.calculate_entropy` or `entropy_coeff` is set, the reference if
    `actor.use_kl_loss` is (with `kl_loss_coef=0`, verl's own term adds nothing).

    Args:
        regularizers: of the token and the loss hook, without state.
        base: loss with the arguments of `ppo_loss`, which is the default.

    Raises:
        ValueError: a module keeps a state or needs what verl does not have there.
    """

    def __init__(self, regularizers: Regularizers, base: Callable | None = None):
        offers = dict.fromkeys(host.LOSS_HOOKS, RATIO | {"entropy", "ref_logp"})
        self.reg = host.compose(regularizers, offers, {}, "verl's loss")
        self.base = base

    def __call__(
        self, config: Any, model_output: Any, data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss, normalized over the mini-batch, and its metrics.

        Args:
            config: the actor's.
            model_output: nested "log_probs" and "entropy", see verl's `no_padding_2_padding`.
            data: micro-batch with "response_mask", "old_log_probs", "advantages", "ref_log_prob".

        Raises:
            ImportError, TypeError: verl is missing or not as expected.
            ValueError: entropy or reference are needed and absent.
        """
        base = self.base or losses().ppo_loss
        if not self.reg.hooks:
            return base(config=config, model_output=model_output, data=data, dp_group=dp_group)
        check_linear(self.reg, config.policy_loss.loss_mode)
        x = self.describe(model_output, data)
        token, mask = self.reg.run("token", x), data["response_mask"]
        if token.token_weight is not None:
            weighted = x.need("advantages") * token.token_weight
            data = data.copy()
            data["advantages"] = (
                padding().response_to_nested(weighted, mask) if mask.is_nested else weighted
            )
        loss, metrics = base(config=config, model_output=model_output, data=data, dp_group=dp_group)
        reduce = partial(reduced, core_algos().agg_loss, x.need("mask"), config)
        extra, seen = host.extra_loss(self.reg, x, token, reduce)
        log = metric().Metric
        added = {f"reg/{k}": log(value=v, aggregation="mean") for k, v in seen.items()}
        added["reg_loss"] = log(value=extra, aggregation="sum")  # parts of one mean
        return loss + extra, metrics | added

    def describe(self, model_output: Any, data: Any) -> RegInputs:
        """Rows of the responses, padded to (B, T)."""
        padded = padding().no_padding_2_padding
        names = ["response_mask", "old_log_probs", "advantages"]
        if "ref_logp" in self.reg.requires:
            if "ref_log_prob" not in data:
                raise ValueError(
                    "a regularizer needs 'ref_logp': set actor.use_kl_loss=True, with "
                    "kl_loss_coef=0 to leave verl's own term out"
                )
            names.append("ref_log_prob")
        entropy = model_output.get("entropy", None)
        if "entropy" in self.reg.requires and entropy is None:
            raise ValueError("a regularizer needs 'entropy': set actor.calculate_entropy=True")
        fields = data.select(*names).to_padded_tensor()
        mask = fields["response_mask"].to(bool)
        return RegInputs(
            logp=padded(model_output["log_probs"], data),
            old_logp=fields["old_log_probs"],
            ref_logp=fields.get("ref_log_prob", None),
            entropy=None if entropy is None else padded(entropy, data),
            advantages=fields["advantages"],
            mask=mask,
            lengths=mask.sum(-1),
        )
