"""The adapter against verl's own functions, in an environment as docs/llm-trainers.md makes it."""

# ruff: noqa: E402, the imports below need verl

import os
import pickle
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

core = pytest.importorskip(
    "verl.trainer.ppo.core_algos",
    reason="verl is not here; docs/llm-trainers.md",
    exc_type=ImportError,
)

import verl
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.losses import ppo_loss

from offrl.integrations.verl import (
    NONLINEAR,
    Advantage,
    RegularizedLoss,
    register_advantage,
    register_loss,
)
from offrl.regularizers import (
    EntropyBonus,
    KLCov,
    KLToReference,
    LengthShaper,
    PeakEntropyMask,
    RegInputs,
    Schedule,
)
from offrl.regularizers import functional as F
from offrl.regularizers.tokens.advantage import STCR
from offrl.regularizers.tokens.length import FORMULAS
from tests.integrations.terms import Drift, Half, SequenceDrift

B, P, T = 6, 3, 5
LENGTHS = [5, 3, 4, 1, 2, 5]
STOCK = {*core.POLICY_LOSS_REGISTRY}
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def actor(**changes):
    fixed = dict(
        strategy="fsdp", ppo_mini_batch_size=4, ppo_micro_batch_size_per_gpu=2, rollout_n=2
    )
    return ActorConfig(**fixed, **changes)


def tensors():
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)).float()
    old, new, advantages = torch.randn(3, B, T, generator=g)
    return dict(old_log_prob=old - 2, log_prob=new - 2, advantages=advantages, response_mask=mask)


def value_and_gradient(loss, inputs, config, **options):
    logp = inputs["log_prob"].detach().clone().requires_grad_()
    value, metrics = loss(**(inputs | {"log_prob": logp}), config=config, **options)
    return value.detach(), torch.autograd.grad(value, logp)[0], metrics


def vanilla():
    return core.get_policy_loss_fn("vanilla")


# -- policy losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_without_regularizers_the_policy_loss_is_verls_bit_for_bit(mode):
    register_loss("plain", [])
    options = dict(loss_agg_mode=mode, rollout_is_weights=torch.full((B, T), 0.7))
    stock = value_and_gradient(vanilla(), tensors(), actor(), **options)
    ours = value_and_gradient(core.get_policy_loss_fn("plain"), tensors(), actor(), **options)
    assert torch.equal(stock[0], ours[0])
    assert torch.equal(stock[1], ours[1])
    assert stock[2] == ours[2]


@pytest.mark.parametrize("base", ["vanilla", "gspo", "cispo", "gpg"])
def test_the_gradient_is_verls_plus_the_terms_own(base):
    loss = register_loss(f"{base}_drift", [Drift(0.3)], base)
    x = tensors()
    stock = core.get_policy_loss_fn(base)
    _, stock, _ = value_and_gradient(stock, x, actor(), loss_agg_mode="token-mean")
    _, ours, metrics = value_and_gradient(loss, x, actor(), loss_agg_mode="token-mean")
    mask = x["response_mask"]
    own = 0.3 * (x["log_prob"] - x["old_log_prob"]).double() * mask / mask.sum()
    torch.testing.assert_close(ours.double(), stock + own.detach(), rtol=1e-5, atol=1e-7)
    drift = (x["log_prob"] - x["old_log_prob"]).abs() * mask
    assert metrics["actor/reg/0_Drift/drift"] == pytest.approx(drift.max().item())


def test_a_module_of_the_package_is_reduced_as_by_itself():
    loss, x = register_loss("cov", [KLCov(0.5, fraction=0.2)]), tensors()
    stock, _, _ = value_and_gradient(vanilla(), x, actor())
    ours, _, _ = value_and_gradient(loss, x, actor())
    given = RegInputs(
        logp=x["log_prob"],
        old_logp=x["old_log_prob"],
        advantages=x["advantages"],
        mask=x["response_mask"],
    )
    per = KLCov(0.5, fraction=0.2)(given).per_element
    expected = F.masked_reduce(per, x["response_mask"]).detach()
    torch.testing.assert_close(ours - stock, expected)


def step_sizes(**changes):
    config = actor(loss_scale_factor=7)
    mask = tensors()["response_mask"]
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=mask.sum().item(),
        global_batch_size=B,
        loss_scale_factor=7,
        **changes,
    )
    return config


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Drift, SequenceDrift])
def test_micro_batches_add_up_to_the_mini_batch(mode, kind):
    term = kind(0.3) if kind is SequenceDrift else kind(0.3, reduction=mode)
    loss, x, config = register_loss("micro", [term]), tensors(), step_sizes()
    value, gradient, _ = value_and_gradient(loss, x, config, loss_agg_mode=mode)
    parts = [
        value_and_gradient(loss, {k: v[a:b] for k, v in x.items()}, config, loss_agg_mode=mode)
        for a, b in pairwise([0, 1, 4, B])
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), value)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


def test_two_ranks_average_to_the_mini_batch():
    loss, x = register_loss("ranks", [Drift(0.3)]), tensors()
    value, _, _ = value_and_gradient(loss, x, step_sizes())
    config = step_sizes()
    config.global_batch_info["dp_size"] = 2
    halves = [{k: v[a:b] for k, v in x.items()} for a, b in ((0, 2), (2, B))]
    mean = sum(value_and_gradient(loss, half, config)[0] for half in halves) / 2
    torch.testing.assert_close(mean, value)


def nothing(log_prob, **inputs):
    return (log_prob * 0).nan_to_num().sum(), {}


def test_garbage_in_padding_does_not_reach_the_term():
    loss, x = register_loss("garbage", [Drift(0.3, reduction="seq-mean-token-mean")]), tensors()
    clean = value_and_gradient(loss, x, actor())
    noise = torch.where(x["response_mask"].bool(), 0.0, torch.nan)
    loss.base = nothing  # verl's own losses let NaN through
    dirty = value_and_gradient(loss, x | {"log_prob": x["log_prob"] + noise}, actor())
    assert dirty[0].isfinite()
    stock = value_and_gradient(vanilla(), x, actor())
    torch.testing.assert_close(dirty[0], clean[0] - stock[0])


def test_token_weights_scale_verls_surrogate_and_our_terms():
    x = tensors()
    _, stock, _ = value_and_gradient(vanilla(), x, actor())
    _, ours, _ = value_and_gradient(register_loss("half", [Half()]), x, actor())
    torch.testing.assert_close(ours, stock / 2)
    _, more, _ = value_and_gradient(register_loss("half2", [Half(), Drift(0.3)]), x, actor())
    _, term, _ = value_and_gradient(register_loss("full", [Drift(0.3)]), x, actor())
    torch.testing.assert_close(more - ours, (term - stock) / 2)


def separable(base, config):
    """Whether weights of tokens, given as advantages, come out as factors of the gradient."""
    x, loss = tensors(), core.get_policy_loss_fn(base)
    x["old_log_prob"] = x["log_prob"] - x["old_log_prob"].sin() / 20  # inside of all clips
    weight = torch.rand(B, T, generator=torch.Generator().manual_seed(1))
    weighted = x | {"advantages": x["advantages"] * weight}
    _, stock, _ = value_and_gradient(loss, x, config, loss_agg_mode="token-mean")
    _, ours, _ = value_and_gradient(loss, weighted, config, loss_agg_mode="token-mean")
    return torch.allclose(ours, weight * stock, rtol=1e-4, atol=1e-7)


def test_weights_are_refused_where_verls_loss_is_not_linear_in_advantages():
    policy_loss = PolicyLossConfig(
        dro_beta=0.5, kl_cov_ratio=0.3, clip_cov_ratio=0.3, clip_cov_lb=0
    )
    config = actor(policy_loss=policy_loss)
    bases = [n for n in STOCK if n != "bypass_mode"]
    found = {base for base in bases if not separable(base, config)}
    assert found == NONLINEAR
    for base in NONLINEAR:
        with pytest.raises(ValueError, match=f"{base}.*not linear in the advantage"):
            register_loss("weighted", [Half()], base)
        with pytest.raises(ValueError, match=f"{base}.*not linear in the advantage"):
            full(RegularizedLoss([Half()]), policy_loss=PolicyLossConfig(loss_mode=base))


# -- advantages -----------------------------------------------------------------------------------

UIDS = np.array(["b", "a", "b", "a", "c", "c"], dtype=object)
GROUP = torch.tensor([0, 1, 0, 1, 2, 2])


def rollout():
    mask = tensors()["response_mask"]
    scores = torch.zeros(B, T)
    outcome = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    scores[torch.arange(B), mask.sum(-1).long() - 1] = outcome
    data = DataProto.from_dict(
        tensors={"token_level_rewards": scores, "response_mask": mask}, non_tensors={"uid": UIDS}
    )
    return data, scores.clone(), mask, outcome


def through_verl(name, config=None):
    data, *_ = rollout()
    out = compute_advantage(data, adv_estimator=name, config=config or {})
    return out.batch["advantages"], out.batch["returns"]


def grpo(rewards, scaled=True):
    """verl's estimator on one reward per response."""
    _, _, mask, _ = rollout()
    levels = torch.zeros(B, T)
    levels[:, 0] = rewards
    return core.compute_grpo_outcome_advantage(levels, mask, UIDS, norm_adv_by_std_in_grpo=scaled)[
        0
    ]


def test_without_regularizers_the_estimator_is_verls_bit_for_bit():
    register_advantage("plain_grpo", [])
    for ours, stock in zip(through_verl("plain_grpo"), through_verl("grpo"), strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("scaled", [True, False])
def test_shaping_by_length_comes_before_verls_baseline(scaled):
    name = f"kimi_{scaled}"
    register_advantage(name, [LengthShaper("kimi", coef=0.5)], correct=0.5)
    advantages, _ = through_verl(name, {"norm_adv_by_std_in_grpo": scaled})
    _, _, _, outcome = rollout()
    change = FORMULAS["kimi"](torch.tensor(LENGTHS), outcome >= 0.5, GROUP)
    assert change.abs().sum() > 0
    torch.testing.assert_close(advantages, grpo(outcome + 0.5 * change, scaled))


def test_a_loop_over_groups_gives_the_same_shaping():
    register_advantage("grpo_lambda", [LengthShaper("overlong", max_length=5, buffer=3)])
    advantages, _ = through_verl("grpo_lambda")
    _, _, _, outcome = rollout()
    penalty = torch.tensor([-max(0, n - 2) / 3 for n in LENGTHS])
    torch.testing.assert_close(advantages, grpo(outcome + penalty))


def test_the_rewards_of_the_rollout_are_left_alone():
    estimator = register_advantage("alone", [LengthShaper("overlong", max_length=5, buffer=3)])
    data, scores, mask, _ = rollout()
    rewards = data.batch["token_level_rewards"]
    estimator(rewards, mask, config={}, index=UIDS)
    assert torch.equal(rewards, scores)


def test_the_change_is_paid_at_the_last_token_of_the_policy():
    seen = {}

    def base(token_level_rewards, response_mask, config=None, index=None):
        seen["rewards"] = token_level_rewards
        return token_level_rewards, token_level_rewards

    _, scores, mask, _ = rollout()
    Advantage([LengthShaper("overlong", max_length=5, buffer=3)], base)(scores, mask, index=UIDS)
    changed = (seen["rewards"] - scores) != 0
    assert changed.sum(-1).tolist() == [int(n > 2) for n in LENGTHS]
    assert (changed.int().argmax(-1) + 1)[changed.any(-1)].tolist() == [n for n in LENGTHS if n > 2]


def test_shaping_of_advantages_follows_verls_estimator():
    register_advantage("stcr", [STCR()], correct=0.5)
    advantages, returns = through_verl("stcr")
    _, _, mask, outcome = rollout()
    stock, stock_returns = through_verl("grpo")
    x = RegInputs(
        advantages=stock,
        lengths=torch.tensor(LENGTHS),
        correct=outcome >= 0.5,
        group=GROUP,
        rewards=outcome,
        mask=mask,
    )
    torch.testing.assert_close(advantages, STCR()(x).advantages * mask)
    assert not torch.equal(advantages, stock)
    assert torch.equal(returns, stock_returns)


@pytest.mark.parametrize("base", ["rloo", "reinforce_plus_plus_baseline", "opo", "grpo_vectorized"])
def test_other_estimators_of_verl_can_be_the_base(base):
    register_advantage(f"{base}_plain", [], base)
    torch.testing.assert_close(through_verl(f"{base}_plain"), through_verl(base))


@pytest.mark.parametrize("base", ["gae", "optimal_token_baseline", "gdpo", "remax"])
def test_estimators_that_need_more_than_verl_passes_are_refused(base):
    with pytest.raises(ValueError, match="under its own name only"):
        register_advantage(f"{base}_plain", [], base)


def curriculum(path=None):
    budget = Schedule("exponential", 8, 1, steps=2, factor=0.5)
    shaper = LengthShaper("curriculum", budget=budget)
    return Advantage([shaper], core.compute_grpo_outcome_advantage, correct=0.5, state=path)


def once(estimator):
    _, scores, mask, _ = rollout()
    return estimator(scores, mask, config={}, index=UIDS)[0]


def test_schedules_count_rollout_batches_and_resume_from_the_file(tmp_path):
    straight, path = curriculum(), tmp_path / "state.pt"
    wanted = [once(straight) for _ in range(5)]
    assert not torch.equal(wanted[0], wanted[2])
    first = curriculum(path)
    got = [once(first) for _ in range(3)]
    second = curriculum(path)
    got += [once(second) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert second.step == 5
    assert os.listdir(tmp_path) == ["state.pt"]


# -- the full loss --------------------------------------------------------------------------------


def micro_batch(rows=slice(None), dp_size=1):
    """Nested data as verl's engine hands it over, and the model's output."""
    g = torch.Generator().manual_seed(3)
    prompts = [2, 3, 1, 3, 2, 1]

    def nest(parts):
        return torch.nested.as_nested_tensor(parts[rows], layout=torch.jagged)

    def draw(sizes):
        return [torch.randn(n, generator=g) - 2 for n in sizes]

    whole = [p + n for p, n in zip(prompts, LENGTHS, strict=True)]
    data = {
        "prompts": nest([torch.ones(n, dtype=torch.long) for n in prompts]),
        "responses": nest([torch.ones(n, dtype=torch.long) for n in LENGTHS]),
        "response_mask": nest([torch.ones(n, dtype=torch.long) for n in LENGTHS]),
        "old_log_probs": nest(draw(LENGTHS)),
        "ref_log_prob": nest(draw(LENGTHS)),
        "advantages": nest(draw(LENGTHS)),
    }
    logp, entropy = draw(whole), [x.exp() for x in draw(whole)]
    data = TensorDict(data, batch_size=len(prompts[rows]))
    tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=sum(LENGTHS), global_batch_size=B)
    leaves = [torch.cat(x[rows]).requires_grad_() for x in (logp, entropy)]
    offsets = torch.tensor([0, *whole[rows]]).cumsum(0)
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets) for x in leaves]
    return data, dict(zip(("log_probs", "entropy"), nested, strict=True)), leaves


def full(loss, rows=slice(None), drop=(), **changes):
    data, output, leaves = micro_batch(rows)
    for name in drop:
        output.pop(name, None)
        data.pop(name, None)
    value, metrics = loss(config=actor(**changes), model_output=output, data=data)
    return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True), metrics


def same(first, second):
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


def test_without_regularizers_the_full_loss_is_verls_bit_for_bit():
    stock = full(ppo_loss, entropy_coeff=0.1, use_kl_loss=True)
    ours = full(RegularizedLoss([]), entropy_coeff=0.1, use_kl_loss=True)
    assert torch.equal(stock[0], ours[0])
    assert all(torch.equal(a, b) for a, b in zip(stock[1], ours[1], strict=True))
    assert stock[2].keys() == ours[2].keys()


def test_entropy_bonus_is_verls():
    same(full(RegularizedLoss([EntropyBonus(0.1)])), full(ppo_loss, entropy_coeff=0.1))


@pytest.mark.parametrize("mode", MODES)
def test_entropy_bonus_is_verls_under_every_reduction(mode):
    ours = RegularizedLoss([EntropyBonus(0.1, reduction=mode)])
    changes = dict(loss_agg_mode=mode, loss_scale_factor=9)
    same(full(ours, **changes), full(ppo_loss, entropy_coeff=0.1, **changes))


@pytest.mark.parametrize(("kind", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_kl_to_the_reference_is_verls(kind, theirs):
    ours = RegularizedLoss([KLToReference(0.2, kind=kind, grad="path")])
    same(full(ours), full(ppo_loss, use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type=theirs))


@pytest.mark.parametrize(("kind", "theirs"), [("k1", "k1+"), ("k3", "k3+")])
def test_straight_gradients_are_verls_on_policy(kind, theirs):
    logp, reference = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) / 2 - 3
    found = []
    for kl in (
        lambda x: core.kl_penalty(x, reference, theirs),
        lambda x: F.kl_estimate(x, reference, kind, "straight"),
    ):
        x = logp.clone().requires_grad_()
        found.append((kl(x).detach(), torch.autograd.grad(kl(x).sum(), x)[0]))
    torch.testing.assert_close(*found)


def test_full_losses_of_micro_batches_add_up():
    loss = RegularizedLoss(
        [EntropyBonus(0.1), KLToReference(0.2), PeakEntropyMask(0.5, "sequence")]
    )
    value, gradient, metrics = full(loss)
    parts = [full(loss, slice(a, b)) for a, b in ((0, 1), (1, 4), (4, B))]
    torch.testing.assert_close(sum(part[0] for part in parts), value)
    for i in range(2):
        torch.testing.assert_close(torch.cat([part[1][i] for part in parts]), gradient[i])
    terms = [part[2]["reg_loss"].aggregate() for part in parts]
    assert sum(terms) == pytest.approx(metrics["reg_loss"].aggregate())


def test_peak_mask_leaves_verls_surrogate_at_peaks_only():
    data, output, leaves = micro_batch()
    before = data["advantages"]
    value, _ = RegularizedLoss([PeakEntropyMask(0.75)])(actor(), output, data)
    (gradient,) = torch.autograd.grad(value, leaves[:1])
    assert data["advantages"] is before
    stock_data, stock_output, stock_leaves = micro_batch()
    (stock,) = torch.autograd.grad(ppo_loss(actor(), stock_output, stock_data)[0], stock_leaves[:1])
    touched = gradient != 0
    assert 0 < touched.sum() < (stock != 0).sum()
    torch.testing.assert_close(gradient[touched], stock[touched])


def test_missing_entropy_and_reference_name_the_setting():
    with pytest.raises(ValueError, match="calculate_entropy=True"):
        full(RegularizedLoss([EntropyBonus(0.1)]), drop=["entropy"])
    with pytest.raises(ValueError, match="use_kl_loss=True"):
        full(RegularizedLoss([KLToReference(0.1)]), drop=["ref_log_prob"])


def test_the_full_loss_travels_to_workers():
    loss = partial(RegularizedLoss([EntropyBonus(0.1)]), config=actor())
    data, output, _ = micro_batch()
    copy = pickle.loads(pickle.dumps(loss))
    value = copy(model_output=output, data=data)[0]
    assert torch.equal(value, loss(model_output=output, data=data)[0])


def test_a_trainer_hands_the_full_loss_to_its_workers(monkeypatch):
    v1 = pytest.importorskip(
        "verl.trainer.ppo.v1",
        reason="verl's v1 trainer lacks packages; docs/llm-trainers.md",
        exc_type=ImportError,
    )
    config = Path(verl.__file__).parent / "trainer/config/_generated_ppo_trainer.yaml"

    class Trainer(v1.PPOTrainerSync):  # as in the docstring of RegularizedLoss
        def init(self):
            super().init()
            config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            loss = RegularizedLoss([EntropyBonus(0.1)])
            self.actor_rollout_wg.set_loss_fn(partial(loss, config=config))

    v1.register_trainer("regularized")(Trainer)
    monkeypatch.setattr(v1.PPOTrainerSync, "_setup", lambda self: None)
    monkeypatch.setattr(v1.PPOTrainerSync, "on_init_end", lambda self: None)
    trainer = object.__new__(v1.get_trainer_cls("regularized"))
    trainer.config = OmegaConf.load(config)
    trainer.config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 2
    worker, inner = object.__new__(ActorRolloutRefWorker), object.__new__(TrainingWorker)
    worker.actor = inner
    trainer.actor_rollout_wg = worker
    trainer.init()
    data, output, _ = micro_batch()
    value, _ = inner.loss_fn(model_output=output, data=data, dp_group=None)
    torch.testing.assert_close(value, full(RegularizedLoss([EntropyBonus(0.1)]))[0])


# -- loading --------------------------------------------------------------------------------------


def test_verl_finds_the_plugin_and_its_names(tmp_path):
    info = tmp_path / "adapter-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapter\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nx = offrl.integrations.verl_plugin\n")
    terms = tmp_path / "terms.py"
    terms.write_text(
        "from offrl.integrations.verl import register_advantage, register_loss\n"
        "from offrl.regularizers import KLCov, LengthShaper\n"
        "register_advantage('short', [LengthShaper('kimi', coef=0.1)], correct=0.5)\n"
        "register_loss('cov', [KLCov(0.1)])\n"
    )
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c;"
        "print(type(c.get_adv_estimator_fn('short')), type(c.get_policy_loss_fn('cov')))"
    )
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    env = os.environ | {"PYTHONPATH": path, "OFFRL_VERL": str(terms)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "Advantage" in done.stdout, done.stderr
    assert "PolicyLoss" in done.stdout
