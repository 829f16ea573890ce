import json
import sys

import numpy as np
import pytest
import torch

import offrl
from offrl.errors import ConfigError, Failed
from offrl.runs import export
from tests.algos.cases import CASES, method
from tests.runs.policies import HIGH, LOW, policy, seen, stored

# Decision Mamba's scans make a graph of thousands of nodes, which takes minutes to write
LONG = {"decision_mamba": [pytest.mark.slow]}
every = pytest.mark.parametrize("name", [pytest.param(n, marks=LONG.get(n, [])) for n in CASES])
HALF = (HIGH - LOW) / 2


def needs_onnx(suffix):
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def load(path):
    return offrl.load_policy(path, trusted=path.suffix == ".pt2")


def chained(p, goal, steps=6, rows=5):
    """Actions of a few steps in which some episodes begin anew, (steps, rows, ...)."""
    random, found, memory = np.random.default_rng(2), [], None
    wide = p.signature.obs_dim
    for step in range(steps):
        told = {"goal": random.uniform(-1, 1, wide)} if goal else {}
        act, memory = p.act(
            random.uniform(-1, 1, (rows, wide)),
            memory=memory,
            start=np.arange(rows) < (5 if step == 0 else 2 if step == 4 else 0),
            reward=random.standard_normal(rows),
            **told,
        )
        found.append(act)
    return np.stack(found)


@pytest.mark.parametrize("suffix", export.SUFFIXES)
@every
def test_every_method_is_written_and_acts_the_same(name, suffix, tmp_path):
    needs_onnx(suffix)
    p, path = policy(name), tmp_path / f"policy{suffix}"
    kept = p.export(path)
    assert kept["parity"] == {"largest": kept["parity"]["largest"], "random": 1000, "data": 1000}
    assert kept["parity"]["largest"] <= 1e-5
    back = load(path)
    assert back.signature == p.signature
    assert back.info == json.loads(path.with_suffix(".json").read_text())
    ours, theirs = (chained(one, method(name).goals) for one in (p, back))
    if p.signature.discrete:
        assert np.array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * HALF)
        assert np.ptp(ours) > 1e-3
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "policy.json"}


@pytest.mark.slow
def test_the_memory_of_a_recurrent_policy_is_named_inputs_and_outputs(tmp_path):
    p = policy("decision_mamba", eval_mode="recurrent")
    kept = p.export(tmp_path / "policy.pt2")
    names = [name for name in kept["inputs"] if name.startswith("memory_")]
    assert {"memory_rest", "memory_step", "memory_past_0_coarse_0"} <= set(names)
    assert kept["inputs"]["memory_step"] == {"shape": ["batch"], "type": "int64"}
    assert kept["outputs"] == ["action", *(f"{name}_out" for name in names)]
    assert list(kept["inputs"])[:4] == ["obs", "target", "start", "reward"]
    back = load(tmp_path / "policy.pt2")
    np.testing.assert_allclose(chained(p, False), chained(back, False), rtol=0, atol=1e-5 * HALF)


@pytest.mark.parametrize("eval_mode", ["window", "recurrent"])
def test_a_memory_taken_apart_is_the_memory(eval_mode):
    """Before any exporter has seen the graph."""
    p = policy("decision_mamba", eval_mode=eval_mode)
    graph, random, ours = export.Graph(p.step), np.random.default_rng(0), None
    theirs = {name: part.repeat(4, *[1] * (part.dim() - 1)) for name, part in graph.blank.items()}
    for step in range(6):
        told = {"obs": random.standard_normal((4, 2)), "reward": random.standard_normal(4)}
        told |= {"start": np.arange(4) < (4 if step == 0 else step % 2), "target": np.full(4, 3.0)}
        told = {name: value.astype(np.float32) for name, value in told.items()}
        act, ours = p.step.run(told, ours)
        given = {name: torch.from_numpy(value) for name, value in told.items()} | theirs
        with torch.no_grad():
            found, *after = graph(*[given[name] for name in graph.inputs])
        theirs = dict(zip(graph.names, after, strict=True))
        np.testing.assert_allclose(act, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("td3bc", {"obs": ["batch", 3]}),
        ("gcbc", {"obs": ["batch", 3], "goal": ["batch", 3]}),
        ("decision_transformer", {"obs": ["batch", 2], "memory_act": ["batch", 4, 2]}),
    ],
)
def test_an_onnx_file_takes_any_number_of_rows_and_says_so(name, inputs, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    needs_onnx(".onnx")
    policy(name).export(tmp_path / "policy.onnx")
    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    found = {given.name: given.shape for given in session.get_inputs()}
    assert found | inputs == found
    assert session.get_outputs()[0].shape == ["batch", 2]
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["low"]) == [LOW, LOW]
    assert {"format", "versions", "parity", "obs_names", "inputs"} <= set(told)


@pytest.mark.parametrize("suffix", export.SUFFIXES)
def test_a_file_names_no_folder_of_this_machine(suffix, tmp_path):
    needs_onnx(suffix)
    stored(tmp_path, "td3bc")
    path = tmp_path / f"policy{suffix}"
    offrl.load_policy(tmp_path).export(path)
    here = str(offrl.__path__[0]).rpartition("/")[0]
    for text in (here, str(tmp_path), sys.prefix):
        assert text.encode() not in path.read_bytes()
        assert text not in path.with_suffix(".json").read_text()


def test_networks_that_do_not_act_stay_behind(tmp_path):
    """Critics, targets and optimizers."""
    policy("td3bc").export(tmp_path / "policy.pt2")
    weights = torch.export.load(tmp_path / "policy.pt2").state_dict
    actor = sum(p.numel() for p in policy("td3bc").step.algo.actor.parameters())
    assert sum(p.numel() for p in weights.values()) == actor + 2 * 3 + 4 * 2  # units


@pytest.mark.parametrize("name", ["td3bc", "dqn"])
def test_a_file_that_acts_differently_is_deleted(name, tmp_path, monkeypatch):
    whole = export.program

    def wrong(graph):
        made = whole(graph)
        for key, weight in made.state_dict.items():
            moved = weight + 0.05 * torch.randn_like(weight)
            made.state_dict[key] = torch.nn.Parameter(moved, requires_grad=False)
        return made

    monkeypatch.setattr(export, "program", wrong)
    with pytest.raises(Failed, match=r"differ by .* the file was deleted"):
        policy(name).export(tmp_path / "policy.pt2")
    assert not list(tmp_path.iterdir())


def test_ties_of_discrete_actions_are_no_difference():
    p = policy("dqn")
    with torch.no_grad():
        last = p.step.algo.network.layers[-1]
        last.weight[:, 1], last.bias[:, 1] = last.weight[:, 0] * (1 + 1e-7), last.bias[:, 0]
        last.weight[:, 2:], last.bias[:, 2:] = 0, -100
    told = {"obs": seen("dqn")["sample"], "start": np.ones(1000), "reward": np.zeros(1000)}
    told = {key: value.astype(np.float32) for key, value in told.items()}
    ours, _ = p.step.run(told)
    other = np.where(ours == 5, 6, 5)
    assert export.distance(p.step, told, None, ours, np.full_like(ours, 7)) == 1
    assert export.distance(p.step, told, None, ours, ours) == 0
    assert export.distance(p.step, told, None, ours, other) < 1


def test_a_policy_without_observations_is_compared_at_random_ones(tmp_path):
    p = policy("td3bc")
    p.seen, p.limits = {}, None
    assert p.export(tmp_path / "policy.pt2")["parity"]["data"] == 0
    back = load(tmp_path / "policy.pt2")
    back.act([1e9, 0, 0])  # no range, no warning


def test_the_range_of_the_data_goes_with_the_file(tmp_path):
    policy("td3bc").export(tmp_path / "policy.pt2")
    back = load(tmp_path / "policy.pt2")
    with pytest.warns(UserWarning, match=r"obs\[2\] is 9 in row 0"):
        back.act([0, 0, 9])


def test_what_a_file_cannot_do_is_said(tmp_path):
    p = policy("sac")
    p.export(tmp_path / "policy.pt2")
    back = load(tmp_path / "policy.pt2")
    with pytest.raises(ValueError, match="deterministic"):
        back.act([0, 0, 0], explore=True)
    with pytest.raises(ValueError, match="export that of the run"):
        back.export(tmp_path / "again.pt2")
    with pytest.raises(ConfigError, match=r"\.onnx or \.pt2, got .*policy\.pb"):
        p.export(tmp_path / "policy.pb")
    with pytest.raises(OSError, match="there is no folder"):
        p.export(tmp_path / "nowhere" / "policy.pt2")


def test_a_file_that_could_run_code_is_read_only_if_it_is_trusted(tmp_path):
    policy("bc").export(tmp_path / "policy.pt2")
    with pytest.raises(ValueError, match=r"can run code .*trusted=True"):
        offrl.load_policy(tmp_path / "policy.pt2")


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Failed, match=r"pip install 'offrl\[export\]'"):
        policy("td3bc").export(tmp_path / "policy.onnx")
    (tmp_path / "policy.onnx").touch()
    with pytest.raises(Failed, match=r"pip install 'offrl\[export\]'"):
        offrl.load_policy(tmp_path / "policy.onnx")


def test_files_of_others_and_of_the_future_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "policy.pt2"
    with pytest.raises(FileNotFoundError, match=r"no file .*policy\.pt2"):
        load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"not a readable \.pt2 file"):
        load(path)
    monkeypatch.setattr(export, "FORMAT", 2)
    policy("bc").export(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of format 2, this version reads 1: install"):
        load(path)
    graph = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(graph, path)
    with pytest.raises(ValueError, match="not written by offrl"):
        load(path)
