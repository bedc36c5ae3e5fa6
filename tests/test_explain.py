"""What explains a run: causes are planted in real runs, by large factors, and must be named with their remedy."""

import time
from functools import partial
from threading import Timer

import pytest
import torch
from torch import nn

from modelpar import Objective, Pipeline, cache, partitioners, plan, schedules
from modelpar.errors import PlanError
from modelpar.machine import Setting
from modelpar.planning.cluster import Link
from modelpar.planning.explain import explain
from modelpar.planning.schedule import ValueKey
from modelpar.planning.simulate import predict
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

    Layers that differ in nothing but how long they rest have one profile in the cache, so that one is measured anew;
    what messages cost is not.
    """
    for known in cache.folder().glob("profile-*.json"):
        known.unlink()
    setting = Setting(("cpu",) * options.get("num_ranks", 2), 2, "threads", True, False)
    cache.save("link", setting.key(), Link(latency=1e-4, send_seconds=1e-4).to_json())
    options = {"num_ranks": 2, "num_microbatches": 4, "schedule": schedules.one_f_one_b, **options}
    batch = next(batches(1, size))
    return plan(Objective(model, total), batch, num_threads=2, workers=workers, transport="threads", **options)


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


def test_a_slow_layer_in_a_full_stage_is_named(threads):
    model = nn.Sequential(*(Resting((8 if i == 4 else 1) * REST) for i in range(6)))
    p = planned(model, threads, partitioner=split(2, 4), num_microbatches=8)
    found = explain(p, timelines(model, p, threads))
    assert found.largest_loss[0] == "stage imbalance"
    assert headline(found).startswith("stage 1 is on ")
    assert found.advice[0].change in ("moving 2 from stage 1 to stage 0", "moving 2 … 3 from stage 1 to stage 0")


def test_a_slow_rank_is_told_from_a_slow_layer(threads):
    model = nn.Sequential(*(Resting(REST) for _ in range(4)))
    p = planned(model, threads, partitioner=split(2, 2), num_microbatches=8)
    for layer in list(model)[2:]:  # all that rank 1 has takes much longer than when it was profiled
        layer.seconds *= 4
    found = explain(p, timelines(model, p, threads))
    assert found.slowness[0] == 1.0
    assert headline(found).startswith(f"rank 1 is {found.slowness[1]:.1f} × as slow as the usual rank, ")
    assert sentences(found)[0].startswith("Rank 1 is ")
    assert "rank 1 being as fast as the others" in [advice.change for advice in found.advice]


def test_too_few_microbatches_are_named(threads):
    model = nn.Sequential(*(Resting(REST) for _ in range(4)))
    p = planned(model, threads, num_ranks=4, num_microbatches=2)
    found = explain(p, timelines(model, p, threads))
    assert found.largest_loss[0] == "schedule bubble"
    assert headline(found).startswith("2 micro-batches on 4 ranks leave a schedule bubble of ")
    assert "cutting batches into 4 micro-batches" in [advice.change for advice in found.advice]


def test_slow_data_is_named(threads):
    model = nn.Sequential(Resting(REST), Resting(REST))
    p = planned(model, threads)
    found = explain(p, timelines(model, p, threads, seconds=200 * REST))
    assert found.largest_loss[0] == "data"
    assert headline(found).startswith("waiting for data is ")
    assert found.advice[0].change == "having batches ready in time"


def test_a_slow_link_is_named(threads, monkeypatch):
    model = nn.Sequential(*(Resting(REST) for _ in range(3)))
    p = planned(model, threads, num_ranks=3)
    give = ThreadTransport.give

    def give_late(self, to, key, value):
        of_link = isinstance(key[1], ValueKey) and {key[1].source, key[1].target} == {0, 1}
        if of_link and key[1].kind in ("value", "grad"):
            Timer(20 * REST, give, (self, to, key, value)).start()
        else:
            give(self, to, key, value)

    monkeypatch.setattr(ThreadTransport, "give", give_late)
    found = explain(p, timelines(model, p, threads))
    assert found.largest_loss[0] == "communication"
    assert headline(found).startswith("communication is ")
    assert "a link between ranks 0 and 1 as fast as the others" in [advice.change for advice in found.advice]


def test_a_stage_alone_has_no_bubble(threads):
    model = nn.Sequential(Resting(REST), Resting(REST))
    p = planned(model, threads, num_ranks=1)
    parts = dict(explain(p, timelines(model, p, threads)).breakdown.parts)
    assert parts["schedule bubble"] == parts["stage imbalance"] == parts["communication"] == 0.0
    assert parts["useful work"] > 0.0


def test_a_step_with_fewer_microbatches_explains_nothing(threads):
    model = nn.Sequential(Resting(0.0), Resting(0.0))
    p = planned(model, threads)
    with pytest.raises(PlanError, match="none of 4 timelines holds every action of the plan"):
        explain(p, timelines(model, p, threads, size=3))


def test_a_timeline_of_another_plan_is_refused():
    objective, batch = Objective(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), total), next(batches(1, 4))
    two, three = (
        plan(objective, batch, num_ranks=ranks, num_microbatches=2, profile="flops", transport="threads")
        for ranks in (2, 3)
    )
    with pytest.raises(PlanError, match="a timeline has 3 ranks and stages up to 2; expected one of this plan, with 2"):
        explain(two, [predict(two), predict(three)])


def test_a_schedule_function_that_refuses_other_counts_costs_only_that_advice():
    def four(num_ranks, num_microbatches):
        if num_microbatches != 4:
            raise KeyError(num_microbatches)
        return schedules.gpipe(num_ranks, 4)

    objective, batch = Objective(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), total), next(batches(1, 16))
    p = plan(objective, batch, num_ranks=2, num_microbatches=4, schedule=four, profile="flops", transport="threads")
    found = explain(p, [predict(p)])
    assert found.advice
    assert not [advice for advice in found.advice if "into" in advice.change]
