"""Arguments that forward refuses before it computes anything, with their name, value and a valid one."""

import pytest
import torch

from support.networks import CONDITIONS, inputs, small

NOTHING = {"num_classes": None, "vector_dim": None, "context_dim": None}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def bools(*shape):
    return zeros(*shape, dtype=torch.bool)


# (options, changes to valid arguments, exception, parts of its message)
REFUSED = {
    "x list": ({}, {"x": [1.0]}, TypeError, ["x is a list", "torch.Tensor"]),
    "x channels": ({}, {"x": zeros(2, 4, 8, 8)}, ValueError, ["x has shape (2, 4, 8, 8)", "(any, 3, any, any)"]),
    "x unbatched": ({}, {"x": zeros(3, 8, 8)}, ValueError, ["x has shape (3, 8, 8)", "(any, 3, any, any)"]),
    "x volume": ({}, {"x": zeros(2, 3, 8, 8, 8)}, ValueError, ["x has shape (2, 3, 8, 8, 8)", "(any, 3, any, any)"]),
    "x signal": ({"dims": 1}, {"x": zeros(2, 3, 8, 8)}, ValueError, ["x has shape (2, 3, 8, 8)", "(any, 3, any)"]),
    "x empty": ({}, {"x": zeros(2, 3, 0, 8)}, ValueError, ["x has shape (2, 3, 0, 8)", "(any, 3, any, any)"]),
    "x no samples": ({}, {"x": zeros(0, 3, 8, 8)}, ValueError, ["x has shape (0, 3, 8, 8)"]),
    "x half": ({}, {"x": zeros(2, 3, 8, 8).half()}, TypeError, ["x has dtype torch.float16", "torch.float32"]),
    "x integer": ({}, {"x": zeros(2, 3, 8, 8).int()}, TypeError, ["x has dtype torch.int32", "torch.float32"]),
    "t float": ({}, {"t": 5.0}, TypeError, ["t is a float", "torch.Tensor", "t.expand(batch)"]),
    "t scalar": ({}, {"t": torch.tensor(5)}, ValueError, ["t has shape ()", "(2)", "t.expand(batch)"]),
    "t batch": ({}, {"t": zeros(3)}, ValueError, ["t has shape (3,)", "(2)", "t.expand(batch)"]),
    "t column": ({}, {"t": zeros(2, 1)}, ValueError, ["t has shape (2, 1)", "(2)"]),
    "t bool": ({}, {"t": bools(2)}, TypeError, ["t has dtype torch.bool", "integer or float"]),
    "t complex": ({}, {"t": zeros(2, dtype=torch.complex64)}, TypeError, ["t has dtype torch.complex64"]),
    "labels list": ({}, {"class_labels": [0, 1]}, TypeError, ["class_labels is a list", "torch.Tensor"]),
    "labels batch": ({}, {"class_labels": torch.tensor([0])}, ValueError, ["class_labels has shape (1,)", "(2)"]),
    "labels float": ({}, {"class_labels": zeros(2)}, TypeError, ["class_labels has dtype torch.float32", "int64"]),
    "labels bool": ({}, {"class_labels": bools(2)}, TypeError, ["class_labels has dtype torch.bool", "int64"]),
    "labels high": ({}, {"class_labels": torch.tensor([4, 5])}, ValueError, ["class_labels has 5", "0 to 4"]),
    "labels low": ({}, {"class_labels": torch.tensor([-1, 4])}, ValueError, ["class_labels has -1", "0 to 4"]),
    "labels unused": (
        NOTHING,
        {"class_labels": torch.tensor([0, 1])},
        ValueError,
        ["class_labels", "classes=None"],
    ),
    "labels missing": (
        {"learned_null": False},
        {"class_labels": None},
        ValueError,
        ["class_labels is missing", "num_classes=5", "learned_null=False"],
    ),
    "vector width": ({}, {"vector": zeros(2, 4)}, ValueError, ["vector has shape (2, 4)", "(2, 3)"]),
    "vector batch": ({}, {"vector": zeros(1, 3)}, ValueError, ["vector has shape (1, 3)", "(2, 3)"]),
    "vector double": ({}, {"vector": zeros(2, 3).double()}, TypeError, ["vector has dtype torch.float64", "float32"]),
    "vector unused": (NOTHING, {"vector": zeros(2, 3)}, ValueError, ["vector", "vector_dim=None"]),
    "vector missing": ({"learned_null": False}, {"vector": None}, ValueError, ["vector is missing", "vector_dim=3"]),
    "context width": ({}, {"context": zeros(2, 3, 7)}, ValueError, ["context has shape (2, 3, 7)", "(2, any, 6)"]),
    "context batch": ({}, {"context": zeros(3, 3, 6)}, ValueError, ["context has shape (3, 3, 6)", "(2, any, 6)"]),
    "context pooled": ({}, {"context": zeros(2, 6)}, ValueError, ["context has shape (2, 6)", "(2, any, 6)"]),
    "context no tokens": ({}, {"context": zeros(2, 0, 6)}, ValueError, ["context has shape (2, 0, 6)"]),
    "context text": ({}, {"context": "a cat"}, TypeError, ["context is a str", "torch.Tensor"]),
    "context dtype": ({}, {"context": zeros(2, 3, 6).bfloat16()}, TypeError, ["context has dtype", "torch.float32"]),
    "context unused": (NOTHING, {"context": zeros(2, 3, 6)}, ValueError, ["context", "context_dim=None"]),
    "context missing": (
        {"learned_null": False},
        {"context": None},
        ValueError,
        ["context is missing", "dim=6"],
    ),
    "mask length": ({}, {"context_mask": bools(2, 4)}, ValueError, ["context_mask has shape (2, 4)", "(2, 3)"]),
    "mask dtype": ({}, {"context_mask": zeros(2, 3).long()}, TypeError, ["context_mask has dtype", "torch.bool"]),
    "mask alone": (
        {},
        {"context": None, "context_mask": bools(2, 3)},
        ValueError,
        ["context_mask", "without"],
    ),
    "drop name": ({}, {"drop": {"text": bools(2)}}, ValueError, ["drop has 'text'"]),
    "drop batch": ({}, {"drop": {"context": bools(3)}}, ValueError, ["drop['context'] has shape (3,)", "(2)"]),
    "drop dtype": ({}, {"drop": {"vector": zeros(2)}}, TypeError, ["drop['vector'] has dtype", "torch.bool"]),
    "drop tensor": ({}, {"drop": bools(2)}, TypeError, ["drop is a Tensor", "'class_labels'"]),
    "drop absent": ({}, {"vector": None, "drop": {"vector": bools(2)}}, ValueError, ["'vector'", "not given"]),
    "drop without null": (
        {"learned_null": False},
        {"drop": {"class_labels": bools(2)}},
        ValueError,
        ["drop has 'class_labels'", "learned_null=False"],
    ),
    "residual count": (
        {},
        {"skip_residuals": [zeros(2, 8, 8, 6)]},
        ValueError,
        ["skip_residuals has 1", "needs 4"],
    ),
    "residual shape": (
        {},
        {"skip_residuals": [zeros(2, 8, 8, 6), zeros(2, 8, 8, 6), zeros(2, 8, 8, 6), zeros(2, 16, 4, 3)]},
        ValueError,
        ["skip_residuals[2] has shape (2, 8, 8, 6)", "(2, 8, 4, 3)"],
    ),
    "bottleneck shape": (
        {},
        {"bottleneck_residual": zeros(2, 16, 8, 6)},
        ValueError,
        ["bottleneck_residual has shape (2, 16, 8, 6)", "(2, 16, 4, 3)"],
    ),
    "bottleneck dtype": (
        {},
        {"bottleneck_residual": zeros(2, 16, 4, 3).half()},
        TypeError,
        ["bottleneck_residual has dtype torch.float16", "torch.float32"],
    ),
}


def forbid_computation(model):
    """Let the test fail if any layer runs."""
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda module, args: pytest.fail(f"{type(module).__name__} ran"))


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_refused_before_computing(case):
    options, changes, error, parts = REFUSED[case]
    model = small(**CONDITIONS | options)
    args = inputs(model.config) | changes
    forbid_computation(model)
    with pytest.raises(error) as caught:
        model(**args)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message


def test_valid_arguments_of_these_tests_are_accepted():
    """So that each refusal above is due to its change alone."""
    for options in ({}, NOTHING, {"learned_null": False}, {"dims": 1}):
        model = small(**CONDITIONS | options)
        with torch.no_grad():
            model(**inputs(model.config))


def test_forbidding_computation_works():
    model = small()
    forbid_computation(model)
    with pytest.raises(pytest.fail.Exception, match="ran"):
        model(**inputs(model.config))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_may_be_int32_or_int64(dtype):
    model, labels = small(num_classes=5), torch.tensor([0, 4])
    args = inputs(model.config)
    expected = model(**args | {"class_labels": labels})
    assert torch.equal(model(**args | {"class_labels": labels.to(dtype)}), expected)


def test_a_model_without_conditions_takes_none():
    model = small()
    args = inputs(model.config)
    assert torch.equal(model(args["x"], args["t"]), model(args["x"], args["t"], None, drop={}, class_labels=None))


def test_autocast_takes_any_float_input():
    model = small(**CONDITIONS)
    args = inputs(model.config)
    half = {name: value.bfloat16() if name in ("x", "vector", "context") else value for name, value in args.items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**half).isfinite().all()
        with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
            model(**args | {"x": args["x"].long()})
        with pytest.raises(TypeError, match=r"context_mask has dtype torch.bfloat16"):
            model(**args | {"context_mask": torch.ones(2, 3, dtype=torch.bfloat16)})
    with pytest.raises(TypeError, match=r"x has dtype torch.bfloat16"):
        model(**half)
