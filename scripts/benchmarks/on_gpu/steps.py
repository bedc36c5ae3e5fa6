"""How long a step takes and how much memory it needs: modelpar on every way, and the unsplit model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter

import torch

from benchmarks.on_gpu.ranks import Ranks, one_line, places, synchronize, tell
from benchmarks.on_gpu.work import NUM_MICROBATCHES, NUM_RANKS, models, plans
from benchmarks.tasks import Built
from modelpar.capture.objective import Objective
from modelpar.planning.memory import stage_memory_bytes
from modelpar.planning.plan import Plan
from modelpar.run.pipeline import Pipeline

SECONDS = 1.5
"""About how long each is measured."""
_WARM = 3
_MOST = 30


def run(who: str, device: str, say: Callable[..., None]) -> None:
    """Measures all models, "unsplit" or on one way of values; says each number as it comes."""
    if device == "cpu":
        torch.set_num_threads(1)
    if who == "unsplit":
        _run_unsplit(device, say)
    else:
        _run_split(who, device, say)


def _run_unsplit(device: str, say: Callable[..., None]) -> None:
    for model, task in models(device).items():
        for pieces in (1, NUM_MICROBATCHES):
            who = "unsplit" if pieces == 1 else f"unsplit, {pieces} pieces"
            try:
                seconds, peak = unsplit(task(), pieces, places(device, 1)[0])
                say(check="step", who=who, model=model, schedule="–", seconds=seconds, peaks=[peak])
            except Exception as error:
                say(check="failed", what=f"{who} {model}", why=one_line(error))


def _run_split(way: str, device: str, say: Callable[..., None]) -> None:
    """Plans and trains on one set of ranks, so that a prediction is made of what these ranks measured."""
    with Ranks(way, NUM_RANKS) as ranks:
        for model, task in models(device).items():
            tell(f"{model}: planning")
            for schedule, plan in plans(task, device, "measured", say, ranks).items():
                case = {"who": f"modelpar {way}", "model": model, "schedule": schedule}
                tell(f"{model}: {schedule}")
                try:
                    split(task(), plan, ranks, lambda case=case, **more: say(check="step", **case, **more))
                except Exception as error:
                    say(check="failed", what=" ".join(case.values()), why=one_line(error))
                    ranks.drop()


def split(built: Built, plan: Plan, ranks: Ranks, say: Callable[..., None]) -> None:
    """Trains a plan; says the seconds from one step's end to the next, and what the timelines and the plan say."""
    objective = Objective(built.model, built.loss)
    with Pipeline(objective, plan, workers=ranks.get(), optimizer=built.optimizer) as pipeline:
        for _ in range(_WARM):
            start = perf_counter()
            pipeline.step(built.batch)
            seconds = perf_counter() - start
        results, ends = [], []
        for result in pipeline.steps([built.batch] * steps_in(seconds)):
            results.append(result)
            ends.append(perf_counter())
    assert plan.prediction
    say(
        seconds=median(b - a for a, b in pairwise(ends)),
        makespan=median(result.timeline.makespan for result in results),
        bubble=median(result.timeline.bubble for result in results),
        peaks=results[-1].peak_bytes,
        predicted_seconds=plan.prediction.step_seconds,
        predicted_bytes=stage_memory_bytes(plan),
        balance="-".join(map(str, plan.partition.balance)),
    )


def unsplit(built: Built, pieces: int, place: str) -> tuple[float, int]:
    """Trains the whole model on one device; returns the seconds of a step, by CUDA events, and the peak in bytes."""
    on_cuda = place.startswith("cuda")
    before = torch.cuda.memory_allocated(place) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(place)
    model = built.model.to(place)
    optimizer = built.optimizer(model.parameters())
    inputs, targets = (part.to(place).tensor_split(pieces) for part in built.batch)

    def step() -> None:
        total = torch.zeros((), device=place)
        for x, y in zip(inputs, targets, strict=True):
            loss = built.loss(model(x), y) / pieces
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        float(total)

    for _ in range(_WARM):
        start = perf_counter()
        step()
        synchronize(place)
        seconds = perf_counter() - start
    marks = []
    for _ in range(steps_in(seconds) + 1):
        if on_cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(perf_counter())
        step()
    synchronize(place)
    pairs = pairwise(marks)
    times = [a.elapsed_time(b) / 1e3 if on_cuda else b - a for a, b in pairs]
    return median(times), torch.cuda.max_memory_allocated(place) - before if on_cuda else 0


def steps_in(seconds: float) -> int:
    """Returns how many steps to measure where one takes so long."""
    return max(3, min(_MOST, round(SECONDS / seconds)))
