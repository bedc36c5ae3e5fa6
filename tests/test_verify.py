"""`verify`: finds a split that is wrong, says where, and notes what micro-batches change; and `modelpar verify`."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from commands import GPT, MLP, TEXT, THREADS, Command, call, listing
from layers import momentum
from torch import nn
from unsplit import make_plan

from modelpar import LossResult, Objective, Plan, verify
from modelpar.run.stage_runner import StageRunner


class Residual(nn.Module):
    """No nn.Sequential: a tied projection at both ends, dropout, a skip, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.frozen(torch.tanh(self.first(x)))
        y = self.third(torch.tanh(self.second(self.drop(y))))
        return self.head(x + y)


def loss(output, targets):
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


BATCH = torch.randint(11, (10, 5)), torch.randint(11, (10, 5))


def verified(model, batch=BATCH, loss=loss, workers=None, **how):
    objective = Objective(model, loss)
    return verify(objective, batch, make_plan(objective, batch, **how), optimizer=momentum, workers=workers)


@pytest.fixture
def threads(shared_workers):
    return shared_workers["threads"].get()


def failures(verdict):
    assert not verdict.passed
    return {check.what: check.detail for check in verdict.checks if not check.passed}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_split_model_that_is_right_passes(workers, num_ranks):
    torch.manual_seed(0)
    model = Residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    verdict = verified(model, workers=workers, num_ranks=num_ranks)
    assert verdict.passed, failures(verdict)
    assert verdict.notes == ()
    names = [check.what for check in verdict.checks]
    assert {"loss, step 2, 3 samples", "gradients, step 1, 9 samples", "predict", "evaluate"} <= set(names)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(verdict.to_json()))["passed"] is True


def test_a_gradient_that_is_scaled_on_its_way_back_is_found(threads, monkeypatch):
    def scaled(runner, microbatch, grads, real=StageRunner.backward):
        factor = 1.5 if runner.program.is_last and microbatch == 1 else 1
        given = real(runner, microbatch, grads)
        return {name: [grad if grad is None else factor * grad for grad in found] for name, found in given.items()}

    monkeypatch.setattr(StageRunner, "backward", scaled)
    found = failures(verified(Residual(), workers=threads, partitioner=by_second))
    assert "loss, step 0, 10 samples" not in found
    detail = found["gradients, step 0, 10 samples"]
    # the first stage has embed and first; backward meets first.bias or first.weight first
    assert detail.startswith("3 of 7 differ, first first."), detail
    assert "embed.weight: by at most " in detail
    assert detail.endswith("with one sample each it begins in micro-batch 1")
    assert "gradient norms, 3 training steps" in found


def by_second(graph, profile, cluster, num_stages):
    """Cuts before the second linear layer."""
    from modelpar.planning.partition import Partition

    index = next(i for i, layer in enumerate(graph.layers) if any(p.name == "second.weight" for p in layer.parameters))
    cut = max(c for c in graph.cuts if c <= index)
    return Partition((0, cut, len(graph.layers)), method="test")


def test_a_tied_gradient_that_is_lost_is_found(threads, monkeypatch):
    def without(runner, microbatch, grads, real=StageRunner.backward):
        return real(runner, microbatch, {name: found for name, found in grads.items() if "weight" not in name})

    monkeypatch.setattr(StageRunner, "backward", without)
    found = failures(verified(Residual(), workers=threads))
    details = [detail for what, detail in found.items() if what.startswith("gradients")]
    assert len(details) == 3
    assert all(detail.startswith("1 of 7 differ, first embed.weight: by at most ") for detail in details)
    assert details[0].endswith("with one sample each it begins in micro-batch 0")


def test_another_dropout_mask_is_found(threads, monkeypatch):
    def other(runner, microbatch, values, context, real=StageRunner.forward):
        return real(runner, microbatch, values, context._replace(first=5) if microbatch == 2 else context)

    monkeypatch.setattr(StageRunner, "forward", other)
    found = failures(verified(Residual(), workers=threads))
    assert ", unsplit " in found["loss, step 0, 10 samples"]
    assert found["gradients, step 0, 10 samples"].endswith("with one sample each it begins in micro-batch 2")
    assert found["losses, 3 training steps"].startswith("step 0: ")


def test_a_lost_buffer_is_found(threads, monkeypatch):
    def without(runner, number, values, context, real=StageRunner.forward):
        given = real(runner, number, values, context)
        for name, buffer in runner.program.module.named_buffers():
            if name == "1.running_mean":
                buffer.data.zero_()
        return given

    monkeypatch.setattr(StageRunner, "forward", without)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    batch = torch.randn(12, 8), torch.randint(3, (12,))
    found = failures(verified(model, batch, F.cross_entropy, workers=threads, num_microbatches=3))
    assert found["buffers, step 0, 12 samples"].startswith("1 of 3 differ, first 1.running_mean: by at most ")
    assert found["predict"].startswith("sample 0: by at most ")


def test_batch_normalisation_is_noted(threads):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    batch = torch.randn(12, 8), torch.randint(3, (12,))
    verdict = verified(model, batch, F.cross_entropy, workers=threads, num_microbatches=3)
    assert verdict.passed, failures(verdict)
    *left_out, note = verdict.notes
    assert [left.partition(" (ValueError: Expected more")[0] for left in left_out] == [
        "batches of 2 samples were left out: the unsplit model cannot train on them in 2 micro-batches"
    ]
    assert note.startswith("batch normalisation (1 and 1 more) sees one micro-batch at a time, not the batch")
    notes = verified(model, batch, F.cross_entropy, workers=threads, num_microbatches=1).notes
    assert not any("normalisation" in note for note in notes)


def counted(output, targets):
    total = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return LossResult(total, int((targets != -100).sum()))


def contrasting(output, targets):
    """Each sample's output against all others'."""
    flat = F.normalize(output.flatten(1))
    return F.cross_entropy(flat @ flat.T, torch.arange(len(flat)))


@pytest.mark.parametrize("of", [loss, contrasting])
def test_a_loss_that_is_no_mean_over_samples_is_noted(threads, of):
    tokens, targets = torch.arange(50).view(10, 5) % 11, BATCH[1].clone()
    targets[:3, 1:] = -100
    verdict = verified(Residual(), (tokens, targets), of, workers=threads)
    assert verdict.passed, failures(verdict)
    [note] = verdict.notes
    assert note.startswith("the loss of a whole batch is ")
    assert "LossResult(total=sum, count=number of tokens)" in note
    assert verified(Residual(), (tokens, targets), counted, workers=threads).notes == ()


def test_tied_weights_that_train_in_the_fast_way_are_noted(threads):
    verdict = verified(Residual(), workers=threads, tied="fast")
    assert verdict.passed, failures(verdict)
    [note] = verdict.notes
    assert note.startswith(
        "the gradients of embed.weight, which is used in several places, were added as autograd adds"
    )


# --- the command --------------------------------------------------------------------------------------------------

SMALL = [*MLP, *THREADS, "training.batch_size=6", "pipeline.num_microbatches=4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which no process may be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def refuse(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    return tmp_path


def test_the_command_prints_a_line_per_check_and_writes_the_verdict(folder):
    outcome = call("verify", *SMALL, "output.name=mine")
    assert (outcome.code, outcome.err) == (0, "")
    shown = outcome.out.splitlines()
    assert shown[0].startswith("2 stages by optimal, 4 micro-batches")
    assert sum(line.startswith("✓  ") for line in shown) == 14
    assert shown[-2:] == [
        "runs/mine/verify.json",
        "the split model equals the unsplit one to the bit in all 14 checks",
    ]
    assert listing(folder / "runs" / "mine") == {"config.yaml", "plan.json", "verify.json"}
    written = json.loads((folder / "runs" / "mine" / "verify.json").read_text())
    assert written["passed"]
    assert len(written["checks"]) == 14
    assert Plan.load(folder / "runs" / "mine" / "plan.json").num_stages == 2


def test_the_command_ends_with_1_where_a_check_fails(folder, monkeypatch):
    def scaled(runner, microbatch, grads, real=StageRunner.backward):
        given = real(runner, microbatch, grads)
        return {name: [grad if grad is None else -grad for grad in found] for name, found in given.items()}

    monkeypatch.setattr(StageRunner, "backward", scaled)
    outcome = call("verify", *SMALL, "output.name=mine", "steps=1")
    assert (outcome.code, outcome.err) == (1, "")
    failed = [line for line in outcome.out.splitlines() if line.startswith("✗  ")]
    assert failed[0].startswith("✗  gradients, step 0, 6 samples")
    assert outcome.out.splitlines()[-1].startswith("the split model differs from the unsplit one in ")
    assert not json.loads((folder / "runs" / "mine" / "verify.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("steps=0", "steps is 0; expected at least 1"),
        ("steps=x", "steps is 'x'; expected a whole number"),
        ("schedule=fill_drain", "the schedule has no backward; expected one that trains, such as schedule=1f1b"),
        ("-m", "-m is not an option of verify; expected --config-dir or overrides such as model=mlp"),
        (
            "pipeline.num_ranks=99",
            "99 stages, but the model has 10 layers that can be cut in 9 places; expected at most 10",
        ),
    ],
)
def test_bad_input_costs_one_line(folder, words, message):
    outcome = call("verify", *SMALL, words)
    assert (outcome.code, outcome.err) == (2, f"modelpar: {message}\n")
    assert not (folder / "runs").exists()


def test_a_stage_that_fails_ends_it_with_1_and_its_message(folder, monkeypatch):
    def failing(runner, microbatch, values, context):
        raise RuntimeError("no luck")

    monkeypatch.setattr(StageRunner, "forward", failing)
    outcome = call("verify", *SMALL)
    assert outcome.code == 1
    assert outcome.err.startswith("modelpar: ")
    assert "no luck" in outcome.err


def test_nothing_outlives_it(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = [*GPT, *THREADS[1:], "training.batch_size=4", "pipeline.num_microbatches=3", "steps=1"]
    command = Command(tmp_path, "verify", *words)
    outcome = command.outcome()
    assert (outcome.code, outcome.err) == (0, "")
    assert command.left() == []
    assert "note: the gradients of embed.token.weight" in outcome.out


class Remembers(nn.Module):
    """Keeps a mean and a count from one micro-batch to the next, as plain attributes, and a buffer of another size."""

    def __init__(self):
        super().__init__()
        self.linear, self.mean, self.count = nn.Linear(8, 8), torch.zeros(8), 0
        self.register_buffer("largest", torch.tensor([]))

    def forward(self, x):
        x = self.linear(x)
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            most = x.detach().amax(0)
            self.largest = torch.maximum(most, self.largest) if self.largest.numel() else most
        return x - self.mean * (1 + self.count % 2)


def test_state_that_layers_keep_from_one_micro_batch_to_the_next_is_no_difference(workers):
    torch.manual_seed(0)
    model = nn.Sequential(Remembers(), nn.Linear(8, 8), Remembers(), nn.Linear(8, 3))
    batch = torch.randn(8, 8), torch.randint(3, (8,))
    objective = Objective(model, F.cross_entropy)
    plan = make_plan(objective, batch, leaf=["Remembers"])
    verdict = verify(objective, batch, plan, optimizer=momentum, workers=workers)
    assert verdict.passed, [check for check in verdict.checks if not check.passed]
    assert (model[0].count, model[0].largest.numel()) == (0, 0)
