"""Which modules are called whole: Grain, what the user wants; and the survey of a model that finds the rest."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modelpar.capture import trees
from modelpar.capture.compiled import is_compiled
from modelpar.capture.flops import Flops
from modelpar.capture.path import ends_checkpoints
from modelpar.capture.watch import module_calls
from modelpar.errors import CaptureError, ConfigError, describe

_log = logging.getLogger(__name__)

FINER_THAN = 0.25
"""A module is looked into where it costs more than this share of a rank's part: then the parts can be evened out."""


@dataclass(frozen=True)
class Grain:
    """How finely a model may be cut. Each names modules by patterns of their FQNs, or by class names."""

    leaf: tuple[str, ...] = ()
    """Modules that are called whole, whatever they cost."""
    split_before: tuple[str, ...] = ()
    """Modules before which a cut must be possible: whatever they are part of is looked into."""
    keep_together: tuple[str, ...] = ()
    """Modules that no cut goes through, but into which the capture may look."""

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a pattern that fits no module."""
        for name in ("leaf", "split_before", "keep_together"):
            for pattern in getattr(self, name):
                if not matching(model, (pattern,)):
                    some = ", ".join(list(dict(model.named_modules()))[1:6])
                    raise ConfigError(
                        f"{name}={pattern!r} fits no module of the model; expected an FQN, a pattern such as 'h.*', or "
                        f"a class name; modules are {some}, …"
                    )


def matching(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Returns the FQNs of modules whose name fits a pattern, or whose class has that name."""
    patterns = tuple(patterns)
    return [
        name
        for name, module in model.named_modules()
        if name and any(fnmatchcase(name, p) or type(module).__name__ == p for p in patterns)
    ]


@dataclass(frozen=True)
class Survey:
    """What one forward, and one in evaluation, tell of a model's modules."""

    shares: Mapping[str, float]
    """The part of all operations that one call of a module takes, of those that are called."""
    closed: frozenset[str]
    """Modules that nobody may look into: those that call others in evaluation than in training, since a cut inside
    would fit one of the two only, and those that have hooks or the like, maybe since their first forward."""


def survey(model: nn.Module, forward: Callable[[], Any], evaluate: Callable[[], Any]) -> Survey:
    """Returns what a forward tells, and one in eval mode if the model can do that."""
    shares, inner = _count(model, forward)
    evaluated: dict[str, set[str]] = {}
    with suppress(CaptureError):  # whoever does not evaluate the model never knows
        _, evaluated = _count(model, evaluate)
    changing = {name for name in inner.keys() & evaluated.keys() if inner[name] != evaluated[name]}
    whole = {name for name, module in model.named_modules() if name and not may_open(module)}
    return Survey(shares, frozenset(changing | whole))


def choose_leaves(
    model: nn.Module, found: Survey, num_ranks: int, grain: Grain, finer_than: float = FINER_THAN
) -> frozenset[str]:
    """Returns the FQNs of the modules to call whole.

    A module is looked into as long as it costs more than `finer_than` of a rank's part. An nn.Sequential's children are
    its layers unless one costs more than such a part.
    """
    grain.check(model)
    forced = set(matching(model, grain.leaf))
    opened = {""} | {parent for name in matching(model, grain.split_before) for parent in _parents(name)}
    if overlap := forced & opened:
        raise ConfigError(f"leaf names {min(overlap)}, which split_before needs to look into; expected one of the two")
    closed = found.closed | forced
    part = _part_of_a_rank(model, found.shares, closed, num_ranks)
    if type(model).forward is nn.Sequential.forward and finer_than == FINER_THAN:
        children = {name for name, _ in model.named_children()}
        if all(found.shares.get(name, 0.0) <= part for name in children - closed - opened):
            return outermost({name for name, _ in model.named_modules() if name not in opened} | forced)
    for name, _ in model.named_modules():
        if not name or name in forced or not all(parent in opened for parent in _parents(name)):
            continue
        worth = name not in closed and found.shares.get(name, 0.0) > finer_than * part
        if name in opened or worth or name not in found.shares:
            opened.add(name)
    return outermost({name for name, _ in model.named_modules() if name not in opened} | forced)


def _part_of_a_rank(model: nn.Module, shares: Mapping[str, float], closed: frozenset[str], num_ranks: int) -> float:
    """Returns the part of all operations that a rank has if they are spread evenly.

    What cannot be spread and is larger than that has a rank of its own: the others share what is left.
    """
    left, ranks = 1.0, num_ranks
    whole = outermost(closed | {name for name, module in model.named_modules() if not any(module.children())})
    for share in sorted((shares.get(name, 0.0) for name in whole), reverse=True):
        if ranks > 1 and share > left / ranks:
            left, ranks = max(left - share, 0.0), ranks - 1
    return left / ranks


def may_open(module: nn.Module) -> bool:
    """Tells whether a module's code can be followed without losing anything that calling it would do."""
    return (
        any(True for _ in module.children())
        and not parametrize.is_parametrized(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not isinstance(module, (torch.jit.ScriptModule, nn.MultiheadAttention))  # it has a fast path
        and not is_compiled(module)
    )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [""] + [".".join(parts[:i]) for i in range(1, len(parts))]


def outermost(names: Iterable[str]) -> frozenset[str]:
    """Returns the modules that are not inside others of these."""
    names = frozenset(names)
    return frozenset(name for name in names if not names.intersection(_parents(name)))


def _count(model: nn.Module, forward: Callable[[], Any]) -> tuple[dict[str, float], dict[str, set[str]]]:
    """Returns the share of all floating-point operations that one call of each module takes, and which others it calls.

    Both of the modules that are called. Where a model has no operations that are counted, or does not stand it, their
    parameters stand for them.
    """
    try:
        return _watched(model, forward, Flops())
    except CaptureError as error:
        _log.debug("the operations cannot be counted: %s", error)
        return _watched(model, forward, None)


def _watched(
    model: nn.Module, forward: Callable[[], Any], counter: Flops | None
) -> tuple[dict[str, float], dict[str, set[str]]]:
    found: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    inner: dict[str, set[str]] = {}
    path: list[str] = []
    failed: list[tuple[str, list[Tensor]]] = []
    """The modules that an error went through, the innermost first."""
    names = {id(module): name for name, module in model.named_modules()}

    def count(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if id(module) not in names:
            return call(*args, **kwargs)
        name, begun = names[id(module)], counter.total if counter else 0
        inner.setdefault(name, set())
        if path:
            inner[path[-1]].add(name)
        path.append(name)
        try:
            output = call(*args, **kwargs)
            failed.clear()  # of what the code around it has caught
            return output
        except Exception:
            failed.append((name, trees.tensors_of((args, kwargs))))
            raise
        finally:
            path.pop()
            found[name] += counter.total - begun if counter else 0
            calls[name] += 1

    try:
        with counter or nullcontext(), torch.no_grad(), module_calls(count, model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of checkpoints without gradients; the recording says what is true
            with ends_checkpoints():
                forward()
    except Exception as error:
        if type(model).forward is nn.Sequential.forward:  # its children are its layers
            failed = [layer for layer in failed if layer[0]][-1:]
        name, tensors = failed[0] if failed else ("", [])
        where = f"layer {name} ({type(model.get_submodule(name)).__name__})" if name else "the model"
        shapes = ", ".join(str(list(t.shape)) for t in tensors) or "no tensors"
        raise CaptureError(f"{where} failed on the example batch, input {shapes}: {describe(error)}") from error
    if counter and (total := counter.total):
        return {name: flops / total / calls[name] for name, flops in found.items()}, inner
    total = sum(p.numel() for p in model.parameters()) or 1
    return {name: sum(p.numel() for p in model.get_submodule(name).parameters()) / total for name in found}, inner
