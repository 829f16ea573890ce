"""A language model of 16 symbols, trainers around it, and batches made by hand."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SYMBOLS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *"abcdefghijkl"]


def build(folder, seed=0, model=None):
    """Write a random model and its tokenizer; TRL makes the reference from the same folder."""
    raw = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="[UNK]"))
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
    if model is None:
        model = Qwen2ForCausalLM(qwen())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def qwen(**changes):
    options = dict(
        vocab_size=len(SYMBOLS),
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
    return Qwen2Config(**(options | changes))


def softcapped():
    options = qwen().to_dict()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    options = {name: options[name] for name in names}
    # caps of 2 and weights of size 1 bend the logits visibly
    return Gemma2ForCausalLM(
        Gemma2Config(
            **options,
            head_dim=8,
            final_logit_softcapping=2.0,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def scaled():
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            logit_scale=3.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def biased():
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def untied():
    return Qwen2ForCausalLM(qwen(tie_word_embeddings=False))


def share_of_a(completions, **kwargs):
    return [text.count("a") / max(len(text), 1) for text in completions]


def logits_of(model, batch, temperature=1.0):
    """Reference: plain logits of the completion's tokens, (B, T, V)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    t = batch["completion_ids"].size(1)
    return model(ids, attention_mask=attention).logits[:, -t - 1 : -1] / temperature


def batch_by_hand(rows=4, prompt=3, tokens=6, seed=0, left=True):
    """Prompts padded on the left, completions on the right, of different lengths."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(4, len(SYMBOLS), shape, generator=g)

    prompt_mask, mask = torch.ones(rows, prompt).long(), torch.ones(rows, tokens).long()
    for i in range(rows):
        prompt_mask[i, : i % prompt if left else 0] = 0
        mask[i, tokens - i % (tokens - 1) :] = 0
    return {
        "prompt_ids": draw(rows, prompt) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": draw(rows, tokens) * mask,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=g),
        "num_items_in_batch": mask.sum(),
        "reg_sequences": torch.tensor(rows),  # what the adapter's rollout adds
    }


def exact_copy(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
