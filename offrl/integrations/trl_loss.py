"""The loss hook inside TRL's trainers, updates and checkpoints; see `offrl.integrations.trl`."""

import functools
import inspect
import math
import os
import types
import warnings
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offrl.regularizers import Compose, RegInputs
from offrl.regularizers.base import Hook, across_ranks
from offrl.regularizers.reductions import dense_groups
from offrl.regularizers.tokens.selective import proxy_logp
from offrl.regularizers.tokens.statistics import PLAIN, token_stats
from offrl.regularizers.tokens.token_sets import LogMass, MinP, Nucleus, SetEntropy, Statistic

FILE = "offrl_regularizers.pt"  # in every checkpoint folder
LOSS_HOOKS: tuple[Hook, ...] = ("token", "loss", "model")
PROXY: dict[str, Statistic] = {
    "logp": "logp",
    "log_mass": LogMass(MinP(0.02)),
    "log_top": LogMass(MinP(1.0)),
}
UNSEEN = math.ulp(0.0)  # not zero for TRL's `beta != 0`, and 0 as soon as it meets a float32 tensor
Host: Any = object  # the mixins read attributes and call methods of TRL's trainer


class Adapter(Host):
    """What GRPO, RLOO and DPO share: the loss hook, updates, checkpoints."""

    offered: frozenset[str] = frozenset()
    pairs = False  # rows i and i + B/2 of a micro-batch belong together
    beta: float

    def __init__(self, *args, regularizers=(), **kwargs):
        self.reg = Compose(regularizers)
        self._window: dict[str, Tensor] = {}  # sums since the last optimizer step
        self._shared: dict[str, Tensor] = {}  # the same of the hooks that ran on gathered rows
        self._seen: list | None = None  # outputs of the forward passes inside `_compute_loss`
        self._weighed: tuple | None = None  # arguments of `run_loss`, where the token hook has run
        super().__init__(*args, **kwargs)
        self.reg.to(self.accelerator.device)
        self._check_needs()
        if self._at_loss:
            self._watch(self.accelerator.unwrap_model(self.model))

    @property
    def _at_loss(self) -> bool:
        return bool(self.reg.hooks & set(LOSS_HOOKS))

    def _needs(self, *hooks: Hook) -> set[str]:
        return {n for h in hooks for part in self.reg.at(h).values() for n in part.requires}

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
        parts: list[Any] = [p for h in LOSS_HOOKS for p in self.reg.at(h).values()]
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
        if self.reg.hooks and self.accelerator.sync_gradients:
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
        """Keep what a hook on gathered rows observed; its metrics are logged at once."""
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
        if checkpoint is None or not self.reg.hooks:
            return
        path = os.path.join(checkpoint, FILE)
        if os.path.exists(path):
            device = self.accelerator.device
            self.reg.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        else:
            warnings.warn(f"{path} is missing: the regularizers start anew", stacklevel=2)


class Preference(Adapter):
    """DPO: the loss hook, on batches whose first half is preferred to the second.

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
