"""One stage's computations: forward, loss and backward of a micro-batch. No processes, no messages."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.cut import Routine, StageProgram
from modelpar.capture.objective import LossResult, loss_of
from modelpar.capture.replay import Replay
from modelpar.errors import RunError
from modelpar.run.rng import EVALUATION, KeyedRandom, watched_for_recomputation


class RunContext(NamedTuple):
    """What a micro-batch's computations depend on besides their values."""

    mode: str
    """"train", "evaluate", "predict"; "check": a micro-batch that only makes gradients; "locate": forward as in
    training, to find the first layer that goes wrong."""
    step: int
    """The training step, for random keys."""
    sizes: tuple[int, ...]
    """Samples per micro-batch."""
    first: int = 0
    """The global index of the first micro-batch, for random keys."""
    variants: tuple[int, ...] = ()
    """Per micro-batch, the number of the recording to replay."""

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.mode in ("train", "check")

    def variant(self, microbatch: int) -> int:
        """Returns the number of the recording that a micro-batch replays."""
        return self.variants[microbatch] if self.variants else 0


class _Received(torch.autograd.Function):
    """Hands a received tensor on and keeps the gradient that comes back, as it comes.

    A leaf's own `.grad` would be laid out like the leaf, and the sums that the producer makes of it would then run in
    another order than in the unsplit model.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return tensor.detach()  # a view would get other strides where a size is 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.kept.append(grad)
        return None, None


@dataclass(slots=True)
class _Live:
    """What a micro-batch's backward needs of its forward."""

    received: dict[str, list[Tensor]]
    given: dict[str, list[Tensor]]
    grads: dict[str, list[list[Tensor]]]
    """For each tensor received, a list for the gradient that comes back."""
    variant: int
    recomputes: bool = False
    """Whether backward runs some code of the forward once more."""
    total: Tensor | None = None


class StageRunner:
    """Computes one stage, micro-batch by micro-batch."""

    def __init__(self, program: StageProgram, seed: int, device: torch.device, lock: Any = None):
        self.program = program
        self.device = device
        self.losses: dict[int, LossResult] = {}
        """On the last stage, the loss of each micro-batch of the current step, detached."""
        program.module.to(device)
        self._replays = {
            number: Replay(routine, program.module, device) for number, routine in program.routines.items()
        }
        """By the number of the recording that each replays a part of."""
        self._random = KeyedRandom(program.module, program.draws, seed, device, lock)
        self._recomputes: dict[int, bool] = {}
        """By number of the recording, whether backward runs code of the stage once more, once that has been seen."""
        places = (of for module in program.module.modules() for of in (module._parameters, module._buffers))
        self._state = [(of, name) for of in places for name in list(of.keys())]
        """Where the parameters and buffers are; which tensors they are may change."""
        self._live: dict[int, _Live] = {}
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._written: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self.peak_live = 0
        """The most micro-batches whose activations were alive at once."""

    def forward(self, microbatch: int, values: dict[str, Any], context: RunContext) -> dict[str, Any]:
        """Runs the stage on the values it received and returns those it gives: the next stage's, or the prediction."""
        training = context.trains
        step = context.step if training or context.mode == "locate" else EVALUATION
        variant = context.variant(microbatch)
        replay = self._replays[variant]
        routine = replay.routine
        self._random.attach(routine.draws)
        recomputes = training and self._recomputes.get(variant, True)
        keyed = self._random.microbatch(step, context.first + microbatch, routine.calls, recomputes)
        watched = watched_for_recomputation() if recomputes else nullcontext([])
        with torch.set_grad_enabled(training), keyed, watched as kept:
            live = _Live({}, {}, {}, variant)
            values = {name: self._taken(name, value, live) for name, value in values.items()}
            results = replay(values, self._random.own)
            for name in routine.gives:
                live.given[name] = _needing_grad(results[name])
                results[name] = self._frozen(results[name])
            if self.program.is_last and context.mode != "predict":
                found = loss_of(self.program.loss, results["output"], results["targets"], context.sizes[microbatch])
                self.losses[microbatch] = found._replace(total=found.total.detach())
                live.total = found.total if found.count else None
        if training:
            live.recomputes = bool(kept)
            self._recomputes[variant] = live.recomputes or self._recomputes.get(variant, False)
        if self._random.has_strayed:
            raise RunError(
                "a module drew random numbers that did not draw when the model was captured, so the result would "
                "depend on the split; plan with the module in the mode in which it trains"
            )
        if more := [name for name, tensors in live.given.items() if tensors and name not in routine.needs_grad]:
            raise RunError(
                f"{more[0]} needs a gradient, and did not when the model was captured; plan with the parameters that "
                "are to be trained requiring gradients"
            )
        if training:
            self._live[microbatch] = live
            self.peak_live = max(self.peak_live, len(self._live))
        return results

    def _taken(self, name: str, value: Any, live: _Live) -> Any:
        """Returns a received value, whose tensors note the gradients that come back to them."""
        live.received[name], live.grads[name] = [], []
        if not torch.is_grad_enabled():
            return value

        def taken(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            live.grads[name].append([])
            live.received[name].append(_Received.apply(tensor, live.grads[name][-1]))
            return live.received[name][-1]

        return trees.map_tensors(taken, value)

    def _frozen(self, output: Any) -> Any:
        """Returns an output that nothing will write to: a parameter or buffer handed on is copied."""
        tensors = [of[name] for of, name in self._state if name in of]
        state = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}

        def copy(tensor: Tensor) -> Tensor:
            if tensor.layout is not torch.strided or tensor.untyped_storage().data_ptr() not in state:
                return tensor
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        return trees.map_tensors(copy, output)

    def learn(self, number: int, routine: Routine) -> None:
        """Adds what to do where another recording is to be replayed."""
        self._replays[number] = Replay(routine, self.program.module, self.device)

    def backward(self, microbatch: int, grads: dict[str, list[Tensor | None]]) -> dict[str, list[Tensor | None]]:
        """Runs backward from the gradients of the values given, and returns those of the values received.

        A gradient that already came back for a received value, from a later stage that also uses it, enters as a root;
        so does that of a tied parameter. A micro-batch whose loss counts nothing has no roots and leaves no trace.
        """
        live = self._live.pop(microbatch)
        roots: list[Tensor] = []
        seeds: list[Tensor | None] = []
        if live.total is not None and live.total.requires_grad:
            roots.append(live.total)
            seeds.append(None)
        for name, arrived in grads.items():
            known = live.given if name in live.given else live.received
            tensors = known[name] if name in known else [self.parameter(name)]
            for tensor, grad in zip(tensors, arrived, strict=True):
                if grad is not None:
                    roots.append(tensor)
                    seeds.append(grad)
        if roots:
            self._random.attach(self._replays[live.variant].routine.draws)
            with self._random.held(live.recomputes):
                torch.autograd.backward(roots, seeds)
        return {name: [kept[0] if kept else None for kept in found] for name, found in live.grads.items()}

    def parameter(self, name: str) -> nn.Parameter:
        """Returns a parameter by its FQN, a tied one by its owner's."""
        return self.program.module.get_parameter(self.program.tied.get(name, name))

    def take_grad(self, name: str) -> list[Tensor | None]:
        """Takes the gradient off a tied tensor's copy, to hand it on."""
        parameter = self.parameter(name)
        grad, parameter.grad = parameter.grad, None
        return [grad]

    def add_grad(self, name: str, grads: list[Tensor | None]) -> None:
        """Adds the gradient that came from a later use of a tied tensor."""
        parameter = self.parameter(name)
        for grad in grads:
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else _sum(grad, parameter.grad)

    def keep_buffers(self) -> None:
        """Remembers the buffers that forward writes to, so that a step that fails can be undone.

        Before the first step every one is remembered. One counts as written once the first step has changed its value
        (batch normalisation does not count up versions), or any step its version, or has replaced it.
        """
        buffers = dict(self.program.module.named_buffers())
        for name, (buffer, version) in self._seen.items():
            same = buffers[name] is buffer and buffer._version == version
            if not same or (name in self._kept and not torch.equal(buffer, self._kept[name])):
                self._written.add(name)
        kept = self._written if self._seen else buffers
        self._kept = {name: buffers[name].clone() for name in kept}
        self._seen = {name: (buffer, buffer._version) for name, buffer in buffers.items()}

    def undo(self) -> None:
        """Forgets an unfinished step: its activations, gradients and changes to buffers."""
        self.forget()
        for name, value in self._kept.items():
            self.program.module.get_buffer(name).detach().copy_(value)

    def forget(self) -> None:
        """Drops activations, losses and gradients, and takes the hooks off that key random numbers."""
        self._random.attach(frozenset())
        self._live.clear()
        self.losses.clear()
        self.program.module.zero_grad(set_to_none=True)

    def first_nonfinite(self, values: dict[str, Any], context: RunContext) -> tuple[Any, str | None]:
        """Runs forward on one micro-batch; returns the values given and the first module whose output is not finite."""
        found: list[str] = []

        def look(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if not found and not all(bool(torch.isfinite(leaf).all()) for leaf in trees.tensors_of(output)):
                    found.append(name)

            return hook

        handles = [m.register_forward_hook(look(name)) for name, m in self.program.module.named_modules() if name]
        try:
            given = self.forward(0, values, context)
        finally:
            for handle in handles:
                handle.remove()
        if not found and self.losses and not bool(torch.isfinite(self.losses.pop(0).total)):
            found.append("the loss")
        return given, found[0] if found else None


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Adds gradients: torch adds a sparse tensor to a dense one only in that order."""
    return second + first if first.is_sparse and not second.is_sparse else first + second


def _needing_grad(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.tensors_of(tree) if leaf.requires_grad]
