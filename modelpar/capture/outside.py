"""What a model and its loss must not take from outside: parameters that nobody trains, random numbers not torch's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.errors import CaptureError

_PYTHONS, _NUMPYS = random.random.__self__, np.random.rand.__self__  # type: ignore[attr-defined]
"""The global generators."""


def parameters_under(tree: Any) -> dict[int, Tensor]:
    """Returns the tensors, by id, that a backward from a tree's tensors would give a gradient."""
    found: dict[int, Tensor] = {id(t): t for t in trees.tensors_of(tree) if t.is_leaf and t.requires_grad}
    todo: list[Any] = [t.grad_fn for t in trees.tensors_of(tree) if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found[id(variable)] = variable
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        todo += new
    return found


def foreign(tree: Any, model: nn.Module) -> dict[int, Tensor]:
    """Returns those of `parameters_under` a tree that are no part of a model."""
    own = set(map(id, model.parameters()))
    return {number: tensor for number, tensor in parameters_under(tree).items() if number not in own}


def refuse_foreign(tensor: Tensor, model: nn.Module, loss: Any, by_loss: bool) -> None:
    """Raises CaptureError for a tensor that is no part of the model, saying where it is held if that can be found."""
    places = _places_of_loss(loss) if by_loss else _places_of_model(model)
    where = next((f", {place}," for place, value in places if _holds(value, tensor)), "")
    raise CaptureError(
        f"the {'loss' if by_loss else 'model'} uses a parameter of shape {list(tensor.shape)}{where} that is no "
        "parameter of the model: nobody would train it; expected it in an attribute of one of the model's modules, or "
        "without requires_grad"
    )


def _places_of_model(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                yield f"{key!r} of {name or 'the model itself'}", value


def _places_of_loss(loss: Any) -> Iterator[tuple[str, Any]]:
    code = getattr(loss, "__code__", None)
    if code is not None:
        cells = zip(code.co_freevars, loss.__closure__ or (), strict=True)
        yield from ((f"{name!r} of the loss", cell) for name, cell in cells)
        known = loss.__globals__
        yield from ((f"the global {name!r}", known[name]) for name in code.co_names if name in known)
    yield "held by the loss", loss


def _holds(value: Any, tensor: Tensor, depth: int = 5) -> bool:
    """Tells whether a tensor can be reached from a value, through what usually holds one."""
    if value is tensor:
        return True
    if depth == 0 or isinstance(value, (Tensor, str, bytes, int, float, type)):
        return False
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = [*value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = [*value]
    elif isinstance(value, nn.Module):
        return any(p is tensor for p in value.parameters())
    elif isinstance(value, partial):
        inside = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        inside = [value.__self__]
    elif hasattr(value, "cell_contents"):
        inside = [value.cell_contents]
    elif hasattr(value, "__code__"):
        inside = [*(value.__closure__ or ()), value.__defaults__]
    elif hasattr(value, "__dict__") and not hasattr(value, "__path__"):
        inside = [vars(value)]
    return any(_holds(part, tensor, depth - 1) for part in inside)


def other_generators() -> Any:
    """Returns the states of Python's and numpy's global generators, to be compared."""
    state = np.random.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:])  # type: ignore[union-attr]


def refuse_draws(what: str, run: Callable[[], Any], model: nn.Module) -> None:
    """Raises CaptureError if code draws from Python's or numpy's global generator when it runs once more.

    Other threads may draw from them meanwhile, so their states alone do not tell. Calls of numpy's functions cannot be
    seen: there it counts that a function ran whose code names one.
    """
    found: list[tuple[str, str]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if found or event not in ("call", "c_call"):
            return
        if getattr(arg, "__self__", None) is _PYTHONS if event == "c_call" else _names_numpys(frame):
            found.append(_place(frame, names))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    for module, line in found:
        where = f"{what}, in {module}," if module else what
        raise CaptureError(
            f"{where} draws random numbers that are not torch's ({line}): they would depend on the split; expected "
            "torch.rand and the like"
        )


def _names_numpys(frame: FrameType) -> bool:
    """Tells whether a function's code names one of numpy's that draw, by itself or as an attribute."""
    named, known = frame.f_code.co_names, frame.f_globals
    if any(getattr(known.get(name), "__self__", None) is _NUMPYS for name in named):
        return True
    modules = any(known.get(name) in (np, np.random) for name in named if isinstance(known.get(name), ModuleType))
    return modules and any(getattr(getattr(np.random, name, None), "__self__", None) is _NUMPYS for name in named)


def _place(frame: FrameType | None, names: dict[int, str]) -> tuple[str, str]:
    """Returns the module of the model whose code a frame is in, and the line of it that is not a library's."""
    line, libraries = "", (str(Path(random.__file__)), str(Path(np.__file__).parent))
    while frame is not None:
        if not line and not frame.f_code.co_filename.startswith(libraries):
            line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        if names.get(id(frame.f_locals.get("self"))):
            return names[id(frame.f_locals["self"])], line
        frame = frame.f_back
    return "", line
