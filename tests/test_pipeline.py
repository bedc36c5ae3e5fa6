"""What users do with a Pipeline besides single steps: streams of steps, evaluation, prediction, state, other plans."""

import copy
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from layers import Counter as Calls
from layers import Many, Trip, adamw, momentum, to_nan
from torch import nn
from unsplit import assert_same, make_plan

from modelpar.capture.objective import LossResult, Objective
from modelpar.errors import ConfigError, NonFiniteLoss, PlanMismatch, RunError
from modelpar.models import convnet, gpt, mlp
from modelpar.planning import partitioners, schedules
from modelpar.planning.graph import BATCH
from modelpar.planning.schedule import Action, Op, gives
from modelpar.planning.timeline import COMPUTE
from modelpar.run import pipeline as pipeline_module
from modelpar.run import workers as workers_module
from modelpar.run.launch import threads
from modelpar.run.pipeline import Pipeline
from modelpar.run.transport import CONTROLLER, ThreadTransport
from modelpar.run.workers import Workers

BUILD = {
    "gpt": partial(gpt.build, vocab_size=32, context=8, width=16, depth=2, heads=2),
    "mlp": partial(mlp.build, input_shape=(6,), width=16, depth=2, dropout=0.3),
    "convnet": partial(convnet.build, input_shape=(3, 8, 8), width=4, depth=3),
}


def task(name, size=8):
    torch.manual_seed(1)
    model, (inputs, targets), loss = BUILD[name]()
    rows = torch.arange(size) % len(inputs)
    return Objective(model, loss), (inputs[rows], targets[rows])


def rows(batch, *indices):
    return [(batch[0][i : i + n], batch[1][i : i + n]) for i, n in indices]


def test_a_stream_of_steps_gives_what_single_steps_give(workers):
    objective, batch = task("mlp")
    batches = rows(batch, (0, 8), (0, 5), (2, 4), (3, 1))
    plan = make_plan(objective, batch, num_ranks=3)

    def train(run):
        with Pipeline(objective, plan, workers=workers, optimizer=adamw, max_norm=0.3) as pipeline:
            found = [(r.step, r.loss, r.count, r.grad_norm, r.lr) for r in run(pipeline)]
            return found, pipeline.state_dict()

    single, state = train(lambda pipeline: (pipeline.step(batch) for batch in batches))
    stream, other = train(lambda pipeline: pipeline.steps(iter(batches)))
    assert stream == single
    assert [step[0] for step in stream] == [0, 1, 2, 3]
    assert_same(other, state)


def test_leaving_a_stream_early_loses_no_step(workers):
    objective, batch = task("mlp")
    plan = make_plan(objective, batch)
    with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
        wanted = [pipeline.step(batch).loss for _ in range(3)]
        state = pipeline.state_dict()
    with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
        result = next(pipeline.steps([batch, batch]))
        last = pipeline.step(batch)  # the second step of the stream was under way
        assert (result.loss, last.loss, last.step) == (wanted[0], wanted[2], 2)
        assert_same(pipeline.state_dict(), state)


def test_freed_memory_goes_back_after_each_recording(workers, monkeypatch):
    """Small records kept between large values would hold it: 1.2 GB after 250 lengths."""
    returned = []
    monkeypatch.setattr(pipeline_module, "return_freed_memory", lambda: returned.append(1))

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)).mean(1))

    objective, batch = Objective(Tagger(), F.cross_entropy), (torch.arange(64).view(8, 8) % 9, torch.arange(8) % 3)
    with Pipeline(objective, make_plan(objective, batch), workers=workers, optimizer=adamw) as pipeline:
        for length in (8, 5, 5, 8, 3):
            pipeline.step((batch[0][:, :length], batch[1]))
    assert len(returned) == 3


def test_the_iterator_of_a_stream_may_fail(workers):
    objective, batch = task("mlp")

    def broken():
        yield batch
        raise OSError("the disk is gone")

    with Pipeline(objective, make_plan(objective, batch), workers=workers, optimizer=adamw) as pipeline:
        with pytest.raises(OSError, match="the disk is gone"):
            list(pipeline.steps(broken()))
        assert pipeline.step(batch).step == 1


@pytest.mark.parametrize("name", BUILD)
def test_evaluation_equals_the_unsplit_model_and_leaves_training_alone(workers, name):
    objective, batch = task(name)
    batches = rows(batch, (0, 8), (1, 5), (2, 1))
    plan = make_plan(objective, batch, num_ranks=3)

    def train(between):
        with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
            losses = []
            for _ in range(3):
                losses.append(pipeline.step(batch).loss)
                between(pipeline)
            return losses, pipeline.state_dict()

    def look(pipeline):
        evaluated.append(pipeline.evaluate(batches))
        predicted.append(pipeline.predict(batch[0][:7]))
        states.append(pipeline.state_dict())

    evaluated, predicted, states = [], [], []
    losses, state = train(lambda pipeline: None)
    others, other = train(look)
    assert losses == others
    assert_same(other, state)

    model = copy.deepcopy(objective.model)
    for found, output, weights in zip(evaluated, predicted, states, strict=True):
        model.load_state_dict(weights)
        model.eval()
        total = count = 0.0
        with torch.no_grad():
            for inputs, targets in batches:
                cuts = min(4, len(inputs))
                pairs = zip(inputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
                parts = [objective.loss(model(x), y) * len(x) for x, y in pairs]
                total += sum(parts[1:], parts[0]).item()
                count += len(inputs)
            assert (found.loss, found.count) == (total / count, count)
            assert torch.equal(output, torch.cat([model(x) for x in batch[0][:7].tensor_split(4)]))
        assert not output.requires_grad


def test_evaluation_and_prediction_need_no_optimizer(workers):
    objective, batch = task("mlp")
    with Pipeline(objective, make_plan(objective, batch), workers=workers) as pipeline:
        assert pipeline.evaluate([batch]).count == 8
        assert pipeline.predict(batch[0][:3]).shape == (3, 10)
        with pytest.raises(ConfigError, match="this pipeline has no optimizer; expected Pipeline"):
            pipeline.step(batch)
        with pytest.raises(ConfigError, match="evaluate got no samples; expected at least one batch"):
            pipeline.evaluate([])


def test_evaluation_weights_metrics_by_what_the_loss_counts(workers):
    def loss(output, targets):
        keep = targets >= 0
        hits = ((output.argmax(1) == targets) & keep).sum().item()
        losses = F.cross_entropy(output, targets.clamp(min=0), reduction="none")
        return LossResult((losses * keep).sum(), int(keep.sum()), {"accuracy": hits / max(1, int(keep.sum()))})

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    inputs, targets = torch.randn(8, 4), torch.tensor([0, -1, 1, 2, -1, -1, 1, 0])
    objective = Objective(model, loss)
    plan = make_plan(objective, (inputs, targets))
    with Pipeline(objective, plan, workers=workers) as pipeline:
        found = pipeline.evaluate([(inputs, targets), (inputs[:1], targets[:1])])
    with torch.no_grad():
        right = (model(inputs).argmax(1) == targets).float()
    assert found.count == 6
    assert found.metrics == {"accuracy": pytest.approx((right.sum() + right[0]).item() / 6)}


def test_prediction_joins_every_tensor_of_a_pytree(workers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Many(8))
    inputs = torch.randn(7, 4)
    objective = Objective(model, lambda output, _: output["both"][0].mean())
    with Pipeline(objective, make_plan(objective, (inputs, inputs)), workers=workers) as pipeline:
        found = pipeline.predict(inputs)
    expected = [model(x) for x in inputs.tensor_split(4)]
    assert torch.equal(found["both"][0], torch.cat([part["both"][0] for part in expected]))
    assert torch.equal(found["both"][1], torch.cat([part["both"][1] for part in expected]))
    assert torch.equal(found["rank"], torch.cat([part["rank"] for part in expected]))
    assert (found["none"], found["factor"], found["name"]) == (None, 3, "tanh")


@pytest.mark.parametrize("name", BUILD)
def test_the_state_is_that_of_the_unsplit_model(workers, name):
    objective, batch = task(name)
    plan = make_plan(objective, batch, num_ranks=3)
    other, _ = task(name)
    with torch.no_grad():
        for tensor in other.model.state_dict().values():
            tensor.add_(1)
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        state = pipeline.state_dict()
        assert_same(state, objective.model.state_dict())
        if name == "gpt":
            assert state["embed.token.weight"] is state["head.token.weight"]
        pipeline.load_state_dict(other.model.state_dict())
        assert_same(pipeline.state_dict(), other.model.state_dict())
        pipeline.load_state_dict(state)
        first = pipeline.step(batch).loss
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        assert pipeline.step(batch).loss == first


def test_a_state_that_does_not_fit_is_refused_and_nothing_happens(workers):
    objective, batch = task("mlp")
    with Pipeline(objective, make_plan(objective, batch), workers=workers) as pipeline:
        state = pipeline.state_dict()
        wrong = {name: value for name, value in state.items() if name != "b0.norm.bias"} | {"extra": torch.zeros(1)}
        with pytest.raises(ConfigError, match=r"missing \['b0.norm.bias'\], unknown \['extra'\]"):
            pipeline.load_state_dict(wrong)
        with pytest.raises(ConfigError, match=r"b0.norm.bias has shape \[3\]; expected \[16\]"):
            pipeline.load_state_dict(state | {"b0.norm.bias": torch.zeros(3)})
        assert_same(pipeline.state_dict(), state)


def test_the_timeline_of_a_step_has_every_action_once_and_no_overlap(workers):
    objective, batch = task("mlp")
    plan = make_plan(objective, batch, num_ranks=3)
    with Pipeline(objective, plan, workers=workers, optimizer=adamw, max_norm=1.0) as pipeline:
        results = list(pipeline.steps([batch, batch, batch]))
    for result in results:
        timeline = result.timeline
        assert timeline.num_ranks == 3
        for rank in range(3):
            spans = sorted(timeline.of_rank(rank), key=lambda span: span.start)
            done = [Action(span.stage, Op(span.kind), span.microbatch) for span in spans if span.kind in COMPUTE]
            assert done == list(plan.schedule.actions(rank))
            assert {"optimizer", "reduce"} <= {span.kind for span in spans}
            assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans) if a.kind != "data")
        assert len(result.peak_bytes) == 3
        assert result.lr == 1e-2


def counted(monkeypatch, sent):
    """Makes thread transports note what they send."""

    class Counting(ThreadTransport):
        def send(self, to, key, value):
            sent.append((to, key))
            super().send(to, key, value)

    monkeypatch.setattr(threads, "ThreadTransport", Counting)


@pytest.mark.parametrize("tied", ["exact", "fast"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_sends_what_gives_says_and_nothing_else(monkeypatch, tied, max_norm):
    sent = []
    counted(monkeypatch, sent)
    objective, batch = task("gpt")
    plan = make_plan(objective, batch, num_ranks=3, tied=tied)
    with (
        Workers(3, transport="threads") as workers,
        Pipeline(objective, plan, workers=workers, optimizer=adamw, max_norm=max_norm) as pipeline,
    ):
        pipeline.step(batch)
        sent.clear()
        pipeline.step(batch)
        messages = list(sent)
    graph = replace(plan.stage_graph, clips=max_norm is not None)
    actions = [action for rank in range(3) for action in plan.schedule.actions(rank)]
    actions += [Action(stage, Op.UPDATE) for stage in range(3)]
    expected = Counter(key for action in actions for key in gives(graph, action))
    values = Counter(key[1] for _, key in messages if len(key) == 2 and hasattr(key[1], "microbatch"))
    fed = {key: n for key, n in values.items() if key.source == BATCH}
    assert values - Counter(fed) == expected
    assert set(expected.values()) == set(fed.values()) == {1}
    assert len(fed) == 2 * 4  # inputs to the first stage, targets to the last
    others = Counter(key[0] for _, key in messages if key[0] in ("command", "reply"))
    assert others == {"command": 3, "reply": 3}
    assert len(messages) == sum(expected.values()) + 8 + 6
    assert {to for to, key in messages if key[0] == "reply"} == {CONTROLLER}


def test_one_set_of_workers_serves_one_pipeline_after_another_and_several_at_once(workers):
    objective, batch = task("mlp")
    other, other_batch = task("gpt")
    one, two = make_plan(objective, batch, num_ranks=2), make_plan(other, other_batch, num_ranks=4)
    with Pipeline(objective, one, workers=workers, optimizer=adamw) as alone:
        expected = [alone.step(batch).loss for _ in range(2)]
    with (
        Pipeline(objective, one, workers=workers, optimizer=adamw) as first,
        Pipeline(other, two, workers=workers, optimizer=adamw) as second,
    ):
        found = [first.step(batch).loss]
        second.step(other_batch)
        found.append(first.step(batch).loss)
    assert found == expected


def test_an_error_of_the_user_inside_the_block_leaves_given_workers_usable(workers):
    objective, batch = task("mlp")
    plan = make_plan(objective, batch)
    with (
        pytest.raises(KeyError, match="mine"),
        Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline,
    ):
        raise KeyError("mine", pipeline.step(batch))
    with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
        assert pipeline.step(batch).step == 0


def test_a_loss_that_is_not_finite_stops_before_the_weights(workers):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8), Calls(), nn.BatchNorm1d(8)),
        nn.Linear(8, 3),
    )
    good = (torch.randn(8, 6), torch.randint(3, (8,)))
    bad = (good[0].clone(), good[1])
    bad[0][5] = torch.inf  # in the third of four micro-batches
    objective = Objective(model, F.cross_entropy)
    split = partial(partitioners.manual, balance=[1, 1, 2])
    plan = make_plan(objective, good, num_ranks=3, partitioner=split, leaf=["2"])
    with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
        expected = [pipeline.step(good).loss for _ in range(2)]
        state = pipeline.state_dict()
        with pytest.raises(NonFiniteLoss) as caught:
            list(pipeline.steps([bad, good, good]))  # the second one was under way
        message = str(caught.value)
        assert message.startswith("step 2: the loss of micro-batch 2 is not finite; ")
        assert "the first to go wrong is 0 on stage 0" in message
        assert_same(pipeline.state_dict(), state)  # weights and buffers
        assert pipeline.step(good).step == 3  # training may go on
    assert expected[0] != expected[1]


def test_the_layer_that_went_wrong_first_is_named(workers):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6, bias=False), Trip(to_nan), nn.BatchNorm1d(6))
    model = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 3))
    good = (torch.randn(8, 6), torch.randint(3, (8,)))
    bad = (good[0].clone(), good[1])
    bad[0][4] = 1e9
    objective = Objective(model, F.cross_entropy)
    plan = make_plan(objective, good, num_ranks=3)
    with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
        before = pipeline.state_dict()
        with pytest.raises(
            NonFiniteLoss, match=r"step 0: .* micro-batch 2 is not finite; the first to go wrong is 1\.1 on stage 1\."
        ):
            pipeline.step(bad)
        assert_same(pipeline.state_dict(), before)


def test_a_step_that_nobody_collected_and_that_went_wrong_is_reported_by_the_next_one(workers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    good = (torch.randn(8, 6), torch.randint(3, (8,)))
    bad = (good[0].clone(), good[1])
    bad[0][7] = torch.nan
    objective = Objective(model, F.cross_entropy)
    with Pipeline(objective, make_plan(objective, good), workers=workers, optimizer=adamw) as pipeline:
        next(pipeline.steps([good, bad]))
        with pytest.raises(NonFiniteLoss, match="step 1: the loss of micro-batch 3 is not finite"):
            pipeline.step(good)
        assert pipeline.step(good).step == 2


def test_a_loss_function_that_goes_wrong_is_named(workers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    batch = (torch.randn(8, 6), torch.randn(8, 3))
    objective = Objective(model, lambda output, y: (output - y).mean() / y[0, 0].clamp(min=0, max=0))
    message = r"micro-batch 0 .* the first to go wrong is the loss on stage 1\."
    with (
        Pipeline(objective, make_plan(objective, batch), workers=workers, optimizer=adamw) as pipeline,
        pytest.raises(NonFiniteLoss, match=message),
    ):
        pipeline.step(batch)


def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(monkeypatch):
    monkeypatch.setattr(workers_module, "ProcessLaunch", None)  # starting a process would be a TypeError
    objective, batch = task("mlp")
    good = make_plan(objective, batch)
    other, other_batch = task("gpt")
    lbfgs = lambda parameters: torch.optim.LBFGS([p for _, p in parameters])  # noqa: E731
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau

    def run(objective=objective, plan=good, **options):
        with Pipeline(objective, plan, **{"optimizer": adamw, **options}):
            raise AssertionError

    refused = {
        r"the batch is empty: inputs have shape \[0, 6\]": lambda: make_plan(objective, (batch[0][:0], batch[1][:0])),
        "99 stages, but the model has": lambda: make_plan(objective, batch, num_ranks=99),
        "num_ranks is 0 and num_microbatches 4; expected at least 1": lambda: make_plan(objective, batch, num_ranks=0),
        "num_microbatches 0; expected": lambda: make_plan(objective, batch, num_microbatches=0),
        "num_threads is 0": lambda: make_plan(objective, batch, num_threads=0),
        "profile is 'guess'; expected": lambda: make_plan(objective, batch, profile="guess"),
        "tied is 'maybe'; expected": lambda: make_plan(objective, batch, tied="maybe"),
        "3 devices .* for 2 ranks": lambda: make_plan(objective, batch, devices=["cpu"] * 3),
        "device 'abacus' cannot be used": lambda: make_plan(objective, batch, devices=["cpu", "abacus"]),
        "num_ranks is 0": lambda: Workers(0),
        "transport is 'pigeon'; expected one of rpc, threads": lambda: Workers(2, transport="pigeon"),
        "heartbeat_timeout is 0": lambda: Workers(2, heartbeat_timeout=0),
        "step_timeout -1": lambda: Workers(2, step_timeout=-1),
        "LBFGS mixes the parameters of all stages": lambda: run(optimizer=lbfgs),
        "ReduceLROnPlateau needs a metric": lambda: run(lr_schedule=plateau),
        "max_norm is 0; expected a number above 0": lambda: run(max_norm=0),
        "max_norm is -1": lambda: run(max_norm=-1),
        "max_norm is nan": lambda: run(max_norm=float("nan")),
        r"returned int; expected a torch.optim.Optimizer": lambda: run(optimizer=lambda parameters: 3),
        "the plan has 2 ranks, the workers 1": lambda: run(workers=Workers(1)),
        "made for another model: embed is gone, .* stem is new": lambda: run(plan=make_plan(other, other_batch)),
    }
    for message, attempt in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            attempt()
        assert type(caught.value).__module__ == "modelpar.errors"
        assert "\n" not in str(caught.value)
    changed = Objective(mlp.build(input_shape=(6,), width=32, depth=2)[0], objective.loss)
    with pytest.raises(PlanMismatch, match="stem changed, b0 changed, b1 changed, head changed"):
        run(objective=changed)


def test_a_wrong_batch_is_refused_and_training_goes_on(workers):
    objective, (inputs, targets) = task("mlp")
    plan = make_plan(objective, (inputs, targets))
    with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
        for batch, message in (
            (inputs, "the batch is a Tensor; expected a pair"),
            ((inputs, targets, targets), "the batch is a tuple of 3; expected a pair"),
            ((inputs[:0], targets[:0]), "the batch is empty: inputs have shape"),
            ((3, targets), "the batch has no tensor with dimension 0 to cut"),
        ):
            with pytest.raises(ConfigError, match=message):
                pipeline.step(batch)
        assert pipeline.step((inputs, targets)).step == 0


def test_a_pipeline_outside_its_block_says_so():
    objective, batch = task("mlp")
    pipeline = Pipeline(objective, make_plan(objective, batch), optimizer=adamw)
    for use in (lambda: pipeline.step(batch), pipeline.state_dict, lambda: pipeline.predict(batch[0])):
        with pytest.raises(RunError, match=r"the pipeline does not run; expected to be used inside `with Pipeline"):
            use()
    with Workers(2, transport="threads") as workers:
        pass
    for enter in (lambda: workers.give(0, ("x",), None), workers.__enter__):
        with pytest.raises(RunError, match="expected"):
            enter()


def test_an_explicit_order_cannot_run_a_shorter_batch():
    objective, batch = task("mlp")
    plan = replace(make_plan(objective, batch), generator=None)
    with (
        Workers(2, transport="threads") as workers,
        pytest.raises(RunError, match="holds only an explicit order for 4"),
        Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline,
    ):
        list(pipeline.steps([batch, (batch[0][:3], batch[1][:3])]))


def test_gpipe_and_1f1b_hold_as_many_microbatches_as_they_say(workers):
    objective, batch = task("mlp")
    for schedule in (schedules.gpipe, schedules.one_f_one_b):
        plan = make_plan(objective, batch, num_ranks=3, num_microbatches=8, schedule=schedule)
        with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
            timeline = pipeline.step(batch).timeline
        for rank, most in enumerate(plan.schedule.peak_microbatches()):
            alive = peak = 0
            for span in sorted(timeline.of_rank(rank), key=lambda span: span.start):
                alive += {"F": 1, "B": -1}.get(span.kind, 0)
                peak = max(peak, alive)
            assert peak == most
