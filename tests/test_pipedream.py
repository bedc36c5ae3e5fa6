"""PipeDream's profiles: read, planned, drawn; and no torch for it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call
from conftest import ROOT

from modelpar.errors import ConfigError
from modelpar.planning.cluster import Cluster, Link
from modelpar.planning.graph import BATCH
from modelpar.planning.partitioners import optimal
from modelpar.planning.pipedream import read_pipedream

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
PROFILES = sorted((REFERENCE / "pipedream_profiles").glob("*.txt")) if REFERENCE.is_dir() else []


def line(number: int, kind: str, *numbers: object) -> str:
    forward, backward, activation, parameter = numbers
    return (
        f"node{number} -- {kind} -- forward_compute_time={forward}, backward_compute_time={backward}, "
        f"activation_size={activation}, parameter_size={parameter}\n"
    )


# in -> 3 -> 2 -> 5 -> 7, 3 -> 5 past 2, and an item that nobody takes
SMALL = (
    line(5, "Add(a=1, b=2)", 4.0, 4.0, 800.0, "0.000")
    + line(2, "LSTM(8, 8)", 1.0, 3.0, "[600.0; 200.0]", 4096.0)
    + line(1, "Input0", 0, 0, 0.0, 0)
    + line(3, "Conv2d(3, 64, kernel_size=(3, 3))", 2.0, 4.0, 1e3, 64.0)
    + line(6, "__getitem__(1)", 9, 9, 9.0, 0)
    + line(7, "Linear(8, 2)", 1.0, 1.0, 16.0, 64.0)
    + "\tnode1 -- node3\n\tnode3 -- node2\n\tnode2 -- node5\n\tnode3 -- node5\n\tnode5 -- node7\n\tnode2 -- node6\n"
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("graph.txt").write_text(SMALL)
    return "graph.txt"


def test_layers_come_in_an_order_in_which_they_can_run(small):
    graph, profile = read_pipedream(small)
    assert [layer.name for layer in graph.layers] == ["node3", "node2", "node5", "node7"]
    assert graph.layers[0].kind == "Conv2d(3, 64, kernel_size=(3, 3))"
    assert graph.cuts == (1, 2, 3)
    assert [(v.producer, v.consumers, v.bytes_per_sample) for v in graph.values] == [
        (0, (1, 2), 1000.0),
        (1, (2,), 800.0),
        (2, (3,), 800.0),
        (3, (BATCH,), 16.0),
    ]
    assert [layer.seconds for layer in profile.layers] == pytest.approx([6e-3, 4e-3, 8e-3, 2e-3])
    assert [layer.parameter_bytes for layer in profile.layers] == [64, 4096, 0, 64]
    assert [p.shape for layer in graph.layers for p in layer.parameters] == [(16,), (1024,), (16,)]


def test_its_best_straight_pipeline(small):
    """20 ms of work: 6+4 | 8+2; with 2 kB/s, a cut after node2 costs 2 × 1800 B and one before node7 2 × 800 B."""
    graph, profile = read_pipedream(small)
    partition = optimal(graph, profile, Cluster(("cpu",) * 2), 2, overlap=True)
    assert (partition.balance, partition.bottleneck) == ((2, 2), pytest.approx(10e-3))
    slow = Cluster(("cpu",) * 2, link=Link(bandwidth=1.6e5))
    partition = optimal(graph, profile, slow, 2, overlap=True)
    assert (partition.balance, partition.bottleneck) == ((1, 3), pytest.approx(14e-3))


@pytest.mark.skipif(not PROFILES, reason="needs ../shared/reference, which is absent here")
def test_every_reference_profile_has_the_published_optimum():
    rows = list(csv.DictReader((REFERENCE / "pipedream_expected.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {path.stem for path in PROFILES}
    for row in rows:
        graph, profile = read_pipedream(REFERENCE / "pipedream_profiles" / f"{row['model']}.txt")
        num_stages, bandwidth = int(row["num_stages"]), float(row["bandwidth_bytes_per_s"] or "inf")
        assert sum(layer.seconds for layer in profile.layers) == pytest.approx(float(row["total_s"]), abs=6e-6)
        cluster = Cluster(("cpu",) * num_stages, link=Link(0.0, bandwidth))
        found = optimal(graph, profile, cluster, num_stages, overlap=True)
        assert found.bottleneck == pytest.approx(float(row["best_contiguous_s"]), abs=6e-6), row


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_reference_profile_is_drawn(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    outcome = call("simulate", f"profile={path}", "pipeline.num_ranks=4", "pipeline.num_microbatches=8")
    assert (outcome.code, outcome.err) == (0, "")
    assert "4 stages by optimal, 8 micro-batches" in outcome.out
    assert sum(text.startswith("rank ") for text in outcome.out.splitlines()) == 4
    assert "bubble" in outcome.out


def test_simulate_draws_it_and_imports_no_torch(small):
    """The words are those of any simulate: strategies, schedules, devices."""
    words = ["pipeline.num_ranks=2", "pipeline.num_microbatches=3", "schedule=gpipe", "partition=uniform"]
    code = (
        "import sys; from modelpar.cli import main\n"
        f"main(['simulate', 'profile=graph.txt', 'cluster.link.latency=0', 'cluster.memory=1MB', *{words}])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 stages by uniform, 3 micro-batches" in done.stdout
    assert "node3, node2 (2)" in done.stdout
    assert "step 44" in done.stdout  # F takes 3 and 5 ms, B 7 and 5: 3 + 3·5, then 5 + 3·7
    assert "Messages cost nothing" not in done.stdout


def test_what_does_not_fit_costs_one_line(small):
    words = ["profile=graph.txt", "pipeline.num_ranks=2", "cluster.memory=17KB", "schedule=gpipe"]
    outcome = call("simulate", *words, "pipeline.num_microbatches=10")
    assert outcome.code == 2
    assert outcome.err == (
        "modelpar: 2 stages do not fit into memory: node2 alone needs 34.4 KB on rank 0, which has 17 KB; "
        "no number of stages up to 4 would fit on such devices\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no layers; expected a profile in PipeDream's format"),
        ("hello\n", "graph.txt, line 1 is 'hello'; expected node1 -- name -- forward_compute_time="),
        ("node1 -- Linear -- forward_compute_time=1\n", "graph.txt, line 1 has no backward_compute_time"),
        (line(1, "Linear", "x", 1, 1, 1), "line 1 has forward_compute_time=x; expected a number"),
        (line(1, "Linear", -1, 1, 1, 1), "line 1 has forward_compute_time=-1; expected a number from 0 up"),
        (line(1, "Linear", 1, 1, 1, 1) + "\tnode1 -- node2\n", "has an edge with node2, but no such layer"),
        (
            line(1, "A", 1, 1, 1, 1) + line(2, "B", 1, 1, 1, 1) + "\tnode1 -- node2\n\tnode2 -- node1\n",
            "node1 needs itself, through other layers; expected no cycles",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("graph.txt").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_pipedream("graph.txt")
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"^the profile .*gone\.txt cannot be read: No such file or directory$"):
        read_pipedream(tmp_path / "gone.txt")
