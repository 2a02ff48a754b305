"""The record of a batch's conditions."""

import pytest
import torch

from unet_denoiser.models.conditions import Conditions


@pytest.fixture
def conditions():
    return Conditions(
        class_labels=torch.tensor([0, 1, 2]), context=torch.rand(3, 4, 5), context_mask=torch.ones(3, 4).bool()
    )


def test_given_returns_present_conditions(conditions):
    assert list(conditions.given()) == ["class_labels", "context", "context_mask"]
    assert Conditions().given() == {}


def test_rows_by_slice_and_index(conditions):
    assert conditions.rows(slice(1, None)).class_labels.tolist() == [1, 2]
    assert conditions.rows(torch.tensor([2, 0])).context.equal(conditions.context[[2, 0]])


def test_to_converts_only_floats(conditions):
    moved = conditions.to("cpu", torch.bfloat16)
    assert [v.dtype for v in moved.given().values()] == [torch.int64, torch.bfloat16, torch.bool]


def test_context_and_mask_go_together(conditions):
    assert list(conditions.without(["context"]).given()) == ["class_labels"]
    batch = conditions.given() | {"image": torch.zeros(3, 1, 2, 2)}
    assert list(Conditions.select(batch, ["context"]).given()) == ["context", "context_mask"]


def test_stack_items(conditions):
    items = [{"image": None, "class_labels": i, "vector": [0.5, i]} for i in range(3)]
    stacked = Conditions.stack(items, ["class_labels", "vector"])
    assert stacked.class_labels.tolist() == [0, 1, 2]
    assert stacked.vector.shape == (3, 2)
    assert Conditions.stack(items, []).given() == {}


def test_expand_repeats_a_single_sample():
    assert Conditions(vector=torch.rand(1, 2)).expand(4).vector.shape == (4, 2)
