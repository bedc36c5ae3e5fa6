"""Every model of the zoo, split into stages, is the same model to the bit: losses, gradients, weights, predictions."""

from functools import partial

import pytest
import structures
import torch
import zoo

from modelpar.capture.objective import Objective
from modelpar.planner import plan
from modelpar.planning import partitioners
from modelpar.proof import verify

EVERYDAY = ("gpt2", "llama", "bert", "vit", "t5", "resnet", "convnext", "mixtral", "unet2d")
"""What is tried on two stages as well; the others on three only, to save time."""

SLOW = ("swin", "deberta", "unet2d")

LEAF = {"mamba": ("MambaMixer",)}
"""Its mixers use their weights in another order in evaluation."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)


def check(workers, build, num_ranks, leaf=(), steps=3):
    torch.manual_seed(0)
    model, batch, loss = build()
    assert model.training
    objective = Objective(model, loss)
    options = {"num_microbatches": 2, "num_threads": 1, "profile": "flops", "tied": "exact", "leaf": leaf}
    decided = plan(objective, batch, num_ranks=num_ranks, partitioner=partitioners.uniform, **options)
    assert decided.num_stages == num_ranks
    verdict = verify(objective, batch, decided, optimizer=adamw, workers=workers, steps=steps)
    assert verdict.passed, "\n".join(f"{c.what}: {c.detail}" for c in verdict.checks if not c.passed)


def of_zoo(name, *values):
    return pytest.param(name, *values, marks=[pytest.mark.slow] if name in SLOW else [])


def needs_library(name):
    pytest.importorskip("diffusers" if name == "unet2d" else "transformers")


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", structures.ALL)
def test_structures(shared_workers, name, num_ranks):
    check(shared_workers["threads"].get(), structures.ALL[name], num_ranks)


@pytest.mark.parametrize(
    ("name", "num_ranks"), [of_zoo(n, r) for n in zoo.ALL for r in (2, 3) if r > 2 or n in EVERYDAY]
)
def test_models(shared_workers, name, num_ranks):
    needs_library(name)
    steps = 3 if name in EVERYDAY else 2  # the third is of one sample only
    check(shared_workers["threads"].get(), zoo.ALL[name], num_ranks, LEAF.get(name, ()), steps)


@pytest.mark.parametrize("name", ["tied_lm", "several_inputs", "weight_norm", "nested", "custom_function_bound"])
def test_structures_in_processes(shared_workers, name):
    check(shared_workers["rpc"].get(), structures.ALL[name], 3)


@pytest.mark.parametrize("name", ["gpt2", "segformer", "t5"])
def test_models_in_processes(shared_workers, name):
    needs_library(name)
    check(shared_workers["rpc"].get(), zoo.ALL[name], 2)
