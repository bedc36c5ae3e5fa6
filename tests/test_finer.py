"""How finely models are cut: as finely as the stages need, and never through what only works as a whole."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from layers import momentum
from torch import nn
from unsplit import check_equal, make_plan

from modelpar.capture import profiler
from modelpar.capture.capture import capture
from modelpar.capture.compiled import is_compiled
from modelpar.capture.objective import Objective
from modelpar.errors import CaptureError, PartitionError
from modelpar.run.pipeline import Pipeline
from modelpar.run.wire import receive, ship
from modelpar.run.workers import Workers


@pytest.fixture(scope="module")
def workers():
    with Workers(3, transport="threads") as running:
        yield running


def batch(size=8, classes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 16, generator=generator), torch.randint(classes, (size,), generator=generator)


def block(width=16):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def layers(model, num_ranks=2, classes=4):
    found = capture(Objective(model, F.cross_entropy), batch(classes=classes), model, num_ranks=num_ranks)
    return [layer.name for layer in found.graph.layers], found


class Body(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = x + torch.tanh(part(x))
        return x


class Net(nn.Module):
    """Layers around some parts that are added up."""

    def __init__(self, *parts, classes=4):
        super().__init__()
        self.before, self.body, self.head = nn.Linear(16, 16), Body(parts), nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(self.before(x)))


def test_a_large_child_of_a_sequential_is_looked_into(workers):
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), *[block() for _ in range(8)]), nn.Linear(16, 4))
    names, found = layers(model)
    assert names == [*[f"0.{i}" for i in range(9)], "1"]
    assert not found.graph.straight
    assert len(layers(model, num_ranks=3)[1].graph.cuts) >= 2
    check_equal(workers, model, F.cross_entropy, [batch(), batch(5)], num_ranks=3)


def test_a_plain_sequential_stays_one_recording_for_all_shapes():
    model = nn.Sequential(*[block() for _ in range(4)], nn.Linear(16, 4))
    names, found = layers(model)
    assert names == ["0", "1", "2", "3", "4"]
    assert found.graph.straight


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_body_beside_a_layer_that_costs_most_is_looked_into(num_ranks):
    names, found = layers(Net(*[nn.Linear(16, 16) for _ in range(6)], classes=20000), num_ranks, 20000)
    assert names == ["before", *[f"body.parts.{i}" for i in range(6)], "head"]
    assert len(found.graph.cuts) == 7


def test_modules_are_looked_into_until_there_are_enough_cuts_for_the_stages():
    small = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = Net(small, nn.Linear(16, 16))
    assert len(layers(model, num_ranks=6)[1].graph.cuts) >= 5


def test_attention_is_called_whole(workers):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            y = self.norm(x)
            return x + self.attention(y, y, y, need_weights=False)[0]

    class Model(Net):
        def forward(self, x):
            return super().forward(x.unsqueeze(1).expand(-1, 3, -1)).mean(1)

    names, _ = layers(Model(Attends(), Attends()), num_ranks=3)
    assert {"body.parts.0.attention", "body.parts.1.attention"} <= set(names)


def test_compiled_modules_are_called_whole_and_compiled_again_where_they_arrive():
    model = nn.Sequential(nn.Linear(16, 16), *[block() for _ in range(3)], nn.Linear(16, 4))
    model[1].compile(backend="eager", dynamic=False)
    model[2] = torch.compile(model[2], backend="eager")
    names, found = layers(model, num_ranks=5)
    assert {"1", "2"} <= set(names)
    profiler.count(Objective(model, F.cross_entropy), found, batch(), model)
    arrived = receive(ship(model))
    assert [is_compiled(part) for part in arrived] == [False, True, True, False, False]
    assert list(arrived.state_dict()) == list(model.state_dict())
    assert arrived[1].training
    x, _ = batch()
    with torch.no_grad():
        assert torch.equal(arrived(x), model(x))


def test_a_compiled_module_that_draws_draws_as_a_whole():
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), nn.Linear(16, 4))
    model[1].compile(backend="eager")
    assert [layer.draws for layer in layers(model)[1].graph.layers] == [(), ("1",), ()]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "compile", "compiled in place"])
def test_a_model_that_is_made_one_piece_is_refused(how):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    if how == "compiled in place":
        model.compile(backend="eager")
    else:
        model = torch.jit.script(model) if how == "script" else torch.compile(model, backend="eager")
    with pytest.raises(CaptureError, match=r"^the model is (scripted|compiled) as a whole, .*; expected the module"):
        layers(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_scripted_parts_travel_and_keep_what_is_tied():
    model = nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Linear(16, 16)), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[0].weight = model[1].weight
    assert layers(model)[0] == ["0", "1", "2", "3"]
    arrived = receive(ship(model))
    assert arrived[0].weight is arrived[1].weight
    x, _ = batch()
    assert torch.equal(arrived(x), model(x))
    arrived(x).sum().backward()
    assert arrived[1].bias.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_part_that_draws_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Dropout(0.5)), nn.Linear(16, 4))
    with pytest.raises(CaptureError, match=r"^1 is scripted and draws random numbers"):
        layers(model)


class Label(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 16)

    def forward(self, x):
        return self.embed(torch.where(torch.rand(len(x), 1) < 0.5, x, 0.0) if self.training else x)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.label, self.linear = Label(), nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.linear(x) + self.label(x))


def test_a_part_of_a_leaf_that_is_called_directly_is_a_leaf_too(workers):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Labelled() for _ in range(20)]), nn.Linear(16, 4)

        def forward(self, x):
            y = x
            for one in self.blocks:
                y = one(y)
            return self.head(y + self.blocks[0].label(x) + self.blocks[1].label(x))

    check_equal(workers, Model(), F.cross_entropy, [batch(), batch(5)], num_ranks=3)


def test_where_there_are_too_few_layers_the_message_says_what_is_in_the_way():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = self.one(x)
            return self.two(x if x.sum() > 0 else -x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.all = Branches()

        def forward(self, x):
            return self.all(x)

    with pytest.raises(PartitionError, match=r"at most 1; in the way: all \(Branches\) reads .*\(test_finer.py:\d+\)$"):
        make_plan(Objective(Model(), F.cross_entropy), batch(), 2, 2)


def test_models_that_torchs_counter_cannot_count():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, x):
            with torch.enable_grad():
                y = x.detach().requires_grad_(True)
                return x - torch.autograd.grad(self.net(y).sum(), y, create_graph=True)[0]

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.part = nn.Parameter(torch.randn(1, 16)), Labelled()
            self.table, self.head = nn.Embedding(9, 16, sparse=True), nn.Linear(16, 4)

        def forward(self, x):
            found = self.table(torch.arange(len(x)) % 9)
            return self.head(self.part(self.query.expand(len(x), -1)) + x + found)

    for model in (Net(Energy(), Energy()), Queries()):
        found = layers(model)[1]
        cost = profiler.count(Objective(model, F.cross_entropy), found, batch(), model).profile.layers
        assert sum(layer.flops for layer in cost) > 0


def test_recording_leaves_other_threads_alone():
    failed, going = [], [True]

    def make_tuples():
        while going:
            try:
                tuple(x for x in range(10000))
            except SystemError as error:
                failed.append(error)

    thread = threading.Thread(target=make_tuples)
    thread.start()
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    for _, _ in itertools.product(range(5), range(5)):
        layers(model)
    going.clear()
    thread.join()
    assert not failed


def test_a_layer_that_cannot_be_counted_is_guessed():
    class Unwatched(nn.Linear):
        """Does not stand a mode."""

        def forward(self, x):
            if torch.is_grad_enabled() and torch._C._len_torch_dispatch_stack():
                raise RuntimeError("no")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(16, 16), Unwatched(16, 16), nn.Linear(16, 4))
    cost = profiler.count(Objective(model, F.cross_entropy), layers(model)[1], batch(), model).profile.layers[1]
    assert (cost.flops, cost.parameter_bytes) == (6 * 8 * 272, 4 * 272)
    assert cost.kept_bytes >= 8 * 16 * 4
    assert all(parameter.grad is None for parameter in model.parameters())


class Heads(nn.Module):
    """Two layers, of which an argument chooses one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x, task):
        return self.two(x) if task else self.one(x)


class Tasks(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.before, self.more, self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16), None, None
        if heads:
            self.heads = Heads()
        else:
            self.one, self.two = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x, task):
        x = self.more(torch.tanh(self.before(x)))
        return self.heads(x, task) if hasattr(self, "heads") else Heads.forward(self, x, task)


@pytest.mark.parametrize(
    ("heads", "advice"),
    [(False, "the code that chooses whether to use two.bias in a module"), (True, r"leaf=\['heads'\]$")],
)
def test_the_advice_for_layers_that_are_not_always_used_leaves_something_to_cut(workers, heads, advice):
    (x, y), objective = batch(), Objective(Tasks(heads), F.cross_entropy)
    split = {"split_before": ["heads.one"]} if heads else {}
    decided = make_plan(objective, ((x, 0), y), **split)
    with Pipeline(objective, decided, workers=workers, optimizer=momentum) as pipeline:
        pipeline.step(((x, 0), y))
        with pytest.raises(CaptureError, match=advice):
            pipeline.step(((x, 1), y))
    if heads:
        decided = make_plan(objective, ((x, 0), y), leaf=["heads"])
        with Pipeline(objective, decided, workers=workers, optimizer=momentum) as pipeline:
            pipeline.step(((x, 0), y))
            pipeline.step(((x, 1), y))
