"""GPT blocks over sequences of embedded tokens, without a table of positions."""

import torch
from torch import Tensor, nn

from offrl.nets.kernels.chain import chain
from offrl.nets.linear import Linear, Source, device_of


class Dropout(nn.Module):
    """Inverted dropout whose draws come from a generator, so that a run resumes exactly."""

    def __init__(self, rate: float, generator: Source):
        super().__init__()
        self.rate, self.generator = rate, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        # on a CPU twice as fast as bernoulli_
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate))


class Block(nn.Module):
    """Pre-norm causal self-attention, then an MLP of four times the width with ReLU."""

    def __init__(self, width: int, heads: int, dropout: Dropout, generator: Source):
        super().__init__()
        device = device_of(generator)
        self.heads, self.dropout = heads, dropout
        self.norm_attention = nn.LayerNorm(width, device=device)
        self.norm_mlp = nn.LayerNorm(width, device=device)
        self.qkv = Linear(width, 3 * width, generator=generator)
        self.out = Linear(width, width, generator=generator)
        self.up = Linear(width, 4 * width, generator=generator)
        self.down = Linear(4 * width, width, generator=generator)
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(layer.weight, 0, 0.02, generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (B, L, d); hidden (B, L, L) bool, true where a query (second axis) may not look."""
        x = x + self.dropout(self.attention(self.norm_attention(x), hidden))
        layers = [(layer.weight, layer.bias) for layer in (self.up, self.down)]
        return x + self.dropout(chain(self.norm_mlp(x), layers))

    def attention(self, x: Tensor, hidden: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # (B, H, L, d / H)
        logits = query @ key.mT / query.shape[-1] ** 0.5
        # a query that may look at nothing, a pad, gets even weights instead of NaN
        logits = logits.masked_fill(hidden.unsqueeze(1), torch.finfo(logits.dtype).min)
        mixed = self.dropout(logits.softmax(-1)) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """L pre-norm blocks and a last LayerNorm: (B, T, width) -> (B, T, width).

    Epsilon of the norms 1e-5, weights N(0, 0.02), biases 0. Dropout falls on the input, on the
    attention weights and on both branches of a block; the generator draws it and the weights.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, in the form
    of Decision Transformer's released code: ReLU, and no embedding of positions in the window.
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float, generator: Source):
        super().__init__()
        self.dropout = Dropout(dropout, generator)
        blocks = [Block(width, heads, self.dropout, generator) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, device=device_of(generator))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, width); mask (B, T), 0 at pads: nothing looks there, their results are void."""
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        hidden = future | (mask == 0).unsqueeze(1)  # (B, T, T)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, hidden)
        return self.norm(x)
