"""How objects are pickled that pickle alone would refuse or make something else of: compiled and scripted modules,
parametrized ones, context variables.

What torch.compile made is compiled again where it arrives, with the arguments it was made with. A scripted module
travels as its own archive, and its parameters and buffers beside that, so that they are the objects that the stage has.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_COMPILED = "_compiled_call_impl"
"""The attribute of a module that `Module.compile` made."""


def reduced(obj: Any) -> Any:
    """Returns how an object is to be pickled, as `__reduce__` does; NotImplemented where it is like any other."""
    if isinstance(obj, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return _scripted, (_archive(obj), _states(obj))
    if isinstance(obj, nn.Module):
        return _of_module(obj)
    if isinstance(obj, ContextVar):  # as no context has set it
        try:
            return _context_variable, (obj.name, Context().run(obj.get))
        except LookupError:
            return _context_variable, (obj.name,)
    return NotImplemented


def _of_module(module: nn.Module) -> Any:
    if parametrize.is_parametrized(module):
        (kind,) = type(module).__bases__  # what it was before torch gave it a class of its own
        return _parametrized, (kind, tuple(module.parametrizations), vars(module))
    if "dynamo_ctx" in vars(module):  # torch.compile made it
        plain = {name: value for name, value in vars(module).items() if name not in type(module)._opt_mod_attributes}
        del plain["_modules"]  # the module itself, which is handed on
        return _optimized, (module._orig_mod, _arguments(module.dynamo_ctx)), plain, None, None, _update
    if vars(module).get(_COMPILED) is not None:
        context = inspect.getclosurevars(vars(module)[_COMPILED]).nonlocals["self"]
        make, arguments, state, *rest = module.__reduce_ex__(5)
        return make, arguments, (state, _arguments(context)), *(*rest, None, None)[:2], _set_and_compile
    return NotImplemented


def _arguments(context: Any) -> dict[str, Any]:
    """Returns the arguments of torch.compile that gave a context; raises TypeError where they cannot be told."""
    from torch._dynamo.eval_frame import innermost_backend

    backend = innermost_backend(context.callback)
    found: dict[str, Any] = {"fullgraph": context.fullgraph, "dynamic": context._dynamic}
    if isinstance(backend, torch._TorchCompileInductorWrapper):
        return found | {"options": dict(backend.config)}  # in which its mode is
    if not isinstance(backend, torch._TorchCompileWrapper):
        raise TypeError(f"torch.compile was given {type(backend).__name__}; expected a backend's name, or a function")
    known = backend.compiler_name in torch.compiler.list_backends(exclude_tags=())
    return found | {"backend": backend.compiler_name if known else backend.compiler_fn, **backend.kwargs}


def _optimized(module: nn.Module, arguments: dict[str, Any]) -> Any:
    return torch.compile(module, **arguments)


def _update(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).update(state)


def _set_and_compile(module: nn.Module, state: tuple[Any, dict[str, Any]]) -> None:
    plain, arguments = state
    module.__setstate__(plain)
    module.compile(**arguments)


def _archive(scripted: Any) -> bytes:
    archive: bytes = scripted.save_to_buffer()
    return archive


def _states(scripted: Any) -> list[tuple[str, str, Tensor]]:
    """Returns the parameters and buffers of a scripted module: of which module inside it, the name, the tensor."""
    if isinstance(scripted, torch.jit.ScriptFunction):
        return []
    modules = scripted.named_modules()
    return [
        (place, name, tensor)
        for place, module in modules
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]


def _scripted(archive: bytes, states: list[tuple[str, str, Tensor]]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # said where the user scripted it
        found = torch.jit.load(io.BytesIO(archive))
    modules = dict(found.named_modules()) if states else {}
    for place, name, tensor in states:
        modules[place]._c.setattr(name, tensor)
    return found


def _parametrized(kind: type[nn.Module], names: tuple[str, ...], attributes: dict[str, Any]) -> nn.Module:
    """Makes a module of a class some of whose tensors are computed from others, as torch does."""
    module = kind.__new__(kind)
    vars(module).update(attributes)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _context_variable(name: str, *default: Any) -> ContextVar[Any]:
    return ContextVar(name, default=default[0]) if default else ContextVar(name)


def culprit(obj: Any, fails: Callable[[Any], bool]) -> str:
    """Returns where in an object the part is that fails by itself, such as "module.body.lock"; "" for the whole."""
    path: list[str] = []
    seen = {id(obj)}
    while True:
        parts = [(name, part) for name, part in _parts(obj) if id(part) not in seen]
        found = next(((name, part) for name, part in parts if fails(part)), None)
        if found is None:
            return ".".join(path)
        path.append(found[0])
        obj = found[1]
        seen.add(id(obj))


def _parts(obj: Any) -> list[tuple[str, Any]]:
    if isinstance(obj, dict):
        return [(str(key), value) for key, value in obj.items()]
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [(str(i), value) for i, value in enumerate(obj)]
    if isinstance(obj, nn.Module):
        own = dict(vars(obj))
        children = [*own.pop("_modules", {}).items(), *own.pop("_parameters", {}).items()]
        return [*children, *own.items()]
    if inspect.isfunction(obj):
        return [*inspect.getclosurevars(obj).nonlocals.items(), *_parts(obj.__defaults__ or ())]
    return list(getattr(obj, "__dict__", {}).items())
