"""Captured updates: what a recording leaves out, what it refuses, and how a way is chosen."""

import ctypes
import shutil

import pytest
import torch

from offrl.engine.capture import updates as capture
from offrl.engine.capture.recording import NotRecordable, Recording
from offrl.engine.capture.updates import ROUNDS, WARM_UP, Updates, tried
from offrl.engine.method import Stage
from offrl.nets.kernels.opaque import opaque

X, Y = torch.zeros(1), torch.ones(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_replay_repeats_the_work_with_new_values_and_new_random_numbers():
    x, g = torch.ones(3), generator()
    replay = Recording(lambda: (x * 2 + torch.rand(3, generator=g)).sum())
    first = replay.first.clone()
    x.fill_(5)
    again = replay().clone()
    h = generator()
    draws = [torch.rand(3, generator=h) for _ in range(2)]
    assert torch.equal(first, (torch.ones(3) * 2 + draws[0]).sum())
    assert torch.equal(again, (x * 2 + draws[1]).sum())


def test_gradients_and_the_optimizer_are_part_of_a_replay():
    def made():
        p = torch.nn.Parameter(torch.arange(4.0))
        opt = torch.optim.Adam([p], lr=0.1, fused=True)

        def work():
            loss = (p * p.detach().cos()).square().sum()
            (p.grad,) = torch.autograd.grad(loss, [p])
            opt.step()
            return loss.detach()

        return p, work

    (p, work), (q, same) = made(), made()
    work(), same()  # makes the optimizer's state
    replay = Recording(work)
    same()
    for _ in range(20):
        assert torch.equal(replay(), same())
    assert torch.equal(p, q)


def test_views_and_what_never_changes_are_left_out():
    x = torch.randn(4, 4)
    replay = Recording(lambda: x.mT[1:] * (torch.ones_like(x[0]) * 3).exp())
    assert [str(run) for run, _, _ in replay.steps] == ["aten.mul.out"]
    x.normal_()
    assert torch.equal(replay(), x.mT[1:] * (torch.ones(4) * 3).exp())


def test_zeros_that_are_added_to_start_from_zero_in_every_replay():
    x = torch.ones(3)

    def work():
        total = torch.zeros(3)
        total += x
        return total * 1

    replay = Recording(work)
    replay()
    assert torch.equal(replay(), x)


def test_results_that_are_done_with_lend_their_memory():
    x = torch.randn(1000)

    def work():
        y = x
        for _ in range(10):
            y = y.sin() + 1
        return y

    replay = Recording(work)
    storages = {
        out.untyped_storage().data_ptr()
        for _, _, k in replay.steps
        for out in k.values()
        if isinstance(out, torch.Tensor)
    }
    assert len(replay.steps) == 20
    assert len(storages) == 2
    assert replay.memory == 2 * 1000 * 4
    assert torch.equal(replay(), work())


def test_trying_work_that_is_to_be_captured_leaves_no_node_of_its_graph():
    """A parameter's node is made anew by the next forward pass, on that pass's stream."""
    p = torch.ones(3, requires_grad=True)
    node = lambda: (p * 2).grad_fn.next_functions[0][0]  # noqa: E731
    kept = []

    def work():
        kept.append(p * 2)
        kept[-1].grad_fn.next_functions[0][0].metadata["of"] = "the trial"
        (grad,) = torch.autograd.grad(kept.pop().sum(), p)
        return grad

    tried(work)
    assert "of" not in node().metadata
    held = p * 2  # while something holds the graph, the node is the same
    held.grad_fn.next_functions[0][0].metadata["of"] = "another"
    assert node().metadata["of"] == "another"


def test_what_is_changed_from_outside_is_known():
    x, y, z = torch.zeros(3), torch.zeros(4), torch.zeros(5)
    replay = Recording(lambda: (x.add_(1).sum() + y.sum(), z.view(5).mul_(2)))
    assert {t.data_ptr() for t in replay.written} == {x.data_ptr(), z.data_ptr()}


def test_gradients_that_nobody_asks_for_are_no_results():
    x, grad, g = torch.randn(4, 3), torch.randn(4, 3), generator()
    scale, mean, deviation = torch.ones(3), torch.zeros(4, 1), torch.ones(4, 1)

    def work(noise):
        return torch.ops.aten.native_layer_norm_backward(
            grad * noise, x, [3], mean, deviation, scale, scale, [True, False, False]
        )[0].sum()

    replay = Recording(lambda: work(torch.rand((), generator=g)))
    h = generator()
    draws = [torch.rand((), generator=h) for _ in range(2)]
    assert torch.equal(replay.first, work(draws[0]))
    assert torch.equal(replay(), work(draws[1]))


def test_several_results_and_operators_without_a_form_for_given_memory():
    x = torch.randn(3, 8)

    def work():
        values, index = x.sort(-1)
        parts = torch._foreach_add([values, x], 1.0)
        return values, index, parts[0], torch.nn.functional.layer_norm(x, (8,))

    replay = Recording(work)
    x.normal_()
    for one, other in zip(replay(), work(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum(),
        lambda x: x.nonzero().sum(),
        lambda x: x * 2 if bool((x > 0).any()) else x,
        lambda x: x * x.tolist()[0],
        lambda x: x * float(x.numpy()[0]),
    ],
)
def test_work_that_waits_for_a_value_is_refused_after_it_was_done(work):
    x = torch.ones(3)
    with pytest.raises(NotRecordable, match="makes the host wait") as refused:
        Recording(lambda: work(x))
    assert torch.equal(refused.value.result, work(x))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.nn.functional.batch_norm(x.view(3, 1), X, Y, training=True),
        lambda x: (x.view(3, 1) * 1).t_() + 0,
        lambda x: x.to_sparse().coalesce().values() * 1,
        lambda x: torch.nn.functional.rrelu(x, training=True),
    ],
)
def test_operators_that_cannot_be_repeated_are_refused(work):
    with pytest.raises(NotRecordable):
        Recording(lambda: work(torch.ones(3) * 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_plain_memory_are_refused_after_the_work_was_done():
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    work = lambda: (torch.nested.nested_tensor(parts) * 2).to_padded_tensor(0.0).sum()  # noqa: E731
    with pytest.raises(NotRecordable) as refused:
        Recording(work)
    assert float(refused.value.result) == 36


def test_the_type_of_a_sum_is_kept():
    x = torch.ones(3)
    replay = Recording(lambda: x.sum(dtype=torch.float64))
    x.fill_(2)
    assert torch.equal(replay(), torch.tensor(6.0, dtype=torch.float64))


def test_memory_filled_behind_torchs_back_is_refused():
    def fill(x):
        out = torch.empty(3)
        ctypes.memmove(out.data_ptr(), x.data_ptr(), 12)
        return out

    x = torch.ones(3)
    with pytest.raises(NotRecordable, match="no operator of torch"):
        Recording(lambda: fill(x) + 1)
    replay = Recording(lambda: opaque(lambda x: (fill(x),), x)[0] + 1)
    x.fill_(4)
    assert torch.equal(replay(), torch.full((3,), 5.0))


def test_an_opaque_call_may_look_at_values():
    x = torch.tensor([1.0, -1.0])
    pick = lambda x: (x if x.sum() > 0 else -x,)  # noqa: E731
    replay = Recording(lambda: opaque(pick, x * 1)[0].clone())
    x.copy_(torch.tensor([1.0, 1.0]))
    assert torch.equal(replay(), x)


# --- the choice ----------------------------------------------------------------------------------


def toy(update=None, cycle=2):
    """A running sum of random numbers; every second update doubles them."""
    total, g = torch.zeros(3), generator()

    def plain(batch, step):
        total.add_(batch["x"], alpha=1 + step % 2)
        return {"x": batch["x"].sum(), "twice": 2 * batch["x"][:1]}

    sample = lambda g: {"x": torch.rand(3, generator=g)}  # noqa: E731
    return Stage("toy", None, lambda: sample, update or plain, cycle), sample, g, total


def course(speed, steps, start=0, **kwargs):
    stage, sample, g, total = toy(**kwargs)
    said = []
    run = Updates(stage, sample, g, speed, said.append)
    metrics = [run(step) for step in range(start, steps)]
    return total, metrics, said


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("speed", ["graph", "auto"])
def test_every_way_gives_the_same_run(speed, start):
    total, metrics, said = course(speed, 200, start)
    expected, theirs, _ = course("eager", 200, start)
    assert torch.equal(total, expected)
    assert not any("as written:" in text for text in said)
    for one, other in zip(metrics, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) and one[k].shape == other[k].shape for k in one)


def test_metrics_stay_what_they_were_while_later_updates_run():
    _, metrics, said = course("graph", 100)
    assert not said
    assert len({float(m["x"]) for m in metrics}) == 100


def test_auto_measures_and_says_what_it_found():
    _, _, said = course("auto", 2 * (WARM_UP + 2 + 2 * ROUNDS) + 4)
    (text,) = said
    assert text.startswith("an update takes ")
    assert "as written, " in text
    assert text.endswith(" ms captured")


def test_updates_that_cannot_be_captured_run_as_written_and_say_why():
    seen = []

    def waiting(batch, step):
        seen.append(step)
        return {"x": batch["x"] * float(batch["x"].sum())}

    _, metrics, said = course("auto", 40, update=waiting)
    assert seen == list(range(40))  # each made once
    assert said == [
        "updates run as written: aten._local_scalar_dense.default makes the host wait for a value"
    ]
    assert len({float(m["x"][0]) for m in metrics}) == 40


def test_a_replay_that_differs_from_the_update_is_not_used():
    """Numbers of Python are fixed in a replay; the update as written stands, made once."""
    seen, total = [], torch.zeros(1)

    def counting(batch, step):
        seen.append(step)
        total.add_(step)
        return {"x": total.clone()}

    _, metrics, said = course("graph", 40, update=counting)
    assert said == ["updates run as written: a replay does not give what the update gives"]
    assert seen == list(range(40))
    assert [float(m["x"]) for m in metrics] == [sum(range(i + 1)) for i in range(40)]


def test_a_number_of_python_that_changes_later_stops_the_run(monkeypatch):
    monkeypatch.setattr(capture, "CHECKED", 5)
    total, scale = torch.zeros(1), [1.0]

    def scaled(batch, step):
        total.add_(batch["x"].sum() * scale[0])
        return {}

    stage, sample, g, _ = toy(scaled)
    run = Updates(stage, sample, g, "graph")
    for step in range(20):
        run(step)
    scale[0] = 2.0
    with pytest.raises(ValueError, match="Start again with speed=eager"):
        [run(step) for step in range(20, 60)]


def test_a_replay_that_fails_leaves_the_update_as_written():
    """An LSTM's kernel does not take given memory."""
    seen, lstm = [], torch.nn.LSTM(3, 2)

    def recurrent(batch, step):
        seen.append(step)
        return {"x": lstm(batch["x"].view(1, 1, 3))[0].sum()}

    _, metrics, said = course("auto", 40, update=recurrent)
    assert seen == list(range(40))
    assert len(said) == 1 and said[0].startswith("updates run as written: ")  # noqa: PT018
    g = generator()
    for found in metrics:
        x = torch.rand(3, generator=g)
        assert torch.equal(found["x"], lstm(x.view(1, 1, 3))[0].sum())


def test_a_metric_that_is_nan_is_no_difference():
    def undefined(batch, step):
        return {"x": batch["x"].sum() * float("nan"), "count": torch.tensor(3)}

    _, metrics, said = course("graph", 40, update=undefined)
    assert not said
    assert all(bool(m["x"].isnan()) and int(m["count"]) == 3 for m in metrics)


def test_without_a_compiler_updates_run_as_written(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    total, _, said = course("compile", 20)
    assert "torch.compile needs" in said[0]
    assert torch.equal(total, course("eager", 20)[0])
