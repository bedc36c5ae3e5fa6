"""What a model or a loss takes from outside: constants it may, parameters and random numbers it may not."""

import random
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelpar.capture.capture import capture
from modelpar.capture.objective import Objective
from modelpar.errors import CaptureError

SCALE = torch.full((8,), 2.0)
KEPT = [nn.Parameter(torch.ones(3))]


def batch():
    return torch.randn(6, 8), torch.randint(3, (6,))


class Calls(nn.Module):
    """A model whose own forward is a function of its own."""

    def __init__(self, function):
        super().__init__()
        self.before, self.after, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.after(self.function(self.before(x)))


def recorded(model, loss=F.cross_entropy):
    return capture(Objective(model, loss), batch(), model).recording


@lru_cache
def positions(length):
    return torch.arange(length, dtype=torch.float32)


def test_tensors_that_were_there_before_are_constants():
    inside = torch.full((8,), 3.0)
    model = Calls(lambda x, given=SCALE: x * SCALE + inside + given)
    model.plain = [torch.ones(8)]
    for function in (model.function, lambda x: x + model.plain[0], lambda x: x + positions(8)):
        model.function = function
        positions.cache_clear()
        assert len(recorded(model).nodes) >= 3


def test_a_tensor_that_a_layer_leaves_behind_is_no_constant():
    class Leaves(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x).detach()
            return self.last + x

    class Model(Calls):
        def __init__(self):
            super().__init__(None)
            self.middle = Leaves(8, 8)

        def forward(self, x):
            return self.after(self.middle(self.before(x)) + self.middle.last)

    with pytest.raises(CaptureError, match="uses a tensor of unknown origin"):
        recorded(Model())


def test_a_tensor_that_a_layer_writes_to_is_no_constant():
    shared = torch.zeros(8)

    class Writes(nn.Linear):
        def forward(self, x):
            shared.copy_(super().forward(x).detach().mean(0))
            return x

    class Model(Calls):
        def __init__(self):
            super().__init__(None)
            self.middle = Writes(8, 8)

        def forward(self, x):
            return self.after(self.middle(self.before(x)) + shared)

    with pytest.raises(CaptureError, match="uses a tensor of unknown origin"):
        recorded(Model())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, output, targets):
        return F.cross_entropy(output * self.scale, targets)


def by_global(output, targets):
    return F.cross_entropy(output + KEPT[0], targets)


def wrapped(how):
    scaled, free = Scaled(), torch.ones(3, requires_grad=True)
    return {
        "lambda": lambda output, targets: scaled(output, targets),
        "partial": partial(lambda inner, output, targets: inner(output, targets), scaled),
        "method": scaled.forward,
        "global": by_global,
        "no parameter": lambda output, targets: F.cross_entropy(output + free, targets),
    }[how]


@pytest.mark.parametrize("how", ["lambda", "partial", "method", "global", "no parameter"])
def test_a_loss_that_reaches_a_parameter_nobody_trains_is_refused(how):
    with pytest.raises(CaptureError, match=r"^the loss uses a parameter of shape \[3?\], .* no parameter of the model"):
        recorded(nn.Sequential(nn.Linear(8, 3)), wrapped(how))


def test_a_layer_that_uses_a_parameter_nobody_trains_is_refused():
    class Hides(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.more = [nn.Linear(8, 8)]

        def forward(self, x):
            return self.more[0](super().forward(x))

    message = r"^the model uses a parameter of shape \[8, 8\], 'more' of 1, that is no parameter of the model"
    with pytest.raises(CaptureError, match=message):
        recorded(nn.Sequential(nn.Linear(8, 8), Hides(), nn.Linear(8, 3)))


def test_what_a_forward_makes_to_differentiate_by_is_no_parameter():
    class Energy(nn.Linear):
        def forward(self, x):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                return x + torch.autograd.grad(super().forward(y).square().sum(), y, create_graph=True)[0] + y

    assert recorded(nn.Sequential(nn.Linear(8, 8), Energy(8, 8), nn.Linear(8, 3))).nodes


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x * random.random(),
        lambda x: x if random.randint(0, 9) else -x,
        lambda x: x * float(np.random.uniform()),
        lambda x: x + torch.from_numpy(np.random.rand(8).astype(np.float32)),
    ],
)
def test_a_layer_that_draws_other_random_numbers_than_torchs_is_refused(draw):
    class Draws(nn.Linear):
        def forward(self, x):
            return draw(super().forward(x))

    message = r"^the model's forward, in 1, draws random numbers that are not torch's \(test_outside.py:\d+\)"
    with pytest.raises(CaptureError, match=message):
        recorded(nn.Sequential(nn.Linear(8, 8), Draws(8, 8), nn.Linear(8, 3)))


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.uniform()])
def test_a_loss_that_draws_other_random_numbers_is_refused(draw):
    def loss(output, targets):
        return F.cross_entropy(output, targets) * draw()

    with pytest.raises(CaptureError, match=r"^the loss draws random numbers that are not torch's"):
        recorded(nn.Sequential(nn.Linear(8, 3)), loss)


def test_a_loss_with_a_state_of_its_own_is_left_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output, targets):
            self.calls += 1
            return F.cross_entropy(output, targets)

    loss = Counts()
    recorded(nn.Sequential(nn.Linear(8, 3)), loss)
    assert loss.calls == 0
