"""Objects that a module holds and calls although they are no modules: ptwt's matrix transforms."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastfusion import ops
from fastfusion.accelerating.swapping import Forward, apart, original_method

_KIND = "Haar transform"


def held_objects(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module that are ptwt's transforms by matrices, with their names."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if {"fwt_matrix_list", "ifwt_matrix_list"} & getattr(value, "__dict__", {}).keys()
    ]


def fast_call(held: Any) -> tuple[Forward | None, str]:
    """The fast ``__call__`` of such an object, with a note; None with the reason against it."""
    if len(getattr(held, "axes", ())) != 2:
        return None, "not covered: not a transform of two dimensions"
    if tuple(held.axes) != (-2, -1):
        return None, f"not covered: axes {tuple(held.axes)}"
    if held.wavelet.dec_len != 2:  # there is one orthogonal wavelet of that length
        return None, "not covered: another wavelet than Haar's"
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    probe = copy.deepcopy(held)  # a call leaves the matrices of its input's size behind
    if hasattr(held, "fwt_matrix_list"):
        probe.level = 2
        given: Any = image
        call: Forward = analysis
    else:
        details = (image, image.flip(2), image.flip(3))
        coarse = tuple(band[..., :4, :6].contiguous() for band in details)
        given = (coarse[0] + 1, coarse, details)
        call = synthesis
    try:
        expected, found = type(held).__call__(probe, given), call(probe, given)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return None, f"it cannot be compared: {str(error).splitlines()[0]}"
    problem = apart(tree_leaves(expected), tree_leaves(found))
    return (None, problem) if problem else (call, "of ptwt")


def analysis(self: Any, input_signal: Tensor) -> Any:
    """ptwt's ``MatrixWavedec2``: below the approximation the details, coarse ones first."""
    x, levels = input_signal, self.level
    whole = 2**levels if levels and levels > 0 else 0  # without a level the first call sets it
    if not whole or x.dim() < 2 or 0 in x.shape or x.shape[-2] % whole or x.shape[-1] % whole:
        return original_method(self, "__call__")(self, input_signal)
    from ptwt.constants import WaveletDetailTuple2d

    before, details = x.shape[:-2], []
    x = x.reshape(-1, 1, *x.shape[-2:]) if x.dim() != 4 else x
    for _ in range(levels):
        x, *bands = ops.haar_dwt2d(x)
        rows, columns, both = (band.reshape(*before, *band.shape[-2:]) for band in bands)
        # By two matrices ptwt names the bands the other way round than by one.
        pair = (columns, rows) if self.separable else (rows, columns)
        details.append(WaveletDetailTuple2d(*pair, both))
    return (x.reshape(*before, *x.shape[-2:]), *reversed(details))


def synthesis(self: Any, coefficients: Any) -> Tensor:
    """ptwt's ``MatrixWaverec2``."""
    if not _fit(coefficients):
        return original_method(self, "__call__")(self, coefficients)
    x, *details = coefficients
    before = x.shape[:-2]
    x = x.reshape(-1, 1, *x.shape[-2:]) if x.dim() != 4 else x
    for first, second, both in details:
        pair = (second, first) if self.separable else (first, second)
        x = ops.haar_idwt2d(x, *(band.reshape(x.shape) for band in (*pair, both)))
    return x.reshape(*before, *x.shape[-2:])


def _fit(coefficients: Any) -> bool:
    """Whether each level's bands are as large as what the level below it makes."""
    if not isinstance(coefficients, tuple | list) or len(coefficients) < 2:
        return False
    x, *details = coefficients
    if not isinstance(x, Tensor) or x.dim() < 2 or 0 in x.shape:
        return False
    shape = tuple(x.shape)
    for bands in details:
        if not isinstance(bands, tuple) or len(bands) != 3:
            return False
        if any(tuple(band.shape) != shape or band.dtype != x.dtype for band in bands):
            return False
        shape = (*shape[:-2], 2 * shape[-2], 2 * shape[-1])
    return True
