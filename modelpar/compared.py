"""Two sets of numbers, compared to the bit; where they differ, it says where first and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelpar.capture import trees
from modelpar.planning.verdict import Check

SAME = "equal to the bit"


def compare_values(what: str, found: Sequence[float], expected: Sequence[float]) -> Check:
    """Compares numbers, step by step; nan is equal to nan."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs and not (ours != ours and theirs != theirs):
            where = f"step {i}: " if len(expected) > 1 else ""
            return Check(what, False, f"{where}{ours!r}, unsplit {theirs!r}")
    shown = ", ".join(f"{value:.6g}" for value in expected[:3]) + (", …" if len(expected) > 3 else "")
    return Check(what, True, f"{SAME}: {shown}")


def compare_states(what: str, found: dict[str, Any], expected: dict[str, Any], order: Sequence[str] = ()) -> Check:
    """Compares tensors by name. `order` is that in which they were computed, which tells what differs first."""
    names = [name for name, value in expected.items() if isinstance(value, Tensor)]
    place = {name: i for i, name in reversed([*enumerate(order)])}
    names.sort(key=lambda name: place.get(name, len(place)))
    differences = {}
    for name in names:
        if differs := _difference(found.get(name), expected[name]):
            differences[name] = differs
    if not differences:
        return Check(what, True, f"{len(names)} {SAME}" if len(names) > 1 else SAME)
    first, most = next(iter(differences)), max(differences, key=lambda name: differences[name][0])
    detail = f"{len(differences)} of {len(names)} differ, first {first}: {differences[first][1]}"
    return Check(what, False, detail if most == first else f"{detail}; most {most}: {differences[most][1]}")


def compare_outputs(what: str, found: Sequence[Any], expected: Sequence[Any]) -> Check:
    """Compares the tensors in outputs, sample by sample."""
    number = 0
    for i, (here, there) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = trees.tensors_of(here), trees.tensors_of(there)
        if len(ours) != len(theirs):
            return Check(what, False, f"sample {i}: {len(ours)} tensors, unsplit {len(theirs)}")
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if differs := _difference(a, b):
                which = f", tensor {k} of {len(theirs)}" if len(theirs) > 1 else ""
                return Check(what, False, f"sample {i}{which}: {differs[1]}")
        number += len(ours)
    return Check(what, number > 0, f"{len(expected)} samples {SAME}" if number else "the outputs have no tensors")


def _difference(here: Any, there: Tensor) -> tuple[float, str] | None:
    """Returns the largest absolute difference, inf where the tensors are of different kinds, and the same in words."""
    if not isinstance(here, Tensor):
        return float("inf"), "not there"
    if here.shape != there.shape or here.dtype != there.dtype:
        return float("inf"), f"{here.dtype} {list(here.shape)}, unsplit {there.dtype} {list(there.shape)}"
    here, there = here.detach().cpu(), there.detach().cpu()
    differ = (here != there) & ~((here != here) & (there != there))
    if not differ.any():
        return None
    dtype = torch.complex128 if there.is_complex() else torch.float64
    distance = (here.to(dtype) - there.to(dtype)).abs().nan_to_num(float("inf"))
    largest = float(distance[differ].max())
    return largest, f"by at most {largest:.3g} where values are up to {float(there.to(dtype).abs().max()):.3g}"
