"""One rank's work on a batch: take what an action needs, compute, give what it gives. One loop, no decisions.

::

    for action in the rank's list:      take needs(action)  →  compute  →  give gives(action)
    at the end of a training step:      update
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modelpar.capture.cut import Routine
from modelpar.capture.objective import in_mode
from modelpar.errors import RunError
from modelpar.planning.graph import BATCH, StageGraph, Value
from modelpar.planning.plan import Plan
from modelpar.planning.schedule import Action, Op, ValueKey, gives, needs
from modelpar.run import cuda
from modelpar.run.exchange import Exchange
from modelpar.run.kept import Kept
from modelpar.run.memory import PeakMemory
from modelpar.run.stage_runner import RunContext, StageRunner
from modelpar.run.update import Update

_LISTS_KEPT = 256
_Steps = list[tuple[Action, list[ValueKey], list[ValueKey]]]
"""Actions, each with what it needs and what it gives."""


class Executor:
    """Runs one rank's part of a plan."""

    def __init__(
        self, plan: Plan, runners: dict[int, StageRunner], exchange: Exchange, update: Update, memory: PeakMemory
    ):
        self._plan, self._runners = plan, runners
        self._exchange, self._update, self._memory = exchange, update, memory
        self._device = next(iter(runners.values())).device
        self._last = runners.get(plan.num_stages - 1)
        self._graphs: dict[int, StageGraph] = {}
        """The values between stages, by the number of the recording that is replayed."""
        self._lists: dict[tuple[str, tuple[int, ...]], _Steps] = {}
        self._values: dict[ValueKey, Any] = {}
        """What the current action works on, for messages to people."""
        self._kept: list[Kept] = []
        self._poisoned = False

    def run(self, run: int, context: RunContext, data_wait: float) -> dict[str, Any]:
        """Runs one batch and returns what the controller wants to know of it; for `data_wait` see `Exchange.begin`."""
        if self._poisoned and context.mode == "train":  # an earlier step failed: the weights must stay as before it
            self._exchange.skip(run)
            return {"finite": False}
        torch.set_num_threads(self._plan.num_threads)  # a setting of the thread, as the next
        cuda.use(self._device)
        self._exchange.begin(run, data_wait)
        if context.mode == "train":
            reply = self._train(context)
        elif context.mode == "check":
            reply = self._make_gradients(context)
        elif context.mode == "locate":
            reply = self._locate(context)
        else:
            with ExitStack() as modes:
                for runner in self._runners.values():
                    modes.enter_context(in_mode(runner.program.module, "evaluate"))
                self._walk(context)
            reply = self._losses(context)
        self._exchange.end()
        return reply

    @property
    def doing(self) -> tuple[Action | None, ValueKey | None]:
        """The current action and the value it waits for."""
        return self._exchange.doing

    def describe(self, action: Action, error: BaseException) -> str:
        """Says where an exception happened: stage, layer FQN, action, micro-batch and the shapes it worked on."""
        program = self._runners[action.stage].program
        if action.op is Op.FORWARD:
            layer = program.failing_layer(error.__traceback__)
        else:  # autograd does not say
            layer = f"one of {', '.join(program.layers)}"
        where = f"stage {action.stage}, layer {layer}, action {action}"
        if action.microbatch < 0:
            return where
        tensors = [leaf for leaf in pytree.tree_leaves(list(self._values.values())) if isinstance(leaf, Tensor)]
        shapes = " ".join(str(list(tensor.shape)) for tensor in tensors) or "none"
        return f"{where}, micro-batch {action.microbatch}, input shapes {shapes}"

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the stages' parameters and buffers by FQN, on the CPU, in copies."""
        modules = [runner.program.module for runner in self._runners.values()]
        return {
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for module in modules
            for name, value in module.state_dict().items()
        }

    def learn(self, number: int, graph: StageGraph, routines: dict[int, Routine]) -> None:
        """Takes in another recording: the values between stages, and what each of this rank's stages does."""
        self._graphs[number] = graph
        for stage, routine in routines.items():
            self._runners[stage].learn(number, routine)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads the stages' own entries."""
        for runner in self._runners.values():
            module = runner.program.module
            for name, buffer in list(module.named_buffers()):
                if isinstance(value := state.get(name), Tensor) and value.shape != buffer.shape:  # forward changes it
                    place, _, last = name.rpartition(".")
                    module.get_submodule(place)._buffers[last] = value.to(buffer.device, copy=True)
            module.load_state_dict({name: state[name] for name in module.state_dict()})

    def _train(self, context: RunContext) -> dict[str, Any]:
        for runner in self._runners.values():
            runner.keep_buffers()
        self._walk(context)
        reply = self._losses(context)
        updated = self._update.apply(self._count(reply))
        if updated is None:
            self._poisoned = True
            for runner in self._runners.values():
                runner.undo()
            return {**reply, "finite": False}
        return {**reply, **updated, "spans": self._exchange.timeline(), "peak_bytes": self._peak_bytes(context)}

    def _make_gradients(self, context: RunContext) -> dict[str, Any]:
        """Runs one micro-batch forward and backward; the controller takes the gradients, and then all is undone."""
        for runner in self._runners.values():
            runner.forget()
        self._kept = [Kept(runner.program.module) for runner in self._runners.values()]
        self._walk(context)
        return self._losses(context)

    def take_gradients(self) -> dict[int, dict[str, Tensor]]:
        """Returns the gradients by stage and by the FQN that the model has for them first, and undoes their run."""
        found = {}
        for (stage, runner), kept in zip(self._runners.items(), self._kept, strict=True):
            program, named = runner.program, runner.program.module.named_parameters()
            others = program.copies if self._plan.tied == "exact" else ()  # whose gradients the owner has got
            own = {name: p.grad for name, p in named if p.grad is not None and name not in others}
            found[stage] = {program.first_names.get(name, name): grad.cpu() for name, grad in own.items()}
            runner.forget()
            kept.restore()
        self._kept = []
        return found

    def _walk(self, context: RunContext) -> None:
        """Does the rank's list of actions."""
        exchange = self._exchange
        for action, needed, given in self._steps(context):
            runner = self._runners[action.stage]
            self._values = {key: exchange.take(key, action) for key in needed}
            named = {key.name: value for key, value in self._values.items()}
            exchange.doing = (action, None)
            start = exchange.mark()
            if action.op is Op.FORWARD:
                results = runner.forward(action.microbatch, named, context)
            else:
                results = runner.backward(action.microbatch, named)
            end = exchange.computed(action.op.value, start, action)
            self._values = {}
            for key in given:
                exchange.give(key, runner.take_grad(key.name) if key.kind == "tied_grad" else results[key.name])
            if given:
                exchange.note("send", end, action)
        exchange.doing = (None, None)

    def _steps(self, context: RunContext) -> _Steps:
        """Returns the rank's actions for a batch's micro-batches, with the values that their recordings exchange."""
        mode, variants = context.mode, context.variants
        if (mode, variants) not in self._lists:
            if len(self._lists) >= _LISTS_KEPT:  # a batch may be any mixture of recordings
                del self._lists[next(iter(self._lists))]
            graphs = [self._graphs[number] for number in variants]
            if mode == "predict":
                graphs = [_for_prediction(graph) for graph in graphs]
            if mode == "check":  # some schedules are for many micro-batches only
                schedule = self._plan.schedule
            else:
                schedule = (self._plan.schedule_for if mode == "train" else self._plan.forward_schedule)(len(variants))
            self._lists[mode, variants] = [
                (action, needs(graphs[action.microbatch], action), gives(graphs[action.microbatch], action))
                for action in schedule.actions(self._exchange.rank)
                if action.microbatch < len(variants)
            ]
        return self._lists[mode, variants]

    def _losses(self, context: RunContext) -> dict[str, Any]:
        """Returns, on the rank of the last stage, the batch's sums in ascending order of micro-batch."""
        if self._last is None or context.mode == "predict":
            return {}
        losses = [self._last.losses.pop(i) for i in range(len(context.sizes))]
        total = losses[0].total
        for loss in losses[1:]:
            total = total + loss.total
        count = sum(loss.count for loss in losses)
        names = dict.fromkeys(name for loss in losses for name in loss.metrics)
        metrics = {name: sum(loss.metrics.get(name, 0.0) * loss.count for loss in losses) for name in names}
        return {
            "total": float(total),
            "loss": float(total / count) if count else float("nan"),
            "count": count,
            "metrics": {name: value / count if count else float("nan") for name, value in metrics.items()},
            "nonfinite": [i for i, loss in enumerate(losses) if not bool(torch.isfinite(loss.total))],
        }

    def _count(self, losses: dict[str, Any]) -> float | None:
        """Returns, on the rank of the last stage, what the loss is a mean over; None where it is not finite."""
        if self._last is None or losses["nonfinite"]:
            return None
        if not losses["count"]:
            raise RunError("the loss counted nothing in this step: every LossResult.count was 0; expected more than 0")
        count: float = losses["count"]
        return count

    def _locate(self, context: RunContext) -> dict[str, Any]:
        """Runs one micro-batch forward to find, per stage, the first module whose output is not finite.

        The controller asks for it after it knows of the failed step, which is where training may go on.
        """
        self._poisoned = False
        for runner in self._runners.values():
            runner.keep_buffers()
        found: dict[int, str] = {}
        for action, needed, given in self._steps(context):
            values = {key.name: self._exchange.take(key, action) for key in needed}
            results, name = self._runners[action.stage].first_nonfinite(values, context)
            if name is not None:
                found[action.stage] = name
            for key in given:
                self._exchange.give(key, results[key.name])
        for runner in self._runners.values():
            runner.undo()
        return {"nonfinite": found}

    def _peak_bytes(self, context: RunContext) -> int:
        """Returns the measured peak, or else counts tensors: weights, gradients, optimizer, activations in flight."""
        measured = self._memory.bytes()
        if measured is not None:
            return measured
        profile, total = self._plan.profile, self._update.state_bytes()
        for stage, runner in self._runners.items():
            weights = sum(p.numel() * p.element_size() for p in runner.program.module.parameters())
            saved = sum(profile.layers[i].saved_bytes for i in self._plan.partition.layers(stage))
            total += 2 * weights + int(runner.peak_live * saved * max(context.sizes) / profile.microbatch_size)
        return total


def _for_prediction(graph: StageGraph) -> StageGraph:
    """Returns the data flow with the last stage's output going back to the controller."""
    output = Value("output", graph.num_stages - 1, (BATCH,), needs_grad=False)
    return replace(graph, values=(*graph.values, output))
