"""What explains a run: causes are planted in real runs, and must be named together with their remedy."""

import time
from functools import partial
from threading import Timer

import pytest
import torch
from torch import nn

from modelpar import Objective, Pipeline, cache, partitioners, plan, schedules
from modelpar.errors import PlanError
from modelpar.planning.explain import explain
from modelpar.planning.schedule import ValueKey
from modelpar.planning.simulate import predict
from modelpar.planning.steadiness import StepTime, drift, stragglers
from modelpar.report.explanation import headline, sentences
from modelpar.run.transport import ThreadTransport

REST = 4e-3
"""Long enough that a busy machine is not what the tests see."""


class Rest(torch.autograd.Function):
    """Hands on what it gets, after a while; so it does backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad.clone(), None


class Resting(nn.Module):
    """A layer that takes so many seconds per sample, forward and backward, and no core: it is as slow as it says."""

    def __init__(self, seconds, width=4):
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return Rest.apply(x * self.weight, self.seconds * len(x))


def total(output, target):
    return output.sum(-1).mean()


def batches(number, size, seconds=0.0):
    for _ in range(number):
        time.sleep(seconds)
        yield torch.ones(size, 4), torch.zeros(size)


def planned(model, workers, size=8, **options):
    """A plan whose profile counts seconds on the clock, which it does for ranks with several threads.

    Layers that differ in nothing but how long they rest have one profile in the cache, so that one is measured anew.
    """
    for known in cache.folder().glob("profile-*.json"):
        known.unlink()
    options = {"num_ranks": 2, "num_microbatches": 4, "schedule": schedules.one_f_one_b, **options}
    batch = next(batches(1, size))
    return plan(Objective(model, total), batch, num_threads=2, workers=workers, **options)


def timelines(model, p, workers, size=8, steps=4, seconds=0.0):
    """The timelines of a few settled steps."""
    optimizer = partial(torch.optim.SGD, lr=1e-6)
    with Pipeline(Objective(model, total), p, workers=workers, optimizer=optimizer) as pipeline:
        results = list(pipeline.steps(batches(2 + steps, size, seconds)))
    return [result.timeline for result in results[2:]]


@pytest.fixture
def threads(shared_workers):
    return shared_workers["threads"].get()


def split(*balance):
    return partial(partitioners.manual, balance=balance)


def test_a_slow_layer_in_a_full_stage_is_moved(threads):
    model = nn.Sequential(*(Resting((4 if i == 4 else 1) * REST) for i in range(6)))
    p = planned(model, threads, partitioner=split(3, 3), num_microbatches=8)
    found = explain(p, timelines(model, p, threads))
    assert found.largest_loss[0] == "stage imbalance"
    assert headline(found).startswith("stage 1 is on ")
    best = found.advice[0]
    assert best.change == "moving 3 from stage 1 to stage 0"
    assert best.options == "partition=manual partition.balance=[4,2]"
    moved = planned(model, threads, partitioner=split(4, 2), num_microbatches=8)
    faster = explain(moved, timelines(model, moved, threads))
    assert 1 - faster.makespan / found.makespan == pytest.approx(best.gain, abs=0.06)  # it is true
    assert all("moving 3 " not in advice.change for advice in faster.advice)


def test_a_slow_rank_is_told_from_a_slow_layer(threads):
    model = nn.Sequential(*(Resting(REST) for _ in range(4)))
    p = planned(model, threads, partitioner=split(2, 2))
    for layer in list(model)[2:]:  # all that rank 1 has takes twice as long as when it was profiled
        layer.seconds *= 2
    found = explain(p, timelines(model, p, threads))
    assert found.slowness[0] == 1.0
    assert found.slowness[1] == pytest.approx(2.0, rel=0.15)
    assert headline(found).startswith(f"rank 1 is {found.slowness[1]:.1f} × as slow as the usual rank, ")
    assert sentences(found)[0].startswith("Rank 1 is ")
    assert "rank 1 being as fast as the others" in [advice.change for advice in found.advice]


def test_too_few_microbatches_are_doubled(threads):
    model = nn.Sequential(*(Resting(REST) for _ in range(4)))
    p = planned(model, threads, num_ranks=4, num_microbatches=2)
    found = explain(p, timelines(model, p, threads))
    assert found.largest_loss[0] == "schedule bubble"
    assert found.breakdown.bubble / found.breakdown.useful == pytest.approx(3 / 2, abs=0.2)  # (p − 1) / m
    assert headline(found).startswith("2 micro-batches on 4 ranks leave a schedule bubble of ")
    assert found.advice[0].change == "cutting batches into 4 micro-batches"
    doubled = planned(model, threads, num_ranks=4, num_microbatches=4)
    faster = explain(doubled, timelines(model, doubled, threads))
    assert 1 - faster.makespan / found.makespan == pytest.approx(found.advice[0].gain, abs=0.08)


def test_a_microbatch_of_one_sample_is_not_cut(threads):
    model = nn.Sequential(*(Resting(REST) for _ in range(4)))
    p = planned(model, threads, num_ranks=4, num_microbatches=2, size=2)
    found = explain(p, timelines(model, p, threads, size=2))
    assert found.advice[0].change == "doubling the batch to 4 samples in 4 micro-batches"
    assert found.advice[0].gain == pytest.approx(1 - 7 / (2 * 5), abs=0.08)  # per sample


def test_slow_data_is_named(threads):
    model = nn.Sequential(Resting(REST), Resting(REST))
    p = planned(model, threads)
    found = explain(p, timelines(model, p, threads, seconds=60 * REST))
    assert found.largest_loss[0] == "data"
    assert headline(found).startswith("waiting for data is ")
    assert found.advice[0].change == "having batches ready in time"
    assert found.advice[0].gain == pytest.approx(found.largest_loss[1], abs=0.1)


def test_a_slow_link_is_named(threads, monkeypatch):
    model = nn.Sequential(*(Resting(REST) for _ in range(4)))
    p = planned(model, threads)
    give = ThreadTransport.give

    def give_late(self, to, key, value):
        between_ranks = isinstance(key[1], ValueKey) and key[1].kind in ("value", "grad") and key[1].source >= 0
        if between_ranks:
            Timer(5 * REST, give, (self, to, key, value)).start()
        else:
            give(self, to, key, value)

    monkeypatch.setattr(ThreadTransport, "give", give_late)
    found = explain(p, timelines(model, p, threads))
    assert found.largest_loss[0] == "communication"
    assert headline(found).startswith("communication is ")
    best = next(advice for advice in found.advice if advice.change == "a link that costs nothing")
    monkeypatch.undo()
    faster = explain(p, timelines(model, p, threads))
    assert 1 - faster.makespan / found.makespan == pytest.approx(best.gain, abs=0.1)


def test_a_plan_is_explained_before_it_runs(threads):
    model = nn.Sequential(*(Resting((4 if i == 4 else 1) * REST) for i in range(6)))
    p = planned(model, threads, partitioner=split(3, 3))
    found = explain(p, [predict(p)])
    assert found.advice[0].change == "moving 3 from stage 1 to stage 0"
    assert found.error == pytest.approx(0.0, abs=0.02)  # nothing happened but what the simulation knows


def test_a_stage_alone_has_no_bubble(threads):
    model = nn.Sequential(Resting(REST), Resting(REST))
    p = planned(model, threads, num_ranks=1)
    found = explain(p, timelines(model, p, threads))
    parts = dict(found.breakdown.parts)
    assert parts["schedule bubble"] == parts["stage imbalance"] == parts["communication"] == 0.0
    assert parts["useful work"] > 0.8 * found.makespan


def test_a_step_with_fewer_microbatches_explains_nothing(threads):
    model = nn.Sequential(Resting(0.0), Resting(0.0))
    p = planned(model, threads)
    with pytest.raises(PlanError, match="none of 4 timelines holds every action of the plan"):
        explain(p, timelines(model, p, threads, size=3))


def test_stragglers_are_found_with_the_rank_that_caused_them():
    steps = [StepTime(i, 0.1 + 0.001 * (i % 3), (0.08, 0.08)) for i in range(20)]
    steps[7] = StepTime(7, 0.3, (0.08, 0.27))
    steps[12] = StepTime(12, 0.25, (0.08, 0.08))
    assert [(s.step, round(s.times, 1), s.rank) for s in stragglers(steps)] == [(7, 3.0, 1), (12, 2.5, -1)]
    assert stragglers(steps[:7]) == ()


def test_drift_is_found_and_chance_is_not():
    steady = [0.1 + 0.01 * ((7 * i) % 5) for i in range(40)]
    assert drift(steady) == 0.0
    assert drift([seconds * (1 + i / 100) for i, seconds in enumerate(steady)]) == pytest.approx(0.29, abs=0.03)
    assert drift([0.1] * 5 + [0.2] * 5) == 0.0  # too few
