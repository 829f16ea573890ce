"""Regularizers inside TRL's trainers: GRPO, RLOO and DPO.

    trainer = with_regularizers(GRPOTrainer)(
        model=..., args=GRPOConfig(...), reward_funcs=..., train_dataset=...,
        regularizers=[LengthShaper("kimi", coef=0.1), EntropyBonus(coef=0.01)],
        correct=("accuracy", 0.5),
    )

The adapter copies no loss. It reads per-token scalars that TRL has computed, adds its own term and
scales that as TRL scales its own. Where the hooks of a `Compose` act in one GRPO or RLOO step:

    reward     in `_calculate_rewards`, on the table gathered over all ranks; the change of the
               reward is one more column, "shaping", which TRL logs, weighs by 1 and adds up
    advantage  at the end of `_generate_and_score_completions`, on rows gathered over all ranks
    token, loss, model
               in `_compute_loss`, on one micro-batch after TRL has shuffled its sequences

DPO has the last row only. What modules observe is added up over the micro-batches of an optimizer
step, reduced over ranks once, and handed to `Compose.update`; what the first two hooks observe is
equal on all ranks already and is not reduced again. Evaluation changes neither loss nor state.

Limits: no context or sequence parallelism, no `auto_find_batch_size`, no adapter on the head, no
`nn.DataParallel`. Not tried: FSDP, ZeRO-3, vLLM. Statistics of two distributions at once (exact
KL, chi2) are not offered: TRL scores the reference once per rollout and keeps one number per token,
so the loss would need a second pass of the reference in every micro-batch, with both heads gathered
at a time. The proxy of Lp-Reg is that of the policy now, not of the sampler.
Logits are divided by the sampling temperature before every statistic; top-p, top-k and min-p are
not reflected, as in TRL's own.

n processes with b rows equal one with n b rows: means are over the tokens or sequences of all
ranks, and modules with `whole_batch` read the rows of all ranks. Micro-batches of one optimizer
step equal one large batch for the other modules in GRPO and RLOO, and in DPO if they hold equally
many tokens; see `offrl.regularizers.base` for what cannot be equal. A micro-batch holds parts of
groups, in any order: modules of the loss hook that compare rows of a group see those in it.

The loss hook, which all three trainers share and DPO has alone, is in `trl_loss`; the hooks of
GRPO and RLOO around a rollout are in `trl_rollout`. Here a trainer is checked and put together.
"""

import functools
import inspect
from dataclasses import fields

from offrl.integrations.trl_loss import Preference
from offrl.integrations.trl_rollout import Rollout

SAVING = {"_save_checkpoint": "model trial", "_load_optimizer_and_scheduler": "checkpoint"}
ROLLOUT = SAVING | {
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "inputs",
    "_generate": "prompts",
    "_compute_loss": "model inputs",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep",
}
PREFERENCE = SAVING | {"_compute_loss": "model inputs return_outputs"}
OPEN = ("_get_per_token_logps_and_entropies",)  # may take more, which the adapter passes through


@functools.cache
def with_regularizers(base: type) -> type:
    """A subclass of a TRL trainer that takes two more keyword arguments.

    Args:
        base: `GRPOTrainer`, `RLOOTrainer`, `DPOTrainer` or a subclass of one.

    Returns:
        A class with the arguments of `base` and
            regularizers  list of modules, or mapping of names to modules; without any, training is
                          bit-identical to `base`.
            correct       (name of a reward function, threshold): completions whose raw reward
                          reaches the threshold count as correct, NaN as wrong. Needed by modules
                          that read `correct`.
        A module that reads `prompt_id` or `level` takes them from integer columns of these names.
        Its constructor raises ValueError where a module needs an input that TRL does not have.

    Raises:
        ImportError: TRL is missing.
        TypeError: another kind of trainer, or a TRL whose methods are not those written for.
    """
    check(base)
    kind = Rollout if hasattr(base, "_generate_and_score_completions") else Preference
    return type(f"Regularized{base.__name__}", (kind, base), {"__doc__": kind.__doc__})


def check(base: type) -> None:
    """Compare the methods that the adapter overrides or calls with those it was written for.

    Raises:
        ImportError, TypeError: see `with_regularizers`.
    """
    try:
        import trl
        from trl.trainer.utils import FusedCausalLMOutput
    except ImportError as error:
        raise ImportError(
            "offrl.integrations.trl needs trl>=1.15: pip install 'offrl[llm]'"
        ) from error

    known = (trl.GRPOTrainer, trl.RLOOTrainer, trl.DPOTrainer)
    if not issubclass(base, known):
        raise TypeError(f"expected GRPOTrainer, RLOOTrainer, DPOTrainer or a subclass, got {base}")
    problems = []
    for name, expected in (PREFERENCE if issubclass(base, trl.DPOTrainer) else ROLLOUT).items():
        method = getattr(base, name, None)
        if method is None:
            problems.append(f"{name} is missing")
            continue
        found = " ".join(p for p in inspect.signature(method).parameters if p != "self")
        if not f"{found} ".startswith(f"{expected} ") or (found != expected and name not in OPEN):
            problems.append(f"{name} takes ({found}), not ({expected})")
    if getattr(base, "loss_is_scaled_for_ga", None) is None:
        problems.append("loss_is_scaled_for_ga is missing")
    absent = {"log_probs", "entropy"} - {f.name for f in fields(FusedCausalLMOutput)}
    problems += [f"FusedCausalLMOutput.{name} is missing" for name in sorted(absent)]
    if problems:
        raise TypeError(
            f"trl {trl.__version__} is not the TRL this adapter was written for (1.16): "
            f"in {base.__name__} {'; '.join(problems)}. Install trl==1.16.0 or a newer offrl."
        )
