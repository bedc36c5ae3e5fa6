"""Checks any object against the Trace Event Format, as Perfetto and chrome://tracing read it.

Perfetto goes through the events once, in order of time. It binds each end of an arrow to the slice that is open on the
same lane then (chrome://tracing, on the edge between two, to the first), drops slices that overlap their neighbours,
and cuts times off to whole nanoseconds in some versions and rounds them in others.
"""

from __future__ import annotations

import json
from numbers import Real
from typing import Any, NamedTuple

Event = dict[str, Any]
_NAMES = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


class Arrow(NamedTuple):
    """Two slices and the ends of the arrow between them."""

    source: Event
    target: Event
    start: Event
    end: Event


def ns(us: float) -> int:
    """Returns whole nanoseconds; fails where cutting off and rounding differ."""
    assert int(us * 1000.0) == round(us * 1000.0), f"{us!r} µs is another time when it is cut off than when rounded"
    return int(us * 1000.0)


def end_of(event: Event) -> int:
    return ns(event["ts"]) + ns(event["dur"])


def check(trace: Any) -> list[Arrow]:
    """Returns the arrows of a trace; fails with what is wrong with it."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace, "not plain JSON"
    assert trace["displayTimeUnit"] in ("ms", "ns"), f"display unit {trace['displayTimeUnit']}"
    events = trace["traceEvents"]
    for event in events:
        _check_fields(event)
    timed = [event for event in events if event["ph"] != "M"]
    times = [ns(event["ts"]) for event in timed]
    assert times == sorted(times), "events are not in the order of time"
    _check_names(events)
    _check_slices(timed)
    return _arrows(timed)


def _check_fields(event: Event) -> None:
    kind = event.get("ph")
    assert kind in ("M", "X", "C", "s", "f"), f"unknown phase in {event}"
    for key in ("pid", "tid"):
        assert type(event[key]) is int, f"{key} of {event} is not a whole number"
        assert 0 < event[key] < 2**32, f"{key} of {event} is out of range; 0 is the idle process"
    assert type(event["name"]) is str, f"{event} has no name"
    assert event["name"], f"{event} has an empty name"
    if kind == "M":
        key, of = _NAMES[event["name"]]
        assert type(event["args"][key]) is of, f"{event} lacks {key}"
        return
    for key in ("ts", "dur") if kind == "X" else ("ts",):
        value = event[key]
        assert isinstance(value, Real), f"{key} of {event} is no number"
        assert value >= 0, f"{key} of {event} is negative"
    if kind == "C":
        assert event["args"], f"{event} counts nothing"
        assert all(isinstance(value, Real) for value in event["args"].values()), f"{event} counts something odd"
    if kind in "sf":
        assert type(event["id"]) is int, f"{event} has no id"
        assert event["cat"], f"{event} has no category"
    if kind == "f":
        assert event.get("bp") == "e", f"{event} would be bound to the slice after it"


def _check_names(events: list[Event]) -> None:
    """Every process and lane has one name; a lane's number is that of no other lane and of no process."""
    processes: dict[int, str] = {}
    lanes: dict[int, tuple[int, str]] = {}
    for event in events:
        if event["name"] == "process_name":
            assert event["pid"] not in processes, f"process {event['pid']} has two names"
            processes[event["pid"]] = event["args"]["name"]
        if event["name"] == "thread_name":
            assert event["tid"] not in lanes, f"lane {event['tid']} has two names"
            lanes[event["tid"]] = (event["pid"], event["args"]["name"])
    assert len(set(processes.values())) == len(processes), f"processes of the same name: {processes}"
    assert len(set(lanes.values())) == len(lanes), f"lanes of the same name: {lanes}"
    assert not lanes.keys() & processes.keys(), "a lane has the number of a process"
    for event in events:
        assert event["pid"] in processes, f"the process of {event} has no name"
        if event["ph"] in "Xsf":
            assert event["tid"] in lanes, f"the lane of {event} has no name"
            assert lanes[event["tid"]][0] == event["pid"], f"the lane of {event} belongs to another process"


def _check_slices(timed: list[Event]) -> None:
    """The slices of a lane lie apart or one within the other."""
    open_ends: dict[int, list[int]] = {}
    for event in timed:
        if event["ph"] != "X":
            continue
        ends = open_ends.setdefault(event["tid"], [])
        while ends and ends[-1] <= ns(event["ts"]):
            ends.pop()
        assert not ends or end_of(event) <= ends[-1], f"{event} overlaps the slice before it on its lane"
        ends.append(end_of(event))


def _arrows(timed: list[Event]) -> list[Arrow]:
    """Binds arrows in one pass over the events."""
    top: dict[int, Event] = {}
    begun: dict[tuple[Any, ...], tuple[Event, Event]] = {}
    found: dict[tuple[Any, ...], Arrow] = {}
    for event in timed:
        if event["ph"] == "X":
            top[event["tid"]] = event
        if event["ph"] not in "sf":
            continue
        around = top.get(event["tid"])
        assert around is not None, f"{event} lies in no slice"
        assert ns(around["ts"]) < ns(event["ts"]) < end_of(around), f"{event} lies in no slice, or on its edge"
        key = (event["id"], event["cat"], event["name"])
        if event["ph"] == "s":
            assert key not in begun, f"two arrows begin as {key}"
            begun[key] = (around, event)
        else:
            assert key in begun, f"{event} comes before the beginning of its arrow, or has none"
            assert key not in found, f"two arrows end as {key}"
            found[key] = Arrow(begun[key][0], around, begun[key][1], event)
    assert begun.keys() == found.keys(), f"arrows without an end: {begun.keys() - found.keys()}"
    ids = [key[0] for key in found]
    assert len(set(ids)) == len(ids), "two arrows have the same id"
    return list(found.values())
