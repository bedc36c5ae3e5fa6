"""Which modules are called whole: Grain, what the user wants; and the survey of a model that finds the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from modelpar.capture.flops import Flops
from modelpar.capture.watch import module_calls
from modelpar.errors import CaptureError, ConfigError

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


def choose_leaves(
    model: nn.Module,
    forward: Callable[[], Any],
    evaluate: Callable[[], Any],
    num_ranks: int,
    grain: Grain,
) -> frozenset[str]:
    """Returns the FQNs of the modules to call whole, after one forward that tells what each costs.

    An nn.Sequential's children are its layers. In any other model a module is looked into as long as it costs more than
    a quarter of a rank's even share, and calls the same modules when it trains and when it is evaluated: else a cut
    inside it would fit one of the two only.
    """
    grain.check(model)
    forced = set(matching(model, grain.leaf))
    opened = {""} | {parent for name in matching(model, grain.split_before) for parent in _parents(name)}
    if overlap := forced & opened:
        raise ConfigError(f"leaf names {min(overlap)}, which split_before needs to look into; expected one of the two")
    if type(model).forward is nn.Sequential.forward:
        leaves = {name for name, _ in model.named_children()}
        return _without_inner(model, (leaves - opened) | forced, opened)
    shares, inner = _survey(model, forward)
    evaluated: dict[str, set[str]] = {}
    with suppress(CaptureError):  # whoever does not evaluate the model never knows
        _, evaluated = _survey(model, evaluate)
    changing = {name for name in inner.keys() & evaluated.keys() if inner[name] != evaluated[name]}
    most = FINER_THAN / num_ranks
    for name, module in model.named_modules():
        if name in forced or not all(parent in opened for parent in _parents(name)):
            continue
        worth = shares.get(name, 0.0) > most and name not in changing and may_open(module)
        if name in opened or worth or name not in shares:
            opened.add(name)
    leaves = {name for name, _ in model.named_modules() if name not in opened}
    return _without_inner(model, leaves | forced, opened)


def may_open(module: nn.Module) -> bool:
    """Tells whether a module's code can be followed without losing anything that calling it would do."""
    return (
        any(True for _ in module.children())
        and not parametrize.is_parametrized(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not isinstance(module, torch.jit.ScriptModule)
        and not hasattr(module, "_orig_mod")
    )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [""] + [".".join(parts[:i]) for i in range(1, len(parts))]


def _without_inner(model: nn.Module, leaves: set[str], opened: set[str]) -> frozenset[str]:
    """Returns the outermost of these modules, and the children of opened ones that are not opened themselves."""
    names = {name for name, _ in model.named_modules()}
    leaves = leaves | {name for name in names if name and name not in opened and _parents(name)[-1] in opened}
    return outermost(leaves)


def outermost(names: Iterable[str]) -> frozenset[str]:
    """Returns the modules that are not inside others of these."""
    names = frozenset(names)
    return frozenset(name for name in names if not names.intersection(_parents(name)))


def _survey(model: nn.Module, forward: Callable[[], Any]) -> tuple[dict[str, float], dict[str, set[str]]]:
    """Returns the share of all floating-point operations that one call of each module takes, and which others it calls.

    Both of the modules that are called. Where a model has no operations that are counted, parameters stand for them.
    """
    found: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    inner: dict[str, set[str]] = {}
    path: list[str] = []
    counter = Flops()
    names = {id(module): name for name, module in model.named_modules()}

    def count(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if id(module) not in names:
            return call(*args, **kwargs)
        name, begun = names[id(module)], counter.total
        inner.setdefault(name, set())
        if path:
            inner[path[-1]].add(name)
        path.append(name)
        try:
            return call(*args, **kwargs)
        finally:
            path.pop()
            found[name] += counter.total - begun
            calls[name] += 1

    with counter, torch.no_grad(), module_calls(count):
        forward()
    total = found[""]
    if total:
        return {name: flops / total / calls[name] for name, flops in found.items()}, inner
    total = sum(p.numel() for p in model.parameters()) or 1
    return {name: sum(p.numel() for p in model.get_submodule(name).parameters()) / total for name in found}, inner
