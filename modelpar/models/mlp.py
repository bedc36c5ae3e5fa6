"""A residual multi-layer perceptron: stem ─▶ b0 ─▶ b1 ─▶ … ─▶ head, one tensor (batch, width) between all of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpar.errors import ConfigError


class Block(nn.Module):
    """Adds a normalised, non-linear map of its input to it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, width) to the same shape."""
        out: Tensor = x + self.dropout(F.gelu(self.linear(self.norm(x))))
        return out


def build(
    input_shape: Sequence[int] = (256,),
    num_classes: int = 10,
    width: int = 512,
    depth: int = 8,
    dropout: float = 0.1,
) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Tensor]]:
    """Returns the model, a small random batch and cross entropy; weights are drawn from torch's global generator.

    The example's inputs are float32 (4, *input_shape), its targets int64 (4,). Raises ConfigError for sizes that do
    not fit.
    """
    for name, size in {"num_classes": num_classes, "width": width, "depth": depth}.items():
        if size < 1:
            raise ConfigError(f"model.{name} is {size}; expected at least 1")
    if not input_shape or min(input_shape) < 1:
        raise ConfigError(f"model.input_shape is {list(input_shape)}; expected sizes of at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout is {dropout}; expected 0 or more, and less than 1")
    stem = OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(math.prod(input_shape), width))
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem))
    for i in range(depth):
        layers[f"b{i}"] = Block(width, dropout)
    layers["head"] = nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), linear=nn.Linear(width, num_classes)))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *input_shape, generator=generator)
    targets = torch.randint(num_classes, (4,), generator=generator)
    return nn.Sequential(layers), (inputs, targets), F.cross_entropy
