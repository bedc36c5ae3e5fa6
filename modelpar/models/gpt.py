"""A byte-level GPT as a list of layers.

::

    embed ─▶ h0 ─▶ h1 ─▶ … ─▶ head        every arrow: (batch, time, width)
      └──────── token weight ────┘        tied: one Parameter under two names

Pre-norm transformer blocks (Xiong et al. 2020) with causal attention, learned positions and GELU; initialised as in
GPT-2 (Radford et al. 2019): normal, the projections into the residual stream scaled by 1/√(2·depth).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpar.errors import ConfigError

INIT_STD = 0.05
"""About 1/√(2·width) at the default width; GPT-2's 0.02 suits widths of 768 and more, and learns slower here."""


class Embedding(nn.Module):
    """Turns token numbers (batch, time) into vectors (batch, time, width), each with its position added."""

    def __init__(self, vocab_size: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.token.weight, std=INIT_STD)
        nn.init.normal_(self.position, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the vectors; raises ValueError for more tokens than there are positions."""
        time, context = tokens.shape[1], self.position.shape[0]
        if time > context:
            raise ValueError(f"the input has {time} tokens per sample; this model has {context} positions")
        embedded: Tensor = self.dropout(self.token(tokens) + self.position[:time])
        return embedded


class Attention(nn.Module):
    """Causal multi-head self-attention; drops attention weights while training."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, time, width))
        return projected


class Block(nn.Module):
    """One transformer block: attention, then an MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float, residual_std: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.attn.qkv, self.attn.proj, self.up, self.down):
            into_residual = linear is self.attn.proj or linear is self.down
            nn.init.normal_(linear.weight, std=residual_std if into_residual else INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, time, width) to the same shape."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return x


class Head(nn.Module):
    """Turns vectors (batch, time, width) into logits (batch, time, vocab_size)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.token.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.token(self.norm(x))
        return logits


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross entropy per token in nats; logits (batch, time, vocab_size), targets (batch, time)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build(
    vocab_size: int = 256,
    context: int = 64,
    width: int = 192,
    depth: int = 6,
    heads: int = 6,
    dropout: float = 0.1,
    tied: bool = True,
) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Tensor]]:
    """Returns the model, a small random batch and its loss; weights are drawn from torch's global generator.

    The example's inputs and targets are int64 of shape (4, context). Raises ConfigError for sizes that do not fit.
    """
    sizes = {"vocab_size": vocab_size, "context": context, "width": width, "depth": depth, "heads": heads}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model.{name} is {size}; expected at least 1")
    if width % heads:
        raise ConfigError(f"model.width is {width}, which model.heads={heads} does not divide; expected a multiple")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout is {dropout}; expected 0 or more, and less than 1")
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=Embedding(vocab_size, context, width, dropout))
    for i in range(depth):
        layers[f"h{i}"] = Block(width, heads, dropout, INIT_STD / math.sqrt(2 * depth))
    head = Head(vocab_size, width)
    if tied:
        head.token.weight = layers["embed"].get_parameter("token.weight")
    layers["head"] = head
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (4, context + 1), generator=generator)
    return nn.Sequential(layers), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), loss
