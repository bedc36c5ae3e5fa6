"""CUDA devices: what is arithmetic and wiring is tested anywhere, the rest where there is a device."""

import copy
import os
import pickle
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Settings, adamw, momentum
from test_parity import CONVNET, GPT, MLP, batches_like, seeded
from torch import nn
from unsplit import check_equal, make_plan
from views import views

from modelpar.capture.objective import Objective
from modelpar.errors import ConfigError
from modelpar.planning import schedules
from modelpar.planning.schedule import Action, Op
from modelpar.planning.timeline import COMPUTE, Span, Timeline
from modelpar.run import cuda, exchange, layout, wire
from modelpar.run.channel import Channel, pair
from modelpar.run.clock import merge
from modelpar.run.memory import PeakMemory
from modelpar.run.numerics import Numerics
from modelpar.run.pipeline import Pipeline
from modelpar.run.transport import Mailbox
from modelpar.run.workers import Workers

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_line(kind, text, offset=0.0):
    """Returns spans as drawn: one per run of a letter; a second is a character."""
    found, start = [], 0
    for i in range(1, len(text) + 1):
        if i == len(text) or text[i] != text[start]:
            if text[start] != ".":
                found.append(Span(0, kind or text[start], start + offset, i + offset, cause=text[start]))
            start = i
    return found


def drawn(spans, length):
    line = ["."] * length
    for span in spans:
        for i in range(round(span.start), round(span.end)):
            assert line[i] == "."
            line[i] = span.cause
    return "".join(line)


@pytest.mark.parametrize(
    ("device", "host", "found"),
    [
        ("....FFFFFF......GGG....", "s.wwwwwwwwwwwwwwwwss...", "s.wwFFFFFFwwwwwwGGGs..."),  # a wait behind both
        ("..FFFF..", "ww....ss", "wwFFFFss"),  # nothing runs ahead
        ("FFFFFFFF", ".wwww.s.", "FFFFFFFF"),  # all is hidden
        ("........", "wwss....", "wwss...."),  # no device
        ("FF..GG..", "wwwwwwww", "FFwwGGww"),
    ],
)
def test_of_the_host_the_timeline_shows_what_the_device_was_idle_in(device, host, found):
    assert drawn(merge(on_line("", device), on_line("wait", host)), len(device)) == found


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8),
)
def test_merged_spans_never_overlap_and_cover_what_either_covered(device, host):
    def spans(gaps, kind):
        now = 0
        for gap, length in gaps:
            yield Span(0, kind, now + gap, now + gap + length)
            now += gap + length

    on_device, on_host = list(spans(device, "F")), list(spans(host, "wait"))
    found = sorted(merge(on_device, on_host), key=lambda span: span[2:4])
    assert [span for span in found if span.kind == "F"] == on_device
    assert all(a.end <= b.start for a, b in pairwise(found))
    for span in on_host:
        shown = sum(max(0, min(span.end, each.end) - max(span.start, each.start)) for each in found)
        assert shown == span.seconds


def test_clock_readings_that_overlap_by_rounding_are_cut():
    spans = merge([Span(0, "F", 0.0, 1.0), Span(0, "B", 1.0 - 1e-7, 2.0), Span(0, "F", 1.5, 1.5)], [])
    assert [(span.start, span.end) for span in spans] == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.0)]
    assert Timeline.of(1, spans).busy(0) == 2.0


class LateClock:
    """A device that gets to everything a millisecond after the host has."""

    def begin(self):
        pass

    def mark(self):
        return perf_counter()

    def seconds(self, mark):
        return mark + 1e-3


def test_a_step_on_a_device_that_runs_late_has_every_action_once_and_no_overlap(monkeypatch):
    monkeypatch.setattr(exchange, "clock_of", lambda device: LateClock())
    model, example, loss = seeded(MLP)
    objective = Objective(model, loss)
    plan = make_plan(objective, example)
    with (
        Workers(2, transport="threads") as workers,
        Pipeline(objective, plan, workers=workers, optimizer=momentum, max_norm=1.0) as pipeline,
    ):
        timeline = [pipeline.step(example) for _ in range(2)][-1].timeline
    for rank in range(2):
        spans = sorted(timeline.of_rank(rank), key=lambda span: span[2:4])
        done = [Action(span.stage, Op(span.kind), span.microbatch) for span in spans if span.kind in COMPUTE]
        assert done == list(plan.schedule.actions(rank))
        assert {"receive", "optimizer"} <= {span.kind for span in spans}
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans) if a.kind != "data")
        assert sum(span.seconds for span in spans if span.kind != "data") <= timeline.makespan


@given(views())
@settings(max_examples=100, deadline=None)
def test_a_tensor_that_moves_to_a_device_keeps_its_layout(tensor):
    moved = layout.move(tensor, torch.device("meta"))
    assert (moved.dtype, moved.shape, moved.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    if tensor.numel():
        assert moved.storage_offset() == tensor.data_ptr() % layout.ALIGNMENT // tensor.element_size()
    assert layout.move(tensor, tensor.device).data_ptr() == tensor.data_ptr()


def test_what_was_sent_enters_a_device_with_its_layout():
    tensor = torch.arange(200.0)[5:185].view(12, 15)[:, ::2].requires_grad_()
    for sent in (tensor, wire.pack(tensor)):
        found = wire.unpack({"a": sent, "b": [None, 3]}, torch.device("meta"))
        assert found["b"] == [None, 3]
        assert (found["a"].stride(), found["a"].storage_offset() % 16) == ((15, 2), tensor.data_ptr() % 64 // 4)
        assert found["a"].is_leaf
        assert found["a"].requires_grad


def test_without_cuda_in_use_values_stay_as_they_are():
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use")
    value = {"a": torch.ones(100_000), "b": None}
    for way in (cuda.staged, cuda.shared, cuda.handed_over):
        assert way(value) is value


class Opened(cuda.Shared):
    """A handle that opens without a device."""

    def open(self, device):
        return torch.zeros(self.shape)


@pytest.mark.parametrize("through", ["channel", "pickle"])
def test_the_handle_of_a_shared_tensor_travels(through, monkeypatch):
    monkeypatch.setattr(cuda.Shared, "open", Opened.open)
    handle = (torch.Tensor, torch.Size([6]), (1,), 0, torch.storage.TypedStorage, torch.float32, 0, b"x" * 64, 24)
    sent = {"h": [cuda.Shared(handle, (2, 3), (3, 1), 0, True), torch.ones(2)]}
    if through == "pickle":
        arrived = pickle.loads(pickle.dumps(wire.pack(sent)))
    else:
        receiving, way = pair()
        channel = Channel(0, receiving, {0: way})
        channel.send(0, (1, "x"), sent)
        arrived = Mailbox(inbox=channel).wait((1, "x"))
        channel.close()
    assert arrived["h"][0] == sent["h"][0]
    assert cuda.waits_for_events(arrived)
    assert wire.unpack(arrived, torch.device("cpu"))["h"][0].shape == (2, 3)


def test_device_memory_that_torch_may_not_be_able_to_share_is_refused(monkeypatch):
    assert cuda.why_not_shared({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}) is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    with pytest.raises(ConfigError, match=r"cuda_ipc cannot be used: PYTORCH_CUDA_ALLOC_CONF has expandable_segments"):
        Workers(2, cuda_ipc=True)
    Workers(2, transport="threads", cuda_ipc=True)  # unused there
    Workers(2)


def test_nothing_stays_of_what_a_killed_process_shared():
    left, other = (Path(f"/dev/shm/torch_{pid}_123_0") for pid in (2**22 + 7, 2**22 + 71))
    try:
        left.touch()
        other.touch()
        cuda.forget(2**22 + 7)
        assert not left.exists()
        assert other.exists()
    finally:
        left.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def test_a_device_without_a_number_is_the_first():
    assert cuda.resolve("cuda") == torch.device("cuda", 0)
    assert cuda.resolve("cuda:1") == torch.device("cuda", 1)
    assert cuda.resolve("cpu") == torch.device("cpu")


def test_several_ranks_on_one_device_of_one_process_have_no_measured_peak():
    assert PeakMemory(torch.device("cpu"), alone=False).bytes() is None
    assert PeakMemory(torch.device("cuda", 0), alone=False).bytes() is None


def test_ranks_compute_with_the_settings_of_the_users_process(workers):
    objective = Objective(nn.Sequential(nn.Linear(1, 1), Settings()), F.mse_loss)
    batch = torch.zeros(4, 1), torch.zeros(4, 2)
    before = Numerics.current()
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        with Pipeline(objective, make_plan(objective, batch, num_microbatches=2), workers=workers) as pipeline:
            changed = pipeline.predict(batch[0])
    finally:
        before.apply()
    with Pipeline(objective, make_plan(objective, batch, num_microbatches=2), workers=workers) as pipeline:
        usual = pipeline.predict(batch[0])
    assert torch.equal(changed, torch.ones(4, 2))
    assert torch.equal(usual, torch.zeros(4, 2))


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = Numerics.current()
    torch.use_deterministic_algorithms(True)
    yield
    before.apply()


def places(num_ranks):
    return [f"cuda:{rank % torch.cuda.device_count()}" for rank in range(num_ranks)]


@needs_cuda
@pytest.mark.parametrize("transport", ["threads", "rpc", "rpc without shared memory", "rpc with cuda_ipc"])
def test_on_cuda_training_equals_the_unsplit_model(transport, deterministic):
    kind, options = transport.split()[0], {}
    options = {"shared_memory": "without" not in transport, "cuda_ipc": "cuda_ipc" in transport}
    with Workers(2, transport=kind, **options) as workers:
        for build in (GPT, MLP, CONVNET, partial(MLP, width=256)):
            for schedule in (schedules.gpipe, schedules.one_f_one_b):
                model, example, loss = seeded(build)
                how = {"num_microbatches": 4, "schedule": schedule, "devices": places(2), "max_norm": 0.5}
                check_equal(workers, model, loss, batches_like(example, [8, 5]), optimizer=adamw, **how)


@needs_cuda
@given(tensor=views())
@settings(max_examples=50, deadline=None)
def test_on_cuda_a_value_keeps_its_bits_and_its_layout_on_every_way(tensor):
    device = torch.device("cuda", 0)
    there = layout.move(tensor, device)
    for found in (cuda.staged(there), wire.unpack(cuda.handed_over(there), torch.device("cpu"))):
        assert (found.device.type, found.stride()) == ("cpu", tensor.stride())
        assert torch.equal(found, tensor)
    back = wire.unpack(cuda.handed_over(there), device)
    assert back.data_ptr() == there.data_ptr()


@needs_cuda
def test_on_cuda_a_value_handed_over_waits_for_the_stream_that_makes_it():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        value = torch.full((1 << 20,), 3.0, device="cuda")
        sent = cuda.handed_over(value)
    assert bool((wire.unpack(sent, value.device) == 3).all())


@needs_cuda
def test_on_cuda_spans_are_those_of_the_device(shared_workers):
    model, example, loss = seeded(MLP)
    objective = Objective(model, loss)
    plan = make_plan(objective, example, devices=places(2))
    for transport in ("threads", "rpc"):
        with Pipeline(objective, plan, workers=shared_workers[transport].get(), optimizer=momentum) as pipeline:
            timeline = [pipeline.step(copy.deepcopy(example)) for _ in range(3)][-1].timeline
        for rank in range(2):
            spans = sorted(timeline.of_rank(rank), key=lambda span: span.start)
            assert {"F", "B", "optimizer"} <= {span.kind for span in spans}
            assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans) if a.kind != "data")
            assert timeline.busy(rank) > 0


@needs_cuda
def test_on_cuda_the_files_that_count_receivers_are_gone_with_the_workers(shared_workers):
    shared_workers["rpc"].close()  # there is one group per process
    before = set(os.listdir("/dev/shm"))
    model, example, loss = seeded(partial(MLP, width=512))
    objective = Objective(model, loss)
    plan = make_plan(objective, example, devices=places(2))
    with (
        Workers(2, cuda_ipc=True) as workers,
        Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline,
    ):
        pipeline.step(example)
    assert set(os.listdir("/dev/shm")) <= before
