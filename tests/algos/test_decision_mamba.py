from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from offrl import config as settings
from offrl.algos import decision_mamba
from offrl.algos.decision_mamba import METHOD, Config, DecisionMamba
from offrl.data.windows import act_taken, extend
from offrl.engine.method import Run, Task
from offrl.engine.optim import warm_up
from offrl.nets.sequence.multigrained import Backbone
from offrl.regularizers import self_evolution
from tests.algos import cases
from tests.algos.cases import window
from tests.algos.sequences import SPEC, batch_equals_one_by_one, obeys_its_target, played, two_arms

SMALL = cases.CASES["decision_mamba"].config
make = partial(cases.make, "decision_mamba")
RELEASE = replace(SMALL, grouping="release", mask_pads=False)


def predicted(algo, batch):
    with torch.no_grad():
        return algo.net.action(algo.net(batch)[:, :, 1])


def one_block(algo):
    algo.net.backbone.blocks = algo.net.backbone.blocks[:1]
    return algo


# --- the network ---------------------------------------------------------------------------------


def test_the_backbone_of_the_released_size_has_the_released_number_of_parameters():
    with torch.device("meta"):
        layers, width = decision_mamba.SIZES["release"]
        net = Backbone(layers, width, True, "causal", None)
    assert sum(p.numel() for p in net.parameters()) == 223_544_064


def sees_its_label(algo, length):
    """Steps t whose predicted action depends on the actions of t or later steps."""
    b = window(1, length, short=False)
    act = b["act"].requires_grad_()
    out = algo.net.action(algo.net(b)[:, :, 1])
    found = []
    for t in range(length):
        (grad,) = torch.autograd.grad(out[0, t].sum(), act, retain_graph=True)
        if grad[0, t:].abs().max() > 0:
            found.append(t)
    return found


def test_with_causal_groups_no_prediction_sees_its_label():
    assert sees_its_label(make(), 20) == []


@pytest.mark.parametrize("length", [10, 20, 30])
def test_with_the_released_groups_half_of_the_positions_see_their_label(length):
    """One block; the last position is clean, which is why evaluation is causal."""
    found = sees_its_label(one_block(make(RELEASE)), length)
    assert len(found) == length // 2
    assert length - 1 not in found
    if length == 20:
        assert found == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12]


def test_in_a_stack_of_blocks_the_released_groups_show_all_labels_but_the_last():
    assert sees_its_label(make(RELEASE), 20) == list(range(19))


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, fine=False)])
def test_an_action_depends_on_what_came_before_it_and_nothing_else(config):
    algo, b = make(config), window(short=False)
    before = predicted(algo, b)
    for name, own in (("act", False), ("obs", True), ("return_to_go", True)):
        changed = b | {name: b[name].clone()}
        changed[name][:, 3] *= -1
        after = predicted(algo, changed)
        assert torch.equal(before[:, :3], after[:, :3]), name
        assert (not torch.equal(before[:, 3], after[:, 3])) == own, name
        assert not torch.equal(before[:, 4], after[:, 4]), name


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, grouping="release")])
def test_what_pads_hold_makes_no_difference(config):
    algo, b = make(config), window()
    real, pad = b["mask"].bool(), b["mask"] == 0
    other = b | {name: b[name].clone() for name in ("obs", "act", "return_to_go")}
    for name in ("obs", "act", "return_to_go"):
        other[name][pad] = 100.0
    assert torch.equal(predicted(algo, b)[real], predicted(algo, other)[real])
    assert torch.equal(algo.loss(b)[0], algo.loss(other)[0])


@pytest.mark.parametrize("mask_pads", [True, False])
def test_padded_steps_contribute_no_gradient(mask_pads):
    algo, b = make(replace(SMALL, mask_pads=mask_pads)), window()
    algo.evolution.step.fill_(39 * algo.evolution.stage_steps)  # labels of the teacher count too
    pad = b["mask"] == 0
    inputs = [b[name].requires_grad_() for name in ("obs", "act", "return_to_go")]
    for grad in torch.autograd.grad(algo.loss(b)[0], inputs):
        assert (grad[pad] == 0).all() == mask_pads  # unmasked, pads reach others' outputs
        assert (grad[~pad] != 0).any()
    outputs = algo.net(b).detach().requires_grad_()
    algo.net.forward = lambda window: outputs
    (grad,) = torch.autograd.grad(algo.loss(b)[0], outputs)
    assert (grad[pad] == 0).all()
    assert (grad[~pad][:, 1] != 0).any()


def test_padded_and_unpadded_windows_give_equal_outputs():
    algo, b = make(), window()
    for i in range(4):
        cut = {name: value[i : i + 1, i:] for name, value in b.items()}
        torch.testing.assert_close(predicted(algo, b)[i, i:], predicted(algo, cut)[0])


def test_without_masking_pads_enter_the_states():
    algo, b = make(replace(SMALL, mask_pads=False)), window()
    cut = {name: value[3:, 3:] for name, value in b.items()}
    assert (predicted(algo, b)[3, -1] - predicted(algo, cut)[0, -1]).abs().max() > 1e-4


def test_without_the_fine_branch_it_is_a_plain_mamba_stack():
    algo, b = make(replace(SMALL, fine=False)), window(short=False)
    x = algo.net.tokens.placed(
        torch.stack(
            [
                algo.net.tokens.embed_return(b["return_to_go"].unsqueeze(-1)),
                algo.net.tokens.embed_obs(b["obs"]),
                algo.net.tokens.embed_act(b["act"]),
            ],
            2,
        ),
        b["step_in_episode"],
    ).flatten(1, 2)
    for block in algo.net.backbone.blocks:
        assert {name for name, _ in block.named_children()} == {"norm", "coarse"}
        x = x + block.coarse(x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(algo.net(b).flatten(1, 2), x, rtol=1e-4, atol=1e-5)


def test_the_step_is_added_behind_the_norm():
    algo, b = make(), window()
    before = predicted(algo, b)
    with torch.no_grad():
        algo.net.tokens.embed_step.add_(1.0)  # in Decision Transformer LayerNorm would remove it
    assert (predicted(algo, b) - before).abs().max() > 1e-3


def test_hoppers_embedding_is_linear_and_its_head_ends_in_tanh():
    plain = make(replace(SMALL, mlp_embedding=False, mlp_head=False)).net
    assert plain.tokens.embed_obs.second is None
    assert plain.head_hidden is None
    big = torch.full((1, 64), 1e6)
    assert plain.action(big).abs().max() <= 1
    assert make().net.action(big).abs().max() > 1


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, fine=False), replace(SMALL, grouping="release")]
)
def test_only_the_last_steps_can_be_asked_for(config):
    algo, b = make(config), window()
    tokens = algo.net.tokens(b).flatten(1, 2)
    whole = algo.net.backbone(tokens, b["mask"])
    for kept in (1, 4):
        last = algo.net.backbone(tokens, b["mask"], kept)
        torch.testing.assert_close(last, whole[:, -3 * kept :])


# --- acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, fine=False)])
def test_step_by_step_it_equals_the_window_until_the_window_is_full(config):
    config = replace(config, context=6)
    g = torch.Generator().manual_seed(3)
    obs, reward = torch.randn(8, 3, 2, generator=g), torch.randn(8, 3, generator=g)
    starts = torch.zeros(8, 3)
    starts[0], starts[2, 1] = 1, 1
    told = obs, reward, starts, torch.tensor([0, 1, 0])
    one = played(make(config), *told)
    other = played(make(replace(config, eval_mode="recurrent")), *told)
    torch.testing.assert_close(one[:6], other[:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(one[:, 1], other[:, 1], rtol=0, atol=1e-5)  # 2 + 6 steps in all
    if config.fine:
        assert (one[6:, 0] - other[6:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("config", [SMALL, RELEASE], ids=["causal", "release"])
def test_acting_equals_the_network_on_raw_windows(config):
    algo = make(config)
    g = torch.Generator().manual_seed(3)
    obs, reward = torch.randn(9, 3, 2, generator=g), torch.randn(9, 3, generator=g)
    starts = torch.zeros(9, 3)
    starts[0], starts[2, 1], starts[7, 2] = 1, 1, 1  # mid-window, and with a full window behind
    scenario = torch.tensor([0, 1, 0])
    found = played(algo, obs, reward, starts, scenario)
    window, goal, last = None, algo.targets[scenario], torch.zeros(3)
    for t in range(9):
        now = {"obs": algo.standardize(obs[t]), "start": starts[t], "reward": last}
        window = extend(window, now, goal, config.scale, config.context, 2)
        wanted = algo.net.action(algo.net(window)[:, -1, 1]).clamp(-1, 1).detach()
        torch.testing.assert_close(found[t], wanted, rtol=0, atol=1e-5)
        window, last = act_taken(window, found[t]), reward[t]


@pytest.mark.parametrize("mode", ["window", "recurrent"])
def test_episodes_played_together_take_the_actions_of_each_alone(mode):
    batch_equals_one_by_one(make(replace(SMALL, eval_mode=mode)))


def test_no_form_step_by_step_is_offered_where_there_is_none():
    for config in (RELEASE, replace(SMALL, mask_pads=False)):
        with pytest.raises(ValueError, match="eval_mode=recurrent needs"):
            make(replace(config, eval_mode="recurrent"))


def test_each_task_has_its_published_targets():
    tasks = settings.shipped("decision_mamba")["tasks"]
    found = {}
    for env, dataset in (
        ("hopper", "medium"),
        ("halfcheetah", "medium"),
        ("halfcheetah", "medium-expert"),
        ("walker2d", "medium-replay"),
        ("d4rl-antmaze-umaze", "fixed"),
        ("d4rl-antmaze-umaze", "diverse"),
        ("d4rl-antmaze-large", "play"),  # none are published
    ):
        given = settings.resolve("decision_mamba", {"env": env, "dataset": dataset}, tasks).config()
        found[f"{env}-{dataset}"] = (list(given.targets), given.scale, given.mlp_embedding)
    assert found == {
        "hopper-medium": ([3600.0], 1000.0, False),
        "halfcheetah-medium": ([12000.0, 8000.0, 6000.0, 4500.0], 1000.0, True),
        "halfcheetah-medium-expert": ([12000.0], 1000.0, True),
        "walker2d-medium-replay": ([5000.0], 1000.0, True),
        "d4rl-antmaze-umaze-fixed": ([5.0], 1.0, True),
        "d4rl-antmaze-umaze-diverse": ([20.0], 1.0, True),
        "d4rl-antmaze-large-play": ([], 1.0, True),
    }


# --- losses --------------------------------------------------------------------------------------


def smooth(error):
    return torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)


def test_losses_are_masked_means_shifted_by_one_step_and_weighted():
    algo, b = make(), window()
    loss, metrics = algo.loss(b)
    hidden, real = algo.net(b), b["mask"].bool()
    act = (algo.net.action(hidden[:, :, 1]) - b["act"])[real].square().mean()
    obs, rest = [], []
    for i in range(4):
        for t in range(i, 5):  # row i begins at step i
            after = hidden[i, t, 2]
            found = algo.net.head_obs(after.unsqueeze(0))[0]
            obs.append(smooth(found - b["obs"][i, t + 1]))
            found = algo.net.head_return(after.unsqueeze(0))[0]
            rest.append(smooth(found - b["return_to_go"][i, t + 1]))
    obs, rest = torch.stack(obs).mean(), torch.stack(rest).mean()
    torch.testing.assert_close(metrics["actor/loss"], act)
    torch.testing.assert_close(metrics["model/obs"], obs)
    torch.testing.assert_close(metrics["model/return"], rest)
    torch.testing.assert_close(loss, 0.9 * act + 0.05 * obs + 0.05 * rest)
    alone = make(replace(SMALL, inverse=False)).loss(b)[0]
    torch.testing.assert_close(alone, act)


def gradient(algo, batch):
    params = list(algo.net.parameters())
    return torch.autograd.grad(algo.loss(batch)[0], params, materialize_grads=True)


ACTION_ONLY = replace(SMALL, inverse=False)


def test_in_the_first_stage_the_gradient_is_the_plain_one():
    one, other = make(ACTION_ONLY), make(replace(ACTION_ONLY, self_evolution=False))
    with torch.no_grad():
        one.teacher.head_act.bias.add_(1.0)
    for mine, plain in zip(gradient(one, window()), gradient(other, window()), strict=True):
        assert torch.equal(mine, plain)


def test_a_teacher_that_is_the_current_policy_only_rescales_the_gradient(monkeypatch):
    algo = make(ACTION_ONLY)
    plain = gradient(algo, window())
    algo.evolution.step.fill_(39 * algo.evolution.stage_steps)
    assert float(algo.evolution.blend) == 0.5
    for mine, whole in zip(gradient(algo, window()), plain, strict=True):
        torch.testing.assert_close(mine, 0.5 * whole, rtol=1e-4, atol=1e-7)
    algo.previous = lambda batch: algo.net.action(algo.net(batch)[:, :, 1])  # not detached
    for mine, whole in zip(gradient(algo, window()), plain, strict=True):
        torch.testing.assert_close(mine, 0.5 * whole, rtol=1e-4, atol=1e-7)
    attached = lambda act, previous, blend: (1 - blend) * act + blend * previous  # noqa: E731
    monkeypatch.setattr(self_evolution, "progressive_target", attached)  # as in the released code
    for mine, whole in zip(gradient(algo, window()), plain, strict=True):
        torch.testing.assert_close(mine, 0.25 * whole, rtol=1e-4, atol=1e-7)


def test_a_lagged_teacher_moves_the_target():
    algo = make(ACTION_ONLY)
    algo.evolution.step.fill_(39 * algo.evolution.stage_steps)
    with torch.no_grad():
        algo.teacher.head_act.bias.add_(1.0)
    b = window()
    act = predicted(algo, b)
    target = 0.5 * b["act"] + 0.5 * (act + 1.0)
    expected = (act - target)[b["mask"].bool()].square().mean()
    torch.testing.assert_close(algo.loss(b)[0], expected)


def test_the_teacher_rests_within_a_stage_and_is_refreshed_at_its_end():
    algo = make(replace(SMALL, steps=120))  # 40 stages of 3 updates
    (stage,) = METHOD.stages(algo, Task(SPEC, two_arms()), Run(steps=120))
    ((period, refresh),) = stage.between
    assert period == 3
    sample, start = stage.start(), deepcopy(algo.net.state_dict())
    same = lambda one, other: all(torch.equal(one[k], other[k]) for k in one)  # noqa: E731
    for step in range(4):
        if step % period == 0:
            refresh()
        if step == 3:
            assert same(algo.teacher.state_dict(), algo.net.state_dict())
            assert not same(algo.teacher.state_dict(), start)
        else:
            assert same(algo.teacher.state_dict(), start)
        metrics = stage.update(sample(algo.generator), 0)
        assert float(metrics["actor/blend"]) == pytest.approx(0.85 / 40 if step == 3 else 0.0)
    off = make(replace(SMALL, self_evolution=False))
    assert METHOD.stages(off, Task(SPEC, two_arms()), Run(steps=400))[0].between == []


def test_the_blend_reaches_its_cap_in_stage_24():
    algo, blends = make(Config(targets=(1.0,))), []
    assert algo.evolution.stage_steps == 2500
    for stage in range(40):
        algo.evolution.step.fill_(2500 * stage)
        blends.append(float(algo.evolution.blend))
    assert blends[23] < 0.5
    assert blends[24:] == [0.5] * 16


# --- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True])
def test_what_is_decayed(everything):
    algo = make(replace(SMALL, decay_all=everything))
    names = {id(p): name for name, p in algo.net.named_parameters()}
    decayed, free = algo.opt.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-5, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    rest = {names[id(p)] for p in free["params"]}
    block = "backbone.blocks.0."
    assert {"tokens.norm.weight", "tokens.norm.bias", f"{block}fine_norm.weight"} <= rest
    assert {f"{block}coarse.delta_bias", f"{block}coarse.conv_bias", "head_act.bias"} <= rest
    assert not {"tokens.embed_step", "head_act.weight", f"{block}coarse.weight_in"} & rest
    special = {f"{block}coarse.A_log", f"{block}fine.D", f"{block}norm.weight"}
    assert (special & rest) == (set() if everything else special)


def test_both_groups_warm_up_together():
    algo = make()
    for _ in range(3):
        warm_up(algo.opt, 0.1, 4)
    assert [float(group["lr"]) for group in algo.opt.param_groups] == pytest.approx([0.075] * 2)


# --- learning and engineering --------------------------------------------------------------------


def test_it_learns_one_trajectory_by_heart():
    config = replace(SMALL, lr=3e-3, lr_warmup=10, self_evolution=False)
    algo, b = make(config), window(1, 6, short=False)
    b["obs"] = F.one_hot(torch.tensor([[0, 1, 1, 0, 1, 0]]), 2).float()
    for _ in range(100):
        metrics = algo.update(b, 0)
    assert metrics["actor/loss"] < 1e-3


def test_it_takes_the_arm_whose_return_it_is_asked_for():
    algo = make(replace(SMALL, targets=(5.0, 0.0), lr=3e-3, lr_warmup=10))
    obeys_its_target(algo, METHOD, 60)


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="no target returns"):
        make(replace(SMALL, targets=()))
    with pytest.raises(ValueError, match="carries no seed axis"):
        DecisionMamba(SMALL, SPEC, torch.Generator(), (2,))
