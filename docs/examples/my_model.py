"""A model of your own: modelpar train model=file model.factory=docs/examples/my_model.py:build."""

import torch
from torch import nn


class Residual(nn.Module):
    """Adds what a small network makes of its input to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (batch, width) to the same shape."""
        return x + self.net(self.norm(x))


def build():
    """Returns (model, example_batch, loss). Of an nn.Sequential the children are the layers that can be split."""
    model = nn.Sequential(nn.Linear(32, 128), *[Residual(128) for _ in range(6)], nn.Linear(128, 5))
    example_batch = torch.randn(64, 32), torch.randint(5, (64,))
    return model, example_batch, nn.functional.cross_entropy
