"""Layers that warn, print and log on rank 1, one run after the other; test_notices.py runs this as a script.

What the controller says of it goes to standard error, under a line for each run.
"""

import json
import logging
import os
import sys
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from layers import LARGE, Trip, adamw
from torch import nn
from unsplit import make_plan

from modelpar.capture.objective import Objective
from modelpar.errors import ModelparError
from modelpar.planning import partitioners
from modelpar.run.pipeline import Pipeline
from modelpar.run.workers import Workers

FLOOD = 3000
"""Texts of a kilobyte each: more than a socket takes at once."""


def talk(x):
    print("a layer prints")
    os.write(1, b"native code prints\n")
    warnings.warn("a layer warns", stacklevel=1)
    for _ in range(3):
        logging.getLogger("mine").warning("a layer logs %d", 7)
    logging.getLogger("mine").info("nobody asked for this")
    logging.getLogger("mine").warning("%d arguments are missing")
    return x * 1


def flood(x):
    for i in range(FLOOD):
        logging.getLogger("mine").warning("text %d %s", i, "x" * 1000)
    return x * 1


def die(x):
    print("last words")
    os.kill(os.getpid(), 9)


def attempt(name, act, **options):
    """Runs two steps, the layer acting in the second; reports the error, if any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Trip(act), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    good = (torch.randn(4, 6), torch.randint(3, (4,)))
    bad = (good[0].clone(), good[1])
    bad[0][0] = 10 * LARGE
    objective = Objective(model, F.cross_entropy)
    plan = make_plan(objective, good, num_microbatches=2, partitioner=partial(partitioners.manual, balance=[1, 2]))
    print(f"--- {name}", file=sys.stderr, flush=True)
    error = None
    try:
        with (
            Workers(2, transport="rpc", **options) as workers,
            Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline,
        ):
            for batch in (good, bad):
                pipeline.step(batch)
    except ModelparError as caught:
        error = f"{type(caught).__name__}: {caught}"
    print(json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else os.environ["TALKING_LOGS"]
    attempt("without files", talk)
    attempt("killed", die, logs=f"{folder}/killed")
    attempt("flood", flood, logs=lambda: f"{folder}/flood")
    logging.getLogger("modelpar").setLevel(logging.DEBUG)
    attempt("talk", talk, logs=f"{folder}/talk")
