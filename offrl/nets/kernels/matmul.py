"""Matrix products of single networks on a CPU, by whichever of torch's two libraries is faster.

torch multiplies float32 matrices with MKL, which leaves half of an AMD Zen 5 core idle; oneDNN, in
the same wheel, takes 256 cubed in half the time there, and in a tenth less on Zen 4. Which it is
differs by processor and by kind of product, so `select_backend` measures once per machine and
remembers. Until it is called every product is torch's own. Results of the two differ in the last
digits.

oneDNN is reached through a private operator of torch, which is tried before it is relied on.
"""

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("forward", "input gradient", "weight gradient")
LEAST = 64  # rows and columns from which oneDNN is considered; below, torch's own is faster
GAIN = 0.85  # oneDNN must take less than this share: between other operators it loses some
VERSION = 1  # of what is remembered

log = logging.getLogger(__name__)
chosen: frozenset[str] = frozenset()  # kinds that go through oneDNN


def linear(x: Tensor, y: Tensor, bias: Tensor | None, post: str) -> Tensor:
    """post(x @ y + bias) by oneDNN; `post` is "relu" or "none"."""
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, bias, post, [], "")


def wide(x: Tensor, y: Tensor) -> bool:
    return min(*x.shape, y.shape[1]) >= LEAST and x.dtype == torch.float32


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(x @ weight + bias) for matrices (n, k), (k, m) and (1, m)."""
    if "forward" in chosen and wide(x, weight):
        return linear(x, weight, bias[0], "relu")
    return torch.addmm(bias, x, weight).relu_()


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad @ weight.T for matrices (n, m) and (k, m)."""
    if "input gradient" in chosen and wide(grad, weight.mT):
        return linear(grad, weight.mT, None, "none")
    return torch.mm(grad, weight.mT)


def weight_gradient(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """out <- x.T @ grad for matrices (n, k) and (n, m)."""
    if "weight gradient" in chosen and wide(x.mT, grad):
        out.copy_(linear(x.mT, grad, None, "none"))
    else:
        multiply(x.mT, grad, out)


def multiply(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out <- x @ y + bias for matrices (n, k), (k, m), (n, m) and (1, m), by torch's own product.

    A narrow result, such as a policy's actions or the gradient of its last weight, is computed
    transposed and copied, if its width is no multiple of eight: 256 x 256 times 256 x 6 takes 23
    instead of 80 microseconds, times 256 x 23 takes 52 instead of 82 (torch 2.13 with MKL, AMD
    Zen 4). Wider ones and few rows gain nothing.
    """
    if 1 < out.shape[-1] < 32 and out.shape[-1] % 8 and len(x) >= 64:
        flat = torch.mm(y.T, x.T) if bias is None else torch.addmm(bias.T, y.T, x.T)
        out.copy_(flat.T)
    elif bias is None:
        torch.mm(x, y, out=out)
    else:
        torch.addmm(bias, x, y, out=out)


def select_backend(folder: Path, machine: str) -> str:
    """Use the faster library for each kind of product, as measured on this machine before or now.

    One measurement serves all later runs, so that runs from one seed go through the same products;
    a run keeps its own choice in run.json, for its processes and for resuming. Returns a sentence
    about what is used.

    Args:
        folder: where choices are kept; where it cannot be written they last for this process.
        machine: name of the processor.
    """
    path = folder / "matmul.json"
    key = f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {VERSION}"
    try:
        kept = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # none, or a damaged one
        kept = {}
    if not isinstance(kept.get(key), list):
        kept[key] = measured()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_text(json.dumps(kept, indent=1))
            part.replace(path)
        except OSError as error:
            log.warning("the choice of a backend cannot be kept in %s: %s", path, error)
    use(kept[key])
    kinds = ", ".join(k for k in KINDS if k in chosen)
    if not kinds:
        return "matrix products by torch's own library, the fastest here"
    return f"matrix products by oneDNN, the fastest here: {kinds}; the rest by torch's own library"


def use(kinds: Iterable[str]) -> None:
    """Use oneDNN for these kinds: what was chosen when a run was started."""
    global chosen
    chosen = frozenset(kinds) & set(KINDS)


def onednn_works() -> bool:
    """Whether oneDNN's operator is there and multiplies; the log says why not."""
    x, y, bias = torch.randn(64, 80), torch.randn(80, 96), torch.randn(96)
    try:
        found, wanted = linear(x, y, bias, "relu"), (x @ y + bias).relu()
        good = torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
        wrong = "" if good else "gives other values"
    except (AttributeError, RuntimeError) as error:  # gone, changed, or torch built without it
        wrong = f"cannot be used: {str(error).strip().splitlines()[0]}"
    if wrong:
        log.warning("matrix products stay torch's own, for oneDNN's operator %s", wrong)
    return not wrong


def measured(size: int = 256, rounds: int = 12) -> list[str]:
    """The kinds for which oneDNN is faster, in about 50 ms; none, with a warning, without it."""
    if not onednn_works():
        return []
    sets = [torch.randn(4, size, size) for _ in range(4)]  # more than the first caches hold
    work: dict[str, Callable[[Any], Any]] = {
        "forward": lambda s: forward(s[0], s[1], s[2][:1]),
        "input gradient": lambda s: input_gradient(s[0], s[1]),
        "weight gradient": lambda s: weight_gradient(s[0], s[1], s[3]),
    }
    before, spent = chosen, defaultdict(list)
    try:
        for _, kind, other in product(range(rounds), KINDS, (False, True)):
            use({kind} if other else ())
            start = time.perf_counter()
            for s in sets:
                work[kind](s)
            spent[kind, other].append(time.perf_counter() - start)
    finally:
        use(before)
    return [kind for kind in KINDS if min(spent[kind, True]) < GAIN * min(spent[kind, False])]
