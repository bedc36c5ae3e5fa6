"""Models that nobody holds whole: init=meta."""

import gc

import pytest
import torch
import torch.nn.functional as F
from layers import momentum
from reference import train
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from unsplit import assert_same, draws, make_plan

from modelpar.capture.deferred import aside, deferred_in, made, materialize, streamed
from modelpar.capture.factory import construct
from modelpar.capture.objective import Objective
from modelpar.capture.recipe import recipe_of
from modelpar.errors import CaptureError, ConfigError
from modelpar.models import convnet, gpt, mlp
from modelpar.planner import plan
from modelpar.proof import verify
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

SMALL = {
    "gpt": lambda: gpt.build(vocab_size=16, context=6, width=8, depth=3, heads=2),
    "mlp": lambda: mlp.build(),
    "convnet": lambda: convnet.build(),
}


class Several(nn.Module):
    """Makes parameters in every way that factories do."""

    def __init__(self):
        super().__init__()
        self.twice = self.once = nn.Parameter(torch.empty(4, 6))
        nn.init.orthogonal_(self.once)
        flat = torch.randn(10)
        self.first, self.second = nn.Parameter(flat[:4]), nn.Parameter(flat[4:].view(2, 3))
        self.numbers = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        with torch.no_grad():
            self.numbers[1:].mul_(3)
            self.numbers[0] = torch.rand(())
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        self.lstm = nn.LSTM(3, 4, num_layers=2)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.embedding = nn.Embedding(5, 3, padding_idx=1)
        nn.init.trunc_normal_(self.embedding.weight.data, std=0.02)
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(3))
        self.register_buffer("drawn", drawn)
        self.doubled = nn.Parameter(drawn * 2)
        self.half = nn.Linear(3, 3).to(torch.bfloat16)
        self.many = nn.ParameterList([nn.Parameter(torch.full((2,), float(i))) for i in range(2)])
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        nn.init.kaiming_normal_(self.conv.weight)
        nn.init.dirac_(self.conv.weight.data[:3])
        nn.init.sparse_(self.once, 0.5)


class Own(nn.Module):
    """Uses parameters outside of the modules that own them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.zeros(6, 8))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)])
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return F.linear(self.lstm(x)[0] * self.scale, self.head.weight).flatten(0, 1)


@pytest.mark.parametrize("factory", [Several, Own, *(lambda build=b: build()[0] for b in SMALL.values())])
def test_parameters_are_what_the_factory_would_have_made(factory):
    before = torch.get_rng_state()
    deferred, there = construct(factory, 5), construct(factory, 5, keep=True)
    assert all(parameter.is_meta for parameter in deferred.parameters())
    assert not any(buffer.is_meta for buffer in deferred.buffers())
    assert [*deferred.state_dict()] == [*there.state_dict()]
    for (name, found), expected in zip(materialize(deferred).named_parameters(), there.parameters(), strict=True):
        assert found.stride() == expected.stride(), name
        assert torch.equal(found, expected), name
    for (name, found), expected in zip(deferred.named_buffers(), there.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert torch.equal(before, torch.get_rng_state())
    assert deferred_in(deferred) == {}


def test_tied_parameters_stay_one_and_lists_of_them_right():
    model = materialize(construct(Several, 0))
    assert model.once is model.twice
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))
    clones = [layer.linear1.weight for layer in model.encoder.layers]
    assert torch.equal(*clones)  # as nn.TransformerEncoder makes them


def test_another_seed_makes_others():
    one, two, again = (materialize(construct(lambda: nn.Linear(3, 3), seed)).weight for seed in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def uninitialised():
    layer = nn.Linear(2, 2)
    layer.extra = nn.Parameter(torch.empty(3))
    return nn.Sequential(nn.Linear(2, 2), layer)


def half_initialised():
    model = uninitialised()
    with torch.no_grad():
        model[1].extra[:2] = 0
    return model


def reading():
    model = nn.Linear(2, 2)
    model.scale = float(model.weight.sum())
    return model


def keeping():
    model = nn.Linear(2, 2)
    model.computed = model.weight.detach() * 2
    return model


def copied_out():
    model = nn.Linear(2, 2)
    model.register_buffer("kept", torch.zeros(2, 2))
    model.kept.copy_(model.weight.detach())
    return model


def overlapping():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    return model


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (uninitialised, r"1\.extra is never initialised; expected its module to do so, in reset_parameters or"),
        (half_initialised, r"1 of 3 numbers of 1\.extra are never initialised; expected its module"),
        (reading, r"the factory reads the value of a parameter \(aten\._local_scalar_dense"),
        (keeping, "computed is computed from a parameter and is neither a parameter nor a buffer"),
        (copied_out, "the factory writes what it computes from a parameter into a tensor"),
        (overlapping, r"0\.weight and 1\.weight are views of the same memory"),
        (lambda: 3, "the model factory returned int; expected a torch.nn.Module"),
    ],
)
def test_what_cannot_be_made_later_is_refused_in_one_line(factory, message):
    with pytest.raises(CaptureError, match=message) as caught:
        materialize(Objective(factory, F.mse_loss, init="meta").build())
    assert len(str(caught.value).splitlines()) == 1


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="init is 'cpu'; expected None or 'meta'"):
        Objective(lambda: nn.Linear(2, 2), init="cpu")
    with pytest.raises(ConfigError, match="init='meta' is given with a Linear, which is there as a whole"):
        Objective(nn.Linear(2, 2), init="meta")


def test_a_model_streams_call_by_call():
    model = construct(lambda: nn.Sequential(*[nn.Linear(300, 300) for _ in range(6)]), 0)
    there = materialize(construct(lambda: nn.Sequential(*[nn.Linear(300, 300) for _ in range(6)]), 0))
    counts, x = [], torch.randn(2, 300)

    def look(*_):
        counts.append(sum(not parameter.is_meta for parameter in model.parameters()))

    for layer in model:
        layer.register_forward_hook(look)
    state = torch.get_rng_state()
    with streamed(model):
        output = model(x)
    assert counts == [2] * 6  # the weight and the bias of the layer under way
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert output.requires_grad  # its graph holds no weight any more
    gc.collect()
    large = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() == 300 * 300 and not o.is_meta]
    assert large == []
    assert torch.equal(output, there(x))


def test_forward_may_ask_for_gradients_while_it_streams():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    x = torch.randn(2, 3)
    with streamed(model := construct(Forces, 0)):
        found = model(x)
    assert torch.equal(found, materialize(construct(Forces, 0))(x))


def test_what_is_made_for_a_while_is_freed_with_its_gradient():
    model = construct(lambda: nn.Linear(3, 3), 0)
    with made([*model.parameters(), model.weight]):
        model(torch.ones(1, 3)).sum().backward()
        assert model.weight.grad is not None
    assert model.weight.is_meta
    assert model.weight.grad is None
    assert recipe_of(model.weight) is not None


def check_equal(workers, factory, loss, batch, **how):
    """Trains split, from parts, and unsplit; returns the trained weights."""
    objective = Objective(factory, loss, init="meta")
    decided = make_plan(objective, batch, seed=3, **how)
    with Pipeline(objective, decided, workers=workers, optimizer=momentum, seed=3) as pipeline:
        assert_same(pipeline.state_dict(), materialize(objective.build(3)).state_dict())
        results = [pipeline.step(batch) for _ in range(2)]
        state = pipeline.state_dict()
    model = materialize(objective.build(3))
    expected = train(model, loss, momentum, [batch] * 2, num_microbatches=4, draws=draws(decided), seed=3)
    assert [(r.loss, r.grad_norm) for r in results] == [(value, norm) for value, norm, _ in expected]
    assert_same(state, model.state_dict())
    return state


@pytest.mark.parametrize("name", SMALL)
def test_training_equals_the_unsplit_model_for_any_number_of_stages(shared_workers, name):
    _, batch, loss = SMALL[name]()
    ranks = shared_workers["threads"].get()
    states = [check_equal(ranks, lambda: SMALL[name]()[0], loss, batch, num_ranks=n) for n in (1, 2, 3)]
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_a_model_that_uses_parameters_of_its_modules_directly(workers):
    batch = torch.randint(20, (8, 6)), torch.randint(20, (8, 6))
    check_equal(workers, Own, lambda output, targets: F.cross_entropy(output, targets.flatten()), batch, num_ranks=3)


def test_profiles_are_those_of_the_whole_model():
    _, batch, loss = SMALL["gpt"]()

    def factory():
        return SMALL["gpt"]()[0]

    whole, parts = (
        plan(Objective(factory, loss, init=init), batch, num_microbatches=2, profile="flops") for init in (None, "meta")
    )
    assert parts.graph == whole.graph
    assert parts.profile == whole.profile
    alone = plan(Objective(factory, loss, init="meta"), batch, num_microbatches=2, profile="alone")
    assert all(layer.forward_seconds > 0 for layer in alone.profile.layers[1:4])


def test_recipes_are_seen_by_nobody_who_watches():
    packed = []
    model = construct(lambda: nn.Linear(3, 3), 0)
    with saved_tensors_hooks(packed.append, lambda _: None), torch.autocast("cpu", dtype=torch.bfloat16), aside():
        value = recipe_of(model.weight).make()
    assert packed == []
    assert value.dtype == torch.float32


def hooked():
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.register_hook(lambda grad: grad)
    model = nn.Linear(2, 2)
    model.weight = parameter
    return nn.Sequential(model)


def test_hooks_on_parameters_are_refused_as_ever():
    with pytest.raises(CaptureError, match=r"0\.weight has a hook"):
        make_plan(Objective(hooked, F.mse_loss, init="meta"), (torch.zeros(4, 2), torch.zeros(4, 2)), num_ranks=1)


def test_verify_finds_all_equal():
    _, batch, loss = SMALL["gpt"]()
    objective = Objective(lambda: SMALL["gpt"]()[0], loss, init="meta")
    decided = make_plan(objective, batch, num_microbatches=2)
    with Workers(2, transport="threads") as workers:
        verdict = verify(objective, batch, decided, optimizer=momentum, workers=workers)
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


def test_a_model_of_a_library_with_its_own_initialisation():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=50
    )

    def factory():
        return transformers.LlamaForCausalLM(config)

    deferred, there = construct(factory, 5), construct(factory, 5, keep=True)
    weight = there.model.layers[1].mlp.up_proj.weight
    assert abs(float(weight.detach().std()) - config.initializer_range) < 0.003  # not what nn.Linear draws
    for (name, found), expected in zip(materialize(deferred).named_parameters(), there.parameters(), strict=True):
        assert torch.equal(found, expected), name
