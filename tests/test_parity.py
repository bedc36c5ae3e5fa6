"""The split model equals the unsplit one to the bit: threads and processes, every split, schedule and model."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layers import (
    ChannelsLast,
    Expand,
    First,
    Many,
    One,
    OwnLoss,
    Round,
    Shared,
    Slice,
    Transpose,
    TwoInputs,
    adamw,
    count_tokens,
    decay,
    looped,
    momentum,
)
from reference import keyed, train
from torch import nn
from unsplit import assert_same, check_equal, draws, make_plan

from modelpar.capture.objective import Objective
from modelpar.models import convnet, gpt, mlp
from modelpar.planning import partitioners, schedules
from modelpar.run.pipeline import Pipeline

GPT = partial(gpt.build, vocab_size=32, context=8, width=16, depth=3, heads=2)
MLP = partial(mlp.build, input_shape=(6,), width=16, depth=4, dropout=0.3)
CONVNET = partial(convnet.build, input_shape=(3, 8, 8), width=4, depth=3)
GPIPE, ONE_F = schedules.gpipe, schedules.one_f_one_b


def seeded(build, seed=1):
    torch.manual_seed(seed)
    return build()


def batches_like(example, sizes):
    """Returns batches of other samples like the example's."""
    inputs, targets = example
    generator = torch.Generator().manual_seed(5)
    found = []
    for size in sizes:
        rows = torch.randint(len(inputs), (size,), generator=generator)
        x = inputs[rows]
        noise = torch.rand(x.shape, generator=generator) if x.is_floating_point() else 0
        found.append((x + noise, targets[rows]))
    return found


@pytest.mark.parametrize(
    ("ranks", "microbatches", "schedule", "sizes", "options"),
    [
        (1, 4, GPIPE, [8, 8], {"optimizer": momentum}),
        (2, 4, GPIPE, [8, 8, 5], {"optimizer": adamw, "max_norm": 0.5, "partitioner": partitioners.by_parameters}),
        (2, 6, ONE_F, [12, 3, 12], {"optimizer": adamw, "lr_schedule": decay, "seed": 3}),  # 3 samples: 3 micro-batches
        (3, 2, ONE_F, [8, 7, 1], {"optimizer": momentum, "max_norm": 1e3}),  # fewer than stages; nothing to clip
        (3, 8, GPIPE, [9, 9], {"optimizer": adamw, "partitioner": partitioners.by_flops}),
        (4, 6, ONE_F, [12, 2, 11], {"optimizer": adamw, "max_norm": 0.1, "lr_schedule": decay}),
        (4, 1, ONE_F, [4, 4], {"optimizer": momentum, "partitioner": partitioners.optimal}),
        (4, 4, GPIPE, [8, 8], {"optimizer": momentum, "partitioner": partitioners.by_memory}),
    ],
)
@pytest.mark.parametrize("build", [GPT, MLP, CONVNET], ids=["gpt", "mlp", "convnet"])
def test_training_equals_the_unsplit_model(workers, build, ranks, microbatches, schedule, sizes, options):
    model, example, loss = seeded(build)
    how = {"num_ranks": ranks, "num_microbatches": microbatches, "schedule": schedule, **options}
    plan = check_equal(workers, model, loss, batches_like(example, sizes), **how)
    assert plan.num_stages == ranks
    if build is not CONVNET:
        assert draws(plan)


def test_every_manual_split_gives_the_same_bits(workers):
    for balance in ([1, 4], [2, 3], [3, 2], [4, 1]):
        model, example, loss = seeded(GPT)
        split = partial(partitioners.manual, balance=balance)
        plan = check_equal(workers, model, loss, batches_like(example, [6]), partitioner=split, num_microbatches=3)
        assert list(plan.partition.balance) == balance


@pytest.mark.parametrize("tied", ["exact", "fast"])
@pytest.mark.parametrize("build", [GPT, MLP, CONVNET], ids=["gpt", "mlp", "convnet"])
def test_a_rank_may_have_several_stages(workers, build, tied):
    model, example, loss = seeded(partial(build, dropout=0.1) if build is not CONVNET else build)
    if tied == "fast" and build is GPT:
        model, example, loss = seeded(partial(GPT, tied=False))
    sizes = [8, 3]
    how = {"num_ranks": 2, "schedule": looped, "max_norm": 0.5, "tied": tied}
    plan = check_equal(workers, model, loss, batches_like(example, sizes), **how)
    assert (plan.num_ranks, plan.num_stages, plan.schedule.stage_to_rank) == (2, 4, (0, 1, 0, 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_tied_fast_has_the_same_first_gradients_up_to_rounding(workers, ranks):
    model, example, loss = seeded(GPT)
    batch = batches_like(example, [8])[0]
    objective = Objective(model, loss)
    plan = make_plan(objective, batch, num_ranks=ranks, tied="fast")
    assert len(plan.stage_graph.tied) == 1
    sgd = partial(torch.optim.SGD, lr=1.0)  # the change of the weights is the gradient
    before = copy.deepcopy(model.state_dict())
    with Pipeline(objective, plan, workers=workers, optimizer=sgd) as pipeline:
        result = pipeline.step(batch)
        state = pipeline.state_dict()
        per_stage = pipeline._ask_all("state_dict")
    ((value, norm, _),) = train(model, loss, sgd, [batch], num_microbatches=4, draws=draws(plan))
    assert result.loss == value
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    for name, expected in model.state_dict().items():
        change, wanted = (t.double() - before[name].double() for t in (state[name], expected))
        assert torch.dist(change, wanted) <= 1e-5 * wanted.norm(), name  # lr 1: float32 rounding of the weights
    names = plan.graph.tied[0].names
    copies = [stage[name] for stage in per_stage for name in names if name in stage]
    assert len(copies) == 2
    assert torch.equal(*copies)  # every stage goes on with the same weight


def linear(width=8, out=8):
    return nn.Linear(width, out)


def lstm():
    return nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)


ODD = {
    "a layer used twice": (lambda: (lambda shared: [shared, nn.Tanh(), shared, linear()])(linear()), (8,), None),
    "tied three times": (lambda: (lambda w: [w(), w(), nn.Tanh(), w()])(tied_linears()), (8,), None),
    "a frozen first stage": (lambda: [frozen(linear()), nn.Tanh(), linear(), linear()], (8,), None),
    "a frozen last stage": (lambda: [linear(), nn.Tanh(), frozen(linear()), frozen(linear())], (8,), None),
    "no weights in a stage": (lambda: [linear(), nn.Tanh(), nn.Sigmoid(), nn.Softmax(1)], (8,), None),
    "relu in place": (lambda: [linear(), linear(), nn.ReLU(inplace=True), linear()], (8,), None),
    "in place through a view": (lambda: [linear(), nn.Flatten(), nn.ReLU(inplace=True), linear()], (8,), [1, 3]),
    "in place through nothing": (lambda: [nn.Tanh(), nn.Identity(), nn.ReLU(inplace=True), linear()], (8,), [1, 3]),
    "in place on the batch": (lambda: [nn.ReLU(inplace=True), linear(), nn.Tanh(), linear()], (8,), None),
    "dropout in place": (lambda: [linear(), linear(), nn.Dropout(0.5, inplace=True), linear()], (8,), None),
    "a dict with None": (lambda: [linear(), Many(8), One(), linear()], (8,), None),
    "a tuple of an LSTM": (lambda: [linear(), lstm(), First(), nn.Sequential(linear(), nn.Flatten())], (3, 8), None),
    "a transposed view": (lambda: [linear(), Transpose(), linear(5), nn.Flatten()], (5, 8), [2, 2]),
    "columns with gaps": (lambda: [linear(), Slice(), linear(4), linear()], (8,), [2, 2]),
    "an expanded view": (lambda: [linear(), Expand(), linear(), nn.Tanh()], (8,), [2, 2]),
    "channels last": (
        lambda: [ChannelsLast(), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten()],
        (3, 6, 6),
        None,
    ),
    "integers": (lambda: [linear(), Round(), nn.Embedding(7, 8), nn.Flatten()], (8,), [2, 2]),
    "names that mean something": (
        lambda: OrderedDict(targets=linear(), inputs=Many(8), output=One(), samples=linear()),
        (8,),
        [2, 1, 1],
    ),
    "double precision": (lambda: [linear().double(), nn.Tanh(), linear().double()], (8,), None),
    "a shared buffer": (lambda: (lambda n: [n, linear(), n, linear(), linear()])(nn.BatchNorm1d(8)), (8,), [3, 2]),
    "a shared dropout": (lambda: (lambda d: [Shared(d), Shared(d), linear()])(nn.Dropout(0.4)), (8,), [2, 1]),
}  # fmt: skip


def tied_linears():
    first = linear()

    def another():
        made = linear()
        made.weight = first.weight
        return made

    return another


def frozen(module):
    return module.requires_grad_(False)


@pytest.mark.parametrize("name", ODD)
def test_odd_models_equal_the_unsplit_one(workers, name):
    make, shape, balance = ODD[name]
    torch.manual_seed(2)
    made = make()
    model = nn.Sequential(
        made if isinstance(made, OrderedDict) else OrderedDict((f"l{i}", m) for i, m in enumerate(made))
    )
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    batches = [(torch.randn(n, *shape, dtype=dtype), torch.randint(4, (n,))) for n in (8, 6)]
    given = copy.deepcopy(batches)
    how = {"num_ranks": len(balance or [1, 1]), "num_microbatches": 3}
    if balance:
        how["partitioner"] = partial(partitioners.manual, balance=balance)
    check_equal(workers, model, F.cross_entropy, batches, optimizer=adamw, max_norm=0.7, **how)
    for (x, y), (x_before, y_before) in zip(batches, given, strict=True):
        if name != "in place on the batch":  # there the unsplit model itself writes to the batch
            assert torch.equal(x, x_before)
        assert torch.equal(y, y_before)


def test_a_loss_that_counts_for_itself(workers):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    batches = [(torch.randn(8, 8), torch.tensor([0, 1, 2, -1, -1, -1, 3, 0])) for _ in range(3)]
    objective = Objective(model, count_tokens)
    plan = make_plan(objective, batches[0], num_microbatches=4)
    with Pipeline(objective, plan, workers=workers, optimizer=adamw, max_norm=0.1) as pipeline:
        results = [pipeline.step(batch) for batch in batches]
        state = pipeline.state_dict()
    optimizer = adamw(model.parameters())
    for result, (inputs, targets) in zip(results, batches, strict=True):
        total, count, hits = torch.zeros(()), 0, 0.0
        for x, y in zip(inputs.split(2), targets.split(2), strict=True):
            part = count_tokens(model(x), y)
            if part.count:  # the third micro-batch counts nothing
                part.total.backward()
            total, count, hits = total + part.total.detach(), count + part.count, hits + part[2]["accuracy"] * part[1]
        for parameter in model.parameters():
            parameter.grad.div_(count)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert (result.loss, result.count, result.grad_norm) == (float(total / count), 5, float(norm))
        assert result.metrics == {"accuracy": pytest.approx(hits / count)}
    assert_same(state, model.state_dict())


@pytest.mark.parametrize("kind", ["scalar", "tuple", "dict"])
def test_a_model_that_returns_its_own_loss(workers, kind):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8), OwnLoss(kind))
    batches = [(torch.randn(n, 8), None) for n in (8, 5)]
    objective = Objective(model)
    plan = make_plan(objective, batches[0])
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        results = [pipeline.step(batch) for batch in batches]
        state = pipeline.state_dict()

    def loss(output, _):
        return {"scalar": lambda: output, "tuple": lambda: output[0], "dict": lambda: output["loss"]}[kind]()

    pairs = [(x, x) for x, _ in batches]
    expected = list(train(model, loss, momentum, pairs, num_microbatches=4, draws=["1"]))
    assert [(r.loss, r.grad_norm) for r in results] == [step[:2] for step in expected]
    assert_same(state, model.state_dict())


@pytest.mark.parametrize("form", [tuple, dict])
def test_inputs_as_positional_and_keyword_arguments(workers, form):
    torch.manual_seed(4)
    model = nn.Sequential(TwoInputs(6), nn.Tanh(), nn.Linear(8, 4))
    left, right, targets = torch.randn(9, 6), torch.randn(9, 6), torch.randint(4, (9,))
    inputs = (left, right) if form is tuple else {"right": right, "left": left}
    objective = Objective(model, F.cross_entropy)
    plan = make_plan(objective, (inputs, targets))
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        result = pipeline.step((inputs, targets))
        state = pipeline.state_dict()
    optimizer, total = momentum(model.parameters()), torch.zeros(())
    for x, y, z in zip(left.tensor_split(4), right.tensor_split(4), targets.tensor_split(4), strict=True):
        part = F.cross_entropy(model[1:](model[0](x, y)), z) * len(x)
        part.backward()
        total = total + part.detach()
    for parameter in model.parameters():
        parameter.grad.div_(9)
    optimizer.step()
    assert result.loss == float(total / 9)
    assert_same(state, model.state_dict())


def test_a_batch_dimension_that_is_not_the_first(workers):
    torch.manual_seed(4)
    layers = [nn.Linear(8, 8), nn.Dropout(0.2), nn.LSTM(8, 4), First()]  # (time, batch, width)
    model = nn.Sequential(*layers)
    inputs, targets = torch.randn(5, 6, 8), torch.randn(5, 6, 4)
    objective = Objective(model, F.mse_loss, batch_dim=1)
    plan = make_plan(objective, (inputs, targets), num_microbatches=3)
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        result = pipeline.step((inputs, targets))
        predicted = pipeline.predict(inputs)
        state = pipeline.state_dict()
    optimizer, total = momentum(model.parameters()), torch.zeros(())
    for i, (x, y) in enumerate(zip(inputs.split(2, 1), targets.split(2, 1), strict=True)):
        with keyed(model, ["1"], 0, 0, i):
            part = F.mse_loss(model(x), y) * 2
        part.backward()
        total = total + part.detach()
    for parameter in model.parameters():
        parameter.grad.div_(6)
    optimizer.step()
    assert (result.loss, result.count) == (float(total / 6), 6)
    assert_same(state, model.state_dict())
    model.eval()
    with torch.no_grad():  # an LSTM's last bits may differ where autograd watches
        assert torch.equal(predicted, torch.cat([model(x) for x in inputs.split(2, 1)], 1))


def test_a_seed_gives_the_same_training_again_and_another_seed_another_one(workers):
    model, example, loss = seeded(MLP)
    objective = Objective(model, loss)
    plan = make_plan(objective, example)

    def losses(seed, transport):
        with Pipeline(objective, plan, workers=transport, optimizer=adamw, seed=seed) as pipeline:
            return [pipeline.step(example).loss for _ in range(2)]

    assert losses(1, workers) == losses(1, workers) != losses(2, workers)


def build_gpt():
    return GPT()[0]


def test_a_factory_is_built_from_the_seed(workers):
    _, example, loss = seeded(GPT)
    objective = Objective(build_gpt, loss)
    plan = make_plan(objective, example)
    state_before = torch.get_rng_state()
    with Pipeline(objective, plan, workers=workers, optimizer=adamw, seed=11) as pipeline:
        assert torch.equal(torch.get_rng_state(), state_before)
        untrained = pipeline.state_dict()
        result = pipeline.step(example)
    torch.manual_seed(11)
    model = build_gpt()
    assert_same(untrained, model.state_dict())
    ((value, norm, _),) = train(model, loss, adamw, [example], num_microbatches=4, seed=11, draws=draws(plan))
    assert (result.loss, result.grad_norm) == (value, norm)


def test_values_that_travel_as_messages_give_the_same_bits(start_script):
    """As between hosts, where there is no shared memory."""
    process = start_script("""
        from functools import partial
        import torch
        from layers import adamw
        from modelpar import Workers, schedules
        from modelpar.models import gpt
        from unsplit import check_equal

        torch.set_num_threads(1)
        torch.manual_seed(1)
        with Workers(3, transport="rpc", shared_memory=False) as workers:
            for schedule in (schedules.gpipe, schedules.one_f_one_b):
                model, (x, y), loss = gpt.build(vocab_size=32, context=8, width=16, depth=3, heads=2)
                how = {"num_ranks": 3, "num_microbatches": 4, "schedule": schedule, "optimizer": adamw, "max_norm": 0.5}
                check_equal(workers, model, loss, [(x, y), (x[:3], y[:3])], **how)
        print("equal")
    """)
    output, errors = process.communicate(timeout=120)
    assert (output, process.returncode) == ("equal\n", 0), errors
