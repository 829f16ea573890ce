"""What the adapters of verl and OpenRLHF share: a host that may differ, inputs that may lack."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from offrl.regularizers import Compose, RegInputs, RegOutput, Regularizer
from offrl.regularizers.base import Hook

LOSS_HOOKS: tuple[Hook, ...] = ("token", "loss")
BATCH_HOOKS: tuple[Hook, ...] = ("reward", "advantage")


def load(package: str, release: str, module: str, expected: Mapping[str, str]) -> Any:
    """Import a module of a host and compare what an adapter uses with what it was written for.

    Args:
        package: name of the distribution, for messages.
        release: the release that the adapter was written for.
        module: dotted name.
        expected: dotted name inside the module -> its parameters, separated by spaces. One more is
            a change too, since the adapter stands in for some of these functions.

    Raises:
        ImportError: the module cannot be imported.
        TypeError: something is missing or takes other parameters.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}): "
            f"pip install {package}=={release}, with its dependencies"
        ) from error
    problems = []
    for name, wanted in expected.items():
        value: Any = found
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            problems.append(f"{name} is missing")
        elif parameters(value) != wanted:
            problems.append(f"{name} takes ({parameters(value)}), expected ({wanted})")
    if problems:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        raise TypeError(
            f"{package} {version} is not the {package} {release} this adapter was written for: in "
            f"{module} {'; '.join(problems)}. Install {package}=={release} or a newer offrl."
        )
    return found


def parameters(function: Callable) -> str:
    """Names, separated by spaces, without `self`.

    >>> parameters(compose)
    'regularizers offers remedies where'
    """
    return " ".join(name for name in inspect.signature(function).parameters if name != "self")


def compose(
    regularizers: Iterable[Regularizer] | Mapping[str, Regularizer],
    offers: Mapping[Hook, frozenset[str]],
    remedies: Mapping[str, str],
    where: str,
) -> Compose:
    """The list as one module, if a place of the host can run all of it.

    Args:
        offers: hook that runs there -> inputs that it gets. At the loss nothing may keep a state,
            since the hosts do not say there when an optimizer step ends, nor save what worker
            processes hold.
        remedies: input -> how to get it, or why not, for messages.
        where: name of the place, for messages.

    Raises:
        ValueError: a module that cannot work there.
    """
    reg = Compose(regularizers)
    for hook in sorted(reg.hooks):
        for name, part in reg.at(hook).items():
            if hook not in offers:
                raise ValueError(f"{name}: {where} runs {', '.join(offers)}, not {hook!r}")
            lacking = sorted(part.requires - offers[hook])
            if lacking:
                needs = [f"{n!r} ({remedies[n]})" if n in remedies else repr(n) for n in lacking]
                raise ValueError(f"{name}: {where} does not provide {', '.join(needs)}")
            if hook in LOSS_HOOKS and next(part.buffers(), None) is not None:
                raise ValueError(
                    f"{name} keeps a state, which {where} can neither update nor save at the loss: "
                    "give it a constant coefficient, or choose a module without a state"
                )
    return reg


def batch_offers(rows: frozenset[str]) -> dict[Hook, frozenset[str]]:
    """Inputs of the two hooks of a rollout batch: advantages exist at the second only."""
    return {"reward": rows, "advantage": rows | {"advantages"}}


def extra_loss(
    reg: Compose, x: RegInputs, token: RegOutput, reduce: Callable[[Tensor, str], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Term of the loss hook, reduced by the host, and metrics of the token and the loss hook.

    Args:
        x: with `logp` and `mask`, (B, T).
        token: what the token hook returned; its weights multiply the term too.
        reduce: (values (B, T), mode of `masked_reduce`) -> 0-d, normalized over the whole step.

    A module that returns a scalar reduced it over the rows that it saw; over the micro-batches of a
    step such scalars are averaged, each with its share of the sequences.
    """
    mask, metrics = x.need("mask").bool(), dict(token.metrics)
    loss = x.need("logp").new_zeros(())
    for name, part in reg.at("loss").items():
        out = part(x)
        if out.per_element is not None:
            weight = 1.0 if token.token_weight is None else token.token_weight
            # hosts multiply by the mask, which lets NaN in padding through
            kept = torch.where(mask, out.per_element * weight, 0.0)
            loss = loss + reduce(kept, part.reduction)
        elif out.loss is not None:
            loss = loss + reduce(out.loss.expand(mask.shape), "seq-mean-token-mean")
        metrics |= {f"{name}/{key}": value.detach() for key, value in out.metrics.items()}
    return loss, metrics
