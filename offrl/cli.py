"""The command line: `offrl train ...` and the scripts. Grammar and launchers are Hydra's."""

import inspect
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import offrl
from offrl import config as configuration
from offrl.config import Resolved
from offrl.errors import ConfigError, Diverged, Failed, Interrupted

# flags of Hydra that are followed by a value
HYDRA_FLAGS = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd"}
HELP = {"-h", "--help"}
FIRST = "offrl train algo=prdc env=halfcheetah preset=quick"
USUAL = "prdc"  # the method where none is named
Words = Sequence[str] | None  # of a command; None: those that the program was started with
Overrides = list[tuple[str, list[Any], str]]  # key, values (several in a sweep), word for Hydra


def main() -> None:
    """The console command: offrl train|evaluate|collect|report|describe|export key=value ..."""
    commands = {f.__name__: f for f in (train, evaluate, collect, report, describe, export)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in commands:
        commands[name](sys.argv[2:])
    elif name in HELP:
        told = [
            f"  {key:<9} {str(inspect.getdoc(f)).splitlines()[0]}" for key, f in commands.items()
        ]
        print("usage: offrl COMMAND key=value ...\n")
        print(*told, sep="\n")
        print(f"\noffrl COMMAND --help lists its options; a first run: {FIRST}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    elif name == "--version":
        print(f"offrl {offrl.__version__}")
    else:
        near = configuration.nearest(name, commands)
        refuse(f"error: there is no command {name!r}{near}; known: {', '.join(commands)}")


def refuse(told: str) -> NoReturn:
    print(told, file=sys.stderr)
    sys.exit(2)


def train(argv: Words = None) -> None:
    """Train one method: `algo=prdc env=halfcheetah dataset=medium seeds=4`.

    `--help` with the same words lists every setting with its value, origin and meaning.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with readable_errors():
        if not argv:
            refuse(f"name a method and an environment; a first run: {FIRST}\n--help tells more")
        flags, words = divided(worded(argv, configuration.known(argv), leader))
        overrides = overrides_of(words)
        values = checked(overrides, sweeps=bool({"-m", "--multirun"} & set(flags)))
        first = {key: several[0] for key, several in values.items()}
        if HELP & set(flags):
            explain(first)
        elif "resume" in values:
            given = {key: value for key, value in first.items() if key != "resume"}
            resume(Path(str(first["resume"])), given, bool(flags))
        elif flags:
            sweep(flags, overrides)
        else:
            run(chosen(first))


def worded(argv: Sequence[str], keys: Container[str], first: Callable[[str], str]) -> list[str]:
    """What people type as key=value words: `td3bc` and `--env hopper` for algo= and env=.

    Args:
        keys: those that may have dashes before them.
        first: the key of a word that has none.
    """
    words: list[str] = []
    rest = list(reversed(argv))
    while rest:
        word = rest.pop()
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if word.startswith("--") and key in keys:
            alone = not rest or rest[-1].startswith("--")
            words.append(f"{key}={value if equals else 'true' if alone else rest.pop()}")
        elif word in HYDRA_FLAGS:
            words += [word, *([rest.pop()] if rest else [])]
        elif word.startswith("-") or word in keys or (equals and not Path(word).exists()):
            words.append(word)
        else:
            words.append(f"{first(word)}={quoted(word)}")
    return words


def leader(word: str) -> str:
    """Of a bare word of train: a run directory to resume, else a method."""
    return "resume" if Path(word, "config.yaml").exists() else "algo"


def explain(values: Mapping[str, Any]) -> None:
    """Print every setting as these overrides set it."""
    found = chosen({key: value for key, value in values.items() if key != "resume"})
    presets = ", ".join(["full", *configuration.shipped(found.algo).get("presets", {})])
    print(
        f"{inspect.getdoc(train)}\n\n{found.help()}\n"
        f"methods: {', '.join(configuration.algorithms())}; files of your own: algo=mine.py\n"
        f"presets: {presets}\n"
        "resume=DIR continues a run, with steps=N to more steps\n"
        "-m sweeps over comma-separated values; --hydra-help is Hydra's"
    )


def divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides."""
    flags: list[str] = []
    words: list[str] = []
    for word, before in zip(argv, ["", *argv], strict=False):
        (flags if word.startswith("-") or before in HYDRA_FLAGS else words).append(word)
    return flags, words


def overrides_of(words: Sequence[str]) -> Overrides:
    """The overrides that the words mean; ConfigError for one that cannot be read.

    What is no value in Hydra's grammar, such as a path with "=" or an umlaut, is taken literally.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), []
    for word in words:
        key, given, value = word.partition("=")
        if not given:
            raise ConfigError(f"{word!r} is not of the form key=value")
        try:
            try:
                override = parser.parse_override(word)
            except HydraException:
                word = f"{key}={quoted(value)}"
                override = parser.parse_override(word)
        except HydraException as error:
            raise ConfigError(f"cannot read the command line: {error}") from error
        sweeps = override.is_sweep_override()
        values = override.sweep_iterator() if sweeps else [override.value()]
        found.append((override.key_or_group, [unquoted(v) for v in values], word))
    return found


def unquoted(value: Any) -> Any:
    """A parsed value without the parser's quoted-string objects."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    return [unquoted(v) for v in value] if isinstance(value, list) else value


def quoted(text: object) -> str:
    """A value that Hydra takes literally: it reads backslashes before a quote as escapes."""
    doubled = re.sub(r"(\\+)('|$)", r"\1\1\2", str(text))
    return "'" + doubled.replace("'", "\\'") + "'"


def is_hydras(key: str) -> bool:
    return re.split("[/.]", key)[0] == "hydra"


def checked(overrides: Overrides, sweeps: bool) -> dict[str, list[Any]]:
    """Key -> the values that it takes, several in a sweep; Hydra's own keys are left out.

    Raises ConfigError for an unknown key, before Hydra does so in its words.
    """
    values: dict[str, list[Any]] = {}
    for key, found, _ in overrides:
        if key in values:
            raise ConfigError(f"{key} is given twice: {values[key][0]} and {found[0]}")
        if not is_hydras(key):
            values[key] = found
    for key, found in values.items():
        if len(found) > 1 and not sweeps:
            raise ConfigError(f"{key} has several values; a sweep needs -m")
    for algo in values.get("algo", [USUAL]):
        configuration.method(str(algo))
        for key in values:
            configuration.check_key(key, str(algo))
    return values


def chosen(values: Mapping[str, Any]) -> Resolved:
    """The settings that overrides choose."""
    given = {key: configuration.anchored(key, value) for key, value in values.items()}
    found = configuration.configured(str(given.pop("algo", USUAL)), given)
    if "algo" in values:
        found.origins["algo"] = "command line"
    return found


def run(resolved: Resolved, resumed: Path | None = None) -> dict[str, Any]:
    """Print the settings, train, print the score."""
    from offrl.runs import train as experiment
    from offrl.runs.record import played_in

    folder, result = experiment.train(resolved, resumed)
    if result["score"] is None:
        for name, found in result.get("validation", {}).items():
            print(f"{name} {found['mean']:.4g}")
        print(f"no score; result.json, metrics.csv in {folder}")
        return result
    score, interval = result["score"], result["score"]["interval95"]
    spread = f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
    data = f"data {result['dataset']['name']}; " if result["dataset"] else ""
    print(f"{data}evaluated in {played_in(result['env'], result['engines'])}")
    print(
        f"{result['unit']} score {score['iqm']:.1f}{spread}  (IQM of {len(result['seeds'])} "
        f"seed(s) x {len(result['final_returns'][0])} episodes, last checkpoint"
        + (", 95% bootstrap interval)" if interval else ")")
    )
    print(f"{result['seconds'] / 60:.1f} min; result.json, curve.png, metrics.csv in {folder}")
    return result


def resume(folder: Path, given: Mapping[str, Any], flags: bool = False) -> None:
    """Continue a run exactly as it was configured, or to more steps."""
    from offrl.runs.train import extended

    if flags or given.keys() - {"steps"}:
        raise ConfigError(
            "resume=DIR continues a run as it was; give no other setting with it but steps="
        )
    if not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} is not a run directory: it has no config.yaml")
    if given:
        run(extended(folder, given["steps"]), folder)
        return
    if (folder / "result.json").exists():
        raise ConfigError(
            f"{folder} is finished: what came of it is in result.json; give steps=N with it to go "
            "on to more steps"
        )
    run(configuration.of_run(folder), folder)


def sweep(flags: Sequence[str], overrides: Overrides) -> None:
    """Hand over to Hydra: -m with any launcher, --cfg and the rest."""
    import hydra

    # our keys are checked by us and live outside Hydra's files: let Hydra add or override them
    given = {}
    for key, values, word in [("runs", ["runs"], ""), *overrides]:
        if is_hydras(key):
            given[key] = word
        elif key in ("algo", "dataset", "env", "runs"):
            places = (
                Path(str(v)).absolute() if key == "runs" else configuration.anchored(key, v)
                for v in values
            )
            name = "algo.name" if key == "algo" else key
            given[key] = f"++{name}={','.join(map(quoted, places))}"
        else:
            given[key] = f"++{word.lstrip('+')}"
    sys.argv = [sys.argv[0], *flags, *given.values()]
    stored = str(configuration.folder().absolute())
    hydra.main(version_base="1.3", config_path=stored, config_name="train")(sweep_job)()


def sweep_job(cfg: Any) -> float | None:
    """One run of a sweep; importable, since launchers send it to other processes."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(cfg)
    options = values.pop("algo")
    values |= {"algo" if k == "name" else f"algo.{k}": v for k, v in options.items()}
    score = run(chosen(values))["score"]
    return None if score is None else float(score["iqm"])


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turns the library's own errors into one line and an exit status.

    OFFRL_DEBUG=1 shows the traceback instead.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt, ValueError, OSError, Diverged, Failed) as error:
        if os.environ.get("OFFRL_DEBUG"):
            raise
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        told = (str(error) or "stopped") if stopped else f"error: {error}"
        print(f"\n{told}", file=sys.stderr)
        sys.exit(130 if stopped else 2)


def evaluate(argv: Words = None) -> None:
    """Score a run directory or checkpoint: `run=runs/... episodes=100 video=film.gif`."""
    from offrl.runs.evaluate import Options, evaluate_run

    command(evaluate_run, Options, argv)


def collect(argv: Words = None) -> None:
    """Make a data set from policies: `env=hopper dataset=medium rows=1_000_000`."""
    from offrl.runs.collect import Options, collect_data

    command(collect_data, Options, argv)


def report(argv: Words = None) -> None:
    """Table and pictures of finished runs: `runs=[runs] out=benchmarks/mine`."""
    from offrl.runs.report import Options, make_report

    command(make_report, Options, argv)


def export(argv: Words = None) -> None:
    """Write a policy as a file of its own: `run=runs/... out=policy.onnx seed=0`."""
    from offrl.runs.export import Options
    from offrl.runs.policy import export_run

    command(export_run, Options, argv)


def describe(argv: Words = None) -> None:
    """A look at a data set before training: `dataset=log.hdf5 out=look`; exit 1 at an error."""
    from offrl.runs.describe import Options, describe_data

    sys.exit(1 if command(describe_data, Options, argv).errors else 0)


def command(work: Callable[[Any], Any], cls: type, argv: Words) -> Any:
    with readable_errors():
        return work(options(cls, sys.argv[1:] if argv is None else argv))


def options(cls: type, argv: Sequence[str]) -> Any:
    """A dataclass of options filled from key=value words.

    Raises ConfigError for an unknown key (the nearest is named), a wrong type, a missing value.
    """
    if HELP & set(argv):
        print(inspect.getdoc(cls))
        for name, told in configuration.meanings(cls).items():
            if told:
                print(f"{name}={configuration.spelled(getattr(cls, name, '...'))}\n    {told}")
        sys.exit(0)
    hints = configuration.fields_of(cls)
    found: dict[str, list[Any]] = defaultdict(list)
    for key, values, _ in overrides_of(worded(argv, hints, lambda word: next(iter(hints)))):
        if key not in hints:
            near = configuration.nearest(key, hints)
            raise ConfigError(f"there is no option {key!r}{near}; known: {', '.join(hints)}")
        found[key] += values
    given = {
        key: configuration.convert(key, values if len(values) > 1 else values[0], hints[key])
        for key, values in found.items()
    }
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f"{name}= is missing; known options: {', '.join(hints)}")
    return cls(**given)
