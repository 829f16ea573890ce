"""The nearest-neighbor search of PRDC: every path against the definition, and the cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from offrl.data import neighbors
from offrl.data.neighbors import StateNeighbors, brute_force, candidates, make_keys, state_lists
from offrl.errors import DataError

BETAS = (0.0, 0.5, 2.0, 7.5)


def rows(size=5000, obs_dim=5, act_dim=3, copies=200, seed=0):
    """Random rows of which `copies` repeat an earlier row and as many only its state."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(size, obs_dim, generator=g)
    act = torch.rand(size, act_dim, generator=g) * 2 - 1
    source = torch.randint(size // 2, (2, copies), generator=g)
    place = size // 2 + torch.randperm(size // 2, generator=g)[: 2 * copies].view(2, copies)
    obs[place] = obs[source]
    act[place[0]] = act[source[0]]
    return obs, act


def queries(act, count=256, sd=0.3, seed=1, first=0):
    """Rows of the data, and actions around theirs."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(first, len(act), (count,), generator=g)
    noise = sd * torch.randn(count, act.shape[-1], generator=g)
    return index, (act[index] + noise).clamp(-1, 1)


def definition(obs, act, index, pi, beta):
    """Differences, squares and sums in float64; argmin over rows in their order."""
    best = []
    for i, p in zip(index.tolist(), pi.double(), strict=True):
        state = (obs[i].double() - obs.double()).square().sum(-1)
        cost = beta**2 * state + (p - act.double()).square().sum(-1)
        best.append(int((cost == cost.min()).nonzero()[0, 0]))
    return torch.tensor(best)


@pytest.fixture(scope="module")
def data():
    return rows()


@pytest.fixture(scope="module")
def table(data):
    return StateNeighbors.build(*data, "digest", k=16)


@pytest.mark.parametrize("beta", BETAS)
def test_every_path_returns_the_definition(data, table, beta):
    index, pi = queries(data[1])
    pi[:64] = data[1][index[:64]]  # a cost of zero, shared with copies
    truth = definition(*data, index, pi, beta)
    assert torch.equal(brute_force(*data, index, pi, beta), truth)
    assert torch.equal(table.nearest(index, pi, beta)[0], truth)
    row, info = replace(table, budget=256).nearest(index, pi, beta)
    assert torch.equal(row, truth)
    assert info["overflow"] == 0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("way", ["tree", "products"])
def test_both_full_searches_return_the_definition(data, table, monkeypatch, way, beta):
    monkeypatch.setattr(neighbors, "fastest", lambda ways, *sample: way)
    monkeypatch.setattr(neighbors, "brute_force", None)  # they prove every row themselves
    index, pi = queries(data[1], sd=1.0)
    truth = definition(*data, index, pi, beta)
    for least in (1e9, float((pi - data[1][index]).double().square().sum(-1).max())):
        found = replace(table, trees={}, finders={}).search(
            index, pi, beta, torch.full((256,), least, dtype=torch.float64)
        )
        assert torch.equal(found, truth)


def test_on_cuda_every_open_query_is_searched_and_no_tree_is_built(data, table, monkeypatch):
    class Cuda(torch.Tensor):
        is_cuda = True  # this machine may have none; the answers on one are the gpu test's

    monkeypatch.setattr(neighbors, "Tree", None)
    index, pi = queries(data[1], sd=2.0)
    far = replace(table, act=table.act.as_subclass(Cuda), trees={}, finders={})
    row, info = far.nearest(index, pi, 0.5)
    assert info["uncertified"] * 256 > 64
    assert torch.equal(row.as_subclass(torch.Tensor), definition(*data, index, pi, 0.5))


def test_the_number_of_queries_decides_the_search(data, table, monkeypatch):
    asked = []

    def fastest(ways, index, *sample):
        asked.append(len(index))
        return "tree" if len(index) < 16 else "products"

    monkeypatch.setattr(neighbors, "fastest", fastest)
    index, pi = queries(data[1], sd=1.0)
    least = torch.full((256,), 1e9, dtype=torch.float64)
    fresh = replace(table, trees={}, finders={})
    for count in (1, 2, 3, 64, 100, 1):
        found = fresh.search(index[:count], pi[:count], 2.0, least[:count])
        assert torch.equal(found, definition(*data, index[:count], pi[:count], 2.0))
    assert asked == [1, 2, 64]
    assert len(fresh.trees) == 1


def test_lists_decide_most_rows_near_the_data(data, table):
    index, pi = queries(data[1], sd=0.1)
    _, info = table.nearest(index, pi, 2.0)
    assert info["uncertified"] < 0.01


def test_copies_answer_with_their_lowest_row(data, table):
    obs, act = data
    index = torch.arange(2500, 5000)
    row, info = table.nearest(index, act[index], 2.0)
    assert (row <= index).all()
    assert (row < index).sum() >= 200
    assert torch.equal(obs[row], obs[index])
    assert torch.equal(act[row], act[index])
    assert info["self_match"] == (row == index).float().mean()


@pytest.mark.parametrize("share_action", [True, False])
@pytest.mark.parametrize("way", ["tree", "products"])
def test_more_copies_of_a_state_than_the_list_holds(monkeypatch, way, share_action):
    monkeypatch.setattr(neighbors, "fastest", lambda ways, *sample: way)
    obs, act = rows(2000, copies=0)
    obs[100:1900] = obs[50]
    if share_action:
        act[100:1900] = act[50]
    table = StateNeighbors.build(obs, act, "digest", k=4)
    index, pi = queries(act, 64)
    for beta in BETAS:
        truth = definition(obs, act, index, pi, beta)
        assert torch.equal(table.nearest(index, pi, beta)[0], truth)


def test_a_neighbor_outside_the_list_is_not_certified_and_found():
    obs = torch.linspace(0, 1, 1000).unsqueeze(-1)
    act = torch.full((1000, 1), -1.0)
    act[600] = 1.0
    table = StateNeighbors.build(obs, act, "digest", k=8)
    index, pi = torch.tensor([500]), torch.tensor([[1.0]])
    row, info = table.nearest(index, pi, 1.0)
    assert row == 600
    assert info["uncertified"] == 1
    row, info = table.nearest(index, pi, 1000.0)
    assert row == 500
    assert info["uncertified"] == 0


def test_rows_beyond_the_budget_are_counted_and_keep_the_best_of_their_list(data, table):
    index, pi = queries(data[1], sd=2.0)
    exact, info = table.nearest(index, pi, 0.5)
    hard = int(info["uncertified"] * 256)
    assert hard > 40
    row, info = replace(table, budget=40).nearest(index, pi, 0.5)
    assert info["overflow"] * 256 == hard - 40
    assert 0 < (row != exact).sum() <= hard - 40
    distance = lambda j: (  # noqa: E731
        0.25 * (data[0][index] - data[0][j]).square().sum(-1) + (pi - data[1][j]).square().sum(-1)
    )
    assert (distance(row) <= (pi - data[1][index]).square().sum(-1) + 1e-6).all()


def test_the_penalty_never_exceeds_that_of_the_own_action(data, table):
    act = data[1]
    index, pi = queries(act, 1000, sd=1.0)
    for beta in BETAS:
        nearest = act[table.nearest(index, pi, beta)[0]]
        own = (pi - act[index]).double().square().sum(-1)
        assert ((pi - nearest).double().square().sum(-1) <= own).all()


def test_large_beta_returns_the_own_row_of_distinct_states():
    obs, act = rows(copies=0)
    index, pi = queries(act, sd=1.0)
    row, info = StateNeighbors.build(obs, act, "digest").nearest(index, pi, 1e6)
    assert torch.equal(row, index)
    assert info["self_match"] == 1


def test_seeds_are_separate_batches(data, table):
    batches = [queries(data[1], seed=seed) for seed in range(3)]
    index, pi = (torch.stack(part) for part in zip(*batches, strict=True))
    for one in (table, replace(table, budget=16)):
        row, info = one.nearest(index, pi, 0.5)
        assert row.shape == (3, 256)
        for seed, batch in enumerate(batches):
            alone, alone_info = one.nearest(*batch, 0.5)
            assert torch.equal(row[seed], alone)
            for name, value in alone_info.items():
                assert info[name][seed] == value


@pytest.mark.parametrize("way", ["tree", "products"])
def test_far_rows_do_not_loosen_the_proof(data, monkeypatch, way):
    monkeypatch.setattr(neighbors, "fastest", lambda ways, *sample: way)
    obs, act = data[0].clone(), data[1]
    obs[::50] *= 300
    table = StateNeighbors.build(obs, act, "digest")
    index, pi = queries(act)
    truth = definition(obs, act, index, pi, 2.0)
    assert torch.equal(table.nearest(index, pi, 2.0)[0], truth)
    ordinary = index % 50 != 0
    monkeypatch.setattr(neighbors, "brute_force", None)
    found = table.search(index[ordinary], pi[ordinary], 2.0, torch.full((1,), 99.0))
    assert torch.equal(found, truth[ordinary])


def test_actions_that_are_not_numbers_do_not_leave_the_data(data, table):
    row, _ = table.nearest(torch.arange(4), torch.full((4, 3), torch.nan), 2.0)
    assert ((row >= 0) & (row < len(data[1]))).all()


# --- the lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.2, 10.0])
def test_lists_hold_the_nearest_states_and_bound_the_rest(data, spread):
    obs = spread * data[0][:1000]
    near, square, reach = state_lists(obs, 16, progress=False)
    truth = (obs.unsqueeze(0).double() - obs.unsqueeze(1).double()).square().sum(-1)
    torch.testing.assert_close(truth.gather(-1, near.long()), square, rtol=1e-12, atol=0)
    outside = truth.scatter(-1, near.long(), torch.inf).amin(-1)
    assert (reach <= outside).all()
    nearest = truth.sort(-1).values[:, :16]
    bound = nearest[:, -1].clamp(max=neighbors.RADIUS**2)
    full = (reach - bound).abs() < 1e-6 * bound
    assert full.float().mean() > 0.99  # a row that fills short lists is repeated in its own
    within = nearest < neighbors.RADIUS**2
    torch.testing.assert_close(square[within], nearest[within], rtol=1e-12, atol=0)


def test_lists_by_products_hold_the_nearest_states(data):
    obs, none = data[0], data[0][:, :0]
    truth = (obs[:200].unsqueeze(1).double() - obs.double()).square().sum(-1)
    keys = make_keys(obs, none)
    near, floor = candidates(keys, obs[:200], none[:200], 1.0, 16)
    square = (obs[:200].unsqueeze(1).double() - keys[near][..., :-2]).square().sum(-1)
    torch.testing.assert_close(square.sort(-1).values[:, :16], truth.sort(-1).values[:, :16])
    inside = near.masked_fill(near >= len(obs), 0)
    outside = truth.scatter(-1, inside, torch.inf).amin(-1)
    assert (floor <= outside).all()
    assert (floor > 0.99 * outside).float().mean() > 0.1


def test_lists_may_be_longer_than_the_data():
    obs, act = rows(10, copies=0)
    table = StateNeighbors.build(obs, act, "digest", k=16)
    assert table.rows.shape == (10, 10)
    index, pi = queries(act, 32, sd=1.0)
    truth = definition(obs, act, index, pi, 0.5)
    assert torch.equal(table.nearest(index, pi, 0.5)[0], truth)


# --- the cache ------------------------------------------------------------------------------------


def entry(cache):
    (folder,) = (cache / "neighbors").glob("[!.]*-v*")
    return folder


def test_a_second_build_reads_the_first_ones_lists(data, table, tmp_path, monkeypatch):
    first = StateNeighbors.build(*data, "digest", cache=tmp_path)

    def forbidden(*arguments):
        raise AssertionError("built again")

    monkeypatch.setattr(neighbors, "state_lists", forbidden)
    second = StateNeighbors.build(*data, "digest", cache=tmp_path)
    for name in ("rows", "square", "reach"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(first, name), getattr(table, name))
    for other in ({"k": 8}, {"digest": "another"}, {"obs_std": data[0] + 1}):
        arguments = {"obs_std": data[0], "act": data[1], "digest": "digest", "cache": tmp_path}
        with pytest.raises(AssertionError, match="built again"):
            StateNeighbors.build(**arguments | other)


@pytest.mark.parametrize("damage", ["short", "missing", "shape", "rows"])
def test_a_damaged_entry_is_named(data, tmp_path, damage):
    StateNeighbors.build(*data, "digest", cache=tmp_path)
    path = entry(tmp_path) / "rows.npy"
    if damage == "short":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "missing":
        path.unlink()
    elif damage == "shape":
        np.save(path, np.zeros((7, 16), np.int32))
    else:
        np.save(path, np.full((5000, 16), 5000, np.int32))
    with pytest.raises(DataError, match=r"is damaged.*move it away"):
        StateNeighbors.build(*data, "digest", cache=tmp_path)


def test_an_interrupted_build_leaves_nothing(data, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(neighbors, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        StateNeighbors.build(*data, "digest", cache=tmp_path)
    assert [path.suffix for path in (tmp_path / "neighbors").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs, act: (obs.double(), act), "float32"),
        (lambda obs, act: (obs[1:], act), "equal length"),
        (lambda obs, act: (obs.clone().index_fill_(0, torch.tensor([3]), torch.nan), act), "NaN"),
    ],
)
def test_unusable_rows_are_refused(data, change, message):
    with pytest.raises(DataError, match=message):
        StateNeighbors.build(*change(*data), "digest")


@pytest.mark.gpu
def test_cuda_agrees_with_the_definition(data):
    table = StateNeighbors.build(*data, "digest", device="cuda")
    index, pi = queries(data[1])
    for beta in BETAS:
        truth = definition(*data, index, pi, beta)
        row, _ = table.nearest(index.cuda(), pi.cuda(), beta)
        assert torch.equal(row.cpu(), truth)
    index, pi = queries(data[1], sd=2.0)  # more open queries than a budget would take
    row, info = table.nearest(index.cuda(), pi.cuda(), 0.5)
    assert info["uncertified"] * 256 > 64
    assert torch.equal(row.cpu(), definition(*data, index, pi, 0.5))
