"""Captures an objective: runs its model once on a micro-batch, and checks that replaying the recording is the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.compiled import is_compiled, uncompiled
from modelpar.capture.cut import cut_routine
from modelpar.capture.deferred import streamed
from modelpar.capture.forwards import Forwards, copy_of, counting
from modelpar.capture.graph import Layers, build_graph
from modelpar.capture.guards import hold, watch
from modelpar.capture.microbatch import Cutting
from modelpar.capture.objective import Batch, Objective, in_mode, loss_of, run
from modelpar.capture.outside import foreign, other_generators, refuse_draws, refuse_foreign
from modelpar.capture.parts import leaf_names
from modelpar.capture.pruning import pruned
from modelpar.capture.reads import settle
from modelpar.capture.recording import Recording, signature
from modelpar.capture.replay import Replay
from modelpar.capture.sameness import check_same
from modelpar.capture.survey import FINER_THAN, Grain, Survey, choose_leaves, outermost, survey
from modelpar.capture.traps import Trap
from modelpar.capture.untouched import untouched
from modelpar.capture.watch import generator_states, has_drawn
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
    other: Batch | None = None,
) -> Captured:
    """Returns the recording and the graph of an objective's model, from real forwards of a micro-batch.

    `num_samples` is how many it has; by default what is read off its inputs. On an `other` micro-batch, where one is
    given, the model must do the same, unless shapes or guards differ.

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
    grain.check(model)
    with (
        untouched(model) as before,
        streamed(model),
        uncompiled(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):

        def forward(mode: str) -> None:
            before.restore()
            with in_mode(model, mode):
                run(model, copy_of(microbatch[0]))

        found = survey(model, partial(forward, "train"), partial(forward, "evaluate"))
    recorded = partial(record, objective, microbatch, model, num_samples=num_samples, other=other)
    return _fine_enough(recorded, model, found, num_ranks, grain)


def _fine_enough(
    recorded: Callable[[frozenset[str]], Recording], model: nn.Module, found: Survey, num_ranks: int, grain: Grain
) -> Captured:
    """Returns a recording with as many cuts as the ranks need: where there are too few, more modules are looked into,
    as long as that helps."""
    best, leaves = None, frozenset[str]()
    for finer_than in (FINER_THAN, FINER_THAN / 8, 0.0):
        before, leaves = leaves, choose_leaves(model, found, num_ranks, grain, finer_than)
        if best is not None and leaves == before:
            continue
        try:
            recording = recorded(leaves)
            graph = build_graph(recording, model, grain.keep_together)
        except CaptureError:
            if best is None:
                raise
            break
        if best is None or len(graph.cuts) > len(best.graph.cuts):
            best = Captured(recording, graph)
        if len(graph.cuts) >= num_ranks - 1:
            break
    assert best is not None
    return best


def record(
    objective: Objective,
    microbatch: Batch,
    model: nn.Module,
    leaves: frozenset[str],
    mode: str = "train",
    *,
    may_close: bool = True,
    num_samples: int | None = None,
    other: Batch | None = None,
) -> Recording:
    """Returns what a forward, and the loss, of a micro-batch do; "evaluate" and "predict" run in eval mode.

    A module whose code cannot be followed is called whole, and so are the others of its class, where they `may_close`;
    what cannot be followed in the model's own forward raises CaptureError.
    """
    shapes = ", ".join(str(list(t.shape)) for t in trees.tensors_of(microbatch[0]))
    which = "the example batch" if may_close else f"a batch with inputs {shapes}"
    retried = final = False
    closed, direct = dict[str, str](), frozenset[str]()
    num_samples = num_samples or _samples(objective, microbatch)
    with (
        untouched(model) as before,
        streamed(model),
        uncompiled(model),
        in_mode(model, mode),
        torch.inference_mode(False),
        torch.set_grad_enabled(mode == "train"),
    ):
        before.keep_attributes()  # the mode
        forwards = Forwards(objective, model, mode, num_samples, which, before)
        while True:
            others, whole = other_generators(), leaves | direct
            try:
                recording, output, targets = forwards.record(microbatch, whole, final=final)
                if forwards.earlier.unsure:
                    final = True
                    continue
                again = partial(forwards.again, microbatch, whole, most_nodes=10 * len(recording.nodes) + 1000)
                recording = settle(recording, again)
                if other is not None and _holds_for(recording, objective, model, other):
                    check_same(recording, forwards.record(other, whole)[0])
                break
            except Trap as trap:
                final = False
                if not trap.line and not retried:  # a flag that the first forward sets
                    retried = True
                    before.keep_attributes()
                    continue
                kind = type(model.get_submodule(trap.module))
                wider = outermost(leaves | set(_like(model, trap.module)))
                if not trap.module or not may_close or (wider == leaves and trap.module in direct):
                    where = f"the forward of {trap.module}" if trap.module else "the model's own forward"
                    raise CaptureError(
                        f"{where} {trap}, which cannot be replayed; expected that in a module of its own, which is "
                        "then called whole"
                    ) from None
                closed[trap.module] = f"{trap.module} ({kind.__name__}) {trap}"
                if wider == leaves:  # a part of what is called whole, called directly
                    direct |= {trap.module}
                leaves = wider
        recording = replace(pruned(recording), closed=tuple(closed.values()))
        _refuse_draws(recording, model)
        if other_generators() != others:
            refuse_draws("the model's forward", lambda: run(model, copy_of(microbatch[0])), model)
        before.keep_attributes()  # code that is followed must not depend on what its last forward left in them
        before.restore()
        plain = counting(objective, mode, run(model, copy_of(microbatch[0])))
        loss = partial(_loss, objective, targets=targets, num_samples=recording.num_samples, which=which)
        _check_loss(objective, mode, model, (output, plain), loss)
        before.restore()
        _check_same(_replay(recording, model, microbatch), plain)
    return recording


def _holds_for(recording: Recording, objective: Objective, model: nn.Module, microbatch: Batch) -> bool:
    """Tells whether a recording is to be replayed for a micro-batch."""
    inputs, targets = microbatch
    made_for = signature("train", inputs, targets if objective.loss is not None else None, recording.is_straight(model))
    return made_for == recording.signature and hold(watch(recording, model), microbatch)


def _like(model: nn.Module, name: str) -> list[str]:
    """Returns a module and the others of its class; of torch's own containers only those beside it."""
    kind, place = type(model.get_submodule(name)), name.rpartition(".")[0]
    found = [n for n, m in model.named_modules() if type(m) is kind and n]
    return [n for n in found if n.rpartition(".")[0] == place] if kind.__module__.startswith("torch.nn.") else found


def _samples(objective: Objective, microbatch: Batch) -> int:
    """Returns how many samples a micro-batch has, as far as its inputs tell."""
    try:
        return 1 if objective.cut else Cutting.of(objective).size(*microbatch)
    except ConfigError:
        return 1


def _replay(recording: Recording, model: nn.Module, microbatch: Batch) -> Any:
    """Returns what replaying a recording gives."""
    routine = cut_routine(recording, (0, len(Layers(recording).nodes)), 0)
    values = leaf_names(*map(copy_of, microbatch))
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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.requires_grad == b.requires_grad and trees.same_values(a, b)


def refuse(model: nn.Module) -> None:
    """Raises CaptureError for what a stage in another process would lose."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is scripted as a whole, so that nothing in it can be cut; expected the module that was given to "
            "torch.jit, of which parts may be scripted"
        )
    if is_compiled(model):
        raise CaptureError(
            "the model is compiled as a whole, and nobody calls it whole; expected the module that was given to "
            "torch.compile, of which parts may be compiled: for block in model.blocks: block.compile()"
        )
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


def _refuse_draws(recording: Recording, model: nn.Module) -> None:
    """Raises CaptureError where a module draws to which no keys of random numbers can be given."""
    for name in {name for node in recording.nodes for name in node.draws if name}:
        if isinstance(model.get_submodule(name), torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is scripted and draws random numbers, which would depend on the split; expected what draws, "
                "such as dropout, outside of scripted modules"
            )


def _check_loss(
    objective: Objective, mode: str, model: nn.Module, outputs: tuple[Any, Any], loss: Callable[[Any], Tensor]
) -> None:
    """Raises CaptureError where the loss of a model's outputs fails, draws random numbers, or reaches a parameter that
    is no part of the model, and where the model itself reaches one.

    What is there in both of two forwards was not made by them: a tensor made to differentiate by is no parameter.
    """
    ends: tuple[Any, ...] = outputs
    if objective.loss is not None and mode != "predict":
        states, others = generator_states(), other_generators()
        with untouched(objective.loss) if isinstance(objective.loss, nn.Module) else nullcontext():
            ends = loss(outputs[0]), loss(outputs[1])
        if has_drawn(states):
            raise CaptureError("the loss draws random numbers; expected only modules of the model to draw")
        if other_generators() != others:
            refuse_draws("the loss", lambda: loss(outputs[0]), model)
    first, second = (foreign(end, model) for end in ends)
    if both := [tensor for number, tensor in first.items() if number in second]:
        largest = max(both, key=Tensor.numel)
        refuse_foreign(largest, model, objective.loss, by_loss=id(largest) not in foreign(outputs[0], model))


def _loss(objective: Objective, output: Any, targets: Any, num_samples: int, which: str) -> Tensor:
    try:
        return loss_of(objective.loss, output, targets, num_samples).total
    except CaptureError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in trees.tensors_of(output)) or "no tensors"
        raise CaptureError(f"the loss failed on {which}, outputs {shapes}: {describe(error)}") from error
