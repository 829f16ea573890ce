"""Time and memory of the selective scan in each of its forms, forward and backward.

    python scripts/scan.py --threads 1 2 --out benchmarks/scan/cpu.json

The forms take turns in rounds, for machines are shared; what counts is the ratio of medians within
one run. Memory is what a fresh process per form adds at its peak to the inputs and the libraries,
with freed blocks given back at once, so that it counts live tensors and not the allocator's habits
(read from /proc: Linux).
`textbook` is the recurrence under autograd with the decays and inputs of all steps formed at
once; `mambapy` is the parallel scan of that package, measured where it is installed
(`pip install mambapy`).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from offrl.nets.kernels import fused_scan, scan
from offrl.system import cores, cpu_name

SCRIPT = Path(__file__).parents[2] / "scripts" / "scan.py"


def whole(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs of all steps: (batch, L, E, N) each."""
    return torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2)


def textbook(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    h, states = u.new_zeros(len(u), *A.shape), []
    for decay, added in zip(*(x.unbind(1) for x in whole(u, delta, A, B)), strict=True):
        h = decay * h + added
        states.append(h)
    return (torch.stack(states, 1) @ C.unsqueeze(-1)).squeeze(-1) + D * u


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    return (pscan(*whole(u, delta, A, B)) @ C.unsqueeze(-1)).squeeze(-1) + D * u


FORMS: dict[str, scan.Form] = {
    form.__name__: form
    for form in (
        textbook,
        mambapy,
        scan.loop,
        scan.recompute,
        scan.chunked,
        scan.chunked_again,
        fused_scan.fused,
    )
}


def draw(options: argparse.Namespace) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs that want gradients, and the gradient at the output."""
    g = torch.Generator().manual_seed(0)
    size = options.batch, options.length, options.channels
    u, dy, delta = (torch.randn(*size, generator=g) for _ in range(3))
    B, C = (torch.randn(*size[:2], options.states, generator=g) for _ in range(2))
    A = -torch.arange(1.0, options.states + 1).repeat(options.channels, 1)
    delta = torch.nn.functional.softplus(delta - 3)
    inputs = u, delta, A, B, C, torch.ones(options.channels)
    return tuple(x.requires_grad_() for x in inputs), dy


def work(form: scan.Form, inputs: tuple[Tensor, ...], dy: Tensor) -> dict[str, Callable]:
    def forward():
        with torch.no_grad():
            form(*inputs)

    def both():
        torch.autograd.grad(form(*inputs), inputs, dy)

    return {"forward": forward, "both": both}


def peak(options: argparse.Namespace) -> float:
    """MB that one forward and backward pass adds, in this process, which must be fresh."""
    inputs, dy = draw(options)
    small = tuple(x[:1, :4].contiguous() if x.dim() == 3 else x for x in inputs)
    work(FORMS[options.memory_of], small, dy[:1, :4])["both"]()  # loads and compiles
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize() / 1e6
    work(FORMS[options.memory_of], inputs, dy)["both"]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before


def child(name: str, argv: list[str]) -> float:
    command = [sys.executable, str(SCRIPT), *argv, "--memory-of", name]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # of glibc
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return float(done.stdout)


def times(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each form in each round, forms in turn."""
    inputs, dy = draw(options)
    jobs = {name: work(FORMS[name], inputs, dy) for name in names}
    found: dict = {name: {part: [] for part in job} for name, job in jobs.items()}
    for turn in range(options.rounds + 1):
        for name, job in jobs.items():
            for part, function in job.items():
                start = time.perf_counter()
                function()
                if turn:  # the first round warms up
                    found[name][part].append(1e3 * (time.perf_counter() - start))
    return found


def errors(names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Largest deviation of a gradient from that of `loop`, relative to its largest entry."""
    inputs, dy = draw(options)
    wanted = torch.autograd.grad(scan.loop(*inputs), inputs, dy)

    def error(name: str) -> float:
        found = torch.autograd.grad(FORMS[name](*inputs), inputs, dy)
        pairs = zip(found, wanted, strict=True)
        return max(float((ours - ref).abs().max() / ref.abs().max()) for ours, ref in pairs)

    return {name: error(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=60)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)  # the child
    options = parser.parse_args()
    if options.memory_of:
        torch.set_num_threads(1)
        print(peak(options))
        return

    names = list(FORMS)
    if importlib.util.find_spec("mambapy") is None:
        names.remove("mambapy")
        print("mambapy is not installed (pip install mambapy): left out")
    if fused_scan.library(options.states, torch.float32) is None:
        names.remove("fused")
    memory = {name: child(name, sys.argv[1:]) for name in names}
    error = errors(names, options)
    chosen = scan.fastest(torch.device("cpu"), torch.float32, options.states).__name__
    result = {
        "shape": {key: getattr(options, key) for key in ("batch", "length", "channels", "states")},
        "hardware": cpu_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": "python scripts/scan.py " + " ".join(sys.argv[1:]),
        "mambapy": importlib.metadata.version("mambapy") if "mambapy" in names else None,
        "load": round(os.getloadavg()[0], 1),  # above the number of cores: threads wait in turn
        "chosen": chosen,
        "rounds": options.rounds,
        "forms": [],
    }
    base = "mambapy" if "mambapy" in names else "textbook"
    print(f"{cpu_name()}, torch {torch.__version__}; chosen on this machine: {chosen}")
    print(f"load of the machine {result['load']} on {cores()} cores")
    print("threads form           forward ms  both ms       (range)  ratio  peak MB    error")
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = times(names, options)
        for name in names:
            forward, both = (statistics.median(found[name][part]) for part in ("forward", "both"))
            low, high = min(found[name]["both"]), max(found[name]["both"])
            ratio = both / statistics.median(found[base]["both"])
            print(
                f"{threads:7} {name:13}{forward:12.1f}{both:9.1f}{low:8.0f} -{high:5.0f}"
                f"{ratio:7.2f}{memory[name]:9.0f}{error[name]:9.0e}"
            )
            result["forms"].append(
                {
                    "form": name,
                    "threads": threads,
                    "forward_ms": round(forward, 1),
                    "both_ms": round(both, 1),
                    "range_ms": [round(low, 1), round(high, 1)],
                    f"ratio_to_{base}": round(ratio, 3),
                    "peak_mb": round(memory[name], 1),
                    "gradient_error": float(f"{error[name]:.1e}"),
                }
            )
    print(f"ratio: to {base}, forward and backward; error: of gradients against loop, relative")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
