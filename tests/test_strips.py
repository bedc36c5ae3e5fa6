"""The pictures of a comparison: which plan stands where, how long its bar is, and what its strip shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image
from test_report import shown, unit_timeline

from modelpar.planning import schedules
from modelpar.planning.timeline import Span, Timeline
from modelpar.report.comparison import Row
from modelpar.report.palette import LOOKS
from modelpar.report.strips import Strip, in_order, times_best, title
from modelpar.report.strips_image import comparison_image
from modelpar.report.strips_text import draw_comparison


def strip(name: str, predicted: float, measured: float | None, timeline: Timeline | None = None, **other: int) -> Strip:
    """Returns a plan of one row; times are in ms."""
    row = Row(name, name, "gpipe", 2, 2, (3, 1), 0.01, predicted / 1e3, 0.25)
    row = replace(row, measured_step_seconds=None if measured is None else measured / 1e3, **other)
    return Strip((row,), timeline or unit_timeline(schedules.gpipe(2, 2)))


def four() -> list[Strip]:
    """Returns two measured plans and two predicted ones, in no order."""
    return [
        strip("guessed", 5.0, None),
        strip("slow", 8.0, 9.0),
        strip("hoped", 6.0, None),
        strip("fast", 8.0, 6.0),
    ]


def test_measured_plans_come_first_and_are_held_against_measured_ones() -> None:
    strips = in_order(four())
    assert [each.row.name for each in strips] == ["fast", "slow", "guessed", "hoped"]
    assert [times_best(each, strips) for each in strips] == pytest.approx([1.0, 1.5, 1.0, 1.2])


def test_a_plan_of_several_rows_has_all_their_names_and_the_measured_numbers() -> None:
    first, second = strip("uniform", 9.0, None).row, strip("optimal", 9.0, 10.0).row
    both = Strip((first, second), Timeline(2, ()))
    assert title(both, both.rows) == "uniform gpipe = optimal gpipe · 3-1"
    assert (both.measured, both.step_seconds) == (True, 0.01)
    longer = replace(first, num_microbatches=4)
    assert title(both, [*both.rows, longer]).startswith("uniform gpipe 2 micro-batches = optimal")
    again = replace(first, name="width=9")
    assert title(Strip((again,), Timeline(2, ())), [first, again]) == "uniform gpipe (width=9) · 3-1"


def test_the_terminal_shows_bars_marks_and_strips_on_one_axis() -> None:
    # 62 cells, of which "0 " and " ms" take 5: at 57 cells for 9.5 ms a millisecond is 6 cells
    strips = [strip("fast", 8.0, 9.0), strip("slow", 9.0, 9.5), strip("hoped", 6.0, None)]
    drawn = draw_comparison(strips, 62)
    assert drawn is not None
    lines = shown(drawn, 62)
    assert lines == [
        "fast gpipe · 3-1" + "9 ms  × 1.00  8 ms predicted (-11.1 %)".rjust(46),
        "  " + 47 * "━" + "╋" + 6 * "━",
        "0 F0────F1────::::::::::::::::::B0══════════B1══════════",
        "1 ......F0────F1────B0══════════B1══════════············",
        "slow gpipe · 3-1" + "9.5 ms  × 1.06  9 ms predicted (-5.3 %)".rjust(46),
        "  " + 53 * "━" + "╋" + 3 * "━",
        "0 F0────F1────::::::::::::::::::B0══════════B1══════════",
        "1 ......F0────F1────B0══════════B1══════════············",
        "hoped gpipe · 3-1" + "6 ms  × 1.00  predicted".rjust(45),
        "  " + 36 * "╌",
        "0 F0────F1────::::::::::::::::::B0══════════B1══════════",
        "1 ......F0────F1────B0══════════B1══════════············",
        "  0           2           4           6           8         ms",
        "  ━━━ measured step  ╋ ┃ its prediction  ╌╌╌ predicted step",
        "  F── forward  B══ backward  ... waits for activations",
        "  ::: waits for gradients  ··· idle",
    ]


def test_a_prediction_beyond_the_bar_is_a_mark_of_its_own() -> None:
    drawn = draw_comparison([strip("fast", 12.0, 6.0)], 65)  # 60 cells for 12 ms
    assert drawn is not None
    assert shown(drawn, 65)[1] == "  " + 30 * "━" + 29 * " " + "┃"


@pytest.mark.parametrize("width", [60, 80, 132])
@pytest.mark.parametrize("ranks", [1, 2, 4, 12])
def test_what_the_terminal_shows_keeps_to_its_width(ranks: int, width: int) -> None:
    timeline = unit_timeline(schedules.one_f_one_b(ranks, 16))
    long = strip("a_strategy_with_a_name_of_some_length", 30.0, 40.0, timeline, balance=(2,) * ranks)
    both = Strip((*long.rows, replace(long.row, partition="another_of_the_kind_that_comes_to_the_same")), timeline)
    drawn = draw_comparison([both, strip("guessed", 41.5, None)], width)
    assert drawn is not None
    lines = shown(drawn, width)
    assert all(len(line) <= width for line in lines)
    assert "another_of_the_kind_that_comes_to_the_same" in " ".join(lines)
    numbers = [int(line.split()[0]) for line in lines if line.strip()[:2].strip().isdigit() and "ms" not in line]
    assert numbers == [*([0, 4, 7, 11] if ranks == 12 else range(ranks)), 0, 1]


def test_a_terminal_of_less_than_60_columns_shows_nothing() -> None:
    assert draw_comparison(four(), 59) is None
    assert draw_comparison(four(), 60) is not None


def pixel(image: Image.Image, x: int, y: int) -> str:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)
    return "#{:02x}{:02x}{:02x}".format(*found)


def ends_of(image: Image.Image, colour: str, y: int) -> tuple[int, int] | None:
    """Returns the first and the last pixel of a colour on a line."""
    found = [x for x in range(image.width) if pixel(image, x, y) == colour]
    return (found[0], found[-1]) if found else None


FULL, MARK = "#46566b", "#1c1c22"
FIRST_BAR = 14 + 22 + 8 + 18
"""The y of the first bar: below the margin, the heading and the plan's name."""
BLOCK = 18 + 12 + 5 + 2 * 14 + 16
"""The height of a plan of two ranks."""


def test_bars_are_as_long_as_steps_on_the_axis_of_the_strips() -> None:
    image = comparison_image(four())
    fast, slow = (ends_of(image, FULL, FIRST_BAR + i * BLOCK + 2) for i in (0, 1))
    assert fast is not None
    assert slow is not None
    assert fast[0] == slow[0]
    assert (fast[1] - fast[0]) / (slow[1] - slow[0]) == pytest.approx(6 / 9, abs=0.005)
    lane = FIRST_BAR + BLOCK + 12 + 5 + 4
    backward = ends_of(image, LOOKS["B"].colour, lane)
    assert backward is not None
    assert slow[1] - backward[1] in (0, 1, 2)  # the step drawn takes 9 ms, as the bar says; a pale line ends each box


def test_the_mark_of_a_prediction_lies_on_the_axis_too() -> None:
    image = comparison_image([strip("fast", 8.0, 6.0), strip("slow", 8.0, 9.0)])
    above = FIRST_BAR - 2
    [before, inside] = [ends_of(image, MARK, y) for y in (above, above + BLOCK)]
    bar = ends_of(image, FULL, FIRST_BAR + BLOCK + 2)
    assert bar is not None
    assert before is not None
    assert inside == before  # both are predicted to take 8 ms
    assert (before[0] + 1 - bar[0]) / (bar[1] - bar[0]) == pytest.approx(8 / 9, abs=0.005)


def test_a_bar_that_is_only_predicted_is_empty_and_has_no_mark() -> None:
    image = comparison_image([strip("hoped", 6.0, None)])
    ends = ends_of(image, FULL, FIRST_BAR + 5)
    assert ends is not None
    assert pixel(image, sum(ends) // 2, FIRST_BAR + 5) != FULL
    assert ends_of(image, MARK, FIRST_BAR - 2) is None


def test_a_strip_shows_every_rank_of_every_plan() -> None:
    spans = [Span(rank, kind, 0.0, 0.009) for rank, kind in enumerate(("F", "B", "optimizer", "reduce"))]
    image = comparison_image([strip("fast", 9.0, 9.0, Timeline(4, tuple(spans)))])
    lanes = [FIRST_BAR + 12 + 5 + 14 * rank + 4 for rank in range(4)]
    assert [pixel(image, 300, y) for y in lanes] == [LOOKS[span.kind].colour for span in spans]


def test_a_picture_grows_with_plans_and_long_names_and_keeps_its_width() -> None:
    one, two = (comparison_image(four()[:number]) for number in (1, 2))
    assert (one.width, two.width) == (1200, 1200)
    assert two.height - one.height == BLOCK
    long = strip("a_name " * 40, 5.0, None)
    assert comparison_image([long]).height - one.height == 18


def test_a_comparison_without_times_can_be_drawn() -> None:
    nothing = strip("nothing", 0.0, 0.0, Timeline(1, ()))
    assert comparison_image([nothing]).width == 1200
    assert draw_comparison([nothing], 80) is not None
