"""How a batch meets a model, and what a loss may be."""

import pytest
import torch
from torch import nn

from modelpar.capture.objective import LossResult, Objective, call, loss_of
from modelpar.errors import CaptureError


def test_inputs_are_passed_as_they_are_made():
    def show(*args, **kwargs):
        return args, kwargs

    assert call(show, (1, 2)) == ((1, 2), {})
    assert call(show, {"a": 1}) == ((), {"a": 1})
    assert call(show, [1, 2]) == (([1, 2],), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_loss_of_low_precision_is_summed_in_float32_with_the_same_gradient(dtype):
    mean = torch.tensor(1.0078125, dtype=dtype, requires_grad=True)
    found = loss_of(lambda output, targets: output, mean, None, 1001)
    assert found.total.item() == pytest.approx(1008.8203125, rel=1e-7)
    (gradient,) = torch.autograd.grad(found.total, mean)
    (expected,) = torch.autograd.grad(mean * 1001, mean)
    assert torch.equal(gradient, expected)
    total = loss_of(lambda output, targets: LossResult(output, 3), mean, None, 3).total
    assert (total.item(), total.dtype) == (1.0078125, torch.float64 if dtype == torch.float64 else torch.float32)


class Output:
    def __init__(self, loss):
        self.loss = loss


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, 1), lambda x: {"loss": x, "y": 1}, Output])
def test_a_model_may_return_its_own_loss(form):
    found = loss_of(None, form(torch.tensor(2.0)), None, 3)
    assert (found.total, found.count) == (6, 3)


def test_a_mean_becomes_a_sum_and_a_loss_result_stays():
    assert loss_of(lambda output, targets: output.mean(), torch.ones(4), None, 4)[:2] == (4, 4)
    result = LossResult(torch.tensor(5.0), 7, {"hits": 0.5})
    assert loss_of(lambda output, targets: result, None, None, 4) == result


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(3), r"the loss is a tensor of shape \[3\]; expected a scalar tensor"),
        (1.0, "the loss is a float; expected"),
        (None, "the loss is a NoneType"),
        (LossResult(torch.ones(2), 2), r"LossResult.total is a tensor of shape \[2\]"),
        (LossResult(2.0, 2), "LossResult.total is a float"),
    ],
)
def test_other_losses_are_refused(found, message):
    with pytest.raises(CaptureError, match=message):
        loss_of(lambda output, targets: found, None, None, 2)


def test_a_factory_is_called_with_the_seed_and_leaves_the_generator_alone():
    objective = Objective(lambda: nn.Linear(3, 3))
    state = torch.get_rng_state()
    a, b, c = objective.build(1), objective.build(1), objective.build(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, c.weight)
    model = nn.Linear(2, 2)
    assert Objective(model).build(5) is model
