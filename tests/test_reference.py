"""The reference that all parity tests trust, against plain PyTorch."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from layers import adamw, momentum
from torch import nn

WIDTH = 8


def task(sizes, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
    batches = [(torch.randn(n, WIDTH), torch.randint(4, (n,))) for n in sizes]
    return model, batches


def plain(model, optimizer, batches, max_norm=None):
    """The training loop that everybody writes."""
    optimizer = optimizer(model.named_parameters())
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
        optimizer.step()
        yield loss.item(), norm.item()


@pytest.mark.parametrize("optimizer", [adamw, momentum])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("num_microbatches", [1, 3, 20])
def test_the_reference_is_plain_training(num_microbatches, max_norm, optimizer):
    model, batches = task([8, 8, 7, 2])
    model = model.double()  # the order of additions differs, so compare far below float32's rounding
    batches = [(inputs.double(), targets) for inputs, targets in batches]
    other = copy.deepcopy(model)
    options = {"num_microbatches": num_microbatches, "max_norm": max_norm}
    found = [step[:2] for step in reference.train(model, F.cross_entropy, optimizer, batches, **options)]
    expected = list(plain(other, optimizer, batches, max_norm))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=0)
    assert all(norm > 0.05 for _, norm in found)  # the norm is that before clipping, and clipping had something to do
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-8, atol=1e-12)


def test_one_microbatch_of_a_power_of_two_is_plain_training_to_the_bit():
    model, batches = task([8, 16])
    other = copy.deepcopy(model)
    found = [step[:2] for step in reference.train(model, F.cross_entropy, momentum, batches, num_microbatches=1)]
    assert found == list(plain(other, momentum, batches))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_masks_depend_on_seed_step_and_microbatch_and_on_nothing_else():
    model, batches = task([4, 4], dropout=0.5)
    masks = []
    model[2].register_forward_hook(lambda module, args, output: masks.append((output == 0) & (args[0] != 0)))

    def run(seed):
        masks.clear()
        torch.manual_seed(len(masks))
        state = torch.get_rng_state()
        list(reference.train(model, F.cross_entropy, adamw, batches, num_microbatches=2, seed=seed, draws=["2"]))
        assert torch.equal(torch.get_rng_state(), state)  # the generator is as before
        return [mask.clone() for mask in masks]

    first, again, other = run(0), run(0), run(1)
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    distinct = [*first, *other]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])
