"""The peak memory that a step reports."""

import mmap

import torch
import torch.nn.functional as F
from layers import momentum
from torch import nn
from unsplit import make_plan

from modelpar.capture.objective import Objective
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

MB = 2**20


class Kept(torch.autograd.Function):
    """Keeps 16 MB per sample alive until its backward.

    They are pages of their own, which the kernel has back as soon as they are dropped: of blocks of the C library
    between 3 and 8 copies stayed, as small blocks next to them happened to lie.
    """

    @staticmethod
    def forward(ctx, x):
        kept = torch.frombuffer(mmap.mmap(-1, len(x) * 16 * MB), dtype=torch.uint8)
        ctx.save_for_backward(kept.fill_(1))
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0][0]


class Wide(nn.Module):
    def forward(self, x):
        return Kept.apply(x)


def peaks(workers, num_microbatches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Wide(), nn.Linear(4, 3))
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    objective = Objective(model, F.cross_entropy)
    plan = make_plan(objective, batch, num_microbatches=num_microbatches)
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        return [pipeline.step(batch).peak_bytes for _ in range(2)][-1]


def test_a_process_measures_its_peak(shared_workers):
    workers = shared_workers["rpc"].get()
    eight, two = peaks(workers, 8), peaks(workers, 2)
    # other pages of the process come and go: from -0.2 to +8.5 MB were seen, most for code at its first use
    assert 15 * MB <= eight[1] < 32 * MB  # one sample at a time
    assert 63 * MB <= two[1] < 80 * MB  # four samples at a time
    assert 0 <= eight[0] < 16 * MB  # the other stage has none of it
    assert 0 <= two[0] < 16 * MB


def test_a_thread_counts_its_tensors():
    with Workers(2, transport="threads") as workers:
        eight, two = peaks(workers, 8), peaks(workers, 2)
    assert 16 * MB <= eight[1] < 40 * MB
    assert 64 * MB <= two[1] < 160 * MB
    assert eight[0] < MB
