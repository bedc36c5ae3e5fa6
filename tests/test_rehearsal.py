"""What an optimizer factory and a schedule choose is the same on ranks as for the whole model, or is refused."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from unsplit import check_equal, make_plan

from modelpar.capture.objective import Objective
from modelpar.errors import ConfigError
from modelpar.planning import partitioners
from modelpar.proof import verify
from modelpar.run.pipeline import Pipeline

BATCH = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Block(nn.Module):
    """Has a parameter with marks for the optimizer, one private, one public."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.log = nn.Parameter(torch.ones(width))
        self.log._no_weight_decay = True
        self.log.lr_scale = 0.5

    def forward(self, x):
        return torch.tanh(self.linear(x)) * torch.exp(-self.log)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Block(6), Block(6), nn.Linear(6, 3))


def marked(named):
    """Makes a group per parameter, by its marks and its shape."""
    groups = [
        {
            "params": [p],
            "lr": 0.1 * getattr(p, "lr_scale", 1.0),
            "weight_decay": 0.0 if getattr(p, "_no_weight_decay", False) or p.ndim < 2 else 0.3 * p.shape[0],
        }
        for _, p in named
    ]
    return torch.optim.AdamW(groups)


def two_groups(named, keep_empty):
    """Makes a group for the last layer, and one for the rest."""
    head = [p for n, p in named if n.startswith("3.")]
    rest = [p for n, p in named if not n.startswith("3.")]
    groups = [{"params": rest, "lr": 0.01}, {"params": head, "lr": 0.1}]
    return torch.optim.AdamW([group for group in groups if keep_empty or group["params"]])


def task(model=None, **how):
    objective = Objective(model or build(), F.cross_entropy, **how)
    return objective, make_plan(objective, BATCH, partitioner=partial(partitioners.manual, balance=[2, 2]))


def test_marks_of_parameters_reach_the_optimizers(workers):
    model = build()
    check_equal(workers, model, F.cross_entropy, [BATCH] * 3, optimizer=marked)


@pytest.mark.parametrize("how", [{}, {"init": "meta"}])
def test_marks_of_a_model_that_a_function_makes(workers, how):
    objective, plan = task(build, **how)
    verdict = verify(objective, BATCH, plan, optimizer=marked, workers=workers)
    assert verdict.passed


def test_a_schedule_per_group_needs_the_same_groups_everywhere(workers):
    objective, plan = task()
    schedule = partial(LambdaLR, lr_lambda=[lambda step: 0.5**step, lambda step: 0.9**step])
    with pytest.raises(ConfigError) as caught:
        Pipeline(objective, plan, optimizer=partial(two_groups, keep_empty=False), lr_schedule=schedule)
    assert str(caught.value) == (
        "the optimizer or its learning-rate schedule cannot be used on rank 0, for 0.weight … 1.linear.bias: Expected "
        "1 lr_lambdas, but got 2; it makes 1 parameter groups there and 2 for the whole model; expected the same "
        "groups on every rank, those that are empty there with 'params': []"
    )
    kept = partial(two_groups, keep_empty=True)
    check_equal(workers, build(), F.cross_entropy, [BATCH] * 3, optimizer=kept, lr_schedule=schedule)


def test_the_learning_rate_of_a_step_is_that_of_the_unsplit_first_group(workers):
    """Also where the last rank has another group only."""
    objective, plan = task()
    schedule = partial(LambdaLR, lr_lambda=lambda step: 0.5**step)
    factory = partial(two_groups, keep_empty=False)
    with Pipeline(objective, plan, workers=workers, optimizer=factory, lr_schedule=schedule) as pipeline:
        assert [pipeline.step(BATCH).lr for _ in range(3)] == [0.01, 0.005, 0.0025]


def by_position(named):
    return torch.optim.SGD([{"params": [p], "lr": 0.1 * 0.5**i} for i, (_, p) in enumerate(named)])


def by_kind(named):
    return (torch.optim.SGD if any(n.startswith("0") for n, _ in named) else torch.optim.AdamW)(named, lr=0.1)


def the_first_two(named):
    return torch.optim.SGD(named[:2], lr=0.1)


def of_one_stage(named):
    if len(named) < 6:
        return torch.optim.SGD(named, lr=named[0][1].missing)
    return torch.optim.SGD(named, lr=0.1)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            by_position,
            r"gives 2.log lr 0.1 on rank 1, and 0.003125 when it is made for the whole model; expected a fun",
        ),
        (by_kind, "gives 2.log optimizer 'AdamW' on rank 1, and 'SGD' when it is made for the whole model; expected"),
        (
            the_first_two,
            "^2.log is trained by the optimizer of rank 1, and is not by the one that is made for the whole",
        ),
        (of_one_stage, "cannot be used on rank 0, for 0.weight .*: AttributeError: .* has no attribute 'missing'"),
    ],
)
@pytest.mark.parametrize("how", [{}, {"init": "meta"}])
def test_what_depends_on_the_split_is_refused(factory, message, how):
    objective, plan = task(build if how else None, **how)
    with pytest.raises(ConfigError, match=message):
        Pipeline(objective, plan, optimizer=factory)


def rewriting(named):
    """Reads values, writes some, and asks for a device."""
    with torch.no_grad():
        for _, parameter in named:
            parameter.mul_(2 if float(parameter.abs().sum()) > 0 else 1)
    return torch.optim.SGD(named, lr=0.1, fused=True)


@pytest.mark.parametrize("how", [{}, {"init": "meta"}])
def test_a_rehearsal_changes_nothing_and_refuses_nothing_that_works(workers, how):
    model = build()
    objective, plan = task(build if how else model, **how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Pipeline(objective, plan, workers=workers, optimizer=rewriting) as pipeline:
        pipeline.step(BATCH)
        assert pipeline.check.passed or how
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_messages_are_one_line():
    class Mute(Exception):
        def __str__(self):
            raise KeyError("mute")

    def silent(named):
        raise Mute

    objective, plan = task()
    with pytest.raises(ConfigError, match=re.escape("cannot be used: Mute, which could not be described (KeyError)")):
        Pipeline(objective, plan, optimizer=silent)
