"""Draws timelines of whole seconds as the text that schedules are written in."""

from itertools import takewhile

from modelpar.planning.timeline import COMPUTE, Timeline


def picture(timeline: Timeline, waits: bool = False) -> str:
    """Returns a line per rank, three letters and a space per second: 2F0 computes, ... waits (if asked for)."""
    lines = []
    for rank in range(timeline.num_ranks):
        cells = ["   "] * int(timeline.makespan)
        for span in timeline.of_rank(rank):
            if span.kind in COMPUTE or waits:
                word = f"{span.stage}{span.kind}{span.microbatch}" if span.kind in COMPUTE else "..."
                for second in range(int(span.start), int(span.end)):
                    cells[second] = word
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)


def drawn_in(docstring: str | None) -> str:
    """Returns the indented block that follows the first `::` of a docstring, without its indent."""
    lines = (docstring or "").split("::\n\n", 1)[1].splitlines()
    block = list(takewhile(str.strip, lines))
    indent = min(len(line) - len(line.lstrip()) for line in block)
    return "\n".join(line[indent:] for line in block)
