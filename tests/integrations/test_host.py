"""What the adapters do without, or with another, verl or OpenRLHF: no host is needed here."""

import doctest
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from offrl.integrations import host, openrlhf, verl
from offrl.integrations.openrlhf import patch
from offrl.regularizers import (
    DualVariable,
    EntropyBonus,
    KLToReference,
    LengthShaper,
    PeakEntropyMask,
    RegInputs,
    RegOutput,
    Regularizer,
)
from offrl.regularizers.reductions import keep
from offrl.regularizers.tokens.length import PromptHistory


class Drift(Regularizer):
    requires = frozenset({"logp", "old_logp"})

    def forward(self, x):
        drift = keep(x.logp, x.mask) - keep(x.old_logp, x.mask)
        return RegOutput(per_element=self.weight * drift.square())


class Double(Regularizer):
    hook = "reward"
    requires = frozenset({"rewards"})

    def forward(self, x):
        return RegOutput(rewards=2 * x.rewards)


class Early(Double):
    requires = frozenset({"rewards", "advantages"})


def install(monkeypatch, name, **content):
    """A module under a dotted name, with empty parents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        module = ModuleType(package)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, package, module)
    vars(module).update(content)
    return module


def fake_core(**changed):
    def register_adv_est(name_or_enum): ...
    def get_adv_estimator_fn(name_or_enum): ...
    def register_policy_loss(name): ...
    def get_policy_loss_fn(name): ...
    def compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    ): ...
    def agg_loss(
        loss_mat,
        loss_mask,
        loss_agg_mode,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ): ...

    functions = {name: value for name, value in locals().items() if name != "changed"}
    return functions | changed


def test_doctests_hold():
    for module in (host, verl, openrlhf):
        assert doctest.testmod(module).failed == 0


def test_a_missing_host_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", None)
    monkeypatch.setitem(sys.modules, MAKER, None)
    with pytest.raises(ImportError, match=r"core_algos.*pip install verl==0\.9\.1"):
        verl.register_loss("x", [])
    with pytest.raises(ImportError, match=r"pip install openrlhf==0\.11\.2"):
        patch([Double()]).__enter__()


def test_a_host_with_the_expected_functions_passes(monkeypatch):
    module = install(monkeypatch, "verl.trainer.ppo.core_algos", **fake_core())
    assert verl.core_algos() is module


def test_one_more_parameter_is_a_change(monkeypatch):
    def more(name, kind="new"): ...

    core = fake_core(register_policy_loss=more)
    install(monkeypatch, "verl.trainer.ppo.core_algos", **core)
    with pytest.raises(TypeError, match=r"register_policy_loss takes \(name kind\)"):
        verl.core_algos()


def test_a_changed_host_is_described_in_one_error(monkeypatch):
    def renamed(matrix, loss_mask, loss_agg_mode): ...
    def stricter(name, kind): ...

    core = fake_core(agg_loss=renamed, register_adv_est=None, get_policy_loss_fn=stricter)
    install(monkeypatch, "verl.trainer.ppo.core_algos", **core)
    with pytest.raises(TypeError) as caught:
        verl.register_advantage("x", [])
    text = str(caught.value)
    for part in (
        "register_adv_est is missing",
        "get_policy_loss_fn takes (name kind), expected (name)",
        "agg_loss takes (matrix loss_mask loss_agg_mode), expected (loss_mat ",
        "Install verl==0.9.1 or a newer offrl",
    ):
        assert part in text


def fake_maker():
    class RemoteExperienceMaker:
        def compute_advantages_and_returns(self, experiences):
            raise RuntimeError("inside")

    return RemoteExperienceMaker


MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


def batch():
    ones = torch.ones(2, 3)
    return [
        SimpleNamespace(
            rewards=torch.tensor([1.0, 2.0]),
            index=[0, 1],
            action_mask=ones,
            action_log_probs=-ones,
            truncated=None,
            info={},
        )
    ]


def test_the_patch_is_undone_after_an_exception(monkeypatch):
    maker = fake_maker()
    install(monkeypatch, MAKER, RemoteExperienceMaker=maker)
    before = maker.compute_advantages_and_returns
    args = SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=2))
    instance, experiences = maker(), batch()
    instance.args = args
    with pytest.raises(RuntimeError, match="inside"), patch([Double()]):
        instance.compute_advantages_and_returns(experiences)
    assert maker.compute_advantages_and_returns is before
    assert experiences[0].rewards.tolist() == [2.0, 4.0]


def test_patches_nest(monkeypatch):
    maker = fake_maker()
    install(monkeypatch, MAKER, RemoteExperienceMaker=maker)
    before = maker.compute_advantages_and_returns
    with patch([Double()]):
        outer = maker.compute_advantages_and_returns
        with patch([Double()]):
            assert maker.compute_advantages_and_returns is not outer
        assert maker.compute_advantages_and_returns is outer
    assert maker.compute_advantages_and_returns is before


def test_nothing_is_patched_when_one_signature_has_changed(monkeypatch):
    maker = fake_maker()
    install(monkeypatch, MAKER, RemoteExperienceMaker=maker)

    class PolicyLoss:
        def forward(self, logits): ...

    loss = install(monkeypatch, "openrlhf.models.loss", PolicyLoss=PolicyLoss)
    monkeypatch.setitem(sys.modules, MAKER, SimpleNamespace(RemoteExperienceMaker=maker))
    before = maker.compute_advantages_and_returns, loss.PolicyLoss.forward
    with pytest.raises(TypeError, match=r"PolicyLoss\.forward takes \(logits\).*aggregate_loss is"):
        patch([Double(), Drift()]).__enter__()
    assert (maker.compute_advantages_and_returns, loss.PolicyLoss.forward) == before


def test_an_empty_patch_needs_no_host(monkeypatch):
    monkeypatch.setitem(sys.modules, "openrlhf", None)
    with patch([]), patch([LengthShaper("kimi", coef=0.0)]):
        pass


HISTORY = LengthShaper("hapo", history=PromptHistory(4))
REFUSED = {
    "order": ([Early()], "Early: OpenRLHF does not provide 'advantages'$"),
    "state at the loss": ([EntropyBonus(DualVariable(0.0), target=1.0)], "constant coefficient"),
    "correct": ([LengthShaper("kimi")], "pass correct="),
    "history": ([HISTORY], r"'prompt_id' \(prompts have no integer names"),
    "reduction": ([KLToReference(0.1, reduction="seq-mean-token-sum")], "reduces by token-mean or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_openrlhf_refuses_what_it_cannot_run(case):
    regularizers, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        patch(regularizers)


def estimator(token_level_rewards, response_mask, index): ...
def of_values(token_level_rewards, response_mask, values, gamma): ...
def of_parts(token_level_rewards, response_mask, index, non_tensor_batch=None): ...


def test_verl_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="pass correct="):
        verl.Advantage([LengthShaper("kimi")], estimator)
    with pytest.raises(ValueError, match="names a prompt anew"):
        verl.Advantage([HISTORY], estimator, correct=0.5)
    with pytest.raises(ValueError, match="of_values needs gamma, values"):
        verl.Advantage([], of_values)
    with pytest.raises(ValueError, match="of_parts needs non_tensor_batch"):
        verl.Advantage([], of_parts)
    with pytest.raises(ValueError, match="runs reward, advantage, not 'loss'"):
        verl.Advantage([Drift()], estimator)
    with pytest.raises(ValueError, match=r"'entropy' \(use RegularizedLoss"):
        verl.PolicyLoss([EntropyBonus(0.1)], estimator, None)
    with pytest.raises(ValueError, match="constant coefficient"):
        verl.RegularizedLoss([KLToReference(DualVariable(0.1), target=0.1)])


def test_a_loss_without_tokens_is_a_zero_with_a_gradient():
    logp = torch.full((2, 3), torch.nan, requires_grad=True)
    x = RegInputs(logp=logp, old_logp=logp.detach(), mask=torch.zeros(2, 3))
    reg = host.compose([Drift()], {"loss": frozenset({"logp", "old_logp"})}, {}, "here")
    loss, _ = host.extra_loss(reg, x, RegOutput(), lambda value, mode: value.sum())
    loss.backward()
    assert loss == 0
    assert torch.equal(logp.grad, torch.zeros(2, 3))


def test_metrics_of_both_stages_are_reported():
    x = RegInputs(
        logp=torch.zeros(2, 3),
        old_logp=torch.ones(2, 3),
        entropy=torch.arange(6.0).view(2, 3),
        mask=torch.ones(2, 3),
    )
    offers = dict.fromkeys(host.LOSS_HOOKS, frozenset({"logp", "old_logp", "entropy"}))
    reg = host.compose([PeakEntropyMask(0.5), EntropyBonus(1.0)], offers, {}, "here")
    mean = lambda value, mode: value.mean()  # noqa: E731
    loss, metrics = host.extra_loss(reg, x, reg.run("token", x), mean)
    assert loss == -(3 + 4 + 5) / 6
    assert metrics == {"0_PeakEntropyMask/share": 0.5, "1_EntropyBonus/entropy": 2.5}


def test_modules_with_a_zero_coefficient_need_nothing():
    assert not verl.Advantage([LengthShaper("kimi", coef=0.0)], estimator).reg.hooks


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


def test_the_plugin_imports_nothing_unless_asked_to(tmp_path):
    code = (
        "import sys, offrl.integrations.verl_plugin; assert not {'torch', 'verl'} & {*sys.modules}"
    )
    path = ":".join(p for p in sys.path if p)
    done = python(code, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


def test_the_plugin_reports_a_file_that_fails(tmp_path):
    file = tmp_path / "terms.py"
    file.write_text("raise KeyError('my mistake')")
    # verl swallows what a plug-in raises, so the log has to say it
    code = "try: import offrl.integrations.verl_plugin\nexcept KeyError: print('raised')"
    done = python(code, PYTHONPATH=":".join(p for p in sys.path if p), OFFRL_VERL=str(file))
    assert done.stdout.strip() == "raised"
    assert "my mistake" in done.stderr
    assert "terms.py failed, nothing is registered" in done.stderr
