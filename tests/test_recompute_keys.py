"""Random numbers in code that backward runs once more: those of forward, split, unsplit, in processes and threads."""

import threading

import pytest
import torch
import torch.nn.functional as F
from layers import momentum
from reference import train
from torch import nn
from torch.utils.checkpoint import checkpoint
from unsplit import assert_same, draws, make_plan

from modelpar import Objective, verify
from modelpar.errors import RunError
from modelpar.run.pipeline import Pipeline
from modelpar.run.rng import KeyedRandom, watched_for_recomputation

CPU = torch.device("cpu")


class Plain(nn.Module):
    """Calls one dropout twice, another between, and draws itself."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.drop, self.other = nn.Dropout(0.3), nn.Dropout(0.4)

    def work(self, x):
        x = self.drop(torch.tanh(self.first(x)))
        x = x + 0.1 * torch.randn_like(x)
        x = self.other(self.second(self.drop(x)))
        return x * (1 + 0.1 * torch.rand([]))

    def forward(self, x):
        return x + self.work(x)


class Reentrant(Plain):
    def forward(self, x):
        return x + checkpoint(self.work, x, use_reentrant=True)


class NonReentrant(Plain):
    def forward(self, x):
        return x + checkpoint(self.work, x, use_reentrant=False)


class Nested(Plain):
    """A checkpoint in a checkpoint, with draws before, between and behind."""

    def inner(self, x):
        return self.other(checkpoint(self.work, self.drop(x), use_reentrant=False))

    def forward(self, x):
        return self.drop(x) + checkpoint(self.inner, x, use_reentrant=False)


class PlainNested(Plain):
    def forward(self, x):
        return self.drop(x) + self.other(self.work(self.drop(x)))


def model(kind, blocks=4):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), *[kind() for _ in range(blocks)], nn.Linear(16, 3))


def batches(number=3, size=10):
    torch.manual_seed(4)
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(number)]


def trained(kind, workers, **how):
    objective, data = Objective(model(kind), F.cross_entropy), batches()
    plan = make_plan(objective, data[0], **how)
    with Pipeline(objective, plan, workers=workers, optimizer=momentum) as pipeline:
        return [pipeline.step(batch).loss for batch in data], pipeline.state_dict(), draws(plan)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(Reentrant, Plain), (NonReentrant, Plain), (Nested, PlainNested)],
    ids=lambda kind: kind.__name__,
)
def test_a_checkpoint_changes_no_number(workers, kind, plain):
    losses, state, names = trained(kind, workers)
    unsplit = model(plain)
    steps = train(unsplit, F.cross_entropy, momentum, batches(), num_microbatches=4, draws=names)
    assert losses == [loss for loss, _, _ in steps]
    assert_same(state, unsplit.state_dict())


@pytest.mark.parametrize("kind", [Reentrant, NonReentrant, Nested])
def test_the_unsplit_side_of_verify_recomputes_with_the_same_numbers(shared_workers, kind):
    objective, batch = Objective(model(kind), F.cross_entropy), batches()[0]
    workers = shared_workers["threads"].get()
    verdict = verify(objective, batch, make_plan(objective, batch), optimizer=momentum, workers=workers, steps=1)
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


class CheckpointOfNoDraw(nn.Module):
    """Sets the generator in backward, as all checkpoints do, and draws nothing: another thread may be drawing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class ManyDraws(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        for _ in range(30):
            x = x + 0.01 * torch.randn_like(x)
        return self.layer(x)


def test_a_recomputation_in_one_thread_leaves_the_draws_of_another_alone(shared_workers):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 16), CheckpointOfNoDraw(), ManyDraws(), nn.Linear(16, 3))

    data = batches(number=4, size=32)
    objective = Objective(build(), F.cross_entropy)
    plan = make_plan(objective, data[0], num_microbatches=16)
    with Pipeline(objective, plan, workers=shared_workers["threads"].get(), optimizer=momentum) as pipeline:
        losses = [pipeline.step(batch).loss for batch in data]
    unsplit = build()
    steps = train(unsplit, F.cross_entropy, momentum, data, num_microbatches=16, draws=draws(plan))
    assert losses == [loss for loss, _, _ in steps]


def test_a_checkpoint_that_keeps_no_random_state_is_one_clear_error():
    drop = nn.Dropout(0.5)
    random = KeyedRandom(nn.Sequential(drop), ["0"], 0, CPU)
    x = torch.ones(8, requires_grad=True)
    with random.microbatch(0, 0):
        y = checkpoint(drop, x, use_reentrant=False, preserve_rng_state=False)
    with random.held(), pytest.raises(RunError, match=r"0 drew random numbers outside of forward.*preserve_rng_state"):
        y.sum().backward()


def test_a_new_step_forgets_the_one_before():
    drop = nn.Dropout(0.5)
    random = KeyedRandom(nn.Sequential(drop), ["0"], 0, CPU)
    x = torch.ones(8, requires_grad=True)
    with random.microbatch(0, 0):
        y = checkpoint(drop, x, use_reentrant=False)
    with random.microbatch(1, 0):
        drop(x)
    with random.held(), pytest.raises(RunError, match="outside of forward"):
        y.sum().backward()


def test_micro_batches_are_recomputed_in_any_order_with_their_own_numbers():
    drop = nn.Dropout(0.5)
    random = KeyedRandom(nn.Sequential(drop), ["0"], 0, CPU)
    inputs = [torch.ones(64, requires_grad=True) for _ in range(3)]
    outputs = []
    for number, x in enumerate(inputs):
        with random.microbatch(0, number):
            drop(torch.ones(3))
            outputs.append(checkpoint(lambda x: drop(drop(x) * x), x, use_reentrant=False))
    for number in (1, 2, 0):
        state = torch.get_rng_state()
        with random.held():
            outputs[number].sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        # of y = m x², m a mask that scales by 4: dy/dx = 2 m x
        assert torch.equal(inputs[number].grad, 2 * outputs[number].detach())


def test_a_module_that_seeds_the_generator_itself_does_not_lose_the_place():
    class Seeds(nn.Module):
        def forward(self, x):
            torch.manual_seed(5)
            return x + torch.rand_like(x)

    seeds, drop = Seeds(), nn.Dropout(0.5)
    random = KeyedRandom(nn.Sequential(seeds, drop), ["0", "1"], 0, CPU)
    x = torch.ones(64)
    with random.microbatch(0, 0):
        first = drop(seeds(x))
        second = drop(seeds(x))
    assert not torch.equal(first, second)
    with random.microbatch(0, 0):
        assert torch.equal(drop(seeds(x)), first)


def test_only_stages_with_checkpoints_hold_the_generator():
    lock, drop = threading.RLock(), nn.Dropout(0.5)
    random = KeyedRandom(nn.Sequential(drop), ["0"], 0, CPU, lock)

    def is_free():
        taken = []
        other = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False) and (lock.release() or True)))
        other.start()
        other.join()
        return bool(taken[0])

    for recomputes in (True, False):
        with random.microbatch(0, 0, recomputes=recomputes):
            drop(torch.ones(3))
            assert is_free() is not recomputes
        with random.held(recomputes):
            assert is_free() is not recomputes


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_noticed(reentrant):
    x = torch.ones(3, requires_grad=True)
    with watched_for_recomputation() as found:
        torch.tanh(x)
    assert not found
    with watched_for_recomputation() as found:
        checkpoint(torch.tanh, x, use_reentrant=reentrant)
    assert found
