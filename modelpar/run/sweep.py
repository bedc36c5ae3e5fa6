"""Times layers as a rank runs them: each is a stage of its own, micro-batch after micro-batch, step after step.

::

    forward  a b c   a b c         a b c                     of micro-batches 0, 1, 2
    backward               c b a         c b a   c b a       of micro-batches 0, 1, 2
    update                                             a b c

All ranks do this at once, each with all layers, so that they take cores, caches and memory from each other as in a
real step. Between two uses of a layer come all the others, and another micro-batch is alive: caches are as cold, and
memory as used, as they will be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.cut import StageProgram
from modelpar.capture.objective import loss_of
from modelpar.capture.replay import Replay
from modelpar.run import wire
from modelpar.run.memory import PeakMemory
from modelpar.run.stage_runner import RunContext, StageRunner
from modelpar.run.update import OptimizerFactory, gradient_norms, refuse_sparse

IN_FLIGHT = 2
"""How many micro-batches are alive at once."""
_LEAST_ROUNDS, _MOST_ROUNDS = 4, 40
_WARMUP_ROUNDS = 1
_TELL_SECONDS = 0.5
"""At most how often progress is told: it takes a fraction of a millisecond, in no measured time."""
_SPLITS = 3
"""How often a backward is split into the gradients of inputs and those of weights."""


@dataclass(frozen=True)
class SweepWork:
    """How to time programs, of which the last does nothing: it tells what a stage costs besides its layers."""

    sources: tuple[dict[str, tuple[int, str]], ...]
    """Per program, for each value it takes, the position of an earlier one that gives such a value, and its name there;
    −1 is the batch."""
    microbatch: dict[str, Any]
    """The batch's tensors by name."""
    num_samples: int
    num_microbatches: int
    """Per step."""
    num_threads: int
    optimizer: OptimizerFactory | None = None
    max_norm: float | None = None
    seconds: float = 1.5
    """About how long to go on."""


class UnitTimes(NamedTuple):
    """What one program takes, in seconds: per micro-batch, then per step."""

    forward: float
    input_grad: float
    weight_grad: float
    cold: float
    """How much longer the first forward of a step takes."""
    reduce: float
    update: float
    optimizer_bytes: int


class SweepResult(NamedTuple):
    """What a rank found."""

    times: tuple[UnitTimes, ...]
    """One per program but the last."""
    peak_bytes: int | None
    """The most memory that it took, where that can be measured; IN_FLIGHT micro-batches were alive at once."""


def sweep(
    work: SweepWork,
    programs: Sequence[StageProgram],
    device: torch.device,
    lock: Any,
    watch_memory: Callable[[], PeakMemory],
    progress: Callable[[float, float], None] | None = None,
) -> SweepResult:
    """Times programs, in execution order. Where threads share a process, `lock` guards its random generators.

    `watch_memory` is called when the programs' code has been used once: what that loads stays. `progress` is told now
    and then how many seconds have gone by, and of how many.
    """
    torch.set_num_threads(work.num_threads)
    clock = _clock(device, work.num_threads)
    with lock or nullcontext():  # what draws has no keys here
        shares = _input_shares(work, programs, device, clock)
    memory = watch_memory()
    runs = _Runs(work, programs, device, lock, clock)
    rounds: list[list[_Step]] = []
    begun = told = time.perf_counter()
    while len(rounds) < _WARMUP_ROUNDS + _LEAST_ROUNDS or (
        time.perf_counter() - begun < work.seconds and len(rounds) < _MOST_ROUNDS
    ):
        rounds.append(runs.step())
        now = time.perf_counter()
        if progress and now - told > _TELL_SECONDS:
            told = now
            progress(now - begun, _expected_seconds(work, len(rounds), now - begun))
    peak_bytes = memory.bytes()
    found = [_typical([step[unit] for step in rounds[_WARMUP_ROUNDS:]]) for unit in range(len(programs))]
    nothing = found.pop()
    times = []
    for unit, (forward, backward, cold, reduce, update) in enumerate(found):
        own, share = max(0.0, backward - nothing.backward), shares[unit]
        times.append(
            UnitTimes(
                forward=max(0.0, forward - nothing.forward),
                input_grad=own * share,
                weight_grad=own * (1 - share),
                cold=max(0.0, cold - nothing.cold),
                reduce=reduce,
                update=update,
                optimizer_bytes=runs.optimizer_bytes(unit),
            )
        )
    return SweepResult(tuple(times), peak_bytes)


def _expected_seconds(work: SweepWork, num_rounds: int, elapsed: float) -> float:
    """Returns how long all rounds will take, from how long some took."""
    each = elapsed / num_rounds
    return max((_WARMUP_ROUNDS + _LEAST_ROUNDS) * each, min(work.seconds, _MOST_ROUNDS * each))


class _Step(NamedTuple):
    """One unit in one step: seconds per micro-batch, then of the end of the step."""

    forward: list[float]
    backward: list[float]
    reduce: float
    update: float


class _Typical(NamedTuple):
    forward: float
    backward: float
    cold: float
    reduce: float
    update: float


def _typical(steps: list[_Step]) -> _Typical:
    """Returns the mean over micro-batches of the median over steps; the first forward after an update is set apart."""
    first, *others = (median(times) for times in zip(*(step.forward for step in steps), strict=True))
    forward = fmean(others or [first])
    return _Typical(
        forward,
        fmean(median(times) for times in zip(*(step.backward for step in steps), strict=True)),
        first - forward,
        median(step.reduce for step in steps),
        median(step.update for step in steps),
    )


class _Runs:
    """The programs as stages of one rank."""

    def __init__(
        self,
        work: SweepWork,
        programs: Sequence[StageProgram],
        device: torch.device,
        lock: Any,
        clock: Callable[[], float],
    ):
        self._work, self._clock = work, clock
        self._runners = [StageRunner(program, 0, device, lock) for program in programs]
        self._batch = wire.unpack(work.microbatch, device)
        self._context = RunContext("train", 0, (work.num_samples,) * work.num_microbatches)
        self._owned = [list(program.owned_parameters().items()) for program in programs]
        self._optimizers = [_optimizer(work.optimizer, named) for named in self._owned]
        self._outputs: list[dict[str, Any]] = [{} for _ in programs]
        self._seeds: list[dict[str, list[Tensor | None]]] = [{} for _ in programs]
        """Per unit, gradients for what it gives: those of a unit that takes it, where there was one."""

    def step(self) -> list[_Step]:
        """Runs one step and returns what each unit took."""
        forward, backward = ([[] for _ in self._runners] for _ in range(2))
        for microbatch in range(self._work.num_microbatches + 1):
            if microbatch < self._work.num_microbatches:
                self._forward(microbatch, forward)
            if microbatch > 0:
                self._backward(microbatch - 1, backward)
        ends = [self._end(unit) for unit in range(len(self._runners))]
        return [_Step(*unit) for unit in zip(forward, backward, *zip(*ends, strict=True), strict=True)]

    def _forward(self, microbatch: int, seconds: list[list[float]]) -> None:
        for unit, runner in enumerate(self._runners):
            values = _values(self._work.sources[unit], self._batch, self._outputs)
            start = self._clock()
            results = runner.forward(microbatch, values, self._context)
            seconds[unit].append(self._clock() - start)
            self._outputs[unit] = {name: results[name] for name in runner.program.routines[0].gives}
            for name, value in self._outputs[unit].items():
                if name not in self._seeds[unit] and name in runner.program.routines[0].needs_grad:
                    tensors = [t for t in trees.tensors_of(value) if t.requires_grad]
                    self._seeds[unit][name] = [torch.ones_like(t) for t in tensors]

    def _backward(self, microbatch: int, seconds: list[list[float]]) -> None:
        for unit in reversed(range(len(self._runners))):
            start = self._clock()
            found = self._runners[unit].backward(microbatch, self._seeds[unit])
            seconds[unit].append(self._clock() - start)
            self._runners[unit].losses.clear()
            for taken, (source, name) in self._work.sources[unit].items():
                if source == unit - 1 >= 0 and name in self._seeds[source] and found[taken]:
                    self._seeds[source][name] = found[taken]

    def _end(self, unit: int) -> tuple[float, float]:
        """Ends a step as `Update` does, without the other ranks; returns the seconds of reducing and of updating."""
        optimizer, count = self._optimizers[unit], float(self._work.num_samples)
        gradients = {name: parameter for name, parameter in self._owned[unit] if parameter.grad is not None}
        start = self._clock()
        for parameter in gradients.values():
            parameter.grad.div_(count)
        norms = gradient_norms({name: parameter.grad for name, parameter in gradients.items()})
        if self._work.max_norm is not None and gradients:
            refuse_sparse(gradients)
            norm = torch.linalg.vector_norm(torch.stack([*norms.values()]))
            nn.utils.clip_grads_with_norm_(list(gradients.values()), self._work.max_norm, norm)
        reduced = self._clock()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return reduced - start, self._clock() - reduced

    def optimizer_bytes(self, unit: int) -> int:
        """Returns the bytes of what the optimizer keeps for a unit's parameters."""
        optimizer = self._optimizers[unit]
        kept = trees.tensors_of([*optimizer.state.values()]) if optimizer else []
        return sum(t.numel() * t.element_size() for t in kept)


def _optimizer(factory: OptimizerFactory | None, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer | None:
    try:
        return factory(named) if factory and named else None
    except Exception:  # it takes none of these parameters; what else it cannot do is said where it is to train
        return None


def _input_shares(
    work: SweepWork, programs: Sequence[StageProgram], device: torch.device, clock: Callable[[], float]
) -> list[float]:
    """Returns, per program, which share of its backward the gradients of its inputs take when asked for alone."""
    batch = wire.unpack(work.microbatch, device)
    outputs: list[dict[str, Any]] = []
    shares = []
    for program, sources in zip(programs, work.sources, strict=True):
        program.module.to(device)
        routine = program.routines[0]
        weights = [parameter for parameter in program.module.parameters() if parameter.requires_grad]
        replay = Replay(routine, program.module, device)
        alone = []
        for _ in range(_SPLITS):
            values = _values(sources, batch, outputs)
            output = replay(values)
            if program.is_last:
                total = loss_of(program.loss, output["output"], output["targets"], work.num_samples).total
                output = {**{name: output[name] for name in routine.gives}, "loss": total}
            inputs, given = ([t for t in trees.tensors_of(tree) if t.requires_grad] for tree in (values, output))
            seeds = [torch.ones_like(t) for t in given]
            if not given or not inputs or not weights:
                alone.append(1.0 if inputs else 0.0)
                continue
            start = clock()
            torch.autograd.grad(given, inputs, seeds, retain_graph=True, allow_unused=True)
            between = clock()
            torch.autograd.grad(given, [*inputs, *weights], seeds, allow_unused=True)
            alone.append(min(1.0, (between - start) / max(clock() - between, 1e-9)))
        outputs.append(output)
        shares.append(median(alone))
    return shares


def _values(
    sources: dict[str, tuple[int, str]], batch: dict[str, Any], outputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what a program takes: the batch's values, and other programs' outputs as leaves of a new graph."""
    return {
        taken: batch[name] if source < 0 else wire.detach(outputs[source][name])
        for taken, (source, name) in sources.items()
    }


def _clock(device: torch.device, num_threads: int) -> Callable[[], float]:
    """Returns a clock: CPU time of this thread where one computes, so that others on the machine do not enter."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.thread_time if num_threads == 1 else time.perf_counter
