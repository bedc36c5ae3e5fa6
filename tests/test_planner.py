"""`modelpar.plan`: from a model to a plan, what it defaults to, and what it refuses."""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelpar import Objective, Plan, Workers, partitioners, plan, schedules
from modelpar.errors import CaptureError, ConfigError, PartitionError, PlanError
from modelpar.planner import UNMEASURED_LINKS, place


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Dropout(0.1))]
    return Objective(nn.Sequential(*layers, nn.Linear(8, 3)), F.cross_entropy)


BATCH = torch.randn(12, 8), torch.randint(3, (12,))


def test_the_defaults(objective, shared_workers):
    decided = plan(objective, BATCH, workers=shared_workers["rpc"].get)
    assert (decided.num_ranks, decided.num_microbatches, decided.tied) == (2, 8, "fast")
    assert decided.schedule.lines() == schedules.one_f_one_b(2, 8).lines()
    assert (decided.partition.method, sum(decided.partition.balance)) == ("optimal", 7)
    assert decided.num_threads == max(1, (os.cpu_count() or 1) // 2)
    assert (decided.profile.source, decided.profile.num_threads) == ("measured", decided.num_threads)
    assert decided.profile.microbatch_size == 2  # the first of 12 samples in 8 micro-batches
    assert decided.profile.num_ranks == 2
    assert decided.cluster.link == decided.profile.link
    assert plan(objective, BATCH, profile="flops").cluster.link == UNMEASURED_LINKS["rpc"]
    assert decided.prediction.step_seconds > 0


def test_what_is_asked_for_is_in_the_plan_and_in_its_file(objective, tmp_path):
    split = partial(partitioners.manual, balance=[1, 2, 4])
    decided = plan(
        objective,
        BATCH,
        num_ranks=3,
        num_microbatches=4,
        partitioner=split,
        schedule=schedules.gpipe,
        num_threads=2,
        profile="flops",
        tied="exact",
    )
    assert decided.partition.balance == (1, 2, 4)
    assert decided.schedule.lines() == schedules.gpipe(3, 4).lines()
    assert (decided.num_threads, decided.tied, decided.profile.source) == (2, "exact", "flops")
    decided.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_json() == decided.to_json()
    assert again.graph.hash == decided.graph.hash


def test_a_profile_is_used_as_it_is(objective):
    profile = plan(objective, BATCH, profile="flops").profile
    assert plan(objective, BATCH, profile=profile, partitioner=partitioners.by_time).profile is profile


def test_planning_changes_neither_the_model_nor_the_random_numbers():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = torch.get_rng_state()
    with Workers(2, transport="threads") as workers:
        plan(Objective(model, F.cross_entropy), BATCH, num_microbatches=2, transport="threads", workers=workers)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


GUESSED = "profile is 'guessed'; expected measured, anew, alone, flops, or the path of a .json file"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_ranks": 0}, ConfigError, "num_ranks is 0 and num_microbatches 8; expected at least 1 of both"),
        ({"num_microbatches": 0}, ConfigError, "num_ranks is 2 and num_microbatches 0; expected at least 1 of both"),
        ({"num_threads": 0}, ConfigError, "num_threads is 0; expected at least 1"),
        ({"profile": "guessed"}, ConfigError, GUESSED),
        ({"tied": "slow"}, PlanError, 'tied is \'slow\'; expected "fast" or "exact"'),
        (
            {"num_ranks": 8},
            PartitionError,
            "8 stages, but the model has 7 layers that can be cut in 6 places; expected at most 7",
        ),
        ({"devices": ["cpu"]}, ConfigError, "1 devices ['cpu'] for 2 ranks; expected one per rank"),
        (
            {"partitioner": partial(partitioners.manual, balance=[3, 3])},
            PartitionError,
            "balance [3, 3] adds up to 6 layers with 2 stages; expected positive counts that add up to 7",
        ),
        (
            {"partitioner": partial(partitioners.manual, balance=["3", "4"])},
            PartitionError,
            "balance ['3', '4']; expected whole numbers, one per stage",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(objective, options, error, message):
    with pytest.raises(error) as raised:
        plan(objective, BATCH, **{"profile": "flops", **options})
    assert str(raised.value) == message


@pytest.mark.parametrize("batch", [(torch.randn(0, 8), torch.randint(3, (0,))), (torch.randn(4, 9), BATCH[1])])
def test_a_batch_that_does_not_fit_is_refused_in_one_line(objective, batch):
    with pytest.raises((ConfigError, CaptureError)) as raised:
        plan(objective, batch, profile="flops")
    assert "\n" not in str(raised.value)


def test_a_device_that_is_not_there_is_refused():
    assert place(2, ["cpu", "cpu"]) == ("cpu", "cpu")
    with pytest.raises(ConfigError, match=r"device 'cuda:99' cannot be used: .+"):
        place(1, ["cuda:99"])
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be used: .+"):
        place(1, ["gpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices, which are the default")
def test_without_cuda_devices_all_ranks_are_on_the_cpu():
    assert place(3) == ("cpu", "cpu", "cpu")
