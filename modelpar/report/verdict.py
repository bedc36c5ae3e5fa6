"""What `modelpar verify` shows: a line per check, the notes, and the verdict."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from modelpar.planning.verdict import Verdict


def verdict_table(verdict: Verdict) -> Table:
    """Returns a row per check: ✓ or ✗, what was compared, and what came of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column()
    for check in verdict.checks:
        mark = Text("✓", style="green") if check.passed else Text("✗", style="bold red")
        table.add_row(mark, Text(check.what), Text(check.detail, style="" if check.passed else "red"))
    return table


def verdict_notes(verdict: Verdict) -> list[Text]:
    """Returns what the user should know besides: a paragraph each."""
    return [Text(f"note: {note}", style="yellow") for note in verdict.notes]


def verdict_line(verdict: Verdict) -> Text:
    """Returns the last line: whether all checks hold."""
    number = len(verdict.checks)
    if verdict.passed:
        return Text(f"the split model equals the unsplit one to the bit in all {number} checks", style="bold green")
    failed = sum(not check.passed for check in verdict.checks)
    return Text(f"the split model differs from the unsplit one in {failed} of {number} checks", style="bold red")
