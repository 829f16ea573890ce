import doctest

import torch

import offrl.data.windows as module
from offrl.data import Dataset, prepare
from offrl.data.windows import act_taken, extend, returns_to_go, windows
from offrl.nets import Standardize

STARTS = [0, 1, 4]  # episodes of 1, 3 and 6 rows
K, SCALE = 4, 10.0


def toy():
    g = torch.Generator().manual_seed(0)
    obs, act = torch.randn(10, 2, generator=g), torch.randn(10, 3, generator=g).tanh()
    fields = dict(obs=obs, act=act, reward=torch.randn(10, generator=g))
    return Dataset(fields, torch.tensor(STARTS), torch.zeros(3), "toy")


def episode(row):
    first = max(s for s in STARTS if s <= row)
    return first, min([s for s in STARTS if s > row], default=10)


def batch(count=64, **options):
    return windows(toy(), count, K, SCALE, **options)(torch.Generator().manual_seed(1))


def test_docstring_examples():
    assert doctest.testmod(module).failed == 0


def test_return_to_go_is_the_sum_to_the_end_of_the_episode():
    data = toy()
    found = returns_to_go(data["reward"], data.starts)
    for row in range(10):
        rest = data["reward"][row : episode(row)[1]].sum()
        torch.testing.assert_close(found[row], rest)
    last = [s - 1 for s in STARTS[1:]] + [9]
    torch.testing.assert_close(found[last], data["reward"][last])


def test_return_to_go_keeps_the_last_reward_exact_in_a_long_data_set():
    reward = torch.rand(200_000) + 1000.0
    found = returns_to_go(reward, torch.arange(0, 200_000, 1000))
    assert torch.equal(found[999::1000], reward[999::1000])


def test_windows_hold_consecutive_rows_of_one_episode_and_pads_before_them():
    data, b = toy(), batch()
    rest = returns_to_go(data["reward"], data.starts) / SCALE
    for i, start in enumerate(b["index"].tolist()):
        first, end = episode(start)
        count = min(K, end - start)
        assert b["mask"][i].tolist() == [0.0] * (K - count) + [1.0] * count
        real = slice(K - count, K)
        rows = slice(start, start + count)
        assert torch.equal(b["obs"][i, real], data["obs"][rows])
        assert torch.equal(b["act"][i, real], data["act"][rows])
        assert torch.equal(b["return_to_go"][i, real], rest[rows])
        assert b["step_in_episode"][i, real].tolist() == list(
            range(start - first, start - first + count)
        )
    assert b["step_in_episode"].dtype == torch.int64
    assert {int(m.sum()) for m in b["mask"]} == {1, 2, 3, 4}


def test_pads_hold_the_released_codes_values():
    mean, std = toy().statistics(eps=1e-6)
    b = batch(transform=prepare(Standardize(2, mean, std, None)))
    pad = b["mask"] == 0
    assert pad.any()
    torch.testing.assert_close(b["obs"][pad], (-mean / std).expand(int(pad.sum()), 2))
    assert (b["act"][pad] == -10).all()
    assert (b["return_to_go"][pad] == 0).all()
    assert (b["step_in_episode"][pad] == 0).all()


def test_every_row_starts_a_window_equally_often_so_episodes_count_by_length():
    counts = batch(20_000)["index"].bincount(minlength=10) / 20_000
    assert (counts - 0.1).abs().max() < 0.01  # the standard deviation is 0.002


def test_data_beyond_the_budget_give_the_same_windows():
    one, other = batch(), batch(budget=0)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_stacked_seeds_lead_the_shapes():
    b = batch(5, seeds=(2,))
    assert b["obs"].shape == (2, 5, K, 2)
    assert b["return_to_go"].shape == b["mask"].shape == (2, 5, K)


def walk(rows, starts, goals):
    """Windows of a policy that repeats the data's actions of `rows` (T, B)."""
    data, window, found = toy(), None, []
    reward = torch.zeros(rows.shape[1])
    for t, row in enumerate(rows):
        now = {"obs": data["obs"][row], "start": starts[t], "reward": reward}
        window = act_taken(extend(window, now, goals, SCALE, K, 3), data["act"][row])
        found.append(window)
        reward = data["reward"][row]
    return found


def test_the_windows_of_a_policy_are_those_it_was_trained_on():
    data = toy()
    rest = returns_to_go(data["reward"], data.starts) / SCALE
    rows = torch.arange(4, 10).unsqueeze(1)
    starts = torch.zeros(6, 1)
    starts[0] = 1
    for t, window in enumerate(walk(rows, starts, rest[4:5])):
        count = min(K, t + 1)
        assert window["mask"][0].tolist() == [0.0] * (K - count) + [1.0] * count
        seen = slice(4 + t + 1 - count, 4 + t + 1)
        for name, value in (("obs", data["obs"]), ("act", data["act"]), ("return_to_go", rest)):
            torch.testing.assert_close(window[name][0, -count:], value[seen])
        assert window["step_in_episode"][0, -count:].tolist() == list(range(t + 1 - count, t + 1))


def test_return_to_go_ends_at_the_target_minus_all_that_was_earned():
    data = toy()
    starts = torch.zeros(6, 1)
    starts[0] = 1
    last = walk(torch.arange(4, 10).unsqueeze(1), starts, torch.tensor([7.0]))[-1]
    earned = data["reward"][4:9].sum()  # before the last action
    torch.testing.assert_close(last["return_to_go"][0, -1], 7.0 - earned / SCALE)


def test_a_restart_empties_the_window_of_its_row_alone():
    rows = torch.arange(4, 10).unsqueeze(1).expand(6, 2)
    starts = torch.zeros(6, 2)
    starts[0] = 1
    whole = walk(rows, starts, torch.ones(2))
    starts[3, 1] = 1
    cut = walk(rows, starts, torch.ones(2))
    for name, value in cut[-1].items():
        assert torch.equal(value[0], whole[-1][name][0])
    assert cut[3]["mask"][1].tolist() == [0, 0, 0, 1]
    assert cut[3]["step_in_episode"][1, -1] == 0
    assert cut[3]["return_to_go"][1].tolist() == [0, 0, 0, 1]
