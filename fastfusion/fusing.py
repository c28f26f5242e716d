"""`fuse`: one call for every method, from arrays to arrays."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion.data.sensors import Degradation
from fastfusion.environment import backends
from fastfusion.ops import checks
from fastfusion.ops.operator import CHOICES
from fastfusion.ops.operator import backend as backend_for_block

__all__ = ["METHODS", "Unavailable", "check_pair", "fuse"]

_Array = TypeVar("_Array", Tensor, np.ndarray)
_Matrix = Tensor | np.ndarray

# Noise takes black and white pixels a little beyond [0, 1]; counts and "no data" lie far outside.
_LEAST, _MOST = -0.05, 1.05


class Unavailable(RuntimeError):
    """What was asked for by name cannot run here; the message says why."""


def fuse(
    lr_hsi: _Array,
    hr_msi: _Array,
    method: str = "regression",
    *,
    srf: _Matrix | None = None,
    psf: _Matrix | Degradation | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    progress: bool = False,
    **options: Any,
) -> _Array:
    """Fuse a hyperspectral image with a finer multispectral one of the same scene.

    Args:
        lr_hsi: ``(G, h, w)`` or ``(B, G, h, w)``, tensor or NumPy array, floating point in [0, 1].
        hr_msi: ``(g, H, W)`` or ``(B, g, H, W)``, of the same kind, in the same unit (divide both
            by one peak); ``H = scale * h`` and ``W = scale * w``.
        method: ``"regression"`` (a closed form, about a second a scene), ``"fsrvl"`` (a network
            that is fitted to this pair alone, minutes) or ``"bicubic"`` (no fusion, to compare
            with). ``"lso"`` and ``"cofusion"`` are networks: trained beforehand, with
            ``weights=``, a file of `fastfusion.training.train`; or else trained on this pair,
            degraded once more by its own sensors, for ``minutes=`` at most; where that gains
            nothing over the regression, the regression is the result, with a warning.
        srf: ``(g, G)``, the multispectral sensor's response; by default estimated from the pair.
        psf: the hyperspectral sensor's point spread function, 2-D with sum 1, or a `Degradation`,
            which tells its sampling offset and boundary too; by default estimated from the pair.
        backend: the kernels that operators run on; one asked for by name runs or raises.
        device: where to compute; by default where ``lr_hsi`` is.
        progress: show a bar with the time left where a method takes long.
        options: of the method: those of `fastfusion.models.regression.regression`; those of
            `fastfusion.models.FSRVL` and of its ``fit``; ``weights`` of a trained network, or those
            of `fastfusion.training.train_on_pair`.

    Returns:
        ``(G, H, W)`` or ``(B, G, H, W)``: a tensor or an array as ``lr_hsi`` is one, of its dtype
        and on its device.

    Raises:
        TypeError: an image is no tensor or array; an option is not the method's.
        ValueError: the images hold NaN, infinite or unscaled values or do not fit together
            (swapped, sides that do not divide); the sensors do not fit the images; the method is
            not known.
        Unavailable: a `RuntimeError`: the method, backend or device cannot run here, and why.

    >>> lr_hsi, hr_msi = torch.rand(31, 8, 8), torch.rand(3, 32, 32)
    >>> fuse(lr_hsi, hr_msi, method="bicubic").shape
    torch.Size([31, 32, 32])
    """
    run = _method(method)
    checks.flag("progress", progress)
    scale = check_pair(lr_hsi, hr_msi)
    place = _device(device)
    low, high = (_prepared(image, place) for image in (lr_hsi, hr_msi))
    sensors = {
        "srf": _checked_srf(srf, high.shape[1], low),
        "psf": _checked_psf(psf, scale, low),
    }
    with _backend(backend):
        fused = run(low, high, **sensors, progress=progress, **options)
    return _like(lr_hsi, fused)


# ------------------------------------------------------------------------------------------------
# Methods: (B, G, h, w) and (B, g, H, W), floating point, checked, to (B, G, H, W)
# ------------------------------------------------------------------------------------------------


def _regression(
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor | None,
    psf: Tensor | Degradation | None,
    progress: bool,
    **options: Any,
) -> Tensor:
    from fastfusion.models.regression import regression

    return regression(lr_hsi, hr_msi, srf=srf, psf=psf, **options)


def _fsrvl(
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor | None,
    psf: Tensor | Degradation | None,
    progress: bool,
    **options: Any,
) -> Tensor:
    """Fit a network to each pair of the batch and apply it to that pair."""
    from fastfusion.models.fsrvl import FSRVL

    to_fit = inspect.signature(FSRVL.fit).parameters
    fitting = {name: value for name, value in options.items() if name in to_fit}
    building = {name: value for name, value in options.items() if name not in to_fit}
    scale = hr_msi.shape[-1] // lr_hsi.shape[-1]
    fused = []
    for low, high in zip(lr_hsi.float().split(1), hr_msi.float().split(1), strict=True):
        model = FSRVL(low.shape[1], high.shape[1], scale, **building).to(low.device)
        model.fit(low, high, srf=srf, psf=psf, progress=progress, **fitting)
        with torch.no_grad():
            fused.append(model.eval()(low, high))
    return torch.cat(fused)


def _network(
    kind: str,
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor | None,
    psf: Tensor | Degradation | None,
    progress: bool,
    weights: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Tensor:
    """Apply a network: one trained beforehand, or one that is trained on each pair itself."""
    from fastfusion import models
    from fastfusion.models.regression import RegressionModel

    low, high = lr_hsi.float(), hr_msi.float()
    if weights is None:
        return torch.cat(
            [
                _self_trained(kind, *pair, srf=srf, psf=psf, progress=progress, **options)
                for pair in zip(low.split(1), high.split(1), strict=True)
            ]
        )
    if options:
        raise TypeError(f"{', '.join(options)}: options of the training do not go with weights")
    model = getattr(models, kind).load(weights, device=lr_hsi.device)
    if model.prior != "regression":
        with torch.no_grad():
            return model(low, high).clamp(0, 1)
    fused = []
    for pair in zip(low, high, strict=True):
        closed_form = RegressionModel.fit(*pair, srf=srf, psf=psf)
        fused.append(_refined(model, closed_form, closed_form.apply(*pair).clamp_(0, 1), *pair))
    return torch.stack(fused)


@torch.no_grad()
def _refined(model: Any, closed_form: Any, prior: Tensor, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
    """Correct the closed form's image ``(G, H, W)`` of one pair, in agreement with both images."""
    fused = model(lr_hsi[None], hr_msi[None], prior[None])[0].contiguous()
    return closed_form.refine(fused, lr_hsi, hr_msi).clamp_(0, 1)


def _self_trained(kind: str, lr_hsi: Tensor, hr_msi: Tensor, **options: Any) -> Tensor:
    from fastfusion.training import train_on_pair

    trained = train_on_pair(kind, lr_hsi, hr_msi, **options)
    if trained.model is None:
        # Never worse than what it starts from, and never in silence.
        warnings.warn(f"the result is that of regression: {trained.stopped}", stacklevel=4)
        return trained.prior
    warnings.warn(
        f"trained on the pair itself: {trained.gain:+.2f} dB over regression where the HSI was "
        "degraded once more; at full resolution it may be worse than regression",
        stacklevel=4,
    )
    pair = lr_hsi[0], hr_msi[0]
    return _refined(trained.model, trained.closed_form, trained.prior[0], *pair)[None]


def _bicubic(
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor | None,
    psf: Tensor | Degradation | None,
    progress: bool,
) -> Tensor:
    size = hr_msi.shape[-2:]
    return F.interpolate(lr_hsi, size, mode="bicubic", align_corners=False).clamp(0, 1)


#: The methods, by the name that `fuse` knows them by.
METHODS: dict[str, Callable[..., Tensor]] = {
    "regression": _regression,
    "fsrvl": _fsrvl,
    "lso": functools.partial(_network, "LSO"),
    "cofusion": functools.partial(_network, "CoFusion"),
    "bicubic": _bicubic,
}


def _method(name: str) -> Callable[..., Tensor]:
    if not isinstance(name, str):
        raise TypeError(f"method: expected a name, got {type(name).__name__}")
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    checks.placed(device, None)
    place = torch.device(device)
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        reason = str(error).splitlines()[0]
        raise Unavailable(f"device {str(place)!r} is not available: {reason}") from error
    return place


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    """Use a backend that is asked for by name, or raise; "auto" leaves an outer choice alone."""
    checks.choice("backend", name, CHOICES)
    if name == "auto":
        yield
        return
    with backend_for_block(name):
        state = backends()[name]
        if state != "available":
            raise Unavailable(f"backend {name!r} is not available: {state}")
        yield


# ------------------------------------------------------------------------------------------------
# Checks and conversions
# ------------------------------------------------------------------------------------------------


def check_pair(lr_hsi: _Array, hr_msi: _Array) -> int:
    """Raise what `fuse` raises unless the images are a pair; how many times finer the second is."""
    for name, image in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        _check_image(name, image)
    if isinstance(lr_hsi, Tensor) != isinstance(hr_msi, Tensor):
        raise TypeError(
            f"hr_msi: expected the type of lr_hsi, {type(lr_hsi).__name__}, "
            f"got {type(hr_msi).__name__}"
        )
    scale = scale_of(tuple(lr_hsi.shape), tuple(hr_msi.shape))
    for name, image in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        _check_values(name, image)
    if lr_hsi.dtype != hr_msi.dtype or _place(lr_hsi) != _place(hr_msi):
        raise ValueError(
            f"hr_msi: expected the dtype and device of lr_hsi, {lr_hsi.dtype} on "
            f"{_place(lr_hsi)}, got {hr_msi.dtype} on {_place(hr_msi)}"
        )
    return scale


def scale_of(lr_hsi: tuple[int, ...], hr_msi: tuple[int, ...]) -> int:
    """How many times finer an image of the shape ``hr_msi`` is; ValueError if they are no pair."""
    shapes = f"got lr_hsi {lr_hsi} and hr_msi {hr_msi}"
    if lr_hsi[:-3] != hr_msi[:-3]:
        raise ValueError(f"hr_msi: expected the batch of lr_hsi, {shapes}")
    bands, height, width = lr_hsi[-3:]
    msi_bands, fine_height, fine_width = hr_msi[-3:]
    if height > fine_height or width > fine_width:
        raise ValueError(
            f"hr_msi: expected more pixels than lr_hsi has; are they swapped? {shapes}"
        )
    if bands < msi_bands:
        raise ValueError(f"lr_hsi: expected more bands than hr_msi has; are they swapped? {shapes}")
    scale = fine_width // width
    if scale < 2 or (fine_height, fine_width) != (scale * height, scale * width):
        raise ValueError(
            f"hr_msi: expected a height and width that are the same whole multiple (2 or more) of "
            f"those of lr_hsi, {shapes}; crop one of them"
        )
    return scale


def _check_image(name: str, image: object) -> None:
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"{name}: expected a tensor or a NumPy array, got {type(image).__name__}")
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"{name}: expected (bands, rows, columns), with a batch before them or not, none of "
            f"them 0, got {tuple(image.shape)}"
        )
    if isinstance(image, Tensor):
        floating = image.is_floating_point()
    else:
        floating = image.dtype.kind == "f" and image.dtype.itemsize <= 8
    if not floating:
        raise ValueError(f"{name}: expected floating point in [0, 1], got {image.dtype}")
    if isinstance(image, Tensor):
        checks.dense(name, image)
        if image.device.type == "meta":
            raise ValueError(f"{name}: expected a tensor that holds values, got one on meta")


def _check_values(name: str, image: _Array) -> None:
    least, most = float(image.min()), float(image.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
    if least < _LEAST or most > _MOST:
        raise ValueError(
            f"{name}: expected values in [0, 1], got {least:g} to {most:g}; "
            f"divide both images by one peak"
        )


def _place(image: _Array) -> torch.device:
    return image.device if isinstance(image, Tensor) else torch.device("cpu")


def _checked_srf(srf: _Matrix | None, msi_bands: int, low: Tensor) -> Tensor | None:
    if srf is None:
        return None
    expected = (msi_bands, low.shape[1])
    if isinstance(srf, (Tensor, np.ndarray)) and tuple(srf.shape) != expected:
        hint = "; transpose it" if tuple(srf.shape) == expected[::-1] else ""
        raise ValueError(
            f"srf: expected (msi bands, hsi bands) {expected}, got {tuple(srf.shape)}{hint}"
        )
    return _checked_matrix("srf", srf, low)


def _checked_psf(
    psf: _Matrix | Degradation | None, scale: int, low: Tensor
) -> Tensor | Degradation | None:
    if psf is None:
        return None
    if isinstance(psf, Degradation):
        if psf.scale != scale:
            raise ValueError(f"psf: expected a degradation by {scale}, got one by {psf.scale}")
        return psf
    matrix = _checked_matrix("psf", psf, low)
    total = matrix.sum().item()
    if abs(total - 1) > 1e-3:  # what rounding and tables of three digits leave
        raise ValueError(f"psf: expected weights that sum to 1, got {total:g}; divide by their sum")
    return matrix


def _checked_matrix(name: str, value: object, low: Tensor) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{name}: expected a tensor or a NumPy array, got {type(value).__name__}")
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(value.shape)}")
    if isinstance(value, Tensor):
        real = value.layout == torch.strided and not value.is_complex() and not value.is_meta
    else:
        real = value.dtype.kind in "uif"
    if not real:
        raise ValueError(f"{name}: expected a dense matrix of real numbers, got {value.dtype}")
    matrix = _tensor(value).to(low)
    if not matrix.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
    return matrix


def _prepared(image: _Array, device: torch.device | None) -> Tensor:
    """The image as ``(B, bands, H, W)``, in the dtype and on the device that it is computed in."""
    tensor = _tensor(image)
    if tensor.ndim == 3:
        tensor = tensor[None]
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(device or tensor.device, dtype)


def _tensor(value: _Matrix) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # torch takes neither foreign byte orders nor negative strides, and warns of read-only memory
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))


def _like(image: _Array, fused: Tensor) -> _Array:
    """The result in the form of the input."""
    fused = fused.detach().view(*image.shape[:-3], *fused.shape[1:])
    if isinstance(image, Tensor):
        return fused.to(image.device, image.dtype)
    return fused.cpu().numpy().astype(image.dtype, copy=False)
