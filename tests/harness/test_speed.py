import json
import os
import sys

import numpy as np
import pytest
import torch

from benchmarks.harness import certificate
from benchmarks.harness.peers import plain
from benchmarks.harness.peers.start import PEERS
from benchmarks.harness.speed import Options, measure_speed
from offrl.algos import td3bc
from offrl.cli import options
from offrl.engine.method import Spec
from offrl.errors import ConfigError


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    g = np.random.default_rng(0)
    size = 400
    obs = g.normal(size=(size + 1, 17)).astype(np.float32)
    path = tmp_path / "data.npz"
    np.savez(
        path,
        observations=obs[:-1],
        actions=g.uniform(-1, 1, size=(size, 6)).astype(np.float32),
        rewards=g.normal(size=size).astype(np.float32),
        next_observations=obs[1:],
        terminals=np.zeros(size, bool),
        timeouts=np.arange(size) % 100 == 99,
    )
    return path


def test_the_table_tells_ratios_and_options(data, tmp_path):
    words = ["source=files", "warmup=2", "rounds=1", "updates=4", "algos=[td3bc,prdc]"]
    words += [f"dataset={data}", "set={prdc.alpha:3.0}", f"out={tmp_path / 'out.json'}"]
    found = measure_speed(options(Options, words))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert set(found["methods"]) == {"td3bc graph", "td3bc eager", "prdc graph", "prdc eager"}
    assert found["methods"]["td3bc graph"]["time_ratio"] == 1.0
    assert found["methods"]["prdc eager"]["options"] == {"algo.alpha": 3.0}
    assert found["methods"]["prdc eager"]["products"] > 0
    networks = 2 * 4 * (256 * 257 + 256 * 18 + 257 * 6) + 2 * 8 * (256 * 257 + 256 * 24 + 257)
    row = found["methods"]["td3bc graph"]  # weights and their targets, Adam's two moments of each
    assert row["state_mb"] == pytest.approx(2 * networks / 1e6, rel=0.01)
    assert 1 < row["working_mb"] < 20


def test_the_certificate_tells_the_cost_of_uncertified_rows(data, tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "NOISES", (0.0, 2.0))
    words = ["source=files", "warmup=2", "rounds=1", "updates=4", f"out={tmp_path / 'out.json'}"]
    words += [f"dataset={data}", "set={td3bc.batch:32,prdc.batch:32}"]
    found = certificate.measure_certificate(options(certificate.Options, words))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert 0 <= found["certified"] <= 1
    shares = [row["certified"] for row in found["noises"]]
    assert shares[0] > 0.99  # the data's own actions are their own neighbors
    assert found["noises"][0]["self_match"] == 1.0
    assert shares[-1] < shares[0]


def test_options_of_methods_that_are_not_measured_are_refused(data):
    words = [f"dataset={data}", "source=files", "algos=[bc]", "set={prdc.alpha:3.0}"]
    with pytest.raises(ConfigError, match=r"got 'prdc\.alpha'"):
        measure_speed(options(Options, words))


def test_online_methods_and_peers_stand_in_the_same_table(data, tmp_path):
    words = ["source=files", "warmup=2", "rounds=2", "updates=4", "algos=[td3bc,sac]"]
    words += [f"dataset={data}", "peers=[plain]", "speeds=[graph]", "seeds=[1,2]"]
    words += [f"out={tmp_path / 'out.json'}"]
    before = os.sched_getaffinity(0)
    found = measure_speed(options(Options, words))
    assert os.sched_getaffinity(0) == before
    assert set(found["methods"]) == {"td3bc x1", "td3bc x2", "sac x1", "sac x2", "plain"}
    assert "products" not in found["methods"]["plain"]
    assert (tmp_path / "out.png").stat().st_size > 5_000


@pytest.mark.slow
def test_processes_at_once_are_told_beside_one(data):
    words = [f"dataset={data}", "source=files", "algos=[bc]", "speeds=[graph]", "warmup=20"]
    words += ["rounds=2", "updates=10"]
    count = len(os.sched_getaffinity(0))
    found = measure_speed(options(Options, [*words, f"processes={min(2, count)}"]))
    assert set(found.get("processes", {"1": 0})) == {str(i + 1) for i in range(min(2, count))}
    with pytest.raises(ConfigError, match=f"may use {count} core"):
        measure_speed(options(Options, [*words, f"processes={count + 1}"]))


def test_an_unknown_speed_names_the_nearest(data):
    words = [f"dataset={data}", "source=files", "algos=[bc]", "speeds=[graphs]"]
    with pytest.raises(ConfigError, match="did you mean 'graph'"):
        measure_speed(options(Options, words))


def test_an_unknown_peer_names_the_nearest(data):
    words = [f"dataset={data}", "source=files", "algos=[bc]", "warmup=2", "peers=[sb3-tf3]"]
    with pytest.raises(ConfigError, match="did you mean 'sb3-td3'"):
        measure_speed(options(Options, words))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "name a Python that has it"),
        (["peer_python=/nowhere/python"], "/nowhere/python does not start"),
        ([f"peer_python={sys.executable}"], "No module named 'd3rlpy'"),
    ],
)
def test_a_python_without_d3rlpy_is_told(data, given, told):
    words = [f"dataset={data}", "source=files", "algos=[bc]", "warmup=2", "peers=[d3rlpy]"]
    with pytest.raises((ConfigError, OSError), match=told):
        measure_speed(options(Options, words + given))


def test_peers_make_batches_as_large_as_ours(data, monkeypatch):
    seen = []
    monkeypatch.setattr(plain, "td3bc", lambda fields, batch, device: seen.append(batch) or list)
    words = ["source=files", "warmup=2", "rounds=1", "updates=4", "algos=[td3bc]"]
    words += [f"dataset={data}", "peers=[plain]", "set={td3bc.batch:32}"]
    monkeypatch.setattr("benchmarks.harness.speed.seconds", lambda run, count, device: 1.0)
    measure_speed(options(Options, words))
    assert seen == [32]


def test_the_common_style_computes_what_our_update_computes(monkeypatch):
    """From equal weights, rows and noise, ten updates end in equal weights."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(64, *shape, generator=g)  # noqa: E731
    fields = dict(
        obs=normal(3),
        act=normal(2).tanh(),
        reward=normal(),
        next_obs=normal(3),
        terminal=(normal() > 1).float(),
    )
    peer = plain.TD3BC(fields, 32, torch.device("cpu"))
    ours = td3bc.TD3BC(td3bc.Config(batch=32), Spec(3, 2), torch.Generator().manual_seed(1))

    def layers(net):
        return [layer for layer in net.net if isinstance(layer, torch.nn.Linear)]

    def pairs(peer_net, net, member=None):
        for theirs, (weight, bias) in zip(layers(peer_net), net.net.maps(), strict=True):
            picked = (weight, bias) if member is None else (weight[member], bias[member])
            yield theirs.weight, picked[0].mT
            yield theirs.bias, picked[1][0]

    def everything():
        for name in ("actor", "actor_target"):
            yield from pairs(getattr(peer, name), getattr(ours, name))
        for i, names in enumerate((("critic_1", "target_1"), ("critic_2", "target_2"))):
            yield from pairs(getattr(peer, names[0]), ours.critics, i)
            yield from pairs(getattr(peer, names[1]), ours.critics_target, i)

    with torch.no_grad():
        for theirs, mine in everything():
            theirs.copy_(mine)
    for step in range(10):
        rows, noise = torch.randint(64, (32,), generator=g), torch.randn(32, 2, generator=g)
        monkeypatch.setattr(torch, "randint", lambda *a, rows=rows, **k: rows)
        monkeypatch.setattr(torch, "randn_like", lambda x, noise=noise: noise)
        ours_noise = lambda x, mean, std, noise=noise, **k: x.copy_(std * noise)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "normal_", ours_noise)
        peer.update()
        ours.update({name: value[rows] for name, value in fields.items()}, ours.turn(step))
    for theirs, mine in everything():
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


def test_a_jax_block_that_does_not_fit_is_refused():
    pytest.importorskip("jax")
    from benchmarks.harness.peers import in_jax

    fields = {
        name: np.zeros((4, *shape), np.float32)
        for name, shape in dict(obs=(3,), act=(2,), reward=(), next_obs=(3,), terminal=()).items()
    }
    with pytest.raises(ValueError, match="blocks of 4, got 2"):
        in_jax.td3bc(fields, 2, block=4)(2)


@pytest.mark.slow
def test_every_peer_trains(data):
    for package in ("jax", "optax", "stable_baselines3"):
        pytest.importorskip(package)
    words = ["source=files", "warmup=2", "rounds=1", "updates=4", "algos=[td3bc]"]
    peers = [name for name in PEERS if name != "d3rlpy"]  # it needs a Python of its own
    words += [f"dataset={data}", f"peers={peers}", "speeds=[graph]"]
    found = measure_speed(options(Options, words))
    assert set(found["methods"]) == {"td3bc", *peers}
    assert {"jax", "stable-baselines3"} <= set(found["peers"])
