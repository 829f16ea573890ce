"""The hooks of TRL's GRPO and RLOO around a rollout; see `offrl.integrations.trl`."""

import copy
import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offrl.integrations.trl_loss import UNSEEN, Adapter
from offrl.regularizers import Compose, RegInputs
from offrl.regularizers.reductions import dense_groups

PER_ROW = ("rewards", "lengths", "correct", "finished", "group", "prompt_id", "level")


class Rollout(Adapter):
    """GRPO and RLOO: every hook.

    Rewards are shaped after TRL's weights have summed them. A row that no reward function scored is
    a group of its own, stays unscored, and has advantage 0. Means are over all tokens or sequences
    of the generation batch; the former is TRL's `dapo` normalizer.
    """

    offered = frozenset(
        {
            "logp",
            "old_logp",
            "ref_logp",
            "entropy",
            "mask",
            "turn",
            "advantages",
            "step",
            *PER_ROW,
            "extra.noise",
        }
    )
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
        if "reward" in self.reg.hooks:
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
        if "reward" in self.reg.hooks and (
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
        if "token" in self.reg.hooks and not self.loss_is_scaled_for_ga:
            raise ValueError("RLOO weighs completions, not tokens: use GRPO for the token hook")
        if unmade:
            raise ValueError(f"{sorted(unmade)} are not there at the hook that needs them")
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
        if not (self.reg.hooks and self.model.training):
            return table
        x = self._rows = self._describe(table, inputs, completion_ids_list)
        if "reward" in self.reg.hooks:
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
        if not (self.reg.hooks and self.model.training):
            return super()._generate_and_score_completions(inputs)
        self._calls, self._scoring = [], True
        try:
            out = super()._generate_and_score_completions(inputs)
            self._keep_log_probabilities(out)
        finally:
            self._scoring = False
        first = self.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        if "advantage" in self.reg.hooks:
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
            if self._seen and "token" in self.reg.hooks and self.model.training:
                self._weigh_tokens()
            return found
        if "entropy" in self._needs("advantage"):
            kwargs["compute_entropy"] = True
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._calls.append((args, kwargs, found[:2]))
        return found

    def _weigh_tokens(self) -> None:
        """Weights of the token hook reach TRL's surrogate too, which is linear in the advantage.

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
        """Per-token inputs of the reward hook, on rows gathered over all ranks."""
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
