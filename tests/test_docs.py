"""README and docs: commands can be given, Python compiles, links lead somewhere, pages are true."""

import argparse
import importlib.util
import itertools
import os
import re
import shlex
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from offrl import cli, config
from offrl.engine.method import turns_of
from offrl.envs.make import factory
from offrl.envs.vector import sizes
from tests.algos.cases import CASES, make
from tools.method_pages import PAGES as METHODS
from tools.method_pages import renewed

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WORDS = 900  # of the README, at most
SHOWN = ("design.md", "llm-trainers.md")  # pieces, and Python that needs other libraries
EXTRAS = {"dmc-": "dm_control", "LunarLander": "Box2D"}
EXTRAS |= dict.fromkeys(("pointmaze", "antmaze", "cube"), "ogbench")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    return re.findall(rf"^```{{?\.?{language}}}?\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """The words of every command in blocks marked bash; && separates two."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for end, group in itertools.groupby(words, "&&".__eq__):
                if not end:
                    yield [w for w in group if not re.match(r"[A-Z_]+=", w)]


def script(words):
    """The name of our script and its words, None for other commands."""
    if len(words) > 1 and words[1].startswith("scripts/"):
        return Path(words[1]).stem, words[2:]
    return (words[1], words[2:]) if words[:1] == ["offrl"] else None


@every_page
def test_every_command_can_be_given(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if found := script(words):
            check_script(*found, monkeypatch)
        elif words[0].endswith("python"):
            check_python(words[1:])
        elif words[0].endswith("pip"):
            check_pip(words)
        elif words[0].startswith(".ci/"):
            assert os.access(words[0], os.X_OK), words
        else:
            assert words[0] in ("mkdocs", "tensorboard"), words


def check_script(name, words, monkeypatch):
    if name == "llm_demo" and importlib.util.find_spec("trl") is None:
        return
    source = (ROOT / "scripts" / f"{name}.py").read_text()
    home, function = re.findall(r"^from (\S+) import (\w+)$", source, re.M)[-1]
    if name == "train":
        flags, given = cli.divided(words)
        values = cli.checked(cli.overrides_of(given), sweeps="-m" in flags)
        if "resume" not in values:
            for chosen in itertools.product(*values.values()):
                given = dict(zip(values, chosen, strict=True))
                config.configured(str(given.pop("algo", cli.USUAL)), given)
        return
    module = importlib.import_module(home if home != "offrl.cli" else f"offrl.runs.{name}")
    if hasattr(module, "Options"):
        cli.options(module.Options, words)
    elif "ArgumentParser" in Path(module.__file__).read_text():
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed_only)
        with pytest.raises(Parsed):
            getattr(module, function)()


class Parsed(Exception):
    """Instead of going on."""


def parsed_only(parser):
    parser.parse_known_args()
    raise Parsed


def check_python(words):
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words
    assert [w for w in words if w.endswith(".py") and not (ROOT / w).exists()] == []


def check_pip(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text().split()
    for word in words:
        named = re.fullmatch(r"\.\[(.+)\]", word)
        assert not named or set(named[1].split(",")) <= set(extras["optional-dependencies"]), word
        package = word.partition("==")[0]
        pinned = [pin for pin in pins if pin.startswith(f"{package}==")]
        assert "==" not in word or not pinned or word in pinned


@every_page
def test_python_compiles(page):
    for source in blocks(page, "python"):
        compile(expanded(source), page.name, "exec")


def expanded(source):
    """With the files that the site shows in it."""
    return re.sub(r'--8<-- "(.+)"', lambda found: (ROOT / found[1]).read_text(), source)


@every_page
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= WORDS


def test_every_page_is_in_the_navigation():
    def files(entry):
        inner = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else itertools.chain(*map(files, inner))

    shown = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(shown) == len(set(shown))
    written = {str(page.relative_to(ROOT)).removeprefix("docs/") for page in PAGES}
    assert set(shown) == written


@pytest.mark.parametrize("name", config.algorithms())
def test_a_methods_page_says_what_its_file_says(name):
    page = (METHODS / f"{name}.md").read_text()
    assert renewed(page, name) == page, "run python -m tools.method_pages"
    explained = set(re.findall(r"^\| `([^`]+)` \| .", page.split("## Metrics")[1], re.M))
    assert logged(name) - explained == set()


def logged(name):
    """Metrics of a method's updates and of its evaluation."""
    case, found = CASES[name], set()
    options = {field.name for field in fields(case.config)}
    for changes in [{}, {"beer": 1e-3}] if "beer" in options else [{}]:
        algo = make(name, replace(case.config, **changes))
        for turn in {turns_of(algo)(step) for step in range(12)}:
            found |= algo.update(case.batch(seed=turn), turn).keys()
    found |= {"bias"} if hasattr(algo, "estimate") else set()
    return found | ({"rank/feature", "rank/effective"} if hasattr(algo, "measure") else set())


def own_data():
    """What pages call a user's own data."""
    spec = importlib.util.spec_from_file_location("own_data", ROOT / "examples" / "own_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    arrays = dict(zip(names, module.swings(), strict=True))
    return arrays | {"observation": arrays["observations"][0]}


def test_the_lines_of_the_readme_run_as_printed(tmp_path, monkeypatch):
    """But for fewer steps, and torch's format where the extra for the other is not here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    (lines,) = blocks(ROOT / "README.md", "python")
    assert lines.count("\n") <= 10
    lines = lines.replace("10_000", "20")
    if importlib.util.find_spec("onnxruntime") is None:
        lines = lines.replace(".onnx", ".pt2")
    told = own_data()
    exec(lines, told)
    assert told["action"].shape == (1,)
    assert abs(told["action"]) <= 2
    assert list(tmp_path.glob("policy.*"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p.name not in SHOWN])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = {"__name__": "page"} | own_data()
    if ".onnx" in page.read_text():
        pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))  # dataclasses look there
    for source in blocks(page, "python"):
        exec(compile(expanded(source), page.name, "exec"), told)


def trainings():
    """The words of printed trainings on generated and own data, one per method, task and source."""
    found = {}
    for words in itertools.chain(*map(commands, PAGES)):
        name, given = script(words) or ("", [])
        if name == "train" and not any(word.startswith(("-", "resume=")) for word in given):
            values = dict(word.split("=", 1) for word in given)
            own = "." in values.get("dataset", "")
            if own or values.get("source") not in ("d4rl", "minari", "ogbench"):
                found.setdefault((values["algo"], values["env"], own), values)
    return list(found.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
@pytest.mark.parametrize("given", trainings(), ids=lambda given: " ".join(given.values()))
def test_trainings_run(given, cache, tmp_path, monkeypatch):
    """Each with a few updates; offline methods on two thousand rows."""
    given = dict(given)
    for start, module in EXTRAS.items():
        if given["env"].startswith(start):
            pytest.importorskip(module)
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(cache))
    given["algo"] = str(ROOT / given["algo"]) if given["algo"].endswith(".py") else given["algo"]
    if "." in given.get("dataset", ""):
        given["dataset"] = write_data(given["env"], Path(given["dataset"]).name)
    cli.train([f"{key}={value}" for key, value in (given | tiny(given)).items()])
    torch.set_num_threads(threads)
    assert len(list(Path("runs").rglob("result.json"))) == 1


def tiny(given):
    method, envs = config.method(given["algo"]), int(given.get("envs", 1))
    size = {"seeds": 1, "eval_episodes": 1, "final_episodes": 1, "algo.batch": 16, "log_every": 5}
    if given["algo"] == "ppo":
        return size | {"algo.rollout": 32, "steps": 96 * envs, "eval_every": 96 * envs}
    if method.online:
        size |= {"algo.warmup": 20, "steps": 60, "eval_every": 40}
        return size | ({"snapshot_every": 40} if "snapshot_every" in given else {})
    rows = {} if "dataset" in given and "." in given["dataset"] else {"rows": 2002}
    return size | rows | {"steps": 12, "eval_every": 6}


def write_data(env, path, rows=2_000):
    example = factory(env)()
    obs, act, _ = sizes(example)
    example.close()
    rng = np.random.default_rng(0)
    last = np.arange(1, rows + 1) % 200 == 0
    fields = {
        "observations": rng.normal(size=(rows, obs)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, act)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": last,
    }
    path = Path(path).with_suffix(".npz")
    np.savez(path, **fields)
    return str(path)
