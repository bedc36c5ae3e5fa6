"""Evaluation is what it is after `model.eval()`: a module's own `train()` and `eval()` are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import momentum
from torch import nn
from unsplit import make_plan

from modelpar import Objective, verify
from modelpar.capture.objective import in_mode
from modelpar.run.pipeline import Pipeline


class Cached(nn.Module):
    """Keeps what it computes of its weights while it evaluates, and drops it in train()."""

    def __init__(self):
        super().__init__()
        self.linear, self.bias, self.cache = nn.Linear(8, 8), nn.Parameter(torch.zeros(8)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return torch.tanh(self.linear(x) + self.bias * 2)
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        return torch.tanh(self.linear(x) + self.cache["bias"])


class Frozen(nn.Sequential):
    """Keeps its normalisation in eval mode, and returns nothing."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()


class Loop(nn.Linear):
    """Has a method `train` that is no mode."""

    def train(self, batches, epochs=1):
        raise AssertionError("trained")


class EvalOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.evaluated = nn.Linear(8, 8), 0

    def eval(self):
        self.evaluated += 1
        return super().eval()


def test_flags_are_put_back_whatever_train_does():
    model = nn.Sequential(Frozen(nn.Linear(8, 8), nn.BatchNorm1d(8)), Cached(), Loop(8, 8), nn.Dropout())
    model[3].eval()
    model[0].train()
    before = [module.training for module in model.modules()]
    model[1].cache["bias"] = "old"
    with in_mode(model, "evaluate"):
        assert not any(module.training for module in model.modules())
        assert model[1].cache == {"bias": "old"}
    assert [module.training for module in model.modules()] == before
    assert model[1].cache == {}
    with in_mode(model, "train"):
        assert [module.training for module in model.modules()] == before


def test_the_own_eval_of_the_whole_model_is_called():
    model = EvalOnly()
    with in_mode(model, "predict"):
        assert not model.linear.training
    assert (model.evaluated, model.training, model.linear.training) == (1, True, True)


def test_a_module_that_trains_always_still_does():
    class Always(nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    model = nn.Sequential(nn.Linear(8, 8), Always())
    with in_mode(model, "evaluate"):
        assert (model[0].training, model[1].training) == (False, True)


@pytest.mark.parametrize("partly", [False, True])
def test_evaluation_after_training_uses_no_old_weights(workers, partly):
    torch.manual_seed(0)
    model = nn.Sequential(*[Cached() for _ in range(4)], nn.Linear(8, 3))
    if partly:
        model[4].eval()
    batch = torch.randn(6, 8), torch.randint(3, (6,))
    objective = Objective(model, F.cross_entropy)
    with Pipeline(objective, make_plan(objective, batch), workers=workers, optimizer=momentum) as pipeline:
        for _ in range(3):
            pipeline.evaluate([batch])
            pipeline.step(batch)
        found, state = pipeline.predict(batch[0]), pipeline.state_dict()
    unsplit = copy.deepcopy(model)
    unsplit.load_state_dict(state)
    unsplit.eval()
    with torch.no_grad():
        assert torch.equal(found, torch.cat([unsplit(x) for x in batch[0].tensor_split(4)]))


def test_verify_finds_a_cache_that_is_not_dropped(shared_workers, monkeypatch):
    batch = torch.randn(6, 8), torch.randint(3, (6,))
    objective = Objective(nn.Sequential(*[Cached() for _ in range(4)], nn.Linear(8, 3)), F.cross_entropy)
    plan, workers = make_plan(objective, batch), shared_workers["threads"].get()
    assert verify(objective, batch, plan, optimizer=momentum, workers=workers).passed
    from modelpar.run import executor

    def flags_only(model, mode):
        for module in model.modules():
            module.training = False
        yield
        for module in model.modules():
            module.training = True

    from contextlib import contextmanager

    monkeypatch.setattr(executor, "in_mode", contextmanager(flags_only))
    verdict = verify(objective, batch, plan, optimizer=momentum, workers=workers)
    assert [check.what for check in verdict.checks if not check.passed] == ["evaluate", "predict"]
