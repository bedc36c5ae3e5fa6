"""What could be changed about a plan, and what a simulation says that each change brings: Advice."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from modelpar.errors import ModelparError
from modelpar.planning import partitioners, schedules
from modelpar.planning.cluster import Link
from modelpar.planning.decide import decide
from modelpar.planning.fitted import Fitted
from modelpar.planning.fitting import check_memory
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.simulate import predict

_MOVES = 3
"""How many legal cuts a border of the slowest stage is moved at most."""
_SCHEDULES = (schedules.one_f_one_b, schedules.gpipe)


@dataclass(frozen=True)
class Advice:
    """One change, and the share of the step that it saves by a simulation with the costs that were measured."""

    cause: str
    """What it is a remedy for, one of `breakdown.PARTS`, or "slow rank"."""
    change: str
    """What to do, such as "moving h3 from stage 1 to stage 0"."""
    gain: float
    """Share of the step, below 1."""
    options: str = ""
    """Overrides of `modelpar train` that do it; empty where it takes more than those."""
    caveat: str = ""
    """What the simulation takes for granted, without knowing."""
    at_most: bool = False
    """Whether the gain is a bound that nothing reaches."""

    @property
    def weight(self) -> float:
        """The gain as far as it should be counted on: half of what may not come true."""
        return 0.5 * self.gain if self.at_most or self.caveat else self.gain


def advise(found: Fitted) -> tuple[Advice, ...]:
    """Returns all changes that make a step shorter, best first; those that do not fit into memory are left out.

    A change of the batch counts by the time per sample.
    """
    size = found.plan.num_microbatches * found.plan.profile.microbatch_size
    gains = []
    for advice, plan in _candidates(found):
        try:
            check_memory(plan)
            seconds = predict(plan).makespan * size / (plan.num_microbatches * plan.profile.microbatch_size)
        except ModelparError:  # it does not fit, or waits for ever
            continue
        if seconds < found.seconds:
            gains.append(replace(advice, gain=1.0 - seconds / found.seconds))
    return tuple(sorted(gains, key=lambda advice: -advice.weight))


def _candidates(found: Fitted) -> Iterator[tuple[Advice, Plan]]:
    """Yields changes with the plans that they make of the fitted one."""
    plan = found.plan
    yield from _other_splits(plan)
    yield from _other_counts(plan)
    yield from _other_schedules(plan)
    link = plan.cluster.link
    free = Link(action_seconds=link.action_seconds, data_seconds=link.data_seconds, end_seconds=link.end_seconds)
    cheap = replace(plan.cluster, link=free, links=())
    yield Advice("communication", "a link that costs nothing", 0.0, at_most=True), replace(plan, cluster=cheap)
    quick = replace(plan.cluster, link=replace(link, data_seconds=0.0))
    yield Advice("data", "having batches ready in time", 0.0), replace(plan, cluster=quick)
    if max(found.slowness) > 1.0:
        slow = found.slowness.index(max(found.slowness))
        speeds = tuple(s * found.slowness[r] if r == slow else s for r, s in enumerate(plan.cluster.speeds))
        what = f"rank {slow} being as fast as the others"
        yield Advice("slow rank", what, 0.0), replace(plan, cluster=replace(plan.cluster, speeds=speeds))


def _other_splits(plan: Plan) -> Iterator[tuple[Advice, Plan]]:
    """Yields the splits with one border of the slowest stage moved, and the one that `optimal` finds."""
    bounds, cuts, names = plan.partition.bounds, plan.graph.cuts, [layer.name for layer in plan.graph.layers]
    seconds = [
        sum(plan.profile.layers[i].seconds for i in plan.partition.layers(stage)) / plan.cluster.speed(rank)
        for stage, rank in enumerate(plan.schedule.stage_to_rank)
    ]
    slowest = seconds.index(max(seconds))
    for border in {slowest, slowest + 1} - {0, plan.num_stages}:
        at = bisect_left(cuts, bounds[border])
        inwards = cuts[at + 1 : at + 1 + _MOVES] if border == slowest else cuts[max(0, at - _MOVES) : at][::-1]
        for cut in inwards:
            if not bounds[border - 1] < cut < bounds[border + 1]:
                break
            moved = names[min(cut, bounds[border]) : max(cut, bounds[border])]
            what = moved[0] if len(moved) == 1 else f"{moved[0]} … {moved[-1]}"
            target = slowest - 1 if border == slowest else slowest + 1
            partition = Partition((*bounds[:border], cut, *bounds[border + 1 :]))
            yield (
                Advice(
                    "stage imbalance", f"moving {what} from stage {slowest} to stage {target}", 0.0, _manual(partition)
                ),
                replace(plan, partition=partition),
            )
    if plan.generator is not None:
        try:
            best = decide(
                plan.graph, plan.profile, plan.cluster, partitioners.optimal, plan.schedule, plan.generator
            ).partition
        except ModelparError:
            return
        balance = "-".join(map(str, best.balance))
        advice = Advice("stage imbalance", f"splitting the layers {balance}", 0.0, _manual(best))
        yield advice, replace(plan, partition=best)


def _manual(partition: Partition) -> str:
    return f"partition=manual partition.balance=[{','.join(map(str, partition.balance))}]"


def _other_counts(plan: Plan) -> Iterator[tuple[Advice, Plan]]:
    """Yields the plan with twice and with half as many micro-batches, of the same batch where it can be cut so."""
    make, size, number = plan.generator, plan.profile.microbatch_size, plan.num_microbatches
    if make is None:
        return
    if size % 2 == 0:
        count = 2 * number
        change = f"cutting batches into {count} micro-batches"
        caveat = f"if each sample takes as long in a micro-batch of {size // 2} as in one of {size}"
        advice = Advice("schedule bubble", change, 0.0, f"pipeline.num_microbatches={count}", caveat)
        yield advice, replace(plan, profile=_halved(plan.profile, 1), schedule=make(plan.num_ranks, count))
    else:
        count = 2 * number
        change = f"doubling the batch to {count * size} samples in {count} micro-batches"
        options = f"training.batch_size={count * size} pipeline.num_microbatches={count}"
        advice = Advice(
            "schedule bubble", change, 0.0, options, "per sample; the optimizer then takes half as many steps"
        )
        yield advice, replace(plan, schedule=make(plan.num_ranks, count))
    if number % 2 == 0:
        count = number // 2
        advice = Advice(
            "overhead", f"cutting batches into only {count} micro-batches", 0.0, f"pipeline.num_microbatches={count}"
        )
        yield advice, replace(plan, profile=_halved(plan.profile, -1), schedule=make(plan.num_ranks, count))


def _halved(profile: Profile, times: int) -> Profile:
    """Returns the profile of micro-batches that were halved so many times; doubled where that is negative."""
    factor = 0.5**times
    layers = tuple(_scaled(layer, factor) for layer in profile.layers)
    return replace(profile, layers=layers, microbatch_size=round(profile.microbatch_size * factor))


def _scaled(layer: LayerCost, factor: float) -> LayerCost:
    """Returns what a layer costs for a micro-batch of another size; what it costs per step stays."""
    return replace(
        layer,
        forward_seconds=layer.forward_seconds * factor,
        input_grad_seconds=layer.input_grad_seconds * factor,
        weight_grad_seconds=layer.weight_grad_seconds * factor,
        saved_bytes=int(layer.saved_bytes * factor),
        output_bytes=int(layer.output_bytes * factor),
        kept_bytes=int(layer.kept_bytes * factor),
        temporary_bytes=int(layer.temporary_bytes * factor),
    )


def _other_schedules(plan: Plan) -> Iterator[tuple[Advice, Plan]]:
    """Yields the plan under other known schedules with one stage per rank."""
    if plan.num_stages != plan.num_ranks or plan.schedule.kind != "train":
        return
    for make, name in zip(_SCHEDULES, ("1f1b", "gpipe"), strict=True):
        schedule = make(plan.num_ranks, plan.num_microbatches)
        if schedule != plan.schedule:
            advice = Advice("schedule bubble", f"the schedule {name}", 0.0, f"schedule={name}")
            yield advice, replace(plan, schedule=schedule, generator=make)
