"""A pipeline on batches of lists, arrays, graphs and shared inputs equals the unsplit model, and joins its outputs."""

import numpy as np
import pytest
import torch
from commands import THREADS, call
from torch import nn
from torch.nn import functional as F

from modelpar import Objective, Pipeline, Workers, plan, verify
from modelpar.capture.objective import LossResult
from modelpar.errors import ConfigError

torch.manual_seed(0)
X, Y = torch.randn(7, 6), torch.randint(3, (7,))


@pytest.fixture(scope="module")
def workers():
    with Workers(2, transport="threads") as running:
        yield running


def sgd(named):
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.1)


def planned(objective, batch, microbatches=3, **options):
    return plan(objective, batch, num_microbatches=microbatches, profile="flops", num_threads=1, **options)


def verdict(workers, objective, batch, **options):
    found = verify(objective, batch, planned(objective, batch, **options), optimizer=sgd, workers=workers)
    assert found.passed, found
    return found


class Scaled(nn.Module):
    """Takes one number per sample, as a list or an array."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, numbers):
        rows = [row * len(n) if isinstance(n, str) else row * int(n) for row, n in zip(self.a(x), numbers, strict=True)]
        return self.c(torch.tanh(self.b(torch.stack(rows))))


@pytest.mark.parametrize("numbers", [[1, 2, 3, 1, 2, 3, 4], np.arange(1, 8), ["a", "bb", "c", "dd", "a", "b", "ccc"]])
def test_lists_and_arrays_of_samples(workers, numbers):
    verdict(workers, Objective(Scaled(), F.cross_entropy), ((X, numbers), Y))


def test_arrays_and_lists_as_targets(workers):
    def loss(output, targets):
        assert type(targets["array"]) is np.ndarray
        assert len(targets["list"]) == len(targets["array"]) == len(output)
        return F.cross_entropy(output, torch.as_tensor(targets["array"])) * sum(targets["list"]) / len(output)

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    objective, batch = Objective(model, loss), (X, {"array": Y.numpy(), "list": [1, 2, 1, 2, 1, 2, 1]})
    verdict(workers, objective, batch)


class Sequences(nn.Module):
    """Takes a list of sequences of different lengths; each by itself, so that batches do not matter."""

    def __init__(self):
        super().__init__()
        self.pool, self.b, self.c = Pool(), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, sequences):
        return self.c(torch.tanh(self.b(self.pool(sequences))))


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, sequences):
        return torch.stack([self.a(sequence).mean(0) for sequence in sequences])


@pytest.mark.parametrize("form", [lambda made: made, lambda made: (made,), lambda made: (tuple(made),)])
def test_a_list_of_tensors_of_different_lengths(workers, form):
    sequences = [torch.randn(n, 6) for n in (3, 5, 1, 2, 7, 4, 2)]
    verdict(
        workers,
        Objective(
            Sequences(),
            F.cross_entropy,
        ),
        (form(sequences), Y),
        leaf=["Pool"],
    )


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, bias):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))) + bias)


def test_an_input_that_was_shared_stays_so_where_its_length_is_that_of_a_batch(workers):
    model, bias = Biased(), torch.randn(1, 6)
    objective = Objective(model, F.cross_entropy)
    batch = (X, bias), Y
    with Pipeline(objective, planned(objective, batch), workers=workers, optimizer=sgd) as pipeline:
        one = pipeline.predict((X[:1], bias))
        table = torch.randn(6, 6)[:3]
        with pytest.raises(ConfigError, match="expected as many of each"):
            pipeline.step(((X, table), Y[:3]))
        assert torch.equal(one, model.eval()(X[:1], bias))


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, nodes, graph, empty):
        h = torch.tanh(self.b(torch.relu(self.a(nodes))))
        return self.c(empty.index_add(0, graph, h))


def by_graph(inputs, targets, number):
    nodes, graph, empty = inputs
    found = []
    for ids in torch.arange(len(empty)).tensor_split(min(number, len(empty))):
        mine = torch.isin(graph, ids)
        part = nodes[mine], graph[mine] - ids[0], empty[ids]
        found.append((part, None if targets is None else targets[ids], len(ids)))
    return found


def test_a_function_of_the_users_own_cuts_graphs(workers):
    graph = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    inputs = torch.randn(10, 6), graph, torch.zeros(4, 6)
    with pytest.raises(ConfigError, match=r"the batch has 10 inputs and 4 targets; .* cut= for batches"):
        planned(Objective(Graphs(), F.cross_entropy), (inputs, Y[:4]))
    objective = Objective(Graphs(), F.cross_entropy, cut=by_graph)
    made = planned(objective, (inputs, Y[:4]))
    assert made.notes == ()
    verdict(workers, objective, (inputs, Y[:4]))
    with Pipeline(objective, made, workers=workers) as pipeline:
        assert torch.allclose(pipeline.predict(inputs), objective.model.eval()(*inputs))


class Outputs(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(number, 6))

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return {"scores": h @ self.table.t(), "table": self.table * 1.0, "rows": list(h), "number": 3, "nothing": None}


@pytest.mark.parametrize("samples", [1, 2, 4, 7, 8, 12])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_output_that_counts_no_samples_is_returned_once(workers, samples, number):
    model = Outputs(number)
    objective = Objective(model, lambda output, y: F.cross_entropy(output["scores"], y))
    x = torch.randn(samples, 6)
    made = planned(objective, (torch.randn(8, 6), torch.zeros(8, dtype=torch.long)), microbatches=4)
    with Pipeline(objective, made, workers=workers) as pipeline:
        for _ in range(2):
            found, expected = pipeline.predict(x), model.eval()(x)
            assert found["scores"].shape == (samples, number)
            assert torch.allclose(found["scores"], expected["scores"], atol=1e-6)
            assert torch.equal(found["table"], model.table)
            assert len(found["rows"]) == samples
            assert (found["number"], found["nothing"]) == (3, None)


class Similar(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.b(torch.tanh(self.a(x)))
        return h, h.square().mean()


def test_what_cannot_be_joined_is_joined_by_the_users_own_function(workers):
    def loss(output, targets):
        return F.mse_loss(output[0], targets)

    batch = X[:6], X[:6]
    plain = Objective(Similar(), loss)
    message = r"output.1 does not count samples .*, or Objective\(…, join="
    with Pipeline(plain, planned(plain, batch), workers=workers) as pipeline, pytest.raises(ConfigError, match=message):
        pipeline.predict(X[:6])
    own = Objective(plain.model, loss, join=lambda outputs: torch.stack([penalty for _, penalty in outputs]).mean())
    with Pipeline(own, planned(own, batch), workers=workers) as pipeline:
        assert torch.allclose(pipeline.predict(X[:6]), own.model(X[:6])[1])
    verdict(workers, own, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_low_precision_are_reported_as_their_mean(workers, dtype):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(256, 6).to(dtype), torch.randint(3, (256,))

    def counted(output, targets):
        return LossResult(
            F.cross_entropy(output, targets, reduction="sum"), len(targets), {"half": float(len(targets))}
        )

    with torch.no_grad():
        rows = [(a[None], b[None]) for a, b in zip(x, y, strict=True)]
        mean = sum(float(F.cross_entropy(model(a), b)) for a, b in rows) / 256
    for loss in (F.cross_entropy, counted):
        objective = Objective(model, loss)
        made = planned(objective, (x, y), microbatches=256)
        with Pipeline(objective, made, workers=workers, optimizer=sgd) as pipeline:
            evaluated = pipeline.evaluate([(x, y)])
            assert evaluated.loss == pytest.approx(mean, rel=1e-6)
            assert pipeline.step((x, y)).loss == pytest.approx(mean, rel=1e-6)
    assert evaluated.metrics == {"half": 1.0}


MODEL_FILE = """
import numpy, torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, more=None, scale=1.0):
        if isinstance(x, list):
            x = torch.stack(x)
        h = torch.tanh(self.b(torch.tanh(self.a(x)))) * scale
        return self.c(h if more is None else h * torch.as_tensor(more).float()[:, None])


x, y = torch.randn(6, 6), torch.arange(6) % 3
positional = lambda: (Net(), ((x, torch.arange(1, 7)), y), nn.functional.cross_entropy)
keywords = lambda: (Net(), ({"x": x, "more": [1, 2, 3, 4, 5, 6]}, y), nn.functional.cross_entropy)
alone = lambda: (Net(), ([x[i] for i in range(6)], y), nn.functional.cross_entropy)
arrays = lambda: (Net(), ((x, numpy.arange(1, 7)), y), nn.functional.cross_entropy)
shared = lambda: (Net(), ({"x": x, "scale": torch.linspace(0.1, 3, 6)}, y), nn.functional.cross_entropy)
"""


@pytest.fixture
def verified(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL_FILE)

    def run(build, *more):
        few = ["pipeline.num_microbatches=3", "training.batch_size=6", "steps=2", "output.name=run", *THREADS]
        return call("verify", "model=file", f"model.factory=net.py:{build}", *few, *more)

    return run


@pytest.mark.parametrize("build", ["positional", "keywords", "alone", "arrays"])
def test_a_model_file_may_give_inputs_in_any_form(verified, build):
    outcome = verified(build)
    assert "equals the unsplit one to the bit in all" in outcome.out, outcome.err


def test_a_model_file_may_have_inputs_that_all_samples_share(verified, tmp_path):
    refused = verified("shared")
    assert refused.code == 2
    assert refused.err.startswith("modelpar: inputs.scale is as long as the batch (6) and was cut with it")
    assert refused.err.count("\n") == 1
    outcome = verified("shared", "pipeline.shared=[scale]")
    assert "equals the unsplit one to the bit in all" in outcome.out, outcome.err
    assert '"shared": [\n   "inputs.scale"\n  ]' in (tmp_path / "runs" / "run" / "plan.json").read_text()
    wrong = verified("shared", "pipeline.shared=[scales]")
    assert "shared names 'scales', which the batch does not have; expected one of x, scale" in wrong.err
