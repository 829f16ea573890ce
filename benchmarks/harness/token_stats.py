"""Memory and time of `token_stats` beside the naive form and a plain head.

    python scripts/token_stats.py tokens=4096 out=benchmarks/regularizers/token_stats.json

Every form is a forward and backward pass from hidden states to the gradients of hidden states and
weight: `plain` is cross-entropy of the logits; `naive` takes log-probability, entropy and the
entropy of the nucleus from log_softmax and a sort; `ours` takes the same three from one tiled
sweep. Each pass runs in a fresh process, and the forms take turns. Memory is the largest resident
size above that of inputs and gradients. The naive form takes 5.4 GiB per 1024 tokens of 151,936
symbols, so 4096 need a machine with 22 GiB free: where memory is short, it is measured on as many
tokens as fit, and that is said; what is swapped out meanwhile is not counted. Time is wall time,
and CPU time beside it because machines are shared.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl.cli import options, readable_errors
from offrl.regularizers.functional import Nucleus, SetEntropy, token_stats
from offrl.system import cpu_name

SCRIPT = Path(__file__).parents[2] / "scripts" / "token_stats.py"
MASS = 0.8
WANT: dict[str, Any] = {"logp": "logp", "entropy": "entropy", "nucleus": SetEntropy(Nucleus(MASS))}


@dataclass(frozen=True)
class Options:
    """Options of scripts/token_stats.py.

    tokens=1024 hidden=512 vocab=151936     sizes N, H and V; float32
    forms=[plain,ours,naive]                ratios are to plain (time) and naive (memory)
    rounds=3 naive_rounds=1                 fresh processes of each form
    naive_tokens=None                       of the naive form; None: tokens, or what memory allows
    chunk_tokens=512 chunk_vocab=8192       size of a tile
    spread=4                                standard deviation of the logits
    threads=1
    out=PATH                                write the table as JSON
    form=NAME                               one pass in this process, its numbers as JSON
    """

    tokens: int = 1024
    hidden: int = 512
    vocab: int = 151_936
    forms: tuple[str, ...] = ("plain", "ours", "naive")
    rounds: int = 3
    naive_rounds: int = 1
    naive_tokens: int | None = None
    chunk_tokens: int = 512
    chunk_vocab: int = 8192
    spread: float = 4.0
    threads: int = 1
    out: str | None = None
    form: str | None = None


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, o: Options) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, o: Options) -> Tensor:
    logp = (hidden @ weight.T).log_softmax(-1)
    p = logp.exp()
    chosen, entropy = logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(p * logp).sum(-1)
    with torch.no_grad():
        ordered, index = p.sort(-1, descending=True)
        inside = torch.zeros_like(p, dtype=torch.bool)
        inside.scatter_(1, index, ordered.cumsum(-1) - ordered < MASS)
    logq = logp.masked_fill(~inside, -torch.inf).log_softmax(-1)
    nucleus = -(logq.exp() * logq.masked_fill(~inside, 0)).sum(-1)
    return (chosen + entropy + nucleus).mean()


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, o: Options) -> Tensor:
    found = token_stats(
        hidden, weight, None, targets, WANT, chunk_tokens=o.chunk_tokens, chunk_vocab=o.chunk_vocab
    )
    return sum(found.values(), torch.zeros(())).mean()


FORMS: dict[str, Callable[..., Tensor]] = {"plain": plain, "naive": naive, "ours": ours}


def resident(kind: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since `clear_refs`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if kind in x)
    return 1024 * int(line.split()[1])


def one_pass(o: Options) -> dict[str, float]:
    """Memory, seconds and value of one forward and backward pass of one form."""
    torch.set_num_threads(o.threads)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(o.tokens, o.hidden, generator=g)
    weight = torch.randn(o.vocab, o.hidden, generator=g) * (o.spread / o.hidden**0.5)
    targets = torch.randint(o.vocab, (o.tokens,), generator=g)
    form = FORMS[o.form or "ours"]
    form(hidden[:8], weight[:4096], targets[:8] % 4096, o)  # loads libraries
    hidden.requires_grad_()
    weight.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    value = form(hidden, weight, targets, o)
    grads = torch.autograd.grad(value, (hidden, weight))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradients = sum(x.numel() * x.element_size() for x in grads)
    return {
        "gib": (resident("VmHWM") - before - gradients) / 2**30,
        "wall": wall,
        "cpu": cpu,
        "value": value.item(),
        "norm": sum(float(x.square().sum()) for x in grads) ** 0.5,
    }


def free_memory() -> int:
    """Bytes that a new process can have, swap included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [x for x in lines if x.startswith(("MemAvailable:", "SwapFree:"))]
    return sum(1024 * int(line.split()[1]) for line in found)


def naive_tokens(o: Options) -> int:
    """How many tokens the naive form is measured on.

    Raises:
        ValueError: `o.naive_tokens` need more memory than is free.
    """

    def gib(tokens: int) -> float:
        logits, weights = tokens * o.vocab, 3 * o.hidden * o.vocab  # with gradient and random draw
        return (38 * logits + 4 * weights) / 2**30  # 5.4 GiB of 1024 x 151,936 logits were measured

    free, wanted = free_memory() / 2**30, o.naive_tokens or o.tokens
    if gib(wanted) <= free:
        return wanted
    lack = f"naive at {wanted} tokens needs about {gib(wanted):.1f} GiB, {free:.1f} GiB are free"
    if o.naive_tokens:
        raise ValueError(f"{lack}: free some, or leave naive_tokens out to measure what fits")
    tokens = wanted
    while tokens > 1 and gib(tokens) > free:
        tokens //= 2
    print(f"{lack}: measured at {tokens}", flush=True)
    return tokens


def compare(o: Options) -> dict[str, Any]:
    passes: dict[str, list[dict[str, float]]] = {form: [] for form in o.forms}
    sizes = ("hidden", "vocab", "chunk_tokens", "chunk_vocab", "spread", "threads")
    shared = [f"{name}={getattr(o, name)}" for name in sizes]
    tokens = dict.fromkeys(o.forms, o.tokens)
    if "naive" in tokens:
        tokens["naive"] = naive_tokens(o)
    environment = os.environ | {"OMP_NUM_THREADS": str(o.threads)}
    for turn in range(o.rounds):
        for form in o.forms:
            if form != "naive" or turn < o.naive_rounds:
                words = [f"form={form}", f"tokens={tokens[form]}", *shared]
                command = [sys.executable, str(SCRIPT), *words]
                printed = subprocess.run(
                    command, check=True, env=environment, text=True, stdout=subprocess.PIPE
                ).stdout
                passes[form].append(json.loads(printed.splitlines()[-1]))
                print(f"{form}: {passes[form][-1]['cpu']:.1f} s of CPU time", flush=True)
    rows: dict[str, dict[str, Any]] = {
        form: {key: statistics.median(p[key] for p in found) for key in found[0]}
        | {
            "tokens": tokens[form],
            "passes": len(found),
            "cpu_range": [f([p["cpu"] for p in found]) for f in (min, max)],
        }
        for form, found in passes.items()
    }
    print("form      tokens     GiB   wall s    CPU s  CPU / plain")
    for form, row in rows.items():
        if "plain" in rows and tokens[form] == o.tokens:
            row["cpu_ratio"] = row["cpu"] / rows["plain"]["cpu"]
        ratio = f"{row['cpu_ratio']:13.2f}" if "cpu_ratio" in row else ""
        print(
            f"{form:<8}{tokens[form]:>8}{row['gib']:>8.2f}{row['wall']:>9.1f}{row['cpu']:>9.1f}"
            + ratio
        )
    found: dict[str, Any] = {
        "tokens": o.tokens,
        "hidden": o.hidden,
        "vocab": o.vocab,
        "dtype": "float32",
        "tile": [o.chunk_tokens, o.chunk_vocab],
        "hardware": cpu_name(),
        "threads": o.threads,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "forms": rows,
    }
    if "naive" in rows and "ours" in rows:
        found["memory_ratio"] = rows["ours"]["gib"] / rows["naive"]["gib"]
        print(f"memory of ours / naive: {found['memory_ratio']:.3f}")
    if o.out:
        path = Path(o.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    with readable_errors():
        chosen = options(Options, sys.argv[1:])
        if chosen.form:
            print(json.dumps(one_pass(chosen)))
        else:
            compare(chosen)
