"""A residual convolutional network with batch normalisation (He et al. 2016).

::

    stem ─▶ b0 ─▶ b1 ─▶ … ─▶ head        every arrow: (batch, channels, height, width)

The first third of the blocks has `width` channels; the second and the last third each begin by doubling the channels
and halving height and width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpar.errors import ConfigError


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut; writes in place only to what it made itself."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels_in, h, w) to (batch, channels_out, ⌈h / stride⌉, ⌈w / stride⌉)."""
        y = self.relu(self.norm1(self.conv1(x)))
        out: Tensor = self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
        return out


def build(
    input_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    width: int = 16,
    depth: int = 6,
) -> tuple[nn.Module, tuple[Any, Any], Callable[..., Tensor]]:
    """Returns the model, a small random batch and cross entropy; weights are drawn from torch's global generator.

    The example's inputs are float32 (4, *input_shape), its targets int64 (4,). Raises ConfigError for sizes that do
    not fit.
    """
    for name, size in {"num_classes": num_classes, "width": width, "depth": depth}.items():
        if size < 1:
            raise ConfigError(f"model.{name} is {size}; expected at least 1")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ConfigError(f"model.input_shape is {list(input_shape)}; expected [channels, height, width]")
    stem = OrderedDict(
        conv=nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem))
    channels = width
    for i in range(depth):
        wider = width * 2 ** (3 * i // depth)
        layers[f"b{i}"] = Block(channels, wider, stride=1 if wider == channels else 2)
        channels = wider
    layers["head"] = nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *input_shape, generator=generator)
    targets = torch.randint(num_classes, (4,), generator=generator)
    return nn.Sequential(layers), (inputs, targets), F.cross_entropy
