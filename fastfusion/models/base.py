"""What the models share: configuration, checks of the two images, checkpoints, the prior image."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfusion._optional import need
from fastfusion._version import __version__
from fastfusion.data.atomic import atomic_path
from fastfusion.data.sensors import apply_srf
from fastfusion.models.regression import regression
from fastfusion.ops import checks

PRIORS = ("bicubic", "regression")
#: About the size of the closed form's errors, and so the unit of a correction to it: in a unit of
#: 1 the first steps of training would each move the image by more than there is to gain.
UNIT = 0.01

_MODELS: dict[str, type[FusionModel]] = {}  # by the name that a checkpoint holds

_Model = TypeVar("_Model", bound="FusionModel")


class FusionModel(nn.Module):
    """A model that fuses ``lr_hsi (B, G, h, w)`` with ``hr_msi (B, g, H, W)``, ``H = scale*h``.

    To write one: keep every argument of the constructor as an attribute of the same name
    (scikit-learn's convention), each such that JSON can hold it (a tuple comes back as a list),
    and register no buffer with ``persistent=False``. The configuration, :meth:`save` and
    :meth:`load` then come by themselves; ``forward`` calls :meth:`check_inputs` first.

    Args:
        hsi_bands: ``G``, of the hyperspectral image and of the result.
        msi_bands: ``g``, of the multispectral image.
        scale: how many of its pixels, along a side, lie in one hyperspectral pixel.

    Raises:
        TypeError, ValueError: one of them is no int from 1 up.
    """

    def __init__(self, hsi_bands: int, msi_bands: int, scale: int) -> None:
        super().__init__()
        for name, value in (("hsi_bands", hsi_bands), ("msi_bands", msi_bands), ("scale", scale)):
            checks.integer(name, value, low=1)
        self.hsi_bands, self.msi_bands, self.scale = hsi_bands, msi_bands, scale

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:
            _MODELS[cls.__name__] = cls

    # -- configuration -------------------------------------------------------------------------

    @classmethod
    def _options(cls) -> Mapping[str, inspect.Parameter]:
        parameters = dict(inspect.signature(cls.__init__).parameters)
        del parameters["self"]
        return parameters

    @property
    def config(self) -> dict[str, Any]:
        """The arguments with which the constructor makes this model (without its weights)."""
        return {name: getattr(self, name) for name in self._options()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    # -- the two images ------------------------------------------------------------------------

    def check_inputs(self, lr_hsi: object, hr_msi: object) -> None:
        """Raise a TypeError or ValueError that says what is wrong with the two images, if so."""
        checks.tensor("lr_hsi", lr_hsi, dims=4, shape="(B, G, h, w)")
        checks.tensor("hr_msi", hr_msi, dims=4, shape="(B, g, H, W)")
        assert isinstance(lr_hsi, Tensor) and isinstance(hr_msi, Tensor)
        for name, image, count in (
            ("lr_hsi", lr_hsi, "hsi_bands"),
            ("hr_msi", hr_msi, "msi_bands"),
        ):
            if image.shape[1] != getattr(self, count):
                raise ValueError(
                    f"{name} must have {getattr(self, count)} bands, the model's {count}, "
                    f"got shape {tuple(image.shape)}"
                )
        batch, _, rows, columns = lr_hsi.shape
        if rows == 0 or columns == 0:
            raise ValueError(f"lr_hsi must hold at least one pixel, got {tuple(lr_hsi.shape)}")
        expected = (batch, self.msi_bands, self.scale * rows, self.scale * columns)
        checks.size("hr_msi", hr_msi, expected, shape=f"(B, g, {self.scale}*h, {self.scale}*w)")
        weights = next(self.parameters())
        checks.alike("lr_hsi", lr_hsi, "the model's weights", weights)
        checks.alike("hr_msi", hr_msi, "lr_hsi", lr_hsi)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to one safetensors file, whole or not at all.

        Raises:
            TypeError: a part of the configuration is nothing that JSON can hold.
            OSError: what the file system says (no folder, no permission, no space left).
            ImportError: safetensors is not installed.
        """
        checks.path("path", path)
        metadata = {"model": type(self).__name__, "config": json.dumps(self.config)}
        write_checkpoint(path, metadata, self.state_dict())

    @classmethod
    def load(
        cls: type[_Model], path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> _Model:
        """The model that :meth:`save` wrote, in evaluation mode; nothing is ever unpickled.

        On this base class it gives whatever model the file holds, else only a ``cls``.

        Raises:
            ValueError: the file is truncated or was changed, is no checkpoint of this library,
                holds another model, or has a configuration or weights that do not fit it.
            OSError: the file cannot be read.
            ImportError: safetensors is not installed.
        """
        metadata, tensors = read_checkpoint(checks.path("path", path))
        if "progress" in metadata:
            raise ValueError(f"{path} is the state of a training; name its model.safetensors")
        kind = _MODELS.get(metadata["model"])
        if kind is None:
            raise ValueError(
                f"{path} holds the model {metadata['model']!r}, which is not known here; "
                f"known: {', '.join(sorted(_MODELS))}"
            )
        if not issubclass(kind, cls):
            raise ValueError(f"{path} holds the model {kind.__name__}, not {cls.__name__}")
        with _at_most(10 * len(tensors) + 100):
            model = kind._from_config(json.loads(metadata["config"]), f"{path}")
        check_weights(model, tensors, f"{path}")
        model.load_state_dict(tensors, assign=True)
        return model.to(device).eval()

    @classmethod
    def _from_config(cls: type[_Model], config: Mapping[str, Any], source: str) -> _Model:
        """The model without memory for its weights, which come from the file."""
        options = cls._options()
        unknown = sorted(config.keys() - options.keys())
        if unknown:
            raise ValueError(f"{source}: {cls.__name__} has no option {', '.join(unknown)}")
        missing = [
            name
            for name, option in options.items()
            if option.default is option.empty and name not in config
        ]
        if missing:
            raise ValueError(f"{source}: the configuration lacks {', '.join(missing)}")
        try:
            with torch.device("meta"):
                return cls(**config)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes overflow
            raise ValueError(f"{source}: the configuration makes no model: {error}") from error


class ResidualModel(FusionModel, abstract=True):
    """A network that corrects a prior image: the papers' skip connection.

    The prior is what the network sees as the hyperspectral image at full resolution, and what its
    output is added to. ``"bicubic"`` is the papers' choice; with ``"regression"`` it is the closed
    form of `fastfusion.models.regression` and the last layer starts at 0, so that an untrained
    model gives the prior. What the network then sees and says is in units that :meth:`fit_units`
    takes from training data, since bands are much alike and errors small: principal components of
    the spectra, and of the errors that the closed form makes. A subclass has a :meth:`correction`
    and calls :meth:`start_from_prior` when its layers are made.

    Images are padded at the bottom and right to multiples of 4, by repeating the last row and
    column, and the result is cropped: three levels, each half as large, fit any size.
    """

    hsi_mean: Tensor
    hsi_axes: Tensor
    msi_mean: Tensor
    msi_axes: Tensor
    error_axes: Tensor

    def __init__(
        self, hsi_bands: int, msi_bands: int, scale: int, *, prior: str = "bicubic"
    ) -> None:
        super().__init__(hsi_bands, msi_bands, scale)
        checks.choice("prior", prior, PRIORS)
        self.prior = prior
        if prior == "regression":
            for name, bands in (("hsi", hsi_bands), ("msi", msi_bands)):
                self.register_buffer(f"{name}_mean", torch.zeros(bands, 1, 1))
                self.register_buffer(f"{name}_axes", torch.eye(bands))
            self.register_buffer("error_axes", UNIT * torch.eye(hsi_bands))

    def start_from_prior(self, last: nn.Conv2d) -> None:
        """Let the last layer give 0 where the prior is already good."""
        if self.prior == "regression":
            nn.init.zeros_(last.weight)
            if last.bias is not None:
                nn.init.zeros_(last.bias)

    @torch.no_grad()
    def fit_units(self, scenes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take the units of what the network sees and says from training data.

        Args:
            scenes: prior ``(G, H, W)``, MSI ``(g, H, W)`` and reference ``(G, H, W)`` of each.
        """
        priors, msis, references = zip(*scenes, strict=True)
        for name, images in (("hsi", priors), ("msi", msis)):
            pixels = torch.cat([image.flatten(1)[:, ::16] for image in images], dim=1).double()
            mean = pixels.mean(1, keepdim=True)
            variances, axes = _principal(pixels - mean)
            # The last components are noise, which is not to be seen as large as the first.
            scaled = axes / (variances + 1e-5 * variances[0]).sqrt().clamp_min(1e-6)
            getattr(self, f"{name}_mean").copy_(mean[..., None])
            getattr(self, f"{name}_axes").copy_(scaled.T)
        errors = [
            (reference - prior).flatten(1)[:, ::16].double()
            for reference, prior in zip(references, priors, strict=True)
        ]
        sizes = torch.stack([error.square().mean().sqrt() for error in errors]).clamp_min(1e-6)
        alike = torch.cat([error / size for error, size in zip(errors, sizes, strict=True)], dim=1)
        variances, axes = _principal(alike)
        self.error_axes.copy_(sizes.mean() * axes * variances.sqrt())

    def prior_image(self, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
        """The image ``(B, G, H, W)`` that the network corrects; no gradient flows through it.

        ``"regression"`` estimates the sensors from each pair; where they are known, or where the
        same pair comes more than once, compute it beforehand and give it to ``forward``.
        """
        if self.prior == "regression":
            # Decorated here, because the decorator imports the compiler, which takes seconds.
            reason = "the closed form is no part of the network: give it as the prior"
            return torch.compiler.disable(_regression, reason=reason)(lr_hsi, hr_msi)
        return F.interpolate(lr_hsi, size=hr_msi.shape[-2:], mode="bicubic", align_corners=False)

    def correction(self, prior: Tensor, hr_msi: Tensor) -> Tensor:
        """What to add to the prior: ``(B, G, H, W)``, channels_last in, ``H`` and ``W`` by 4."""
        raise NotImplementedError

    def forward(self, lr_hsi: Tensor, hr_msi: Tensor, prior: Tensor | None = None) -> Tensor:
        """Fuse.

        Args:
            lr_hsi: ``(B, G, h, w)``, values in [0, 1].
            hr_msi: ``(B, g, H, W)``, ``H = scale*h`` and ``W = scale*w``, in the same unit.
            prior: ``(B, G, H, W)``, a prior computed beforehand; by default :meth:`prior_image`.

        Returns:
            ``(B, G, H, W)``, not clamped.

        Raises:
            TypeError, ValueError: an image is not as above.
        """
        self.check_inputs(lr_hsi, hr_msi)
        shape = (lr_hsi.shape[0], self.hsi_bands, *hr_msi.shape[-2:])
        if prior is None:
            prior = self.prior_image(lr_hsi, hr_msi)
        else:
            checks.parameter(
                "prior", prior, shape, shape="(B, G, H, W)", like=lr_hsi, like_name="lr_hsi"
            )
        rows, columns = shape[-2:]
        if self.prior != "regression":
            return prior + self.correction(*self.seen(prior, hr_msi))[..., :rows, :columns]
        correction = self.correction(*self.seen(prior, hr_msi))[..., :rows, :columns]
        return prior + apply_srf(correction, self.error_axes)

    def seen(self, prior: Tensor, hr_msi: Tensor) -> tuple[Tensor, Tensor]:
        """Both images as the network sees them: in its units, padded."""
        if self.prior == "regression":
            prior = apply_srf(prior - self.hsi_mean, self.hsi_axes)
            hr_msi = apply_srf(hr_msi - self.msi_mean, self.msi_axes)
        return _padded(prior), _padded(hr_msi)


def _principal(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of ``(G, n)`` along their principal axes, largest first, and these ``(G, G)``."""
    variances, axes = torch.linalg.eigh(pixels @ pixels.T / pixels.shape[1])
    return variances.flip(0).clamp_min(0), axes.flip(1)


@torch.no_grad()
def _regression(lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
    with torch.autocast(lr_hsi.device.type, enabled=False):
        return regression(lr_hsi, hr_msi)


def _padded(image: Tensor) -> Tensor:
    rows, columns = image.shape[-2:]
    if rows % 4 or columns % 4:
        image = F.pad(image, (0, -columns % 4, 0, -rows % 4), mode="replicate")
    # Convolutions on a CPU are fastest in this layout, and need no reordered copies.
    return image.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Refuse to build a network of more modules: a file's configuration may be made to take years,
    but none of a few tensors has many modules."""
    count = 0

    def hook(parent: nn.Module, name: str, child: nn.Module) -> None:
        nonlocal count
        count += 1
        if count > modules:
            raise ValueError(f"it has more than {modules} modules, the file too few weights")

    handle = nn.modules.module.register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def write_checkpoint(
    path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Write a safetensors file with a digest of all that is in it, whole or not at all.

    Raises:
        OSError: what the file system says. ImportError: safetensors is not installed.
    """
    safetensors = need("safetensors.torch", extra="train", purpose="saving a model")
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {**metadata, "fastfusion": __version__}
    metadata["sha256"] = _digest(metadata, tensors)
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.save(tensors, metadata))


def read_checkpoint(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a checkpoint that is complete and unchanged.

    Raises:
        ValueError: it is not, or no checkpoint. OSError: the file cannot be read.
    """
    need("safetensors", extra="train", purpose="loading a model")
    import safetensors.torch

    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file, or truncated: {error}") from error
    # Safetensors has checked the header: its length in 8 bytes, then JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if not {"model", "config", "sha256"} <= metadata.keys():
        raise ValueError(f"{path} is no checkpoint of fastfusion: it has no model's configuration")
    if _digest(metadata, tensors) != metadata.pop("sha256"):
        raise ValueError(f"{path} was damaged or changed since it was written")
    return metadata, tensors


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in the file but the digest itself."""
    rest = sorted((name, value) for name, value in metadata.items() if name != "sha256")
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{source} {what} weights: {', '.join(sorted(names))}")
    for name, value in expected.items():
        got = tensors[name]
        if got.shape != value.shape or got.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"{source}: {name} must be {tuple(value.shape)} as the configuration says "
                f"(bands, widths), got {tuple(got.shape)}, {got.dtype}"
            )
