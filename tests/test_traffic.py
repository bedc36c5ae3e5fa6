"""What a step costs in messages, copies, memory and threads: counted, on ranks that talk as processes do."""

import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from layers import adamw
from torch import nn
from unsplit import make_plan

from modelpar.capture.objective import Objective
from modelpar.planning import schedules
from modelpar.planning.graph import BATCH
from modelpar.planning.schedule import Action, Op, gives
from modelpar.run import workers as workers_module
from modelpar.run.channel import Channel, pair
from modelpar.run.clocks import read_clock
from modelpar.run.launch.threads import ThreadLaunch
from modelpar.run.pipeline import Pipeline
from modelpar.run.pool import Pool
from modelpar.run.transport import CONTROLLER, Mailbox
from modelpar.run.worker import Worker
from modelpar.run.workers import Workers

WIDTH, SAMPLES, MICROBATCHES = 512, 32, 8  # 8 KB per value and micro-batch: in shared memory
NARROW = 64  # 1 KB: in the datagram


class ByChannel:
    """A transport that sends everything through a channel, and notes what."""

    def __init__(self, channel):
        self.channel, self.sent = channel, []

    def give(self, to, key, value):
        self.sent.append((to, key))
        self.channel.send(to, key, value)

    send = give

    def flush(self):
        self.channel.flush()

    def read_clock(self, rank):
        return read_clock()


class ChannelThreads(ThreadLaunch):
    """Ranks as threads that talk through channels, so that a test can look into them."""

    def __init__(self, num_ranks, routes):
        ends = {address: pair() for address in (CONTROLLER, *range(num_ranks))}
        channels = {
            address: Channel(address, ends[address][0], {to: way.dup() for to, (_, way) in ends.items()})
            for address in ends
        }
        for _, way in ends.values():
            way.close()
        self.transport = ByChannel(channels[CONTROLLER])
        self.transports = [ByChannel(channels[rank]) for rank in range(num_ranks)]
        self.channels = channels
        self.mailbox = Mailbox(routes, channels[CONTROLLER])
        self._mailboxes = [Mailbox(inbox=channels[rank]) for rank in range(num_ranks)]
        lock = threading.RLock()
        self._workers = [
            Worker(rank, box, transport, lock)
            for rank, (box, transport) in enumerate(zip(self._mailboxes, self.transports, strict=True))
        ]
        self._threads = [threading.Thread(target=worker.serve, daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def close(self):
        for channel in self.channels.values():
            channel.close()


@pytest.fixture
def traffic(monkeypatch):
    """Counts slots taken and datagrams sent by each process's channel."""
    counts = Counter()
    take, put = Pool.take, Channel._put

    def counted_take(self, num_bytes):
        counts["slots"] += 1
        return take(self, num_bytes)

    def counted_put(self, to, datagram, rights):
        counts["datagrams"] += 1
        counts["descriptors"] += len(rights)
        put(self, to, datagram, rights)

    monkeypatch.setattr(Pool, "take", counted_take)
    monkeypatch.setattr(Channel, "_put", counted_put)
    monkeypatch.setattr(workers_module, "ThreadLaunch", ChannelThreads)
    return counts


def objective_and_batch(width=WIDTH):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    batch = torch.randn(SAMPLES, width), torch.randint(width, (SAMPLES,))
    return Objective(model, F.cross_entropy), batch


@pytest.mark.parametrize("schedule", [schedules.gpipe, schedules.one_f_one_b])
@pytest.mark.parametrize(("width", "carrier"), [(WIDTH, "shared memory"), (NARROW, "datagram")])
def test_a_steady_step_sends_one_datagram_per_value_and_takes_no_new_memory(traffic, schedule, width, carrier):
    objective, batch = objective_and_batch(width)
    plan = make_plan(objective, batch, num_ranks=2, num_microbatches=MICROBATCHES, schedule=schedule)
    with (
        Workers(2, transport="threads") as workers,
        Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline,
    ):
        launch = workers._launch
        for _ in range(3):
            pipeline.step(batch)
        pools = [channel._pool for channel in launch.channels.values()]
        memory, threads = [pool.num_bytes for pool in pools], threading.active_count()
        traffic.clear()
        for transport in (launch.transport, *launch.transports):
            transport.sent.clear()
        steps = 5
        for _ in range(steps):
            pipeline.step(batch)
        assert [pool.num_bytes for pool in pools] == memory
        assert threading.active_count() == threads
        sent = [key for transport in (launch.transport, *launch.transports) for _, key in transport.sent]
    actions = [action for rank in range(2) for action in plan.schedule.actions(rank)]
    actions += [Action(stage, Op.UPDATE) for stage in range(2)]
    values = [key for action in actions for key in gives(plan.stage_graph, action)]
    fed = 2 * MICROBATCHES  # inputs to the first stage, targets to the last
    commands = replies = 2
    assert len(sent) == steps * (len(values) + fed + commands + replies)
    assert [edge.carrier for edge in plan.edges] == [carrier]
    large = sum(key.kind in ("value", "grad") and BATCH not in (key.source, key.target) for key in values)
    slots = large + MICROBATCHES if carrier == "shared memory" else 0  # inputs, too, are as large as values
    assert traffic["slots"] == steps * slots  # one copy each; targets, norms and counts are in the datagram
    assert traffic["descriptors"] == 0
    assert len(sent) <= traffic["datagrams"] <= len(sent) + steps * 5  # the rest says which slots are free again


def test_evaluating_takes_no_more_memory_the_longer_it_lasts(traffic):
    objective, batch = objective_and_batch()
    plan = make_plan(objective, batch, num_ranks=2, num_microbatches=MICROBATCHES)
    with (
        Workers(2, transport="threads") as workers,
        Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline,
    ):
        pipeline.evaluate([batch] * 3)
        pools = [channel._pool for channel in workers._launch.channels.values()]
        memory = [pool.num_bytes for pool in pools]
        pipeline.evaluate([batch] * 20)
        assert sum(pool.num_bytes for pool in pools) <= 1.5 * sum(memory)
        outputs = [pipeline.predict(batch[0]) for _ in range(20)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
