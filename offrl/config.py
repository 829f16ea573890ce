"""Settings of a run: one typed home for every value, and where each value came from.

Weakest first: the dataclass default, every matching task pattern in file order, the preset, the
command line. An override equal to a default is still an override: origins are recorded, never
guessed from values.
"""

import difflib
import fnmatch
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml

import offrl.algos
from offrl.data import sources
from offrl.engine.method import Method
from offrl.engine.ranges import Count, Range, Share, Whole
from offrl.envs import ogbench
from offrl.errors import ConfigError
from offrl.own import absolute, module_of, title


@dataclass(frozen=True)
class Settings:
    """Everything of a run that is not the method's own."""

    # environment; see docs/environments.md. none: own data without one, and so without a score
    env: str = "halfcheetah"
    # name within the source, or a path to an HDF5, npz, csv or parquet file; navigate or play for
    # OGBench's tasks
    dataset: str = "medium"
    # auto: a file where dataset is the path of one, else generated; given: in Python
    source: Literal["auto", "generated", "d4rl", "minari", "ogbench", "files", "given"] = "auto"
    # bounds of the actions in a file, which become -1 and 1: one, or one of every column; of
    # discrete actions the first and the last
    action_low: float | tuple[float, ...] | None = None
    action_high: float | tuple[float, ...] | None = None  # see action_low
    # share of the episodes that env=none holds out: the method's losses there are its curve
    validation: Share = 0.1
    rows: Count | None = None  # transitions to generate; null: the recipe's own number
    # auto: what a Gymnasium id says, else v4 for source=d4rl and v5 for the rest
    env_version: Literal["auto", "v4", "v5"] = "auto"
    legacy_mass: bool = False  # capsule masses of the engines behind D4RL's data
    action_repeat: Count = 1  # steps of the simulator per action; all steps here count actions
    # actions after which an episode is cut off, as a timeout; null: the environment's own limit,
    # and 10,000 where it states none
    episode_limit: Count | None = None
    envs: Count = 1  # environments that an online method steps together, per seed
    # processes that step them; 0: the training's own; null: whichever a short measurement favors
    env_workers: Whole | None = None
    seed: Whole = 0  # the first seed
    seeds: Count = 1  # how many, counting up from `seed`
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where torch sees one
    threads: Count = 1  # of torch, per training process on a CPU
    # how updates are made: captured if that is faster, eager, captured, by torch.compile
    speed: Literal["auto", "eager", "graph", "compile"] = "auto"
    preset: str = "full"  # quick: minutes on two cores; full: the published protocol
    log_every: Count = 1000  # updates between rows of metrics
    eval_every: Count = 5000  # steps between points of the learning curve
    eval_episodes: Count = 10  # per point and seed
    # where points of the curve but the last are played: auto is async, in a process of its own, on
    # a GPU or with a spare core for each training process, else inline
    evaluation: Literal["auto", "async", "inline"] = "auto"
    final_episodes: Count = 100  # of the last checkpoint; their mean is the score
    snapshot_every: Count | None = None  # steps between kept copies of the networks; null: none
    runs: str = "runs"  # folder of all runs
    keep_memory: bool = True  # stop glibc from returning freed memory between updates


@dataclass(frozen=True)
class Resolved:
    """A run's settings, the method's options, and the origin of each."""

    settings: Settings
    algo: str
    options: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method as people call it: a user's own by its file's name."""
        return Path(self.algo).stem if is_own(self.algo) else self.algo

    @property
    def task(self) -> str:
        """What task patterns match, and what a run's folder is called."""
        env = title(self.settings.env)
        return env if self.method.online else f"{env}-{self.data_name}"

    @property
    def data_name(self) -> str:
        """The data set in a form fit for a folder's name, and for the patterns of task values.

        A published file counts as its data set: antmaze-giant-stitch-v0.npz is stitch.
        """
        name = self.settings.dataset
        path = Path(name)
        if path.suffix not in sources.SUFFIXES:
            return name.replace("/", "-")
        published = re.fullmatch(rf"{re.escape(self.settings.env)}[-_](.+)-v\d+", path.stem)
        return published[1] if published else path.stem

    @property
    def free(self) -> bool:
        """Whether the run has no environment."""
        return self.settings.env == "none"

    @property
    def method(self) -> Method:
        return method(self.algo)

    def config(self) -> Any:
        """The method's Config."""
        return self.method.config(**self.options)

    def seeds(self) -> list[int]:
        return list(range(self.settings.seed, self.settings.seed + self.settings.seeds))

    def changes(self, most: int = 9) -> list[str]:
        """What differs from the defaults, with its origin: a line each, the rest in one more."""
        rows = {"algo": self.algo} | {f"algo.{name}": v for name, v in self.options.items()}
        rows |= vars(self.settings)
        order = ["command line", *dict.fromkeys(self.origins.values())]
        keys = sorted(self.origins, key=lambda key: order.index(self.origins[key]))
        width = max(map(len, keys[:most]), default=0)
        lines = [f"{k:<{width}} = {spelled(rows[k])}  ({self.origins[k]})" for k in keys[:most]]
        more = [f"{key}={spelled(rows[key])}" for key in keys[most:]]
        return lines + ([f"also {', '.join(more)}"] if more else [])

    def help(self) -> str:
        """Every setting and option with its value here, its origin and its meaning."""
        parts = [(Settings, self.settings, ""), (self.method.config, self.config(), "algo.")]
        lines = []
        for cls, values, prefix in parts:
            told = meanings(cls)
            for name, hint in fields_of(cls).items():
                key, words = prefix + name, "|".join(map(str, words_of(hint)))
                ranges = [part.words for part in ranges_of(hint)]
                about = "; ".join(filter(None, [self.origins.get(key, "default"), words, *ranges]))
                lines.append(f"{key}={spelled(getattr(values, name))}  ({about})")
                lines += [f"    {told[name]}"] if told[name] else []
            lines.append("")
        return "\n".join(lines)

    def to_yaml(self) -> str:
        options = {name: plain(value) for name, value in self.options.items()}
        content = vars(self) | {"options": options, "settings": vars(self.settings)}
        return yaml.safe_dump(content, sort_keys=False)


def of_run(folder: Path) -> Resolved:
    """What is stored in a run directory; raises as `from_yaml`."""
    return from_yaml((folder / "config.yaml").read_text())


def from_yaml(text: str) -> Resolved:
    """Inverse of `Resolved.to_yaml`; ConfigError if the text is none of this version."""
    try:
        raw = yaml.safe_load(text)
        hints = fields_of(method(raw["algo"]).config)
        options = {k: convert(k, v, hints[k]) for k, v in raw["options"].items()}
        return Resolved(Settings(**raw["settings"]), raw["algo"], options, raw["origins"])
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"not a stored configuration of this version: {error}") from error


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def spelled(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(plain(value)).replace(", ", ",")


def folder() -> Path:
    """Where the stored values are: in the package, or beside it where links are not links."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def algorithms() -> list[str]:
    """Names of the methods: the modules of `offrl.algos`."""
    return sorted(m.name for m in pkgutil.iter_modules(offrl.algos.__path__))


def method(algo: str) -> Method:
    """The METHOD of a name, or of the file at a path that ends in .py; ConfigError for others."""
    if is_own(algo):
        return own_method(Path(algo).absolute())
    if algo not in algorithms():
        raise ConfigError(
            f"there is no algorithm {algo!r}{nearest(algo, algorithms())}; "
            f"known: {', '.join(algorithms())}; a file of your own is named by its path, *.py"
        )
    return importlib.import_module(f"offrl.algos.{algo}").METHOD


def anchored(key: str, value: Any) -> Any:
    """The value, as an absolute path if it names a data file, or a user's method or environment.

    A job of a sweep may start elsewhere than here, and a run may be continued elsewhere.
    """
    if key == "env":
        return absolute(str(value))
    suffixes = {"dataset": sources.SUFFIXES, "algo": (".py",)}.get(key, ())
    return str(Path(value).absolute()) if Path(str(value)).suffix in suffixes else value


def is_own(algo: str) -> bool:
    return Path(algo).suffix == ".py"


def own_method(path: Path) -> Method:
    """The METHOD of a user's file, which is run once."""
    found = getattr(module_of(path), "METHOD", None)
    if not isinstance(found, Method):
        raise ConfigError(f"{path} defines no METHOD = Method(...); see offrl/engine/method.py")
    return found


def shipped(algo: str) -> dict[str, Any]:
    """The stored values of a method: `tasks` and `presets` as `resolve` takes them.

    Those of a user's own file lie beside it, in a YAML file of the same name.
    """
    from omegaconf import OmegaConf  # a policy is loaded without it

    own = is_own(algo)
    stored = Path(algo).with_suffix(".yaml") if own else folder() / "algo" / f"{algo}.yaml"
    if own and not stored.exists():
        return {}
    # as Hydra reads them: to plain YAML 5e-4 is a word
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(stored.read_text())))


def configured(algo: str, overrides: Mapping[str, Any]) -> Resolved:
    """`resolve` with the stored values of the method."""
    stored = shipped(algo)
    return resolve(algo, overrides, stored.get("tasks"), stored.get("presets"))


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def fields_of(cls: type) -> dict[str, Any]:
    """Name -> type of a dataclass, with its range."""
    return typing.get_type_hints(cls, include_extras=True)


def meanings(cls: type) -> dict[str, str]:
    """Name -> the comment above or beside each field of a dataclass, "" where there is none."""
    found = dict.fromkeys(fields_of(cls), "")
    above: list[str] = []
    for line in map(str.strip, inspect.getsource(cls).splitlines()):
        name = line.partition(":")[0]
        if name in found:
            beside = line.partition("  # ")[2]
            found[name] = " ".join([*above, *([beside] if beside else [])])
        above = [*above, line.removeprefix("# ")] if line.startswith("# ") else []
    return found


def parts_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def words_of(hint: Any) -> list[Any]:
    """The values that a type names: those of a Literal, also within a union."""
    literals = (part for part in parts_of(hint) if typing.get_origin(part) is Literal)
    return [word for part in literals for word in typing.get_args(part)]


def ranges_of(hint: Any) -> list[Range]:
    """The range that a type carries, within a union or a tuple too."""
    if typing.get_origin(hint) is Annotated:
        return list(hint.__metadata__)
    return [found for part in typing.get_args(hint) for found in ranges_of(part)]


def convert(name: str, value: Any, hint: Any) -> Any:
    """The value in the declared type, or ConfigError: whole floats become ints, lists tuples."""
    parts, words = parts_of(hint), words_of(hint)
    if value in words or (value is None and type(None) in parts):
        return value
    kinds = [p for p in parts if p is not type(None) and typing.get_origin(p) is not Literal]
    if not kinds:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, words))}, got {value!r}")
    several = isinstance(value, (list, tuple))
    kind = next((k for k in kinds if (typing.get_origin(k) is tuple) == several), kinds[0])
    if typing.get_origin(kind) is Annotated:
        kind, limits = typing.get_args(kind)
        value = convert(name, value, kind)
        if value not in limits:
            raise ConfigError(f"{name} must be {limits.words}, got {value!r}")
        return value
    plain_kind = typing.get_origin(kind) or kind
    if plain_kind is tuple:
        value = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(f"{name} entry", entry, typing.get_args(kind)[0]) for entry in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind in (float, str) or (kind is int and float(value).is_integer()):
            return kind(value)
    elif kind is not int and isinstance(value, plain_kind):
        return value
    wanted = kind.__name__ if isinstance(kind, type) else str(kind)
    also = f"; {', '.join(words)} would do too" if words else ""
    raise ConfigError(f"{name} must be {wanted}, got {value!r}{also}")


def known(words: Iterable[str]) -> set[str]:
    """Every setting and option that words of a command line may name."""
    algos = [word.removeprefix("algo=") for word in words]
    options = [fields_of(method(algo).config) for algo in algos if algo in algorithms()]
    own = {f"algo.{name}" for found in options for name in found}
    return {*fields_of(Settings), "algo", "steps", "resume"} | own


def check_key(key: str, algo: str) -> None:
    """Raises ConfigError if `key` is neither a setting nor an option of the method."""
    if key.startswith("algo."):
        name, options = key.removeprefix("algo."), fields_of(method(algo).config)
        if name not in options:
            near = nearest(name, options)
            raise ConfigError(f"{algo} has no option {name!r}{near}; it has {', '.join(options)}")
    elif key not in (known := [*fields_of(Settings), "algo", "steps", "resume"]):
        also = fields_of(method(algo).config)
        hint = f"; did you mean 'algo.{key}'?" if key in also else nearest(key, known)
        raise ConfigError(f"there is no setting {key!r}{hint}; known: {', '.join(known)}")


def check_warmup(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for training that ends within its warm-up."""
    steps, warmup = values["algo.steps"], values.get("algo.warmup", 0)
    if steps <= warmup:
        raise ConfigError(
            f"steps={steps} ends within the random warm-up; take more, or a smaller "
            f"algo.warmup than {warmup}"
        )


def resolve(
    algo: str,
    overrides: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Resolved:
    """Put a run's values together.

    Args:
        overrides: of the command line: settings by name, options as "algo.<name>".
        tasks: pattern of "<env>-<dataset>" -> values; names of options, else of settings. With
            "<source>:" before it a pattern holds for data of that source only.
        presets: name -> values likewise.

    Raises ConfigError for an unknown key, a wrong type or an unknown preset.
    """
    config = method(algo).config
    options, presets = fields_of(config), {"full": {}, **(presets or {})}
    hints = fields_of(Settings) | {f"algo.{name}": hint for name, hint in options.items()}
    values = vars(Settings()) | {f"algo.{name}": v for name, v in vars(config()).items()}
    origins: dict[str, str] = {}

    def put(given: Mapping[str, Any], origin: str) -> None:
        for key, value in given.items():
            key = "algo.steps" if key == "steps" else key
            check_key(key, algo)
            name = "steps" if key == "algo.steps" else key
            values[key], origins[key] = convert(name, value, hints[key]), origin

    def put_stored(given: Mapping[str, Any], origin: str) -> None:
        put({f"algo.{k}" if k in options else k: v for k, v in given.items()}, origin)

    def settings() -> Settings:
        return Settings(**{name: values[name] for name in fields_of(Settings)})

    put(overrides, "command line")  # env, dataset and preset decide the rest
    if ogbench.known(values["env"]) and "dataset" not in overrides:
        put({"dataset": ogbench.default_dataset(values["env"])}, f"env {values['env']}")
    preset = values["preset"]
    if preset not in presets:
        wrong = f"there is no preset {preset!r}{nearest(preset, presets)}"
        raise ConfigError(f"{wrong}; {algo} has {', '.join(presets)}")
    task = Resolved(settings(), algo, {}).task
    source = sources.settled(values["source"], values["dataset"])
    for pattern, group in (tasks or {}).items():
        if fnmatch.fnmatchcase(f"{source}:{task}" if ":" in pattern else task, pattern):
            put_stored(group, f"task {pattern}")
    put_stored(presets[preset], f"preset {preset}")
    put(overrides, "command line")
    check_warmup(values)
    chosen = {name: values[f"algo.{name}"] for name in options}
    return Resolved(settings(), algo, chosen, origins)
