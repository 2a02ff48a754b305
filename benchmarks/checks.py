"""Comparison of the sides' results, before any side is timed."""

from measure import Call
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

# The largest error of a side, as a share of the largest value of the peer's float32 result. float32: roundings, and the
# larger ones of Winograd's filtering; bfloat16: one rounding changes a value by up to 0.4 %, and those of all layers
# add up. A layer that is missing or wrong changes the result by far more than either.
MAX_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def gradient_norm(step: Call, model: nn.Module) -> float:
    """Run a training step, and return the norm of all gradients, which it removes again."""
    step()
    norm = get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item()
    model.zero_grad(set_to_none=True)
    return norm


def gradient_errors(steps: dict[str, Call], models: dict[str, nn.Module], expected: float) -> dict[str, float]:
    """Return for each side how far the norm of its gradients is from the expected one, relative to that."""
    return {side: abs(gradient_norm(step, models[side]) / expected - 1) for side, step in steps.items()}


def find_wrong(name: str, precision: str, errors: dict[str, float]) -> str:
    """Return a message on a side whose error is above the precision's bound, or an empty text."""
    for side, error in errors.items():
        if not error <= MAX_ERROR[precision]:
            return f"{name}: {side} differs by {error:.1e}, more than {MAX_ERROR[precision]:.0e}"
    return ""
