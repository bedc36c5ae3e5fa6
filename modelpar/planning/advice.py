"""What could be changed about a plan, and what a simulation says that each change brings: Advice."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median_low

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
    gains: list[Advice] = []
    for advice, change in _candidates(found):
        try:
            plan = change()
            check_memory(plan)
            seconds = predict(plan).makespan * size / (plan.num_microbatches * plan.profile.microbatch_size)
        except Exception:  # it does not fit, waits for ever, or the user's own schedule function does not take it
            continue
        if seconds < found.seconds and advice.options not in {each.options for each in gains if each.options}:
            gains.append(replace(advice, gain=1.0 - seconds / found.seconds))
    return tuple(sorted(gains, key=lambda advice: -advice.weight))


_Candidate = tuple[Advice, Callable[[], Plan]]
"""A change without its gain, and what makes it of the fitted plan."""


def _candidates(found: Fitted) -> Iterator[_Candidate]:
    yield from _other_splits(found.plan)
    yield from _other_counts(found.plan)
    yield from _other_schedules(found.plan)
    yield from _other_links(found.plan)
    if max(found.slowness) > 1.0:
        slow = found.slowness.index(max(found.slowness))
        cluster = found.plan.cluster
        speeds = tuple(s * found.slowness[r] if r == slow else s for r, s in enumerate(cluster.speeds))
        what = f"rank {slow} being as fast as the others"
        yield Advice("slow rank", what, 0.0), lambda: replace(found.plan, cluster=replace(cluster, speeds=speeds))


def _other_links(plan: Plan) -> Iterator[_Candidate]:
    """Yields the plan with free messages, with the slowest link as fast as the usual one, and with data in time."""
    cluster, link = plan.cluster, plan.cluster.link
    free = Link(action_seconds=link.action_seconds, data_seconds=link.data_seconds, end_seconds=link.end_seconds)
    advice = Advice("communication", "a link that costs nothing", 0.0, at_most=True)
    yield advice, lambda: replace(plan, cluster=replace(cluster, link=free, links=()))
    if len(cluster.links) > 1:
        first, second, slowest = max(cluster.links, key=lambda each: each[2].latency)
        usual = median_low(each.latency for _, _, each in cluster.links)
        links = tuple(
            (a, b, replace(each, latency=min(each.latency, usual)) if each is slowest else each)
            for a, b, each in cluster.links
        )
        what = f"a link between ranks {first} and {second} as fast as the others"
        yield Advice("communication", what, 0.0), lambda: replace(plan, cluster=replace(cluster, links=links))
    quick = replace(cluster, link=replace(link, data_seconds=0.0))
    yield Advice("data", "having batches ready in time", 0.0), lambda: replace(plan, cluster=quick)


def _other_splits(plan: Plan) -> Iterator[_Candidate]:
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
            yield _split(plan, f"moving {what} from stage {slowest} to stage {target}", partition)
    if (best := _optimal(plan)) is not None:
        yield _split(plan, f"splitting the layers {'-'.join(map(str, best.balance))}", best)


def _optimal(plan: Plan) -> Partition | None:
    """Returns the split that `optimal` finds; None where it finds none."""
    try:
        return decide(
            plan.graph,
            plan.profile,
            plan.cluster,
            partitioners.optimal,
            plan.schedule,
            plan.generator or (lambda num_ranks, num_microbatches: plan.schedule),
        ).partition
    except Exception:  # nothing fits, or the user's own schedule function does not take other numbers of ranks
        return None


def _split(plan: Plan, change: str, partition: Partition) -> _Candidate:
    options = f"partition=manual partition.balance=[{','.join(map(str, partition.balance))}]"
    return Advice("stage imbalance", change, 0.0, options), lambda: replace(plan, partition=partition)


def _other_counts(plan: Plan) -> Iterator[_Candidate]:
    """Yields the plan with twice and with half as many micro-batches, of the same batch where it can be cut so."""
    size, number = plan.profile.microbatch_size, plan.num_microbatches
    if plan.generator is None:
        return

    def cut(count: int, profile: Profile) -> Callable[[], Plan]:
        return lambda: replace(plan, profile=profile, schedule=plan.schedule_for(count))

    twice, options = 2 * number, f"pipeline.num_microbatches={2 * number}"
    if size % 2 == 0:
        caveat = f"if each sample takes as long in a micro-batch of {size // 2} as in one of {size}"
        advice = Advice("schedule bubble", f"cutting batches into {twice} micro-batches", 0.0, options, caveat)
        yield advice, cut(twice, _halved(plan.profile, 1))
    else:
        caveat = "per sample, with training.batch_size doubled: the optimizer then takes half as many steps"
        yield (
            Advice("schedule bubble", f"doubling the batch, in {twice} micro-batches", 0.0, options, caveat),
            cut(twice, plan.profile),
        )
    if number % 2 == 0:
        half = number // 2
        change, options = f"cutting batches into only {half} micro-batches", f"pipeline.num_microbatches={half}"
        yield Advice("overhead", change, 0.0, options), cut(half, _halved(plan.profile, -1))


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


def _other_schedules(plan: Plan) -> Iterator[_Candidate]:
    """Yields the plan under other known schedules with one stage per rank."""
    if plan.num_stages != plan.num_ranks or plan.schedule.kind != "train":
        return
    for make, name in zip(_SCHEDULES, ("1f1b", "gpipe"), strict=True):
        schedule = make(plan.num_ranks, plan.num_microbatches)
        if schedule != plan.schedule:
            advice = Advice("schedule bubble", f"the schedule {name}", 0.0, f"schedule={name}")
            yield advice, partial(replace, plan, schedule=schedule, generator=make)
