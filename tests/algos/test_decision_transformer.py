from dataclasses import replace
from functools import partial

import pytest
import torch

from offrl.algos import decision_mamba
from offrl.algos.decision_transformer import METHOD, WIDTHS, Config, DecisionTransformer
from offrl.engine.method import Run, Task
from offrl.nets.sequence.multigrained import Backbone
from offrl.nets.sequence.transformer import Transformer
from tests.algos import cases
from tests.algos.cases import window
from tests.algos.sequences import SPEC, batch_equals_one_by_one, obeys_its_target, two_arms

SMALL = cases.CASES["decision_transformer"].config
make = partial(cases.make, "decision_transformer")


def predicted(algo, batch):
    with torch.no_grad():
        return algo.net.predict(batch)


def test_settings_are_the_authors():
    c = Config()
    assert (c.layers, c.dropout, c.context, c.batch) == (3, 0.1, 20, 64)
    assert (c.lr, c.weight_decay, c.lr_warmup, c.clip, c.steps) == (
        1e-4,
        1e-4,
        10_000,
        0.25,
        100_000,
    )
    assert WIDTHS["release"] == 128
    algo = make()
    (group,) = algo.opt.param_groups
    assert len(group["params"]) == len(list(algo.net.parameters()))
    assert (group["weight_decay"], group["betas"]) == (1e-4, (0.9, 0.999))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_each_size_matches_decision_mambas(size):
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    with torch.device("meta"):
        mine = count(Transformer(WIDTHS[size], 3, 1, 0.1, None))
        other = count(Backbone(*decision_mamba.SIZES[size], True, "causal", None))
    assert abs(mine / other - 1) < 0.02


def test_an_action_depends_on_what_came_before_it_and_nothing_else():
    algo, b = make(), window(short=False)
    before = predicted(algo, b)
    for name, own in (("act", False), ("obs", True), ("return_to_go", True)):
        changed = b | {name: b[name].clone()}
        changed[name][:, 3] *= -1
        after = predicted(algo, changed)
        assert torch.equal(before[:, :3], after[:, :3]), name
        assert (not torch.equal(before[:, 3], after[:, 3])) == own, name
        assert not torch.equal(before[:, 4], after[:, 4]), name


def test_the_step_is_added_before_the_norm():
    algo, b = make(), window()
    before = predicted(algo, b)
    with torch.no_grad():
        algo.net.tokens.embed_step.add_(1.0)  # LayerNorm removes what all features share
    torch.testing.assert_close(before, predicted(algo, b), rtol=1e-4, atol=1e-5)


def test_steps_beyond_the_table_share_its_last_row():
    algo, b = make(), window()
    ends = [
        predicted(algo, b | {"step_in_episode": b["step_in_episode"] + n}) for n in (2000, 5000)
    ]
    assert torch.equal(*ends)


def test_pads_change_neither_predictions_nor_the_loss():
    algo, b = make(replace(SMALL, dropout=0.0)), window()
    pad = b["mask"] == 0
    other = b | {name: b[name].clone() for name in ("obs", "act", "return_to_go")}
    for name in ("obs", "act", "return_to_go"):
        other[name][pad] = 100.0
    torch.testing.assert_close(algo.loss(b)[0], algo.loss(other)[0])
    cut = {name: value[2:3, 2:] for name, value in b.items()}
    torch.testing.assert_close(predicted(algo, b)[2, 2:], predicted(algo, cut)[0])


def test_the_loss_is_the_mean_over_real_steps_and_dimensions():
    algo, b = make(replace(SMALL, dropout=0.0)), window()
    error = (algo.net(b) - b["act"])[b["mask"].bool()]
    torch.testing.assert_close(algo.loss(b)[0], error.square().mean())


def test_the_learning_rate_warms_up_linearly():
    algo = make(replace(SMALL, lr=1e-2, lr_warmup=4))
    rates = []
    for _ in range(6):
        algo.update(window(), 0)
        rates.append(float(algo.opt.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_gradients_are_clipped_jointly():
    algo = make(replace(SMALL, clip=1e-3))
    algo.update(window(), 0)
    total = torch.stack([p.grad.square().sum() for p in algo.net.parameters()]).sum().sqrt()
    assert float(total) == pytest.approx(1e-3, rel=1e-2)


def test_episodes_played_together_take_the_actions_of_each_alone():
    batch_equals_one_by_one(make())


def test_it_takes_the_arm_whose_return_it_is_asked_for():
    algo = make(replace(SMALL, targets=(5.0, 0.0), lr=3e-3, lr_warmup=10))
    obeys_its_target(algo, METHOD, 100)


def test_dropout_is_of_the_loss_and_not_of_acting():
    algo, zero = make(replace(SMALL, dropout=0.5)), torch.zeros(2)
    now = {"obs": torch.ones(2, 2), "start": zero + 1, "reward": zero, "scenario": zero.long()}
    assert torch.equal(algo.act(now)[0], algo.act(now)[0])
    assert all(module.training for module in algo.net.modules())
    assert not torch.equal(algo.loss(window())[0], algo.loss(window())[0])


def test_observations_are_standardized_by_the_data_with_a_small_constant():
    algo, data = make(), two_arms()
    data.fields["obs"] = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(0)) + 3
    (stage,) = METHOD.stages(algo, Task(SPEC, data), Run(steps=1))
    std = data["obs"].std(0, unbiased=False) + 1e-6
    torch.testing.assert_close(algo.standardize.std, std)
    found = stage.start()(algo.generator)
    last, row = found["obs"][:, -1], found["index"] + found["mask"].sum(-1).long() - 1
    torch.testing.assert_close(last, (data["obs"][row] - data["obs"].mean(0)) / std)


def test_scenarios_are_the_returns_to_ask_for():
    assert METHOD.scenarios(SMALL) == ("target-3", "target-1")


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="no target returns"):
        make(replace(SMALL, targets=()))
    with pytest.raises(ValueError, match="carries no seed axis"):
        DecisionTransformer(SMALL, SPEC, torch.Generator(), (2,))
