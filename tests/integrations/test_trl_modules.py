"""Modules of the package through TRL: against its built-in terms and against float64 formulas."""

# ruff: noqa: E402, the imports below need the optional extra

import copy
import importlib
from dataclasses import fields
from itertools import pairwise

import pytest
import torch

trl = pytest.importorskip("trl")

from transformers import TrainerCallback
from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from offrl.integrations.trl_loss import Preference
from offrl.integrations.trl_rollout import Rollout
from offrl.regularizers import (
    EMPG,
    LDDPO,
    RPO,
    DualVariable,
    EntropyAnchor,
    EntropyBonus,
    KLToReference,
    LengthShaper,
    NLLAnchor,
    PeakEntropyMask,
    RegInputs,
    RegOutput,
    Regularizer,
)
from offrl.regularizers.functional import Nucleus, SetEntropy, token_stats_from_logits
from tests.integrations import tiny
from tests.integrations.test_trl import DPO, GRPO, RLOO, batch_for, close, gradients, make
from tests.regularizers.cases import all_cases


def moved(trainer, scale=0.2):
    """The policy away from the reference."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return trainer


class Watching(Regularizer):
    """Has the rollout carry rows to the loss and changes nothing."""

    def __init__(self, *requires):
        super().__init__()
        self.requires = frozenset(requires)

    def forward(self, x):
        return RegOutput(loss=0 * x.logp.sum())


def same(first, second, batch, tolerance=1e-5):
    (a, x), (b, y) = gradients(first, dict(batch)), gradients(second, dict(batch))
    close(b, a, tolerance)
    close(y, x, tolerance)
    return x


def test_entropy_bonus_is_trls(folder, tmp_path):
    stock = make(GRPO, folder, tmp_path, entropy_coef=0.1)
    plain = make(GRPO, folder, tmp_path)
    ours = make(GRPO, folder, tmp_path, [EntropyBonus(0.1)])
    batch = tiny.batch_by_hand()
    with_bonus = same(stock, ours, batch)
    assert (with_bonus - gradients(plain, batch)[1]).norm() > 1e-3


def test_the_controller_takes_trls_path_for_twenty_steps(folder, tmp_path):
    options = dict(max_steps=20, learning_rate=1e-2, gradient_accumulation_steps=2)
    stock = make(
        GRPO,
        folder,
        tmp_path,
        use_adaptive_entropy=True,
        entropy_target=2.72,
        entropy_coef_delta=0.2,
        entropy_coef_max=1.0,
        **options,
    )
    stock.train()
    expected = [row["entropy_coef"] for row in stock.state.log_history if "entropy_coef" in row]
    coef = DualVariable(0.0, rule="additive", delta=0.2, bounds=(0.0, 1.0), gate=True)
    found = []

    class Record(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found.append(coef.raw.item())

    ours = make(
        GRPO,
        folder,
        tmp_path,
        [EntropyBonus(coef, target=2.72)],
        extra={"callbacks": [Record()]},
        **options,
    )
    ours.train()
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 2
    assert any(b < a for a, b in pairwise(expected))


@pytest.mark.parametrize("grad", ["ratio", "path"])
def test_kl_to_the_reference_is_trls_with_both_gradients(grad, folder, tmp_path):
    stock = make(GRPO, folder, tmp_path, beta=0.3, use_bias_correction_kl=grad == "ratio")
    ours = make(GRPO, folder, tmp_path, [KLToReference(0.3, "k3", grad)])
    batch = tiny.batch_by_hand()
    logits = tiny.logits_of(stock.model, batch).detach()
    logp = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    g = torch.Generator().manual_seed(1)
    old = logp + 0.1 * torch.randn(logp.shape, generator=g)
    batch |= {"ref_per_token_logps": logp, "reg_ref_logp": logp}
    batch |= {"old_per_token_logps": old, "reg_old_logp": old}
    same(moved(stock), moved(ours), batch)


def test_peak_entropy_mask_is_trls_quantile(folder, tmp_path):
    stock = make(GRPO, folder, tmp_path, top_entropy_quantile=0.2)
    ours = make(GRPO, folder, tmp_path, [PeakEntropyMask(0.8)])
    plain = make(GRPO, folder, tmp_path)
    for trainer in (stock, ours, plain):
        moved(trainer)
    batch = tiny.batch_by_hand()
    masked = same(stock, ours, batch)
    assert (masked - gradients(plain, batch)[1]).norm() > 1e-3
    assert batch["advantages"].shape == (4,), "the batch of the next iteration was changed"


def test_peak_entropy_mask_reaches_our_terms_and_trls_alike(folder, tmp_path):
    stock = make(GRPO, folder, tmp_path, top_entropy_quantile=0.5, entropy_coef=0.1)
    ours = make(GRPO, folder, tmp_path, [PeakEntropyMask(0.5), EntropyBonus(0.1)])
    batch = tiny.batch_by_hand()
    # TRL's bonus is the mean over the tokens that are left, ours over all of them
    entropy = tiny.logits_of(moved(stock).model, batch).detach().softmax(-1)
    entropy = -(entropy * entropy.log()).sum(-1)
    mask = batch["completion_mask"].bool()
    left = (entropy[mask] >= entropy[mask].quantile(0.5)).float().mean()
    ours.reg.parts["1_EntropyBonus"].coef = 0.1 / left.item()
    same(stock, moved(ours), batch)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_nucleus_statistics_are_those_of_every_kind_of_head(temperature, any_folder, tmp_path):
    anchor = EntropyAnchor(coef=0.5)
    anchor.anchor.fill_(1.0)
    anchor.anchored.fill_(1)
    trainer = make(GRPO, any_folder, tmp_path, [anchor], temperature=temperature)
    batch = tiny.batch_by_hand(left=False) | {"advantages": torch.zeros(4)}
    loss, found = gradients(trainer, batch)
    model = tiny.exact_copy(any_folder)
    logits = tiny.logits_of(model, batch, temperature)
    want = {"nucleus_entropy": SetEntropy(Nucleus(0.8))}
    x = RegInputs(mask=batch["completion_mask"], stats=token_stats_from_logits(logits, want=want))
    term = anchor(x).loss
    term.backward()
    close(loss, term.detach())
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_a_statistic_that_one_pass_does_not_give_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="'kl': one pass gives"):
        make(GRPO, folder, tmp_path, [KLToReference(0.1, "exact")])


def borders(max_length, buffer):
    """Lengths at, before and behind every border, and between them."""
    marks = (0, max_length - buffer, max_length - buffer // 2, max_length, 2 * max_length)
    return sorted({max(0, mark + off) for mark in marks for off in (-1, 0, 1)})


def of_lengths(lengths):
    return [[5] * n for n in lengths]


@pytest.mark.parametrize("buffer", [0, 1, 7, 20])
def test_soft_punishment_of_overlong_answers_is_trls(buffer):
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=buffer)
    ours = LengthShaper("overlong", max_length=20, buffer=buffer).as_reward_func()
    ids = of_lengths(borders(20, buffer))
    expected = theirs(completion_ids=ids)
    assert ours(completions=[""] * len(ids), completion_ids=ids) == pytest.approx(expected)
    assert {0.0, -1.0} <= set(expected)


@pytest.fixture
def known_answers(monkeypatch):
    """TRL's check of mathematics reads the verdict from the solution."""
    module = importlib.import_module("trl.rewards.accuracy_rewards")
    monkeypatch.setattr(module, "accuracy_reward", lambda completions, solution: solution)


ENDS = {"right": (2.0, 0.25), "wrong": (-3.0, -0.125)}
THEIR_ENDS = {
    "min_value_wrong": -3.0,
    "max_value_wrong": -0.125,
    "min_value_correct": 0.25,
    "max_value_correct": 2.0,
}


@pytest.mark.parametrize(("ends", "same_ends"), [({}, {}), (ENDS, THEIR_ENDS)])
def test_cosine_of_the_length_is_trls(ends, same_ends, known_answers):
    theirs = get_cosine_scaled_reward(max_len=20, **same_ends)

    def correct(completions, solution, **kwargs):
        return solution

    ours = LengthShaper("cosine", max_length=20, **ends).as_reward_func(correct=correct)
    lengths = borders(20, 10)
    ids = of_lengths(lengths * 3)
    verdicts = [v for v in (1.0, 0.0, None) for _ in lengths]
    given = {"completions": [""] * len(ids), "completion_ids": ids, "solution": verdicts}
    found, expected = ours(**given), theirs(**given)
    assert [x is None for x in found] == [x is None for x in expected]
    scored = [i for i, x in enumerate(expected) if x is not None]
    assert [found[i] for i in scored] == pytest.approx([expected[i] for i in scored], abs=1e-6)


@pytest.mark.parametrize("kind", ["overlong", "cosine"])
def test_length_rewards_inside_a_trainer_are_trls_columns(kind, known_answers, folder, tmp_path):
    stock = {
        "overlong": lambda: get_soft_overlong_punishment(20, 7),
        "cosine": lambda: get_cosine_scaled_reward(20),
    }[kind]()
    options = {"max_length": 20, "buffer": 7} if kind == "overlong" else {"max_length": 20}
    lengths = borders(20, 7)
    size = 2 * len(lengths)
    shape = {"num_generations": 2, "per_device_train_batch_size": size}
    shaper = LengthShaper(kind, **options)
    plain = shaper.as_reward_func(correct=tiny.share_of_a)
    trainers = [
        make(GRPO, folder, tmp_path, extra={"reward_funcs": [tiny.share_of_a, column]}, **shape)
        for column in (stock, plain)
    ]
    correct = {"correct": ("share_of_a", 0.5)}
    trainers.append(make(GRPO, folder, tmp_path, [shaper], extra=correct, **shape))
    texts = ["a", "b"] * len(lengths)
    rows = [{"prompt": "b", "solution": float(text == "a")} for text in texts]
    ids = of_lengths([n for n in lengths for _ in range(2)])
    tables = []
    for trainer in trainers:
        trainer.model.train()
        tables.append(trainer._calculate_rewards(rows, ["b"] * size, texts, ids))
    torch.testing.assert_close(tables[1], tables[0])
    torch.testing.assert_close(tables[2], tables[0])
    assert tables[0][:, 1].unique().numel() > 3


@pytest.mark.parametrize("base", [GRPO, RLOO])
def test_advantages_of_overlong_answers_are_trls(base, folder, tmp_path):
    punish = get_soft_overlong_punishment(5, 3)
    theirs = make(
        base,
        folder,
        tmp_path,
        extra={"reward_funcs": [tiny.share_of_a, punish]},
        per_device_train_batch_size=16,
    )
    ours = make(
        base,
        folder,
        tmp_path,
        [LengthShaper("overlong", max_length=5, buffer=3)],
        per_device_train_batch_size=16,
    )
    outs = []
    for trainer in (theirs, ours):
        trainer.model.train()
        rows = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(3)
        outs.append(trainer._generate_and_score_completions(rows))
    assert torch.equal(outs[0]["completion_ids"], outs[1]["completion_ids"])
    torch.testing.assert_close(outs[1]["advantages"], outs[0]["advantages"])
    assert outs[0]["completion_mask"].sum(1).unique().numel() > 1


def kimi_by_hand(lengths, rewards, correct):
    low, high = min(lengths), max(lengths)
    u = [0.5 - (n - low) / (high - low) if high > low else 0.0 for n in lengths]
    return [x if right else min(0.0, x) for x, right in zip(u, correct, strict=True)]


def adaptive_by_hand(lengths, rewards, correct):
    limit = 2 if sum(correct) > len(correct) / 2 else 4  # only answers of 12 tokens are cut off
    return [0.0 if n <= limit else -r for n, r in zip(lengths, rewards, strict=True)]


@pytest.mark.parametrize(
    ("shaper", "by_hand"),
    [
        (lambda: LengthShaper("kimi", coef=0.3), kimi_by_hand),
        (
            lambda: LengthShaper("truncate_adaptive", coef=0.3, max_length=4, easy_length=2),
            adaptive_by_hand,
        ),
    ],
    ids=["kimi", "truncate_adaptive"],
)
def test_shaping_within_groups_is_a_loop_over_shuffled_rows(shaper, by_hand, folder, tmp_path):
    carry = Watching("group", "rewards", "lengths", "correct")
    trainer = make(
        GRPO,
        folder,
        tmp_path,
        [shaper(), carry],
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=12,
        extra={"correct": ("share_of_a", 0.05)},
    )
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ids = batch["completion_ids"]
    raw = (ids == 4).sum(1) / (ids > 3).sum(1).clamp(min=1)  # 4 is "a", symbols up to 3 are special
    group, lengths = batch["reg_group"].tolist(), batch["completion_mask"].sum(1).tolist()
    assert (batch["reg_group"].diff() < 0).any(), "the shuffle left the order as it was"
    changes = set()
    for g in set(group):
        rows = [i for i, name in enumerate(group) if name == g]
        assert len(rows) == 4
        shares = raw[rows].tolist()
        change = by_hand([lengths[i] for i in rows], shares, [r >= 0.05 for r in shares])
        expected = [r + 0.3 * c for r, c in zip(shares, change, strict=True)]
        assert batch["reg_rewards"][rows].tolist() == pytest.approx(expected, abs=1e-6)
        mean = sum(expected) / 4
        spread = torch.tensor(expected).std() + 1e-4
        assert batch["advantages"][rows].tolist() == pytest.approx(
            [(r - mean) / spread.item() for r in expected], abs=1e-4
        )
        changes |= {round(c, 4) for c in change}
    assert len(changes) > 2


NOTHING = {"loss_type": ["sft"], "loss_weights": [0.0]}
BOTH = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}


@pytest.mark.parametrize(
    ("module", "stock", "ours"),
    [
        (lambda: NLLAnchor(0.2), BOTH, {}),
        (lambda: RPO(beta=0.1, eta=0.2, sft_reduction="token-mean"), BOTH, NOTHING),
        (lambda: LDDPO(beta=0.1, alpha=0.3), {"ld_alpha": 0.3}, NOTHING),
        (lambda: LDDPO(beta=0.1), {}, NOTHING),
    ],
    ids=["sft", "rpo", "length-desensitized", "dpo"],
)
def test_preference_terms_are_trls(module, stock, ours, folder, tmp_path):
    theirs = moved(make(DPO, folder, tmp_path, **stock))
    mine = moved(make(DPO, folder, tmp_path, [module()], **ours))
    gradient = same(theirs, mine, batch_for(DPO, theirs))
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize(
    ("stock", "kind", "order"),
    [
        ("reverse_kl", "kl", None),
        ("forward_kl", "reverse-kl", None),
        ("js_divergence", "js", None),
        *(("alpha_divergence", "alpha", order) for order in (0.0, 0.5, 1.0, 2.0)),
    ],
)
def test_divergences_of_dpo_are_trls(stock, kind, order, folder, tmp_path):
    options = {"f_divergence_type": stock}
    if order is not None:
        options["f_alpha_divergence_coef"] = order
    theirs = moved(make(DPO, folder, tmp_path, **options))
    term = LDDPO(beta=0.1, divergence=kind, order=order)
    mine = moved(make(DPO, folder, tmp_path, [term], **NOTHING))
    assert same(theirs, mine, batch_for(DPO, theirs)).norm() > 1e-3


def test_two_dpo_micro_batches_average_to_one(folder, tmp_path):
    one = moved(make(DPO, folder, tmp_path, [LDDPO(beta=0.1, alpha=0.5)], **NOTHING))
    batch = batch_for(DPO, one)
    _, whole = gradients(one, batch)
    halves = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
    found = sum(gradients(one, {k: v[rows] for k, v in batch.items()})[1] for rows in halves)
    assert not one.loss_is_scaled_for_ga  # so TRL's base trainer divides the sum
    close(found / 2, whole)


def test_modulated_advantages_come_from_all_rows_before_the_loss(folder, tmp_path):
    rows = {}
    for name, regularizers in (("stock", None), ("ours", [EMPG()])):
        trainer = make(GRPO, folder, tmp_path, regularizers)
        trainer.model.train()
        given = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(7)
        rows[name] = trainer._generate_and_score_completions(given)
    out = rows["ours"]
    assert torch.equal(out["completion_ids"], rows["stock"]["completion_ids"])
    logp = tiny.logits_of(tiny.exact_copy(folder), out).log_softmax(-1).float().detach()
    mask = out["completion_mask"]
    x = RegInputs(
        advantages=rows["stock"]["advantages"],
        mask=mask,
        turn=torch.where(mask > 0, 0, -1),
        entropy=-(logp.exp() * logp).sum(-1),
    )
    torch.testing.assert_close(out["advantages"], EMPG()(x).advantages)
    assert out["advantages"].shape == mask.shape


HAVE = {"stats.nucleus_entropy", "stats.lse", "stats.log_sum_sq"}


def fits(case, host):
    module = case.make()
    return module.hook == "loss" and module.requires <= host.offered | HAVE


def given(batch, rows):
    """Inputs of the reward table that the rollout would have carried along."""
    g = torch.Generator().manual_seed(2)
    shape = batch["completion_ids"].shape
    draw = {
        "ref_logp": torch.randn(shape, generator=g) - 2.5,
        "old_logp": torch.randn(shape, generator=g) / 5 - 2.7,
        "rewards": torch.rand(rows, generator=g),
        "lengths": batch["completion_mask"].sum(1),
        "correct": torch.arange(rows) % 2 == 0,
        "finished": torch.ones(rows, dtype=torch.bool),
        "group": torch.arange(rows) // 2,
        "prompt_id": torch.arange(rows) // 2,
        "level": torch.arange(rows) % 2,
    }
    return {f"reg_{name}": value for name, value in draw.items()}


ROLLOUT_CASES = [case for case in all_cases() if fits(case, Rollout)]
PAIR_CASES = [c for c in all_cases() if fits(c, Preference) and "chosen" in c.make().requires]


@pytest.mark.parametrize("case", ROLLOUT_CASES, ids=lambda case: case.name)
def test_with_zero_advantages_the_gradient_is_the_modules_alone(case, folder, tmp_path):
    module = case.make()
    twin = copy.deepcopy(module)
    correct = {"correct": ("share_of_a", 0.5)} if "correct" in module.requires else {}
    trainer = make(GRPO, folder, tmp_path, [module], extra=correct)
    batch = tiny.batch_by_hand()
    batch |= given(batch, 4)
    if "advantages" not in module.requires:
        batch["advantages"] = torch.zeros(4)
    loss, found = gradients(trainer, batch)
    model = tiny.exact_copy(folder)
    logits = tiny.logits_of(model, batch)
    want = {
        "logp": "logp",
        "entropy": "entropy",
        "lse": "lse",
        "log_sum_sq": "log_sum_sq",
        "nucleus_entropy": SetEntropy(Nucleus(0.8)),
    }
    stats = token_stats_from_logits(logits, batch["completion_ids"], want)
    names = {f.name for f in fields(RegInputs)}
    carried = {k.removeprefix("reg_"): v for k, v in batch.items() if k.startswith("reg_")}
    x = RegInputs(
        mask=batch["completion_mask"],
        logp=stats["logp"],
        entropy=stats["entropy"],
        stats=stats,
        advantages=batch["advantages"],
        turn=torch.where(batch["completion_mask"] > 0, 0, -1),
        **{k: v for k, v in carried.items() if k in names},
    )
    trainer.reg.parts[f"0_{type(module).__name__}"] = twin
    term, _, _ = trainer.reg.run_loss(x)
    term = term + 0 * logits.sum()  # some modules have no gradient
    expected = torch.autograd.grad(term, list(model.parameters()), allow_unused=True)
    expected = torch.cat(
        [
            torch.zeros(p.numel()).double() if g is None else g.flatten()
            for p, g in zip(model.parameters(), expected, strict=True)
        ]
    )
    plain, stock = gradients(make(GRPO, folder, tmp_path), batch)
    assert (loss - plain - term.detach()).abs() < 1e-5 * max(1, term.abs().item())
    difference = (found - stock).double()
    assert (difference - expected).norm() <= 1e-4 * expected.norm() + 2e-6, (
        difference.norm(),
        expected.norm(),
    )


@pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: case.name)
def test_in_dpo_without_a_loss_the_gradient_is_the_modules(case, folder, tmp_path):
    module = case.make()
    twin = copy.deepcopy(module)
    trainer = moved(make(DPO, folder, tmp_path, [module], **NOTHING))
    batch = batch_for(DPO, trainer)
    loss, found = gradients(trainer, batch)
    model, reference = tiny.exact_copy(folder), tiny.exact_copy(folder)
    model.load_state_dict(trainer.model.state_dict())
    ids, attention = batch["input_ids"], batch["attention_mask"]
    logits = [m(ids, attention_mask=attention).logits[:, :-1] for m in (model, reference)]
    stats, ref = (token_stats_from_logits(x, ids[:, 1:]) for x in logits)
    mask = batch["completion_mask"][:, 1:]
    x = RegInputs(
        mask=mask,
        logp=stats["logp"],
        entropy=stats["entropy"],
        ref_logp=ref["logp"].detach(),
        chosen=torch.arange(len(mask)) < len(mask) // 2,
    )
    trainer.reg.parts[f"0_{type(module).__name__}"] = twin
    term, _, _ = trainer.reg.run_loss(x)
    term.backward()
    close(loss, term.detach())
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]))
