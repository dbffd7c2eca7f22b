# pyright: reportMissingImports=false
"""The demo model's network: GGUF architecture `llama`, in plain PyTorch.

Rotary embeddings turn neighbouring pairs, which is what that architecture expects: nothing has to
be permuted on export. Names of parts are those of GGUF tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 2048


@dataclass(frozen=True)
class Shape:
    """Sizes. The defaults are those of the model that ships: 2.07 million parameters."""

    vocab: int = 1536
    width: int = 192
    layers: int = 4
    heads: int = 6
    hidden: int = 512
    context: int = 1024
    epsilon: float = 1e-5
    theta: float = 10_000.0

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class RmsNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.epsilon = shape.epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class Block(nn.Module):
    """One layer: attention, then a gated feed-forward network, each added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden = shape.width, shape.hidden
        self.heads, self.head_width = shape.heads, shape.head_width
        self.attn_norm = RmsNorm(shape)
        self.ffn_norm = RmsNorm(shape)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, width, bias=False)
        self.attn_v = nn.Linear(width, width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_gate = nn.Linear(width, hidden, bias=False)
        self.ffn_up = nn.Linear(width, hidden, bias=False)
        self.ffn_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        inner = self.attn_norm(x)
        q = rotate(self._split(self.attn_q(inner)), cos, sin)
        k = rotate(self._split(self.attn_k(inner)), cos, sin)
        v = self._split(self.attn_v(inner))
        seen = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
        x = x + self.attn_output(seen.transpose(1, 2).flatten(2))
        inner = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(inner)) * self.ffn_up(inner))

    def _split(self, x: Tensor) -> Tensor:
        """(batch, time, width) to (batch, heads, time, width of a head)."""
        return x.unflatten(2, (self.heads, self.head_width)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbours by its angle."""
    one, other = x[..., 0::2], x[..., 1::2]
    return torch.stack((one * cos - other * sin, one * sin + other * cos), -1).flatten(-2)


class Network(nn.Module):
    """Token ids (batch, time) to logits (batch, time, vocabulary); both ends share weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(shape.vocab, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = RmsNorm(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the stream is made smaller with depth, as in GPT-2.
                adds = "attn_output" in name or "ffn_down" in name
                spread = 0.02 / (2 * shape.layers) ** 0.5 if adds else 0.02
                nn.init.normal_(parameter, std=spread)
        steps = torch.arange(0, shape.head_width, 2).float() / shape.head_width
        angles = torch.outer(torch.arange(LONGEST).float(), shape.theta**-steps)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, self.cos[:time], self.sin[:time])
        return F.linear(self.output_norm(x), self.token_embd.weight)
