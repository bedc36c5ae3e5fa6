"""Embeddings with sparse gradients train as in plain PyTorch, also tied ones on several ranks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unsplit import make_plan

from modelpar.capture.objective import Objective
from modelpar.errors import ConfigError
from modelpar.planning import partitioners
from modelpar.proof import verify
from modelpar.run.pipeline import Pipeline


class Table(nn.Module):
    """Adds rows of a table that depend on the input's first column."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return x + self.table((x[:, :1, 0].detach() * 7).long().abs() % self.table.num_embeddings)


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(x.mean(1), self.weight)


def build(tie=""):
    torch.manual_seed(0)
    table = nn.Embedding(12, 6, sparse=True)
    end = {"": nn.Identity(), "sparse": Table(nn.Embedding(12, 6, sparse=True)), "dense": nn.Identity()}[tie]
    head = Head(nn.Parameter(torch.randn(12, 6)))
    if tie == "sparse":
        end.table.weight = table.weight
    if tie == "dense":
        head.weight = table.weight
    return nn.Sequential(table, nn.Linear(6, 6), nn.Tanh(), end, head)


def sgd(named):
    return torch.optim.SGD(named, lr=0.5)


class Both(torch.optim.Optimizer):
    """SparseAdam for tables, Adam for the rest."""

    def __init__(self, named):
        tables = [pair for pair in named if pair[0].startswith("0.")]
        others = [pair for pair in named if not pair[0].startswith("0.")]
        kinds = ((torch.optim.SparseAdam, tables), (torch.optim.Adam, others))
        self.each = [kind(pairs, lr=0.05) for kind, pairs in kinds if pairs]
        super().__init__([group for each in self.each for group in each.param_groups], {})

    def step(self, closure=None):
        for each in self.each:
            each.step()


def plan_of(objective, batch, **options):
    split = partial(partitioners.manual, balance=[2, 3])
    return make_plan(objective, batch, num_microbatches=3, partitioner=split, **options)


BATCH = torch.randint(12, (7, 4), generator=torch.Generator().manual_seed(1)), torch.arange(7) % 12


def reference(model, batches, factory):
    """Trains in plain PyTorch; returns losses and norms."""
    optimizer = factory([*model.named_parameters()])
    for inputs, targets in batches:
        total = 0.0
        for x, y in zip(inputs.tensor_split(3), targets.tensor_split(3), strict=True):
            loss = F.cross_entropy(model(x), y) * len(x)
            loss.backward()
            total = total + loss.detach()
        for parameter in model.parameters():
            parameter.grad.div_(len(inputs))
        norm = torch.stack([p.grad.to_dense().norm() for p in model.parameters()]).norm()
        yield float(total / len(inputs)), float(norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("factory", [sgd, Both])
@pytest.mark.parametrize("tie", ["", "sparse", "dense"])
def test_sparse_tables_train_as_in_plain_pytorch(workers, tie, factory):
    if tie == "dense" and factory is Both:
        pytest.skip("SparseAdam takes no dense gradient, and that of such a table is dense")
    batches, plain = [BATCH] * 4, build(tie)
    expected = list(reference(plain, batches, factory))
    objective = Objective(build(tie), F.cross_entropy)
    plan = plan_of(objective, BATCH)
    with Pipeline(objective, plan, workers=workers, optimizer=factory) as pipeline:
        results = [pipeline.step(batch) for batch in batches]
        state = pipeline.state_dict()
    assert [result.loss for result in results] == [loss for loss, _ in expected]
    assert [result.grad_norm for result in results] == pytest.approx([norm for _, norm in expected], rel=1e-5)
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("tie", ["", "sparse", "dense"])
def test_sparse_tables_are_verified(workers, tie):
    objective = Objective(build(tie), F.cross_entropy)
    assert verify(objective, BATCH, plan_of(objective, BATCH), optimizer=sgd, max_norm=None, workers=workers).passed


def test_what_plain_pytorch_cannot_do_with_sparse_gradients_is_refused():
    objective = Objective(build(), F.cross_entropy)
    plan = plan_of(objective, BATCH)
    with pytest.raises(ConfigError, match=r"max_norm clips no sparse gradients.* 0.weight .*; expected max_norm=None"):
        Pipeline(objective, plan, optimizer=sgd, max_norm=1.0)
    with pytest.raises(
        ConfigError, match=r"on rank 0, for 0.weight … 1.bias: RuntimeError: Adam does not support sparse"
    ):
        Pipeline(objective, plan, optimizer=torch.optim.Adam)
    tied = Objective(build("dense"), F.cross_entropy)  # whose gradient is dense
    Pipeline(tied, plan_of(tied, BATCH), optimizer=torch.optim.Adam, max_norm=1.0)
