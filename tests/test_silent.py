"""What once gave wrong numbers, or hung, without a word. Each is right now, or refused in one line that says why."""

import copy
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modelpar import LossResult, Objective, Pipeline, Workers, partitioners, plan
from modelpar.errors import CaptureError, ConfigError, PartitionError, RunError, StageError

SGD = partial(torch.optim.SGD, lr=0.1)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def four(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *middle, nn.Linear(8, 4))


def some(size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator)


def planned(model, balance, loss=F.cross_entropy, batch=None):
    split = partial(partitioners.manual, balance=balance)
    arguments = {
        "num_ranks": len(balance),
        "num_microbatches": 2,
        "num_threads": 1,
        "profile": "flops",
        "tied": "exact",
    }
    return plan(Objective(model, loss), batch or some(), partitioner=split, **arguments)


def train(model, decided, batches, loss=F.cross_entropy, optimizer=SGD):
    with (
        Workers(decided.num_ranks, transport="threads") as workers,
        Pipeline(Objective(model, loss), decided, workers=workers, optimizer=optimizer) as pipeline,
    ):
        results = list(pipeline.steps(batches))
        return [result.loss for result in results], pipeline.state_dict()


def expected(model, batches, loss=F.cross_entropy):
    untouched = copy.deepcopy(model)
    losses = [step[0] for step in reference.train(untouched, loss, SGD, batches, num_microbatches=2)]
    return losses, untouched.state_dict()


def assert_equal(found, wanted):
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in wanted[1].items())


def test_a_plan_made_without_gradients_trains_all_the_same():
    model = four(nn.Linear(8, 8))
    with torch.no_grad():
        decided = planned(model, [2, 1])
    assert_equal(train(model, decided, [some()] * 2), expected(model, [some()] * 2))


def test_a_value_that_needs_a_gradient_only_later_is_noticed():
    model = four(Call(lambda x: x.detach() if len(x) <= 2 else x * 1))
    with pytest.raises(StageError, match="needs a gradient, and did not when the model was captured"):
        train(model, planned(model, [2, 1], batch=some(4)), [some(8)])


def test_an_object_that_could_hide_a_tensor_does_not_cross_a_cut():
    model = four(Call(lambda x: SimpleNamespace(a=x.tanh())), Call(lambda v: v.a * 1))
    with pytest.raises(PartitionError, match="cuts between 1 and 2, after 2 layers, which cannot be cut there"):
        planned(model, [2, 2])
    assert_equal(train(model, planned(model, [3, 1]), [some()]), expected(model, [some()]))


def test_a_hidden_reference_to_another_stage_is_refused():
    model = four(nn.Linear(8, 8))
    object.__setattr__(model[2], "hidden", model[0])
    with pytest.raises(CaptureError, match=r"stage 1 \(2 … 2\) uses 0.weight, which is not its own"):
        train(model, planned(model, [2, 1]), [some()])


def test_a_loss_or_an_optimizer_that_holds_on_to_the_model_is_refused():
    model = four(nn.Linear(8, 8))

    def decay(output, targets):
        return F.cross_entropy(output, targets) + sum(p.pow(2).sum() for p in model.parameters())

    with pytest.raises(CaptureError, match=r"uses 0\.weight, which is not its own"):
        train(model, planned(model, [2, 1], decay), [some()], decay)
    with pytest.raises(CaptureError, match=r"the optimizer or the learning-rate schedule uses 0\.weight"):
        train(model, planned(model, [2, 1]), [some()], optimizer=lambda _: SGD(model.parameters()))


def test_a_module_that_draws_is_recomputed_only_with_the_random_state_of_forward():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)

    model = four(Checkpointed())
    with pytest.raises(StageError, match="drew random numbers outside of forward"):
        train(model, planned(model, [1, 2]), [some()])


def test_a_buffer_that_is_handed_on_and_changes_later():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            self.mean.mul_(0.5).add_(x.detach().mean(0))
            return x, self.mean

    model = four(Average(), Call(lambda pair: pair[0] + pair[1]))
    batches = [some()] * 3
    assert_equal(train(model, planned(model, [2, 2]), batches), expected(model, batches))


def test_an_iterator_may_fill_the_same_memory_again():
    model = four(nn.Linear(8, 8))
    batches = [(x + i, y) for i, (x, y) in enumerate([some()] * 4)]
    buffer = (torch.empty(8, 8), torch.empty(8, dtype=torch.long))

    def refilled():
        for x, y in batches:
            buffer[0].copy_(x)
            buffer[1].copy_(y)
            yield buffer

    assert_equal(train(model, planned(model, [2, 1]), refilled()), expected(model, batches))


def noisy(output, targets):
    return F.cross_entropy(output + torch.randn_like(output), targets)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output, targets):
        return self.weight * F.cross_entropy(output, targets)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(noisy, "the loss draws random numbers"), (Weighted(), "the loss has parameters of its own")],
)
def test_losses_that_cannot_be_kept_the_same_are_refused(loss, message):
    with pytest.raises(CaptureError, match=message):
        planned(four(), [1, 1], loss)


def test_autocast_around_the_pipeline_is_refused():
    model = four()
    decided = planned(model, [1, 1])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast is on around the pipeline"):
        train(model, decided, [some()])


def test_hooks_on_parameters_and_shared_memory_are_refused():
    model = four()
    model[0].weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(CaptureError, match=r"0\.weight has a hook"):
        planned(model, [1, 1])
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(PartitionError, match="2 stages, but the model has 2 layers that can be cut in 0 places"):
        planned(model, [1, 1])  # they may be on one stage


def test_a_batch_whose_parts_do_not_fit_is_refused():
    model = four()
    decided = planned(model, [1, 1])
    with pytest.raises(ConfigError, match="the batch has 8 inputs and 4 targets; expected as many of each"):
        train(model, decided, [(some(8)[0], some(4)[1])])


def test_an_output_that_cannot_be_joined_is_refused():
    model = four(Call(lambda x: x))
    model.append(Call(lambda x: x.sum()))
    decided = planned(model, [2, 2], lambda output, _: output)
    with (
        Workers(2, transport="threads") as workers,
        Pipeline(Objective(model, lambda output, _: output), decided, workers=workers) as pipeline,
        pytest.raises(ConfigError, match=r"an output has shape \[\] for a micro-batch of 4, which cannot be joined"),
    ):
        pipeline.predict(some()[0])


def test_a_pipeline_entered_again_begins_again():
    model = four(nn.Dropout(0.5))
    decided = planned(model, [2, 1])
    pipeline = Pipeline(
        Objective(model, F.cross_entropy), decided, workers=(w := Workers(2, transport="threads")), optimizer=SGD
    )
    with w:
        runs = []
        for _ in range(2):
            with pipeline:
                runs.append([(result.step, result.loss) for result in pipeline.steps([some()] * 2)])
    assert runs[0] == runs[1]
    assert [step for step, _ in runs[1]] == [0, 1]


def test_an_exception_that_cannot_say_what_it_is_still_ends_the_step():
    class Mute(Exception):
        def __str__(self):
            raise TypeError("no words")

    def fail(x):
        if len(x) > 2:
            raise Mute
        return x

    model = four(Call(fail))
    with pytest.raises(StageError, match="Mute, which could not be described"):
        train(model, planned(model, [1, 2], batch=some(4)), [some(8)])


def test_a_batch_that_cannot_be_split_or_sent_leaves_no_rank_waiting(monkeypatch):
    model = four()
    decided = planned(model, [1, 1])
    before = set(threading.enumerate())

    def fail(*_):
        raise TypeError("cannot pickle a lock")

    with (  # noqa: PT012
        pytest.raises(RunError, match="a batch could not be sent: TypeError: cannot pickle a lock"),
        Workers(2, transport="threads") as workers,
        Pipeline(Objective(model, F.cross_entropy), decided, workers=workers, optimizer=SGD) as pipeline,
    ):
        monkeypatch.setattr(workers, "give", fail)
        with pytest.raises(TypeError, match="cannot pickle a lock"):
            pipeline.step(some())
        monkeypatch.undo()
        pipeline.step(some())
    for thread in set(threading.enumerate()) - before:  # they end at their next wait, which is now
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_counts_as_tensors_and_metrics_that_come_and_go():
    def loss(output, targets):
        each = F.cross_entropy(output, targets, reduction="none")
        metrics = {"first": each[0].detach()} if targets[0] == some()[1][0] else {}
        return LossResult(each.sum(), torch.tensor(len(each)), metrics)

    model = four()
    decided = planned(model, [1, 1], loss)
    with (
        Workers(2, transport="threads") as workers,
        Pipeline(Objective(model, loss), decided, workers=workers, optimizer=SGD) as pipeline,
    ):
        result = pipeline.step(some())
    assert type(result.count) is int
    assert all(type(value) is float for value in result.metrics.values())


def test_an_optimizer_may_choose_its_parameters():
    model = four(nn.Linear(8, 8))

    def only_last(named):
        return SGD([parameter for name, parameter in named if name == "2.weight"])

    before = copy.deepcopy(model.state_dict())
    _, state = train(model, planned(model, [2, 1]), [some()], optimizer=only_last)
    assert [name for name in before if not torch.equal(before[name], state[name])] == ["2.weight"]
