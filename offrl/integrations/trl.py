"""Regularizers inside TRL's trainers: GRPO, RLOO and DPO.

    trainer = with_regularizers(GRPOTrainer)(
        model=..., args=GRPOConfig(...), reward_funcs=..., train_dataset=...,
        regularizers=[LengthShaper("kimi", coef=0.1), EntropyBonus(coef=0.01)],
        correct=("accuracy", 0.5),
    )

The adapter copies no loss. It reads per-token scalars that TRL has computed, adds its own term and
scales that as TRL scales its own. Where the stages of a `Compose` act in one GRPO or RLOO step:

    reward     in `_calculate_rewards`, on the table gathered over all ranks; the change of the
               reward is one more column, "shaping", which TRL logs, weighs by 1 and adds up
    advantage  at the end of `_generate_and_score_completions`, on rows gathered over all ranks
    token, loss, model
               in `_compute_loss`, on one micro-batch after TRL has shuffled its sequences

DPO has the last row only. What modules observe is added up over the micro-batches of an optimizer
step, reduced over ranks once, and handed to `Compose.update`; what the first two stages observe is
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
groups, in any order: modules of the loss stage that compare rows of a group see those in it.
"""

import copy
import functools
import inspect
import math
import os
import types
import warnings
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from offrl.regularizers import Compose, RegInputs
from offrl.regularizers.base import Stage, across_ranks
from offrl.regularizers.reductions import dense_groups
from offrl.regularizers.selective import proxy_logp
from offrl.regularizers.statistics import PLAIN, token_stats
from offrl.regularizers.token_sets import LogMass, MinP, Nucleus, SetEntropy, Statistic

FILE = "offrl_regularizers.pt"  # in every checkpoint folder
LOSS_STAGES: tuple[Stage, ...] = ("token", "loss", "model")
PROXY: dict[str, Statistic] = {
    "logp": "logp",
    "log_mass": LogMass(MinP(0.02)),
    "log_top": LogMass(MinP(1.0)),
}
UNSEEN = math.ulp(0.0)  # not zero for TRL's `beta != 0`, and 0 as soon as it meets a float32 tensor
PER_ROW = ("rewards", "lengths", "correct", "finished", "group", "prompt_id", "level")

SAVING = {"_save_checkpoint": "model trial", "_load_optimizer_and_scheduler": "checkpoint"}
ROLLOUT = SAVING | {
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "inputs",
    "_generate": "prompts",
    "_compute_loss": "model inputs",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep",
}
PREFERENCE = SAVING | {"_compute_loss": "model inputs return_outputs"}
Host: Any = object  # the mixins below read attributes and call methods of TRL's trainer
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


class Adapter(Host):
    """What GRPO, RLOO and DPO share: the loss stage, updates, checkpoints."""

    offered: frozenset[str] = frozenset()
    pairs = False  # rows i and i + B/2 of a micro-batch belong together
    beta: float

    def __init__(self, *args, regularizers=(), **kwargs):
        self.reg = Compose(regularizers)
        self._window: dict[str, Tensor] = {}  # sums since the last optimizer step
        self._shared: dict[str, Tensor] = {}  # the same of the stages that ran on gathered rows
        self._seen: list | None = None  # outputs of the forward passes inside `_compute_loss`
        self._weighed: tuple | None = None  # arguments of `run_loss`, where the token stage has run
        super().__init__(*args, **kwargs)
        self.reg.to(self.accelerator.device)
        self._check_needs()
        if self._at_loss:
            self._watch(self.accelerator.unwrap_model(self.model))

    @property
    def _at_loss(self) -> bool:
        return bool(self.reg.stages & set(LOSS_STAGES))

    def _needs(self, *stages: Stage) -> set[str]:
        return {n for s in stages for part in self.reg.at(s).values() for n in part.requires}

    def _check_needs(self) -> None:
        for name in sorted(self.reg.requires):
            if name.startswith("stats.") or name in self.offered:
                continue
            raise ValueError(f"a regularizer needs {name!r}: {self._remedy(name)}")

    def _remedy(self, name: str) -> str:
        return f"TRL has no such input, and {type(self).__name__} does not provide it"

    # -- forward passes ---------------------------------------------------------------------------

    def _watch(self, model: Any) -> None:
        """Keep what TRL's fused head returns, with our own statistics of the distribution.

        TRL replaces `forward` of the model inside a PEFT wrapper; replacing that once more sees the
        weights where data-parallel wrappers have gathered them, and every pass, hooks or not.
        """
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        forward, want = model.forward, self._statistics()
        # the temperature, scale and cap that TRL's head was made with
        head = inspect.getclosurevars(forward.__func__).nonlocals if want else {}

        @functools.wraps(type(model).forward)
        def watched(module, *args, **kwargs):
            if self._seen is None or not kwargs.get("fused_lm_head"):
                return forward(*args, **kwargs)
            if not (want and torch.is_grad_enabled()):
                out, stats = forward(*args, **kwargs), {}
            else:
                hidden: list[Tensor] = []
                hook = module.base_model.register_forward_hook(
                    lambda backbone, inputs, out: hidden.append(out.last_hidden_state[:, :-1])
                )
                try:
                    out = forward(*args, **kwargs)
                finally:
                    hook.remove()
                stats = measure(module, hidden[0], kwargs["labels"][:, 1:], want, head)
            self._seen.append((out, stats))
            return out

        model.forward = types.MethodType(watched, model)

    def _statistics(self) -> dict[str, Statistic]:
        """Statistics of one distribution that the modules read, by name."""
        want: dict[str, Statistic] = {}
        parts: list[Any] = [p for s in LOSS_STAGES for p in self.reg.at(s).values()]
        for part in parts:
            for name in (n.removeprefix("stats.") for n in part.requires if n[:6] == "stats."):
                new: dict[str, Statistic] = {name: name}
                if name == "nucleus_entropy":
                    new = {name: SetEntropy(Nucleus(part.mass, part.include_crossing))}
                elif name == "proxy_logp":
                    new = PROXY
                elif name not in PLAIN:
                    raise ValueError(
                        f"a regularizer needs the statistic {name!r}: one pass gives "
                        f"nucleus_entropy, proxy_logp, {', '.join(PLAIN)}"
                    )
                if any(want.get(key, value) != value for key, value in new.items()):
                    raise ValueError(f"two regularizers ask for different {name!r}")
                want |= new
        return want

    @contextmanager
    def _watching(self):
        """Collect outputs, with TRL's own KL off where its reference is only there for us."""
        beta, self._seen = self.beta, []
        self.beta = 0.0 if beta == UNSEEN else beta
        try:
            yield self._seen
        finally:
            self.beta, self._seen = beta, None

    # -- loss -------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs, *rest, **named):
        self._inputs = inputs = dict(inputs)
        self._weighed = None
        with self._watching() as seen:
            result = super()._compute_loss(model, inputs, *rest, **named)
        if not self.model.training:
            return result
        if self._at_loss:
            extra, metrics, sync = self.reg.run_loss(
                *self._weighed or self._reg_inputs(inputs, seen)
            )
            self._observe(metrics, sync)
            if self.loss_is_scaled_for_ga:
                extra = extra / self.current_gradient_accumulation_steps
            result = (
                (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra
            )
        if self.reg.stages and self.accelerator.sync_gradients:
            self._update()
        return result

    def _gather_tokens(self, value: Any) -> Any:
        """(B, T) of every rank, padded to one T and stacked; or a dictionary of such and (B,)."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(value, dim=1))

    def _across_ranks(self, x: RegInputs) -> RegInputs:
        if self.accelerator.num_processes > 1 and self.reg.across:
            rank = self.accelerator.process_index
            x = across_ranks(x, self.reg.across, self._gather_tokens, rank, self.pairs)
        if "group" in self.reg.requires:
            for part in (x,) if x.ranks is None else (x, x.ranks.inputs):
                part.group = None if part.group is None else dense_groups(part.group)
        return x

    def _per_rank(self, number: Tensor) -> Tensor:
        """The mean over ranks: what a sum is divided by, so that the ranks' mean is the mean."""
        return self.accelerator.gather(number).float().mean()

    def _observe(self, metrics: dict[str, Tensor], sync: dict[str, Tensor]) -> None:
        """Add one micro-batch to the window."""
        new = {f"sync:{k}": v.detach().double() for k, v in sync.items()}
        new |= {f"metric:{k}": v.detach().double() for k, v in metrics.items()}
        new["batches"] = torch.ones((), dtype=torch.float64, device=self.accelerator.device)
        self._window = {k: self._window[k] + v for k, v in new.items()} if self._window else new

    def _update(self) -> None:
        """One all-reduce per optimizer step, then every module learns from the sums."""
        sync = {}
        if self._window:
            total = self.reg.unflatten(
                self.accelerator.reduce(self.reg.flatten(self._window), reduction="sum")
            )
            batches = total.pop("batches")
            for name, value in total.items():
                kind, _, key = name.partition(":")
                if kind == "sync":
                    sync[key] = value
                else:
                    self._metrics["train"][f"reg/{key}"].append((value / batches).item())
        self.reg.update(sync | self._shared)
        self._window = {}
        self._shared = {k: torch.zeros_like(v) for k, v in self._shared.items()}

    def _share(self, out) -> None:
        """Keep what a stage on gathered rows observed; its metrics are logged at once."""
        for name, value in out.metrics.items():
            self._metrics["train"][f"reg/{name}"].append(value.item())
        self._shared |= {k: self._shared.get(k, 0) + v for k, v in out.sync.items()}

    # -- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"checkpoint-{self.state.global_step}"
            folder = os.path.join(self._get_output_dir(trial=trial), folder)
            torch.save(self.reg.state_dict(), os.path.join(folder, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.reg.stages:
            return
        path = os.path.join(checkpoint, FILE)
        if os.path.exists(path):
            device = self.accelerator.device
            self.reg.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        else:
            warnings.warn(f"{path} is missing: the regularizers start anew", stacklevel=2)


class Preference(Adapter):
    """DPO: the loss stage, on batches whose first half is preferred to the second.

    Reference log-probabilities come from TRL's own reference pass. Modules that reduce over tokens
    take the mean of their micro-batch on all ranks; TRL's losses here take that of one rank.
    """

    pairs = True

    offered = frozenset({"logp", "entropy", "ref_logp", "mask", "chosen", "lengths", "step"})

    def _check_needs(self):
        super()._check_needs()
        if "ref_logp" in self.reg.requires:
            if self.precompute_ref_logps:
                raise ValueError(
                    "a regularizer needs 'ref_logp' of every token, and precomputed reference "
                    "log-probabilities are sums: set precompute_ref_log_probs=False"
                )
            if self.ref_model is not None:
                self._watch(self.accelerator.unwrap_model(self.ref_model))

    def _reg_inputs(self, inputs, seen):
        mask = inputs["completion_mask"][:, 1:]
        rows, t = mask.shape
        out, stats = seen[0]  # the policy's pass comes first, with PEFT through the same module
        x = RegInputs(
            mask=mask,
            logp=out.log_probs[:, -t:],
            entropy=out.entropy[:, -t:],
            stats={name: value[:, -t:] for name, value in stats.items()},
            ref_logp=seen[1][0].log_probs[:, -t:].detach() if len(seen) > 1 else None,
            lengths=mask.sum(1),
            chosen=torch.arange(rows, device=mask.device) < rows // 2,
            step=torch.tensor(self.state.global_step, device=mask.device),
        )
        tokens, sequences = mask.sum(), mask.any(1).sum()
        return self._across_ranks(x), self._per_rank(tokens), self._per_rank(sequences)


class Rollout(Adapter):
    """GRPO and RLOO: every stage.

    Rewards are shaped after TRL's weights have summed them. A row that no reward function scored is
    a group of its own, stays unscored, and has advantage 0. Means are over all tokens or sequences
    of the generation batch; the former is TRL's `dapo` normalizer.
    """

    offered = frozenset(
        {"logp", "old_logp", "ref_logp", "entropy", "mask", "turn", "advantages", "step", *PER_ROW,
         "extra.noise"}
    )  # fmt: skip
    reward_funcs: list
    reward_func_names: list[str]
    reward_processing_classes: list
    reward_weights: Tensor

    def __init__(self, *args, regularizers=(), correct=None, **kwargs):
        self._correct = correct
        self._calls: list = []  # passes made while scoring: arguments, log-probabilities, entropies
        self._scoring = False
        self._policy_mask: list | None = None
        regularizers = Compose(regularizers)
        bound = inspect.signature(super(Adapter, self).__init__).bind(*args, **kwargs)
        if "ref_logp" in regularizers.requires:
            config = bound.arguments.get("args")
            if config is None:
                raise ValueError("a regularizer needs 'ref_logp': pass args=, TRL's configuration")
            if config.beta == 0.0:
                config = bound.arguments["args"] = copy.copy(config)
                config.beta = UNSEEN  # TRL makes the reference and its pass, and no KL of its own
        super().__init__(*bound.args, regularizers=dict(regularizers.parts), **bound.kwargs)
        if self.beta == UNSEEN:
            self.args.beta = 0.0
        self._warn_of_doubles()
        if "reward" in self.reg.stages:
            self._add_column()

    def _remedy(self, name):
        if name == "logits" or name in ("dist", "ref_dist"):
            return "TRL never makes logits; use a module that reads log-probabilities or stats"
        return super()._remedy(name)

    def _check_needs(self):
        super()._check_needs()
        needs = self.reg.requires
        if "correct" in needs and self._correct is None:
            raise ValueError("a regularizer needs 'correct': pass correct=(reward name, threshold)")
        if self._correct is not None and self._correct[0] not in self.reward_func_names:
            raise ValueError(
                f"correct names the reward {self._correct[0]!r}; there are {self.reward_func_names}"
            )
        if "reward" in self.reg.stages and (
            getattr(self, "multi_objective_aggregation", "") == "normalize_then_sum"
        ):
            raise ValueError(
                "normalize_then_sum would rescale the shaping of rewards: set "
                "multi_objective_aggregation='sum_then_normalize'"
            )
        unmade = self._needs("reward") & {"logp", "entropy", "mask", "turn"}
        if "ref_logp" not in needs:
            unmade |= self._needs("reward") & {"old_logp"}
        unmade |= {n for n in self._needs("reward", "advantage") if n.startswith("stats.")}
        unmade |= self._needs("advantage") & {"logp"}
        unmade |= self._needs("reward", "advantage", "loss", "model") & {"extra.noise"}
        if "token" in self.reg.stages and not self.loss_is_scaled_for_ga:
            raise ValueError("RLOO weighs completions, not tokens: use GRPO for the token stage")
        if unmade:
            raise ValueError(f"{sorted(unmade)} are not there at the stage that needs them")
        self._check_columns(getattr(self.train_dataset, "column_names", None))

    def _check_columns(self, columns) -> None:
        for name in sorted({"prompt_id", "level"} & self.reg.requires):
            if columns is not None and name not in columns:
                raise ValueError(
                    f"a regularizer needs {name!r}: add an integer column of that name"
                )

    def _warn_of_doubles(self) -> None:
        needs = self._needs("loss")
        own = getattr(self, "entropy_coef", 0.0) != 0.0 or getattr(self, "use_adaptive_entropy", 0)
        if own and "entropy" in needs:
            warnings.warn("entropy counts twice: entropy_coef and a regularizer", stacklevel=3)
        if self.beta not in (0.0, UNSEEN) and "ref_logp" in needs | self._needs("reward"):
            warnings.warn("the reference counts twice: beta and a regularizer", stacklevel=3)

    # -- rewards and advantages -------------------------------------------------------------------

    def _add_column(self) -> None:
        """A reward function that never applies; its column will hold the change of the reward."""
        never = lambda completions, **kwargs: [None] * len(completions)  # noqa: E731
        # new lists, because the caller may own the old ones
        self.reward_funcs = [*self.reward_funcs, never]
        self.reward_func_names = [*self.reward_func_names, "shaping"]
        self.reward_processing_classes = [*self.reward_processing_classes, None]
        self.reward_weights = torch.cat([self.reward_weights, self.reward_weights.new_ones(1)])

    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate(self, prompts):
        out = super()._generate(prompts)
        self._policy_mask = out[2] if len(out) > 3 else None  # GRPO's mask of tool tokens
        return out

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        table = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not (self.reg.stages and self.model.training):
            return table
        x = self._rows = self._describe(table, inputs, completion_ids_list)
        if "reward" in self.reg.stages:
            if "ref_logp" in self._needs("reward"):
                x = self._with_log_probabilities(x)
            out: Any = self.reg.run("reward", x)
            self._share(out)
            unscored = table.isnan().all(dim=1)
            table[:, -1] = (out.rewards - x.need("rewards")).masked_fill(unscored, torch.nan)
            self._rows = replace(self._rows, rewards=out.rewards)
        return table

    def _describe(self, table: Tensor, inputs: list[dict], ids: list[list[int]]) -> RegInputs:
        """One row per completion of all ranks, in TRL's order: groups are consecutive."""
        device, needs = table.device, self.reg.requires
        gather = lambda values: self.accelerator.gather(torch.tensor(values, device=device))  # noqa: E731
        lengths = (
            [sum(m) for m in self._policy_mask] if self._policy_mask else [len(i) for i in ids]
        )
        rows = torch.arange(len(table), device=device)
        group = rows // self._group_size()
        unscored = table.isnan().all(dim=1)
        x = RegInputs(
            rewards=(table * self.reward_weights.to(device)).nansum(dim=1),
            lengths=gather(lengths),
            group=dense_groups(torch.where(unscored, len(table) + rows, group)),
            step=torch.tensor(self.state.global_step, device=device),
        )
        if self._correct is not None:
            name, threshold = self._correct
            x.correct = table[:, self.reward_func_names.index(name)] >= threshold
        if "finished" in needs:
            stops = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            x.finished = gather([i[-1] in stops for i in ids])
        self._check_columns(inputs[0])
        for name in {"prompt_id", "level"} & needs:
            setattr(x, name, gather([int(row[name]) for row in inputs]))
        return x

    def _generate_and_score_completions(self, inputs):
        if not (self.reg.stages and self.model.training):
            return super()._generate_and_score_completions(inputs)
        self._calls, self._scoring = [], True
        try:
            out = super()._generate_and_score_completions(inputs)
            self._keep_log_probabilities(out)
        finally:
            self._scoring = False
        first = self.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        if "advantage" in self.reg.stages:
            self._shape_advantages(out, own)
        for name in PER_ROW:
            value = getattr(self._rows, name)
            if value is not None:
                out[f"reg_{name}"] = value[own]
        mask = policy_mask(out)
        if "num_items_in_batch" not in out:  # RLOO
            out["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        out["reg_sequences"] = self.accelerator.gather(mask.any(1).sum()).sum()
        return out

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if not self._scoring:
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if self._seen and "token" in self.reg.stages and self.model.training:
                self._weigh_tokens()
            return found
        if "entropy" in self._needs("advantage"):
            kwargs["compute_entropy"] = True
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._calls.append((args, kwargs, found[:2]))
        return found

    def _weigh_tokens(self) -> None:
        """Weights of the token stage reach TRL's surrogate too, which is linear in the advantage.

        Called between the forward pass and the loss, which reads the advantages after it.
        """
        self._inputs["reg_noise"] = torch.rand(
            policy_mask(self._inputs).shape, device=self.accelerator.device
        )
        x, *counts = self._reg_inputs(self._inputs, self._seen)
        token: Any = self.reg.run("token", x)
        self._weighed = (x, *counts, token)
        advantages = self._inputs["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        self._inputs["advantages"] = advantages * token.token_weight

    def _passes(self) -> tuple[Any, Any]:
        """What the policy's and the reference's pass returned: the reference's is the last."""
        made = [found for _, _, found in self._calls]
        reference = made.pop() if self.beta != 0.0 else None
        return (made.pop() if made else None), reference

    def _with_log_probabilities(self, x: RegInputs) -> RegInputs:
        """Per-token inputs of the reward stage, on rows gathered over all ranks."""
        old, reference = self._passes()
        args, kwargs, _ = self._calls[-1]
        if old is None:  # on-policy data of GRPO: repeat the reference's pass with the policy
            method = super()._get_per_token_logps_and_entropies
            with torch.no_grad():
                old = method(self.model, *args[1:], **kwargs)
        _, _, attention, t = args[:4]
        mask = attention[:, -t:].clone()
        if self._policy_mask:
            for row, tokens in zip(mask, self._policy_mask, strict=True):
                row[: len(tokens)] *= torch.tensor(tokens, device=row.device)
        return replace(
            x,
            mask=self._gather_tokens(mask),
            old_logp=self._gather_tokens(old[0]),
            ref_logp=self._gather_tokens(reference[0]),
        )

    def _keep_log_probabilities(self, out: dict) -> None:
        """Carry what the passes returned to the loss."""
        old, reference = self._passes()
        if old is None and self._needs("advantage") & {"old_logp", "entropy"}:
            old = self._score(out)
        if reference is not None:
            out["reg_ref_logp"] = reference[0]
        if old is not None:
            out["reg_old_logp"] = old[0]
            if old[1] is not None:
                out["reg_entropy"] = old[1]

    def _score(self, out: dict) -> tuple[Tensor, Tensor]:
        """A pass of our own before the loss, where TRL's data is on-policy and it makes none."""
        method = super()._get_per_token_logps_and_entropies
        taken = set(inspect.signature(method).parameters) & out.keys()
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
        with torch.no_grad():
            return method(
                self.model,
                ids,
                attention,
                out["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
                **{name: out[name] for name in taken},
            )[:2]

    def _shape_advantages(self, out: dict, own: slice) -> None:
        """Statistics are over all tokens of all ranks; each rank keeps its rows."""
        t = out["completion_ids"].size(1)
        local = {"mask": policy_mask(out)} | {
            name: out.get(f"reg_{name}") for name in ("entropy", "old_logp", "ref_logp")
        }
        x = replace(self._rows, advantages=self.accelerator.gather(out["advantages"]))
        for name, value in local.items():
            if value is not None:
                setattr(x, name, self._gather_tokens(value))
        x.turn = turns(x.need("mask")) if "turn" in self._needs("advantage") else None
        shaped: Any = self.reg.run("advantage", x)
        self._share(shaped)
        advantages = shaped.advantages[own]
        if advantages.dim() == 2 and not self.loss_is_scaled_for_ga:
            raise ValueError("RLOO takes one advantage per completion, not one per token")
        out["advantages"] = advantages[:, :t] if advantages.dim() == 2 else advantages

    # -- loss -------------------------------------------------------------------------------------

    def _reg_inputs(self, inputs, seen):
        mask = policy_mask(inputs)
        t = mask.size(1)
        ((out, stats),) = seen
        logp = out.log_probs[:, -t:]
        rows = {name: inputs.get(f"reg_{name}") for name in PER_ROW}
        x = RegInputs(
            mask=mask,
            logp=logp,
            old_logp=inputs.get("reg_old_logp", logp.detach()),
            ref_logp=inputs.get("reg_ref_logp"),
            entropy=out.entropy[:, -t:],
            stats={name: value[:, -t:] for name, value in stats.items()},
            advantages=inputs["advantages"],
            turn=turns(mask) if "turn" in self.reg.requires else None,
            step=torch.tensor(self.state.global_step, device=mask.device),
            extra={"noise": inputs["reg_noise"]} if "reg_noise" in inputs else {},
            **rows,
        )
        shards = self.accelerator.num_processes * self.args.steps_per_generation
        tokens, sequences = inputs["num_items_in_batch"], inputs["reg_sequences"]
        return self._across_ranks(x), tokens / shards, sequences / shards


def measure(model, hidden: Tensor, labels: Tensor, want: dict, head: Any) -> dict[str, Tensor]:
    """`token_stats` at the labels that count, (B, T); 0 elsewhere."""
    mask = labels != -100
    layer = model.get_output_embeddings()
    weight, bias = (
        p.full_tensor() if hasattr(p, "full_tensor") else p for p in (layer.weight, layer.bias)
    )
    found = token_stats(
        hidden[mask],
        weight,
        bias,
        labels[mask],
        want,
        temperature=head["temperature"],
        logit_scale=head["logit_scale"],
        softcap=head["final_logit_softcapping"],
    )
    if "log_top" in want:
        found["proxy_logp"] = proxy_logp(found["logp"], found["log_mass"], found["log_top"])
    return {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in found.items()}


def policy_mask(inputs: dict) -> Tensor:
    """(B, T), 1 where the policy produced the token."""
    tools = inputs.get("tool_mask")
    return inputs["completion_mask"] if tools is None else inputs["completion_mask"] * tools


def turns(mask: Tensor) -> Tensor:
    """Index of the run of policy tokens that a token belongs to; -1 outside of runs.

    >>> turns(torch.tensor([[1, 1, 0, 1, 0]]))
    tensor([[ 0,  0, -1,  1, -1]])
    """
    mask = mask.long()
    starts = mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])).clamp(min=0)
    return torch.where(mask.bool(), starts.cumsum(1) - 1, -1)
