"""Numbers that code reads off tensors, with where they come from: FloatNumber and IntNumber.

A metric is read with `.item()`, multiplied by 100 and returned. Such arithmetic makes nodes, as that of tensors does,
so that each micro-batch's own number is returned. For comparisons, and all else in Python, it is a plain number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from modelpar.capture.recording import Ref

Operate = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""Computes something of numbers as a node."""


class FloatNumber(float):
    """A float that knows which node returned it."""

    ref: Ref
    operate: Operate

    def __reduce__(self) -> Any:
        """Pickles and copies as a plain number."""
        return float, (plain(self),)


class IntNumber(int):
    """An int that knows which node returned it."""

    ref: Ref
    operate: Operate

    def __reduce__(self) -> Any:
        """Pickles and copies as a plain number."""
        return int, (plain(self),)


def number(value: Any, ref: Ref, operate: Operate) -> Any:
    """Returns a number that knows where it comes from; anything but an int or a float as it is."""
    if type(value) not in (int, float):
        return value
    found = IntNumber(value) if type(value) is int else FloatNumber(value)
    found.ref, found.operate = ref, operate
    return found


def plain(value: Any) -> Any:
    """Returns a number without where it comes from."""
    if isinstance(value, FloatNumber):
        return float.__float__(value)
    return int.__int__(value) if isinstance(value, IntNumber) else value


def _method(function: Callable[..., Any], reflected: bool) -> Any:
    def method(self: Any, *others: Any) -> Any:
        if not all(isinstance(other, (int, float)) for other in others):
            return NotImplemented
        return self.operate(function, (*others, self) if reflected else (self, *others))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _kind in (FloatNumber, IntNumber):
        setattr(_kind, f"__{_name}__", _method(getattr(operator, _name), False))
        setattr(_kind, f"__r{_name}__", _method(getattr(operator, _name), True))
for _name in ("neg", "pos", "abs"):
    for _kind in (FloatNumber, IntNumber):
        setattr(_kind, f"__{_name}__", _method(getattr(operator, _name), False))
for _kind in (FloatNumber, IntNumber):
    _kind.__round__ = _method(round, False)  # type: ignore[attr-defined]
