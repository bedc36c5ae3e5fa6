"""What crosses between ranks arrives as it was: values, strides, alignment, identity."""

import inspect
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from views import views

from modelpar.capture.deferred import materialize
from modelpar.capture.objective import Objective
from modelpar.errors import CaptureError
from modelpar.run import wire
from modelpar.run.layout import ALIGNMENT

CPU = torch.device("cpu")


def echo(tree):
    """Packs, goes through bytes as over a network, and unpacks."""
    return wire.unpack(pickle.loads(pickle.dumps(wire.pack(tree))), CPU)


@given(views())
@settings(max_examples=200, deadline=None)
def test_any_view_arrives_with_its_values_and_strides(tensor):
    packed = wire.pack(tensor)
    found = wire.unpack(packed, CPU)
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert found.stride() == tensor.stride()
    assert torch.equal(found, tensor)
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    assert packed.window.untyped_storage().nbytes() < span * tensor.element_size() + ALIGNMENT


@pytest.mark.parametrize("offset", range(20))
def test_a_tensor_keeps_its_place_in_a_vector(offset):
    base = torch.randn(100)
    tensor = base[offset : offset + 60].view(10, 6)
    for found in (echo(tensor), wire.receive(wire.ship(tensor))):
        assert found.data_ptr() % ALIGNMENT == tensor.data_ptr() % ALIGNMENT
        assert torch.equal(found, tensor)
        assert found.untyped_storage().nbytes() < 60 * 4 + ALIGNMENT
        linear = nn.Linear(6, 8)
        assert torch.equal(linear(found), linear(tensor))  # for which this is needed


def test_memory_that_torch_did_not_allocate():
    numpy = pytest.importorskip("numpy")
    for start in range(1, 9):
        tensor = torch.from_numpy(numpy.arange(50, dtype=numpy.float32)[start:])
        found = echo(tensor)
        assert torch.equal(found, tensor)
        assert found.data_ptr() % 64 == tensor.data_ptr() % 64


def test_a_tree_keeps_its_form_and_what_is_no_tensor():
    leaf = torch.randn(3, requires_grad=True)
    tree = {"a": [leaf, None], "b": (1, 2.5, "text", torch.arange(3)), "c": leaf * 2}
    found = echo(tree)
    assert found["b"][:3] == (1, 2.5, "text")
    assert found["a"][1] is None
    assert torch.equal(found["b"][3], torch.arange(3))
    assert found["a"][0].requires_grad
    assert found["c"].requires_grad
    assert found["c"].is_leaf  # the graph stays where it was
    assert not found["b"][3].requires_grad


def test_between_threads_memory_is_shared_and_the_graph_is_not():
    tensor = torch.randn(3, requires_grad=True) * 2
    found = wire.detach({"x": (tensor, 3)})
    assert found["x"][0].data_ptr() == tensor.data_ptr()
    assert found["x"][0].is_leaf
    assert found["x"][0].requires_grad
    assert found["x"][1] == 3


def test_sparse_tensors_arrive():
    tensor = torch.eye(3).to_sparse()
    assert torch.equal(wire.unpack(wire.pack(tensor), CPU).to_dense(), torch.eye(3))


def test_a_module_arrives_whole_and_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LSTM(4, 4))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    model[0].weight.decay = 0.5  # optimizers may look at such marks
    model.plain = torch.ones(2)
    found = wire.receive(wire.ship(model))
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (name, a), b in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr()
    assert found[2].weight is found[0].weight
    assert isinstance(found[0].weight, nn.Parameter)
    assert found[0].weight.decay == 0.5
    assert not found[2].bias.requires_grad
    assert torch.equal(found.plain, torch.ones(2))
    x = torch.randn(5, 4)
    found.eval(), model.eval()
    assert torch.equal(found(x)[0], model(x)[0])


class Scaled(nn.Parameter):
    """A parameter of a class of the user's own, which takes other arguments."""

    def __new__(cls, data, scale):
        made = super().__new__(cls, data)
        made.scale = scale
        return made


def test_parameters_and_buffers_arrive_with_all_their_attributes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    weight, bias = model[0].weight, model[0].bias
    weight._no_weight_decay, weight.twin, bias.twin, bias.home = True, bias, weight, model
    model[1].running_mean._kind = {"of": "mean"}
    model[2].weight = Scaled(torch.randn(4, 4), 0.5)
    model[2].bias = bias
    found = wire.receive(wire.ship(model))
    weight, bias = found[0].weight, found[0].bias
    assert weight._no_weight_decay is True
    assert weight.twin is bias is found[2].bias
    assert bias.twin is weight
    assert bias.home is found
    assert found[1].running_mean._kind == {"of": "mean"}
    assert type(found[2].weight) is Scaled
    assert (found[2].weight.scale, found[2].weight.requires_grad) == (0.5, True)
    assert torch.equal(found[2].weight, model[2].weight)


def test_a_parameter_that_is_not_there_yet_keeps_what_is_set_later():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            made = nn.Parameter(torch.zeros(3))
            made.first = 1
            self.weight = made
            made._second = 2

    model = Objective(Late, init="meta").build()
    found = materialize(wire.receive(wire.ship(model))).weight
    assert vars(found) == {"first": 1, "_second": 2}
    assert torch.equal(found, torch.zeros(3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules_arrive_with_their_parameters():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(scripted, nn.Linear(4, 4)).eval()
    model[1].weight = dict(scripted.named_parameters())["0.weight"]
    model[1].weight._mark = "tied"
    model[1].bias.requires_grad_(False)
    found = wire.receive(wire.ship(model))
    assert isinstance(found[0], torch.jit.ScriptModule)
    assert not found[0].training
    assert dict(found[0].named_parameters())["0.weight"] is found[1].weight
    assert isinstance(found[1].weight, nn.Parameter)
    assert found[1].weight._mark == "tied"
    assert list(found.state_dict()) == list(model.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(found(x), model(x))
    with torch.no_grad():
        found[1].weight.zero_()
    assert torch.equal(found(x), found[1].bias.expand(5, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_function_arrives():
    assert torch.equal(wire.receive(wire.ship(torch.jit.script(double)))(torch.ones(2)), torch.full((2,), 2.0))


def double(x):
    return x * 2


def test_compiled_modules_are_compiled_again():
    compiled, in_place = torch.compile(nn.Linear(4, 4), backend="eager", dynamic=True), nn.Linear(4, 4)
    in_place.compile(backend="eager", fullgraph=True)
    compiled._orig_mod.weight = in_place.weight
    calls = []
    compiled.register_forward_hook(lambda *_: calls.append(1))
    found = wire.receive(wire.ship(nn.Sequential(compiled, in_place).eval()))
    assert found[0]._orig_mod.weight is found[1].weight
    assert len(found[0]._forward_hooks) == 1
    assert (found[0].dynamo_ctx._dynamic, found[0].dynamo_ctx.fullgraph) == (True, False)
    context = inspect.getclosurevars(found[1]._compiled_call_impl).nonlocals["self"]
    assert (context._dynamic, context.fullgraph) == (None, True)
    assert list(found.state_dict()) == ["0._orig_mod.weight", "0._orig_mod.bias", "1.weight", "1.bias"]
    assert not found[0]._orig_mod.training


def test_functions_and_classes_of_nobody_arrive():
    factor = 3

    class Local(nn.Module):
        def forward(self, x):
            return x * factor

    found = wire.receive(wire.ship((Local(), lambda x: x + factor)))
    assert found[0](torch.ones(1)) == 3
    assert found[1](1) == 4


def test_what_cannot_be_pickled_is_refused_in_one_line():
    with pytest.raises(CaptureError, match=r"^cannot be sent to the workers: TypeError: .*lock.*; expected"):
        wire.ship({"lock": threading.Lock()})


class Holding(nn.Module):
    def __init__(self, thing):
        super().__init__()
        self.kept = {"things": [thing]}


def counted(held=None):
    yield held


def held_by_a_function(thing):
    return lambda x: (x, thing)


@pytest.mark.parametrize(
    ("obj", "place"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(Holding(threading.Lock()))), "1.0.kept.things.0"),
        (nn.Sequential(Holding(counted())), "0.kept.things.0"),
        (nn.Sequential(Holding(held_by_a_function(threading.Lock()))), "0.kept.things.0.thing"),
    ],
)
def test_what_cannot_be_pickled_is_found(obj, place):
    with pytest.raises(CaptureError, match=rf"^it cannot be sent .*cannot pickle .*, found at {place}; expected"):
        wire.ship_as("it", obj)
