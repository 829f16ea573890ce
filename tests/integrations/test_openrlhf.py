"""The patch against OpenRLHF's own methods, with a tiny actor in place of DeepSpeed's.

In an environment as docs/llm-trainers.md makes it. Where flash_attn, which needs CUDA, is missing,
empty functions stand in for the five of it that OpenRLHF imports; no test calls them.
"""

# ruff: noqa: E402, the imports below need OpenRLHF

import importlib.machinery
import importlib.util
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("openrlhf", reason="openrlhf is not here; docs/llm-trainers.md")

FLASH = {
    "flash_attn": (),
    "flash_attn.utils": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils.distributed": ("all_gather",),
}
if importlib.util.find_spec("flash_attn") is None:
    for name, functions in FLASH.items():
        module = ModuleType(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        vars(module).update(dict.fromkeys(functions))
        sys.modules[name] = module

from openrlhf.models import loss as their_loss
from openrlhf.models.utils import compute_approx_kl
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

from offrl.integrations.openrlhf import patch
from offrl.regularizers import (
    EntropyBonus,
    KLToReference,
    LengthShaper,
    PeakEntropyMask,
    RegInputs,
    RegOutput,
    Regularizer,
    Schedule,
)
from offrl.regularizers.functional import kl_estimate
from offrl.regularizers.tokens.advantage import STCR
from offrl.regularizers.tokens.length import FORMULAS
from tests.integrations.terms import Drift, Half, SequenceDrift

B, P, T = 6, 2, 5
LENGTHS = torch.tensor([5, 3, 4, 1, 2, 5])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)
PolicyLoss = their_loss.PolicyLoss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors():
    logp, old, advantages = randn(3, B, T)
    return dict(
        log_probs=logp - 2, old_log_probs=old - 2, advantages=advantages, action_mask=MASK.float()
    )


def policy_loss(x, regularizers, token_level=True, **sizes):
    logp = x["log_probs"].clone().requires_grad_()
    with patch(regularizers):
        loss, *others = PolicyLoss(token_level_loss=token_level)(
            **(x | {"log_probs": logp}), **sizes
        )
    return loss.detach(), torch.autograd.grad(loss, logp)[0], others


# -- the loss of a micro-batch ---------------------------------------------------------------------


@pytest.mark.parametrize("token_level", [True, False])
def test_an_empty_patch_leaves_the_policy_loss_bit_for_bit(token_level):
    logp = tensors()["log_probs"].requires_grad_()
    stock, *others = PolicyLoss(token_level_loss=token_level)(**tensors() | {"log_probs": logp})
    (gradient,) = torch.autograd.grad(stock, logp)
    ours = policy_loss(tensors(), [], token_level)
    assert torch.equal(ours[0], stock)
    assert torch.equal(ours[1], gradient)
    assert [*map(str, ours[2])] == [*map(str, others)]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_gradient_is_theirs_plus_the_terms_own(mode):
    x = tensors()
    stock = policy_loss(x, [])
    ours = policy_loss(x, [Drift(0.3, reduction=mode)])
    count = MASK.sum() if mode == "token-mean" else B * LENGTHS.unsqueeze(1)
    own = 0.3 * (x["log_probs"] - x["old_log_probs"]) * MASK / count
    torch.testing.assert_close(ours[1], stock[1] + own)
    assert [*map(str, ours[2])] == [*map(str, stock[2])]


@pytest.mark.parametrize(
    "term",
    [Drift(0.3), Drift(0.3, reduction="seq-mean-token-mean"), SequenceDrift(0.3)],
    ids=["tokens", "sequences", "scalar"],
)
@pytest.mark.parametrize("token_level", [True, False])
def test_micro_batches_add_up_to_the_optimizer_step(term, token_level):
    sizes = dict(dp_size=1, batch_num_tokens=MASK.sum().float(), global_batch_size=float(B))
    x = tensors()
    value, gradient, _ = policy_loss(x, [term], token_level, **sizes)
    parts = [
        policy_loss({k: v[a:b] for k, v in x.items()}, [term], token_level, **sizes)
        for a, b in pairwise([0, 1, 4, B])
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), value)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


def test_token_weights_scale_their_surrogate_and_our_terms():
    x = tensors()
    stock, half = policy_loss(x, []), policy_loss(x, [Half()])
    torch.testing.assert_close(half[1], stock[1] / 2)
    both, term = policy_loss(x, [Half(), Drift(0.3)]), policy_loss(x, [Drift(0.3)])
    torch.testing.assert_close(both[1] - half[1], (term[1] - stock[1]) / 2)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_estimates_and_their_gradients_are_theirs(kind, unbiased):
    logp, reference, old = randn(3, 50) / 2 - 3
    found = []
    for kl in (
        lambda x: compute_approx_kl(x, reference, old, kind, unbiased),
        lambda x: kl_estimate(x, reference, kind, "straight" if unbiased else "path", old),
    ):
        x = logp.clone().requires_grad_()
        value = kl(x)
        found.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    torch.testing.assert_close(*found)


def test_their_estimate_is_cut_at_ten_and_ours_is_not():
    logp, reference = torch.tensor([-8.0]), torch.tensor([-2.0])
    assert compute_approx_kl(logp, reference, kl_estimator="k3").item() == 10
    assert kl_estimate(logp, reference, "k3", "path").item() == pytest.approx(396.43, abs=0.01)


# -- a training step -------------------------------------------------------------------------------


class TinyActor(nn.Module):
    """Returns its parameters as log-probabilities and entropies."""

    def __init__(self):
        super().__init__()
        self.logp = nn.Parameter(randn(B, T, seed=1) / 2 - 2)
        self.entropy = nn.Parameter(randn(B, P + T - 1, seed=2).exp())

    def forward(self, sequences, action_mask, return_output, return_entropy, **rest):
        entropy = self.entropy if return_entropy else None
        return self.logp * action_mask.float(), SimpleNamespace(entropy=entropy)


class Strategy:
    """What training_step asks of DeepSpeed's."""

    ring_attn_group = None

    def backward(self, loss, actor, optimizer):
        loss.backward()

    def optimizer_step(self, *args, **kwargs): ...
    def get_grad_norm(self, actor):
        return 0.0


def train(
    regularizers, *, entropy_coef=None, kl_coef=0.0, estimator="k3", unbiased=False, ref=True
):
    """Gradients of (logp, entropy) and the status of one step of OpenRLHF's trainer."""
    use_loss = kl_coef > 0
    trainer = object.__new__(ActorPPOTrainer)
    kl = dict(use_loss=use_loss, init_coef=kl_coef, estimator=estimator)
    trainer.args = SimpleNamespace(
        actor=SimpleNamespace(entropy_coef=entropy_coef, aux_loss_coef=0.0),
        algo=SimpleNamespace(kl=SimpleNamespace(unbiased_gradient=unbiased, **kl)),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )
    trainer.strategy, trainer.actor, trainer.actor_optim = Strategy(), TinyActor(), None
    trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    trainer.replay_buffer = trainer.ema_model = None
    trainer.aux_loss, trainer.actor_loss_fn = False, PolicyLoss()
    old, reference, advantages = randn(3, B, T, seed=3) / 2 - 2
    experience = Experience(
        sequences=torch.ones(B, P + T, dtype=torch.long),
        attention_mask=torch.ones(B, P + T, dtype=torch.long),
        action_mask=MASK,
        action_log_probs=old * MASK,
        base_action_log_probs=reference * MASK if ref else None,
        advantages=advantages,
    )
    with patch(regularizers):
        status = trainer.training_step(experience, kl_coef, 0)
    assert not trainer.actor._forward_hooks
    grads = [
        p.grad if p.grad is not None else torch.zeros_like(p) for p in trainer.actor.parameters()
    ]
    return grads, status["metrics"]


def test_an_empty_patch_leaves_the_training_step_bit_for_bit():
    method = ActorPPOTrainer.training_step
    stock, _ = train([], entropy_coef=0.1, kl_coef=0.2)
    ours, _ = train([Drift(0.0)], entropy_coef=0.1, kl_coef=0.2)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    assert ActorPPOTrainer.training_step is method


def test_entropy_bonus_is_theirs():
    stock, _ = train([], entropy_coef=0.1)
    ours, metrics = train([EntropyBonus(0.1)], entropy_coef=0.0)
    torch.testing.assert_close(ours, stock)
    assert stock[1].abs().sum() > 0
    torch.testing.assert_close(metrics["reg/0_EntropyBonus/entropy"], metrics["entropy_loss"])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_to_the_reference_is_theirs(estimator, unbiased):
    stock, _ = train([], kl_coef=0.2, estimator=estimator, unbiased=unbiased)
    grad = "straight" if unbiased else "path"
    ours, _ = train([KLToReference(0.2, kind=estimator, grad=grad)])
    torch.testing.assert_close(ours, stock)


def test_peak_mask_leaves_their_surrogate_at_peaks_only():
    stock, _ = train([], entropy_coef=0.0)
    ours, _ = train([PeakEntropyMask(0.75)], entropy_coef=0.0)
    touched = ours[0] != 0
    assert 0 < touched.sum() < (stock[0] != 0).sum()
    torch.testing.assert_close(ours[0][touched], stock[0][touched])


def test_missing_entropy_and_reference_name_the_setting():
    with pytest.raises(ValueError, match=r"--actor\.entropy_coef 0"):
        train([EntropyBonus(0.1)])
    with pytest.raises(ValueError, match=r"--algo\.kl\.use_loss"):
        train([KLToReference(0.1)], ref=False)
    assert PolicyLoss.forward.__qualname__ == "PolicyLoss.forward"


# -- the rollout batch -----------------------------------------------------------------------------

OUTCOME = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # two consecutive responses per prompt
GROUP = torch.arange(B) // 2
PARTS = ([4, 0, 3], [5], [1, 2])  # rows of every experience: not in order, of different width


def experiences():
    found = []
    for rows in PARTS:
        width = int(LENGTHS[rows].max())
        found.append(
            Experience(
                rewards=OUTCOME[rows],
                action_mask=MASK[rows, :width],
                action_log_probs=randn(B, T, seed=4)[rows, :width],
                kl=torch.zeros(len(rows), width),
                truncated=(LENGTHS[rows] == T).float(),
                response_length=LENGTHS[rows],
                index=list(rows),
                info={"reward": OUTCOME[rows]},
            )
        )
    return found


def maker(estimator="group_norm"):
    made = object.__new__(RemoteExperienceMaker)
    made.args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=2),
        reward=SimpleNamespace(clip_range=None),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False)
        ),
    )
    made.strategy = SimpleNamespace(args=made.args)
    made.advantage_estimator, made.kl_ctl = estimator, SimpleNamespace(value=0.0)
    return made


def in_order(parts, name="advantages"):
    """(B, T) in the order of the prompts."""
    table = torch.zeros(B, T)
    for rows, part in zip(PARTS, parts, strict=True):
        value = getattr(part, name)
        table[torch.tensor(rows), : value.size(1)] = value
    return table


def advantages_of(rewards, estimator="group_norm"):
    given = experiences()
    for rows, part in zip(PARTS, given, strict=True):
        part.rewards = rewards[rows]
    return in_order(maker(estimator).compute_advantages_and_returns(given))


ESTIMATORS = ["group_norm", "rloo", "reinforce_baseline", "dr_grpo", "reinforce"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shaping_by_length_comes_before_their_baseline(estimator):
    change = 0.5 * FORMULAS["kimi"](LENGTHS, OUTCOME >= 0.5, GROUP)
    assert change.abs().sum() > 0
    given = experiences()
    with patch([LengthShaper("kimi", coef=0.5)], correct=0.5):
        out = maker(estimator).compute_advantages_and_returns(given)
    torch.testing.assert_close(in_order(out), advantages_of(OUTCOME + change, estimator))
    for rows, part in zip(PARTS, out, strict=True):
        torch.testing.assert_close(part.info["reg_shaping"], change[rows])
        torch.testing.assert_close(part.info["reward"], (OUTCOME + change)[rows])


def test_responses_that_were_cut_off_are_known():
    class Finished(Regularizer):
        hook = "reward"
        requires = frozenset({"rewards", "finished"})

        def forward(self, x):
            return RegOutput(rewards=x.rewards - 1 + x.finished.float())

    given = experiences()
    with patch([Finished()]):
        out = maker().compute_advantages_and_returns(given)
    torch.testing.assert_close(in_order(out), advantages_of(OUTCOME - (LENGTHS == T).float()))


def test_shaping_of_advantages_follows_their_estimator():
    stock = advantages_of(OUTCOME)
    x = RegInputs(
        advantages=stock,
        lengths=LENGTHS,
        correct=OUTCOME >= 0.5,
        group=GROUP,
        rewards=OUTCOME,
        mask=MASK,
    )
    expected = STCR()(x).advantages * MASK
    with patch([STCR()], correct=0.5):
        out = maker().compute_advantages_and_returns(experiences())
    torch.testing.assert_close(in_order(out), expected)
    assert [e.advantages.shape for e in out] == [e.action_mask.shape for e in out]
    assert not torch.equal(expected, stock)


def test_schedules_count_rollout_batches():
    budget = Schedule("exponential", 8, 1, steps=2, factor=0.5)
    shaper = LengthShaper("curriculum", budget=budget)
    values = []
    with patch([shaper], correct=0.5) as running:
        for _ in range(4):
            values.append(float(budget.value))
            maker().compute_advantages_and_returns(experiences())
    assert running.step == 4
    assert values == [8, 8, 4, 4]


# -- Ray -------------------------------------------------------------------------------------------


def setup():
    patch([LengthShaper("kimi", coef=0.5), Drift(0.3)], correct=0.5).__enter__()


def patched_methods():
    owners = (RemoteExperienceMaker, PolicyLoss, ActorPPOTrainer)
    names = ("compute_advantages_and_returns", "forward", "training_step")
    return [getattr(o, n).__code__.co_name == "patched" for o, n in zip(owners, names, strict=True)]


@pytest.mark.slow
def test_the_hook_patches_every_worker_of_ray():
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": setup},
        _system_config={"worker_niceness": 0},  # Ray's 15 starves the imports on a busy machine
    )
    try:
        before = patched_methods()
        inside = ray.get(ray.remote(patched_methods).remote())
    finally:
        ray.shutdown()
    assert before == [False, False, False]
    assert inside == [True, True, True]
