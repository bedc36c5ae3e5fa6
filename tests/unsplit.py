"""Compares a pipeline with the unsplit model, to the bit."""

import copy

import torch
from layers import Nest, momentum
from reference import train
from torch import nn

from modelpar.capture.objective import Objective
from modelpar.planner import plan
from modelpar.planning import partitioners, schedules
from modelpar.run.pipeline import Pipeline


def make_plan(objective, batch, num_ranks=2, num_microbatches=4, **options):
    """Plans without measuring, for one thread per rank, with gradients of tied tensors added as autograd does."""
    settings = {"num_threads": 1, "profile": "flops", "tied": "exact", "partitioner": partitioners.uniform}
    settings |= {"schedule": schedules.one_f_one_b, **options}
    if isinstance(objective.model, nn.Module) and any(isinstance(module, Nest) for module in objective.model.modules()):
        settings.setdefault("leaf", ["Nest"])  # whose code does, on some batches, what must not be tried
    return plan(objective, batch, num_ranks=num_ranks, num_microbatches=num_microbatches, **settings)


def draws(plan):
    """Returns the modules that draw random numbers, as the capture found them."""
    return list(dict.fromkeys(name for layer in plan.graph.layers for name in layer.draws))


def assert_same(found, expected):
    """Compares two state dicts: keys, their order, and every bit."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), f"{name} differs"


def check_equal(workers, model, loss, batches, *, optimizer=momentum, max_norm=None, lr_schedule=None, seed=0, **how):
    """Trains split and unsplit; every loss, norm, weight and buffer is the same to the bit. Returns the plan.

    The unsplit model trains on the device of the last rank.
    """
    before = copy.deepcopy(model.state_dict())
    objective = Objective(model, loss)
    decided = make_plan(objective, batches[0], **how)
    training = {"max_norm": max_norm, "lr_schedule": lr_schedule, "seed": seed}
    with Pipeline(objective, decided, workers=workers, optimizer=optimizer, **training) as pipeline:
        results = [pipeline.step(batch) for batch in batches]
        state = pipeline.state_dict()
    assert_same(model.state_dict(), before)  # the user's module is never changed
    microbatches = how.get("num_microbatches", 4)
    device = decided.cluster.devices[-1]
    model.to(device)
    moved = [(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    expected = train(model, loss, optimizer, moved, num_microbatches=microbatches, draws=draws(decided), **training)
    for step, (result, (value, norm, _)) in enumerate(zip(results, expected, strict=True)):
        assert (result.step, result.loss, result.grad_norm) == (step, value, norm)
        assert result.count == len(batches[step][0])
    assert_same(state, model.cpu().state_dict())
    assert any(not torch.equal(state[name], before[name]) for name in state)
    return decided
