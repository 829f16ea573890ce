"""Policies as files that need nothing of this library: ONNX, and torch's exported programs.

Everything between an observation and an action of the environment is inside: standardization,
memory, networks, squashing, clipping, the environment's units. Inputs, each with a first axis for
any number of rows:

    obs       (batch, o), one observation per row, flattened
    goal      (batch, o), likewise, of a goal-conditioned policy
    target    (batch,), the return that a return-conditioned policy is asked for, in plain rewards
    start     (batch,), 1 where an episode begins, of a policy with memory
    reward    (batch,), the reward of the action before, likewise
    memory_*  what the last call put out as memory_*_out; any numbers where start is 1

Outputs: action (batch, *action), float32 or, if whole numbers, int64, (batch,) if discrete; and
memory_*_out.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as trees

from offrl.engine.ranges import Whole
from offrl.errors import ConfigError, Failed
from offrl.runs.signature import SAMPLE, Signature

FORMAT = 1  # of the inputs, the outputs and what is told beside them
OPSET = 18
SUFFIXES = (".onnx", ".pt2")
STEPS = 20  # of the episodes in which a policy with memory is compared
TOLERANCE = 1e-5  # of half the range of an action
TOLD = "offrl.json"  # within a .pt2 file
NEEDED = "pip install 'offrl[export]'"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Options:
    """Options of scripts/export.py: a policy as a file."""

    run: str  # a run directory, a seed's folder, a checkpoint or a snapshot
    out: str  # the file: .onnx, or .pt2 for torch.export
    seed: Whole | None = None  # which of the run's seeds; null: its first


class Step(nn.Module):
    """One step of a trained policy, from what its environment shows to an action in its units."""

    scale: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, algo: Any, signature: Signature):
        super().__init__()
        self.algo, self.signature = algo, signature
        self.inputs = ["obs", *["goal"] * signature.goals, *["target"] * bool(signature.targets)]
        self.networks = nn.ModuleList(v for v in vars(algo).values() if isinstance(v, nn.Module))
        low, high = np.array(signature.low), np.array(signature.high)
        units = {"scale": (high - low) / 2, "shift": (high + low) / 2, "low": low, "high": high}
        for name, value in units.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def act(self, told: dict[str, Tensor], memory: Any, **how: Any) -> tuple[Tensor, Any]:
        """The action and the memory.

        Args:
            told: obs, start, reward and what else `inputs` names.
            how: `explore` and `generator`; see `engine.method.Policy`.
        """
        act, memory = self.algo.act({"scenario": told["start"].long() * 0, **told, **how}, memory)
        if self.signature.discrete:
            return act + self.signature.start, memory
        act = act.clamp(-1, 1) * self.scale + self.shift
        act = torch.minimum(torch.maximum(act, self.low), self.high)  # whatever was rounded
        act = act.round().long() if self.signature.whole else act
        return act.unflatten(-1, self.signature.act_shape), memory

    @torch.no_grad()
    def run(
        self, told: Arrays, memory: Any = None, generator: Generator | None = None
    ) -> tuple[np.ndarray, Any]:
        """On arrays; explores with a generator."""
        how = {"explore": generator is not None, "generator": generator}
        given = {name: torch.from_numpy(told[name]) for name in (*self.inputs, "start", "reward")}
        act, memory = self.act(given, memory, **how)
        return act.numpy(), memory


# --- the graph -----------------------------------------------------------------------------------


class Graph(nn.Module):
    """A step whose memory is one named tensor per part."""

    def __init__(self, step: Step):
        super().__init__()
        self.step, self.inputs = step, list(step.inputs)
        self.names: list[str] = []
        self.blank: dict[str, Tensor] = {}
        first, second, other = (remembered(step, rows) for rows in (2, 2, 3))
        if first is None:
            return
        parts, self.tree = trees.tree_flatten(first)
        again, others = trees.tree_leaves(second), trees.tree_leaves(other)
        # parts without rows are constants, such as what stands in an empty window
        self.moves = [a.shape != b.shape for a, b in zip(parts, others, strict=True)]
        for part, same, moves in zip(parts, again, self.moves, strict=True):
            if not moves and not torch.equal(part, same):
                raise Failed("its memory is not one row per observation, so it cannot be exported")
        self.fixed = [part for part, moves in zip(parts, self.moves, strict=True) if not moves]
        paths = [path for path, _ in trees.tree_flatten_with_path(first)[0]]
        self.names = [
            "memory_" + "_".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
            for path, moves in zip(paths, self.moves, strict=True)
            if moves
        ]
        self.inputs += ["start", "reward", *self.names]
        self.blank = {
            name: torch.zeros_like(part[:1])
            for name, part in zip(self.names, self.moving(parts), strict=True)
        }

    def moving(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part for part, moves in zip(parts, self.moves, strict=True) if moves]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        zero = torch.zeros_like(given["obs"][:, 0])
        told = {"start": zero + 1, "reward": zero} | given
        if not self.names:
            return (self.step.act(told, None, explore=False)[0],)
        moving, fixed = iter([given[name] for name in self.names]), iter(self.fixed)
        parts = [next(moving) if moves else next(fixed) for moves in self.moves]
        act, memory = self.step.act(told, trees.tree_unflatten(parts, self.tree), explore=False)
        return act, *self.moving(trees.tree_leaves(memory))

    def example(self) -> dict[str, Tensor]:
        """Every input for two rows."""
        given = rows_of(self.step, 2, self.inputs)
        return given | {name: torch.cat([part, part]) for name, part in self.blank.items()}


def rows_of(step: Step, rows: int, names: Sequence[str]) -> dict[str, Tensor]:
    """The beginnings of so many episodes, but for the memory."""
    shape, wide = (rows,), (rows, step.signature.obs_dim)
    shapes = {"obs": wide, "goal": wide, "target": shape, "start": shape, "reward": shape}
    # apart, since the exporter takes one tensor given twice for one input
    return {
        name: torch.full(shapes[name], float(name == "start")) for name in names if name in shapes
    }


def remembered(step: Step, rows: int) -> Any:
    """The memory after the first step of so many episodes."""
    told = rows_of(step, rows, [*step.inputs, "start", "reward"])
    with torch.no_grad():
        return step.act(told, None, explore=False)[1]


def program(graph: Graph) -> Any:
    """The graph for any number of rows, with the parameters that it uses."""
    graph.requires_grad_(False)
    example, batch = graph.example(), torch.export.Dim("batch")
    with torch.no_grad():
        made = torch.export.export(
            graph,
            tuple(example.values()),
            dynamic_shapes={"inputs": tuple({0: batch} for _ in example)},
        )
    idle = {n.name: n for n in made.graph.nodes if n.op == "placeholder" and not n.users}
    inputs = made.graph_signature.input_specs
    for given in [x for x in inputs if x.arg.name in idle and x.target in made.state_dict]:
        made.graph.erase_node(idle[given.arg.name])
        inputs.remove(given)
        del made.state_dict[given.target]
    made.graph_module.recompile()
    return made


# --- writing -------------------------------------------------------------------------------------


def write(path: Path, step: Step, told: dict[str, Any], seen: Arrays) -> dict[str, Any]:
    """Write a policy to a file, compare the two, and write what is told beside the file.

    Args:
        path: ends in .onnx or .pt2; the same name with .json is written too.
        told: of the policy, to be kept in the file.
        seen: see `offrl.runs.signature.observations`.

    Returns:
        What is kept: `told`, names and shapes of inputs and outputs, versions, and the parity.

    Raises:
        ConfigError: for another suffix.
        Failed: without the extra `export`, if the policy cannot be exported, or if its actions
            differ from the file's; no file is left then.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"out must end in {' or '.join(SUFFIXES)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise OSError(f"cannot write {path}: there is no folder {path.parent}")
    if path.suffix == ".onnx":
        onnxruntime()
    graph = Graph(step)
    outputs = ["action", *(f"{name}_out" for name in graph.names)]
    inputs = {
        name: {"shape": ["batch", *x.shape[1:]], "type": str(x.dtype).removeprefix("torch.")}
        for name, x in graph.example().items()
    }
    kept = told | {"format": FORMAT, "inputs": inputs, "outputs": outputs}
    beside, part = path.with_suffix(".json"), path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own insides
            save = saving(part, program(graph), list(inputs), outputs)
        save(kept)
        kept["parity"] = parity(step, read(part, trusted=True)[0], seen)
        save(kept)
        part.replace(path)
        beside.write_text(json.dumps(kept, indent=1))
    finally:
        part.unlink(missing_ok=True)
    return kept


def saving(
    path: Path, made: Any, inputs: list[str], outputs: list[str]
) -> Callable[[dict[str, Any]], None]:
    """What writes a program to a file, with what is told of it."""
    for node in made.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the folders of this machine
    if path.suffix == ".pt2":
        return lambda told: torch.export.save(made, path, extra_files={TOLD: json.dumps(told)})
    logger = logging.getLogger("torch.onnx")
    level, named = logger.level, {"inputs": tuple({0: "batch"} for _ in inputs)}
    logger.setLevel(logging.ERROR)  # it warns that torchvision is not installed
    try:
        found: Any = torch.onnx.export(
            made,
            dynamic_shapes=named,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    except ImportError as error:
        raise Failed(f"writing ONNX needs the extra: {NEEDED} ({error})") from error
    finally:
        logger.setLevel(level)

    def save(told: dict[str, Any]) -> None:
        found.model.metadata_props.update({name: json.dumps(x) for name, x in told.items()})
        found.save(path, external_data=False)

    return save


# --- reading -------------------------------------------------------------------------------------


class File:
    """A written policy; as `Step` but that its memory is a dict of arrays."""

    def __init__(self, run: Callable[[Arrays], list[np.ndarray]], told: dict[str, Any]):
        self.call, self.given = run, told["inputs"]
        self.inputs = [name for name in self.given if name in ("obs", "goal", "target")]
        self.names = [name for name in self.given if name.startswith("memory_")]

    def run(
        self, told: Arrays, memory: Any = None, generator: Generator | None = None
    ) -> tuple[np.ndarray, Any]:
        """Raises ValueError if it shall explore: what is random is not in the file."""
        if generator is not None:
            raise ValueError("an exported policy is deterministic; explore with the run's own")
        if memory is None:
            memory = {name: self.blank(len(told["obs"]), **self.given[name]) for name in self.names}
        act, *after = self.call({name: (told | memory)[name] for name in self.given})
        return act, dict(zip(self.names, after, strict=True)) if self.names else None

    @staticmethod
    def blank(rows: int, shape: list[Any], type: str) -> np.ndarray:
        return np.zeros((rows, *shape[1:]), type)


def read(path: Path, trusted: bool = False) -> tuple[File, dict[str, Any]]:
    """A written policy and what is told of it.

    Args:
        trusted: needed for .pt2, whose reader, torch's own, can run code that stands in the file.
            ONNX cannot.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another kind, damaged or not trusted, or a later version of offrl
            wrote it.
        Failed: if ONNX is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".pt2" and not trusted:
        raise ValueError(
            f"reading {path} can run code that stands in it, as torch's own format allows; if you "
            "trust it: load_policy(path, trusted=True). A .onnx file cannot"
        )
    told: dict[str, Any] = {}
    run = onnx_file(path, told) if path.suffix == ".onnx" else torch_file(path, told)
    if "format" not in told:
        raise ValueError(f"{path} was not written by offrl: it does not say what it takes")
    if told["format"] > FORMAT:
        raise ValueError(
            f"{path} is of format {told['format']}, this version reads {FORMAT}: install offrl "
            f"{told['versions']['offrl']} or later, which wrote it"
        )
    return File(run, told), told


def onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise Failed(f"ONNX needs the extra: {NEEDED}") from error
    return onnxruntime


def onnx_file(path: Path, told: dict[str, Any]) -> Callable[[Arrays], list[np.ndarray]]:
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has types of its own, which derive from this one
        raise ValueError(f"{path} is not a readable ONNX file: {error}") from error
    kept = session.get_modelmeta().custom_metadata_map
    if "format" in kept:
        told |= {name: json.loads(value) for name, value in kept.items()}
    return lambda given: session.run(None, given)


def torch_file(path: Path, told: dict[str, Any]) -> Callable[[Arrays], list[np.ndarray]]:
    inside = {TOLD: ""}
    try:
        module = torch.export.load(path, extra_files=inside).module()
    except Exception as error:  # whatever stands in the archive
        raise ValueError(f"{path} is not a readable .pt2 file: {error}") from error
    told |= json.loads(inside[TOLD] or "{}")

    def run(given: Arrays) -> list[np.ndarray]:
        with torch.no_grad():
            return [x.numpy() for x in module(*map(torch.from_numpy, given.values()))]

    return run


# --- parity --------------------------------------------------------------------------------------


def parity(step: Step, file: File, seen: Arrays) -> dict[str, Any]:
    """How far a file's actions are from the library's, in half ranges.

    Observations are drawn at random in the range of the training data, and taken from these data
    where some were kept; besides, all columns at their least and largest, and zeros. A policy with
    memory meets them in episodes, of which half begin anew in the middle.

    Raises:
        Failed: if an action differs by more than `TOLERANCE`, or a discrete one that is no tie.
    """
    signature, random = step.signature, np.random.default_rng(0)
    low, high = (seen.get(name, np.float32(end)) for name, end in (("low", -3), ("high", 3)))
    wide = (SAMPLE, signature.obs_dim)
    drawn = random.uniform(low, high, wide).astype(np.float32)
    sample = seen.get("sample", np.zeros((0, wide[1]), np.float32))
    edges = np.broadcast_to(np.stack([low, high, 0 * low]).reshape(3, -1), (3, wide[1]))
    obs = np.concatenate([drawn, sample, edges.astype(np.float32)])
    far, steps = 0.0, STEPS if file.names else 1
    for part in episodes(random.permutation(obs), steps):
        memory: Any = (None, None)
        for time, rows in enumerate(part):
            count = len(rows)
            start = np.full(count, time == 0) | (np.arange(count) % 2 == 0) & (time == steps // 2)
            told = {
                "obs": rows,
                "goal": obs[random.integers(len(obs), size=count)],
                "target": random.choice(signature.targets or (0.0,), count),
                "start": start,
                "reward": random.standard_normal(count),
            }
            told = {name: value.astype(np.float32) for name, value in told.items()}
            ours, theirs = step.run(told, memory[0]), file.run(told, memory[1])
            far = max(far, distance(step, told, memory[0], ours[0], theirs[0]))
            memory = ours[1], theirs[1]
    if not far <= TOLERANCE:
        raise Failed(
            f"the exported policy's actions differ by {far:.2g} of half their range from the "
            f"library's, more than {TOLERANCE:g}; the file was deleted"
        )
    return {"largest": far, "random": len(drawn), "data": len(sample)}


def episodes(obs: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    """All observations (N, o) as (steps, rows, o) of few rows first; the last are padded."""
    sizes = [1, 2, 3, 17]
    while len(obs):
        rows = min(sizes.pop(0) if sizes else 256, -(-len(obs) // steps))
        part, obs = obs[: steps * rows], obs[steps * rows :]
        yield np.resize(part, (steps, rows, obs.shape[1]))


def distance(step: Step, told: Arrays, memory: Any, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference in half ranges; of whole numbers the share of rows that differ though
    the library's own stay when the observation is moved by a millionth."""
    flat = [np.reshape(act, (len(act), -1)) for act in (ours, theirs)]
    if not (step.signature.discrete or step.signature.whole):
        return float((np.abs(flat[0] - flat[1]) / step.scale.numpy().clip(1e-30)).max())
    other, random = (flat[0] != flat[1]).any(-1), np.random.default_rng(1)
    for _ in range(8 if other.any() else 0):
        moved = told["obs"] * (1 + 1e-6 * random.standard_normal(told["obs"].shape))
        nearby = step.run(told | {"obs": moved.astype(np.float32)}, memory)[0]
        other &= (nearby != theirs).reshape(len(other), -1).any(-1)
    return float(other.mean())


def digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
