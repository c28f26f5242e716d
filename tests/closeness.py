"""How far a result is from the truth, in one number, and what a test says when it is too far."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(result: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """The relative L2 error in float64; NaN and infinities must stand at the same places.

    ``scale`` replaces the norm of the expected value where that is larger: for a gradient that is
    0 in exact arithmetic, say, the norm of its sister.
    """
    if result.shape != expected.shape:
        return float("inf")
    result, expected = result.detach().double(), expected.detach().double()
    special = ~expected.isfinite()
    same = torch.where(expected.isnan(), result.isnan(), result == expected)
    if (special & ~same).any() or (~special & ~result.isfinite()).any():
        return float("inf")
    difference = (result - expected).masked_fill(special, 0).norm().item()
    norm = max(expected.masked_fill(special, 0).norm().item(), scale or 0.0)
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else float("inf")


def assert_close(
    result: Tensor, expected: Tensor, bound: float, what: str, scale: float | None = None
) -> None:
    """Fail with the error, the bound and the place of the worst element."""
    error = relative_error(result, expected, scale)
    if error <= bound:
        return
    message = f"{what}: relative L2 error {error:.3g}, bound {bound:.3g}"
    if result.shape != expected.shape:
        message += f"; shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    elif result.numel():
        gap = (result.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
        place = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        message += f"; worst at {place}: {result[place].item()}, expected {expected[place].item()}"
    raise AssertionError(message)
