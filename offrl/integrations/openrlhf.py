"""Regularizers inside OpenRLHF, which has no registry: a patch of three methods.

    with patch([LengthShaper("kimi", coef=0.1), EntropyBonus(0.01)], correct=0.5):
        ...  # everything of OpenRLHF that runs in this process

No loss is copied: each method is called, and added to.

    RemoteExperienceMaker.compute_advantages_and_returns
        reward hook before it and advantage hook after it, on the whole rollout batch
    PolicyLoss.forward
        token hook before it, as a factor of the advantages; loss hook after it, reduced by
        `aggregate_loss` with the sizes of the optimizer step that OpenRLHF passes
    ActorPPOTrainer.training_step
        for the reference, the entropy and the log, which the loss does not see

OpenRLHF works in Ray actors, so the patch must be entered in each of their processes and stay:

    def setup():
        patch([LengthShaper("kimi", coef=0.1)], correct=0.5).__enter__()

    env = {  # what OpenRLHF would have set
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        "NCCL_DEBUG": "WARN",
        "TOKENIZERS_PARALLELISM": "true",
    }
    ray.init(runtime_env={"worker_process_setup_hook": setup, "env_vars": env})  # it stays running
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")

Without a patch, `--reward.remote_url file.py` takes `reward_func(queries, prompts, labels)`, which
is called with one response at a time: formulas of single rows fit, groups do not.

Limits. Workers save nothing, and do not say when an optimizer step ends: at the loss only constant
coefficients are taken, and reductions "token-mean" and "seq-mean-token-mean". Modules of the other
hooks learn once per rollout batch; their state is in no checkpoint. The reward hook sees what the
reward model or `reward_func` returned; OpenRLHF's own length and KL penalties come after it.
Responses are then spread over ranks and micro-batches: no groups are known at the loss. Prompts
have no integer names: no histories. The critic's loss is left alone. OpenRLHF cuts KL estimates at
+-10, where the gradient of its own ends; ours go on. Written for OpenRLHF 0.11.2; tried on its
methods with a tiny actor and on the hook in Ray's workers, not in a training run with DeepSpeed and
vLLM.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.integrations import host
from offrl.regularizers import RegInputs, Regularizer

RELEASE = "0.11.2"
MODES = {"token-mean": True, "seq-mean-token-mean": False}  # -> token_level_loss

MAKER = {"RemoteExperienceMaker.compute_advantages_and_returns": "experiences"}
ACTOR = {"ActorPPOTrainer.training_step": "experience kl_ctl step loss_batch_info"}
LOSS = {
    "PolicyLoss.forward": "log_probs old_log_probs advantages action_mask rollout_log_probs "
    "dp_size batch_num_tokens global_batch_size",
    "aggregate_loss": "loss loss_mask token_level_loss dp_size batch_num_tokens global_batch_size",
}
ROWS = frozenset({"rewards", "lengths", "finished", "group", "old_logp", "mask", "step"})
TOKENS = frozenset({"logp", "old_logp", "ref_logp", "entropy", "advantages", "mask", "lengths"})
REMEDIES = {
    "correct": "pass correct=, the reward from which on a response counts as correct",
    "prompt_id": "prompts have no integer names there",
    "group": "it is known to the reward and the advantage hook only",
}

load = functools.partial(host.load, "openrlhf", RELEASE)


class patch:
    """Run regularizers inside OpenRLHF while the context is open.

    Args:
        regularizers: of the reward, advantage, token and loss hook; those of the last two without
            state. Without any, nothing is changed.
        correct: responses whose reward reaches it count as correct.

    Entering compares the methods with those written for before it replaces the first, and leaving
    restores all of them, also after an exception. Only what the given hooks need is replaced.

    Raises:
        ValueError: a module that OpenRLHF cannot run.
        ImportError, TypeError: on entering, OpenRLHF is missing or not as expected.
    """

    def __init__(
        self,
        regularizers: Iterable[Regularizer] | Mapping[str, Regularizer],
        correct: float | None = None,
    ):
        rows = ROWS if correct is None else ROWS | {"correct"}
        offers = host.batch_offers(rows) | dict.fromkeys(host.LOSS_HOOKS, TOKENS)
        self.reg = host.compose(regularizers, offers, REMEDIES, "OpenRLHF")
        for name, part in self.reg.at("loss").items():
            if part.reduction not in MODES:
                raise ValueError(
                    f"{name}: OpenRLHF reduces by {' or '.join(MODES)}, not {part.reduction!r}"
                )
        self.correct, self.step = correct, 0
        self._seen: dict[str, Any] = {}  # of the training step that is running
        self._originals: list[tuple[type, str, Any]] = []

    def __enter__(self) -> "patch":
        hooks = self.reg.hooks
        new: list[tuple[type, str, Any]] = []
        if hooks & set(host.BATCH_HOOKS):
            maker = load("openrlhf.trainer.ppo_utils.experience_maker", MAKER)
            new.append((maker.RemoteExperienceMaker, "compute_advantages_and_returns", self._make))
        if hooks & set(host.LOSS_HOOKS):
            self._loss = load("openrlhf.models.loss", LOSS)
            actor = load("openrlhf.trainer.ray.ppo_actor", ACTOR)
            new.append((self._loss.PolicyLoss, "forward", self._forward))
            new.append((actor.ActorPPOTrainer, "training_step", self._train))
        for owner, name, function in new:
            original = vars(owner)[name]
            self._originals.append((owner, name, original))
            setattr(owner, name, method(function, original))
        return self

    def __exit__(self, *error: object) -> None:
        while self._originals:
            setattr(*self._originals.pop())

    # -- the rollout batch ------------------------------------------------------------------------

    @torch.no_grad()
    def _make(self, original: Any, maker: Any, experiences: list) -> list:
        x = self._rows(experiences, maker.args.rollout.n_samples_per_prompt)
        sizes = [len(e.rewards) for e in experiences]
        shaped: Any = self.reg.run("reward", x)
        if shaped.rewards is not None:
            changes = (shaped.rewards - x.need("rewards")).split(sizes)
            for e, rewards, change in zip(
                experiences, shaped.rewards.split(sizes), changes, strict=True
            ):
                e.rewards, e.info["reg_shaping"] = rewards, change
            x = replace(x, rewards=shaped.rewards)
        experiences = original(maker, experiences)
        sync = shaped.sync
        if "advantage" in self.reg.hooks:
            x = replace(x, advantages=stack([e.advantages for e in experiences]))
            final: Any = self.reg.run("advantage", x)
            advantages = final.advantages * x.need("mask")
            for e, rows in zip(experiences, advantages.split(sizes), strict=True):
                e.advantages = rows[:, : e.advantages.size(1)]
            sync = sync | final.sync
        self.reg.update(sync)
        self.step += 1
        return experiences

    def _rows(self, experiences: list, group_size: int) -> RegInputs:
        """One row per response of the rollout batch, in the order of the experiences."""
        rewards = torch.cat([e.rewards for e in experiences]).float()
        mask = stack([e.action_mask for e in experiences])
        index = torch.tensor([i for e in experiences for i in e.index], device=rewards.device)
        cut = [e.truncated for e in experiences if e.truncated is not None]
        if cut and len(cut) < len(experiences):
            raise ValueError("some experiences say whether they were truncated and others do not")
        return RegInputs(
            rewards=rewards,
            correct=None if self.correct is None else rewards >= self.correct,
            lengths=mask.sum(-1),
            finished=torch.cat(cut) == 0 if cut else None,
            group=index // group_size,
            mask=mask,
            old_logp=stack([e.action_log_probs for e in experiences]),
            step=torch.tensor(self.step, device=rewards.device),
        )

    # -- the loss of a micro-batch ----------------------------------------------------------------

    def _train(
        self,
        original: Any,
        trainer: Any,
        experience: Any,
        kl_ctl: float,
        step: int,
        loss_batch_info: dict | None = None,
    ) -> Any:
        self._seen = {"ref_logp": experience.base_action_log_probs, "info": experience.info}
        hook = trainer.actor.register_forward_hook(
            lambda actor, args, out: self._seen.update(entropy=getattr(out[1], "entropy", None))
        )
        try:
            return original(trainer, experience, kl_ctl, step, loss_batch_info)
        finally:
            hook.remove()
            self._seen = {}

    def _forward(
        self,
        original: Any,
        module: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        **sizes: Any,
    ) -> tuple:
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        x = self._tokens(log_probs, old_log_probs, advantages, mask)
        token = self.reg.run("token", x)
        weight = token.token_weight
        weighted = advantages if weight is None else advantages * weight
        loss, *others = original(
            module, log_probs, old_log_probs, weighted, action_mask, rollout_log_probs, **sizes
        )

        def reduce(value: Tensor, mode: str) -> Tensor:
            return self._loss.aggregate_loss(value, mask, MODES[mode], **sizes)

        extra, metrics = host.extra_loss(self.reg, x, token, reduce)
        self._seen.get("info", {}).update({f"reg/{k}": v for k, v in metrics.items()})
        return (loss + extra, *others)

    def _tokens(self, logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> RegInputs:
        reference, entropy = self._seen.get("ref_logp"), self._seen.get("entropy")
        if "ref_logp" in self.reg.requires and reference is None:
            raise ValueError(
                "a regularizer needs 'ref_logp': set --algo.kl.use_loss and an --algo.kl.init_coef "
                "above 0, such as 1e-10 to leave OpenRLHF's own term out"
            )
        if "entropy" in self.reg.requires and entropy is None:
            raise ValueError("a regularizer needs 'entropy': set --actor.entropy_coef 0")
        return RegInputs(
            logp=logp,
            old_logp=old,
            ref_logp=reference,
            entropy=None if entropy is None else entropy[:, -mask.size(1) :],
            advantages=advantages,
            mask=mask,
            lengths=mask.sum(-1),
        )


def method(function: Any, original: Any) -> Any:
    """`function(original, self, ...)` as a method with the signature of `original`."""

    @functools.wraps(original)
    def patched(self, *args, **kwargs):
        return function(original, self, *args, **kwargs)

    return patched


def stack(rows: list[Tensor]) -> Tensor:
    """(B_i, T_i) padded with zeros to one T and stacked.

    >>> stack([torch.ones(1, 1), torch.ones(1, 2)])
    tensor([[1., 0.],
            [1., 1.]])
    """
    longest = max(x.size(1) for x in rows)
    return torch.cat([F.pad(x, (0, longest - x.size(1))) for x in rows])
