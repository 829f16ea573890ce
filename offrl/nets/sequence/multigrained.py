"""Decision Mamba's blocks: tokens mixed one by one and by steps of three.

Lv et al., "Decision Mamba: A Multi-Grained State Space Model with Self-Evolution Regularization for
Offline RL", NeurIPS 2024, arXiv:2406.05427. Equations: `offrl.algos.decision_mamba`.

Shapes: B batch, K steps of three tokens (R_t, s_t, a_t), d width, E = 2d inner channels.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from offrl.nets.kernels import fused_backbone
from offrl.nets.linear import Linear, Source, device_of
from offrl.nets.sequence.mamba import Mixer

Grouping = Literal["causal", "release"]


class Block(nn.Module):
    """One residual block: (B, 3K, width) -> (B, 3K, width)."""

    def __init__(self, width: int, fine: bool, grouping: Grouping, generator: Source):
        super().__init__()
        device = device_of(generator)
        self.causal, self.has_fine = grouping == "causal", fine
        self.norm = nn.RMSNorm(width, eps=1e-5, device=device)
        self.coarse = Mixer(width, generator=generator)
        if fine:
            self.group = Linear(3 * width, width, generator=generator)  # a convolution of stride 3
            self.fine = Mixer(width, generator=generator)
            self.fine_norm = nn.LayerNorm(width, device=device)

    def forward(self, x: Tensor, mask: Tensor | None, kept: int | None = None) -> Tensor:
        """mask (B, K), 0 at padded steps, None lets pads in; kept: steps at the end to return."""
        kept = kept or x.shape[1] // 3
        normed = self.norm(x)
        tokens = None if mask is None else mask.repeat_interleave(3, 1)
        x = x[:, -3 * kept :] + self.coarse(normed, tokens, 3 * kept)
        if not self.has_fine:
            return x
        if tokens is not None:
            normed = normed * tokens.unsqueeze(-1)
        zero = torch.zeros_like(normed[:, :1])
        shifted = [zero, normed[:, :-1]] if self.causal else [normed[:, :-1], zero]
        groups = torch.cat(shifted, 1).unflatten(1, (-1, 3)).flatten(2)  # (B, K, 3 d)
        f = self.fine(self.group(groups), mask, kept if self.causal else None)
        f = self.fine_norm(f)  # (B, kept, d), released groups: (B, K, d)
        if self.causal:
            return (x.unflatten(1, (-1, 3)) + f.unsqueeze(2)).flatten(1, 2)
        return x + f.repeat(1, 3, 1)[:, -3 * kept :]  # token p gets f_{p mod K}

    # Step by step, causal grouping: what has to be remembered does not grow.

    def start(self, batch: int) -> dict[str, Any]:
        """Memory before the first step, all zeros: both mixers' and the last a-token."""
        memory: dict[str, Any] = {"coarse": self.coarse.start(batch)}
        if self.has_fine:
            blank = self.norm.weight.new_zeros(batch, len(self.norm.weight))
            memory |= {"fine": self.fine.start(batch), "action": blank}
        return memory

    def observe(self, pair: Tensor, memory: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """R- and s-token together: pair (B, 2, d) -> their outputs, and memory for `decide`."""
        r, s = self.norm(pair).unbind(1)
        y_r, coarse = self.coarse.step(r, memory["coarse"])
        y_s, coarse = self.coarse.step(s, coarse)
        pair, memory = pair + torch.stack([y_r, y_s], 1), memory | {"coarse": coarse}
        if not self.has_fine:
            return pair, memory
        group = self.group(torch.cat([memory["action"], r, s], -1))
        f, fine = self.fine.step(group, memory["fine"])
        f = self.fine_norm(f)
        return pair + f.unsqueeze(1), memory | {"fine": fine, "f": f}

    def decide(self, a: Tensor, memory: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The a-token (B, d) of the step that was observed -> its output, and the next memory."""
        normed = self.norm(a)
        y, coarse = self.coarse.step(normed, memory["coarse"])
        if not self.has_fine:
            return a + y, {"coarse": coarse}
        return a + y + memory["f"], {"coarse": coarse, "fine": memory["fine"], "action": normed}


class Backbone(nn.Module):
    """The blocks and a last RMSNorm over tokens: (B, 3K, width) -> (B, 3 kept, width)."""

    def __init__(self, layers: int, width: int, fine: bool, grouping: Grouping, generator: Source):
        super().__init__()
        blocks = [Block(width, fine, grouping, generator) for _ in range(layers)]
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, eps=1e-5, device=device_of(generator))
        self.fusible = grouping == "causal"

    def forward(self, x: Tensor, mask: Tensor | None, kept: int | None = None) -> Tensor:
        if self.fusible and fused_backbone.serves(x):
            blocks, kept = [weights(block) for block in self.blocks], kept or x.shape[1] // 3
            return fused_backbone.forward(x, mask, blocks, self.norm.weight, kept)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        return self.norm(last(x, mask, kept))

    # Step by step, as the blocks.

    def start(self, batch: int) -> list[dict[str, Any]]:
        """Memory before the first step."""
        return [block.start(batch) for block in self.blocks]

    def observe(self, pair: Tensor, memory: list[dict[str, Any]]) -> tuple[Tensor, Any]:
        """R- and s-token together (B, 2, d) -> the output (B, d) at the s-token, and memory."""
        after = []
        for block, own in zip(self.blocks, memory, strict=True):
            pair, own = block.observe(pair, own)
            after.append(own)
        return self.norm(pair[:, 1]), after

    def decide(self, token: Tensor, memory: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The a-token (B, d) of the step that was observed -> memory for the next."""
        after = []
        for block, own in zip(self.blocks, memory, strict=True):
            token, own = block.decide(token, own)
            after.append(own)
        return after


def weights(block: Block) -> list[Tensor]:
    """Of a block, as `fused_backbone.forward` takes them."""
    found = [block.norm.weight, *mixer(block.coarse)]
    if block.has_fine:
        found += [*mixer(block.fine), block.group.weight, block.group.bias]
        found += [block.fine_norm.weight, block.fine_norm.bias]
    return found


def mixer(m: Mixer) -> list[Tensor]:
    step = m.weight_delta, m.delta_bias, m.A_log.mT.contiguous().exp(), m.D
    return [m.weight_in, m.conv, m.conv_bias, m.weight_x, *step, m.weight_out]
