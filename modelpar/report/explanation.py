"""An Explanation in words: one headline, and a table of where the time goes and what would help."""

from __future__ import annotations

from textwrap import wrap

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelpar.planning.advice import Advice
from modelpar.planning.explain import Explanation
from modelpar.report.units import ms, percent

_WIDTH = 65
"""Cells of a line beside "made of" in a terminal 80 cells wide."""
_LITTLE = 0.03
_LEAST = 0.01
_FAR = 1.25
_MOST_ADVICE, _MOST_STRAGGLERS = 4, 3


def headline(found: Explanation) -> str:
    """Returns what bounds a run, by how much, and the change that helps most, in one line without a full stop."""
    best = helping_most(found)
    gains = advice_text(best, found.uncertainty) if best else "no option that was tried saves 1 %"
    return f"{_cause(found)}; {gains}"


def helping_most(found: Explanation) -> Advice | None:
    """Returns the change that the headline names; a bound only where it is one on what costs most."""
    cause, _ = found.largest_loss
    return next((advice for advice in found.advice if not advice.at_most or advice.cause == cause), None)


def advice_text(advice: Advice, uncertainty: float) -> str:
    """Returns a change with its gain, such as "moving h3 from stage 1 to stage 0 saves 6.1 %"."""
    if advice.at_most:
        return f"{advice.change} would save at most {percent(advice.gain)}"
    if advice.caveat or advice.gain <= uncertainty:
        return f"{advice.change} may save {percent(advice.gain)}"
    return f"{advice.change} saves {percent(advice.gain)}"


def parts_text(found: Explanation) -> str:
    """Returns what a step is made of, the largest part first; parts below 1 % are left out, lines end between two."""
    shares = [(name, seconds / found.makespan) for name, seconds in found.breakdown.parts if found.makespan]
    shares = sorted((share for share in shares if share[1] >= _LEAST), key=lambda share: -share[1])
    joined = "   ".join(f"{name} {percent(share)}".replace(" ", "\xa0") for name, share in shares)
    return "\n".join(wrap(joined, _WIDTH)).replace("\xa0", " ")


def changes(found: Explanation) -> tuple[str, ...]:
    """Returns the changes that help most with how to make them, a sentence each."""
    return tuple(
        f"{text[0].upper()}{text[1:]}{f' ({more})' if more else ''}."
        for advice in found.advice[:_MOST_ADVICE]
        for text in [advice_text(advice, found.uncertainty)]
        for more in ["; ".join(filter(None, [advice.options, advice.caveat]))]
    )


def sentences(found: Explanation) -> tuple[str, ...]:
    """Returns what else is worth saying: slow ranks, steps that took long, how sure all this is."""
    off = f"{percent(abs(found.error))} too {'long' if found.error > 0 else 'short'}"
    return (*steadiness_sentences(found), f"Gains are simulated with the costs of these steps; a step comes out {off}.")


def steadiness_sentences(found: Explanation) -> tuple[str, ...]:
    """Returns what there is to say of ranks and of steps that are slower than others."""
    said = []
    for rank, slow in enumerate(found.slowness):
        if slow > 1.0:
            said.append(f"{_slow_rank(rank, slow).capitalize()}.")
    if not 1 / _FAR < found.pace < _FAR:
        said.append(
            f"Layers take {found.pace:.1f} × as long as profiled: the machine was busy then or now, or it is another "
            "one; pipeline.profile=anew measures them again."
        )
    if found.stragglers:
        shown = [
            f"step {each.step} ({each.times:.1f} ×{f', rank {each.rank} computed longer' if each.rank >= 0 else ''})"
            for each in sorted(found.stragglers, key=lambda each: -each.times)[:_MOST_STRAGGLERS]
        ]
        number = len(found.stragglers)
        what = f"{number} steps" if number > 1 else "1 step"
        said.append(f"{what} took far longer than most: {', '.join(shown)}{', …' if number > len(shown) else ''}.")
    if found.drift:
        way = "slower" if found.drift > 0 else "faster"
        said.append(f"Steps became {percent(abs(found.drift))} {way} from the first to the last quarter of the run.")
    return tuple(said)


def explanation_text(found: Explanation) -> RenderableType:
    """Returns all of it for the terminal: headline, parts of the step, changes, sentences."""
    parts = Table.grid(padding=(0, 2))
    parts.add_column(style="dim", no_wrap=True)
    parts.add_column(justify="right", no_wrap=True)
    parts.add_column(justify="right", no_wrap=True)
    parts.add_column(no_wrap=True)
    for name, seconds in found.breakdown.parts:
        share = seconds / found.makespan if found.makespan else 0.0
        parts.add_row(name, percent(share), ms(seconds), "█" * round(30 * share))
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for advice in found.advice[:_MOST_ADVICE]:
        more = [advice.options, advice.caveat, "at most" if advice.at_most else ""]
        text = Text(advice.change)
        text.append("".join(f"\n{line}" for line in more if line), style="dim")
        table.add_row(f"−{percent(advice.gain)}", text)
    lines: list[RenderableType] = [
        Text(headline(found), style="bold"),
        Text(f"\na step of {ms(found.makespan)} is made of", style="dim"),
        parts,
    ]
    if found.advice:
        lines += [Text("\nwhat would shorten it", style="dim"), table]
    return Group(*lines, Text(), *map(Text, sentences(found)))


def _slow_rank(rank: int, slow: float) -> str:
    return f"rank {rank} is {slow:.1f} × as slow as the usual rank, by the profile of its layers"


def _gain(found: Explanation, cause: str) -> float:
    """Returns what the best change for a cause saves."""
    return max((advice.gain for advice in found.advice if advice.cause == cause), default=0.0)


def _cause(found: Explanation) -> str:
    """Returns what costs most."""
    name, share = found.largest_loss
    if share < _LITTLE:
        return f"{percent(found.breakdown.useful / found.makespan if found.makespan else 0.0)} of a step is useful work"
    slow = max(found.slowness)
    more_than_a_split = _gain(found, "slow rank") >= _gain(found, "stage imbalance")
    if slow > 1.0 and name in ("stage imbalance", "schedule bubble") and more_than_a_split:
        return _slow_rank(found.slowness.index(slow), slow)
    plan, critical = found.plan, found.critical
    if name == "stage imbalance":
        stage = critical.index(max(critical))
        return f"stage {stage} is on {percent(critical[stage])} of the critical path"
    if name == "schedule bubble":
        what = f"{plan.num_microbatches} micro-batches on {plan.num_ranks} ranks"
        return f"{what} leave a schedule bubble of {percent(share)}"
    if name == "data":
        return f"waiting for data is {percent(share)} of a step"
    if name == "communication":
        return f"communication is {percent(share)} of a step"
    end = found.breakdown.step_end > 0.5 * found.breakdown.overhead
    return f"{'norms and optimizer are' if end else 'what lies between actions is'} {percent(share)} of a step"
