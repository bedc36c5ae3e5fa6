"""What the tape sees besides calls: weights in place, attributes, checkpoints, reads, shapes made by values."""

import gc
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from unsplit import check_equal

from modelpar.capture.capture import capture
from modelpar.capture.objective import Objective
from modelpar.capture.survey import Grain
from modelpar.errors import CaptureError, StageError
from modelpar.planner import plan
from modelpar.run.pipeline import Pipeline


def batches(*sizes):
    torch.manual_seed(7)
    return [(torch.randn(size, 8), torch.randint(4, (size,))) for size in sizes]


def blocks(number):
    return nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(number)])


def sgd(named):
    return torch.optim.SGD(named, lr=0.1)


class Net(nn.Module):
    """Four blocks, and something done to the activations in the model's own forward; returns logits."""

    def __init__(self, act=lambda self, x: x):
        super().__init__()
        self.blocks, self.head, self.act = blocks(4), nn.Linear(8, 4), act
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        for block in self.blocks:
            x = self.act(self, block(x))
        return self.head(x)


def trains_equal(workers, model, *sizes, **how):
    torch.manual_seed(5)
    found = check_equal(workers, model, F.cross_entropy, batches(*(sizes or (8, 5))), **how)
    assert found.num_stages >= 2
    return found


# weights in the place of a module's own


class Scaled(nn.Module):
    """Calls a network with weights that it computes."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return functional_call(self.net, {k: v * self.scale for k, v in self.net.named_parameters()}, (x,))


class Computed(nn.Module):
    """Sets weights of layers as plain attributes, as weight normalisation by hand does."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), nn.Linear(8, 4)
        self.raw = nn.ParameterList([nn.Parameter(layer.weight.detach().clone()) for layer in self.layers])
        for layer in self.layers:
            del layer.weight

    def forward(self, x):
        for layer, raw in zip(self.layers, self.raw, strict=True):
            layer.weight = raw / raw.norm()
            x = torch.tanh(layer(x))
        return self.head(x)


class Borrowed(nn.Module):
    """Calls layers with a buffer of another one, and the same layer with two weights."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        y = functional_call(self.first, {"weight": self.first.weight.t()}, (x,))
        x = torch.tanh(self.first(x)) + y
        mean = x.detach().mean(0)
        return self.last(functional_call(self.norm, {"running_mean": mean * 1}, (x,)))


@pytest.mark.parametrize("build", [Scaled, Computed, Borrowed])
def test_weights_put_in_the_place_of_a_modules_own_get_their_gradients(build, workers):
    trains_equal(workers, build(), 8, 8)


# attributes


class Keeps(nn.Module):
    """Normalises by what it keeps of its input, and puts that back in a later call."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.gain, self.kept = keep, nn.Parameter(torch.ones(8)), []

    def forward(self, x, back=False):
        if not self.keep:
            return x * self.gain
        if back:
            return x * self.gain + (self.kept[-1] if self.keep == "list" else self.mean)
        mean = x.mean(1, keepdim=True)
        if self.keep == "list":
            self.kept[:] = [mean]
        else:
            self.mean = mean
        return (x - mean) * self.gain


class Forecast(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.norm, self.layers, self.head = Keeps(keep), blocks(3), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x, back=True))


@pytest.mark.parametrize("keep", ["attribute", "list"])
def test_calls_that_hand_each_other_an_attribute_stay_on_one_stage(keep):
    found = capture(Objective(Forecast(keep), F.cross_entropy), batches(4)[0], grain=Grain(leaf=("norm",)))
    assert found.graph.cuts == (len(found.graph.layers) - 1,) or found.graph.cuts == ()
    assert any("one sets the attribute" in why for why in found.recording.why)


def test_calls_of_one_module_that_keep_nothing_may_be_apart(workers):
    trains_equal(workers, Forecast(""), leaf=["norm"])


class Resets(nn.Module):
    """Resets what a layer keeps from call to call, without which it would go on from the last micro-batch."""

    def __init__(self, value=None):
        super().__init__()
        self.layer, self.value = Remembers(), value

    def forward(self, x):
        self.layer.state = self.value
        return self.layer(x)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.state = nn.Linear(8, 8), None

    def forward(self, x):
        x = self.linear(x)
        x = x if self.state is None else x + self.state.mean()
        self.state = x
        return x


def test_code_that_resets_a_layers_state_is_in_one_leaf_with_it(workers):
    model = nn.Sequential(nn.Linear(8, 8), Resets(), nn.Linear(8, 8), nn.Linear(8, 4))
    found = trains_equal(workers, model, split_before=["1.layer"])
    assert "1" in [layer.name for layer in found.graph.layers]


def test_a_list_that_the_models_own_forward_fills_is_refused_by_name():
    model = Net(lambda self, x: x)
    model.kept = []
    model.blocks[1].register_forward_hook(lambda module, args, output: model.kept.append(output))
    with pytest.raises(CaptureError, match="sets its attribute 'kept' in forward"):
        capture(Objective(model, F.cross_entropy), batches(4)[0])


class Counts(Net):
    """Writes to one buffer between all its layers."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            self.seen.add_(x.detach().mean())
        return self.head(x)


def test_a_buffer_that_the_models_own_forward_writes_to_keeps_its_writers_together(workers):
    model = Counts()
    found = capture(Objective(model, F.cross_entropy), batches(4)[0], grain=Grain(leaf=("blocks.*",)))
    assert found.graph.cuts == (4,)
    trains_equal(workers, model, leaf=["blocks.*"])


# checkpoints


class Checkpointed(Net):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.how == "blocks" else block(x)
        return self.head(x)


def saved_bytes(model, size=512):
    found = plan(
        Objective(model, F.cross_entropy),
        (torch.randn(size, 8), torch.randint(4, (size,))),
        num_ranks=2,
        num_microbatches=2,
        profile="flops",
        num_threads=1,
    )
    return found, sum(layer.saved_bytes for layer in found.profile.layers)


def test_blocks_that_the_forward_checkpoints_are_checkpointed_on_their_stages(workers):
    found, fewer = saved_bytes(Checkpointed("blocks"))
    _, more = saved_bytes(Checkpointed(""))
    assert fewer < 0.7 * more
    assert [layer.name for layer in found.graph.layers] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    trains_equal(workers, Checkpointed("blocks"))


class Careless(Net):
    """Sets hooks as checkpoints of older versions of torch do, which an exception leaves set as long as it lives."""

    def forward(self, x):
        for block in self.blocks:
            hooks = self.hooks()
            next(hooks)
            x = block(x)
            next(hooks, None)
        return self.head(x)

    def hooks(self):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            yield


def test_no_hook_stays_set_when_a_forward_was_given_up():
    gc.disable()
    try:
        with pytest.raises(CaptureError, match="sets hooks for saved tensors"):
            capture(Objective(Careless(), F.cross_entropy), batches(4)[0], grain=Grain(split_before=("blocks.1.1",)))
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    finally:
        gc.enable()


class OwnCall(nn.Sequential):
    """A layer that checkpoints itself around torch's own `__call__`, as those of transformers do."""

    def __call__(self, x):
        return checkpoint(super().__call__, x, use_reentrant=False)


def test_layers_that_checkpoint_themselves_in_their_call_stay_whole(workers):
    model = nn.Sequential(nn.Linear(8, 8), *(OwnCall(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 4))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    found = trains_equal(workers, Own(), split_before=["layers.2"])
    assert {"layers.1", "layers.2", "layers.3"} <= {layer.name for layer in found.graph.layers}


def test_other_hooks_for_saved_tensors_close_the_module_that_sets_them():
    def offloads(self, x):
        with torch.autograd.graph.save_on_cpu():
            return x.sin() * x

    with pytest.raises(CaptureError, match="the model's own forward sets hooks for saved tensors"):
        capture(Objective(Net(offloads), F.cross_entropy), batches(4)[0])


# numbers that are read


def asserts(self, x):
    assert torch.isfinite(x).all()
    return x


def raises(self, x):
    if x.abs().max() > 1e6:
        raise ValueError("too large")
    return x


def prints_nothing(self, x):
    if float(x.detach().mean()) > 1e9:
        print("never")
    return x


def divides(self, x):
    return x / max(1.0, 1.0) * (x.detach().norm().item() * 0.5 + 1)


def validates(self, x):
    return torch.distributions.Normal(x, self.scale.exp().expand_as(x)).mean


def hooks(self, x):
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 0.5)
    return x


@pytest.mark.parametrize("act", [asserts, raises, prints_nothing, divides, validates, hooks])
def test_what_code_reads_and_does_not_branch_on_is_no_obstacle(act, workers):
    found = trains_equal(workers, Net(act))
    assert len(found.graph.layers) > 4


def branches(self, x):
    return x if x.mean() > 0 else x * 2


def sizes(self, x):
    return x[:, : int(x.detach().abs().sum()) % 3 + 4].sum(1, keepdim=True) + x


def at_least(self, x):
    return x * min(int(x.detach().abs().max() * 100), 1)


@pytest.mark.parametrize("act", [branches, sizes, at_least])
def test_what_code_branches_on_is_refused(act):
    with pytest.raises(CaptureError, match=r"the model's own forward reads a value that depends on weights \("):
        capture(Objective(Net(act), F.cross_entropy), batches(4)[0])


def test_a_check_that_does_not_hold_later_is_an_error(workers):
    model, (first, second) = Net(raises), batches(4, 4)
    model.blocks[0][1] = nn.Identity()
    objective = Objective(model, F.cross_entropy)
    found = plan(objective, first, num_ranks=2, num_microbatches=2, profile="flops", num_threads=1)
    with (
        pytest.raises(StageError, match="what it checks does not hold on this micro-batch"),
        Pipeline(objective, found, workers=workers, optimizer=sgd) as pipeline,
    ):
        pipeline.step((second[0] * 1e12, second[1]))


class Metrics(Net):
    """Returns metrics beside its loss: as read, and computed from what was read."""

    def forward(self, x, y):
        output = super().forward(x)
        right = (output.argmax(-1) == y).float().mean().item()
        return {"loss": F.cross_entropy(output, y), "accuracy": 100.0 * right, "wrong": round(1 - right, 3)}


def test_numbers_that_are_returned_are_computed_for_each_micro_batch(workers):
    torch.manual_seed(0)
    model, (x, y) = Metrics(), batches(6)[0]
    objective = Objective(model)
    found = plan(objective, ({"x": x, "y": y}, None), num_ranks=2, num_microbatches=2, profile="flops", num_threads=1)
    with Pipeline(objective, found, workers=workers) as pipeline, torch.no_grad():
        model.eval()
        for rows in (slice(0, 1), slice(3, 4)):
            expected = model(x[rows], y[rows])
            output = pipeline.predict({"x": x[rows], "y": y[rows]})
            assert (output["accuracy"], output["wrong"]) == (expected["accuracy"], expected["wrong"])


# shapes made by values


class Masked(nn.Module):
    """Scores only the tokens that count, and uses their number in some way."""

    def __init__(self, number):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(9, 8), blocks(3), nn.Linear(8, 9)
        self.number = number

    def forward(self, x, labels):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        picked = x[labels != -100]
        loss = F.cross_entropy(self.head(picked), labels[labels != -100])
        return loss * self.number(picked, labels)


def shape(picked, labels):
    return picked.shape[0] / 10


def length(picked, labels):
    return len(picked.view(-1)) / 80


def arranged(picked, labels):
    return torch.arange((labels != -100).sum()).sum() / 10


def nothing(picked, labels):
    return 1


@pytest.mark.parametrize("number", [shape, length, arranged, nothing])
def test_shapes_that_the_batch_decides_are_those_of_each_micro_batch(number, workers):
    torch.manual_seed(2)
    model = Masked(number)

    def some(size):
        labels = torch.randint(9, (size, 6))
        return {"x": torch.randint(9, (size, 6)), "labels": torch.where(torch.rand(size, 6) < 0.4, -100, labels)}, None

    data = [some(8), some(8), some(5)]
    objective = Objective(model)
    found = plan(objective, data[0], num_ranks=2, num_microbatches=4, profile="flops", num_threads=1)
    adam = torch.optim.SGD
    with Pipeline(objective, found, workers=workers, optimizer=lambda named: adam(named, lr=0.1)) as pipeline:
        losses = [pipeline.step(batch).loss for batch in data]
    optimizer = adam(model.parameters(), lr=0.1)
    for (inputs, _), loss in zip(data, losses, strict=True):
        pieces = zip(*(value.tensor_split(4) for value in inputs.values()), strict=True)
        total = torch.zeros(())
        for x, labels in pieces:
            part = model(x, labels) * len(x)
            part.backward()
            total = total + part.detach()
        for parameter in model.parameters():
            parameter.grad.div_(len(inputs["x"]))
        optimizer.step()
        optimizer.zero_grad()
        assert loss == float(total / len(inputs["x"]))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        output, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(output.mean(1))


def test_packed_sequences_of_other_lengths_are_recorded_anew(workers):
    torch.manual_seed(4)
    model, loss = Packed(), F.cross_entropy
    data = [((torch.randint(9, (6, 5)), torch.randint(1, 6, (6,))), torch.randint(4, (6,))) for _ in range(3)]
    objective = Objective(model, loss)
    found = plan(objective, data[0], num_ranks=2, num_microbatches=3, profile="flops", num_threads=1)
    with Pipeline(
        objective, found, workers=workers, optimizer=lambda named: torch.optim.SGD(named, lr=0.1)
    ) as pipeline:
        losses = [pipeline.evaluate([batch]).loss for batch in data]
    model.eval()
    for ((x, lengths), y), value in zip(data, losses, strict=True):
        with torch.no_grad():
            parts = [loss(model(x[i : i + 2], lengths[i : i + 2]), y[i : i + 2]) * 2 for i in (0, 2, 4)]
        assert value == float(parts[0] + parts[1] + parts[2]) / 6


# code that torch does not see


def gate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(y)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, for scripting
    GATE = torch.jit.script(gate)


def scripted(self, x):
    return GATE(x, self.scale.expand_as(x))


def under_vmap(self, x):
    mask = x.detach() * 0 + 1
    return x * torch.vmap(lambda row, position: row * mask[0] + position * 0)(x, torch.arange(len(x)))


def from_arrays(self, x):
    return x * torch.from_numpy(np.arange(1, 9, dtype=np.float32)) / torch.tensor(np.float32(4))


def casts(self, x):
    return x * (x > 0).type(x.dtype)


@pytest.mark.parametrize("act", [under_vmap, from_arrays, casts])
def test_calls_that_no_mode_sees_are_followed(act, workers):
    found = trains_equal(workers, Net(act))
    assert len(found.graph.layers) > 4


def test_scripted_functions_are_followed_and_travel(workers):
    torch.manual_seed(5)
    model, (batch,) = Net(scripted), batches(8)
    objective = Objective(model, F.cross_entropy)
    found = plan(objective, batch, num_ranks=2, num_microbatches=2, profile="flops", num_threads=1)
    assert len(found.graph.layers) > 4
    with Pipeline(objective, found, workers=workers, optimizer=sgd) as pipeline:
        loss = pipeline.step(batch).loss
        assert pipeline.check.passed
    plain = F.cross_entropy(model(batch[0]), batch[1]).item()
    assert loss == pytest.approx(plain, rel=1e-5)  # torch compiles it again as it runs


def test_what_depends_on_a_value_unseen_shows_on_another_micro_batch():
    def unseen(self, x):
        with torch._C.DisableTorchFunction():
            number = int(x.sum() * 1000)
        return x * number

    first, second = ((torch.randn(2, 8), torch.randint(4, (2,))) for _ in range(2))
    with pytest.raises(CaptureError, match="does something else on another micro-batch of the same shapes"):
        capture(Objective(Net(unseen), F.cross_entropy), first, other=second)
