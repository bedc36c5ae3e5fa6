"""A model that trains in stages: Pipeline, the object that users hold."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelpar.capture.capture import leaf_names
from modelpar.capture.cut import cut_stage
from modelpar.capture.deferred import deferred_in
from modelpar.capture.graph import first_names, parameters_of
from modelpar.capture.objective import (
    Batch,
    Objective,
    batch_size,
    check_lengths,
    microbatch_sizes,
    split_batch,
)
from modelpar.errors import ConfigError, ModelparError, NonFiniteLoss, RunError
from modelpar.planning.graph import BATCH
from modelpar.planning.plan import Plan
from modelpar.planning.result import StepResult
from modelpar.planning.schedule import ValueKey
from modelpar.planning.timeline import Timeline
from modelpar.planning.verdict import Check
from modelpar.run import cuda, first_step, wire
from modelpar.run.first_step import UnsplitModel
from modelpar.run.numerics import Numerics
from modelpar.run.stage_runner import RunContext
from modelpar.run.update import OptimizerFactory, Settings, check_settings
from modelpar.run.variants import Variant, Variants
from modelpar.run.workers import Workers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalResult:
    """What `Pipeline.evaluate` found over all its batches."""

    loss: float
    """Sum of totals over sum of counts."""
    count: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Submitted:
    """A training step on its way."""

    step: int
    run: int
    tickets: list[tuple[int, int]]
    batch: Batch
    sizes: tuple[int, ...]


class Pipeline:
    """An objective, split as a plan says, on workers.

    ::

        with Pipeline(objective, plan, optimizer=make_optimizer) as pipeline:
            result = pipeline.step((inputs, targets))

    `optimizer(named_parameters)` makes a torch optimizer of (FQN, parameter) pairs; every rank calls it for the
    parameters it owns. `lr_schedule(optimizer)` makes a learning-rate schedule that is stepped after every training
    step. `max_norm` clips the gradients of the whole model by their 2-norm. A Pipeline given no workers starts
    processes of its own. The user's module is never changed: `state_dict()` returns the trained weights.

    With `check`, before the first step its first micro-batch is run by the user's module as well: SplitMismatch is
    raised where its loss or a gradient is another, and nothing is trained. The attribute `check` says what came of it.

    Raises PlanMismatch where the plan was made for another model and ConfigError for arguments that cannot be used,
    before anything runs.
    """

    def __init__(
        self,
        objective: Objective,
        plan: Plan,
        *,
        workers: Workers | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        max_norm: float | None = None,
        seed: int = 0,
        check: bool = True,
    ):
        if workers is not None and workers.num_ranks < plan.num_ranks:
            raise ConfigError(f"the plan has {plan.num_ranks} ranks, the workers {workers.num_ranks}; expected as many")
        self._objective, self._plan = objective, plan
        self._settings = Settings(optimizer, lr_schedule, max_norm, seed)
        check_settings(self._settings, plan.graph)
        self._given_workers = workers
        self._workers: Workers | None = None
        self._exits = ExitStack()
        self.check: Check | None = None
        """What came of comparing the first micro-batch with the unsplit model; None before, and where nobody asked."""
        self._wants_check = check
        self._unsplit_model: UnsplitModel | None = None
        self._has_loaded = False
        self._step = 0
        self._under_way: deque[_Submitted] = deque()
        self._learning: list[tuple[int, int]] = []
        """Tickets of recordings that ranks were told of."""
        self._model_shapes: dict[str, torch.Size | None] = {}
        self._first_names: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Builds the model where it is a factory, and ships each stage to its rank."""
        self._step, self.check, self._has_loaded = 0, None, False
        self._under_way.clear()
        model = self._objective.build(self._settings.seed)
        self._unsplit_model = UnsplitModel(model) if self._wants_check else None
        self._plan.check_parameters(parameters_of(model))
        self._variants = Variants(self._objective, self._plan, self._unsplit(model))
        self._model_shapes = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
        self._first_names = first_names(model)
        with ExitStack() as exits:
            self._workers = self._given_workers or exits.enter_context(Workers(self._plan.num_ranks))
            self._number = self._workers.next_number()
            of_model = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
            what = "the plan, the optimizer or the learning-rate schedule"
            setup = wire.ship_as(what, (self._plan, self._settings, Numerics.current()), of_model)
            tickets = []
            for rank in range(self._plan.num_ranks):
                stages = [s for s, home in enumerate(self._plan.schedule.stage_to_rank) if home == rank]
                programs = [self._program(model, stage, of_model) for stage in stages]
                tickets.append(self._command(rank, "load", setup=setup, programs=programs))
            self._workers.wait_replies(tickets)
            self._workers.compare_clocks()
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the pipeline from its workers, and stops them where it started them."""
        try:
            if error is None:
                self._ask_all("unload")
            elif self._given_workers is not None:  # they may go on with another pipeline, if they still run
                with suppress(ModelparError):
                    for rank in range(self._plan.num_ranks):
                        self._command(rank, "unload")
        finally:
            self._exits.__exit__(kind, error, traceback)
            self._workers = self._unsplit_model = None

    def step(self, batch: Batch) -> StepResult:
        """Trains on one batch (inputs, targets) and returns its loss, norm and timeline.

        Raises StageError for an exception in the model, NonFiniteLoss before such a loss reaches the weights,
        WorkerLost where a worker ended or fell silent, and StepTimeout.
        """
        return self._collect(self._submit(batch, 0.0))

    def steps(self, batches: Iterable[Batch]) -> Iterator[StepResult]:
        """Trains on batches, yielding each step's result; one more step than was yielded may already be under way.

        Time spent waiting for the iterator is shown in the timeline as data. Batches are copied, so that the iterator
        may use their memory again.
        """
        pending: _Submitted | None = None
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            submitted = self._submit(wire.copy(batch), time.perf_counter() - start)
            if pending is not None:
                yield self._collect(pending)
            pending = submitted
        if pending is not None:
            yield self._collect(pending)

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Returns the mean loss over batches in eval mode; touches neither weights nor training's random numbers."""
        total = count = 0.0
        metrics: dict[str, float] = {}
        for batch in batches:
            _, _, tickets = self._start("evaluate", batch, step=0)
            reply = self._merged(tickets)
            total += reply["total"]
            count += reply["count"]
            for name, value in reply["metrics"].items():
                metrics[name] = metrics.get(name, 0.0) + value * reply["count"]
        if not count:
            raise ConfigError("evaluate got no samples; expected at least one batch with a count above 0")
        return EvalResult(total / count, count, {name: value / count for name, value in metrics.items()})

    def predict(self, inputs: Any) -> Any:
        """Returns the output for inputs, in eval mode, on the CPU; tensors are joined along the batch dimension."""
        run, sizes, tickets = self._start("predict", (inputs, None), step=0)
        last = self._plan.num_stages - 1
        keys = [ValueKey("value", "output", i, last, BATCH) for i in range(len(sizes))]
        self._merged(tickets)
        assert self._workers
        outputs = [wire.unpack(self._workers.wait((run, key)), torch.device("cpu")) for key in keys]
        return _join(outputs, sizes, self._objective.batch_dim)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns weights and buffers, on the CPU, with the unsplit model's keys in its order; tied ones are one."""
        found: dict[str, Tensor] = {}
        for state in reversed(self._ask_all("state_dict")):
            found |= {self._first_names.get(name, name): value for name, value in state.items()}
        return {name: found[self._first_names.get(name, name)] for name in self._model_shapes}

    def stage_states(self) -> list[dict[str, Tensor]]:
        """Returns, per rank, what it holds of the weights and buffers, copies of tied ones included."""
        return self._ask_all("state_dict")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads weights and buffers by the unsplit model's keys; raises ConfigError for keys or shapes that differ."""
        missing, unknown = set(self._model_shapes) - set(state), set(state) - set(self._model_shapes)
        if missing or unknown:
            raise ConfigError(
                f"the state does not fit the model: missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}"
            )
        for name, shape in self._model_shapes.items():
            found = getattr(state[name], "shape", None)
            if found != shape:
                raise ConfigError(f"the state's {name} has shape {list(found or [])}; expected {list(shape or [])}")
        self._ask_all("load_state_dict", state=cuda.staged(state))
        self._has_loaded = True

    def _submit(self, batch: Batch, data_wait: float) -> _Submitted:
        if self._settings.optimizer is None:
            raise ConfigError("this pipeline has no optimizer; expected Pipeline(..., optimizer=...) to train")
        step = self._step
        if self._unsplit_model is not None:
            self._check_first(batch)
        run, sizes, tickets = self._start("train", batch, step, data_wait)
        self._step += 1
        submitted = _Submitted(step, run, tickets, batch, sizes)
        self._under_way.append(submitted)
        return submitted

    def _check_first(self, batch: Batch) -> None:
        """Compares the first micro-batch's loss and gradients with the unsplit model's, which is not kept any longer.

        Raises SplitMismatch; then nothing has changed.
        """
        unsplit = self._unsplit_model
        assert unsplit is not None
        if deferred_in(unsplit.model):
            reason = "not compared: no process holds the whole model; `modelpar verify` makes it and compares"
            self._say_check(Check(first_step.NAME, False, reason, compared=False))
            return
        inputs, targets = _checked(batch)
        dim = self._objective.batch_dim
        check_lengths(targets, batch_size(inputs, dim), dim)
        _refuse_autocast()
        sizes = microbatch_sizes(batch_size(inputs, dim), self._plan.num_microbatches)
        microbatch = split_batch(inputs, sizes, dim)[0], split_batch(targets, sizes, dim)[0]
        context = RunContext("check", 0, (sizes[0],))
        _, tickets = self._dispatch(context, [microbatch[0]], [microbatch[1]])
        total = self._merged(tickets)["total"]
        found = first_step.Gradients(total, first_step.joined(self._ask_all("take_gradients")))
        draws, seed = self._variant("train", microbatch).draws, self._settings.seed

        others = self.state_dict() if self._has_loaded or unsplit.has_changed else {}

        def run() -> first_step.Gradients:
            return unsplit.gradients(self._objective, self._plan, microbatch, sizes[0], draws, seed, others)

        try:
            with self._need_workers().generators, first_step.num_threads(self._plan.num_threads):
                check = first_step.compare(found, run(), self._plan, iter(run, None))
        except torch.OutOfMemoryError:
            reason = "not compared: the unsplit model does not fit the last stage's device beside the stage"
            check = Check(first_step.NAME, False, reason, compared=False)
        self._say_check(check)

    def _say_check(self, check: Check) -> None:
        self.check, self._unsplit_model = check, None
        _log.info("%s: %s", check.what, check.detail)

    def _start(
        self, mode: str, batch: Batch, step: int, data_wait: float = 0.0
    ) -> tuple[int, tuple[int, ...], list[tuple[int, int]]]:
        """Sends a batch's micro-batches to the stages that use them, and tells all ranks to run."""
        inputs, targets = _checked(batch)
        dim = self._objective.batch_dim
        num_samples = batch_size(inputs, dim)
        check_lengths(targets, num_samples, dim)
        _refuse_autocast()
        sizes = tuple(microbatch_sizes(num_samples, self._plan.num_microbatches))
        pieces = split_batch(inputs, list(sizes), dim), split_batch(targets, list(sizes), dim)
        run, tickets = self._dispatch(RunContext(mode, step, sizes), *pieces, data_wait)
        return run, sizes, tickets

    def _dispatch(
        self, context: RunContext, inputs: list[Any], targets: list[Any], data_wait: float = 0.0
    ) -> tuple[int, list[tuple[int, int]]]:
        """Tells all ranks to run micro-batches, and sends these; returns the run's number and the tickets."""
        workers = self._need_workers()
        mode = "train" if context.mode in ("check", "locate") else context.mode
        microbatches = list(zip(inputs, targets, strict=True))
        variants = [self._variant(mode, microbatch) for microbatch in microbatches]
        context = context._replace(variants=tuple(variant.number for variant in variants))
        run = workers.next_number()
        try:
            tickets = [
                self._command(rank, "run", run=run, context=context, data_wait=data_wait)
                for rank in range(self._plan.num_ranks)
            ]
            for i, (variant, microbatch) in enumerate(zip(variants, microbatches, strict=True)):
                leaves = leaf_names(*microbatch)
                for value in variant.graph.values:
                    if value.producer == BATCH:
                        for stage in value.consumers:
                            key = ValueKey("value", value.name, i, BATCH, stage)
                            rank = self._plan.schedule.stage_to_rank[stage]
                            workers.give(rank, (run, key), leaves[value.name])
        except BaseException as error:  # ranks that wait for the rest of a batch would wait for ever
            workers.fail(RunError(f"a batch could not be sent: {type(error).__name__}: {error}"))
            raise
        return run, tickets

    def _variant(self, mode: str, microbatch: Batch) -> Variant:
        """Returns what the ranks do with a micro-batch, and tells them where it is new."""
        found = self._variants.find(mode, microbatch)
        if found is None:
            with self._need_workers().generators:
                found = self._variants.add(mode, microbatch)
            for rank in range(self._plan.num_ranks):
                homes = enumerate(self._plan.schedule.stage_to_rank)
                routines = {stage: found.routines[stage] for stage, home in homes if home == rank}
                parcel = wire.ship_as("what the model's own forward does", (found.number, found.graph, routines))
                self._learning.append(self._command(rank, "learn", recording=parcel))
        return found

    def _unsplit(self, model: nn.Module) -> Callable[[], nn.Module]:
        """Returns what gives the unsplit model: one made by a factory is not kept once it has been recorded."""
        if isinstance(self._objective.model, nn.Module):
            return lambda: model
        first = [model]
        return lambda: first.pop() if first else self._objective.build(self._settings.seed)

    def _collect(self, submitted: _Submitted) -> StepResult:
        """Waits for a step, and before it for earlier ones that nobody collected, such as after leaving `steps`."""
        while self._under_way and self._under_way[0] is not submitted:
            self._finish(self._under_way[0])
        return self._finish(submitted)

    def _finish(self, submitted: _Submitted) -> StepResult:
        self._under_way.popleft()
        reply = self._merged(submitted.tickets)
        if not reply["finite"]:
            self._under_way.clear()  # the ranks skip what was under way behind it
            self._step = submitted.step + 1
            raise self._explain_nonfinite(submitted, reply.get("nonfinite", [0]))
        workers = self._need_workers()
        workers.compare_clocks()
        spans, clock_error = workers.on_one_clock(reply["spans"])
        return StepResult(
            step=submitted.step,
            loss=reply["loss"],
            count=reply["count"],
            grad_norm=reply["grad_norm"],
            lr=reply["lr"],
            timeline=Timeline.of(self._plan.num_ranks, spans, clock_error),
            metrics=reply["metrics"],
            peak_bytes=tuple(reply["peak_bytes"]),
        )

    def _explain_nonfinite(self, submitted: _Submitted, wrong: list[int]) -> NonFiniteLoss:
        """Runs the offending micro-batch forward once more, with the same random numbers, looking at every module."""
        (first, *_), dim = wrong, self._objective.batch_dim
        sizes = list(submitted.sizes)
        inputs = split_batch(submitted.batch[0], sizes, dim)[first]
        targets = split_batch(submitted.batch[1], sizes, dim)[first]
        context = RunContext("locate", submitted.step, (sizes[first],), first)
        _, tickets = self._dispatch(context, [inputs], [targets])
        found: dict[int, str] = {}
        for reply in self._need_workers().wait_replies(tickets, step=True):
            found |= reply["nonfinite"]
        where = (
            f"the first to go wrong is {found[min(found)]} on stage {min(found)}" if found else "no layer's output is"
        )
        return NonFiniteLoss(
            f"step {submitted.step}: the loss of micro-batch {first} is not finite; {where}. The weights are as before "
            "this step"
        )

    def _merged(self, tickets: list[tuple[int, int]]) -> dict[str, Any]:
        """Waits for all ranks and joins what they replied."""
        merged: dict[str, Any] = {"spans": [], "peak_bytes": [], "finite": True, "grad_norm": None, "lr": None}
        self._need_workers().wait_replies(self._learning)
        self._learning.clear()
        for reply in self._need_workers().wait_replies(tickets, step=True):
            merged["spans"] += reply.pop("spans", [])
            merged["peak_bytes"].append(reply.pop("peak_bytes", 0))
            merged["finite"] &= reply.pop("finite", True)
            merged |= {name: value for name, value in reply.items() if value is not None}
        return merged

    def _program(self, model: nn.Module, stage: int, of_model: dict[int, str]) -> wire.Parcel:
        plan = self._plan
        program = cut_stage(
            model, plan.graph, plan.stage_graph, plan.partition.layers(stage), stage, self._objective.loss
        )
        what = f"stage {stage} ({program.layers[0]} … {program.layers[-1]})"
        own = {id(tensor) for tensor in (*program.module.parameters(), *program.module.buffers())}
        return wire.ship_as(what, program, {number: name for number, name in of_model.items() if number not in own})

    def _need_workers(self) -> Workers:
        if self._workers is None:
            raise RunError("the pipeline does not run; expected to be used inside `with Pipeline(...) as pipeline:`")
        return self._workers

    def _command(self, rank: int, name: str, **arguments: Any) -> tuple[int, int]:
        return self._need_workers().command(rank, name, pipeline=self._number, **arguments)

    def _ask_all(self, name: str, **arguments: Any) -> list[Any]:
        self._need_workers()
        tickets = [self._command(rank, name, **arguments) for rank in range(self._plan.num_ranks)]
        return self._need_workers().wait_replies(tickets)


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ConfigError(f"the batch is a {type(batch).__name__}; expected a pair (inputs, targets)")
    return batch[0], batch[1]


def _refuse_autocast() -> None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ConfigError(
            "autocast is on around the pipeline, which its ranks would not see; expected it inside the model's forward"
        )


def _join(outputs: list[Any], sizes: tuple[int, ...], dim: int) -> Any:
    """Joins the outputs of micro-batches: tensors as long as their micro-batch along the batch dimension."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    spec = flat[0][1]
    joined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        cut = all(
            isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == n for x, n in zip(leaves, sizes, strict=True)
        )
        if not cut and len(leaves) > 1 and isinstance(leaves[0], Tensor):
            raise ConfigError(
                f"an output has shape {list(leaves[0].shape)} for a micro-batch of {sizes[0]}, which cannot be joined; "
                f"expected dimension {dim} to count samples"
            )
        joined.append(torch.cat(leaves, dim).detach() if cut else leaves[0])
    return pytree.tree_unflatten(joined, spec)
