"""One floating dtype for all tensors of a checkpoint; what is no plain floating number is refused by name."""

import pytest
import torch

from unet_denoiser.convert.dtypes import check_dtype, unify_dtypes

F8, F8_RANGE = torch.float8_e4m3fn, torch.float8_e5m2


def make(*dtypes):
    return {f"t{i}": torch.tensor([1.5, -2.0]).to(dtype) for i, dtype in enumerate(dtypes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_one_dtype_are_left_as_they_are(dtype, recwarn):
    tensors = make(dtype, dtype)
    assert unify_dtypes(tensors, "x") == tensors
    assert not recwarn


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float16, torch.float64), torch.float64),
        ((F8, torch.bfloat16), torch.bfloat16),
        ((F8, torch.float16), torch.float16),
        ((F8, F8_RANGE, torch.float32), torch.float32),
        ((F8, F8), torch.bfloat16),
        ((F8_RANGE,), torch.bfloat16),
    ],
)
def test_the_widest_dtype_holds_all(dtypes, expected):
    with pytest.warns(UserWarning, match=f"^file has .*; all are loaded as {expected}; torch_dtype="):
        found = unify_dtypes(make(*dtypes), "file")
    assert {tensor.dtype for tensor in found.values()} == {expected}
    assert all(tensor.tolist() == [1.5, -2.0] for tensor in found.values())


@pytest.mark.parametrize("wanted", [torch.float16, "float16"])
def test_a_dtype_can_be_chosen(wanted, recwarn):
    found = unify_dtypes(make(F8, torch.float32, torch.float16), "file", wanted)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert not recwarn


@pytest.mark.parametrize("wanted", ["auto", "float17", torch.int8, F8, 16, "load"])
def test_another_dtype_is_refused(wanted):
    with pytest.raises(ValueError, match=r"torch_dtype=.* is not one of torch\.float32, torch\.bfloat16"):
        check_dtype(wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_numbers_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"^file: b is {dtype}; weights must be floating-point"):
        unify_dtypes({"a": torch.ones(2), "b": torch.ones(2).to(dtype)}, "file")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.weight.absmax", "4-bit weights of bitsandbytes"),
        ("a.weight.quant_map", "4-bit weights of bitsandbytes"),
        ("a.SCB", "8-bit weights of bitsandbytes"),
        ("a.scale_weight", "scaled fp8"),
        ("scaled_fp8", "scaled fp8"),
        ("a.weight_scale", "quantised weights with scales"),
        ("a.qweight", "weights of GPTQ"),
    ],
)
def test_quantised_weights_are_named_as_what_they_are(name, kind):
    with pytest.raises(ValueError, match=f"file holds {kind}.* \\({name}\\); give the file that they were made from"):
        unify_dtypes({"a.weight": torch.ones(2).to(torch.uint8), name: torch.ones(1)}, "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_by_name(value, dtype):
    with pytest.raises(ValueError, match="file: b has values that are not finite"):
        unify_dtypes({"a": torch.ones(2).to(dtype), "b": torch.tensor([1, value, 2]).to(dtype)}, "file")


def test_large_values_are_finite_and_may_not_fit_another_dtype():
    large = {"a": torch.full((1000,), 60000.0).half(), "b": torch.full((1000,), 3e38).bfloat16()}
    with pytest.warns(UserWarning, match="all are loaded as torch.float32"):
        unify_dtypes(large, "file")
    with pytest.raises(ValueError, match=r"b has values that torch\.float16 cannot hold"):
        unify_dtypes(large, "file", torch.float16)
