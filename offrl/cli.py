"""The command line: `offrl train ...` and the scripts. Grammar and launchers are Hydra's."""

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offrl import config as configuration
from offrl.config import Resolved
from offrl.data.sources import SUFFIXES
from offrl.errors import ConfigError

# flags of Hydra that are followed by a value
HYDRA_FLAGS = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd"}
USUAL = "prdc"  # the method that configs/train.yaml names
OWN_KEYS = {"name", "tasks", "presets"}  # of configs/algo/<name>.yaml


def main() -> None:
    """The console command: offrl train|evaluate|collect|report|describe key=value ..."""
    commands = {
        "train": train,
        "evaluate": evaluate,
        "collect": collect,
        "report": report,
        "describe": describe,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(f"usage: offrl {'|'.join(commands)} key=value ...", file=sys.stderr)
        sys.exit(2)
    commands[sys.argv[1]](sys.argv[2:])


def train(argv: Sequence[str] | None = None) -> None:
    """Train one method: `algo=prdc env=halfcheetah dataset=medium seeds=4`.

    `--help` with the same words lists every setting with its value, origin and meaning.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with readable_errors():
        overrides = check_overrides(argv)
        if {"-h", "--help"} & set(argv):
            explain(overrides)
        elif "resume" in overrides:
            resume(overrides, argv)
        elif any(flag.startswith("-") for flag in argv):
            sweep(argv)
        else:
            run(compose(argv))


def explain(overrides: dict[str, list[Any]]) -> None:
    """Print every setting as these overrides set it; of a sweep its first run."""
    first = {key: values[0] for key, values in overrides.items() if key != "resume"}
    algo = str(first.pop("algo", USUAL))
    presets = ", ".join(["full", *configuration.shipped(algo).get("presets", {})])
    print(
        f"{inspect.getdoc(train)}\n\n{configuration.configured(algo, first).help()}\n"
        f"methods: {', '.join(configuration.algorithms())}; files of your own: algo=mine.py\n"
        f"presets: {presets}\n"
        "resume=DIR continues a run; -m sweeps over comma-separated values; --hydra-help is Hydra's"
    )


def check_overrides(argv: Sequence[str]) -> dict[str, list[Any]]:
    """Look at every override before Hydra does, so that a misspelling is answered in words.

    Returns:
        key -> the values it takes, more than one in a sweep; Hydra's own keys are left out.

    Raises:
        ConfigError: unknown algorithm, key or preset, or a value that cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    before = ["", *argv]
    words = [
        word
        for word, flag in zip(argv, before, strict=False)
        if not word.startswith("-") and flag not in HYDRA_FLAGS
    ]
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"cannot read the command line: {error}") from error
    values: dict[str, list[Any]] = {}
    for override in parsed:
        key = override.key_or_group
        if key.split("/")[0].split(".")[0] == "hydra":
            continue
        if override.is_sweep_override():
            if not {"-m", "--multirun"} & set(argv):
                raise ConfigError(f"{key} has several values; a sweep needs -m")
            values[key] = [unquoted(v) for v in override.sweep_iterator()]
        else:
            values[key] = [unquoted(override.value())]
    for algo in values.get("algo", [USUAL]):
        configuration.method(str(algo))
        for key in values:
            configuration.check_key(key, str(algo))
    return values


def unquoted(value: Any) -> Any:
    """A parsed value without the parser's quoted-string objects."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    return [unquoted(v) for v in value] if isinstance(value, list) else value


def for_hydra(argv: Sequence[str]) -> list[str]:
    """Our keys are checked by us and live outside Hydra's files: let Hydra add or override them."""
    out = []
    for word in argv:
        if word.startswith("algo=") and configuration.is_own(path := word.removeprefix("algo=")):
            out += ["algo=own", f"++algo.name={quoted(str(Path(path).absolute()))}"]
            continue
        key = word.split("=")[0]
        own = "=" in word and not key.startswith(("-", "+", "~", "hydra")) and key != "algo"
        out.append(f"++{word}" if own else word)
    return out


def quoted(text: str) -> str:
    """A value that Hydra takes literally."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def compose(argv: Sequence[str]) -> Resolved:
    """The configuration of one run, composed by Hydra's API."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(configuration.folder().absolute()), version_base="1.3"):
        return resolve(hydra_compose("train", overrides=for_hydra(argv)), argv)


def resolve(cfg: Any, words: Sequence[str]) -> Resolved:
    """A composed Hydra configuration as settings with origins.

    Args:
        words: the overrides it was composed of.
    """
    from omegaconf import OmegaConf

    raw: Any = OmegaConf.to_container(cfg)
    method = raw.pop("algo")
    overrides = {f"algo.{k}": v for k, v in method.items() if k not in OWN_KEYS}
    overrides |= {k: v for k, v in raw.items() if k != "hydra"}
    resolved = configuration.configured(method["name"], overrides)
    if any(word.startswith("algo=") for word in words):
        resolved.origins["algo"] = "command line"
    return resolved


def run(resolved: Resolved, folder: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Print the settings, train, print the score."""
    from offrl.runs import train as experiment
    from offrl.runs.record import played_in

    print("\n".join(resolved.lines()), flush=True)
    folder, result = experiment.train(
        resolved, folder, resume, say=lambda line: print(line, flush=True)
    )
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


def resume(overrides: dict[str, list[Any]], argv: Sequence[str]) -> None:
    """Continue a run exactly as it was configured."""
    if len(overrides) > 1 or len(argv) > 1:
        raise ConfigError("resume=DIR continues a run as it was; give no other setting with it")
    folder = Path(str(overrides["resume"][0]))
    if not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} is not a run directory: it has no config.yaml")
    if (folder / "result.json").exists():
        raise ConfigError(
            f"{folder} is finished: its score is in result.json; start a new run for more steps"
        )
    run(configuration.from_yaml((folder / "config.yaml").read_text()), folder, resume=True)


def sweep(argv: Sequence[str]) -> None:
    """Hand over to Hydra: -m with any launcher, --cfg and the rest."""
    import hydra

    # a job may start elsewhere than here, so the places of runs and files are made absolute
    words = [anchored(word) for word in argv]
    if not any(word.startswith("runs=") for word in words):
        # beside the others: Hydra's parser takes overrides in one piece
        place = next((i for i, word in enumerate(words) if "=" in word), len(words))
        words.insert(place, f"runs={Path('runs').absolute()}")
    sys.argv = [sys.argv[0], *for_hydra(words)]
    stored = str(configuration.folder().absolute())
    hydra.main(version_base="1.3", config_path=stored, config_name="train")(sweep_job)()


def anchored(word: str) -> str:
    """The override with an absolute path if it names a folder of runs or a data file."""
    key, _, value = word.partition("=")
    is_path = key == "runs" or (key == "dataset" and Path(value).suffix in SUFFIXES)
    return f"{key}={Path(value).absolute()}" if is_path else word


def sweep_job(cfg: Any) -> float:
    """One run of a sweep; importable, since launchers send it to other processes."""
    from hydra.core.hydra_config import HydraConfig

    return float(run(resolve(cfg, HydraConfig.get().overrides.task))["score"]["iqm"])


class readable_errors:
    """Turns the library's own errors into one line and an exit status.

    OFFRL_DEBUG=1 shows the traceback instead.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from offrl.errors import Diverged, Failed, Interrupted

        if error is None or os.environ.get("OFFRL_DEBUG"):
            return
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            print(f"\n{str(error) or 'stopped'}", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, (ValueError, OSError, Diverged, Failed)):
            print(f"\nerror: {error}", file=sys.stderr)
            sys.exit(2)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Score a run directory or checkpoint: `run=runs/... episodes=100 video=film.gif`."""
    from offrl.runs.evaluate import Options, evaluate_run

    with readable_errors():
        evaluate_run(options(Options, sys.argv[1:] if argv is None else argv))


def collect(argv: Sequence[str] | None = None) -> None:
    """Make a data set from policies: `env=hopper dataset=medium rows=1_000_000`."""
    from offrl.runs.collect import Options, collect_data

    with readable_errors():
        collect_data(options(Options, sys.argv[1:] if argv is None else argv))


def report(argv: Sequence[str] | None = None) -> None:
    """Table and pictures of finished runs: `runs=[runs] out=benchmarks/mine`."""
    from offrl.runs.report import Options, make_report

    with readable_errors():
        make_report(options(Options, sys.argv[1:] if argv is None else argv))


def describe(argv: Sequence[str] | None = None) -> None:
    """A look at a data set before training: `dataset=log.hdf5 out=look`; exit 1 at an error."""
    from offrl.runs.describe import Options, describe_data

    with readable_errors():
        found = describe_data(options(Options, sys.argv[1:] if argv is None else argv))
        sys.exit(1 if found.errors else 0)


def options(cls: type, argv: Sequence[str]) -> Any:
    """Fill a dataclass of options from key=value words.

    Raises:
        ConfigError: unknown key (the nearest is named), wrong type, or a missing value.
    """
    import dataclasses

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    hints = configuration.fields_of(cls)
    if {"-h", "--help"} & set(argv):
        print(cls.__doc__)
        sys.exit(0)
    for word in argv:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    values = {}
    try:
        overrides = OverridesParser.create().parse_overrides(list(argv))
    except HydraException as error:
        raise ConfigError(f"cannot read the command line: {error}") from error
    for override in overrides:
        key = override.key_or_group
        if key not in hints:
            raise ConfigError(
                f"there is no option {key!r}{configuration.nearest(key, hints)}; "
                f"known: {', '.join(hints)}"
            )
        values[key] = configuration.convert(key, unquoted(override.value()), hints[key])
    for field in dataclasses.fields(cls):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if not optional and field.name not in values:
            raise ConfigError(f"{field.name}= is missing; known options: {', '.join(hints)}")
    return cls(**values)
