"""The check before a training's first step: it finds what is planted, and leaves no trace."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layers import momentum
from torch import nn
from unsplit import assert_same, make_plan

from modelpar import LossResult, Objective
from modelpar.errors import SplitMismatch
from modelpar.run.kept import Kept
from modelpar.run.pipeline import Pipeline
from modelpar.run.stage_runner import StageRunner


class Counting(nn.Module):
    """Counts its calls, and keeps a list and a tensor: each changes what it computes."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.seen, self.sum = nn.Linear(8, 8), 0, [], torch.zeros(8)
        self.counts = False

    def forward(self, x):
        if not self.counts:
            return self.linear(x)
        self.calls += 1
        self.seen.append(float(x.detach().mean()))
        self.sum += x.detach().mean(0)
        return self.linear(x) * (1 + 0.1 * self.calls + 0.1 * sum(self.seen)) + 0.1 * self.sum


class Whole(nn.Module):
    """Tied at both ends, with dropout and batch normalisation."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.drop = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Dropout(0.3)
        self.norm, self.second, self.head = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        x = x + self.drop(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.second(self.norm(x))))


def build():
    torch.manual_seed(0)
    return Whole()


BATCH = torch.arange(12) % 11, torch.arange(12) * 3 % 11


@pytest.fixture
def threads(shared_workers):
    return shared_workers["threads"].get()


def pipeline_of(model, workers, batch=BATCH, loss=F.cross_entropy, check=True, how=None, **options):
    objective = Objective(model, loss, **(how or {}))
    plan = make_plan(objective, batch, **options)
    return Pipeline(objective, plan, workers=workers, optimizer=momentum, max_norm=1.0, check=check)


def refused(pipeline, batch=BATCH):
    """Returns what the check says, twice; nothing is trained, and no gradient stays."""
    with pipeline:
        before = pipeline.state_dict()
        with pytest.raises(SplitMismatch) as first:
            pipeline.step(batch)
        with pytest.raises(SplitMismatch) as second:
            list(pipeline.steps([batch, batch]))
        assert_same(pipeline.state_dict(), before)
        assert str(first.value) == str(second.value)
    assert "\n" not in str(first.value)
    return str(first.value)


@pytest.mark.parametrize("tied", ["exact", "fast"])
def test_a_model_that_is_split_well_passes_in_one_line(workers, tied, caplog):
    with caplog.at_level(logging.INFO, "modelpar"), pipeline_of(build(), workers, tied=tied) as pipeline:
        assert pipeline.check is None
        pipeline.step(BATCH)
        assert pipeline.check.passed
        pipeline.step(BATCH)
    line = "split = unsplit: loss and 7 gradients of the first micro-batch are equal to the bit"
    assert [record.getMessage() for record in caplog.records].count(line) == 1


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_training_is_the_same_with_and_without(workers, num_ranks):
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), nn.BatchNorm1d(8), nn.Dropout(0.3), Counting(), nn.Linear(8, 3))
    batch = torch.randn(10, 8), torch.randint(3, (10,))
    found = []
    how = {"num_ranks": num_ranks, "leaf": ["Counting"]}
    pipelines = [pipeline_of(model, workers, batch, check=check, **how) for check in (True, False)]
    model[0].counts = model[3].counts = True  # a recording that counts is refused
    for check, pipeline in zip((True, False), pipelines, strict=True):
        with pipeline:
            losses = [pipeline.step(batch).loss for _ in range(3)]
            found.append((losses, pipeline.state_dict()))
            assert (pipeline.check is not None) is check
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_the_module_and_the_generators_are_as_before(workers):
    model = build()
    grad = model.first.weight.grad = torch.ones(8, 8)
    model.norm.eval()
    before, state, number = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state(), 3
    torch.set_num_threads(number)
    try:
        with pipeline_of(model, workers) as pipeline:
            pipeline.step(BATCH)
            assert pipeline.check.passed
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(1)
    assert_same(model.state_dict(), before)
    assert model.first.weight.grad is grad
    assert torch.equal(grad, torch.ones(8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.norm.training) == (True, False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_gradient_that_is_scaled_on_its_way_back_is_found(threads, monkeypatch):
    def scaled(runner, microbatch, grads, real=StageRunner.backward):
        given = real(runner, microbatch, grads)
        return {name: [grad if grad is None else 1.5 * grad for grad in found] for name, found in given.items()}

    monkeypatch.setattr(StageRunner, "backward", scaled)
    message = refused(pipeline_of(build(), threads))
    assert message.startswith("split = unsplit: the gradient of "), message
    assert ", stage 0) differs by at most " in message
    assert "nothing was trained" in message


def test_a_gradient_that_is_lost_is_found(threads, monkeypatch):
    def without(runner, microbatch, grads, real=StageRunner.backward):
        given = real(runner, microbatch, grads)
        return {name: [None for _ in found] for name, found in given.items()}

    monkeypatch.setattr(StageRunner, "backward", without)
    assert "is on one side only: only the unsplit model has one" in refused(pipeline_of(build(), threads))


def test_a_tied_gradient_that_is_lost_is_found(threads, monkeypatch):
    monkeypatch.setattr(StageRunner, "take_grad", lambda runner, name: [None])
    message = refused(pipeline_of(build(), threads))
    assert message.startswith(
        "split = unsplit: the gradient of embed.weight (layer embed, stage 0) differs by at most "
    )
    assert "in all" not in message


def test_other_random_numbers_are_found(threads, monkeypatch):
    def other(runner, microbatch, values, context, real=StageRunner.forward):
        return real(runner, microbatch, values, context._replace(first=1))

    monkeypatch.setattr(StageRunner, "forward", other)
    assert "differ in all" in refused(pipeline_of(build(), threads))


def test_a_draw_without_a_key_is_found(threads, monkeypatch):
    def without(runner, microbatch, values, context, real=StageRunner.forward):
        for number, replay in runner._replays.items():
            replay.routine = replace(replay.routine, draws=frozenset())
            runner._recomputes[number] = False  # as threads do that cannot see it
        return real(runner, microbatch, values, context)

    monkeypatch.setattr(StageRunner, "forward", without)
    with pipeline_of(build(), threads) as pipeline, pytest.raises(SplitMismatch, match=r"differs? by at most"):
        pipeline.step(BATCH)


def test_a_routine_that_leaves_something_out_is_found(threads, monkeypatch):
    from modelpar.run import variants

    def shorter(*arguments, real=variants.cut_routine):
        routine = real(*arguments)
        steps = [
            replace(s, node=replace(s.node, target=torch.sin)) if s.node.name == "tanh" else s for s in routine.steps
        ]
        return replace(routine, steps=tuple(steps))

    monkeypatch.setattr(variants, "cut_routine", shorter)
    message = refused(pipeline_of(build(), threads))
    assert "the gradient of embed.weight" in message or "the gradient of second" in message


def test_the_loss_is_compared(threads, monkeypatch):
    from modelpar.run import stage_runner

    def more(*arguments, real=stage_runner.loss_of):
        found = real(*arguments)
        return found._replace(total=found.total + 1)

    monkeypatch.setattr(stage_runner, "loss_of", more)
    assert refused(pipeline_of(build(), threads)).startswith("split = unsplit: the loss of the first micro-batch is ")


@pytest.mark.parametrize("change", ["loaded", "trained", "written"])
def test_it_compares_with_the_weights_that_the_ranks_have(threads, change):
    model = build()
    with pipeline_of(model, threads) as pipeline:
        if change == "loaded":
            pipeline.load_state_dict({n: v * 2 if v.is_floating_point() else v for n, v in model.state_dict().items()})
        elif change == "trained":
            torch.optim.SGD(model.parameters(), lr=1.0)
            F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            optimizer.step()
        else:
            with torch.no_grad():
                model.second.weight.zero_()
        before = {n: v.clone() for n, v in model.state_dict().items()}
        pointers = [p.data_ptr() for p in model.parameters()]
        pipeline.step(BATCH)
        assert pipeline.check.passed
    assert_same(model.state_dict(), before)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_a_factory_is_compared_too_and_a_deferred_model_is_not(threads):
    with pipeline_of(build, threads) as pipeline:
        pipeline.step(BATCH)
        assert pipeline.check.passed
    with pipeline_of(Whole, threads, how={"init": "meta"}) as pipeline:
        pipeline.step(BATCH)
        assert (pipeline.check.passed, pipeline.check.compared) == (False, False)
        assert "no process holds the whole model" in pipeline.check.detail


CALLS = itertools.count()


class Whim(nn.Module):
    """Computes something else in every call, once it may."""

    may = False

    def forward(self, x):
        return x * (1 + 0.1 * next(CALLS) % 1) if self.may else x * 1


def test_a_model_that_does_not_equal_itself_is_not_compared(threads):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Whim(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(10, 8), torch.randint(3, (10,))
    pipeline = pipeline_of(model, threads, batch)
    model[1].may = True
    with pipeline:
        pipeline.step(batch)
        assert not pipeline.check.compared
        assert "does not equal itself in two runs" in pipeline.check.detail


def counting_nothing(output, targets):
    return LossResult(output.sum() * 0, int(targets[0] > 0))


def test_a_micro_batch_that_counts_nothing_has_no_gradients_on_either_side(threads):
    with pipeline_of(build(), threads, loss=counting_nothing) as pipeline:
        pipeline.step(BATCH)
        assert pipeline.check.detail.startswith("loss and 0 gradients")


def test_what_is_kept_comes_back():
    model = nn.Sequential(Counting(), nn.BatchNorm1d(8))
    model[0].counts = True
    model[0].table, model[0].names, kept_sum = {"a": 1}, {"x"}, model[0].sum
    kept, buffer = Kept(model), model[1].running_mean
    version = model[1].running_var._version
    model(torch.randn(4, 8))
    model[0].table["b"], model[0].more = 2, 3
    model[0].names.add("y")
    model[1].running_mean = torch.ones(8)
    model[1].running_var.copy_(torch.ones(8) * 7)
    kept.restore()
    assert model[1].running_mean is buffer
    assert torch.equal(buffer, torch.zeros(8))
    assert torch.equal(model[1].running_var, torch.ones(8))
    assert (model[0].calls, model[0].seen, model[0].table, model[0].names) == (0, [], {"a": 1}, {"x"})
    assert model[0].sum is kept_sum
    assert torch.equal(kept_sum, torch.zeros(8))
    assert not hasattr(model[0], "more")
    kept.restore()
    assert model[1].running_var._version >= version
