"""Reads layer profiles in PipeDream's format: what its profiler wrote of a model, with how its layers are connected.

::

    node4 -- Conv2d(3, 64) -- forward_compute_time=5.1, backward_compute_time=9.8, activation_size=6e6, …   ms, bytes
    node5 -- ReLU() -- forward_compute_time=0.2, …
        node4 -- node5

(Narayanan et al., PipeDream, SOSP 2019.) A line that begins with a tab is an edge, any other a layer; their order means
nothing. The times are of a whole batch, which is one micro-batch here, of one sample.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from modelpar.errors import ConfigError
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, Value
from modelpar.planning.profile import LayerCost, Profile

_NODE = re.compile(r"node(\d+) -- (.*) -- ([^=]*=.*)")
_EDGE = re.compile(r"\tnode(\d+) -- node(\d+)\s*")
_FIELD = re.compile(r"(\w+)=(\[[^]]*\]|[^,\s]+)")
_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
_PARAMETER_BYTES = 4


class _Node(NamedTuple):
    kind: str
    forward_seconds: float
    backward_seconds: float
    activation_bytes: float
    parameter_bytes: float


def read_pipedream(path: str | Path) -> tuple[ModelGraph, Profile]:
    """Returns the layers, in an order in which each comes after what it needs (by number, where that is free), and
    what they cost. Inputs that nothing feeds and `__getitem__` that nothing uses are left out, as PipeDream does.

    A backward counts as input gradient. Activations are taken to be kept from forward to backward, parameters to be
    float32. Raises ConfigError, with the line, for what cannot be read.
    """
    nodes, edges = _parse(path)
    after, before = defaultdict[int, set[int]](set), defaultdict[int, set[int]](set)
    for first, second in edges:
        after[first].add(second)
        before[second].add(first)
    dropped = {n for n, node in nodes.items() if node.kind.startswith("Input") and not before[n]}
    dropped |= {n for n, node in nodes.items() if node.kind.startswith("__getitem__") and not after[n]}
    order = _in_order({n: before[n] - dropped for n in nodes if n not in dropped}, path)
    place = {n: i for i, n in enumerate(order)}
    values, layers, costs = [], [], []
    for n, i in place.items():
        node, consumers = nodes[n], tuple(sorted(place[c] for c in after[n] if c in place))
        values.append(Value(f"node{n}.output", i, consumers or (BATCH,), node.activation_bytes))
        size = round(node.parameter_bytes)
        parameter = Parameter(f"node{n}.parameters", (size // _PARAMETER_BYTES,), "float32", trainable=True)
        layers.append(Layer(f"node{n}", node.kind, (parameter,) if size else ()))
        costs.append(
            LayerCost(
                name=f"node{n}",
                forward_seconds=node.forward_seconds,
                input_grad_seconds=node.backward_seconds,
                weight_grad_seconds=0.0,
                parameter_bytes=size,
                saved_bytes=round(node.activation_bytes),
                output_bytes=round(node.activation_bytes),
                kept_bytes=round(node.activation_bytes),
            )
        )
    graph = ModelGraph(tuple(layers), tuple(values), tuple(range(1, len(layers))))
    return graph, Profile(tuple(costs), 1, "measured", device="", num_ranks=0)


def _parse(path: str | Path) -> tuple[dict[int, _Node], list[tuple[int, int]]]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text; expected a profile in PipeDream's format") from error
    nodes, edges = dict[int, _Node](), []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if edge := _EDGE.fullmatch(line):
            edges.append((int(edge[1]), int(edge[2])))
        elif node := _NODE.fullmatch(line.strip()):
            nodes[int(node[1])] = _Node(node[2], *_numbers(node[3], where))
        elif line.strip():
            raise ConfigError(
                f"{where} is {line[:60]!r}; expected node1 -- name -- {'=…, '.join(_FIELDS)}=…, or an edge"
            )
    if not nodes:
        raise ConfigError(f"{path} has no layers; expected a profile in PipeDream's format")
    if unknown := [n for pair in edges for n in pair if n not in nodes]:
        raise ConfigError(f"{path} has an edge with node{unknown[0]}, but no such layer")
    return nodes, edges


def _numbers(text: str, where: str) -> tuple[float, float, float, float]:
    """Returns seconds forward and backward, and bytes. A layer with several outputs lists their sizes: [8.0; 2.0]."""
    found = {}
    for name, value in _FIELD.findall(text):
        if name in _FIELDS:
            try:
                found[name] = sum(float(part) for part in value.strip("[]").split(";"))
            except ValueError:
                raise ConfigError(f"{where} has {name}={value}; expected a number") from None
            if not 0 <= found[name] < float("inf"):
                raise ConfigError(f"{where} has {name}={value}; expected a number from 0 up")
    if missing := [name for name in _FIELDS if name not in found]:
        raise ConfigError(f"{where} has no {missing[0]}")
    forward, backward, activation, parameter = (found[name] for name in _FIELDS)
    return forward / 1e3, backward / 1e3, activation, parameter


def _in_order(before: dict[int, set[int]], path: str | Path) -> list[int]:
    """Returns the nodes, each after those before it; of several that may come, the smallest first."""
    after, waits = defaultdict[int, list[int]](list), {n: len(needed) for n, needed in before.items()}
    for n, needed in before.items():
        for source in needed:
            after[source].append(n)
    free = [n for n, count in waits.items() if not count]
    heapq.heapify(free)
    order = []
    while free:
        order.append(heapq.heappop(free))
        for n in after[order[-1]]:
            waits[n] -= 1
            if not waits[n]:
                heapq.heappush(free, n)
    if len(order) < len(before):
        stuck = min(n for n, count in waits.items() if count)
        raise ConfigError(f"{path}: node{stuck} needs itself, through other layers; expected no cycles")
    return order
