"""Code that a tape cannot follow: in a block it makes the block a leaf, in the model's own forward it is refused."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from structures import MyFn, Reused
from torch import nn
from torch.utils.checkpoint import checkpoint
from unsplit import check_equal, make_plan

from modelpar.capture.capture import capture
from modelpar.capture.cut import cut_routine
from modelpar.capture.objective import Objective
from modelpar.capture.replay import Replay
from modelpar.capture.survey import Grain
from modelpar.errors import CaptureError, ConfigError, PartitionError, StageError
from modelpar.planning import partitioners
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

CONSTANT = torch.ones(8)


class Layers(nn.Module):
    """Does something with two layers of its own, a parameter, a buffer and its input."""

    def __init__(self, act):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.ones(8))
        self.act = act

    def forward(self, x):
        return self.act(self, x)


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.before, self.block, self.after = nn.Linear(8, 8), block, nn.Linear(8, 8)

    def forward(self, x):
        return self.after(self.block(self.before(x)))


class Takes(nn.Module):
    def forward(self, x, other):
        return x * 1


def batch(rows=4):
    torch.manual_seed(1)
    return torch.randn(rows, 8), torch.randint(8, (rows,))


def captured(model, grain=None, inputs=None, **options):
    inputs = inputs or batch()
    return capture(Objective(model, F.cross_entropy), inputs, model, grain=grain, **options)


def nonzero(self, x):
    x = self.first(x)
    return self.second(x) * len(x.nonzero())


def where_alone(self, x):
    rows, _ = torch.where(self.first(x) > 0)
    return self.second(x) * len(rows)


def masked_select(self, x):
    x = self.first(x)
    return self.second(x) + torch.masked_select(x, x > 0).sum()


def bool_mask(self, x):
    x = self.first(x)
    return self.second(x) + x[x[:, 0] > 0].sum()


def unique(self, x):
    return self.second(x) + self.first(x).round().unique().numel()


def repeat(self, x):
    times = (self.first(x)[0] > 0).long()
    return self.second(x) + x.repeat_interleave(times, 1).sum()


def branch_on_activations(self, x):
    x = self.first(x)
    return self.second(x) if x.sum() > 0 else x


def branch_on_weights(self, x):
    return self.second(self.first(x) if self.scale.sum() > 0 else x)


def branch_on_buffers(self, x):
    return self.second(self.first(x) if self.mean[0].item() > 0 else x)


def to_numpy(self, x):
    return self.second(self.first(x) + torch.from_numpy(self.scale.detach().cpu().numpy() * 2))


def sets_data(self, x):
    x = self.first(x)
    x.data = x.data * 2
    return self.second(x)


def sets_an_attribute(self, x):
    x = self.first(x)
    self.seen = x.detach()
    return self.second(x)


def counts_in_an_attribute(self, x):
    self.count = getattr(self, "count", 0) + 1
    return self.second(self.first(x))


def reads_a_gradient(self, x):
    x = self.first(x)
    return self.second(x if self.scale.grad is None else x * 2)


def reads_an_address(self, x):
    x = self.first(x)
    return self.second(x) if x._cdata else x


def inference(self, x):
    x = self.first(x)
    with torch.inference_mode():
        y = x.detach() * 2
    return self.second(x) + y.clone()


def slices_by_data(self, x):
    x = self.first(x)
    end = (x > 0).sum() % 4 + 1
    return self.second(x) + x[: end.detach()].mean(0)


def a_module_from_elsewhere(self, x):
    return self.second(ELSEWHERE(self.first(x)))


def a_parameter_from_elsewhere(self, x):
    return self.second(self.first(x) * ELSEWHERE.weight[0])


def a_function_by_the_back_door(self, x):
    return self.second(torch._C._FunctionBase.__dict__["apply"].__get__(None, MyFn)(self.first(x)))


def reentrant(self, x):
    return self.second(checkpoint(self.first, x, use_reentrant=True))


ELSEWHERE = nn.Linear(8, 8)

TRAPS = {
    nonzero: "calls nonzero, which returns as many values as the data say",
    where_alone: "calls where, which returns as many values as the data say",
    masked_select: "calls masked_select, which returns as many",
    bool_mask: "calls getitem, which returns as many",
    unique: "calls unique, which returns as many",
    repeat: "calls repeat_interleave, which returns as many",
    branch_on_activations: r"reads a value that depends on weights \(bool\)",
    branch_on_weights: r"reads a value that depends on weights \(bool\)",
    branch_on_buffers: r"reads a value that depends on buffers \(item\)",
    to_numpy: r"reads a value that depends on weights \(numpy\)",
    sets_data: "sets 'data' of a tensor",
    sets_an_attribute: "sets its attribute 'seen' in forward",
    counts_in_an_attribute: "sets its attribute 'count' in forward",
    reads_a_gradient: "reads the gradient of a tensor",
    reads_an_address: "reads '_cdata' of a tensor",
    inference: "computes in inference mode",
    slices_by_data: r"reads a value that depends on weights \(int\)",
    a_module_from_elsewhere: "calls a Linear with parameters that is no part of the model",
    a_parameter_from_elsewhere: "uses a tensor that requires a gradient and is no parameter of the model",
    a_function_by_the_back_door: "uses a custom autograd function that was not called by its `apply`",
    reentrant: "hands code to CheckpointFunction, as reentrant checkpoints do",
}


@pytest.mark.parametrize("act", TRAPS)
def test_in_the_models_own_forward_it_is_refused_with_the_line_and_what_to_do(act):
    with pytest.raises(CaptureError, match=f"the model's own forward ({TRAPS[act]})") as caught:
        captured(Layers(act))
    message = str(caught.value)
    assert message.endswith(
        "which cannot be replayed; expected that in a module of its own, which is then called whole"
    )
    first = act.__code__.co_firstlineno
    if "attribute" not in act.__name__ and "back_door" not in act.__name__:  # these are seen when the forward is over
        assert any(f"(test_tape.py:{first + i})" in message for i in range(6)), message


@pytest.mark.parametrize("act", [act for act in TRAPS if "elsewhere" not in act.__name__])
def test_in_a_block_it_makes_the_block_a_leaf(act):
    model = Around(Layers(act))
    found = captured(model, Grain(split_before=("block.second",)))
    assert "block" in found.recording.leaves
    assert [layer.name for layer in found.graph.layers] == ["before", "block", "after"]


def test_others_of_a_class_that_cannot_be_followed_are_leaves_too():
    model = nn.ModuleDict({"a": Around(Layers(nonzero)), "b": Around(Layers(nonzero))})
    model.forward = lambda x: model["b"](model["a"](x))
    found = captured(model, Grain(split_before=("a.block.second", "b.block.second")))
    assert {"a.block", "b.block"} <= found.recording.leaves


class Dropping(nn.Module):
    """An encoder as BART has it: it draws between its layers, and asks chance which ones to leave out."""

    def __init__(self, layerdrop=0.0):
        super().__init__()
        self.layers, self.layerdrop = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), layerdrop

    def forward(self, x):
        x = F.dropout(x, 0.5, self.training)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                x = F.dropout(layer(x), 0.1, self.training)
        return x


class Twice(nn.Module):
    """Calls an encoder twice, and draws in its own forward as well."""

    def __init__(self):
        super().__init__()
        self.first, self.encoder, self.last = nn.Linear(8, 8), Dropping(), nn.Linear(8, 8)

    def forward(self, x):
        x = self.encoder(F.dropout(self.first(x), 0.2, self.training))
        return F.dropout(self.last(self.encoder(x)), 0.2, self.training)


def test_code_that_draws_between_layers_draws_the_same_on_any_stages(workers):
    torch.manual_seed(3)
    model = Twice()
    found = captured(model, Grain(split_before=("encoder.layers.0",)))
    assert [layer.name for layer in found.graph.layers][1:5] == [f"encoder.layers.{i}" for i in range(4)]
    assert len(found.graph.cuts) == len(found.graph.layers) - 1
    batches = [batch(8), batch(5)]
    plan = check_equal(workers, model, F.cross_entropy, batches, num_ranks=4, split_before=["encoder.layers.0"])
    assert plan.num_stages == 4


def test_layers_that_chance_leaves_out_stay_in_one_leaf():
    found = captured(Around(Dropping(0.3)), Grain(split_before=("block.layers.0",)))
    assert [layer.name for layer in found.graph.layers] == ["before", "block", "after"]
    assert found.graph.layers[1].draws == ("block",)


def test_what_is_read_of_the_inputs_is_a_guard():
    def looks(self, x):
        return self.second(self.first(x) if x[0, 0] > 0 else x)

    inputs, targets = batch()
    inputs[0, 0] = 1
    found = captured(Layers(looks), inputs=(inputs, targets))
    (guard,) = found.recording.guards
    assert guard.outcome is True
    assert [layer.name for layer in found.graph.layers] == ["first", "second"]


def test_micro_batches_on_either_side_of_a_guard_each_have_their_recording(workers):
    def looks(self, x):
        x = self.first(x * 2 if (x > 0).all() else x)
        return self.second(x)

    torch.manual_seed(0)
    model = Layers(looks)
    inputs, targets = torch.rand(4, 8), torch.zeros(4, dtype=torch.long)
    inputs[2:] -= 2
    expected = torch.cat([model(inputs[:2]), model(inputs[2:])])
    objective = Objective(model, F.cross_entropy)
    with Pipeline(objective, make_plan(objective, (inputs, targets), 2, 2), workers=workers) as pipeline:
        assert torch.equal(pipeline.predict(inputs), expected)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_branch_may_leave_out_all_layers_of_a_stage(workers, num_ranks):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(num_ranks)])

        def forward(self, x):
            for layer in self.layers[:-1] if (x > 0).all() else self.layers[:0]:
                x = layer(x).tanh()
            return self.layers[-1](x)

    torch.manual_seed(0)
    inputs, targets = torch.rand(8, 8), torch.randint(8, (8,))
    inputs[4:] -= 2
    decided = check_equal(workers, Skips(), F.cross_entropy, [(inputs, targets)] * 2, num_ranks=num_ranks)
    assert decided.num_stages == num_ranks


def test_guards_do_not_write_to_the_batch_nor_build_the_model_again():
    def writes(self, x):
        x -= 1
        return self.second(self.first(x) if (x > 0).all() else x * 2)

    built = []

    def factory():
        built.append(Layers(writes))
        return built[-1]

    inputs, targets = torch.rand(4, 8) + 1, torch.zeros(4, dtype=torch.long)
    before, objective = inputs.clone(), Objective(factory, F.cross_entropy)
    plan = make_plan(objective, (inputs, targets), 2, 2)
    with (
        Workers(2, transport="threads") as workers,
        Pipeline(objective, plan, workers=workers, optimizer=partial(torch.optim.SGD, lr=0.0)) as pipeline,
    ):
        first = pipeline.step((inputs, targets)).loss
        made = len(built)
        assert [pipeline.step((inputs, targets)).loss for _ in range(3)] == [first] * 3
    assert len(built) == made
    assert torch.equal(inputs, before)


def test_a_received_value_is_copied_before_it_is_written_to():
    def writes(self, x):
        y = self.first(x)
        y += 1
        return self.second(y)

    found = captured(Layers(writes))
    assert found.graph.cuts == (1,)

    def writes_later(self, x):
        y = self.first(x)
        z = self.second(x)
        y += z
        return y

    recording = captured(Layers(writes_later)).recording
    assert cut_routine(recording, (0, 1, 2), 1).cloned == {"first"}


def test_no_cut_between_a_view_and_who_writes_to_it():
    def writes_to_view(self, x):
        y = self.first(x).sin()
        half = y[:, :4]
        z = self.second(x)
        half += z[:, :4]
        return y

    assert captured(Layers(writes_to_view)).graph.cuts == ()

    def writes_to_a_view_of_a_buffer(self, x):
        half = self.mean[:4]
        x = self.first(x)
        half.add_(1)
        return self.second(x) * self.mean

    assert captured(Layers(writes_to_a_view_of_a_buffer)).graph.cuts == ()


def test_autocast_and_grad_mode_are_replayed():
    def switches(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
            with torch.autocast("cpu", enabled=False):
                x = self.second(x.float())
        with torch.no_grad():
            y = self.first(x)
        return x + y

    nodes = captured(Layers(switches)).recording.nodes
    found = {node.name: node.settings for node in nodes if node.settings}
    assert [bool(node.settings and node.settings.autocast) for node in nodes if node.is_module] == [True, False, False]
    assert nodes[-2].settings == (False, ())
    assert found["first"].grad is False


def plan_and_train(model):
    objective = Objective(model, F.cross_entropy)
    decided = make_plan(objective, batch(), 2, 2)
    with Workers(2, transport="threads") as workers, Pipeline(objective, decided, workers=workers, optimizer=sgd) as p:
        return p.step(batch())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_cache_that_calls_hand_to_each_other_keeps_them_together():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, memory):
            x = self.linear(x) + getattr(memory, "last", 0)
            memory.last = x
            return x

    class Chain(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.layers, self.shared = nn.ModuleList(Remembers() for _ in range(3)), shared

        def forward(self, x):
            memory = SimpleNamespace()
            for layer in self.layers:
                x = layer(x, memory if self.shared else SimpleNamespace())
            return x

    leaf = Grain(leaf=("Remembers",))
    found = captured(Chain(True), leaf)
    assert found.graph.cuts == ()
    assert "they hand values to each other in a SimpleNamespace" in found.recording.why
    assert captured(Chain(False), leaf).graph.cuts == (1, 2)


def test_an_object_that_holds_what_depends_on_the_data_is_refused():
    class Reads(nn.Module):
        def forward(self, x, memory):
            return x + memory.tensor

    def hands_on(self, x):
        x = self.first(x)
        return self.second(self.reads(x, SimpleNamespace(tensor=x)))

    model = Layers(hands_on)
    model.reads = Reads()
    with pytest.raises(CaptureError, match=r"hands on a SimpleNamespace that holds tensors \(test_tape.py:\d+\)"):
        captured(model, Grain(leaf=("reads",)))

    def hands_on_a_constant(self, x):
        return self.second(self.reads(self.first(x), SimpleNamespace(tensor=torch.ones(8))))

    model.act = hands_on_a_constant
    captured(model, Grain(leaf=("reads",)))

    class Locked(SimpleNamespace):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    model.act = lambda self, x: self.second(self.reads(self.first(x), Locked(tensor=CONSTANT)))
    with pytest.raises(CaptureError, match="hands on a Locked, which cannot be copied: no copies"):
        captured(model, Grain(leaf=("reads",)))


def test_a_module_handed_to_a_leaf_is_refused():
    def hands_on(self, x):
        return self.second(self.takes(self.first(x), self.first))

    model = Layers(hands_on)
    model.takes = Takes()
    with pytest.raises(CaptureError, match=r"hands a Linear to a call \(test_tape.py:\d+\)"):
        captured(model, Grain(leaf=("takes",)))


def test_what_a_hook_takes_out_of_a_leaf_is_part_of_what_it_returns():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Reused() for _ in range(3))
            self.taken = []
            for block in self.blocks:
                block.again.register_forward_hook(lambda _, __, output: TAKEN.append(output))

        def forward(self, x):
            TAKEN.clear()
            for block in self.blocks:
                x = block(x)
            found = list(TAKEN)
            TAKEN.clear()
            return x + sum(found)

    TAKEN = []
    found = captured(Outside(), Grain(leaf=("Reused",)))
    assert [len(node.inner) for node in found.recording.nodes if node.is_module] == [6, 6, 6]
    assert found.recording.nodes[0].inner[2] == ("blocks.0.again", 2, 0)


def test_hooks_on_leaves_are_called_in_every_replay_and_modules_with_hooks_are_not_looked_into():
    calls = []
    model = Around(Layers(lambda self, x: self.second(self.first(x))))
    assert "block.first" in captured(model, num_ranks=8).recording.leaves
    model.block.register_forward_hook(lambda *_: calls.append(1))
    recording = captured(model, num_ranks=8).recording
    assert "block" in recording.leaves
    calls.clear()
    inputs, targets = batch()
    routine = cut_routine(recording, (0, 3), 0)
    for _ in range(2):
        Replay(routine, model)({"inputs": inputs, "targets": targets})
    assert len(calls) == 2


def test_a_hook_on_the_model_itself_is_refused():
    model = Around(nn.Linear(8, 8))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="the model itself, a Around, has a hook, and nobody calls it whole"):
        captured(model)


def test_lazy_parameters_are_refused():
    with pytest.raises(CaptureError, match="weight has no shape yet; expected a model with lazy layers to have run"):
        captured(nn.Sequential(nn.LazyLinear(8)))


def test_plain_values_that_a_module_returns_must_stay_the_same():
    class Counts(nn.Module):
        def forward(self, x):
            return x * 1, int((x > 0).sum())

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.counts, self.second = nn.Linear(8, 8), Counts(), nn.Linear(8, 8)

        def forward(self, x):
            x, count = self.counts(self.first(x))
            return self.second(x) * count

    with pytest.raises(CaptureError, match="does something else on another micro-batch of the same shapes"):
        plan_and_train(Uses())
    x, y = batch()
    objective = Objective(Uses(), F.cross_entropy)
    plan = make_plan(objective, (x[:2].repeat(2, 1), y), num_microbatches=2)  # whose two halves are the same
    wrong = r"counts returned \d+ where it returned \d+ when the model was captured"
    with Workers(2, transport="threads") as workers, pytest.raises(StageError, match=wrong):  # noqa: SIM117
        with Pipeline(objective, plan, workers=workers, optimizer=sgd) as pipeline:
            pipeline.step((x, y))


def test_a_forward_that_depends_on_what_cannot_be_seen_is_refused():
    calls = []

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            calls.append(1)
            return self.linear(x) * len(calls)

    with pytest.raises(CaptureError, match="replaying what the model did gives another output than the model"):
        captured(Sometimes())

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x) * (2 if torch.overrides.has_torch_function((x,)) else 1)

    with pytest.raises(CaptureError, match="or asks whether somebody watches"):
        captured(Watched())


def test_a_leaf_runs_as_it_does_when_nobody_watches():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            watched = torch.overrides.has_torch_function((x,)) or self.inner._forward_hooks
            return self.inner(x) * (2 if watched else 1)

    model = Around(Asks())
    with torch.device("cpu"):  # a mode of the user's own stays on
        captured(model, Grain(leaf=("block",)))
    captured(model, Grain(leaf=("block",)))


def test_a_module_that_calls_others_in_evaluation_is_a_leaf():
    class Fuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            if self.training:
                return self.two(self.one(x))
            return F.linear(F.linear(x, self.one.weight, self.one.bias), self.two.weight, self.two.bias)

    assert "block" in captured(Around(Fuses()), num_ranks=8).recording.leaves


def test_grain_says_how_finely_a_model_may_be_cut():
    model = Around(Layers(lambda self, x: self.second(self.first(x))))
    assert captured(model, Grain(leaf=("block",)), num_ranks=8).graph.cuts == (1, 2)
    fine = captured(model, Grain(split_before=("block.second",))).graph
    assert [layer.name for layer in fine.layers] == ["before", "block.first", "block.second", "after"]
    assert fine.cuts == (1, 2, 3)
    assert captured(model, Grain((), ("block.second",), ("Layers",))).graph.cuts == (1, 3)
    with pytest.raises(ConfigError, match="leaf='blok' fits no module of the model; expected an FQN, a pattern"):
        captured(model, Grain(leaf=("blok",)))
    with pytest.raises(ConfigError, match="leaf names block, which split_before needs to look into"):
        captured(model, Grain(leaf=("block",), split_before=("block.second",)))


def test_too_many_stages_for_the_cuts_there_are():
    def writes_to_view(self, x):
        y = self.first(x).sin()
        half = y[:, :4]
        half += self.second(x)[:, :4]
        return y

    objective = Objective(Layers(writes_to_view), F.cross_entropy)
    with pytest.raises(PartitionError, match="2 stages, but the model has 2 layers that can be cut in 0 places"):
        make_plan(objective, batch(), 2, 2)


def test_a_module_that_draws_on_several_stages_draws_as_in_the_unsplit_model(workers):
    drop = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(8, 8), drop, nn.Linear(8, 8), drop, nn.Linear(8, 8), drop, nn.Linear(8, 8))
    check_equal(workers, model, F.cross_entropy, [batch(8)] * 2, num_ranks=3)


def test_one_that_is_not_called_as_often_as_when_captured_is_refused():
    class Often(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            for _ in range(1 if x[0, 0] > 100 else 2):
                x = self.drop(x)
            return x

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), Often()

        def forward(self, x):
            return self.drop(self.second(self.drop(self.first(x))))

    model = Twice()
    objective = Objective(model, F.cross_entropy)
    decided = make_plan(
        objective, batch(), 2, 2, partitioner=partial(partitioners.manual, balance=[2, 2]), leaf=["drop"]
    )
    inputs, targets = batch()
    with (
        pytest.raises(StageError, match=r"drop.drop was called \d times, and \d times when the model was captured"),
        Workers(2, transport="threads") as workers,
        Pipeline(objective, decided, workers=workers, optimizer=sgd) as pipeline,
    ):
        pipeline.step((inputs * 1e5, targets))


def test_the_model_is_as_before_when_it_cannot_be_followed():
    model = Layers(branch_on_activations)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError):
        captured(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


def test_an_encoder_that_packs_its_inputs_in_evaluation_is_refused_there():
    class Padded(nn.Module):
        def __init__(self, packs):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=packs)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)[:, 0]

    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    inputs = {"x": torch.randn(4, 5, 8), "padding": padding}, batch()[1]
    for packs in (False, True):
        objective = Objective(Padded(packs), F.cross_entropy)
        decided = make_plan(objective, inputs, 2, 2)
        with Workers(2, transport="threads") as workers, Pipeline(objective, decided, workers=workers) as pipeline:
            if packs:
                with pytest.raises(CaptureError, match="replaying what the model did gives another output"):
                    pipeline.predict(inputs[0])
            else:
                pipeline.predict(inputs[0])
