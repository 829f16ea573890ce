"""Recordings: what they repeat, what they leave out, and what they refuse."""

import ctypes

import pytest
import torch

from offrl.engine.capture.recording import NotRecordable, Recording, recorded
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

    recorded(work)
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


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum(),
        lambda x: x.nonzero().sum(),
        lambda x: x * 2 if bool((x > 0).any()) else x,
        lambda x: x * x.tolist()[0],
        lambda x: x * float(x.numpy()[0]),
        lambda x: x[torch.tensor([1, 0, 1], dtype=torch.uint8)],
        lambda x: x.clone().index_put_((x > 0,), x[0]),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.bincount(x.long(), minlength=3),
        lambda x: torch.unique(x, return_inverse=True)[1],
        lambda x: torch.unique(x[None], dim=0),
        lambda x: torch.unique_consecutive(x),
        lambda x: torch._unique(x)[0],
        lambda x: torch.repeat_interleave(x.long()),
    ],
)
def test_work_that_makes_the_host_wait_is_refused_after_it_was_done(work):
    x = torch.ones(3)
    with pytest.raises(NotRecordable, match="makes the host wait") as refused:
        Recording(lambda: work(x))
    assert torch.equal(refused.value.result, work(x))


def test_indices_that_are_numbers_do_not_make_the_host_wait():
    x, rows = torch.arange(4.0), torch.tensor([2, 0])
    replay = Recording(lambda: x.index_put((rows,), x[rows] + 1))
    x.mul_(10)
    rows.copy_(torch.tensor([1, 3]))
    assert replay().tolist() == [0, 11, 20, 31]


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
