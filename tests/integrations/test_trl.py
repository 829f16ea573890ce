"""The adapter against TRL itself and against formulas on plain logits in float64.

Run with the extra: `pip install -c constraints.txt -e '.[llm,dev]'`, then
`python -m pytest tests/integrations`, and `-m slow` for processes, checkpoints and the example.
"""

# ruff: noqa: E402, the imports below need the optional extra

import copy
import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM

from offrl.integrations import trl as adapter
from offrl.integrations import trl_loss, trl_rollout
from offrl.integrations.trl import with_regularizers
from offrl.regularizers import (
    IGPO,
    SPO,
    ClipCov,
    DualVariable,
    LengthShaper,
    PromptHistory,
    RegOutput,
    Regularizer,
    XPOTerm,
)
from offrl.regularizers.reductions import group_mean
from tests.integrations import tiny

GRPO, RLOO, DPO = trl.GRPOTrainer, trl.RLOOTrainer, trl.DPOTrainer
CONFIG = {GRPO: trl.GRPOConfig, RLOO: trl.RLOOConfig, DPO: trl.DPOConfig}


class Bonus(Regularizer):
    """Entropy with a coefficient that a DualVariable may hold; observes the mean."""

    requires = frozenset({"entropy", "mask"})

    def __init__(self, coef=0.1, target=1.0):
        super().__init__(coef)
        self.target = target

    def forward(self, x):
        total, count = (x.entropy * x.mask).sum(), x.mask.sum()
        return RegOutput(
            per_element=-self.weight * x.entropy,
            metrics={"entropy": total / count.clamp(min=1)},
            sync={"sum": total, "count": count},
        )

    def update(self, sync):
        if isinstance(self.coef, DualVariable):
            self.coef.update(self.target - sync["sum"] / sync["count"])


class Likelihood(Regularizer):
    requires = frozenset({"logp"})

    def forward(self, x):
        return RegOutput(per_element=self.weight * x.logp)


class Near(Regularizer):
    """(logp - ref_logp)^2; keeps what it was given."""

    requires = frozenset({"logp", "ref_logp"})

    def forward(self, x):
        self.seen = x
        return RegOutput(per_element=self.weight * (x.logp - x.ref_logp).square())


class Short(Regularizer):
    """Length above the group's mean costs reward; counts its calls."""

    hook = "reward"
    requires = frozenset({"rewards", "lengths", "group"})

    def __init__(self, coef=0.1):
        super().__init__(coef)
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.seen = x
        length = x.lengths.float()
        rewards = x.rewards - self.weight * (length - group_mean(length, x.group))
        return RegOutput(
            rewards=rewards,
            metrics={"length": length.mean()},
            sync={"rows": torch.tensor(float(len(length)))},
        )

    def update(self, sync):
        self.rows += sync["rows"].to(self.rows)


class Watcher(Regularizer):
    """Reads what it is told to read and changes nothing."""

    def __init__(self, hook, *requires):
        super().__init__()
        self.hook, self.requires = hook, frozenset(requires)

    def forward(self, x):
        self.seen = x
        if self.hook == "loss":
            return RegOutput(loss=0 * x.logp.sum())
        return RegOutput(**{f"{self.hook}s": getattr(x, f"{self.hook}s")})


def make(base, folder, tmp_path, regularizers=None, model=None, extra=(), **options):
    """A trainer on the tiny model; stock TRL without `regularizers`."""
    options = (
        dict(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            activation_checkpointing=False,
        )
        | options
    )
    if base is DPO:
        data = Dataset.from_dict(preferences())
        rest = {}
    else:
        options = dict(num_generations=2, max_completion_length=6, beta=0.0) | options
        data = Dataset.from_dict(
            {
                "prompt": [c * (2 + i % 3) for i, c in enumerate("bcdefghijkl")] * 4,
                "prompt_id": list(range(11)) * 4,
            }
        )
        rest = {"reward_funcs": tiny.share_of_a}
    kind = base if regularizers is None else with_regularizers(base)
    named = {} if regularizers is None else {"regularizers": regularizers}
    tokenizer = tiny.tokenizer(folder)
    return kind(
        model=folder if model is None else model,
        args=CONFIG[base](**options),
        train_dataset=data,
        processing_class=tokenizer,
        **(rest | named | dict(extra)),
    )


def preferences():
    rows = [("bcd", "aab", "ccde"), ("dd", "aaaa", "ef"), ("ghi", "ba", "hijk"), ("kl", "aba", "l")]
    prompt, chosen, rejected = zip(*rows * 3, strict=True)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def batch_for(base, trainer, **options):
    if base is DPO:
        return next(iter(trainer.get_train_dataloader()))
    batch = tiny.batch_by_hand(**options)
    if base is RLOO:
        logits = tiny.logits_of(trainer.model, batch, trainer.temperature).detach()
        logp = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
        batch["old_logps"] = (logp * batch["completion_mask"]).sum(1)
    return batch


def gradients(trainer, batch):
    """Loss of one micro-batch and its gradient, all parameters in one vector."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.model.parameters()]
    return loss.detach(), torch.cat([p.flatten() for p in pieces])


def close(found, expected, tolerance=1e-4):
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error < tolerance, f"relative error {error:.2g}"


@pytest.mark.parametrize("base", [GRPO, RLOO, DPO])
def test_an_empty_list_changes_no_bit_of_loss_and_gradient(base, folder, tmp_path):
    stock = make(base, folder, tmp_path)
    ours = make(base, folder, tmp_path, [])
    (a, x), (b, y) = (
        gradients(stock, batch_for(base, stock)),
        gradients(ours, batch_for(base, ours)),
    )
    assert torch.equal(a, b)
    assert torch.equal(x, y)
    assert x.norm() > 0


@pytest.mark.parametrize("base", [GRPO, RLOO, DPO])
def test_an_empty_list_changes_no_bit_of_three_steps(base, folder, tmp_path):
    trainers = []
    for regularizers in (None, []):  # constructing a trainer sets the seed
        trainers.append(make(base, folder, tmp_path, regularizers))
        trainers[-1].train()
    for p, q in zip(*(t.model.parameters() for t in trainers), strict=True):
        assert torch.equal(p, q)
    for row, other in zip(*(t.state.log_history[:3] for t in trainers), strict=True):
        assert row | {"step_time": 0} == other | {"step_time": 0}


@pytest.mark.parametrize("base", [GRPO, RLOO, DPO])
def test_the_gradient_is_the_sum_of_trls_and_ours(base, folder, tmp_path):
    stock, ours = make(base, folder, tmp_path), make(base, folder, tmp_path, [Bonus()])
    batch = batch_for(base, stock)
    (a, x), (b, y) = gradients(stock, batch), gradients(ours, batch)
    model = tiny.exact_copy(folder)
    if base is DPO:
        mask = batch["completion_mask"][:, 1:]
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    else:
        mask, logits = batch["completion_mask"], tiny.logits_of(model, batch)
    logp = logits.log_softmax(-1)
    term = 0.1 * ((logp.exp() * logp).sum(-1) * mask).sum() / mask.sum()
    term.backward()
    ours_alone = torch.cat([p.grad.flatten() for p in model.parameters()])
    close(y - x, ours_alone)
    close(b - a, term.detach())


def with_a_cut_row(batch, row=1):
    """The row counts no more, as with `mask_truncated_completions`."""
    batch["completion_mask"][row] = 0
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["reg_sequences"] = batch["completion_mask"].any(1).sum()
    return batch


REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("base", [GRPO, RLOO])
def test_two_unequal_micro_batches_are_one_batch(base, reduction, folder, tmp_path):
    def regularizers():
        return [Likelihood(0.1, reduction)]

    one = make(base, folder, tmp_path, regularizers())
    whole = with_a_cut_row(batch_for(base, one, rows=8))
    whole["advantages"] = torch.zeros(8)
    _, expected = gradients(one, whole)
    two = make(base, folder, tmp_path, regularizers(), gradient_accumulation_steps=2)
    parts = [{k: v[i : i + 4] if v.dim() else v for k, v in whole.items()} for i in (0, 4)]
    found = sum(gradients(two, part)[1] for part in parts)
    close(found if two.loss_is_scaled_for_ga else found / 2, expected)
    assert parts[0]["completion_mask"].sum() != parts[1]["completion_mask"].sum()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_cut_row_counts_neither_as_tokens_nor_as_a_sequence(reduction, folder, tmp_path):
    batch = with_a_cut_row(tiny.batch_by_hand()) | {"advantages": torch.zeros(4)}
    _, found = gradients(make(GRPO, folder, tmp_path, [Likelihood(0.1, reduction)]), batch)
    model = tiny.exact_copy(folder)
    logp = tiny.logits_of(model, batch).log_softmax(-1)
    logp = logp.gather(-1, batch["completion_ids"][..., None])[..., 0]
    rows = [0, 2, 3]
    kept = [logp[i][batch["completion_mask"][i].bool()] for i in rows]
    term = {
        "token-mean": torch.cat(kept).mean(),
        "seq-mean-token-mean": torch.stack([row.mean() for row in kept]).mean(),
        "seq-mean-token-sum": torch.stack([row.sum() for row in kept]).mean(),
    }[reduction]
    (0.1 * term).backward()
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_multipliers_move_once_per_optimizer_step(folder, tmp_path):
    for steps in (1, 2):
        coef = DualVariable(0.0, rule="additive", delta=0.01, bounds=(0.0, 1.0))
        trainer = make(
            GRPO,
            folder,
            tmp_path,
            [Bonus(coef, target=9.0), Short()],
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        assert coef.value.item() == pytest.approx(0.03)
        assert trainer.reg.parts["1_Short"].rows == 3 * 4 * steps
        assert "reg/1_Short/length" in trainer.state.log_history[0]


def test_what_a_generation_told_is_learned_once_over_several_steps(folder, tmp_path):
    trainer = make(GRPO, folder, tmp_path, [Short()], steps_per_generation=1, num_iterations=3)
    trainer.train()
    assert trainer.reg.parts["0_Short"].rows == 4


def test_groups_survive_the_shuffle(folder, tmp_path):
    watcher = Watcher("loss", "group")
    trainer = make(GRPO, folder, tmp_path, [watcher, Short()], per_device_train_batch_size=8)
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    batch = trainer._prepare_inputs(rows)
    first = {g.item(): ids for g, ids in zip(batch["reg_group"], batch["prompt_ids"], strict=True)}
    assert len(first) == 4
    for g, ids in zip(batch["reg_group"], batch["prompt_ids"], strict=True):
        assert torch.equal(first[g.item()], ids)
    assert (batch["reg_group"].diff() < 0).any(), "the shuffle left the order as it was"
    gradients(trainer, batch)
    assert watcher.seen.group.max() < len(rows)


def test_shaping_of_a_group_equals_a_loop(folder, tmp_path):
    trainer = make(
        GRPO,
        folder,
        tmp_path,
        [Short(0.1)],
        num_generations=4,
        max_completion_length=9,
        per_device_train_batch_size=8,
    )
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    ids = [[5] * n for n in (1, 5, 3, 3, 9, 1, 1, 1)]
    texts = ["ab", "a", "b", "b", "a", "b", "b", "b"]
    table = trainer._calculate_rewards(rows, ["b"] * 8, texts, ids)
    for start in (0, 4):
        lengths = [len(x) for x in ids[start : start + 4]]
        mean = sum(lengths) / 4
        for i, n in enumerate(lengths):
            assert table[start + i, 1].item() == pytest.approx(-0.1 * (n - mean), abs=1e-6)


def test_rows_that_nobody_scored_keep_no_advantage_and_touch_no_sibling(folder, tmp_path):
    def score(completions, **kwargs):
        return [None, 1.0, 0.0, 0.5]

    functions = [score]
    trainer = make(
        GRPO,
        folder,
        tmp_path,
        [Short(0.1)],
        num_generations=4,
        extra={"reward_funcs": functions, "correct": ("score", 0.5)},
    )
    assert functions == [score]
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    table = trainer._calculate_rewards(rows, ["b"] * 4, ["a"] * 4, [[5] * n for n in (9, 1, 2, 3)])
    assert table[0].isnan().all()
    torch.testing.assert_close(table[1:, 1], torch.tensor([0.1, 0.0, -0.1]))
    assert trainer.reg.parts["0_Short"].seen.correct.tolist() == [False, True, False, True]
    out = trainer._generate_and_score_completions(rows)
    assert out["advantages"][0] == 0
    assert (out["advantages"][1:] != 0).any()


def test_a_batch_without_a_valid_token_adds_a_finite_zero(folder, tmp_path):
    trainer = make(GRPO, folder, tmp_path, [Bonus()])
    batch = tiny.batch_by_hand()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["num_items_in_batch"] = torch.tensor(0)
    loss, gradient = gradients(trainer, batch)
    assert loss == 0
    assert (gradient == 0).all()


def test_tool_tokens_are_not_the_policys(folder, tmp_path):
    batch = tiny.batch_by_hand() | {"advantages": torch.zeros(4)}
    tools = torch.ones_like(batch["completion_mask"])
    tools[:, 1:3] = 0
    batch["num_items_in_batch"] = (batch["completion_mask"] * tools).sum()
    _, found = gradients(make(GRPO, folder, tmp_path, [Bonus()]), batch | {"tool_mask": tools})
    model = tiny.exact_copy(folder)
    logp = tiny.logits_of(model, batch).log_softmax(-1)
    mask = batch["completion_mask"] * tools
    (0.1 * ((logp.exp() * logp).sum(-1) * mask).sum() / mask.sum()).backward()
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_lengths_leave_tool_output_out_and_count_the_end(folder, tmp_path):
    trainer = make(GRPO, folder, tmp_path, [Short(0.1)])
    stock = GRPO._generate
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    out = list(stock(trainer, [row["prompt"] for row in rows]))
    out[1] = [[5, 5, 6, 6, 2]] * 4
    out[2] = [[1, 1, 0, 0, 1]] * 4
    trainer._policy_mask = out[2]
    trainer._calculate_rewards(rows, ["b"] * 4, ["a"] * 4, out[1])
    assert trainer.reg.parts["0_Short"].seen.lengths.tolist() == [3] * 4


@pytest.mark.parametrize("base", [GRPO, RLOO])
def test_a_reference_without_beta_leaves_trls_loss_as_it_is(base, folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    near = Near(0.5)
    stock = make(base, folder, tmp_path, per_device_train_batch_size=8)
    ours = make(base, folder, tmp_path, [near], per_device_train_batch_size=8)
    assert ours.args.beta == 0.0
    assert stock.ref_model is None
    outs = []
    for trainer in (stock, ours):
        trainer.model.load_state_dict(other.state_dict())
        trainer.model.train()
        torch.manual_seed(3)
        outs.append(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    assert torch.equal(outs[0]["advantages"], outs[1]["advantages"])
    (a, _), (b, _) = gradients(stock, outs[0]), gradients(ours, outs[1])
    mask = near.seen.mask
    expected = 0.5 * ((near.seen.logp - near.seen.ref_logp).square() * mask).sum() / mask.sum()
    torch.testing.assert_close(b - a, expected.detach())
    batch = outs[1]
    logits = tiny.logits_of(tiny.exact_copy(folder), batch)
    ref = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(near.seen.ref_logp * mask, (ref * mask).float().detach())
    assert "kl" not in ours._metrics["train"] or base is RLOO


@pytest.mark.parametrize("base", [GRPO, RLOO])
def test_the_reward_hook_may_read_log_probabilities_of_the_rollout(base, folder, tmp_path):
    watcher = Watcher("reward", "rewards", "old_logp", "ref_logp")
    trainer = make(base, folder, tmp_path, [watcher])
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    out = trainer._generate_and_score_completions(rows)
    mask = out["completion_mask"]
    for name, model in (("old_logp", trainer.model), ("ref_logp", tiny.exact_copy(folder))):
        logp = tiny.logits_of(model, out).log_softmax(-1)
        logp = logp.gather(-1, out["completion_ids"][..., None])[..., 0]
        found = getattr(watcher.seen, name)
        torch.testing.assert_close(found * mask, (logp * mask).float().detach())
    assert torch.equal(watcher.seen.mask, mask)


def test_evaluation_changes_nothing(folder, tmp_path):
    coef = DualVariable(0.1, rule="additive", delta=0.01)
    trainer = make(GRPO, folder, tmp_path, [Bonus(coef), Short(), Near()])
    stock = make(GRPO, folder, tmp_path)
    before = copy.deepcopy(trainer.reg.state_dict())
    data = Dataset.from_dict({"prompt": ["bc", "cd"] * 2})
    metrics = []
    for t in (stock, trainer):
        torch.manual_seed(0)
        metrics.append(t.evaluate(data))
    for name in ("eval_loss", "eval_reward"):
        assert metrics[0][name] == metrics[1][name]
    after = trainer.reg.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_evaluation_between_rollout_and_step_changes_nothing(folder, tmp_path):
    data = Dataset.from_dict({"prompt": ["bc", "cd"] * 2})
    found = []
    for evaluated in (False, True):
        coef = DualVariable(0.1, rule="sgd", lr=0.1)
        trainer = make(GRPO, folder, tmp_path, [Bonus(coef), Short(), Near()])
        rows = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        torch.manual_seed(0)
        batch = trainer._prepare_inputs(rows)
        if evaluated:
            trainer.evaluate(data)
        found.append((*gradients(trainer, batch), trainer.reg.state_dict()))
    (a, x, state), (b, y, other) = found
    assert torch.equal(a, b)
    assert torch.equal(x, y)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert state["parts.1_Short.rows"] == 4


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_advantage_hook_sees_every_token_before_the_loss(iterations, folder, tmp_path):
    names = ("advantages", "entropy", "old_logp", "mask", "turn", "group", "prompt_id")
    watcher = Watcher("advantage", *names)
    trainer = make(GRPO, folder, tmp_path, [watcher], num_iterations=iterations)
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    out = trainer._generate_and_score_completions(rows)
    logp = tiny.logits_of(trainer.model, out).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    mask = out["completion_mask"]
    torch.testing.assert_close(watcher.seen.entropy * mask, (entropy * mask).detach())
    taken = logp.gather(-1, out["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(watcher.seen.old_logp * mask, (taken * mask).detach())
    assert watcher.seen.prompt_id.tolist() == [row["prompt_id"] for row in rows]
    assert torch.equal(watcher.seen.turn, mask - 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_are_those_of_every_kind_of_head(temperature, any_folder, tmp_path):
    trainer = make(GRPO, any_folder, tmp_path, [Bonus()], temperature=temperature)
    # Gemma's reference in float64 has no finite logits behind padding on the left
    batch = tiny.batch_by_hand(left=False) | {"advantages": torch.zeros(4)}
    loss, found = gradients(trainer, batch)
    model = tiny.exact_copy(any_folder)
    logp = tiny.logits_of(model, batch, temperature).log_softmax(-1)
    mask = batch["completion_mask"]
    term = 0.1 * ((logp.exp() * logp).sum(-1) * mask).sum() / mask.sum()
    term.backward()
    close(loss, term.detach())
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_bfloat16_stays_close(folder, tmp_path):
    trainer = make(GRPO, folder, tmp_path, [Bonus()], bf16=True)
    batch = tiny.batch_by_hand() | {"advantages": torch.zeros(4)}
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model, batch).backward()
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    model = tiny.exact_copy(folder)
    logp = tiny.logits_of(model, batch).log_softmax(-1)
    mask = batch["completion_mask"]
    (0.1 * ((logp.exp() * logp).sum(-1) * mask).sum() / mask.sum()).backward()
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]), 2e-2)


def test_checkpointed_activations_change_no_gradient(folder, tmp_path):
    found = []
    for on in (False, True):
        trainer = make(GRPO, folder, tmp_path, [Bonus()], activation_checkpointing=on)
        if on:
            trainer.model.gradient_checkpointing_enable()
        found.append(gradients(trainer, tiny.batch_by_hand())[1])
    close(found[1], found[0], 1e-6)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_an_adapter_is_seen_once_per_policy_pass(folder, tmp_path):
    near = Near(0.5)
    trainer = make(GRPO, folder, tmp_path, [near], extra={"peft_config": lora()})
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():  # away from the base model
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    batch = trainer._prepare_inputs(rows)
    _, gradient = gradients(trainer, batch | {"advantages": torch.zeros(4)})
    mask = batch["completion_mask"]
    logits = tiny.logits_of(tiny.exact_copy(folder), batch)
    ref = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(near.seen.ref_logp * mask, (ref * mask).float().detach())
    assert (near.seen.logp - near.seen.ref_logp).abs().max() > 1e-3
    assert gradient.norm() > 0


def test_dpo_tells_policy_and_reference_apart(folder, tmp_path):
    for extra in ({}, {"peft_config": lora()}):
        near = Near(0.5)
        trainer = make(DPO, folder, tmp_path, [near], extra=extra)
        with torch.no_grad():
            for p in trainer.model.parameters():
                if p.requires_grad:
                    p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        batch = batch_for(DPO, trainer)
        gradients(trainer, batch)
        logits = tiny.exact_copy(folder)(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
        ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
        ref = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        torch.testing.assert_close(near.seen.ref_logp * mask, (ref * mask).float().detach())
        assert (near.seen.logp - near.seen.ref_logp).abs().max() > 1e-3
        assert near.seen.chosen.tolist() == [True] * 4 + [False] * 4


def test_a_second_iteration_keeps_the_old_log_probabilities(folder, tmp_path):
    watcher = Watcher("loss", "old_logp", "logp")
    trainer = make(
        GRPO, folder, tmp_path, [watcher, Likelihood(-0.5)], num_iterations=2, max_steps=2
    )
    trainer.train()
    seen = watcher.seen
    assert ((seen.logp - seen.old_logp) * seen.mask).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("base", [GRPO, RLOO, DPO])
def test_a_resumed_run_ends_as_the_uninterrupted_one(base, folder, tmp_path):
    def run(steps, resume=None):
        coef = DualVariable(0.01, rule="additive", delta=0.01, bounds=(0.0, 1.0))
        parts, extra = [Bonus(coef, target=2.7)], {}
        if base is not DPO:
            parts += [Short(), LengthShaper("hapo", history=PromptHistory(11))]
            extra = {"correct": ("share_of_a", 0.01)}
        trainer = make(
            base,
            folder,
            tmp_path,
            parts,
            max_steps=steps,
            save_strategy="steps",
            per_device_train_batch_size=8,
            save_steps=3,
            lr_scheduler_type="constant",
            extra=extra,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(6)
    saved = torch.load(tmp_path / "checkpoint-3" / trl_loss.FILE, weights_only=True)
    again = run(6, str(tmp_path / "checkpoint-3"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    state = whole.reg.state_dict()
    for name, value in state.items():
        assert torch.equal(value, again.reg.state_dict()[name]), name
    (tmp_path / "checkpoint-3" / trl_loss.FILE).unlink()
    with pytest.warns(UserWarning, match="start anew"):
        anew = run(6, str(tmp_path / "checkpoint-3"))
    if base is DPO:
        return
    count = "parts.2_LengthShaper.history.count"
    seen = saved[count]
    assert (seen > 0).any()
    change = [row["reg/2_LengthShaper/change"] for row in whole.state.log_history[:6]]
    assert change[0] == 0, "a history before the first step"
    assert any(c != 0 for c in change[3:]), "no prompt came back"
    lost = (
        state["parts.2_LengthShaper.history.count"] - anew.reg.parts["2_LengthShaper"].history.count
    )
    assert (lost[seen > 0] > 0).all()


@pytest.fixture(scope="module")
def processes(folder, tmp_path_factory):
    """What one process found, and what each of two found; see two_processes.py."""
    script, root = Path(__file__).with_name("two_processes.py"), Path(__file__).parents[2]
    inherited = dict(os.environ) | {"PYTHONPATH": str(root)}  # it imports from tests/
    results = []
    for world in (1, 2):
        out = tmp_path_factory.mktemp(str(world))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
        workers = []
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            env = inherited | (address | place if world > 1 else {})
            command = [sys.executable, str(script), folder, str(out)]
            workers.append(subprocess.Popen(command, env=env))
        assert [w.wait(timeout=300) for w in workers] == [0] * world
        results.append([torch.load(out / f"{rank}.pt") for rank in range(world)])
    (one,), (first, second) = results
    return one, first, second


@pytest.mark.slow
def test_steps_of_two_processes_are_those_of_one(processes):
    """A group of four spans two ranks of two rows; completions have different lengths."""
    one, first, second = processes
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
        torch.testing.assert_close(value, one["state"][name], msg=name)
    close(first["model"] - one["start"], one["model"] - one["start"])
    assert torch.equal(first["model"], second["model"])
    assert first["lengths"] == one["lengths"] == [1, 6, 3, 4]  # gathered, in TRL's order
    count = one["state"]["parts.2_LengthShaper.history.count"]
    assert count.max() > 1, "no prompt was answered twice"
    assert first["change"] == pytest.approx(one["change"], abs=1e-6)
    assert any(change != 0 for change in one["change"]), "the history changed no reward"


@pytest.mark.slow
def test_every_gradient_of_two_processes_is_that_of_one(processes):
    """Rows of different lengths on ranks of different numbers of tokens and sequences."""
    one, first, second = processes
    names = [name for name in one if name.startswith(("GRPO", "RLOO", "DPO"))]
    assert len(names) == 17
    for name in names:
        ours = one[name] - (one["GRPO alone"] if name[:4] == "GRPO" else 0)
        assert (ours[1:].norm() > 1e-3) == (name != "GRPO alone"), f"{name} has no gradient"
        for other in (first, second):
            error = (other[name] - one[name]).norm() / one[name].norm()
            assert error < 1e-5, f"{name}: relative error {error:.2g}"


def test_examples_in_docstrings():
    assert doctest.testmod(adapter).failed == 0


def test_a_missing_column_of_a_stream_is_named_at_its_first_rows(folder, tmp_path):
    trainer = make(GRPO, folder, tmp_path, [Watcher("reward", "rewards", "prompt_id")])
    rows = [{"prompt": "b"}] * 4
    trainer.model.train()
    with pytest.raises(ValueError, match="'prompt_id': add an integer column"):
        trainer._generate_and_score_completions(rows)


def test_turns_are_runs_of_policy_tokens():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    expected = [[-1, 0, 0, -1, 1, -1], [0, -1, -1, -1, -1, 1]]
    assert trl_rollout.turns(mask).tolist() == expected


@pytest.mark.parametrize(
    ("base", "regularizers", "options", "message"),
    [
        (GRPO, [Watcher("loss", "logits")], {}, "never makes logits"),
        (GRPO, [Watcher("loss", "dist")], {}, "never makes logits"),
        (GRPO, [Watcher("loss", "q")], {}, "does not provide"),
        (GRPO, [Watcher("reward", "correct")], {}, "pass correct="),
        (GRPO, [Watcher("reward", "entropy")], {}, "not there"),
        (GRPO, [Watcher("loss", "extra.noise")], {}, "not there"),
        (GRPO, [Watcher("reward", "rewards", "level")], {}, "'level': add an integer column"),
        (GRPO, [SPO()], {}, "needs 'extra.preferences': TRL has no such input"),
        (GRPO, [IGPO()], {}, "needs 'extra.answer_logp'"),
        (GRPO, [XPOTerm()], {}, "needs 'extra.from_reference'"),
        (RLOO, [XPOTerm()], {}, "needs 'extra.from_reference'"),
        (DPO, [XPOTerm()], {}, "needs 'extra.from_reference'"),
        (DPO, [ClipCov()], {}, "does not provide"),
        (DPO, [Watcher("loss", "advantages")], {}, "does not provide"),
        (DPO, [Near()], {"precompute_ref_log_probs": True}, "precompute_ref_log_probs=False"),
        (GRPO, [Short()], {"multi_objective_aggregation": "normalize_then_sum"}, "sum_then"),
    ],
)
def test_inputs_that_cannot_be_had_are_refused_at_once(
    base, regularizers, options, message, folder, tmp_path
):
    with pytest.raises(ValueError, match=message):
        make(base, folder, tmp_path, regularizers, **options)


def test_a_reward_name_that_does_not_exist_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="share_of_a"):
        make(GRPO, folder, tmp_path, [Short()], extra={"correct": ("nobody", 0.5)})


def test_counting_a_term_twice_warns(folder, tmp_path):
    with pytest.warns(UserWarning, match="entropy counts twice"):
        make(GRPO, folder, tmp_path, [Bonus()], entropy_coef=0.1)
    with pytest.warns(UserWarning, match="reference counts twice"):
        make(GRPO, folder, tmp_path, [Near()], beta=0.1)


def test_the_host_is_checked_and_named():
    adapter.check(GRPO)
    with pytest.raises(TypeError, match="expected GRPOTrainer"):
        adapter.check(trl.SFTTrainer)


@pytest.mark.parametrize("name", sorted(adapter.ROLLOUT))
def test_a_method_with_other_parameters_is_named(name):
    changed = type("Changed", (GRPO,), {name: lambda self, something: None})
    with pytest.raises(TypeError, match=rf"Changed {name} takes \(something\), not"):
        with_regularizers(changed)


@pytest.mark.parametrize("name", sorted(adapter.ROLLOUT))
def test_a_missing_method_is_named(name):
    changed = type("Changed", (GRPO,), {name: None})
    with pytest.raises(TypeError, match=f"{name} is missing"):
        with_regularizers(changed)


def test_other_things_missing_from_the_host_are_named(monkeypatch):
    monkeypatch.setattr(GRPO, "loss_is_scaled_for_ga", None)
    with pytest.raises(TypeError, match="loss_is_scaled_for_ga is missing"):
        adapter.check(GRPO)
    monkeypatch.undo()
    from trl.trainer import utils

    monkeypatch.setattr(utils, "FusedCausalLMOutput", RegOutput)
    with pytest.raises(TypeError, match=r"FusedCausalLMOutput.entropy is missing; .*log_probs"):
        adapter.check(GRPO)


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"offrl\[llm\]"):
        adapter.check(GRPO)


def test_importing_the_adapter_does_not_import_trl():
    code = "import sys, offrl.integrations.trl; print('trl' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
