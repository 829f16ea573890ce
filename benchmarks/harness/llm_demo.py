"""Regularizers inside TRL, on a random model of 16 symbols: no download, a minute on one core.

    pip install -c constraints.txt -e '.[llm]'
    python scripts/llm_demo.py                  # GRPO with an entropy bonus and a length shaper
    python scripts/llm_demo.py --method dpo     # DPO with an anchor on the chosen answers
    python scripts/llm_demo.py --seeds 5        # four GRPO variants, picture and numbers

The GRPO task: answer with 5 to 12 letters of `abcd`. The four are worth 1, 0.98, 0.96 and 0.94, so
nearly all of the reward can be had with log 4 nats per letter or with none, and with any length.
GRPO divides by the spread of a group, so it makes as much of the last 0.02 as of the first 0.3.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from offrl.integrations.trl import with_regularizers
from offrl.regularizers import DualVariable, EntropyBonus, LengthShaper, NLLAnchor

LETTERS = "abcdefghijkl"
GOOD = {"a": 1.0, "b": 0.98, "c": 0.96, "d": 0.94}
TARGET = 0.8  # nats per token
CURVES = {
    "reward": ("rewards/mean_value/mean", "reward (mean value of letters)"),
    "entropy": ("entropy", "entropy (nats per token)"),
    "length": ("completions/mean_length", "tokens per answer"),
}


def build(folder: str, seed: int) -> PreTrainedTokenizerFast:
    """Write a random model and a tokenizer of single letters to `folder`."""
    symbols = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *LETTERS]
    raw = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(symbols),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train(trainer) -> None:
    """Without the dictionaries that TRL prints after every step."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def mean_value(completions, **kwargs):
    return [sum(GOOD.get(c, 0.0) for c in text) / max(len(text), 1) for text in completions]


def entropy_bonus():
    """The controller of TRL's adaptive entropy: applied, and rising, while below the target.

    `EntropyAnchor` holds the entropy of the first step instead, which is that of noise here.
    """
    coef = DualVariable(0.0, rule="additive", delta=0.02, bounds=(0.0, 0.2), gate=True)
    return EntropyBonus(coef, target=TARGET)


def length_shaper():
    return LengthShaper("kimi", coef=0.1)


VARIANTS = {
    "TRL alone": list,
    "+ EntropyBonus": lambda: [entropy_bonus()],
    "+ LengthShaper": lambda: [length_shaper()],
    "+ both": lambda: [entropy_bonus(), length_shaper()],
}


class Progress(TrainerCallback):
    """Advances a bar that outlives one trainer."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()


def common(folder: str, seed: int, steps: int) -> dict:
    return dict(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=seed,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        log_level="error",
    )


def grpo(regularizers: list, folder: str, seed: int, steps: int, bar: tqdm) -> dict:
    """Train once; returns the curves by name."""
    tokenizer = build(folder, seed)
    trainer = with_regularizers(GRPOTrainer)(
        model=folder,
        args=GRPOConfig(
            **common(folder, seed, steps),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=12,
            generation_kwargs={"min_new_tokens": 5},
            beta=0.0,
        ),
        processing_class=tokenizer,
        reward_funcs=mean_value,
        train_dataset=Dataset.from_dict({"prompt": [c * 3 for c in LETTERS] * 12}),
        callbacks=[Progress(bar)],
        regularizers=regularizers,
        correct=("mean_value", 0.9),
    )
    train(trainer)
    rows = [row for row in trainer.state.log_history if "entropy" in row]
    return {name: [row[key] for row in rows] for name, (key, _) in CURVES.items()}


def dpo(regularizers: list, folder: str, seed: int, steps: int, bar: tqdm) -> dict:
    """Answers of good letters against others; does the likelihood of the chosen ones survive?"""
    tokenizer = build(folder, seed)
    draw = np.random.default_rng(seed)
    word = lambda letters: "".join(draw.choice(list(letters), draw.integers(2, 7)))  # noqa: E731
    pairs = [(c * 3, word(list(GOOD)), word(LETTERS[4:])) for c in LETTERS * 12]
    prompt, chosen, rejected = (list(column) for column in zip(*pairs, strict=True))
    trainer = with_regularizers(DPOTrainer)(
        model=folder,
        args=DPOConfig(**common(folder, seed, steps), per_device_train_batch_size=16),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompt, "chosen": chosen, "rejected": rejected}),
        callbacks=[Progress(bar)],
        regularizers=regularizers,
    )
    train(trainer)
    rows = [row for row in trainer.state.log_history if "logps/chosen" in row]
    return {key: [row[key] for row in rows] for key in ("logps/chosen", "rewards/accuracies")}


def last(curve: list[float], n: int = 20) -> float:
    return float(np.mean(curve[-n:]))


def compare(seeds: int, steps: int, out: Path) -> None:
    """All variants with all seeds; a picture and the numbers behind it."""
    start = time.time()
    curves: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    with tqdm(total=len(VARIANTS) * seeds * steps, unit="step", smoothing=0.05) as bar:
        for seed in range(seeds):
            for name, make in VARIANTS.items():
                bar.set_description(f"seed {seed} {name}")
                with tempfile.TemporaryDirectory() as folder:
                    curves[name].append(grpo(make(), folder, seed, steps, bar))
    summary = {
        name: {
            key: {"mean": float(np.mean(ends)), "lowest": min(ends), "highest": max(ends)}
            for key in CURVES
            for ends in [[last(run[key]) for run in runs]]
        }
        for name, runs in curves.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "trl", "transformers", "datasets", "accelerate", "offrl")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()} | {p: found(p) for p in packages},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - start, 1),
        "seeds": list(range(seeds)),
        "steps": steps,
        "entropy_target": TARGET,
        "last_20_steps": summary,
        "curves": {
            name: {key: np.round([run[key] for run in runs], 4).tolist() for key in CURVES}
            for name, runs in curves.items()
        },
    }
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    draw(curves, seeds, out.with_suffix(".png"))
    for name, row in summary.items():
        print(f"{name:16s}" + "  ".join(f"{key} {value['mean']:.2f}" for key, value in row.items()))
    print(f"{out.with_suffix('.png')} and .json; {record['seconds']} s")


def found(package: str) -> str:
    if package == "offrl":
        import offrl

        return offrl.__version__
    return version(package)


def draw(curves: dict[str, list[dict]], seeds: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(CURVES), figsize=(13, 4.2), dpi=120)
    colors = dict(zip(curves, ("#555555", "#d95f02", "#1b75bc", "#1b9e77"), strict=True))
    for panel, (key, (_, label)) in zip(panels, CURVES.items(), strict=True):
        for name, runs in curves.items():
            values = smooth(np.array([run[key] for run in runs]))
            steps = np.arange(values.shape[1])
            panel.plot(steps, values.mean(0), color=colors[name], linewidth=1.8, label=name)
            panel.fill_between(
                steps, values.min(0), values.max(0), color=colors[name], alpha=0.13, linewidth=0
            )
        panel.set(xlabel="optimizer step", title=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[1].axhline(TARGET, color="black", linewidth=0.8, linestyle="--")
    panels[1].text(0, TARGET + 0.05, "target")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=len(names), frameon=False)
    figure.suptitle(f"GRPO on a tiny random model: mean and range of {seeds} seeds")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Running mean over the last `width` steps."""
    padded = np.concatenate([np.repeat(values[:, :1], width - 1, 1), values], 1)
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("grpo", "dpo"), default="grpo")
    parser.add_argument("--seeds", type=int, help="compare all variants over so many seeds")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/regularizers/llm_demo"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if options.seeds:
        compare(options.seeds, options.steps, options.out)
        return
    run, variants = {
        "grpo": (grpo, {name: VARIANTS[name] for name in ("TRL alone", "+ both")}),
        "dpo": (dpo, {"TRL alone": list, "+ NLLAnchor": lambda: [NLLAnchor(coef=0.2)]}),
    }[options.method]
    for name, make in variants.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            tqdm(total=options.steps, unit="step", desc=name) as bar,
        ):
            curves = run(make(), folder, 0, options.steps, bar)
        print(name)
        for key, curve in curves.items():
            print(
                f"  {key:20s} first 5 steps {np.mean(curve[:5]):7.2f}, last 5 {last(curve, 5):7.2f}"
            )
