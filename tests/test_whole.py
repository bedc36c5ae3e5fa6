"""What cutting batches changes is said when a plan is made, and nothing where it changes nothing."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modelpar import Objective, plan
from modelpar.capture.objective import LossResult
from modelpar.errors import CaptureError, ConfigError
from modelpar.planning.plan import Plan

torch.manual_seed(0)
X, Y = torch.randn(8, 6), torch.tensor([0, 1, 2, 0, 1, 1, 2, 0])


def chain():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def planned(model, loss=F.cross_entropy, batch=(X, Y), microbatches=4, **options):
    return plan(Objective(model, loss, **options), batch, num_microbatches=microbatches, profile="flops", num_threads=1)


def noted(*args, **options):
    (note,) = planned(*args, **options).notes
    assert "\n" not in note
    return note


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="sum"), "is a sum over samples where a mean is expected"),
        (nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 9.0])), "weighted classes. For the latter, give a loss"),
        (lambda o, y: F.cross_entropy(o @ o.t(), torch.arange(len(o))), "the loss compares samples with each other"),
        (lambda o, y: LossResult(o.std(), 1), "the loss compares samples with each other"),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_noted(loss, words, caplog):
    note = noted(chain(), loss)
    assert words in note
    assert "LossResult(total=sum, count=" in note
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [note]


class Words(nn.Module):
    """Labels of -100 count nothing; with `own_loss` it takes them itself."""

    def __init__(self, own_loss=False):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.own_loss = own_loss

    def forward(self, ids, labels=None):
        found = self.head(torch.tanh(self.mix(self.embed(ids))))
        return {"loss": ignoring(found, labels), "logits": found} if self.own_loss else found


def ignoring(output, labels):
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def words(*missing):
    ids = torch.arange(40).view(8, 5) % 9
    labels = ids.roll(1).clone()
    for sample, number in enumerate(missing):
        labels[sample, :number] = -100
    return ids, labels


def test_labels_that_are_left_out_are_the_cause_that_is_named():
    late = words(1, 1, 1, 1, 1, 1, 4, 4)  # the first two micro-batches do not tell
    assert "because labels of -100 are left out" in noted(Words(), ignoring, late)
    ids, labels = words(4, 3, 0, 0, 1, 1, 1, 1)
    assert "give the labels as targets instead of inputs" in noted(
        Words(True), None, ({"ids": ids, "labels": labels}, None)
    )

    def counted(output, labels):
        total = F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum")
        return LossResult(total, int((labels != -100).sum()))

    assert planned(Words(), counted, (ids, labels)).notes == ()
    assert planned(Words(), ignoring, words(*[2] * 8)).notes == ()  # as many everywhere: it is a mean over samples


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, scale):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)) * scale)))


@pytest.mark.parametrize("microbatches", [2, 3, 6])
def test_a_shared_input_as_long_as_the_batch_is_refused_with_what_to_write(microbatches):
    batch = (X[:6], torch.linspace(0.1, 3, 6)), Y[:6]
    with pytest.raises(ConfigError, match=r"inputs.1 is as long as the batch \(6\) .* expected shared=\['1'\]"):
        planned(Biased(), batch=batch, microbatches=microbatches)
    right = planned(Biased(), batch=batch, microbatches=microbatches, shared=[1])
    assert (right.notes, right.batch.shared) == ((), ("inputs.1",))
    other = (X, torch.linspace(0.1, 3, 6)), Y
    assert planned(Biased(), batch=other, microbatches=microbatches).batch.shared == ("inputs.1",)


def test_shared_targets_are_found_too():
    def loss(output, targets):
        return F.cross_entropy(output, targets["y"]) * targets["weights"].mean()

    weights = torch.linspace(0.1, 3, 8)
    with pytest.raises(ConfigError, match=r"targets.weights is as long .* expected shared=\['targets.weights'\]"):
        planned(chain(), loss, (X, {"y": Y, "weights": weights}))
    assert planned(chain(), loss, (X, {"y": Y, "weights": weights}), shared=["targets.weights"]).notes == ()


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, maps):
        return self.c(torch.tanh(self.a(maps[0])) + torch.tanh(self.b(maps[1])))


def test_a_list_that_is_no_list_of_samples_is_refused_with_what_to_write():
    pair = [X[:2], X[2:4]]
    with pytest.raises(ConfigError, match=r"not on the first micro-batch of it .* one entry per sample: inputs, targ"):
        planned(Maps(), batch=(pair, Y[:2]))
    assert planned(Maps(), batch=((tuple(pair),), Y[:2])).notes == ()
    assert planned(Maps(), batch=([X, X], Y)).notes == ()


def test_a_model_that_fails_on_any_batch_says_that():
    with pytest.raises(CaptureError, match=r"failed on the example batch"):
        planned(chain(), batch=(X[:, :3], Y))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x) - self.a(x).mean(0))


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h + torch.randn_like(h))


def test_a_model_that_mixes_samples_is_noted():
    assert "cutting batches changes the output" in noted(Mixing())


def test_what_cannot_be_compared_is_said():
    assert noted(Drawing()).endswith("was not checked: the model draws random numbers in evaluation")
    assert noted(chain, init="meta").endswith("was not checked: no process holds the whole model")


def test_batch_normalisation_is_noted_and_nobody_is_warned(caplog):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert noted(model).startswith("batch normalisation (1) sees one micro-batch at a time")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(12))).to(dtype)
    assert planned(model, batch=(X.to(dtype), Y)).notes == ()


def test_one_microbatch_changes_nothing():
    assert planned(Mixing(), microbatches=1).notes == ()


def test_the_module_and_the_generator_are_as_before():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    planned(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())


def test_a_plan_keeps_its_notes_and_how_it_read_the_batch(tmp_path):
    made = planned(Mixing(), lambda o, y: F.cross_entropy(o, torch.as_tensor(y)), (X, np.asarray(Y)))
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.notes == made.notes != ()
    assert loaded.batch == made.batch
    assert made.batch.samples == ("inputs", "targets")
