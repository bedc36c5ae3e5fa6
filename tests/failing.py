"""Things that go wrong with processes, one after the other, each with workers of its own; prints one line of JSON each.

test_failures.py runs this as a script: a process can have one set of workers over RPC at a time.
"""

import json
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from layers import LARGE, Nest, adamw, fail, hang, kill_me, stop_me
from torch import nn
from unsplit import make_plan

from modelpar.capture.objective import Objective
from modelpar.errors import ModelparError
from modelpar.planning import partitioners
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

SPLIT = partial(partitioners.manual, balance=[1, 3])


def task(act):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Nest(act), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8, 6))
    model[1] = nn.Identity()
    good = (torch.randn(8, 6), torch.randint(3, (8,)))
    bad = (good[0].clone(), good[1].clone())
    bad[0][4] = 10 * LARGE  # the third of four micro-batches
    return Objective(model, F.cross_entropy), good, bad


def exists(pid):
    """Tells whether a process runs; one that has ended but that nobody waited for counts too."""
    return Path(f"/proc/{pid}").exists()


def runs(pid):
    """Tells whether a process has not ended; one that only waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # reaped, perhaps while it was being read
        return False


def attempt(name, act, **options):
    """Fails in the third step of a stream, and reports what the user got and what was left."""
    objective, good, bad = task(act)
    plan = make_plan(objective, good, num_ranks=2, partitioner=SPLIT)
    found = {"name": name}
    with Workers(2, transport="rpc", **options) as workers:
        found["pids"] = [workers._launch.pid(rank) for rank in range(2)]
        losses = []
        try:
            with Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline:
                results = pipeline.steps([good, good, bad, good])
                losses += [next(results).loss for _ in range(2)]
                begin = time.monotonic()
                losses += [result.loss for result in results]
        except ModelparError as error:
            found |= {
                "seconds": time.monotonic() - begin,
                "left": [pid for pid in found["pids"] if exists(pid)],
                "error": type(error).__name__,
                "message": str(error),
                "losses": losses,
            }
            try:
                workers.command(0, "run")
            except ModelparError as again:
                found["same again"] = again is error
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    attempt("exception", fail)
    attempt("killed", kill_me)
    attempt("stopped", stop_me, heartbeat_timeout=1)
    attempt("hung", hang, step_timeout=2)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    print(json.dumps({"name": "end", "children": children}), flush=True)
