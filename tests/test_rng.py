"""Random numbers keyed by what is drawn for, not by where."""

import itertools
import threading

import pytest
import torch
from torch import nn

from modelpar.run.rng import KeyedRandom, random_key

CPU = torch.device("cpu")


def test_keys_differ_in_every_part_and_fit_a_seed():
    parts = itertools.product(range(3), (-1, 0, 12), range(3), ("a", "a.b", ""), range(3))
    keys = [random_key(*part) for part in parts]
    assert len(set(keys)) == 3**5
    assert all(0 <= key < 2**63 for key in keys)
    assert random_key(0, 11, 1, "a", 0) != random_key(0, 1, 11, "a", 0)


def masks(random, model, x, step, microbatch):
    with random.microbatch(step, microbatch):
        return model(x)


def test_a_module_draws_the_same_wherever_it_is():
    x = torch.ones(64)
    whole = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    part = nn.Sequential()
    part.add_module("1", nn.Dropout(0.5))
    first, second = KeyedRandom(whole, ["0", "1"], 7, CPU), KeyedRandom(part, ["1"], 7, CPU)
    torch.manual_seed(1)
    both = masks(first, whole, x, 3, 2)
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    with first.microbatch(3, 2):
        x_after = whole[0].eval()(x)
    alone = masks(second, part, x_after, 3, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal((both != 0) & True, (both != 0) & (alone != 0))  # what is left is left by the second too
    assert not torch.equal(alone, masks(second, part, x_after, 3, 1))
    assert not torch.equal(alone, masks(second, part, x_after, 2, 2))
    assert torch.equal(alone, masks(second, part, x_after, 3, 2))


def test_calls_of_one_module_differ_and_count_from_zero_again():
    drop = nn.Dropout(0.5)
    model = nn.Sequential(drop)
    random = KeyedRandom(model, ["0"], 0, CPU)
    x = torch.ones(64)
    with random.microbatch(0, 0):
        first, second = model(x), model(x)
    assert not torch.equal(first, second)
    with random.microbatch(0, 0):
        assert torch.equal(model(x), first)


def test_the_generator_is_restored_also_after_an_exception():
    class Bad(nn.Module):
        def forward(self, x):
            torch.rand(3)
            raise ValueError("no")

    model = nn.Sequential(Bad())
    lock = threading.RLock()
    state = torch.get_rng_state()
    random = KeyedRandom(model, ["0"], 0, CPU, lock)
    with random.microbatch(0, 0), pytest.raises(ValueError, match="no"):
        model(torch.ones(1))
    assert torch.equal(torch.get_rng_state(), state)
    taken = []
    other = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=5)))
    other.start()
    other.join()
    assert taken == [True]


def test_threads_that_share_a_generator_do_not_mix():
    lock, x = threading.RLock(), torch.ones(20_000)
    models = [nn.Sequential(nn.Dropout(0.5)) for _ in range(4)]
    randoms = [KeyedRandom(model, ["0"], seed, CPU, lock) for seed, model in enumerate(models)]
    expected = [masks(random, model, x, 0, 0) for random, model in zip(randoms, models, strict=True)]
    wrong = []

    def work(random, model, wanted):
        for _ in range(30):
            if not torch.equal(masks(random, model, x, 0, 0), wanted):
                wrong.append(random)

    parts = [threading.Thread(target=work, args=each) for each in zip(randoms, models, expected, strict=True)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert wrong == []
