"""Facts by hand, and every check silent on sound data and raised once by data with one fault."""

import json

import numpy as np
import pytest
import torch

from offrl.data import Dataset
from offrl.data.dataset import bounds, episode_sums
from offrl.data.describe import describe
from offrl.data.relations import drift, leaks, similar
from tests.data.test_stitches import linear


def dataset(info=None, **fields):
    """A data set from arrays; episodes end at terminals and timeouts."""
    tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in fields.items()}
    tensors = {n: t if n == "act" and t.dtype == torch.int64 else t.float()
               for n, t in tensors.items()}  # fmt: skip
    starts = bounds((tensors["terminal"] + tensors["timeout"]) > 0)
    returns = torch.zeros(len(starts))
    if "reward" in tensors:
        returns = episode_sums(tensors["reward"].nan_to_num(), starts)
    return Dataset(tensors, starts, returns, "log", info or {})


def sound():
    """120 episodes of a noisy process: some terminate early, the others are cut after 40 steps."""
    rng = np.random.default_rng(0)
    fields = {name: [] for name in ("obs", "act", "reward", "next_obs", "terminal", "timeout")}
    for _ in range(120):
        x, length = rng.normal(size=3), min(int(rng.geometric(0.02)), 40)
        early = length < 40
        for step in range(length):
            u = np.clip(0.4 * rng.normal(size=2), -1, 1)
            y = 0.9 * x + np.append(u, u[0]) * 0.5 + 0.3 * rng.normal(size=3)
            last = step == length - 1
            row = (x, u, -float((x**2).sum()), y, last and early, last and not early)
            for name, value in zip(fields, row, strict=True):
                fields[name].append(value)
            x = y
    return {name: np.array(value, np.float64) for name, value in fields.items()}


@pytest.fixture(scope="module")
def usual():
    return sound()


def raised(found):
    return {(finding.level, finding.check) for finding in found.findings}


def test_sound_data_raise_nothing(usual):
    found = describe(dataset(**usual), limit=40)
    assert found.findings == []
    assert found.errors == 0
    assert str(found).endswith("0 errors, 0 warnings, 0 notes")


def put(name, at, value):
    def change(fields):
        fields[name] = fields[name].copy()
        fields[name][at] = value

    return change


def replaced(**changes):
    return lambda fields: fields.update({k: v(fields) for k, v in changes.items()})


def column(make):
    """One more observed column, which the following observation has too."""

    def change(fields):
        extra = np.asarray(make(fields), np.float64)[:, None]
        after = np.append(extra[1:], extra[-1:], 0)
        fields["obs"] = np.concatenate([fields["obs"], extra], -1)
        fields["next_obs"] = np.concatenate([fields["next_obs"], after], -1)

    return change


def flags(fields, every=None):
    out = np.zeros(len(fields["reward"]))
    if every:
        out[every - 1 :: every] = 1
    return out


def copied(fields):
    """The first 40 episodes come a second time; one of them has a single row."""
    ends = np.flatnonzero(fields["terminal"] + fields["timeout"])[39] + 1
    for name, value in fields.items():
        fields[name] = np.concatenate([value, value[:ends]])


def shuffled(fields):
    order = np.random.default_rng(0).permutation(len(fields["reward"]))
    for name, value in fields.items():
        fields[name] = value[order]


def slipped(fields):
    """Two percent of the rows come again, each at another place."""
    rows = np.random.default_rng(0).permutation(len(fields["reward"]))[:80]
    for name in ("obs", "act", "reward"):
        fields[name] = fields[name].copy()
        fields[name][rows[:40]] = fields[name][rows[40:]]


def first(count):
    def change(fields):
        ends = np.flatnonzero(fields["terminal"] + fields["timeout"])[count - 1] + 1
        for name, value in fields.items():
            fields[name] = value[:ends]

    return change


def noise(fields, seed=1):
    return np.random.default_rng(seed).normal(size=len(fields["reward"]))


CASES = {
    "NaN": (put("obs", (7, 1), np.nan), "error", "values", "in obs1 (1)"),
    "infinity": (put("reward", 7, np.inf), "error", "values", "in reward (1)"),
    "half a flag": (put("terminal", 3, 0.5), "error", "values", "1 flags are neither 0 nor 1"),
    "no ends": (
        replaced(terminal=flags, timeout=flags),
        "warning",
        "episodes",
        "are one episode without an end",
    ),
    "terminal and timeout": (
        lambda f: f.update(timeout=f["timeout"] + f["terminal"]),
        "note",
        "ends",
        "are terminal and timeout at once",
    ),
    "cut at many lengths": (
        lambda f: f.update(timeout=f["timeout"] + f["terminal"], terminal=flags(f)),
        "note",
        "ends",
        "nothing terminates and the timeouts have",
    ),
    "all limits as terminals": (
        replaced(terminal=lambda f: flags(f, 25), timeout=flags),
        "warning",
        "time limits as terminals",
        "of the 129 terminals come after 25 steps",
    ),
    "some limits as terminals": (
        lambda f: f.update(terminal=f["timeout"] + f["terminal"], timeout=flags(f)),
        "warning",
        "time limits as terminals",
        "of the 120 terminals come after 40 steps, where the longest episodes end",
    ),
    "a constant reward": (
        lambda f: f.update(
            reward=np.ones(len(f["reward"])),
            timeout=f["timeout"] + f["terminal"],
            terminal=flags(f),
        ),
        "error",
        "reward",
        "1 in every row and nothing terminates",
    ),
    "a constant reward and ends": (
        replaced(reward=lambda f: np.ones(len(f["reward"]))),
        "note",
        "reward",
        "1 in every row: only the ends differ",
    ),
    "a sparse reward": (
        lambda f: f.update(reward=f["terminal"] * (np.arange(len(f["reward"])) % 3 == 0)),
        "note",
        "reward",
        "sparse: 99.",
    ),
    "one huge reward": (put("reward", 9, -1e6), "warning", "reward", "the largest is 1e+06"),
    "equal returns": (
        replaced(
            reward=lambda f: (
                np.append(1, (f["terminal"] + f["timeout"])[:-1])
                - (f["terminal"] + f["timeout"])
                + 0 * f["reward"]
            )
        ),
        "warning",
        "returns",
        "all episodes have the same return",
    ),
    "few episodes": (first(10), "warning", "returns", "10 episodes"),
    "not many episodes": (first(60), "note", "returns", "60 episodes"),
    "a constant column": (column(lambda f: 0 * f["reward"] + 3), "warning", "columns", "constant"),
    "a column twice": (
        column(lambda f: f["obs"][:, 1]),
        "warning",
        "columns",
        "duplicates: obs1 and obs3",
    ),
    "an affine column": (
        column(lambda f: 32 - 1.8 * f["obs"][:, 0]),
        "warning",
        "columns",
        "affine functions of one another: obs0 and obs3",
    ),
    "the action observed": (
        column(lambda f: f["act"][:, 1]),
        "error",
        "leak",
        "the observation obs3 is the action act1 of the same row",
    ),
    "the reward observed": (
        column(lambda f: f["reward"]),
        "warning",
        "leak",
        "the observation obs3 tells the reward of the same row",
    ),
    "almost the action": (
        column(lambda f: f["act"][:, 0] + 0.01 * noise(f)),
        "error",
        "leak",
        "the observation obs3 alone tells act0 (99.9%)",
    ),
    "a linear behavior": (
        replaced(act=lambda f: np.tanh(f["obs"][:, :2] @ [[0.1, 0.05], [0.1, -0.05]])),
        "warning",
        "behavior",
        "near-deterministic",
    ),
    "a linear discrete behavior": (
        replaced(act=lambda f: (f["obs"].sum(-1) > 0).astype(np.int64)),
        "warning",
        "behavior",
        "near-deterministic: a linear model",
    ),
    "actions outside": (lambda f: f.update(act=2 * f["act"]), "error", "actions", "outside"),
    "actions at the bounds": (
        replaced(act=lambda f: np.clip(4 * f["act"], -1, 1)),
        "note",
        "actions",
        "at the bounds in act0, act1",
    ),
    "rounded actions": (
        replaced(act=lambda f: (5 * f["act"]).round() / 5),
        "warning",
        "actions",
        "few distinct values in act0",
    ),
    "a rare action": (
        replaced(act=lambda f: np.digitize(f["act"][:, 0], [-0.5, 0, 0.5, 0.9999])),
        "warning",
        "actions",
        "never or rarely taken: 4 (",
    ),
    "a negative action": (
        replaced(act=lambda f: np.where(f["act"][:, 0] > 0, 1, -1)),
        "error",
        "actions",
        "are negative",
    ),
    "copied episodes": (copied, "warning", "repeats", "39 episodes are exact copies"),
    "copied rows": (slipped, "warning", "repeats", "of the rows repeat earlier ones exactly"),
    "a table": (
        lambda f: f.update(
            {name: f[name].clip(-1, 1).round() for name in ("obs", "next_obs", "act", "reward")}
        ),
        "note",
        "repeats",
        "few states, as in a table",
    ),
    "drift": (
        column(lambda f: noise(f) + np.linspace(0, 3, len(f["reward"]))),
        "warning",
        "drift",
        "in obs3 (0.59)",
    ),
    "no order of time": (shuffled, "error", "order", "next_obs is not the following row"),
    "a few rows that do not follow": (
        lambda f: f["next_obs"].__setitem__((slice(3, 4),), 9.0),
        "error",
        "joined episodes",
        "next_obs differs from the following row in 1 rows",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_found(usual, name):
    change, level, check, text = CASES[name]
    fields = {key: value.copy() for key, value in usual.items()}
    change(fields)
    found = describe(dataset(**fields))
    assert (level, check) in raised(found)
    assert any(text in finding.text for finding in found.findings if finding.check == check)
    assert found.errors == sum(finding.level == "error" for finding in found.findings)
    json.dumps(found.to_dict(), allow_nan=False)
    assert text in str(found)


def test_episodes_longer_than_the_environments_limit_are_told(usual):
    found = describe(dataset(**usual), limit=30)
    assert raised(found) == {("warning", "ends")}


def test_joined_episodes_of_the_linear_process_are_an_error_with_the_remedy():
    obs, act = linear()
    nothing, reward = np.zeros(len(obs)), -np.square(obs).sum(-1)
    fields = {"obs": obs, "act": act.clip(-1, 1), "reward": reward, "terminal": nothing}
    found = describe(dataset(**fields, timeout=nothing))
    (error,) = [finding for finding in found.findings if finding.level == "error"]
    assert error.check == "joined episodes"
    assert error.remedy == "set timeouts[19::20] = 1 (a time limit of 20 steps)"
    timeout = (np.arange(10_000) % 20 == 19).astype(float)
    assert describe(dataset(**fields, timeout=timeout)).errors == 0


def test_ends_that_only_the_stored_successors_tell_have_a_limit_too(usual):
    fields = {key: value.copy() for key, value in usual.items()}
    fields["terminal"] = fields["timeout"] = flags(fields)
    fields["next_obs"][:-1] = fields["obs"][1:]
    fields["next_obs"][24::25] += 0.01  # far below what a model can see
    found = describe(dataset(**fields))
    (error,) = [finding for finding in found.findings if finding.level == "error"]
    assert "in 129 rows" in error.text
    assert error.remedy == "set timeouts[24::25] = 1 (a time limit of 25 steps)"


def test_ends_of_unequal_lengths_name_their_rows():
    from tests.data.test_stitches import walks

    obs, act = walks(np.random.default_rng(1).integers(30, 90, 60))
    nothing = np.zeros(len(obs))
    log = dataset(obs=obs, act=act.clip(-1, 1), terminal=nothing, timeout=nothing)
    (error,) = [finding for finding in describe(log).findings if finding.level == "error"]
    rows = describe(log).facts["stitches"]["rows"]
    assert "rows " + ", ".join(map(str, rows[:4])) in error.remedy


TINY = {
    "obs": [[0.0, 1], [1, 1], [2, 1], [5, 1], [7, 1]],
    "act": [[-1.0], [1], [0.5], [0], [1]],
    "reward": [1.0, 0, 4, 2, 8],
    "terminal": [0, 0, 1, 0, 0],
    "timeout": [0, 0, 0, 0, 1],
}


def test_facts_by_hand():
    facts = describe(dataset(**TINY), discount=0.5).facts
    assert (facts["rows"], facts["episodes"]) == (5, 2)
    assert facts["lengths"]["mode"] == 2
    assert [facts["returns"][key] for key in ("min", "max", "mean")] == [5, 10, 7.5]
    assert [facts["discounted"][key] for key in ("min", "max")] == [2, 6]  # 1 + 4/4, 2 + 8/2
    assert facts["reward"]["zero"] == 0.2
    assert facts["reward"]["quantiles"]["0.5"] == 2
    first, still, act, _ = facts["columns"]
    assert [first[key] for key in ("min", "max", "mean", "distinct")] == [0, 7, 3, 5]
    assert first["std"] == pytest.approx(np.std([0, 1, 2, 5, 7]))
    assert (still["at_min"], still["distinct"]) == (1, 1)
    assert (act["at_min"], act["at_max"], act["saturated"]) == (0.2, 0.4, pytest.approx(0.6))
    assert facts["actions"]["covered"] == [4 / 20]
    ends = facts["ends"]
    assert [ends[key] for key in ("terminals", "timeouts", "open", "longest")] == [1, 1, 0, 3]
    assert facts["repeats"] == {"exact": 0, "near": 0, "episodes": 0, "most_kinds": 5}


def test_rows_with_nan_are_counted_and_left_out():
    fields = {key: np.array(value, np.float64) for key, value in TINY.items()}
    fields["obs"][4, 0] = np.nan
    found = describe(dataset(**fields))
    assert found.facts["columns"][0]["max"] == 5
    assert found.facts["columns"][0]["missing"] == 1
    assert found.facts["sample"] == 4
    fields["obs"][:] = np.nan
    assert describe(dataset(**fields)).errors == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [0, 1e-30, 1e30])
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_tiny_huge_and_missing_numbers_are_described_without_a_warning(usual, scale, bad):
    fields = {name: value[:60].copy() for name, value in usual.items()}
    for name in ("obs", "reward", "next_obs"):
        fields[name] *= scale
    if bad is not None:
        fields["obs"][[0, 30]] = bad
    found = describe(dataset(**fields))
    json.dumps(found.to_dict(), allow_nan=False)
    assert ("error", "values") in raised(found) or bad is None


def test_data_without_rewards_have_no_returns():
    fields = {name: value for name, value in TINY.items() if name != "reward"}
    found = describe(dataset(**fields))
    assert "returns" not in found.facts
    assert "reward" not in str(found)


def test_repeats_are_counted_exactly_and_to_a_hundredth_of_std(usual):
    fields = {name: value[:40].copy() for name, value in usual.items()}
    for name in ("obs", "act", "reward"):
        fields[name][10:14] = fields[name][20:24]
        fields[name][30:32] = fields[name][20:22] + 1e-6
    fields["obs"][12, 0] = -0.0
    fields["obs"][22, 0] = 0.0
    fields["terminal"][:], fields["timeout"][:] = 0, 0
    repeats = describe(dataset(**fields)).facts["repeats"]
    assert [repeats["exact"], repeats["near"]] == pytest.approx([4 / 40, 6 / 40])


def test_names_are_the_datas_own_or_those_of_the_parts_of_a_dictionary():
    names = lambda **info: [  # noqa: E731
        column["name"] for column in describe(dataset(info, **TINY)).facts["columns"]
    ]
    assert names() == ["obs0", "obs1", "act0", "reward"]
    assert names(observation_names=["speed", "level"])[:2] == ["speed", "level"]
    assert names(layout={"goal": 2})[:2] == ["goal0", "goal1"]


def test_counts_of_discrete_actions_include_those_that_the_environment_knows():
    fields = TINY | {"act": np.array([0, 1, 1, 0, 1])}
    facts = describe(dataset({"actions": {"count": 4}}, **fields)).facts
    assert facts["actions"]["counts"] == [2, 3, 0, 0]
    share = np.array([0.4, 0.6])
    assert facts["actions"]["entropy"] == pytest.approx(-(share * np.log(share)).sum() / np.log(4))


def test_drift_is_the_two_sample_distance():
    from scipy.stats import ks_2samp

    value = np.random.default_rng(0).normal(size=1000).round(1)  # with ties
    value[300:400] += 1
    found = drift([("obs", "x")], value[:, None], np.arange(1000) // 100, 1000)
    rest = np.delete(value, np.arange(300, 400))
    exact = ks_2samp(value[300:400], rest).statistic
    assert found["distance"][0][3] == pytest.approx(exact, abs=1e-4)


def test_one_column_that_tells_a_discrete_action_is_found():
    rng = np.random.default_rng(0)
    values, act = rng.normal(size=(2000, 2)), rng.integers(0, 3, 2000)
    names = [("obs", "x"), ("obs", "y")]
    assert leaks(names, values, act)["best"][0][2] < 0.5
    values[:, 1] = act + 0.1 * rng.normal(size=2000)
    kind, name, share = leaks(names, values, act)["best"][0]
    assert (kind, name) == ("act", "y")
    assert share > 0.97


def test_the_loss_of_random_actions_is_that_of_uniform_ones():
    rng = np.random.default_rng(0)
    values, act = rng.normal(size=(4000, 2)), rng.integers(0, 3, 4000)
    assert leaks([("obs", "x"), ("obs", "y")], values, act)["loss"] == pytest.approx(1, abs=0.01)
    act = (rng.random(4000) < 1 / (1 + np.exp(-values[:, 0]))).astype(np.int64)
    x = rng.normal(size=1_000_000)
    odds = 1 / (1 + np.exp(-x))
    exact = -(odds * np.log(odds) + (1 - odds) * np.log(1 - odds)).mean() / np.log(2)
    found = leaks([("obs", "x"), ("obs", "y")], values, act)["loss"]
    assert found == pytest.approx(exact, abs=0.02)


def test_equal_and_affine_columns_are_told_apart():
    x = np.random.default_rng(0).normal(size=200)
    names = [("obs", name) for name in "abcd"]
    values = np.stack([x, x, 1 - 2 * x, x + 0.1 * np.cos(9 * x)], -1)
    found = [(*pair["names"], pair["equal"]) for pair in similar(names, values)]
    assert found == [("a", "b", True), ("a", "c", False), ("b", "c", False)]


def test_a_sample_of_a_long_log_is_said_to_be_one(monkeypatch, usual):
    monkeypatch.setattr("offrl.data.describe.SAMPLE", 500)
    found = dataset(**usual).describe()
    assert found.facts["sample"] == 500
    assert "500 rows" in str(found)
