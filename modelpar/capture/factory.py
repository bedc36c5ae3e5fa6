"""Runs a model's factory without keeping its parameters: each goes to the meta device, and can be made later.

::

    self.weight = nn.Parameter(torch.empty(4, 3))     op 0   empty(4, 3)                  → memory 0
    nn.init.uniform_(self.weight, -1, 1)              op 1   uniform_(memory 0, -1, 1)    drawn with the key (seed, 1)
    self.bias = nn.Parameter(torch.zeros(4))          op 2   zeros(4)                     → memory 1

A parameter leaves as soon as a module has it, and what torch does is written down. A parameter's Drawn holds the
operations that its values depend on, usually two or three. Each draw of random numbers has a key of its own, so that
the values do not depend on who makes what. Buffers are made at once.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from modelpar.capture.deferred import put
from modelpar.capture.recipe import (
    Drawn,
    Op,
    Piece,
    draw_key,
    function_of,
    makes_nothing,
    room,
    set_recipe,
    tensors_in,
    unseen,
)
from modelpar.errors import CaptureError, describe


class _Factory(TorchDispatchMode):
    """Writes down what torch does while a factory runs; `keep` leaves parameters where they are."""

    def __init__(self, seed: int, keep: bool):
        super().__init__()
        self._seed, self._keep = seed, keep
        self._ops: list[Op] = []
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}
        """Memory by the address of its storage, which the reference keeps from being used again."""
        self._count = 0
        self._constants: dict[int, Tensor] = {}
        self._kept: set[int] = set()
        self._bases: dict[int, Tensor] = {}
        """What stands for some memory on the meta device."""
        self._placed: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, number = kwargs or {}, len(self._ops)
        tensors = tensors_in((args, kwargs))
        if any(t.layout is not torch.strided for t in tensors):  # such as sparse ones: no parameter can be made so
            return func(*args, **kwargs)
        written = [t for t, writes in _written(func, args, kwargs) if writes]
        meta = any(t.is_meta for t in tensors)
        if meta and not all(t.is_meta for t in written):
            raise CaptureError(
                f"the factory writes what it computes from a parameter into a tensor ({func}); expected only "
                "parameters and buffers to depend on parameters"
            )
        draws = torch.Tag.nondeterministic_seeded in func.tags
        key = draw_key(self._seed, number) if draws else None
        if meta and not any("Tensor" in str(a.type) for a in func._schema.returns) and not written:
            raise CaptureError(
                f"the factory reads the value of a parameter ({func}), which is not there yet with init=meta; expected "
                "values that come from elsewhere"
            )
        pieces = {id(t): self._piece(t) for t in tensors}
        for tensor in written:
            self._keep_constant(pieces[id(tensor)].memory)
        template = pytree.tree_map(lambda leaf: _plain(leaf, pieces), (args, kwargs))
        if meta:
            args, kwargs = pytree.tree_map_only(Tensor, _on_meta, (args, kwargs))
        elif key is not None:
            torch.default_generator.manual_seed(key)
            args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: None, (args, kwargs))
        if makes_nothing(str(func)) and not meta and str(kwargs.get("device", "cpu")) == "cpu":
            output = room(func(*args, **{**kwargs, "device": torch.device("meta")}))
        else:
            output = func(*args, **kwargs)
        makes = tuple(self._new(t) if t.layout is torch.strided else None for t in tensors_in(output))
        if written or any(made is not None for made in makes):
            takes = tuple({piece.memory for piece in pieces.values()})
            writes = tuple({pieces[id(t)].memory for t in written})
            self._ops.append(Op(number, str(func), template, takes, writes, makes, key))
        return output

    def initialise(self, name: str, args: dict[str, Any]) -> None:
        """Notes a call of a function of torch.nn.init, as one operation; does it where the tensor is there."""
        tensor, number = args["tensor"], len(self._ops)
        key, piece = draw_key(self._seed, number), self._piece(tensor)
        args = {**args, "generator": None} if "generator" in args else args
        self._keep_constant(piece.memory)
        template = (), {**args, "tensor": piece}
        self._ops.append(Op(number, f"init.{name}", template, (piece.memory,), (piece.memory,), (None,), key))
        if not tensor.is_meta:
            torch.default_generator.manual_seed(key)
            function_of(f"init.{name}")(**args)

    def _number(self, tensor: Tensor) -> int | None:
        found = self._numbers.get(tensor.untyped_storage()._cdata)
        return found[1] if found else None

    def _name(self, tensor: Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        self._numbers[storage._cdata] = StorageWeakRef(storage), number

    def _new(self, tensor: Tensor) -> int | None:
        """Returns the number of new memory, or None where it is known."""
        if self._number(tensor) is not None:
            return None
        self._count += 1
        self._name(tensor, self._count - 1)
        return self._count - 1

    def _piece(self, tensor: Tensor) -> Piece:
        """Says what part of which memory a tensor is; memory that nobody saw being made is a constant."""
        number = self._number(tensor)
        if number is None:
            number = self._new(tensor)
            assert number is not None
            if tensor.is_meta:
                raise CaptureError("the factory uses a tensor on the meta device that it did not make")
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            self._constants[number] = whole.set_(tensor.detach().untyped_storage())  # type: ignore[call-overload]
        return Piece(number, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())

    def _keep_constant(self, number: int) -> None:
        """Copies a constant that is about to be changed, once."""
        if number in self._constants and number not in self._kept:
            self._kept.add(number)
            self._constants[number] = self._constants[number].clone()

    def place(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns what stands for a parameter on the meta device; the same for the same one."""
        if self._keep or parameter.is_meta or type(parameter) is not nn.Parameter:
            return parameter
        reference, placed = self._placed.get(id(parameter), (None, None))
        if reference is not None and placed is not None and reference() is parameter:
            return placed
        with unseen():
            piece = self._piece(parameter)
            if piece.memory not in self._bases:
                size = parameter.untyped_storage().nbytes()
                self._bases[piece.memory] = torch.empty(size, dtype=torch.uint8, device="meta")
                self._name(self._bases[piece.memory], piece.memory)
            placed = nn.Parameter(piece.of(self._bases[piece.memory]), parameter.requires_grad)
            placed.__dict__ = vars(parameter)  # the same: code that still holds the parameter may set more
            for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):  # which the capture refuses
                if found := getattr(parameter, hooks, None):
                    setattr(placed, hooks, found)
        self._placed[id(parameter)] = weakref.ref(parameter), placed
        return placed

    def recipe(self, name: str, tensor: Tensor) -> Drawn:
        """Returns how a tensor is made."""
        piece = self._piece(tensor)
        wanted: set[int] = set()
        constants: dict[int, Tensor] = {}
        todo = [(piece.memory, len(self._ops))]
        seen: dict[int, int] = {}
        while todo:
            memory, before = todo.pop()
            if seen.get(memory, -1) >= before:
                continue
            if memory in self._constants:
                constants[memory] = self._constants[memory]
            for index in self._touching[memory]:
                if seen.get(memory, -1) <= index < before and index not in wanted:
                    wanted.add(index)
                    todo += [(taken, index) for taken in self._ops[index].takes]
            seen[memory] = before
        return Drawn(name, tuple(self._ops[i] for i in sorted(wanted)), constants, piece)

    def finish(self) -> None:
        """Sorts what was written down by the memory that it makes or changes."""
        self._touching: dict[int, list[int]] = {number: [] for number in range(self._count)}
        for index, op in enumerate(self._ops):
            for memory in {*op.writes, *(made for made in op.makes if made is not None)}:
                self._touching[memory].append(index)


class _Initialisers(TorchFunctionMode):
    """Notices functions of torch.nn.init that leave tensors on the meta device alone: they look where it is, first."""

    def __init__(self, factory: _Factory):
        super().__init__()
        self._factory = factory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1)
        if func == _IS_META and caller.f_globals.get("__name__") == "torch.nn.init":
            code = caller.f_code
            with unseen():
                names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
                self._factory.initialise(code.co_name, {name: caller.f_locals[name] for name in names})
            return True
        return func(*args, **(kwargs or {}))


_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


def construct(factory: Callable[[], Any], seed: int, *, keep: bool = False) -> Any:
    """Calls a factory; all parameters of the module it returns are on the meta device, with a Recipe each.

    With `keep` they are there, with the values that the recipes would give. Torch's generators are restored. Raises
    CaptureError where the factory reads the value of a parameter, or keeps a tensor computed from one outside of
    parameters and buffers.
    """
    mode = _Factory(seed, keep)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _registering(mode.place):
            try:
                with mode, _Initialisers(mode):
                    model = factory()
            except NotImplementedError as error:
                raise CaptureError(
                    f"the factory reads the value of a parameter, which is not there yet with init=meta: "
                    f"{' '.join(describe(error).split())}"
                ) from error
        if not isinstance(model, nn.Module) or keep:
            return model
        mode.finish()
        for module in model.modules():  # some code goes around register_parameter
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = mode.place(parameter)
        known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for place, module in model.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_meta and id(value) not in known:
                    raise CaptureError(
                        f"{f'{place}.{name}'.strip('.')} is computed from a parameter and is neither a parameter nor a "
                        "buffer; expected register_buffer with init=meta"
                    )
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
        recipes = {name: mode.recipe(name, parameter) for name, parameter in parameters.items()}
        _refuse_shared_memory(recipes)
        for name, recipe in recipes.items():
            set_recipe(parameters[name], recipe)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if buffer.is_meta:
                    put(buffer, mode.recipe(name, buffer).make())
    return model


def _refuse_shared_memory(recipes: Mapping[str, Drawn]) -> None:
    """Raises CaptureError for parameters that are views of the same numbers: each would get its own."""
    ends: dict[int, tuple[int, str]] = {}
    for name, recipe in sorted(recipes.items(), key=lambda item: item[1].piece.range[0]):
        (start, end), memory = recipe.piece.range, recipe.piece.memory
        last, other = ends.get(memory, (0, ""))
        if start < last:
            raise CaptureError(
                f"{other} and {name} are views of the same memory, which init=meta would take apart; expected one "
                "parameter, registered by both modules"
            )
        ends[memory] = max((end, name), (last, other))


@contextmanager
def _registering(place: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Lets modules register what stands for a parameter in its place."""
    original, thread = nn.Module.register_parameter, threading.get_ident()

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        here = param is not None and threading.get_ident() == thread
        original(module, name, place(param) if here and param is not None else param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    for argument, value in [
        *zip(func._schema.arguments, args, strict=False),
        *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
    ]:
        for tensor in tensors_in(value):
            yield tensor, argument.alias_info is not None and argument.alias_info.is_write


def _plain(leaf: Any, pieces: dict[int, Piece]) -> Any:
    if isinstance(leaf, Tensor):
        return pieces[id(leaf)]
    if isinstance(leaf, torch.Generator):
        return None
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
