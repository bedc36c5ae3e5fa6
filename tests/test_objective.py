"""How a batch is cut, and what a loss may be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modelpar.capture.objective import LossResult, Objective, batch_size, call, loss_of, microbatch_sizes, split_batch
from modelpar.errors import CaptureError, ConfigError


@given(st.integers(1, 60), st.integers(1, 20))
def test_microbatches_are_those_of_tensor_split(samples, microbatches):
    x = torch.arange(samples)
    sizes = microbatch_sizes(samples, microbatches)
    expected = x.tensor_split(min(samples, microbatches))
    assert sizes == [len(part) for part in expected]
    assert all(torch.equal(a, b) for a, b in zip(split_batch(x, sizes), expected, strict=True))


def test_tensors_as_long_as_the_batch_are_cut_and_all_else_is_repeated():
    tree = {"x": torch.arange(10).view(5, 2), "mask": (torch.ones(3), torch.arange(5)), "flag": True, "none": None}
    first, second = split_batch(tree, [3, 2])
    assert first["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert second["mask"][1].tolist() == [3, 4]
    assert second["mask"][0] is tree["mask"][0]
    assert (second["flag"], first["none"]) == (True, None)
    (left, right) = split_batch(torch.arange(6).view(2, 3), [1, 2], batch_dim=1)
    assert (left.tolist(), right.tolist()) == ([[0], [3]], [[1, 2], [4, 5]])
    assert split_batch(None, [1, 1]) == [None, None]


def test_the_size_of_a_batch_is_that_of_its_first_tensor():
    assert batch_size((torch.tensor(3.0), torch.ones(4, 2))) == 4
    assert batch_size({"a": 1, "b": torch.ones(2, 7)}, batch_dim=1) == 7
    empty = r"the batch is empty: .*\[0, 3\]"
    for inputs, message in ((torch.ones(0, 3), empty), ("text", "no tensor with dimension 0")):
        with pytest.raises(ConfigError, match=message):
            batch_size(inputs)


def test_inputs_are_passed_as_they_are_made():
    def show(*args, **kwargs):
        return args, kwargs

    assert call(show, (1, 2)) == ((1, 2), {})
    assert call(show, {"a": 1}) == ((), {"a": 1})
    assert call(show, [1, 2]) == (([1, 2],), {})


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
