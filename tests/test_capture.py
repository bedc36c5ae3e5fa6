"""What the capture finds out about a model, and that it leaves no trace; what the profiles say."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from layers import Counter, Many, Nest, One, OwnLoss, Shared, fail
from torch import nn

from modelpar.capture import profiler
from modelpar.capture.capture import capture
from modelpar.capture.cut import cut_routine, cut_stage
from modelpar.capture.objective import Objective
from modelpar.capture.replay import Replay
from modelpar.errors import CaptureError
from modelpar.models import convnet, gpt, mlp
from modelpar.planner import plan
from modelpar.planning import partitioners
from modelpar.planning.graph import BATCH

BUILD = {"gpt": gpt.build, "mlp": mlp.build, "convnet": convnet.build}
SMALL = {
    "gpt": lambda: gpt.build(vocab_size=16, context=8, width=8, depth=2, heads=2),
    "mlp": lambda: mlp.build(input_shape=(6,), width=16, depth=3),
    "convnet": lambda: convnet.build(input_shape=(3, 8, 8), width=4, depth=3),
}


def captured(layers, inputs, targets=None, loss=lambda output, _: output.float().mean()):
    model = nn.Sequential(*layers)
    return capture(Objective(model, loss), (inputs, inputs if targets is None else targets), model).graph


def structure(name, model=None):
    made, batch, loss = SMALL[name]()
    model = made if model is None else model
    return capture(Objective(model, loss), batch, model).graph


def test_layers_values_and_sizes():
    graph = captured([nn.Linear(6, 8), nn.Linear(8, 4)], torch.randn(5, 6))
    assert [(layer.name, layer.kind) for layer in graph.layers] == [("0", "Linear"), ("1", "Linear")]
    assert [(v.name, v.producer, v.consumers) for v in graph.values] == [
        ("inputs", BATCH, (0,)),
        ("0", 0, (1,)),
        ("targets", BATCH, (1,)),
    ]
    assert graph.values[1].bytes_per_sample == 8 * 4
    assert graph.cuts == (1,)
    parameters = [(p.name, p.shape, p.dtype, p.trainable, p.buffer) for p in graph.layers[0].parameters]
    assert parameters == [("0.weight", (8, 6), "float32", True, False), ("0.bias", (8,), "float32", True, False)]


def test_the_size_of_a_pytree_counts_all_its_tensors():
    graph = captured([nn.Linear(8, 8), Many(8), One()], torch.randn(4, 8))
    assert graph.values[2].bytes_per_sample == 8 * 4 + 8 * 1 + 8  # float32, bool and one int64 per sample


def test_modules_that_draw_are_found_by_their_own_name():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.idle = nn.Dropout(0.0)

        def forward(self, x):
            return self.idle(self.drop(x)) + torch.rand_like(x)

    layers = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), Noise(), nn.Dropout(0.2).eval()]
    graph = captured(layers, torch.randn(3, 4))
    draws = [set(layer.draws) for layer in graph.layers]
    assert draws[0] == set()
    assert draws[1] == {"1.1"}
    assert {"2", "2.drop"} <= draws[2] <= {"2", "2.drop", "2.idle"}
    assert draws[3] == set()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("act", ["capture", "count", "failing"])
def test_weights_buffers_gradients_and_generators_are_as_before(name, act):
    torch.manual_seed(1)
    model, batch, loss = SMALL[name]()
    loss(model(batch[0]), batch[1]).backward()
    before = copy.deepcopy(model.state_dict())
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    same = {n: p.grad for n, p in model.named_parameters()}
    inputs = copy.deepcopy(batch)
    bad = Nest(fail, 3)
    generator = torch.get_rng_state()
    objective = Objective(model, loss)
    if act == "failing":
        broken = nn.Sequential(OrderedDict([*model.named_children(), ("bad", bad)]))
        with pytest.raises(CaptureError):
            capture(objective, batch, broken)
    else:
        found = capture(objective, batch, model)
        if act != "capture":
            profiler.count(objective, found, batch, model)
    assert torch.equal(torch.get_rng_state(), generator)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, parameter in model.named_parameters():
        assert parameter.grad is same[key]
        assert torch.equal(parameter.grad, grads[key])
    assert torch.equal(batch[0], inputs[0])
    assert torch.equal(batch[1], inputs[1])
    assert model.training


def test_values_that_a_stage_writes_to_are_found():
    layers = [nn.Linear(4, 4), nn.Flatten(), nn.Identity(), nn.ReLU(inplace=True), nn.ReLU(), nn.Dropout(0.3, True)]
    model, batch = nn.Sequential(*layers, nn.Linear(4, 4)), (torch.randn(3, 4), torch.randn(3, 4))
    recording = capture(Objective(model, F.mse_loss), batch, model).recording
    # the two before it hand on the very memory that it writes to
    written = [bool(cut_routine(recording, (0, cut, 7), 1).cloned) for cut in range(1, 7)]
    assert written == [True, True, True, False, True, False]


def test_no_cut_between_two_uses_of_a_module_with_buffers():
    norm, drop, shared = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
    assert captured([norm, nn.Linear(4, 4), norm, nn.Linear(4, 4)], torch.randn(3, 4)).cuts == (3,)
    assert captured([nn.Linear(4, 4), drop, nn.Linear(4, 4), drop], torch.randn(3, 4)).cuts == (1, 2, 3)
    inside = [nn.Linear(4, 4), Shared(norm, 4), nn.Tanh(), Shared(norm, 4), nn.Linear(4, 4)]
    assert captured(inside, torch.randn(3, 4)).cuts == (1, 4)
    assert captured([shared, nn.Tanh(), shared], torch.randn(3, 4)).cuts == (1, 2)  # weights may be tied


def test_ties_are_found_with_their_names_and_layers():
    graph = structure("gpt")
    (tie,) = graph.tied
    assert tie.names == ("embed.token.weight", "head.token.weight")
    assert tie.layers == (0, 3)
    assert tie.bytes == 16 * 8 * 4
    shared = nn.Linear(4, 4)
    ties = captured([shared, nn.Tanh(), shared], torch.randn(3, 4)).tied
    assert [tie.names for tie in ties] == [("0.weight", "2.weight"), ("0.bias", "2.bias")]


def test_values_that_need_no_gradient_are_marked():
    layers = [nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()]
    graph = captured(layers, torch.randn(3, 4))
    assert [v.needs_grad for v in graph.values if v.producer != BATCH] == [False, False, True]


def test_the_hash_is_of_the_structure_and_of_nothing_else():
    model = SMALL["gpt"]()[0]
    first = structure("gpt", model).hash
    assert structure("gpt").hash == first
    assert structure("mlp").hash != first
    untied = copy.deepcopy(model)
    untied[-1].token.weight = nn.Parameter(untied[-1].token.weight.clone())
    assert structure("gpt", untied).hash != first
    assert structure("gpt", model.requires_grad_(False)).hash != first


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(), "the model is an empty nn.Sequential; expected at least one layer"),
        (nn.ModuleList([nn.Linear(2, 2)]), "the model failed on the example batch, .*is missing the required"),
        (lambda: 3, "the model factory returned int; expected a torch.nn.Module"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2)),
            r"layer 1 \(Linear\) failed .*, input \[2, 2\]",
        ),
        (nn.Sequential(OwnLoss("tuple")), "the loss is a tuple; expected a scalar tensor"),
    ],
)
def test_models_that_cannot_be_read_are_refused_in_one_line(model, message):
    loss = (lambda output, _: output) if isinstance(model, nn.Sequential) else F.mse_loss
    with pytest.raises(CaptureError, match=message) as caught:
        plan(Objective(model, loss), (torch.randn(4, 2), torch.randn(4, 2)), num_ranks=1, num_microbatches=2)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", SMALL)
def test_the_flops_profile_is_free_of_noise_and_counts_what_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model, batch, loss = SMALL[name]()
    objective = Objective(model, loss)
    found = capture(objective, batch, model)
    profile = profiler.count(objective, found, batch, model).profile
    assert profiler.count(objective, found, batch, model).profile == profile
    assert [cost.name for cost in profile.layers] == [layer.name for layer in found.graph.layers]
    assert (profile.microbatch_size, profile.source, profile.measured_at) == (4, "flops", "")
    with FlopCounterMode(display=False) as counter:
        loss(model(batch[0]), batch[1]).backward()
    # one layer at a time, the first one also gets no gradient of the batch
    assert sum(cost.flops for cost in profile.layers) == counter.get_total_flops()
    for cost, child in zip(profile.layers, model, strict=True):
        assert cost.parameter_bytes == sum(p.numel() * 4 for p in child.parameters())


def test_saved_bytes_are_a_union_over_storages():
    class Twice(nn.Module):
        """Saves its input three times, two of them as views, and its weight, which is no activation."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.linear(x) + x.view(-1, 8) * x.t().t()

    model = nn.Sequential(nn.Linear(8, 8), Twice(), nn.Tanh())
    batch = (torch.randn(4, 8), torch.randn(4, 8))
    objective = Objective(model, F.mse_loss)
    profile = profiler.count(objective, capture(objective, batch, model), batch, model).profile
    assert profile.layers[1].saved_bytes == 4 * 8 * 4
    assert profile.layers[1].output_bytes == 4 * 8 * 4


def test_what_a_layer_keeps_and_needs_for_a_moment():
    class Halves(nn.Module):
        """Keeps what it gives; doubles its input on the way, and its output's gradient on the way back."""

        def forward(self, x):
            return torch.cat([x, x], 1)[:, :8].clone().sigmoid()

    model = nn.Sequential(nn.Linear(8, 8), Halves(), nn.Flatten(), nn.Linear(8, 8))
    batch = (torch.randn(4, 8), torch.randn(4, 8))
    objective = Objective(model, F.mse_loss)
    linear, halves, view, last = profiler.count(
        objective, capture(objective, batch, model), batch, model
    ).profile.layers
    size = 4 * 8 * 4
    assert linear.kept_bytes == size  # its output: the next layer may need it
    assert halves.kept_bytes == size  # sigmoid needs its own output
    assert halves.temporary_bytes >= 2 * size
    assert view.kept_bytes == 0  # the same memory as its input
    assert last.kept_bytes >= size  # the output, which the loss needs
    assert last.temporary_bytes >= 8 * 8 * 4  # a gradient of weights, before it is added up


def test_layers_that_differ_only_in_a_setting_are_measured_each():
    class Repeat(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.times = times
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            for _ in range(self.times):
                x = self.linear(x)
            return x

    model = nn.Sequential(nn.Linear(64, 64), Repeat(1), Repeat(50), nn.Linear(64, 3))
    batch = (torch.randn(32, 64), torch.randint(3, (32,)))
    objective = Objective(model, F.cross_entropy)
    found = capture(objective, batch, model, num_ranks=1)
    one, fifty = profiler.count(objective, found, batch, model).profile.layers[1:3]
    assert fifty.flops > 30 * one.flops


@pytest.mark.parametrize("name", SMALL)
def test_stages_hold_the_layers_of_the_model_under_their_names(name):
    torch.manual_seed(0)
    model, batch, loss = SMALL[name]()
    decided = plan(
        Objective(model, loss),
        batch,
        num_ranks=3,
        num_microbatches=2,
        num_threads=1,
        profile="flops",
        partitioner=partitioners.uniform,
        leaf=[name for name, _ in model.named_children()],
    )
    bounds, recording = decided.partition.bounds, decided.captured[1]
    layers = [decided.partition.layers(stage) for stage in range(3)]
    programs = [cut_stage(model, decided.graph, decided.stage_graph, layers[s], s, loss) for s in range(3)]
    names = [name for program in programs for name in program.module.state_dict()]
    assert names == list(model.state_dict())
    owned = [name for program in programs for name in program.owned_parameters()]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())  # each by one stage
    assert [program.loss is not None for program in programs] == [False, False, True]
    model.eval()
    batch = tuple(part[: recording.num_samples] for part in batch)
    values = dict(zip(("inputs", "targets"), batch, strict=True))
    for stage, program in enumerate(programs):
        routine = cut_routine(recording, bounds, stage)
        values |= Replay(routine, program.module)(values)
    assert torch.equal(values["output"], model(batch[0]))


def test_a_counter_in_a_buffer_is_restored():
    model = nn.Sequential(nn.Linear(4, 4), Counter())
    objective = Objective(model, F.mse_loss)
    capture(objective, (torch.randn(2, 4), torch.randn(2, 4)), model)
    assert model[1].calls == 0
