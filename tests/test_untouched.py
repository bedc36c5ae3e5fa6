"""What planning leaves of the user's module: everything as it was."""

import random
from collections import Counter, OrderedDict, deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modelpar import Objective, plan
from modelpar.capture import profiler
from modelpar.capture.capture import capture
from modelpar.capture.untouched import untouched


class Busy(nn.Module):
    """Changes all that a module can hold in its forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("largest", torch.tensor([]))
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("dropped", torch.zeros(1))
        self.calls, self.last, self.plain = 0, None, torch.zeros(2)
        self.kept, self.cache, self.names = ["first"], {"a": 1}, {"x"}
        self.recent, self.order, self.counts = deque([1], 2), OrderedDict(b=1, a=2), Counter(a=1)
        self.inside = [torch.zeros(3)]

    def forward(self, x):
        x = self.linear(x)
        new = x.detach().abs().amax(0)
        self.largest = torch.cat([self.largest, new])
        self.seen += new
        if "dropped" in self._buffers:
            del self.dropped
            self.register_buffer("added", torch.ones(1))
        self.calls += 1
        self.last = x.detach()
        self.plain.add_(1)
        self.kept.append(x)
        self.cache = {**self.cache, self.calls: x}
        self.names.add(self.calls)
        self.recent.append(2)
        self.order.move_to_end("b")
        self.counts["a"] += 1
        self.inside[0].add_(1)
        self.new = 3
        return F.relu(x)


def state(model):
    """Returns everything that can be seen of a model, tensors by identity and value."""

    def seen(value):
        if isinstance(value, torch.Tensor):
            return id(value), value.tolist()
        if isinstance(value, dict):
            return id(value), [(key, seen(v)) for key, v in value.items()]
        if isinstance(value, (list, deque)):
            return id(value), [seen(v) for v in value]
        return id(value), sorted(map(str, value)) if isinstance(value, set) else None

    return [(name, sorted((k, seen(v)) for k, v in vars(m).items())) for name, m in model.named_modules()]


def test_planning_leaves_a_module_that_changes_itself_as_it_was():
    model = nn.Sequential(Busy(), Busy(), nn.Linear(4, 3))
    objective, batch = Objective(model, F.cross_entropy), (torch.randn(6, 4), torch.randint(3, (6,)))
    before, keys = state(model), list(model.state_dict())
    captured = capture(objective, batch, model)
    assert state(model) == before
    profiler.count(objective, captured, batch, model)
    assert state(model) == before
    plan(objective, batch, num_microbatches=2, profile="flops")
    assert state(model) == before
    assert list(model.state_dict()) == keys


def test_a_module_is_as_it_was_after_a_forward_that_fails():
    class Fails(Busy):
        def forward(self, x):
            super().forward(x)
            raise ValueError("no")

    model = Fails()
    before = state(model)
    try:
        with untouched(model):
            model(torch.randn(2, 4))
    except ValueError:
        pass
    assert state(model) == before


def test_buffers_that_overlap_themselves_and_parameters_that_are_swapped():
    class Swaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("wide", torch.arange(3.0).expand(4, 3))

        def forward(self, x):
            self.weight = nn.Parameter(self.weight.detach() * 2)
            return x * self.weight + self.wide[0]

    model = Swaps()
    model.weight.grad = torch.ones(3)
    before, grad = state(model), model.weight.grad
    with untouched(model):
        model(torch.randn(2, 3))
        model.weight.grad = None
    assert state(model) == before
    assert model.weight.grad is grad


def test_restore_goes_back_to_the_attributes_that_were_kept_and_leaving_to_the_first():
    model = Busy()
    with untouched(model) as before:
        model(torch.randn(2, 4))
        before.keep_attributes()
        kept = model.largest
        model(torch.randn(2, 4))
        assert model.calls == 2
        before.restore()
        assert model.calls == 1
        assert model.largest is kept
        assert not model.seen.any()
    assert model.calls == 0


def test_the_generators_of_python_and_numpy_are_put_back():
    random.seed(3)
    np.random.seed(3)
    expected = random.getstate(), np.random.get_state()[1].tolist()
    with untouched(nn.Linear(1, 1)):
        random.random()
        np.random.rand()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected
