import math
import typing
from typing import Annotated, Literal

import pytest
import torch

from offrl import config
from offrl.config import convert, from_yaml, resolve
from offrl.envs import ogbench
from offrl.errors import ConfigError
from offrl.runs import train as experiment
from offrl.runs import workers as parallel
from offrl.runs.train import layout

TASKS = {"halfcheetah-*": {"alpha": 40.0}, "*-medium": {"eval_episodes": 50}}
PRESETS = {"quick": {"steps": 100, "eval_every": 10}}


def test_precedence_and_origins():
    got = resolve("prdc", {"algo.lr": 1e-3, "preset": "quick", "eval_every": 20}, TASKS, PRESETS)
    assert got.options["alpha"] == 40.0
    assert got.origins["algo.alpha"] == "task halfcheetah-*"
    assert got.settings.eval_episodes == 50
    assert (got.options["steps"], got.origins["algo.steps"]) == (100, "preset quick")
    assert (got.settings.eval_every, got.origins["eval_every"]) == (20, "command line")
    assert "algo.beta" not in got.origins


def test_a_pattern_with_a_source_holds_for_its_data_only():
    tasks = {"halfcheetah-*": {"alpha": 5.0}, "d4rl:halfcheetah-*": {"alpha": 40.0}}
    values = {
        source: resolve("prdc", {"source": source}, tasks).options["alpha"]
        for source in ("auto", "generated", "d4rl", "minari")
    }
    assert values == {"auto": 5.0, "generated": 5.0, "d4rl": 40.0, "minari": 5.0}
    assert resolve("prdc", {"source": "d4rl"}, tasks).origins["algo.alpha"] == (
        "task d4rl:halfcheetah-*"
    )


def test_an_override_equal_to_the_default_is_still_an_override():
    got = resolve("prdc", {"algo.alpha": 2.5}, TASKS)
    assert got.options["alpha"] == 2.5
    assert got.origins["algo.alpha"] == "command line"


def test_root_steps_are_the_methods_steps():
    assert resolve("td3bc", {"steps": 7}).options["steps"] == 7


def test_stored_configuration_comes_back_whole():
    got = resolve("td3bc", {"algo.hidden": [32, 32], "seeds": 3}, TASKS)
    assert from_yaml(got.to_yaml()) == got
    assert got.config().hidden == (32, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"algo.alhpa": 1.0}, "prdc has no option 'alhpa'; did you mean 'alpha'"),
        ({"algo.policy_delay": 2.5}, "policy_delay must be int, got 2.5"),
        ({"algo.lr": "fast"}, "lr must be float, got 'fast'"),
        ({"sedes": 3}, "no setting 'sedes'; did you mean 'seeds'"),
        ({"alpha": 3.0}, "did you mean 'algo.alpha'"),
        ({"source": "d4lr"}, "source must be one of auto, generated, d4rl"),
        ({"preset": "quik"}, "no preset 'quik'; did you mean 'quick'"),
        ({"legacy_mass": 1}, "legacy_mass must be bool, got 1"),
        ({"threads": "all"}, "threads must be int, got 'all'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"algo.batch": -1}, "algo.batch must be at least 1, got -1"),
    ],
)
def test_mistakes_are_named_with_the_nearest_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve("prdc", overrides, {}, PRESETS)


def test_training_that_ends_within_its_warmup_is_refused():
    with pytest.raises(ConfigError, match="steps=5000 ends within the random warm-up"):
        resolve("sac", {"steps": 5000})


def test_a_misspelt_algorithm_names_the_nearest():
    with pytest.raises(ConfigError, match="no algorithm 'prcd'; did you mean 'prdc'"):
        resolve("prcd", {})


@pytest.mark.parametrize(
    ("value", "hint", "out"),
    [
        (1e6, int, 1_000_000),
        (3, float, 3.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        ("auto", int | Literal["auto"], "auto"),
        (2.0, int | Literal["auto"], 2),
        (None, int | None, None),
        (5, int | None, 5),
        ("a", Literal["a", "b"], "a"),
    ],
)
def test_values_take_the_declared_type(value, hint, out):
    got = convert("x", value, hint)
    assert got == out
    assert type(got) is type(out)


def test_task_patterns_cannot_match_across_benchmarks():
    got = resolve("prdc", {"env": "d4rl-antmaze-large", "dataset": "play"}, TASKS)
    assert got.task == "d4rl-antmaze-large-play"


@pytest.mark.parametrize(
    ("env", "path", "task"),
    [
        ("antmaze-giant", "/x/antmaze-giant-stitch-v0.npz", "antmaze-giant-stitch"),
        ("halfcheetah", "/x/halfcheetah_medium-v2.hdf5", "halfcheetah-medium"),
        ("hopper", "/x/logs-v2.npz", "hopper-logs-v2"),
    ],
)
def test_a_published_file_has_the_task_values_of_its_data_set(env, path, task):
    assert resolve("td3bc", {"env": env, "dataset": path}, TASKS).task == task


@pytest.mark.parametrize("name", config.algorithms())
def test_every_shipped_task_value_fits_its_method(name):
    stored = config.shipped(name)
    for pattern, values in stored.get("tasks", {}).items():
        source, _, task = pattern.rpartition(":")
        env, _, dataset = task.replace("*", "x").rpartition("-")
        given = {"env": env, "dataset": dataset, "source": source or "auto"}
        if config.method(name).online:
            given = {"env": task.replace("*", "x")}
        found = resolve(name, given, {pattern: values}, stored["presets"])
        assert list(found.origins.values()).count(f"task {pattern}") == len(values)
    for preset in stored["presets"]:
        resolve(name, {"preset": preset}, {}, stored["presets"])


def test_shipped_values_are_read_as_the_command_line_reads_them():
    stored = config.shipped("dqn")
    assert stored["tasks"]["LunarLander-*"]["lr"] == 5e-4  # a word to plain YAML


ALPHAS = ("gcivl", "gciql", "qrl", "crl")
COEFFICIENTS = {  # published: alphas of these methods, both of HIQL, and its k
    "pointmaze": (10, 0.003, 0.0003, 0.03, 3, 25),
    "antmaze": (10, 0.3, 0.003, 0.1, 3, 25),
    "explore": (10, 0.01, 0.001, 0.003, 10, 25),
    "humanoidmaze": (10, 0.1, 0.001, 0.1, 3, 100),
    "antsoccer": (10, 0.1, 0.003, 0.3, 3, 25),
    "play": (10, 1, 0.3, 3, 3, 10),
    "noisy": (10, 0.03, 0.03, 0.1, 3, 10),
}
ACTOR_GOALS = {"stitch": (0.0, 0.5, 0.5), "explore": (0.0, 0.0, 1.0)}
VALUE_GOALS = {"qrl": (0.0, 0.0, 1.0), "crl": (0.0, 1.0, 0.0)}
MAZES, PLAY = ("navigate", "stitch"), ("play", "noisy")
KINDS = {
    "pointmaze": MAZES,
    "antmaze": (*MAZES, "explore"),
    "humanoidmaze": MAZES,
    "antsoccer": MAZES,
    "cube": PLAY,
    "scene": PLAY,
    "puzzle": PLAY,
}
ALONG, MIXED = (0.0, 1.0, 0.0), (0.2, 0.5, 0.3)


def published(method, env, kind):
    """OGBench's values of a method for a data set; k / 5, which is ours, for the options of OTA."""
    family = ogbench.family(env)
    group = kind if kind in COEFFICIENTS else family
    pixels, manipulation = env.startswith("visual-"), family in ogbench.MANIPULATION
    *_, alpha, k = COEFFICIENTS[group]
    horizon = 0.995 if "giant" in env or family == "humanoidmaze" else 0.99
    found = {
        "lr": 3e-4,
        "batch": 256 if pixels else 1024,
        "hidden": (512, 512, 512),
        "steps": 500_000 if pixels else 1_000_000,
        "images": pixels,
        "crop_share": 0.5 if pixels and manipulation else 0.0,
        "actor_goals": ALONG if method == "gcbc" else ACTOR_GOALS.get(kind, ALONG),
    }
    if method != "gcbc":
        found |= {"value_goals": VALUE_GOALS.get(method, MIXED)}
    if method not in ("gcbc", "qrl"):
        found |= {"discount": horizon}
    if method in ("gciql", "gcivl", "hiql", "ota"):
        found |= {"tau": 0.005, "expectile": 0.9 if method.startswith("gc") else 0.7}
    if method in ("hiql", "ota"):
        found |= {"high_alpha": alpha, "low_alpha": alpha, "subgoal_steps": k, "rep_dim": 10}
        found |= {"low_actor_rep_grad": pixels}
    if method == "ota":
        found |= {"option_steps": k / 5}
    if method in ALPHAS:
        found |= {"alpha": COEFFICIENTS[group][ALPHAS.index(method)]}
    return found


@pytest.mark.parametrize("method", ["gcbc", "gcivl", "gciql", "qrl", "crl", "hiql", "ota"])
def test_goal_conditioned_methods_have_the_published_values_for_every_data_set(method):
    stored = config.shipped(method)
    for env in ogbench.NAMES:
        for kind in KINDS[ogbench.family(env)]:
            got = resolve(method, {"env": env, "dataset": kind}, stored["tasks"], stored["presets"])
            wanted = published(method, env, kind)
            assert {key: got.options[key] for key in wanted} == wanted, (env, kind)
            s = got.settings
            protocol = (s.eval_every, s.eval_episodes, s.final_episodes)
            assert protocol == (100_000, 50, 50)


def test_seeds_are_stacked_on_cuda_where_the_network_can_carry_them():
    cuda = torch.device("cuda")
    assert layout(resolve("td3bc", {"seeds": 3}), cuda) == [[0, 1, 2]]
    assert layout(resolve("decision_mamba", {"seeds": 3}), cuda) == [[0], [1], [2]]
    images = {"seeds": 2, "algo.images": True}
    assert layout(resolve("gcbc", images), cuda) == [[0], [1]]
    assert layout(resolve("td3bc", {"seeds": 2}), torch.device("cpu")) == [[0], [1]]


@pytest.mark.parametrize(
    ("cores", "given", "at_once", "share", "room"),
    [
        (2, {"seeds": 1, "threads": 1}, 1, 2, True),
        (2, {"seeds": 1, "threads": 2}, 1, 2, False),
        (2, {"seeds": 5, "threads": 1}, 2, 1, False),
        (1, {"seeds": 1, "threads": 4}, 1, 1, False),
        (16, {"seeds": 5, "threads": 2}, 5, 3, True),
        (16, {"seeds": 8, "threads": 2}, 8, 2, False),
        (2, {"seeds": 5, "threads": 1, "evaluation": "async"}, 2, 1, True),
        (16, {"seeds": 1, "threads": 1, "evaluation": "inline"}, 1, 16, False),
    ],
)
def test_cores_are_shared_among_training_and_evaluating_processes(
    monkeypatch, cores, given, at_once, share, room
):
    for module in (experiment, parallel):
        monkeypatch.setattr(module, "cores", lambda: cores)
    run, cpu = resolve("td3bc", given), torch.device("cpu")
    assert parallel.at_once(run, given["seeds"]) == at_once
    assert experiment.share(run, cpu) == share
    assert experiment.evaluates_async(run, cpu) == room


def test_a_run_on_a_gpu_is_evaluated_beside():
    assert experiment.evaluates_async(resolve("td3bc", {"threads": 8}), torch.device("cuda"))


def base(hint):
    """int or float behind a range or within a tuple; the type itself otherwise."""
    args = typing.get_args(hint)
    return base(args[0]) if typing.get_origin(hint) in (Annotated, tuple) else hint


NUMBERS = [
    (algo, name, hint)
    for algo in config.algorithms()
    for name, hint in config.fields_of(config.method(algo).config).items()
    if {int, float} & {base(part) for part in config.parts_of(hint)}
]


@pytest.mark.parametrize(("algo", "name", "hint"), NUMBERS)
def test_every_number_of_a_method_has_a_range_and_nothing_outside_passes(algo, name, hint):
    (limits,) = config.ranges_of(hint)
    outside = [math.nan, -math.inf]
    if limits.low > -math.inf:
        outside.append(limits.low if limits.strict else limits.low - 1)
    if limits.high < math.inf:
        outside.append(limits.high if limits.strict else 2 * limits.high)
    for value in outside:
        given = [value] if typing.get_origin(hint) is tuple else value
        with pytest.raises(ConfigError, match=rf"^(algo\.)?{name}( entry)? must be "):
            resolve(algo, {f"algo.{name}": given})
    resolve(algo, {f"algo.{name}": getattr(config.method(algo).config(), name)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algo.discount": 7}, r"algo\.discount must be in \[0, 1\], got 7\.0"),
        ({"algo.lr": -1}, r"algo\.lr must be above 0 and finite, got -1\.0"),
        ({"algo.lr": math.inf}, r"algo\.lr must be above 0 and finite, got inf"),
        ({"algo.alpha": -3}, r"algo\.alpha must be at least 0 and finite, got -3\.0"),
        ({"algo.hidden": [0]}, r"algo\.hidden entry must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve("td3bc", given)


def test_a_minibatch_of_one_row_leaves_ppo_nothing_to_standardize():
    with pytest.raises(ConfigError, match=r"algo\.batch must be at least 2, got 1"):
        resolve("ppo", {"algo.batch": 1})
