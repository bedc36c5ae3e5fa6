"""What `modelpar verify` shows: a line per check, the notes, and the verdict."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from modelpar.planning.verdict import Verdict


def verdict_table(verdict: Verdict) -> Table:
    """Returns a row per check: ✓, ✗ or ? where it could not be made, what was compared, and what came of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column()
    for check in verdict.checks:
        sign, bold, plain = ("✓", "green", "") if check.passed else ("✗", "bold red", "red")
        if not check.compared:
            sign, bold, plain = "?", "bold yellow", "yellow"
        table.add_row(Text(sign, style=bold), Text(check.what), Text(check.detail, style=plain))
    return table


def verdict_notes(verdict: Verdict) -> list[Text]:
    """Returns what the user should know besides: a paragraph each."""
    return [Text(f"note: {note}", style="yellow") for note in verdict.notes]


def verdict_line(verdict: Verdict) -> Text:
    """Returns the last line: whether all checks hold."""
    number, left_out = len(verdict.checks) - len(verdict.left_out), ", ".join(verdict.left_out)
    more, style = (f"; not compared: {left_out}", "bold yellow") if left_out else ("", "bold green")
    if verdict.passed:
        return Text(f"the split model equals the unsplit one to the bit in all {number} checks{more}", style=style)
    failed = sum(not check.passed for check in verdict.checks if check.compared)
    text = f"the split model differs from the unsplit one in {failed} of {number} checks{more}"
    return Text(text, style="bold red")
