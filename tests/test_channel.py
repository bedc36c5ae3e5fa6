"""Values between processes of one host: they arrive as they were, memory is used again, nothing is left or stuck."""

import gc
import os
import pickle
import signal
import time
from collections import OrderedDict
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from threaded import in_thread
from torch import nn
from views import views

from modelpar.planning.edges import INLINE_BYTES
from modelpar.planning.schedule import ValueKey
from modelpar.run.channel import Channel, pair
from modelpar.run.layout import ALIGNMENT
from modelpar.run.pool import Pool, slot_size
from modelpar.run.transport import Mailbox, Unreachable

LARGE = INLINE_BYTES  # as many floats take four times as many bytes


class Two:
    """Two channels, as two processes have them, and the mailboxes that take from them."""

    def __init__(self):
        ends = [pair(), pair()]
        ways = [end for _, end in ends]
        self.channels = [Channel(i, ends[i][0], {to: way.dup() for to, way in enumerate(ways)}) for i in range(2)]
        for way in ways:
            way.close()
        self.boxes = [Mailbox(inbox=channel) for channel in self.channels]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for channel in self.channels:
            channel.close()

    def echo(self, value, key=(1, "x")):
        """Sends from the first to the second, and returns what arrives there."""
        self.channels[0].send(1, key, value)
        return self.boxes[1].wait(key)

    def pool(self, number=0):
        """Returns the pool of one of the two."""
        return self.channels[number]._pool


@pytest.fixture
def two():
    with Two() as two:
        yield two


@given(views())
@settings(max_examples=200, deadline=None)
def test_any_view_arrives_with_its_values_strides_and_place_in_a_vector(tensor):
    with Two() as two:
        for value in (tensor, (tensor, tensor.new_zeros(LARGE))):  # in the datagram, and in shared memory
            arrived = two.echo(value)
            found = arrived if value is tensor else arrived[0]
            assert type(arrived) is type(value)
            assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
            assert torch.equal(found, tensor)
            if tensor.numel():
                assert found.data_ptr() % ALIGNMENT == tensor.data_ptr() % ALIGNMENT


def test_any_nesting_arrives_and_tensors_that_need_a_gradient_are_leaves_that_do(two):
    made = torch.ones(LARGE, requires_grad=True) * 2
    value = OrderedDict(a=[made, None, "text"], b=(3, torch.tensor(4.5)), c=nn.Parameter(torch.zeros(2)))
    found = two.echo(value, (7, ValueKey("value", "h", 3, 0, 1)))
    assert list(found) == ["a", "b", "c"]
    assert found["a"][1:] == [None, "text"]
    assert torch.equal(found["a"][0], made)
    assert found["a"][0].is_leaf
    assert found["a"][0].requires_grad
    assert found["c"].requires_grad
    assert found["b"][0] == 3
    assert not found["b"][1].requires_grad


def test_sparse_tensors_arrive(two):
    assert torch.equal(two.echo(torch.eye(3).to_sparse()).to_dense(), torch.eye(3))


def test_the_receiver_sees_nothing_that_the_sender_writes_afterwards(two):
    tensor = torch.ones(LARGE)
    found = two.echo(tensor)
    tensor.zero_()
    assert torch.equal(found, torch.ones(LARGE))


def test_a_slot_is_used_again_once_its_tensors_are_gone_and_not_before(two):
    first = two.echo((torch.ones(LARGE), torch.ones(LARGE)), (1, "a"))
    kept = first[1].view(-1)[5:]  # a view of one of the two is enough
    del first
    two.echo(torch.zeros(2 * LARGE), (1, "b"))
    assert torch.equal(kept, torch.ones(LARGE - 5))
    del kept
    two.channels[1].flush()
    two.boxes[0].has("nothing")
    used = two.pool().num_bytes
    for i in range(50):
        two.echo(torch.zeros(2 * LARGE), (1, i))
        two.channels[1].flush()
    assert two.pool().num_bytes == used


def test_freed_slots_are_told_with_what_is_sent_anyway_or_when_there_are_many(two):
    for i in range(40):  # nothing is ever sent the other way, as in evaluation
        two.echo(torch.zeros(LARGE), (1, i))
        two.boxes[0].has("nothing")
    pages = -(-4 * LARGE // os.sysconf("SC_PAGESIZE")) * os.sysconf("SC_PAGESIZE")
    assert two.pool().num_bytes <= 12 * pages


def test_what_does_not_fit_into_a_datagram_arrives(two):
    long = "x" * 1_000_000
    assert two.echo(long) == long
    many = [torch.tensor(float(i)) for i in range(20_000)]
    assert torch.equal(torch.stack(two.echo(many)), torch.stack(many))
    held = [two.echo(torch.zeros(LARGE), (2, i)) for i in range(2_000)]
    del held  # as many slots to release at once
    assert two.channels[1]._freed[0]
    two.channels[1].flush()
    assert not two.channels[1]._freed[0]
    two.boxes[0].has("nothing")
    used = two.pool().num_bytes
    held = [two.echo(torch.zeros(LARGE), (3, i)) for i in range(2_000)]
    assert len(held) == 2_000
    assert two.pool().num_bytes == used


def test_two_that_send_more_than_sockets_hold_before_they_take_do_not_block_each_other(two):
    count = 3_000

    def run(me):
        for i in range(count):
            two.channels[me].send(1 - me, (1, i), torch.full((700,), float(i)))
        return all(two.boxes[me].wait((1, i))[0] == i for i in range(count))

    results = [in_thread(lambda me=me: run(me)) for me in range(2)]
    assert all(result() for result in results)


def test_a_taker_is_woken_by_another_thread_of_its_process_and_by_closing(two):
    result = in_thread(lambda: two.boxes[0].wait((1, "x")))
    two.boxes[0].put((1, "x"), "from a thread")
    assert result() == "from a thread"
    result = in_thread(lambda: two.boxes[0].wait((1, "never")))
    two.boxes[0].close(KeyError("closed"))
    with pytest.raises(KeyError, match="closed"):
        result()


def test_a_wait_with_a_deadline_ends(two):
    assert two.boxes[0].wait_for((1, "x"), time.monotonic() + 0.01) is False
    two.channels[1].send(0, (1, "x"), "in time")
    assert two.boxes[0].wait_for((1, "x"), time.monotonic() + 10) is True


def test_a_receiver_that_is_gone_is_unreachable(two):
    two.channels[1].close()
    with pytest.raises(Unreachable, match="not delivered"):
        two.channels[0].send(1, (1, "x"), torch.zeros(3))


def test_a_value_that_cannot_be_pickled_takes_no_slot(two):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        two.channels[0].send(1, (1, "x"), (torch.zeros(LARGE), lambda: None))
    assert two.pool().num_bytes == 0


def test_slots_are_whole_pages_and_hardly_larger_than_asked_for():
    page = os.sysconf("SC_PAGESIZE")
    for num_bytes in (1, page, page + 1, 100_000, 1 << 20, (1 << 20) + 1, 5_000_001):
        size = slot_size(num_bytes)
        assert size >= num_bytes
        assert size % page == 0
        assert size <= max(page, 1.25 * num_bytes) + page
    pool = Pool()
    (a, _), (b, _), (c, _) = pool.take(100), pool.take(200), pool.take(3 * page)
    assert len({a, b, c}) == 3
    pool.give_back(b)
    assert pool.take(300)[0] == b
    assert pool.num_bytes == 0  # nothing was written
    pool.close()


def _hold(connection, descriptor):
    pool = Pool()
    _, memory = pool.take(1 << 20)
    memory[:] = 1
    connection.send(pool.num_bytes)
    time.sleep(60)


def test_nothing_is_left_of_a_pool_whose_process_was_killed():
    before = set(os.listdir("/dev/shm"))
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(theirs, None))
    process.start()
    assert ours.recv() == 1 << 20
    assert set(os.listdir("/dev/shm")) == before
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    ours.close()
    theirs.close()
    process.close()
    gc.collect()
    assert set(os.listdir("/dev/shm")) == before
