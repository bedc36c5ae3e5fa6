"""Small layers for the tests; in a module of their own, so that worker processes can import them without pytest."""

import os
import signal
from threading import Event

import torch
import torch.nn.functional as F
from torch import nn

from modelpar.capture.objective import LossResult
from modelpar.planning.schedule import Schedule

LARGE = 1e4
"""What the layers below that do something on purpose wait for: an input with a value above it. Nothing else has one."""


def large(x):
    return bool((x.detach().abs() > LARGE).any())


class Trip(nn.Module):
    """Hands its input on, unless there is a large value in it: then it acts."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x) if large(x) else x * 1


def fail(x):
    raise ZeroDivisionError("this layer divides by zero")


def refuse_connection(x):
    raise ConnectionRefusedError("the user's own database is down")


def kill_me(x):
    os.kill(os.getpid(), signal.SIGKILL)


def stop_me(x):
    os.kill(os.getpid(), signal.SIGSTOP)
    return x


def hang(x):
    Event().wait()


def to_nan(x):
    return torch.where(x.abs() > LARGE, torch.nan, x)


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("no gradient today")


class Nest(nn.Module):
    """A layer with a Trip deep inside, to be found by its name."""

    def __init__(self, act, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), Trip(act))

    def forward(self, x):
        scale = LARGE * 10 if large(x) else 1.0
        return self.body[1](self.body[0](x) * 0.1 + x * scale)


class Many(nn.Module):
    """Hands on a dict of a tuple: tensors of several types, None, a number and a string."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        y = self.linear(x)
        return {"both": (y, y.detach() > 0), "none": None, "factor": 3, "name": "tanh", "rank": y.argmax(1)}


class One(nn.Module):
    """Takes what Many hands on."""

    def forward(self, given):
        (y, positive), name = given["both"], given["name"]
        assert given["none"] is None
        assert (given["rank"].dtype, positive.dtype) == (torch.int64, torch.bool)
        return getattr(torch, name)(y) * positive * given["factor"] + given["rank"][:, None]


class First(nn.Module):
    """Takes the first of a tuple, such as an LSTM's output."""

    def forward(self, given):
        return given[0]


class Transpose(nn.Module):
    """Hands on a view with other strides."""

    def forward(self, x):
        return x.transpose(1, 2)


class Slice(nn.Module):
    """Hands on every second column: a view with gaps."""

    def forward(self, x):
        return x[:, ::2]


class Expand(nn.Module):
    """Hands on an expanded view: one column seen many times, with a stride of 0."""

    def forward(self, x):
        return x.mean(1, keepdim=True).expand(-1, 8)


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


class Round(nn.Module):
    """Hands on integers: nothing before it gets a gradient."""

    def forward(self, x):
        return (x.abs() * 10).long() % 7


class Counter(nn.Module):
    """Counts its calls in a buffer, by replacing it instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * (1 + 0.01 * self.calls)


class Shared(nn.Module):
    """A layer that uses a module given to it, which others may use too."""

    def __init__(self, inner, width=8):
        super().__init__()
        self.linear, self.inner = nn.Linear(width, width), inner

    def forward(self, x):
        return self.inner(self.linear(x))


class TwoInputs(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.left, self.right = nn.Linear(width, 8), nn.Linear(width, 8)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


class Settings(nn.Module):
    """Hands on whether the process computes deterministically, and whether matrix products may be less precise."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        found = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision() == "high"
        return self.linear(x) * 0 + torch.tensor([found], device=x.device).float()


class OwnLoss(nn.Module):
    """The last layer of a model that returns its own loss."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        loss = x.square().mean()
        return {"scalar": loss, "tuple": (loss, x), "dict": {"logits": x, "loss": loss}}[self.kind]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def decay(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def count_tokens(output, targets):
    """Mean over tokens that are not padding; micro-batches have different numbers of them, one has none."""
    keep = targets >= 0
    losses = F.cross_entropy(output, targets.clamp(min=0), reduction="none")
    hits = (output.argmax(1) == targets).sum().item()
    return LossResult((losses * keep).sum(), int(keep.sum()), {"accuracy": hits / max(1, int(keep.sum()))})


def looped(num_ranks, num_microbatches):
    """Two stages per rank: rank 0 has stages 0 and 2, rank 1 has 1 and 3; depth first."""
    text = []
    for rank in range(num_ranks):
        forward = [f"{s}F{m}" for m in range(num_microbatches) for s in (rank, rank + num_ranks)]
        backward = [f"{s}B{m}" for m in range(num_microbatches) for s in (rank + num_ranks, rank)]
        text.append(" ".join(forward + backward))
    return Schedule.of(text)
