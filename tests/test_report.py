"""What the terminal, the pictures and the comparison files show."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from modelpar.planning import schedules
from modelpar.planning.cluster import Cluster
from modelpar.planning.graph import BATCH, Layer, ModelGraph, Parameter, StageGraph, Tied, Value
from modelpar.planning.memory import peak_microbatches_per_stage, stage_memory_bytes, tensor_bytes
from modelpar.planning.partition import Partition
from modelpar.planning.plan import Plan
from modelpar.planning.profile import LayerCost, Profile
from modelpar.planning.schedule import Schedule
from modelpar.planning.simulate import StageCost, simulate
from modelpar.planning.timeline import Span, Timeline
from modelpar.report import image
from modelpar.report.comparison import Row, best_first, comparison_markdown, comparison_table, write
from modelpar.report.image import timeline_image
from modelpar.report.palette import LOOKS, look_key, nice_ticks
from modelpar.report.text import (
    TrainingSummary,
    draw_timeline,
    partition_table,
    simulation_summary,
    training_summary,
)
from modelpar.report.units import count, megabytes, ms, percent


def tied_plan(schedule: Schedule, source: str = "flops", **measured: int) -> Plan:
    """Returns a plan of embed, a, b, head, two layers a stage; the head's weight is the embedding's. Each layer costs
    the same bytes, and what else was measured."""

    def layer(name: str, *parameters: Parameter) -> Layer:
        return Layer(name, "Linear", parameters)

    weight = Parameter("embed.weight", (10, 4), "float32", True)
    layers = (
        layer("embed", weight),
        layer("a", Parameter("a.weight", (4, 4), "float32", True), Parameter("a.mean", (4,), "float32", False, True)),
        layer("b", Parameter("b.weight", (4, 4), "float32", True), Parameter("b.frozen", (2,), "bfloat16", False)),
        layer("head", replace(weight, name="head.weight")),
    )
    values = (Value("x", BATCH, (0,)), *(Value(f"v{i}", i, (i + 1,), 16.0) for i in range(3)), Value("y", BATCH, (3,)))
    graph = ModelGraph(layers, values, (1, 2, 3), (Tied(("embed.weight", "head.weight"), (0, 3), 160),))
    sizes = {"flops": 100.0, "saved_bytes": 900, "output_bytes": 64, "kept_bytes": 1000, **measured}
    costs = tuple(LayerCost(each.name, i + 1.0, 1.0, 1.0, **sizes) for i, each in enumerate(layers))
    partition = Partition((0, 2, 4), "optimal")
    return Plan(graph, Profile(costs, 1, source), Cluster(("cpu", "cpu")), partition, schedule)


def unit_timeline(schedule: Schedule) -> Timeline:
    """Returns the simulation in which F takes 1 ms, B 2 ms and a message no time."""
    stages = schedule.num_stages
    costs = [StageCost(1e-3, 1e-3, 1e-3)] * stages
    return simulate(schedule, costs, StageGraph.chain(stages), Cluster(("cpu",) * schedule.num_ranks))


def measured_timeline() -> Timeline:
    """Returns a step of two ranks with everything that a measured one has."""
    spans = [
        Span(0, "data", 0.0, 0.5),
        Span(0, "F", 0.5, 2.0, 0, 0),
        Span(0, "send", 2.0, 2.1, 0, 0),
        Span(0, "wait", 2.1, 6.0, 0, 0, "grad v1 of micro-batch 0 from stage 1"),
        Span(0, "B", 6.0, 8.0, 0, 0),
        Span(0, "reduce", 8.0, 8.5, 0),
        Span(0, "optimizer", 8.5, 9.0, 0),
        Span(1, "wait", 0.0, 2.1, 1, 0, "value v1 of micro-batch 0 from stage 0"),
        Span(1, "F", 2.1, 4.0, 1, 0),
        Span(1, "B", 4.0, 6.0, 1, 0),
        Span(1, "wait", 6.0, 8.5, 1, -1, "total_norm gradients from stage 0"),
        Span(1, "optimizer", 8.5, 9.0, 1),
    ]
    return Timeline.of(2, [span._replace(start=span.start / 1e3, end=span.end / 1e3) for span in spans])


def shown(renderable: RenderableType, width: int = 80, soft_wrap: bool = False) -> list[str]:
    """Returns the lines that a terminal without colour shows."""
    console = Console(width=width, no_color=True, color_system=None)
    with console.capture() as capture:
        console.print(renderable, soft_wrap=soft_wrap)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_drawn_timeline_shows_each_box_with_its_letter_and_micro_batch() -> None:
    timeline = unit_timeline(schedules.gpipe(2, 2))  # 9 ms long: at this width one cell is 1/3 ms
    assert shown(draw_timeline(timeline, 27 + len("rank 0 ││ 100 %"))) == [
        "rank 0 │F0─F1─:::::::::B0════B1════│  67 %",
        "rank 1 │...F0─F1─B0════B1════······│  67 %",
        "        0              5            ms",
        "        F── forward  B══ backward",
        "        ... waits for activations",
        "        ::: waits for gradients  ··· idle",
    ]


def test_boxes_that_are_too_narrow_for_numbers_still_differ_without_colour() -> None:
    timeline = unit_timeline(schedules.gpipe(2, 12))  # 39 ms: F takes a cell, B two, "B11" would need three
    assert shown(draw_timeline(timeline, 39 + len("rank 0 ││ 100 %")))[:2] == [
        "rank 0 │FFFFFFFFFFFF:::B═B═B═B═B═B═B═B═B═B═B═B═│  92 %",
        "rank 1 │.FFFFFFFFFFFFB═B═B═B═B═B═B═B═B═B═B═B═··│  92 %",
    ]


def test_a_cell_shows_what_fills_most_of_it_be_it_idle_time() -> None:
    spans = (Span(0, "F", 0.0, 0.4), Span(0, "B", 2.0, 2.4), Span(0, "F", 2.4, 3.0), Span(0, "B", 9.0, 10.0))
    drawn = draw_timeline(Timeline(1, spans), 10 + len("rank 0 ││ 100 %"))
    assert shown(drawn)[0] == "rank 0 │··F······B│  24 %"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 32), (12, 4)])
def test_a_drawn_timeline_is_aligned_and_keeps_to_its_width(ranks: int, microbatches: int, width: int) -> None:
    lines = shown(draw_timeline(unit_timeline(schedules.one_f_one_b(ranks, microbatches)), width), width)
    rows = lines[:ranks]
    assert {len(row) for row in rows} == {width}
    assert len({tuple(i for i, c in enumerate(row) if c == "│") for row in rows}) == 1
    assert all(len(line) <= width for line in lines)


def test_a_drawn_timeline_names_everything_a_measured_step_has() -> None:
    text = "\n".join(shown(draw_timeline(measured_timeline(), 120), 120))
    for name in (
        "forward",
        "backward",
        "optimizer",
        "reduce",
        "send",
        "data",
        "activations",
        "gradients",
        "step's end",
    ):
        assert name in text
    assert "recompute" not in text


def test_a_timeline_of_several_clocks_says_how_exact_they_are() -> None:
    exact = measured_timeline()
    loose = Timeline(exact.num_ranks, exact.spans, clock_error=0.00012)
    assert shown(draw_timeline(loose, 120)) == [*shown(draw_timeline(exact, 120)), " " * 8 + "clocks ± 0.12 ms"]
    ((numbers, *_),) = image._heading("", loose, None, 1200)
    assert numbers.endswith(" %, clocks ± 0.12 ms")
    ((numbers, *_),) = image._heading("", exact, None, 1200)
    assert "clocks" not in numbers


def test_an_empty_timeline_can_be_drawn() -> None:
    empty = Timeline(2, ())
    assert shown(draw_timeline(empty, 40))[0].startswith("rank 0 │····")
    assert timeline_image(empty).width == 1200


def test_the_partition_table_counts_a_tied_tensor_once_and_marks_it() -> None:
    lines = shown(partition_table(tied_plan(schedules.one_f_one_b(2, 4))))
    assert lines[0] == "2 stages by optimal, 4 micro-batches"
    cells = [line.split() for line in lines if line.strip()[:1] in ("0", "1")]
    # F, I and W of the layers take 3, 4, 5, 6 seconds
    assert cells[0] == ["0", "embed,", "a", "(2)", "56", "*", "39", "%", "4.9", "kB", "cpu"]
    assert cells[1] == ["1", "b,", "head", "(2)", "16", "*", "61", "%", "2.9", "kB", "cpu"]
    assert any("embed.weight = head.weight (counted with embed.weight)" in line for line in lines)


def test_stage_memory_is_weights_gradients_moments_buffers_and_activations_in_flight() -> None:
    one_f_one_b = tied_plan(schedules.one_f_one_b(2, 4))
    # stage 0: (40 + 16) trainable × 4 B × 4 copies, a buffer of 4 × 4 B, 2 micro-batches × 2 layers × 1000 B
    # stage 1: (16 + 40) × 4 × 4, a frozen tensor of 2 × 2 B, 1 micro-batch in flight, for which it received 16 B
    assert stage_memory_bytes(one_f_one_b) == (56 * 16 + 16 + 4000, 56 * 16 + 4 + 2000 + 16)
    gpipe = stage_memory_bytes(tied_plan(schedules.gpipe(2, 4)))
    assert gpipe == (56 * 16 + 16 + 8 * 1000, 56 * 16 + 4 + 8 * 1000 + 4 * 16)
    measured = tied_plan(schedules.one_f_one_b(2, 4), optimizer_bytes=3, temporary_bytes=50)
    slack = replace(measured, profile=replace(measured.profile, slack_share=0.5))
    assert stage_memory_bytes(slack) == (56 * 8 + 6 + 16 + 4050 + 2025, 56 * 8 + 6 + 4 + 2066 + 1033)
    forward = stage_memory_bytes(tied_plan(schedules.fill_drain(2, 4)))
    assert forward == (56 * 4 + 16 + 64, 56 * 4 + 4 + 64)


def test_a_tensor_tied_within_one_stage_takes_its_memory_once() -> None:
    plan = tied_plan(schedules.one_f_one_b(2, 4))
    whole = replace(plan, partition=Partition((0, 4)), schedule=schedules.gpipe(1, 1), cluster=Cluster(("cpu",)))
    assert stage_memory_bytes(whole) == (72 * 16 + 16 + 4 + 4000,)


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 4), ("torch.bfloat16", 2), ("int64", 8), ("bool", 1), ("torch.float8_e4m3fn", 1)]
)
def test_the_width_of_an_element_is_read_from_its_dtype(dtype: str, width: int) -> None:
    assert tensor_bytes(Parameter("p", (3, 2), dtype, True)) == 6 * width


def test_peak_micro_batches_per_stage_where_a_rank_has_two_stages() -> None:
    schedule = Schedule.of(["0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1"])
    assert peak_microbatches_per_stage(schedule) == (2, 2)
    assert peak_microbatches_per_stage(schedules.one_f_one_b(4, 8)) == (4, 3, 2, 1)
    assert peak_microbatches_per_stage(schedules.gpipe(4, 8)) == (8, 8, 8, 8)


def test_the_simulation_summary_gives_makespan_bubble_and_peaks() -> None:
    plan = tied_plan(schedules.one_f_one_b(2, 4))
    lines = shown(simulation_summary(plan, unit_timeline(plan.schedule)))
    assert lines[0] == "step 15.0 ms   bubble 20 %"
    cells = [line.split() for line in lines if line.strip()[:1] in ("0", "1")]
    assert cells == [["0", "0", "80", "%", "2", "4.9", "kB"], ["1", "1", "80", "%", "1", "2.9", "kB"]]


def test_the_training_summary_ends_with_the_command_that_shows_it_all() -> None:
    summary = TrainingSummary(
        first_loss=5.5,
        last_loss=2.25,
        step_seconds=0.1,
        utilization=(0.8, 0.75),
        view_command="modelpar view runs/" + 90 * "x",
        heldout_loss=2.5,
        baseline=("byte-unigram entropy", 3.5),
        predicted_step_seconds=0.09,
    )
    assert shown(training_summary(summary), width=200) == [
        "loss           5.5000 → 2.2500",
        "held-out loss  2.5000   byte-unigram entropy 3.5000 (1.00 below it)",
        "utilization    stage 0 80 %   stage 1 75 %",
        "step time      100 ms measured   90.0 ms predicted (-10.0 %)",
        summary.view_command,
    ]
    assert shown(training_summary(summary), 80, soft_wrap=True)[-1] == summary.view_command  # it is to be copied
    bare = shown(training_summary(replace(summary, heldout_loss=None, predicted_step_seconds=None)))
    assert [line.split("  ")[0] for line in bare[:-1]] == ["loss", "utilization", "step time"]


def rows() -> list[Row]:
    """Returns two measured rows and two predicted ones, in no order."""
    base = Row("uniform gpipe", "uniform", "gpipe", 2, 8, (3, 1), 0.01, 0.08, 0.25)
    return [
        replace(base, name="predicted fast", predicted_step_seconds=0.05),
        replace(base, name="measured slow", measured_step_seconds=0.12, peak_bytes=250_000_000, run="runs/a"),
        replace(base, name="predicted slow", predicted_step_seconds=0.06),
        replace(base, name="measured fast", measured_step_seconds=0.1, partition="optimal", schedule="1f1b"),
    ]


def test_measured_rows_come_first_and_are_not_mixed_with_predictions() -> None:
    assert [row.name for row in best_first(rows())] == [
        "measured fast",
        "measured slow",
        "predicted fast",
        "predicted slow",
    ]


def test_the_error_is_that_of_the_prediction_relative_to_the_measurement() -> None:
    assert best_first(rows())[0].error == pytest.approx(-0.2)
    assert best_first(rows())[-1].error is None


def test_the_comparison_is_written_as_csv_json_and_markdown(tmp_path) -> None:
    write(rows(), tmp_path / "new")
    data = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert data["schema_version"] == 1
    assert [row["measured_step_seconds"] for row in data["rows"]] == [0.1, 0.12, None, None]
    with open(tmp_path / "new" / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) == set(data["rows"][0])
    assert table[1]["balance"] == "3-1"
    assert float(table[1]["peak_bytes"]) == 250_000_000
    assert table[2]["error"] == ""
    assert (tmp_path / "new" / "comparison.md").read_text() == comparison_markdown(rows())


def test_the_comparison_as_markdown() -> None:
    lines = comparison_markdown(rows()[1:2]).splitlines()
    assert lines[2] == "| uniform | gpipe | 3-1 | 10.0 ms | 80.0 ms | 120 ms | -33.3 % | 25 % | 250 MB |"
    assert {line.count("|") for line in lines} == {10}


def test_the_comparison_table_keeps_to_80_columns_without_breaking_a_number() -> None:
    lines = shown(comparison_table([replace(row, num_ranks=i) for i, row in enumerate(rows())]), 80)
    assert all(len(line) <= 80 for line in lines)
    best = next(line for line in lines if line.startswith("optimal"))
    assert " ".join(best.split()) == "optimal 1f1b 3-1 10.0 ms 80.0 ms 100 ms -20.0 % 25 % –"


def colours_at(timeline: Timeline, rank_y: int, predicted: Timeline | None = None) -> list[str]:
    """Returns the colours of a picture along one line, each once, in order."""
    image = timeline_image(timeline, "", predicted, 1000)
    found: list[str] = []
    for x in range(image.width):
        pixel = image.getpixel((x, rank_y))
        assert isinstance(pixel, tuple)
        name = "#{:02x}{:02x}{:02x}".format(*pixel)
        if not found or found[-1] != name:
            found.append(name)
    known = {
        look.colour: key for key, look in LOOKS.items() if not key.startswith("wait ") and key != "I"
    }  # I is like B
    return [known[name] for name in found if name in known]


def test_a_picture_has_a_lane_per_rank_with_the_boxes_in_order() -> None:
    # the first lane begins at y = 14 + 22 + 6; a lane is 26 high, with 9 between ranks
    assert colours_at(measured_timeline(), 44) == ["data", "F", "send", "B", "reduce", "optimizer"]
    assert colours_at(measured_timeline(), 44 + 35) == ["F", "B", "optimizer"]


def test_a_picture_puts_the_predicted_lane_above_the_measured_one() -> None:
    predicted = unit_timeline(schedules.gpipe(2, 1))
    # at the very top of the first lane stands the prediction, 18 high and 3 above the measured one
    assert colours_at(measured_timeline(), 44, predicted) == ["F", "B"]
    assert colours_at(measured_timeline(), 44 + 21, predicted) == ["data", "F", "send", "B", "reduce", "optimizer"]


def test_a_picture_grows_with_ranks_and_keeps_its_width() -> None:
    pictures = [timeline_image(unit_timeline(schedules.one_f_one_b(n, 32)), "x" * 400) for n in (2, 8)]
    assert [picture.width for picture in pictures] == [1200, 1200]
    assert pictures[1].height - pictures[0].height == 6 * 35


def test_waits_are_named_by_what_they_waited_for() -> None:
    def kind(cause: str) -> str:
        return look_key(Span(0, "wait", 0.0, 1.0, cause=cause))

    assert kind("value h of micro-batch 2 from stage 0") == "wait activations"
    assert kind("grad h of micro-batch 2 from stage 1") == "wait gradients"
    assert kind("tied_grad w of micro-batch 2 from stage 1") == "wait gradients"
    assert kind("tied_grad w from stage 1") == "wait end"
    assert kind("count samples from stage 1") == "wait end"
    assert kind("value inputs of micro-batch 0 from the controller") == "wait data"


@pytest.mark.parametrize(
    ("end", "most", "ticks"),
    [(9.0, 10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (9.0, 4, [0, 5]), (0.03, 3, [0, 0.01, 0.02, 0.03]), (0.0, 5, [0])],
)
def test_ticks_are_one_two_or_five_times_a_power_of_ten(end: float, most: int, ticks: list[float]) -> None:
    assert nice_ticks(end, most) == pytest.approx(ticks)


def test_numbers_carry_their_units() -> None:
    assert [count(n) for n in (0, 9_999, 10_000, 999_499, 999_500, 3_214_000, 12_345_678_901)] == [
        "0",
        "9,999",
        "10 k",
        "999 k",
        "1 M",
        "3.21 M",
        "12.3 G",
    ]
    assert [ms(s) for s in (0.0, 0.000123, 0.0123, 0.123, 9.5, 12.34)] == [
        "0 ms",
        "0.123 ms",
        "12.3 ms",
        "123 ms",
        "9500 ms",
        "12.3 s",
    ]
    assert [megabytes(b) for b in (640, 2_500_000, 250_000_000, 12e9)] == ["0.6 kB", "2.5 MB", "250 MB", "12.0 GB"]
    assert [percent(s) for s in (0.0, 0.0312, 0.0999, 0.5)] == ["0.0 %", "3.1 %", "10 %", "50 %"]
