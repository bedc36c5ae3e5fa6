"""Mailboxes: each value put once, taken once, by whoever waits for it."""

import time

import pytest
from threaded import in_thread

from modelpar.run.transport import CONTROLLER, Mailbox, ThreadTransport


def test_a_value_is_taken_once_before_or_after_it_is_awaited():
    box = Mailbox()
    box.put((1, "early"), "a")
    assert box.has((1, "early"))
    assert box.wait((1, "early")) == "a"
    assert not box.has((1, "early"))
    result = in_thread(lambda: box.wait((1, "late")))
    box.put((1, "other"), "b")
    box.put((1, "late"), "c")
    assert result() == "c"
    assert box.left(1) == [(1, "other")]


def test_a_value_sent_twice_is_a_bug():
    box = Mailbox()
    box.put((1, "x"), 1)
    box.put((1, "x"), 2)
    with pytest.raises(AssertionError, match="was sent twice"):
        box.wait((1, "y"))


def test_a_wait_with_a_deadline_says_whether_it_came():
    box = Mailbox()
    assert box.wait_for((1, "x"), time.monotonic() + 0.01) is False
    box.put((1, "x"), 1)
    assert box.wait_for((1, "x"), time.monotonic()) is True
    assert box.wait((1, "x")) == 1


def test_closing_ends_every_wait_with_the_first_error():
    box = Mailbox()
    result = in_thread(lambda: box.wait((1, "never")))
    box.close(KeyError("first"))
    box.close(ValueError("second"))
    with pytest.raises(KeyError, match="first"):
        result()
    with pytest.raises(KeyError, match="first"):
        box.wait((1, "again"))


def test_a_discarded_run_is_dropped_also_what_is_still_to_come():
    box = Mailbox()
    box.put((1, "x"), 1)
    box.put((2, "x"), 2)
    box.discard(1)
    box.put((1, "y"), 3)
    assert box.left(1) == []
    assert box.wait((2, "x")) == 2


def test_routed_kinds_are_handed_on_at_once():
    seen = []
    box = Mailbox({"heartbeat": lambda key, value: seen.append((key, value))})
    box.put(("heartbeat", 3), "alive")
    box.put(("heartbeat", 3), "alive")
    assert seen == [(("heartbeat", 3), "alive")] * 2


def test_threads_send_to_each_other_and_to_the_controller():
    boxes, controller = [Mailbox(), Mailbox()], Mailbox()
    transport = ThreadTransport(boxes, controller)
    transport.send(1, (0, "x"), "to one")
    transport.send(CONTROLLER, (0, "x"), "to the controller")
    transport.flush()
    assert boxes[1].wait((0, "x")) == "to one"
    assert controller.wait((0, "x")) == "to the controller"
    assert not boxes[0].has((0, "x"))
