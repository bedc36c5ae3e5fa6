"""One rank's work in a step: take what an action needs, compute, give what it gives. One loop, no decisions.

::

    for action in the rank's list:      wait for needs(action)  →  compute  →  send gives(action)
    at the end of a training step:      count → tied gradients → divide → norms → clip → update → tied weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelpar.errors import RunError
from modelpar.planning.graph import BATCH, StageGraph, Value
from modelpar.planning.plan import Plan
from modelpar.planning.schedule import Action, Op, ValueKey, gives, needs
from modelpar.planning.timeline import Span
from modelpar.run import wire
from modelpar.run.memory import PeakMemory
from modelpar.run.stage_runner import RunContext, StageRunner
from modelpar.run.transport import CONTROLLER, Mailbox, Transport

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes an optimizer of (FQN, parameter) pairs; every class in torch.optim takes them."""


@dataclass(frozen=True)
class Settings:
    """How a pipeline trains, the same on every rank."""

    optimizer: OptimizerFactory | None = None
    lr_schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    max_norm: float | None = None
    seed: int = 0


class Executor:
    """Runs one rank's part of a plan."""

    def __init__(
        self,
        rank: int,
        plan: Plan,
        settings: Settings,
        runners: dict[int, StageRunner],
        mailbox: Mailbox,
        transport: Transport,
        memory: PeakMemory,
    ):
        self.rank = rank
        self.doing: tuple[Action | None, ValueKey | None] = (None, None)
        """The current action and the value it waits for, for messages to people."""
        self._plan, self._settings, self._runners = plan, settings, runners
        self._mailbox, self._transport, self._memory = mailbox, transport, memory
        self._device = next(iter(runners.values())).device
        self._graph = replace(plan.stage_graph, clips=settings.max_norm is not None)
        self._placement = plan.schedule.stage_to_rank
        self._lists: dict[tuple[str, int], list[tuple[Action, list[ValueKey], list[ValueKey]]]] = {}
        self._spans: list[Span] = []
        self._values: dict[ValueKey, Any] = {}
        """What the current action works on, for messages to people."""
        self._poisoned = False
        self._idle_since = perf_counter()
        self._owned = {stage: runner.program.owned_parameters() for stage, runner in runners.items()}
        named = [pair for owned in self._owned.values() for pair in owned.items()]
        self._optimizer = settings.optimizer(named) if settings.optimizer and named else None
        self._lr_schedule = settings.lr_schedule(self._optimizer) if settings.lr_schedule and self._optimizer else None

    # --- one run of a batch ---------------------------------------------------------------------------------------

    def run(self, run: int, context: RunContext, data_wait: float) -> dict[str, Any]:
        """Runs one batch and returns what the controller wants to know of it.

        `data_wait` is how long (seconds) the controller waited for this batch, ending now; as far as this rank was idle
        meanwhile the timeline shows it.
        """
        torch.set_num_threads(self._plan.num_threads)  # a setting of the thread
        self._spans = []
        if context.mode == "train":
            return self._train(run, context, data_wait)
        if context.mode == "locate":
            return self._locate(run, context)
        with self._evaluating():
            self._walk(run, context)
        self._end_run(run)
        return self._losses(context)

    def _train(self, run: int, context: RunContext, data_wait: float) -> dict[str, Any]:
        if self._poisoned:  # an earlier step in flight failed: the weights must stay as they were before it
            self._mailbox.discard(run)
            return {"spans": [], "finite": False}
        now = perf_counter()
        idle = min(data_wait, now - self._idle_since)
        if idle > 0:
            self._spans.append(Span(self.rank, "data", now - idle, now, cause="the next batch"))
        for runner in self._runners.values():
            runner.keep_buffers()
        self._walk(run, context)
        reply = self._losses(context)
        reply |= self._update(run, context)
        self._end_run(run)
        return {**reply, "spans": self._spans, "peak_bytes": self._peak_bytes(context)}

    def _walk(self, run: int, context: RunContext) -> None:
        """Does the rank's list of actions."""
        for action, needed, given in self._actions(context.mode, len(context.sizes)):
            runner = self._runners[action.stage]
            values = {key: self._take(run, key, action) for key in needed}
            self.doing, self._values = (action, None), values
            start = perf_counter()
            if action.op is Op.FORWARD:
                named = {key.name: value for key, value in values.items()}
                results = runner.forward(action.microbatch, named, context)
            else:
                grads = {key.name: value for key, value in values.items()}
                results = runner.backward(action.microbatch, grads)
            self._values = {}
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            end = perf_counter()
            self._spans.append(Span(self.rank, action.op.value, start, end, action.stage, action.microbatch))
            for key in given:
                value = runner.take_grad(key.name) if key.kind == "tied_grad" else results[key.name]
                self._send(run, key, value)
            if given:
                self._spans.append(Span(self.rank, "send", end, perf_counter(), action.stage, action.microbatch))

    def _actions(self, mode: str, num_microbatches: int) -> list[tuple[Action, list[ValueKey], list[ValueKey]]]:
        """Returns the rank's actions with what each needs and gives."""
        kind = "train" if mode == "train" else "predict" if mode == "predict" else "evaluate"
        if (kind, num_microbatches) not in self._lists:
            graph = _for_prediction(self._graph) if kind == "predict" else self._graph
            plan = self._plan
            schedule = (plan.schedule_for if kind == "train" else plan.forward_schedule)(num_microbatches)
            self._lists[kind, num_microbatches] = [
                (action, needs(graph, action), gives(graph, action)) for action in schedule.actions(self.rank)
            ]
        return self._lists[kind, num_microbatches]

    def _end_run(self, run: int) -> None:
        self.doing = (None, None)
        self._transport.flush()
        left = self._mailbox.left(run)
        self._idle_since = perf_counter()
        assert not left, f"rank {self.rank} ended a step without taking {left}"

    def _take(self, run: int, key: ValueKey, action: Action) -> Any:
        """Takes a value that an action needs out of the mailbox; a wait for it becomes a span."""
        if not self._mailbox.has((run, key)):
            self.doing = (action, key)
            start = perf_counter()
            value = self._mailbox.wait((run, key))
            self.doing = (action, None)
            kind = "data" if key.source == BATCH else "wait"
            self._spans.append(
                Span(self.rank, kind, start, perf_counter(), action.stage, action.microbatch, cause=str(key))
            )
        else:
            value = self._mailbox.wait((run, key))
        return wire.unpack(value, self._device)

    def _send(self, run: int, key: ValueKey, value: Any) -> None:
        rank = CONTROLLER if key.target == BATCH else self._placement[key.target]
        if rank == self.rank:
            self._mailbox.put((run, key), wire.detach(value))
        else:
            self._transport.send(rank, (run, key), self._transport.pack(value))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(m, m.training) for runner in self._runners.values() for m in runner.program.module.modules()]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    # --- the end of a training step -------------------------------------------------------------------------------

    def _update(self, run: int, context: RunContext) -> dict[str, Any]:
        """Divides, clips and applies the gradients; does nothing where the loss was not finite.

        The order of operations is that of `clip_grad_norm_` followed by `optimizer.step` on the unsplit model.
        """
        start = perf_counter()
        updates = {stage: Action(stage, Op.UPDATE) for stage in self._runners}

        def take(stage: int, kind: str) -> dict[ValueKey, Any]:
            keys = [key for key in needs(self._graph, updates[stage]) if key.kind == kind]
            return {key: self._take(run, key, updates[stage]) for key in keys}

        def give(stage: int, kind: str, value: Any) -> None:
            for key in gives(self._graph, updates[stage]):
                if key.kind == kind:
                    self._send(run, key, value(key.name) if callable(value) else value)

        count = self._count(context)
        for stage in self._runners:
            give(stage, "count", count)
        for stage in self._runners:
            count = next(iter(take(stage, "count").values()), count)
        if count is None:
            self._poisoned = True
            for runner in self._runners.values():
                runner.undo()
            return {"finite": False}

        for stage in sorted(self._runners, reverse=True):  # a copy's gradient goes from the latest use to the owner
            runner = self._runners[stage]
            for key, grads in take(stage, "tied_grad").items():
                runner.add_grad(key.name, grads)
            give(stage, "tied_grad", runner.take_grad)

        named = {name: p for owned in self._owned.values() for name, p in owned.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad.div_(count)
        norms = {name: torch.linalg.vector_norm(parameter.grad) for name, parameter in named.items()}
        total = None
        for stage in self._runners:
            give(stage, "norms", {name: norms[name] for name in self._owned[stage] if name in norms})
        if 0 in self._runners:
            for others in take(0, "norms").values():
                norms |= others
            ordered = [norms[name] for name in self._names() if name in norms]
            total = torch.linalg.vector_norm(torch.stack(ordered)) if ordered else torch.zeros(())
            give(0, "total_norm", total)
        for stage in self._runners:
            total = next(iter(take(stage, "total_norm").values()), total)
        if self._settings.max_norm is not None and named:
            nn.utils.clip_grads_with_norm_(list(named.values()), self._settings.max_norm, total)
        reduced = perf_counter()
        self._spans += _without_waits(Span(self.rank, "reduce", start, reduced), self._spans)

        lr = self._optimizer.param_groups[0]["lr"] if self._optimizer else None
        if self._optimizer:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._lr_schedule:
            self._lr_schedule.step()
        updated = perf_counter()
        self._spans.append(Span(self.rank, "optimizer", reduced, updated))
        for stage, runner in self._runners.items():
            give(stage, "weight", lambda name, runner=runner: runner.parameter(name).detach())
            for key, weight in take(stage, "weight").items():
                runner.parameter(key.name).detach().copy_(weight)
        norm = float(total) if 0 in self._runners else None
        return {"finite": True, "lr": None if lr is None else float(lr), "grad_norm": norm}

    def _count(self, context: RunContext) -> float | None:
        """Returns N on the rank of the last stage, None there where a loss is not finite; elsewhere None too."""
        last = self._runners.get(self._plan.num_stages - 1)
        if last is None:
            return None
        if not all(bool(torch.isfinite(loss.total)) for loss in last.losses.values()):
            return None
        count = sum(last.losses[i].count for i in range(len(context.sizes)))
        if not count:
            raise RunError("the loss counted nothing in this step: every LossResult.count was 0; expected more than 0")
        return count

    def _losses(self, context: RunContext) -> dict[str, Any]:
        """Returns, on the rank of the last stage, the step's sums in ascending order of micro-batch."""
        last = self._runners.get(self._plan.num_stages - 1)
        if last is None or context.mode == "predict":
            return {}
        losses = [last.losses.pop(i) for i in range(len(context.sizes))]
        if context.mode == "train":  # the count is taken from them at the step's end
            last.losses.update(enumerate(losses))
        total = losses[0].total
        for loss in losses[1:]:
            total = total + loss.total
        count = sum(loss.count for loss in losses)
        names = dict.fromkeys(name for loss in losses for name in loss.metrics)
        metrics = {name: sum(float(loss.metrics[name]) * loss.count for loss in losses) for name in names}
        return {
            "total": float(total),
            "loss": float(total / count) if count else float("nan"),
            "count": count,
            "metrics": {name: value / count if count else float("nan") for name, value in metrics.items()},
            "nonfinite": [i for i, loss in enumerate(losses) if not bool(torch.isfinite(loss.total))],
        }

    def _locate(self, run: int, context: RunContext) -> dict[str, Any]:
        """Runs one micro-batch forward to find, per stage, the first module whose output is not finite.

        The controller asks for it after it knows of the failed step, which is where training may go on.
        """
        self._poisoned = False
        for runner in self._runners.values():
            runner.keep_buffers()
        found: dict[int, str] = {}
        for action, needed, given in self._actions(context.mode, 1):
            runner = self._runners[action.stage]
            values = {key.name: self._take(run, key, action) for key in needed}
            results, name = runner.first_nonfinite(values, context)
            if name is not None:
                found[action.stage] = name
            for key in given:
                self._send(run, key, results[key.name])
        self._end_run(run)
        for runner in self._runners.values():
            runner.undo()
        return {"nonfinite": found}

    def describe(self, action: Action, error: BaseException) -> str:
        """Says where an exception happened: stage, layer FQN, action, micro-batch and the shapes it worked on."""
        runner = self._runners[action.stage]
        layer = runner.program.failing_layer(error.__traceback__) if action.op is Op.FORWARD else "unknown"
        tensors = [leaf for leaf in pytree.tree_leaves(list(self._values.values())) if isinstance(leaf, Tensor)]
        shapes = " ".join(str(list(tensor.shape)) for tensor in tensors) or "none"
        where = f"stage {action.stage}, layer {layer}, action {action}"
        return f"{where}, micro-batch {action.microbatch}, input shapes {shapes}" if action.microbatch >= 0 else where

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the stages' parameters and buffers by FQN, on the CPU, in copies."""
        modules = [runner.program.module for runner in self._runners.values()]
        return {name: value.detach().cpu().clone() for module in modules for name, value in module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads the stages' own entries."""
        for runner in self._runners.values():
            module = runner.program.module
            module.load_state_dict({name: state[name] for name in module.state_dict()})

    # --- small things -----------------------------------------------------------------------------------------------

    def _peak_bytes(self, context: RunContext) -> int:
        """Returns the measured peak, or else counts tensors: weights, gradients, optimizer, activations in flight."""
        measured = self._memory.bytes()
        if measured is not None:
            return measured
        profile, total = self._plan.profile, 0
        for stage, runner in self._runners.items():
            weights = sum(p.numel() * p.element_size() for p in runner.program.module.parameters())
            saved = sum(profile.layers[i].saved_bytes for i in self._plan.partition.layers(stage))
            total += 2 * weights + int(runner.peak_live * saved * max(context.sizes) / profile.microbatch_size)
        states = self._optimizer.state.values() if self._optimizer else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return total + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _names(self) -> Iterator[str]:
        """Yields the FQNs of all parameters in the order of `model.parameters()`."""
        return (p.name for layer in self._plan.graph.layers for p in layer.parameters if not p.buffer)


def _for_prediction(graph: StageGraph) -> StageGraph:
    """Returns the data flow without targets, and with the last stage's output going back to the controller."""
    values = [value for value in graph.values if value.name != "targets"]
    output = Value("output", graph.num_stages - 1, (BATCH,), needs_grad=False)
    return replace(graph, values=(*values, output))


def _without_waits(whole: Span, spans: list[Span]) -> Iterator[Span]:
    """Cuts a span into the pieces that the waits recorded since its start leave."""
    edges = [whole.start]
    for span in spans:
        if span.start >= whole.start:
            edges += [span.start, span.end]
    edges.append(whole.end)
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end > start:
            yield whole._replace(start=start, end=end)
