"""How a batch is cut into micro-batches, and how outputs are put together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modelpar.capture.joining import counting_names, join
from modelpar.capture.microbatch import Cutting, batch_size, microbatch_sizes, split_batch
from modelpar.capture.objective import Objective
from modelpar.errors import ConfigError
from modelpar.planning.reading import Reading


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


def test_the_size_of_a_batch_is_that_of_its_first_tensor_or_else_of_its_first_list():
    assert batch_size((torch.tensor(3.0), torch.ones(4, 2))) == 4
    assert batch_size({"a": 1, "b": torch.ones(2, 7)}, batch_dim=1) == 7
    assert batch_size((["a", "b"], np.ones((5, 2)))) == 5
    assert batch_size([torch.ones(3), torch.ones(7)]) == 2
    assert batch_size(["a", "b", "c"]) == 3
    for inputs, message in (
        (torch.ones(0, 3), r"the batch is empty: .*\[0, 3\]"),
        ([], "the batch is empty: inputs are an empty list"),
        ("text", "no tensor with dimension 0"),
        (3, "no tensor with dimension 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            batch_size(inputs)


def cut(inputs, targets=None, number=2, **options):
    return Cutting(**options).cut((inputs, targets), number)


def test_lists_and_arrays_of_samples_are_cut_as_tensors_are():
    inputs = {
        "x": torch.arange(4),
        "lengths": [3, 1, 2, 5],
        "names": ("a", "b", "c", "d"),
        "sizes": np.arange(8).reshape(4, 2),
    }
    targets = [{"boxes": torch.ones(n, 4)} for n in range(4)]
    first, second = cut(inputs, targets)
    assert (first.inputs["lengths"], second.inputs["lengths"]) == ([3, 1], [2, 5])
    assert (first.inputs["names"], second.inputs["names"]) == (("a", "b"), ("c", "d"))
    assert type(first.inputs["sizes"]) is np.ndarray
    assert second.inputs["sizes"].tolist() == [[4, 5], [6, 7]]
    assert [len(target["boxes"]) for target in second.targets] == [2, 3]
    assert [microbatch.size for microbatch in (first, second)] == [2, 2]
    (left, right) = cut((torch.ones(2, 3), np.arange(6).reshape(2, 3)), number=3, dim=1)[:2]
    assert (left.inputs[1].tolist(), right.inputs[1].tolist()) == ([[0], [3]], [[1], [4]])


def test_an_array_that_is_cut_is_a_copy_that_later_writes_do_not_reach():
    lengths = np.arange(4)
    first, _ = cut((torch.ones(4), lengths))
    lengths[:] = 7
    assert first.inputs[1].tolist() == [0, 1]


def test_a_list_of_images_is_one_input_of_as_many_samples_as_targets():
    images = [torch.ones(3, 8 + n, 8) for n in range(4)]
    for batch in (images, (images,), (tuple(images),), {"images": images}):
        first, second = cut(batch, torch.arange(4))
        assert [len(next(iter(torch.utils._pytree.tree_leaves(m.inputs)))) for m in (first, second)] == [3, 3]
        assert len(torch.utils._pytree.tree_leaves(first.inputs)) == 2
    same = [torch.ones(3, 8, 8) for _ in range(4)]
    assert len(cut(same, torch.arange(4))[0].inputs) == 2
    assert len(cut(same)[0].inputs) == 2
    assert len(cut((same, [{"label": n} for n in range(4)]))[0].inputs[1]) == 2


def test_a_list_of_maps_that_are_as_long_as_the_targets_is_a_structure():
    maps = [torch.arange(6), torch.arange(6) * 2, torch.arange(6) * 3]
    first, second = cut(maps, torch.arange(6))
    assert [part.tolist() for part in second.inputs] == [[3, 4, 5], [6, 8, 10], [9, 12, 15]]
    assert len(first.inputs) == 3
    state = torch.ones(6), torch.ones(6)
    assert [len(part) for part in cut((torch.ones(6), state))[0].inputs[1]] == [3, 3]


def test_where_both_readings_fit_a_list_is_samples_and_a_tuple_a_structure():
    pair = torch.arange(2), torch.arange(2)
    targets = torch.ones(2)
    assert [part.tolist() for part in cut((pair,), targets)[0].inputs[0]] == [[0], [0]]
    assert cut((list(pair),), targets)[0].inputs[0][0].tolist() == [0, 1]


def test_what_is_shared_is_not_cut_and_does_not_count_samples():
    bias, x = torch.ones(4, 4), torch.ones(6, 2)
    first, _ = cut((bias, x), torch.ones(6), shared=("0",))
    assert (first.inputs[0].shape, first.inputs[1].shape, first.size) == ((4, 4), (3, 2), 3)
    named = {"x": x, "more": {"table": torch.ones(6)}, "names": ["a"] * 6}
    first, _ = cut(named, (torch.ones(6), torch.ones(6)), shared=("more.table", "inputs.names", "targets.1"))
    assert (len(first.inputs["more"]["table"]), len(first.inputs["names"])) == (6, 6)
    assert [len(target) for target in first.targets] == [3, 6]


@pytest.mark.parametrize("shared", [1, "1", ["1"], (1,), ["inputs.1"]])
def test_shared_may_be_given_as_a_place_or_a_name(shared):
    objective = Objective(nn.Linear(1, 1), shared=shared)
    first, _ = Cutting.of(objective).cut(((torch.ones(4), torch.ones(4)), None), 2)
    assert [len(part) for part in first.inputs] == [2, 4]


def test_a_shared_name_that_is_not_there_is_refused_with_those_that_are():
    batch = {"x": torch.ones(4), "mask": {"a": torch.ones(4)}}, torch.ones(4)
    with pytest.raises(ConfigError, match=r"shared names 'mas', .*; expected one of x, mask, mask.a"):
        Cutting(shared=("mas",)).read(batch)
    with pytest.raises(ConfigError, match=r"shared names 'mask', .*; expected one of none: its inputs are one tensor"):
        Cutting(shared=("mask",)).read((torch.ones(4), torch.ones(4)))


def test_later_batches_are_read_as_the_example_was():
    example = (torch.ones(8, 2), torch.ones(4, 4), (torch.ones(3), torch.ones(3)), ["a"] * 8), torch.ones(8)
    cutting = Cutting().read(example)
    assert cutting.known == Reading(("inputs.0", "inputs.3", "targets"), ("inputs.1", "inputs.2.0", "inputs.2.1"))
    four = (torch.ones(4, 2), torch.ones(4, 4), (torch.ones(4), torch.ones(4)), ["a"] * 4), torch.ones(4)
    first, _ = cutting.cut(four, 2)
    assert [len(first.inputs[0]), len(first.inputs[1]), len(first.inputs[2][0]), len(first.inputs[3])] == [2, 4, 4, 2]
    images = Cutting().read(((tuple(torch.ones(3, 8) for _ in range(4)),), torch.ones(4)))
    three = ((torch.ones(3, 8),) * 3,)
    assert len(images.cut((three, None), 3)[0].inputs[0]) == 1
    assert len(Cutting().cut((three, None), 3)[0].inputs[0]) == 3  # which by itself would be a structure
    assert Reading.from_json(cutting.known.to_json()) == cutting.known


def test_a_part_that_counted_samples_and_no_longer_does_is_refused():
    cutting = Cutting().read(((torch.ones(4), [1, 2, 3, 4]), torch.ones(4)))
    message = r"inputs.1 has 3 entries in a batch of 4 samples, .*; expected 4, or shared=\['1'\]"
    with pytest.raises(ConfigError, match=message):
        cutting.cut(((torch.ones(4), [1, 2, 3]), torch.ones(4)), 2)


@pytest.mark.parametrize("targets", [torch.ones(3), [1, 2, 3], np.ones(3), (torch.ones(3), 7), {"a": [1]}])
def test_targets_of_another_length_are_refused(targets):
    with pytest.raises(ConfigError, match=r"the batch has 4 inputs and [123] targets; expected as many of each"):
        cut(torch.ones(4), targets)
    cut(torch.ones(4), 3)


def halves(inputs, targets, number):
    """Cuts a batch whose samples are pairs of rows."""
    groups = torch.arange(len(inputs) // 2).tensor_split(min(number, len(inputs) // 2))
    return [
        (inputs[2 * int(g[0]) : 2 * int(g[-1]) + 2], None if targets is None else targets[g], len(g)) for g in groups
    ]


def test_the_users_own_function_cuts():
    first, second = cut(torch.arange(8), torch.arange(4), own=halves)
    assert (first.inputs.tolist(), second.targets.tolist(), second.size) == ([0, 1, 2, 3], [2, 3], 2)
    assert Cutting(own=halves).size(torch.arange(8)) == 4
    assert Cutting(own=halves).first((torch.arange(8), None), 2).size == 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "cut returned None; expected a list of"),
        ([], r"cut returned \[\]; expected a list of"),
        ([(1, 2)], r"cut returned a list with \(1, 2\); expected"),
        ([(1, 2, 0)], "of at least 1 sample each"),
        ([(1, 2, 1)] * 3, "cut returned 3 micro-batches; expected at most 2"),
    ],
)
def test_what_the_users_own_function_gives_is_checked(found, message):
    with pytest.raises(ConfigError, match=message):
        cut(torch.ones(4), own=lambda inputs, targets, number: found)


def test_samples_are_taken_by_number():
    batch = (torch.arange(4), ["a", "b", "c", "d"], np.arange(4), "text"), [{"n": n} for n in range(4)]
    inputs, targets = Cutting().take(batch, [3, 0, 3])
    assert inputs[0].tolist() == [3, 0, 3]
    assert (inputs[1], inputs[2].tolist(), inputs[3]) == (["d", "a", "d"], [3, 0, 3], "text")
    assert targets == [{"n": 3}, {"n": 0}, {"n": 3}]


def output(size, value=0.0):
    return {
        "logits": torch.full((size, 2), value),
        "boxes": [{"score": value}] * size,
        "array": np.zeros(size),
        "table": torch.ones(3, 2),
        "count": 3,
        "nothing": None,
        "deep": (torch.zeros(size), torch.zeros(())),
    }


def test_what_follows_the_sizes_counts_samples_and_is_joined():
    counting = counting_names(output(3), 3, output(2), 2)
    assert counting == {"output.logits", "output.boxes", "output.array", "output.deep.0"}
    whole = join([output(3), output(2)], (3, 2), counting)
    assert (whole["logits"].shape, len(whole["boxes"]), whole["array"].shape) == ((5, 2), 5, (5,))
    assert (whole["table"].shape, whole["count"], whole["nothing"]) == ((3, 2), 3, None)
    assert (whole["deep"][0].shape, whole["deep"][1].shape) == ((5,), ())


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            torch.ones(()),
            torch.zeros(()),
            r"has shape \[\] for a micro-batch of 2, which cannot be joined: output does",
        ),
        (0.5, 0.25, "is 0.5 for"),
        ({"a": 1}, {"a": 2}, "output.a does not count samples"),
        ({"a": 1}, {"b": 1}, "is {'a': 1} for"),
        (torch.ones(3), torch.ones(2), r"has shape \[3\] for"),
    ],
)
def test_what_is_another_in_each_microbatch_is_refused(first, second, message):
    with pytest.raises(ConfigError, match=message):
        join([first, second], (2, 2), set())
