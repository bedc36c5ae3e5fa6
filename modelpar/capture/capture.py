"""Captures an objective: runs its model once on a micro-batch, and checks that replaying the recording is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.cut import cut_routine
from modelpar.capture.deferred import streamed
from modelpar.capture.graph import Layers, build_graph
from modelpar.capture.microbatch import Cutting
from modelpar.capture.objective import Batch, Objective, in_mode, loss_of, own_loss, run
from modelpar.capture.parts import leaf_names
from modelpar.capture.pruning import pruned
from modelpar.capture.recording import Recording, signature
from modelpar.capture.replay import Replay
from modelpar.capture.survey import Grain, choose_leaves, outermost
from modelpar.capture.tape import Tape
from modelpar.capture.traps import Trap
from modelpar.capture.watch import generator_states, has_drawn, set_generator_states
from modelpar.errors import CaptureError, ConfigError, describe
from modelpar.planning.graph import ModelGraph


@dataclass(frozen=True)
class Captured:
    """What the capture found."""

    recording: Recording
    graph: ModelGraph


def capture(
    objective: Objective,
    microbatch: Batch,
    model: nn.Module | None = None,
    *,
    num_ranks: int = 2,
    grain: Grain | None = None,
    num_samples: int | None = None,
) -> Captured:
    """Returns the recording and the graph of an objective's model, from real forwards of a micro-batch.

    `num_samples` is how many it has; by default what is read off its inputs.

    Parameters, buffers, gradients and random generators are as before afterwards.

    Raises CaptureError where the model or the loss fails on the micro-batch, where the model's own forward does what
    cannot be followed, and for a loss that trains parameters of its own or draws random numbers; ConfigError for a
    grain that names no module.
    """
    if isinstance(objective.loss, nn.Module) and any(p.requires_grad for p in objective.loss.parameters()):
        raise CaptureError("the loss has parameters of its own, which nobody would train; expected them in the model")
    grain = grain or Grain()
    model = objective.build() if model is None else model
    refuse(model)
    with untouched(model), streamed(model), torch.inference_mode(False), torch.enable_grad():
        leaves = choose_leaves(
            model,
            lambda: _first_run(objective, model, microbatch),
            lambda: _evaluate(objective, model, microbatch),
            num_ranks,
            grain,
        )
    recording = record(objective, microbatch, model, leaves, num_samples=num_samples)
    return Captured(recording, build_graph(recording, model, grain.keep_together))


def record(
    objective: Objective,
    microbatch: Batch,
    model: nn.Module,
    leaves: frozenset[str],
    mode: str = "train",
    *,
    may_close: bool = True,
    num_samples: int | None = None,
) -> Recording:
    """Returns what a forward, and the loss, of a micro-batch do; "evaluate" and "predict" run in eval mode.

    A module whose code cannot be followed is called whole, and so are the others of its class, where they `may_close`;
    what cannot be followed in the model's own forward raises CaptureError.
    """
    retried = False
    num_samples = num_samples or _samples(objective, microbatch)
    with (
        untouched(model) as restore,
        streamed(model),
        in_mode(model, mode),
        torch.inference_mode(False),
        torch.set_grad_enabled(mode == "train"),
    ):
        while True:
            restore()
            try:
                recording, output, targets = _record(objective, microbatch, model, leaves, mode, num_samples)
                break
            except Trap as trap:
                if not trap.module and not trap.line and not retried:  # a flag that the first forward sets
                    retried = True
                    continue
                if not trap.module or not may_close:
                    where = f"the forward of {trap.module}" if trap.module else "the model's own forward"
                    line = f" ({trap.line})" if trap.line else ""
                    raise CaptureError(
                        f"{where} {trap.what}{line}, which cannot be replayed; expected that in a module of its own, "
                        "which is then called whole"
                    ) from None
                kind = type(model.get_submodule(trap.module))
                closed = {n for n, m in model.named_modules() if type(m) is kind and n} | {trap.module}
                leaves = outermost(leaves | closed)
        if objective.loss is not None and mode != "predict":
            before = generator_states()
            _loss(objective, output, targets, recording.num_samples)
            if has_drawn(before):
                raise CaptureError("the loss draws random numbers; expected only modules of the model to draw")
        restore()
        plain = _counting(objective, mode, run(model, _copy(microbatch[0])))
        restore()
        _check_same(_replay(recording, model, microbatch), plain)
    return recording


def _record(
    objective: Objective, microbatch: Batch, model: nn.Module, leaves: frozenset[str], mode: str, num_samples: int
) -> tuple[Recording, Any, Any]:
    inputs, targets = map(_copy, microbatch)
    tape = Tape(model, leaves)
    takes_targets = objective.loss is not None and mode != "predict"

    def forward() -> Any:
        try:
            return run(model, inputs)
        except Trap:
            raise
        except Exception as error:
            if tape.trapped:  # the model's code made another error of it
                raise tape.trapped from error
            raise CaptureError(f"{tape.failure(error)}: {describe(error)}") from error

    batch = leaf_names(inputs, targets if takes_targets else None)
    finish = partial(_counting, objective, mode)
    recording, output = tape.record(forward, batch, num_samples, finish, targets if takes_targets else None)
    recording = pruned(recording)
    made_for = signature(mode, microbatch[0], microbatch[1] if takes_targets else None, recording.is_straight(model))
    return replace(recording, signature=made_for), output, targets


def _samples(objective: Objective, microbatch: Batch) -> int:
    """Returns how many samples a micro-batch has, as far as its inputs tell."""
    try:
        return 1 if objective.cut else Cutting.of(objective).size(*microbatch)
    except ConfigError:
        return 1


def _counting(objective: Objective, mode: str, output: Any) -> Any:
    """Returns what counts of a model's output: its own loss, if it has one and that is asked for."""
    if objective.loss is not None or mode == "predict":
        return output
    loss = own_loss(output)
    if not isinstance(loss, Tensor) or loss.dim():
        _loss(objective, output, None, 1)  # says what is wrong
    return loss


def _replay(recording: Recording, model: nn.Module, microbatch: Batch) -> Any:
    """Returns what replaying a recording gives."""
    routine = cut_routine(recording, (0, len(Layers(recording).nodes)), 0)
    values = leaf_names(*map(_copy, microbatch))
    try:
        return Replay(routine, model)({name: values[name] for name in routine.takes})["output"]
    except Exception as error:
        raise CaptureError(f"the recording cannot be replayed: {describe(error)}") from error


def _check_same(replayed: Any, plain: Any) -> None:
    """Raises CaptureError unless two outputs are the same, to the bit."""
    ours, theirs = trees.tensors_of(replayed), trees.tensors_of(plain)
    if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
        raise CaptureError(
            "replaying what the model did gives another output than the model: its forward depends on something that "
            "cannot be seen, or asks whether somebody watches; expected a forward that depends on its inputs and "
            "weights only"
        )


def _copy(tree: Any) -> Any:
    return trees.map_tensors(lambda t: t.detach().clone(), tree)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
        return False
    a, b = a.detach(), b.detach()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def refuse(model: nn.Module) -> None:
    """Raises CaptureError for what a stage in another process would lose."""
    if type(model).forward is nn.Sequential.forward and not len(model._modules):
        raise CaptureError("the model is an empty nn.Sequential; expected at least one layer")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            raise CaptureError(f"{name} has no shape yet; expected a model with lazy layers to have run once")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(f"{name} has a hook, which its stage would not have; expected hooks on modules only")
    if model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks:
        raise CaptureError(
            f"the model itself, a {type(model).__name__}, has a hook, and nobody calls it whole; expected hooks on the "
            "modules inside it"
        )


def _first_run(objective: Objective, model: nn.Module, microbatch: Batch) -> None:
    """Runs the forward once."""
    inputs = _copy(microbatch[0])
    try:
        run(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in trees.tensors_of(inputs)) or "no tensors"
        raise CaptureError(f"the model failed on the example batch, inputs {shapes}: {describe(error)}") from error


def _evaluate(objective: Objective, model: nn.Module, microbatch: Batch) -> None:
    """Runs the forward once in eval mode."""
    with in_mode(model, "evaluate"):
        _first_run(objective, model, microbatch)


def _loss(objective: Objective, output: Any, targets: Any, num_samples: int) -> None:
    try:
        loss_of(objective.loss, output, targets, num_samples)
    except CaptureError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in trees.tensors_of(output)) or "no tensors"
        raise CaptureError(f"the loss failed on the example batch, outputs {shapes}: {describe(error)}") from error


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restores buffers, gradients and random generators on leaving; yields what restores the first and last before."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    with torch.random.fork_rng():
        states = generator_states()

        def restore() -> None:
            set_generator_states(states)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])

        try:
            yield restore
        finally:
            restore()
            for parameter, grad in grads:
                parameter.grad = grad
