"""A model that fits nowhere whole: its parameters, gradients and optimizer state exceed what each process may have."""

import math
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelpar.capture.objective import Objective
from modelpar.planner import plan
from modelpar.run.memory import PeakMemory
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

MB = 2**20
WIDTH, DEPTH = 2048, 20
LIMIT = 1100 * MB
"""Of the data segment. A worker that has loaded nothing has 316 MB, the process that is to train alone 220 MB."""

UNSPLIT = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))
import torch, torch.nn.functional as F
from torch import nn
torch.set_num_threads(1)
try:
    model = nn.Sequential(*[nn.Linear({WIDTH}, {WIDTH}) for _ in range(int(sys.argv[1]))], nn.Linear({WIDTH}, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        F.cross_entropy(model(torch.randn(8, {WIDTH})), torch.randint(8, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    print("trained")
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__, str(error).splitlines()[0])
"""


def deep():
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8))


def adamw(named):
    return torch.optim.AdamW(named, lr=1e-4)


def unsplit(depth):
    command = [sys.executable, "-c", UNSPLIT, str(depth)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits the memory of running processes")
def test_a_model_larger_than_each_process_trains(shared_workers):
    shared_workers["rpc"].close()  # one group of processes at a time
    objective = Objective(deep, F.cross_entropy, init="meta")
    batch = torch.randn(8, WIDTH), torch.randint(8, (8,))
    size = sum(parameter.numel() * 4 for parameter in objective.build().parameters())
    assert 4 * size > LIMIT + 150 * MB  # weights, gradients, two moments
    here = PeakMemory(torch.device("cpu"), alone=True)
    decided = plan(objective, batch, num_ranks=4, num_microbatches=4, num_threads=1, profile="flops", optimizer=adamw)
    with Workers(4) as workers:
        for process in workers._launch._processes:
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (LIMIT, LIMIT))
        with Pipeline(objective, decided, workers=workers, optimizer=adamw, max_norm=1.0) as pipeline:
            results = [pipeline.step(batch) for _ in range(2)]
    assert all(math.isfinite(result.loss) and result.grad_norm > 0 for result in results)
    assert results[1].loss != results[0].loss
    assert here.bytes() < size / 3  # 45 MB were seen for 448 MB
    assert max(results[1].peak_bytes) < 2 * size


def test_the_same_model_cannot_train_alone():
    assert "allocate memory" in unsplit(DEPTH)
    assert unsplit(DEPTH // 4) == "trained\n"  # a quarter of it can
