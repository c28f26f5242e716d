"""Every public function and class, with a call that works and the kinds of its arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastfusion
import fastfusion.nn as layers
from fastfusion import (
    data,
    evaluation,
    figures,
    fusing,
    losses,
    metrics,
    models,
    ops,
    tiling,
    training,
)
from fastfusion.models.regression import RegressionModel, regression
from tests.ops.test_bad_input import FREE, GOOD, NULLABLE, OPTIONS
from tests.reliability.bad_arguments import (
    Kind,
    Public,
    any_type,
    both,
    choice,
    flag,
    integer,
    number,
    path,
    sequence,
    some,
    tensor,
)

BACKEND = choice()
DEVICE_AND_DTYPE: dict[str, Kind] = {
    "device": some(("no device", "nonsense"), ("a number", 2.5), ("a list", [])),
    "dtype": some(
        ("a word", "float32"),
        ("integers", torch.int32),
        ("bool", torch.bool),
        ("complex", torch.complex64),
        ("numpy's", np.float32),
        ("a number", 3),
    ),
}
OUTPUT_PLACE = {
    "path": both(path(missing=False), some(("suffix", "x.docx"), ("none", "/no/x.npy")))
}


def finite(kind: Kind) -> Kind:
    """Of images that may have any range."""
    return lambda good: ((what, value) for what, value in kind(good) if what != "large")


def _images(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}

    return make


# ------------------------------------------------------------------------------------------------
# Operators
# ------------------------------------------------------------------------------------------------

OPTION_KINDS: dict[str, dict[str, Kind]] = {
    "coordinate_mixing": {"k": integer(1, 4)},
    "depthwise_conv2d": {"dilation": integer(1, pair=True), "activation": choice(optional=True)},
    "large_kernel_attention": {"dilation": integer(1, pair=True)},
    "frequency_filter2d": {"padding_mode": choice()},
    "latent_encode": {"patch_size": integer(1, pair=True, optional=True)},
    "latent_decode": {"patch_size": integer(1, pair=True, optional=True), "heads": integer(1)},
    "latent_operator": {
        "patch_size": integer(1, pair=True, optional=True),
        "fundamental": number(),
        "squash": flag(),
    },
    "trigonometric_solve": {"fundamental": number(), "squash": flag()},
}


def _operators() -> list[Public]:
    found = []
    for name, shapes in GOOD.items():
        kinds: dict[str, Kind] = {}
        for argument, shape in shapes.items():
            fixed = [axis for axis in range(len(shape)) if (name, argument, axis) not in FREE]
            if (name, argument) == ("latent_decode", "x"):
                fixed = [0, 1]  # a few rows less are as many patches
            kinds[argument] = tensor(
                optional=argument in NULLABLE,
                alone=len(shapes) == 1,
                fixed=fixed,
                ndims=(1, 2) if argument == "state" else (),
            )
        kinds |= OPTION_KINDS.get(name, {})
        kinds["backend"] = BACKEND

        def good(shapes: Any = shapes, name: str = name) -> dict[str, Any]:
            return {**_images(**shapes)(), **OPTIONS.get(name, {})}

        found.append(Public(f"ops.{name}", getattr(ops, name), good, kinds, together=tuple(shapes)))
    filters = {"x": (1, 2, 4, 4), "one": (2, 1, 3, 3), "two": (2, 1, 5, 5), "bias": (2,)}

    def multiscale() -> dict[str, Any]:
        made = _images(**filters)()
        return {
            "x": made["x"],
            "weights": [made["one"], made["two"]],
            "biases": [made["bias"], None],
        }

    one = torch.zeros(2, 1, 3, 3)
    found.append(
        Public(
            "ops.multiscale_attention",
            ops.multiscale_attention,
            multiscale,
            {
                "x": tensor(fixed=[1]),
                "weights": sequence(
                    items=[
                        ("none", []),
                        ("one too few", [one]),
                        ("no tensor", [one, 3]),
                        ("even", [one, torch.zeros(2, 1, 4, 4)]),
                        ("other channels", [one, torch.zeros(3, 1, 3, 3)]),
                        ("double", [one, one.double()]),
                        ("on meta", [one, one.to("meta")]),
                        ("integers", [one, one.int()]),
                    ]
                ),
                "biases": sequence(
                    optional=True,
                    items=[
                        ("one too few", [None]),
                        ("no tensor", [None, 3]),
                        ("long", [None, torch.zeros(3)]),
                        ("double", [None, torch.zeros(2).double()]),
                        ("on meta", [None, torch.zeros(2, device="meta")]),
                    ],
                ),
                "backend": BACKEND,
            },
            together=("x", "weights", "biases"),
        )
    )
    return found


# ------------------------------------------------------------------------------------------------
# Layers: their constructors, and calls of them
# ------------------------------------------------------------------------------------------------


def _layers() -> list[Public]:
    count, odd = integer(1), both(integer(1), some(("even", 4)))
    rows: list[tuple[str, dict[str, Any], dict[str, Kind]]] = [
        (
            "LatentOperator2d",
            {"channels": 16},
            {
                "channels": both(count, some(("not divided by the heads", 15))),
                "heads": both(count, some(("does not divide", 3))),
                "tokens": count,
                "basis": count,
                "patch_size": integer(1, pair=True, optional=True),
                "fundamental": number(),
                "squash": flag(),
                "offset": flag(),
            },
        ),
        (
            "FrequencyFilter2d",
            {"in_channels": 4},
            {
                "in_channels": count,
                "out_channels": integer(1, optional=True),
                "kernel_size": odd,
                "mixing_bias": flag(),
                "tied": flag(),
                "norm": flag(),
                "padding_mode": choice(),
                "eps": number(0, above=True),
                "momentum": number(0, 1),
            },
        ),
        (
            "CoordinateMixing",
            {"channels": 8},
            {"channels": count, "k": integer(1, optional=True)},
        ),
        (
            "DepthwiseConv2d",
            {"in_channels": 4, "out_channels": 4, "kernel_size": 3},
            {
                "in_channels": both(count, some(("other", 5))),
                "out_channels": both(count, some(("other", 5))),
                "kernel_size": both(
                    integer(1, pair=True), some(("even", 4), ("even row", (2, 3)), ("65", 65))
                ),
                "stride": both(integer(1, pair=True), some(("2", 2), ("pair", (1, 2)))),
                "padding": both(integer(0, pair=True), some(("5", 5), ("a word", "valid"))),
                "dilation": integer(1, pair=True),
                "groups": both(integer(1, optional=True), some(("1", 1), ("2", 2))),
                "bias": flag(),
                "padding_mode": choice(),
                "activation": choice(optional=True),
            },
        ),
        (
            "LargeKernelAttention",
            {"channels": 4},
            {
                "channels": count,
                "local_size": odd,
                "context_size": odd,
                "dilation": integer(1),
                "bias": flag(),
            },
        ),
        (
            "MultiscaleAttention",
            {"channels": 4},
            {
                "channels": count,
                "sizes": sequence(
                    items=[
                        ("none", []),
                        ("even", [3, 4]),
                        ("0", [0]),
                        ("negative", [-3]),
                        ("text", ["3"]),
                        ("fraction", [3.0]),
                    ]
                ),
                "bias": flag(),
            },
        ),
        (
            "FeatureSynchronization",
            {"features": 4},
            {"features": count, "mix": flag()},
        ),
        (
            "FrequencyRecalibration",
            {"features": 4, "endmembers": 3},
            {
                "features": count,
                "endmembers": count,
                "kernel_size": odd,
                "filter": flag(),
                "extend": flag(),
                "eps": number(0, above=True),
                "momentum": number(0, 1),
            },
        ),
        (
            "InitialRepresentation",
            {"hsi_bands": 6, "msi_bands": 3, "features": 4},
            {"hsi_bands": count, "msi_bands": count, "features": count},
        ),
        ("SpaCAM", {"channels": 4}, {"channels": count, "expansion": count}),
        (
            "SpeCAM",
            {"channels": 4},
            {"channels": count, "expansion": count, "k": integer(1, optional=True)},
        ),
        (
            "SSCFM",
            {"channels": 8},
            {
                "channels": both(count, some(("no multiple of the groups", 7))),
                "dropout": number(0, 1),
            },
        ),
        (
            "MultiScaleGenerator",
            {"in_channels": 3, "channels": 4, "depths": (1, 1, 1)},
            {
                "in_channels": count,
                "channels": count,
                "depths": sequence(
                    items=[
                        ("none", []),
                        ("two", [1, 1]),
                        ("four", [1, 1, 1, 1]),
                        ("negative", [1, 1, -1]),
                        ("text", ["1", "1", "1"]),
                        ("fractions", [1.0, 1.0, 1.0]),
                    ]
                ),
            },
        ),
    ]
    found = [
        Public(
            f"nn.{name}",
            getattr(layers, name),
            lambda good=good: dict(good),
            kinds | DEVICE_AND_DTYPE,
            together=tuple(kinds),
        )
        for name, good, kinds in rows
    ]
    image = tensor(fixed=[1], values=False)
    calls: list[tuple[str, Any, dict[str, tuple[int, ...]]]] = [
        ("LatentOperator2d", layers.LatentOperator2d(8, heads=2, tokens=2, basis=2), {}),
        ("FrequencyFilter2d", layers.FrequencyFilter2d(8, kernel_size=3), {}),
        ("FrequencyFilter2d.eval", layers.FrequencyFilter2d(8, kernel_size=3).eval(), {}),
        ("DepthwiseConv2d", layers.DepthwiseConv2d(8, 8, 3), {}),
        ("LargeKernelAttention", layers.LargeKernelAttention(8), {}),
        ("MultiscaleAttention", layers.MultiscaleAttention(8), {}),
        ("SpaCAM", layers.SpaCAM(8), {}),
        ("SpeCAM", layers.SpeCAM(8), {}),
        ("SpeCAM.eval", layers.SpeCAM(8).eval(), {}),
        ("MultiScaleGenerator", layers.MultiScaleGenerator(8, 8, (1, 1, 1)), {}),
    ]
    for name, layer, _ in calls:
        argument = "input" if isinstance(layer, layers.DepthwiseConv2d) else "x"
        found.append(
            Public(
                f"nn.{name}()",
                layer,
                lambda argument=argument: _images(**{argument: (1, 8, 12, 12)})(),
                {argument: image},
                # What does not fit is told of the layer's weights, by their operator.
                together=("x", "input", "weight", "prompts", "local_weight"),
            )
        )
    for name, layer in (
        ("HaarDWT2d", layers.HaarDWT2d()),
        ("HaarSplit2d", layers.HaarSplit2d()),
    ):
        found.append(
            Public(
                f"nn.{name}()",
                layer,
                _images(x=(1, 8, 12, 12)),
                {"x": tensor(fixed=[], alone=True)},
            )
        )
    bands = dict.fromkeys(("ll", "lh", "hl", "hh"), (1, 2, 3, 3))
    found.append(
        Public(
            "nn.HaarIDWT2d()",
            layers.HaarIDWT2d(),
            _images(**bands),
            {
                **dict.fromkeys(bands, tensor()),
                "size": both(
                    any_type(list, tuple, optional=True),
                    some(("large", (7, 6)), ("small", (4, 6)), ("one", (6,)), ("text", ("6", "6"))),
                ),
            },
            together=tuple(bands),
        )
    )
    found.append(
        Public(
            "nn.CoordinateMixing()",
            layers.CoordinateMixing(8),
            _images(candidates=(2, 8, 5)),
            {"candidates": tensor(fixed=[1])},
            together=("candidates", "state", "k"),
        )
    )
    found.append(
        Public(
            "nn.SSCFM()",
            layers.SSCFM(8),
            _images(spatial=(1, 8, 6, 6), spectral=(1, 8, 6, 6)),
            {"spatial": tensor(), "spectral": tensor()},
            together=("spatial", "spectral"),
        )
    )
    found.append(
        Public(
            "nn.InitialRepresentation()",
            layers.InitialRepresentation(6, 3, 4),
            _images(lr_hsi=(1, 6, 3, 3), hr_msi=(1, 3, 6, 6)),
            {"lr_hsi": tensor(fixed=[1]), "hr_msi": tensor(fixed=[1])},
            together=("lr_hsi", "hr_msi"),
        )
    )
    found.append(
        Public(
            "nn.FeatureSynchronization()",
            layers.FeatureSynchronization(4),
            lambda: {**_images(lr_features=(1, 4, 3, 3))(), "size": (6, 6)},
            {
                "lr_features": tensor(fixed=[1], alone=True),
                "size": some(
                    ("one", (6,)),
                    ("none", None),
                    ("text", "66"),
                    ("zero", (0, 6)),
                    ("3", (1, 2, 3)),
                ),
            },
            together=("lr_features", "size"),
        )
    )
    found.append(
        Public(
            "nn.FrequencyRecalibration()",
            layers.FrequencyRecalibration(4, 3),
            _images(x=(1, 4, 6, 6), mixing=(2, 4, 4)),
            {"x": tensor(fixed=[1]), "mixing": tensor()},
            together=("x", "mixing"),
        )
    )
    return found


# ------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------


def _models() -> list[Public]:
    count = integer(1)
    bands = {"hsi_bands": count, "msi_bands": count, "scale": count}
    three = {"hsi_bands": 6, "msi_bands": 3, "scale": 2}
    rows: list[tuple[str, dict[str, Any], dict[str, Kind]]] = [
        (
            "LSO",
            {**three, "width": 8, "heads": 2, "guide_width": 4, "guide_blocks": 1},
            {
                "width": both(count, some(("not divided by the heads", 9))),
                "tokens": count,
                "basis": count,
                "heads": both(count, some(("does not divide", 3))),
                "patch_size": count,
                "guide_width": count,
                "guide_blocks": integer(0),
                "prior": choice(),
            },
        ),
        (
            "CoFusion",
            {**three, "width": 8, "depths": (1, 1, 1)},
            {
                "width": integer(4),
                "depths": sequence(
                    items=[("two", [1, 1]), ("zero", [1, 1, 0]), ("text", ["1", "1", "1"])]
                ),
                "spatial": choice(),
                "spectral": choice(),
                "cross": choice(),
                "prior": choice(),
            },
        ),
        (
            "FSRVL",
            {**three, "features": 4, "endmembers": 3},
            {
                "features": count,
                "endmembers": count,
                "kernel_size": both(count, some(("even", 4))),
                "abundances": choice(),
                "synchronization": flag(),
                "recalibration": flag(),
                "prior": choice(),
                "consistency": flag(),
                "extend": flag(),
                "psf_size": integer(1, pair=True, optional=True),
            },
        ),
    ]
    found = []
    pair = {"lr_hsi": (1, 6, 4, 4), "hr_msi": (1, 3, 8, 8)}
    for name, good, kinds in rows:
        make = getattr(models, name)
        found.append(
            Public(
                f"models.{name}",
                make,
                lambda good=good: dict(good),
                bands | kinds,
                together=(*three, *kinds, "channels"),
            )
        )
        model = make(**good).eval()
        image = tensor(fixed=[1, 2, 3])
        found.append(
            Public(
                f"models.{name}()",
                model,
                _images(**pair),
                {"lr_hsi": image, "hr_msi": tensor()},
                together=("lr_hsi", "hr_msi"),
            )
        )
        found.append(
            Public(
                f"models.{name}.load",
                make.load,
                lambda: {"path": "x"},
                {"path": path()},
                errors=(FileNotFoundError, OSError),
            )
        )
        found.append(
            Public(
                f"models.{name}.save",
                model.save,
                lambda: {"path": "x"},
                {"path": both(path(missing=False), some(("no folder", "/nowhere/x.safetensors")))},
                errors=(FileNotFoundError, OSError),
            )
        )
    found.append(
        Public(
            "models.LSO.from_official",
            models.LSO.from_official,
            lambda: {"state_dict": {}, "scale": 2},
            {
                "state_dict": both(
                    any_type(),
                    some(("empty", {}), ("numbers", {"a": 3}), ("unknown", {"a": torch.ones(1)})),
                ),
            },
            together=("state_dict", "process1"),
        )
    )
    options = {
        "local": flag(),
        "ridge": number(0, above=True),
        "iterations": integer(0),
        "window_sigma": number(0, above=True, optional=True),
    }
    sensors = {
        "srf": tensor(optional=True, alone=True, huge=False),
        "psf": both(any_type(optional=True), some(("three axes", torch.ones(1, 2, 2)))),
    }
    closed = {"lr_hsi": (6, 6, 6), "hr_msi": (3, 12, 12)}

    def given() -> dict[str, Any]:
        return {**_images(**closed)(), "srf": torch.rand(3, 6), "psf": torch.full((2, 2), 0.25)}

    images = {
        "lr_hsi": tensor(values=True, fixed=[1, 2]),
        "hr_msi": tensor(values=True, fixed=[1, 2]),
    }
    # The closed form takes any range, and floating types that differ.
    good_here = {"large", *(f"mixed with torch.{t}" for t in ("float64", "float16", "bfloat16"))}
    no_range = {
        name: lambda good, kind=kind: ((w, v) for w, v in kind(good) if w not in good_here)
        for name, kind in images.items()
    }
    for name, function, more in (
        ("models.regression", regression, {"clamp": flag()}),
        ("models.RegressionModel.fit", RegressionModel.fit, {}),
    ):
        found.append(
            Public(
                name,
                function,
                given,
                {**no_range, **sensors, **options, **more},
                together=("lr_hsi", "hr_msi", "srf", "psf"),
            )
        )
    network = models.FSRVL(**three, features=4, endmembers=3)
    found.append(
        Public(
            "models.FSRVL.fit",
            network.fit,
            lambda: {**_images(**pair)(), "steps": 1, "srf": torch.rand(3, 6)},
            {
                "lr_hsi": finite(tensor(values=True, fixed=[0, 1, 2, 3])),
                "hr_msi": finite(tensor(values=True)),
                "srf": sensors["srf"],
                "psf": sensors["psf"],
                "minutes": number(0, above=True),
                "steps": integer(0),
                "full_steps": integer(0),
                "patience": integer(1),
                "learning_rate": number(0, above=True),
                "alpha": number(0),
                "beta": number(0),
                "seed": integer(0),
                "progress": some(("a word", "yes"), ("a number", 3), ("none", None)),
            },
            together=("lr_hsi", "hr_msi"),
        )
    )
    return found


# ------------------------------------------------------------------------------------------------
# Losses and metrics
# ------------------------------------------------------------------------------------------------


def _figures() -> list[Public]:
    cubes = {"fused": (4, 24, 24), "reference": (4, 24, 24)}
    ratio = {"ratio": 4.0}
    found = []
    for name, extra, kinds in (
        ("psnr", {}, {"peak": number(0, above=True), "per_band": flag()}),
        ("sam", {}, {"per_pixel": flag()}),
        ("ergas", ratio, {"ratio": number(0, above=True)}),
        ("ssim", {}, {}),
        ("mrae", {}, {}),
    ):
        found.append(
            Public(
                f"metrics.{name}",
                getattr(metrics, name),
                lambda extra=extra: {**_images(**cubes)(), **extra},
                {"fused": tensor(ndims=(4,)), "reference": tensor(ndims=(4,)), **kinds},
                together=tuple(cubes),
            )
        )
    three = {"fused": (4, 24, 24), "lr_hsi": (4, 12, 12), "hr_msi": (2, 24, 24), "srf": (2, 4)}
    together = (*three, "lr_msi")
    low = {"lr_hsi": tensor(ndims=(4,), fixed=[0]), "fused": tensor(ndims=(4,), fixed=[0])}
    found.append(
        Public(
            "metrics.d_lambda",
            metrics.d_lambda,
            _images(fused=(4, 24, 24), lr_hsi=(4, 12, 12)),
            {**low, "p": number(1)},
            together=together,
        )
    )
    for name, kinds in (
        ("d_s", {"q": number(1)}),
        ("qnr", {"alpha": number(0), "beta": number(0)}),
    ):
        found.append(
            Public(
                f"metrics.{name}",
                getattr(metrics, name),
                _images(**three),
                {
                    **low,
                    "hr_msi": tensor(ndims=(4,)),
                    "srf": tensor(alone=True),
                    "lr_msi": tensor(ndims=(4,), optional=True, like=(2, 12, 12)),
                    **kinds,
                },
                together=together,
            )
        )
    weight = number(0)
    found += [
        Public("losses.CoFusionLoss", losses.CoFusionLoss, dict, {"weight": weight}),
        Public("losses.FSRVLLoss", losses.FSRVLLoss, dict, {"alpha": weight, "beta": weight}),
        Public(
            "losses.CoFusionLoss()",
            losses.CoFusionLoss(),
            _images(**cubes),
            {"fused": tensor(ndims=(4,)), "reference": tensor(ndims=(4,))},
            together=tuple(cubes),
        ),
    ]
    six = {
        **dict.fromkeys(("lr_hsi", "lr_reconstructed", "lr_degraded"), (1, 6, 4, 4)),
        **dict.fromkeys(("hr_msi", "hr_reconstructed", "hr_degraded"), (1, 3, 8, 8)),
    }
    found.append(
        Public(
            "losses.FSRVLLoss()",
            losses.FSRVLLoss(),
            _images(**six),
            dict.fromkeys(six, tensor()),
            together=tuple(six),
        )
    )
    three = {"fused": (1, 3, 4, 4), "reference": (1, 3, 4, 4), "error": (1, 3, 1, 1)}
    found.append(
        Public(
            "losses.RelativeLoss()",
            losses.RelativeLoss(),
            _images(**three),
            dict.fromkeys(three, tensor()),
            together=tuple(three),
        )
    )
    return found


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def _data() -> list[Public]:
    folder = Path(tempfile.mkdtemp(prefix="fastfusion-bad-"))
    file = folder / "cube.npy"
    np.save(file, np.ones((3, 4, 5), np.float32))
    files = (FileNotFoundError, OSError)
    axis = np.arange(400.0, 701.0, 10)
    response = data.SpectralResponse(axis, np.ones((2, 31)), ["a", "b"])
    bad_axis = some(
        ("text", "400"),
        ("none", None),
        ("object", object()),
        ("words", ["a", "b"]),
        ("one", [400.0]),
        ("falling", axis[::-1]),
        ("nan", np.full(31, np.nan)),
        ("two axes", np.ones((2, 31))),
        ("complex", axis * 1j),
    )
    bad_widths = some(
        ("text", "10"),
        ("few", [10.0]),
        ("zero", np.zeros(31)),
        ("negative", -axis),
        ("nan", np.full(31, np.nan)),
        ("inf", np.full(31, np.inf)),
        ("words", ["a"] * 31),
    )
    pair = {"lr_hsi": (6, 6, 6), "hr_msi": (3, 12, 12)}
    blur = data.Degradation.gaussian(2)
    reading = {
        "path": path(),
        "variable": both(any_type(str, optional=True), some(("a name", "cube"))),
        "bands_axis": both(integer(-3, 2, optional=True)),
    }
    name_file = lambda **more: lambda: {"path": file, **more}  # noqa: E731
    found = [
        Public("data.open_cube", data.open_cube, name_file(), reading, errors=files),
        Public(
            "data.read_cube",
            data.read_cube,
            name_file(),
            {
                **reading,
                "dtype": some(
                    ("a word", "words"),
                    ("integers", "int32"),
                    ("complex", "complex64"),
                    ("an object", "O"),
                    ("a number", 3),
                    ("a list", [1]),
                    ("torch's", torch.float32),
                ),
                "scale": both(
                    lambda good: ((w, v) for w, v in number(0, above=True, optional=True)(good)),
                    some(("a word", "none")),
                ),
            },
            errors=files,
            together=("variable",),
        ),
        Public(
            "data.write_cube",
            data.write_cube,
            lambda: {"path": folder / "out.npy", "cube": data.Cube(np.ones((2, 3, 4)))},
            {
                "path": both(
                    path(missing=False), some(("suffix", "x.docx"), ("none", "/no/x.npy"))
                ),
                "cube": any_type(),
            },
            errors=files,
            together=("docx", "/no"),
        ),
        Public(
            "data.check_output",
            data.check_output,
            lambda: {"path": folder / "out.npy"},
            OUTPUT_PLACE,
            errors=files,
            together=("docx", "/no"),
        ),
        Public(
            "data.load_scene",
            data.load_scene,
            lambda: {"name": "demo"},
            {
                "name": both(
                    any_type(str), some(("no such", "atlantis"), ("file", "/no/x.npy"), ("", ""))
                )
            },
            errors=files,
            together=("atlantis", "/no", "scene"),
        ),
        Public(
            "data.demo_scene",
            data.demo_scene,
            lambda: {"height": 8, "width": 8, "bands": 2},
            {
                "height": integer(8),
                "width": integer(8),
                "bands": integer(1),
                "seed": integer(0),
            },
        ),
        Public(
            "data.Cube",
            data.Cube,
            lambda: {"data": np.ones((31, 4, 4))},
            {
                "data": both(
                    lambda good: (
                        (what, value)
                        for what, value in any_type()(good)
                        if not isinstance(value, torch.Tensor)
                    ),
                    some(
                        ("a torch tensor", torch.ones(3, 4, 4)),
                        ("two axes", np.ones((3, 4))),
                        ("four axes", np.ones((1, 3, 4, 4))),
                        ("empty", np.ones((3, 0, 4))),
                        ("text", np.full((3, 4, 4), "a")),
                        ("complex", np.ones((3, 4, 4), complex)),
                        ("bool", np.ones((3, 4, 4), bool)),
                        ("objects", np.full((3, 4, 4), None)),
                        ("dates", np.zeros((3, 4, 4), "M8[s]")),
                        ("long", np.ones((3, 4, 4), np.longdouble)),
                    ),
                ),
                "wavelengths": some(
                    ("few", [400.0]),
                    ("text", "400"),
                    ("words", ["a"] * 31),
                    ("nan", np.full(31, np.nan)),
                    ("negative", -axis),
                    ("zero", np.zeros(31)),
                    ("inf", np.full(31, np.inf)),
                    ("two axes", np.ones((31, 1))),
                    ("complex", axis * 1j),
                ),
                "metadata": any_type(dict),
            },
        ),
        Public(
            "data.Cube.normalized",
            data.Cube(np.ones((2, 3, 4), np.float32)).normalized,
            dict,
            {"peak": number(0, above=True, optional=True)},
        ),
        Public(
            "data.gaussian_psf",
            data.gaussian_psf,
            lambda: {"size": 5, "sigma": 1.0},
            {
                "size": integer(1),
                "sigma": number(0, above=True),
                "dtype": DEVICE_AND_DTYPE["dtype"],
            },
        ),
        Public(
            "data.Degradation",
            data.Degradation,
            lambda: {"psf": torch.full((2, 2), 0.25), "scale": 2},
            {
                "psf": both(
                    tensor(alone=True, fixed=[]),
                    some(("nan", torch.full((2, 2), torch.nan)), ("empty", torch.ones(0, 2))),
                ),
                "scale": integer(1),
                "offset": integer(0, 1),
                "boundary": choice(),
            },
            together=("psf", "scale", "offset"),
        ),
        Public(
            "data.Degradation()",
            blur,
            _images(cube=(3, 8, 8)),
            {
                "cube": both(
                    any_type(torch.Tensor),
                    some(
                        ("one axis", torch.ones(8)),
                        ("odd", torch.ones(3, 7, 8)),
                        ("integers", torch.ones(3, 8, 8, dtype=torch.int32)),
                        ("complex", torch.ones(3, 8, 8, dtype=torch.complex64)),
                    ),
                )
            },
        ),
        Public(
            "data.Degradation.gaussian",
            data.Degradation.gaussian,
            lambda: {"scale": 4},
            {
                "scale": integer(1),
                "sigma": number(0, above=True, optional=True),
                "size": integer(1, optional=True),
                "boundary": choice(),
                "offset": integer(0, 3),
            },
        ),
        Public(
            "data.Degradation.block",
            data.Degradation.block,
            lambda: {"scale": 2},
            {"scale": integer(1), "psf": any_type(optional=True)},
        ),
        Public(
            "data.apply_srf",
            data.apply_srf,
            _images(cube=(6, 4, 4), srf=(3, 6)),
            {
                "cube": tensor(fixed=[0], alone=True, ndims=(5, 4, 3)),
                "srf": tensor(fixed=[1], alone=True),
            },
            together=("cube", "srf"),
        ),
        Public(
            "data.wald",
            data.wald,
            lambda: {
                **_images(reference=(6, 8, 8), srf=(3, 6))(),
                "degradation": data.Degradation.gaussian(2),
            },
            {
                "reference": tensor(fixed=[0, 1, 2], alone=True, ndims=(5, 4, 3)),
                "degradation": any_type(),
                "srf": tensor(fixed=[1], alone=True),
            },
            together=("cube", "srf", "reference"),
        ),
        Public(
            "data.read_response",
            data.read_response,
            lambda: {"path": "x"},
            {"path": path()},
            errors=files,
        ),
        Public(
            "data.read_srf",
            data.read_srf,
            lambda: {"path": "x"},
            {"path": path()},
            errors=files,
        ),
        Public(
            "data.srf_from_response",
            data.srf_from_response,
            lambda: {"response": response, "hsi_wavelengths": axis},
            {
                "response": any_type(),
                "hsi_wavelengths": bad_axis,
                "hsi_widths": bad_widths,
                "tolerance": number(0),
            },
        ),
        Public(
            "data.srf_from_bands",
            data.srf_from_bands,
            lambda: {"centres": [460.0, 550.0], "widths": [50.0, 50.0], "hsi_wavelengths": axis},
            {
                "centres": some(
                    ("text", "460"),
                    ("three", [1.0, 2.0, 3.0]),
                    ("none", None),
                    ("nan", [np.nan, 460.0]),
                    ("inf", [np.inf, 460.0]),
                    ("empty", []),
                ),
                "widths": some(
                    ("text", "50"),
                    ("zero", [0.0, 50.0]),
                    ("nan", [np.nan, 50.0]),
                    ("inf", [np.inf, 50.0]),
                    ("huge", [1e300, 50.0]),
                    ("one", [50.0]),
                ),
                "hsi_wavelengths": bad_axis,
                "hsi_widths": bad_widths,
                "tolerance": number(0),
            },
            together=("centres", "widths", "response"),
        ),
        Public(
            "data.estimate_sensors",
            data.estimate_sensors,
            lambda: {**_images(**pair)(), "scale": 2},
            {
                "lr_hsi": finite(tensor(fixed=[1, 2], values=True)),
                "hr_msi": finite(tensor(fixed=[1, 2], values=True)),
                "scale": both(integer(1), some(("other", 3))),
                "degradation": any_type(optional=True),
                "srf": tensor(optional=True, alone=True, like=(3, 6)),
            },
            together=("lr_hsi", "hr_msi", "scale"),
        ),
    ]
    return found


# ------------------------------------------------------------------------------------------------
# Fusing, evaluating, training, drawing
# ------------------------------------------------------------------------------------------------


def _work() -> list[Public]:
    pair = {"lr_hsi": (6, 6, 6), "hr_msi": (3, 12, 12)}

    def given() -> dict[str, Any]:
        return {
            **_images(**pair)(),
            "srf": torch.full((3, 6), 1 / 6),
            "psf": torch.full((2, 2), 0.25),
        }

    def arrays() -> dict[str, Any]:
        return {name: value.numpy() for name, value in given().items()}

    image = tensor(ndims=(4,), fixed=[1, 2], values=True, array=False)
    as_array = tensor(ndims=(4,), fixed=[1, 2], values=True, array=False)
    sensors = {
        "srf": tensor(optional=True, alone=True, array=True, dtypes=False),
        "psf": both(
            any_type(torch.Tensor, np.ndarray, optional=True),
            some(
                ("sums to 4", torch.ones(2, 2)),
                ("three axes", torch.ones(1, 2, 2)),
                ("empty", torch.ones(0, 2)),
                ("nan", torch.full((2, 2), torch.nan)),
                ("another scale", data.Degradation.gaussian(3)),
            ),
        ),
    }
    options: dict[str, Kind] = {
        "local": flag(),
        "ridge": number(0, above=True),
        "iterations": integer(0),
        "window_sigma": number(0, above=True, optional=True),
        "clamp": flag(),
    }
    rest: dict[str, Kind] = {
        "method": choice(),
        "backend": choice(),
        "device": some(("no device", "nonsense"), ("a list", []), ("a number", 2.5)),
        "progress": flag(),
        "nonsense": some(("no such option", 3)),
    }
    names = ("lr_hsi", "hr_msi", "srf", "psf")
    scene = data.Scene("s", "t", reference=data.Cube(np.full((6, 16, 16), 0.5, np.float32)))
    case = evaluation.case_of(scene, 2)
    figure = {"fused": (6, 12, 12), "lr_hsi": (6, 6, 6), "hr_msi": (3, 12, 12)}
    recipe_kinds: dict[str, Kind] = {
        "model": choice(),
        "options": any_type(dict),
        "scenes": any_type(list, tuple),
        "validation": any_type(list, tuple),
        "scale": integer(1),
        "psf": choice(),
        "srf": any_type(str, optional=True),
        "loss": choice(),
        "epochs": integer(1),
        "steps": integer(0),
        "patch": both(integer(1), some(("no multiple", 63))),
        "batch": integer(1),
        "accumulate": integer(1),
        "learning_rate": number(0),
        "weight_decay": number(0),
        "schedule": choice(),
        "decay": number(0),
        "decay_every": integer(1),
        "flips": flag(),
        "recoloured": integer(0),
        "clip": number(0),
        "ema": number(0, 1),
        "bfloat16": flag(),
        "validate_every": integer(1),
        "patience": integer(0),
        "seed": integer(0),
    }
    folder = Path(tempfile.mkdtemp(prefix="fastfusion-bad-"))
    rng = np.random.default_rng(0)
    np.save(folder / "hsi.npy", rng.random((6, 6, 6)).astype("f4"))
    np.save(folder / "msi.npy", rng.random((3, 12, 12)).astype("f4"))
    return [
        Public(
            "fuse",
            fastfusion.fuse,
            given,
            {"lr_hsi": image, "hr_msi": image, **sensors, **options, **rest},
            errors=(fusing.Unavailable,),
            together=names,
        ),
        Public(
            "fuse of arrays",
            fastfusion.fuse,
            arrays,
            {"lr_hsi": as_array, "hr_msi": as_array},
            together=names,
        ),
        Public(
            "accelerate",
            fastfusion.accelerate,
            lambda: {"model": torch.nn.Linear(2, 2)},
            {"model": any_type()},
        ),
        Public("backend", _enter(fastfusion.backend), lambda: {"name": "auto"}, {"name": choice()}),
        Public(
            "evaluation.case_of",
            evaluation.case_of,
            lambda: {"scene": scene, "scale": 2},
            {
                "scene": any_type(),
                "scale": integer(2, 16, optional=True),
                "srf": tensor(optional=True, alone=True, like=(3, 6), fixed=[1]),
                "degradation": any_type(optional=True),
                "shift": number(),
                "rotation": number(),
                "zoom": number(0, above=True),
            },
        ),
        Public(
            "evaluation.run",
            evaluation.run,
            lambda: {"case": case, "method": "bicubic"},
            {"case": any_type(), "method": choice(), "blind": flag(), "backend": choice()},
        ),
        Public(
            "evaluation.score",
            evaluation.score,
            lambda: {"case": case, "fused": torch.rand(6, 16, 16)},
            {"case": any_type(), "fused": tensor(), "both": flag()},
            together=("fused", "reference"),
        ),
        Public(
            "evaluation.broad_bands",
            evaluation.broad_bands,
            lambda: {"cube": scene.reference},
            {"cube": any_type()},
        ),
        Public(
            "evaluation.displaced",
            evaluation.displaced,
            lambda: {"cube": torch.rand(3, 8, 8)},
            {
                "cube": both(any_type(torch.Tensor), some(("two axes", torch.ones(8, 8)))),
                "shift": number(),
                "rotation": number(),
                "zoom": number(0, above=True),
            },
        ),
        Public(
            "evaluation.fourier_resized",
            evaluation.fourier_resized,
            lambda: {"image": torch.rand(3, 8, 8), "size": (4, 4)},
            {
                "image": both(any_type(torch.Tensor), some(("one axis", torch.ones(8)))),
                "size": some(
                    ("one", (4,)),
                    ("three", (4, 4, 4)),
                    ("zero", (0, 4)),
                    ("negative", (4, -4)),
                    ("text", "44"),
                    ("fractions", (4.5, 4)),
                    ("none", None),
                ),
            },
        ),
        Public(
            "evaluation.run_across_scales",
            evaluation.run_across_scales,
            lambda: {"case": case, "weights": "x", "protocol": "page"},
            {"weights": path(), "protocol": choice()},
            errors=(FileNotFoundError, OSError),
        ),
        Public("training.Recipe", training.Recipe, dict, recipe_kinds, together=("scale",)),
        Public(
            "training.read_recipe",
            training.read_recipe,
            lambda: {"name": "lso-cave"},
            {
                "name": both(
                    any_type(str), some(("no such", "atlantis"), ("file", "/no/recipe.json"))
                ),
                "nonsense": some(("no such field", 3)),
            },
            errors=(FileNotFoundError, OSError),
            together=("config", "/no"),
        ),
        Public(
            "training.train",
            training.train,
            lambda: {"recipe": training.Recipe(scenes=["demo"]), "folder": folder / "trained"},
            {
                "recipe": both(any_type(), some(("no scenes", training.Recipe()))),
                "folder": path(missing=False),
                "minutes": number(0, above=True, optional=True),
                "resume": flag(),
                "device": some(("no device", "nonsense"), ("a number", 2.5)),
                "tensorboard": flag(),
                "progress": flag(),
            },
            errors=(OSError,),
            together=("scenes",),
        ),
        Public(
            "training.train_on_pair",
            training.train_on_pair,
            lambda: {"kind": "LSO", **_images(lr_hsi=(1, 6, 6, 6), hr_msi=(1, 3, 12, 12))()},
            {
                "kind": choice(),
                "lr_hsi": finite(tensor(fixed=[0, 2, 3], values=True)),
                "hr_msi": finite(tensor(fixed=[0, 2, 3], values=True)),
                "minutes": number(0, above=True),
                "seed": integer(0),
                "progress": flag(),
                "nonsense": some(("no such option", 3)),
            },
            together=("lr_hsi", "hr_msi"),
        ),
        Public(
            "tiling.fuse_files",
            tiling.fuse_files,
            lambda: {
                "hsi": folder / "hsi.npy",
                "msi": folder / "msi.npy",
                "out": folder / "out.zarr",
            },
            {
                "hsi": path(),
                "msi": path(),
                "out": both(path(missing=False), some(("suffix", "x.npy"), ("none", "/no/x.zarr"))),
                "method": choice(),
                "srf": tensor(optional=True, alone=True, like=(3, 6)),
                "psf": any_type(optional=True),
                "peak": number(0, above=True, optional=True),
                "tile": integer(1, optional=True),
                "margin": both(integer(0, optional=True), some(("of no network", 3))),
                "weights": both(any_type(optional=True), some(("of no network", "x"))),
                "scheduler": any_type(str, optional=True),
                "workers": integer(1, optional=True),
                "memory": number(0, above=True),
                "backend": choice(),
                "device": some(("no device", "nonsense"), ("a list", [])),
                "progress": flag(),
                "local": flag(),
                "ridge": number(0, above=True),
                "iterations": integer(0),
                "window_sigma": number(0, above=True, optional=True),
                "nonsense": some(("no such option", 3)),
            },
            errors=(FileNotFoundError, OSError, fusing.Unavailable),
            together=("x.npy", "/no"),
        ),
        Public(
            "figures.fusion_figure",
            figures.fusion_figure,
            _images(**figure),
            {
                "fused": tensor(fixed=[0, 1, 2], alone=True, dtypes=False),
                "lr_hsi": tensor(fixed=[0], alone=True, dtypes=False),
                "hr_msi": tensor(fixed=[1, 2], alone=True, dtypes=False),
                "reference": tensor(alone=True, optional=True, dtypes=False, like=(6, 12, 12)),
                "wavelengths": some(("few", [400.0]), ("text", "400"), ("words", ["a"] * 6)),
            },
            together=tuple(figure),
        ),
        Public(
            "figures.save_figure",
            figures.save_figure,
            lambda: {"path": folder / "x.png", "figure": None},
            {"figure": any_type()},
        ),
    ]


def _enter(manager: Callable[..., Any]) -> Callable[..., Any]:
    def enter(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return enter


PUBLIC: list[Public] = [*_operators(), *_layers(), *_models(), *_figures(), *_data(), *_work()]
