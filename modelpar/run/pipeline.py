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

from modelpar.capture.cut import StageProgram, cut_stage
from modelpar.capture.deferred import deferred_in
from modelpar.capture.graph import first_names, parameters_of
from modelpar.capture.joining import counting_names, join
from modelpar.capture.microbatch import Cutting, Microbatch, checked_batch
from modelpar.capture.objective import Batch, Objective
from modelpar.capture.parts import leaf_names
from modelpar.errors import ConfigError, ModelparError, NonFiniteLoss, RunError
from modelpar.planning.graph import BATCH
from modelpar.planning.plan import Plan
from modelpar.planning.result import StepResult
from modelpar.planning.schedule import ValueKey
from modelpar.planning.timeline import Timeline
from modelpar.planning.verdict import Check
from modelpar.run import cuda, first_step, wire
from modelpar.run.first_step import UnsplitModel
from modelpar.run.memory import return_freed_memory
from modelpar.run.numerics import Numerics
from modelpar.run.rehearsal import rehearse
from modelpar.run.stage_runner import RunContext
from modelpar.run.update import OptimizerFactory, Settings
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
    microbatches: list[Microbatch]


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
        self._cutting = Cutting.of(objective, plan.batch)
        self._counts: dict[str, bool] = {}
        """Whether a part of the output counts samples, by name, where lengths alone did not tell."""
        self._built: nn.Module | None = objective.build(seed)
        plan.check_parameters(parameters_of(self._built))
        on_cpu = all(device == "cpu" for device in plan.cluster.devices)
        settings = Settings(optimizer, lr_schedule, max_norm, seed)
        self._settings = rehearse(settings, self._built, self._owned_by_ranks(self._built), on_cpu=on_cpu)
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
        self._step, self.check, self._has_loaded = 0, None, self._settings.writes
        self._under_way.clear()
        model, self._built = self._built, None
        model = self._objective.build(self._settings.seed) if model is None else model
        self._unsplit_model = UnsplitModel(model) if self._wants_check else None
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
            _, tickets = self._start("evaluate", self._microbatches(batch), step=0)
            reply = self._merged(tickets)
            total += reply["total"]
            count += reply["count"]
            for name, value in reply["metrics"].items():
                metrics[name] = metrics.get(name, 0.0) + value * reply["count"]
        if not count:
            raise ConfigError("evaluate got no samples; expected at least one batch with a count above 0")
        return EvalResult(total / count, count, {name: value / count for name, value in metrics.items()})

    def predict(self, inputs: Any) -> Any:
        """Returns the output for inputs, in eval mode, on the CPU, as the model gives it for the whole batch.

        What counts samples is joined, all else is returned once; `Objective.join` may do so in another way. Raises
        ConfigError for what is another in each micro-batch and cannot be joined.
        """
        batch = inputs, None
        microbatches = self._microbatches(batch)
        outputs, sizes = self._outputs(microbatches), [microbatch.size for microbatch in microbatches]
        if self._objective.join is not None:
            return self._objective.join(outputs)
        return join(outputs, sizes, self._counting(outputs, microbatches, batch), self._objective.batch_dim)

    def _outputs(self, microbatches: list[Microbatch]) -> list[Any]:
        """Returns what the model gives for each micro-batch."""
        run, tickets = self._start("predict", microbatches, step=0)
        last = self._plan.num_stages - 1
        keys = [ValueKey("value", "output", i, last, BATCH) for i in range(len(microbatches))]
        self._merged(tickets)
        workers = self._need_workers()
        return [wire.unpack(workers.wait((run, key)), torch.device("cpu")) for key in keys]

    def _counting(self, outputs: list[Any], microbatches: list[Microbatch], batch: Batch) -> set[str]:
        """Returns the names of what counts samples in an output: its length follows that of the micro-batch.

        Where all have the same size and a length is that of the micro-batch, the model is run once on another size.
        """
        dim, size = self._objective.batch_dim, microbatches[0].size
        if len(outputs) == 1:
            return set()
        for output, microbatch in zip(outputs, microbatches, strict=True):
            if microbatch.size != size:
                return counting_names(outputs[0], size, output, microbatch.size, dim)
        likely = counting_names(outputs[0], size, outputs[1], size, dim)
        if likely - set(self._counts):
            more = self._cutting.first(batch, size + 1)
            found = likely
            if more.size != size:
                found = counting_names(outputs[0], size, self._outputs([more])[0], more.size, dim)
            self._counts |= {name: name in found for name in likely}
        return {name for name in likely if self._counts[name]}

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
        microbatches = self._microbatches(batch)
        if self._unsplit_model is not None:
            self._check_first(microbatches[0])
        run, tickets = self._start("train", microbatches, step, data_wait)
        self._step += 1
        submitted = _Submitted(step, run, tickets, microbatches)
        self._under_way.append(submitted)
        return submitted

    def _check_first(self, microbatch: Microbatch) -> None:
        """Compares the first micro-batch's loss and gradients with the unsplit model's, which is not kept any longer.

        Raises SplitMismatch; then nothing has changed.
        """
        unsplit = self._unsplit_model
        assert unsplit is not None
        if deferred_in(unsplit.model):
            reason = "not compared: no process holds the whole model; `modelpar verify` makes it and compares"
            self._say_check(Check(first_step.NAME, False, reason, compared=False))
            return
        _, tickets = self._start("check", [microbatch], 0)
        total = self._merged(tickets)["total"]
        found = first_step.Gradients(total, first_step.joined(self._ask_all("take_gradients")))
        draws, seed = self._variant("train", microbatch[:2]).draws, self._settings.seed

        others = self.state_dict() if self._has_loaded or unsplit.has_changed else {}

        def run() -> first_step.Gradients:
            return unsplit.gradients(self._objective, self._plan, microbatch, draws, seed, others)

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

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        _refuse_autocast()
        return self._cutting.cut(checked_batch(batch), self._plan.num_microbatches)

    def _start(
        self, mode: str, microbatches: list[Microbatch], step: int, data_wait: float = 0.0, first: int = 0
    ) -> tuple[int, list[tuple[int, int]]]:
        """Tells all ranks to run micro-batches, and sends these to the stages that use them.

        Returns the run's number and the tickets.
        """
        workers = self._need_workers()
        recorded = "train" if mode in ("check", "locate") else mode
        variants = [self._variant(recorded, microbatch[:2]) for microbatch in microbatches]
        sizes = tuple(microbatch.size for microbatch in microbatches)
        context = RunContext(mode, step, sizes, first, tuple(variant.number for variant in variants))
        run = workers.next_number()
        try:
            tickets = [
                self._command(rank, "run", run=run, context=context, data_wait=data_wait)
                for rank in range(self._plan.num_ranks)
            ]
            for i, (variant, microbatch) in enumerate(zip(variants, microbatches, strict=True)):
                leaves = leaf_names(*microbatch[:2])
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
            return_freed_memory()
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
        first, *_ = wrong
        _, tickets = self._start("locate", [submitted.microbatches[first]], submitted.step, first=first)
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

    def _cut(self, model: nn.Module, stage: int) -> StageProgram:
        plan = self._plan
        return cut_stage(model, plan.graph, plan.stage_graph, plan.partition.layers(stage), stage, self._objective.loss)

    def _owned_by_ranks(self, model: nn.Module) -> list[dict[str, nn.Parameter]]:
        """Returns the parameters that each rank will train, in the order in which its optimizer gets them."""
        owned: list[dict[str, nn.Parameter]] = [{} for _ in range(self._plan.num_ranks)]
        for stage, rank in enumerate(self._plan.schedule.stage_to_rank):
            owned[rank] |= self._cut(model, stage).owned_parameters()
        return owned

    def _program(self, model: nn.Module, stage: int, of_model: dict[int, str]) -> wire.Parcel:
        program = self._cut(model, stage)
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


def _refuse_autocast() -> None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ConfigError(
            "autocast is on around the pipeline, which its ranks would not see; expected it inside the model's forward"
        )
