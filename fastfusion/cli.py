"""The ``fastfusion`` command: its arguments and its exit status.

0 done, 2 bad usage or bad input, 1 anything else. What went wrong is one line on stderr; an output
file is either complete or not there.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["main"]

_METHODS = ("regression", "fsrvl", "lso", "cofusion", "bicubic")
_BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: the arguments are wrong (status 2) or ask for help (0).

    >>> main(["fuse", "--scene", "nowhere"])
    2
    """
    asked = _parser().parse_args(arguments)
    try:
        from fastfusion import commands  # brings in what --help does not need

        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            getattr(commands, asked.command)(asked)
        return 0
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if asked.debug:
            traceback.print_exc()
        status, message = _verdict(error)
    print(f"fastfusion {asked.command}: {message}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In one line, as errors are."""
    print(f"fastfusion: {message}", file=sys.stderr)


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit status and the line that an error gets."""
    from fastfusion.fusing import Unavailable
    from fastfusion.tiling import Unfinished

    if isinstance(error, KeyboardInterrupt):
        return 1, "interrupted; no output was left half written"
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # says it without "[Errno 28]"
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    message = " ".join(message.split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"{message}; free some space and run it again"
    bad_path = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, (ValueError, TypeError, Unavailable, PermissionError, *bad_path)):
        return 2, message
    if isinstance(error, (OSError, ImportError, Unfinished)):
        return 1, message
    return 1, f"{type(error).__name__}: {message[:500]} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastfusion", description="Hyperspectral image fusion.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fuse(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    info = commands.add_parser("info", help="what is installed, compiled and loadable here")
    info.add_argument("--json", action="store_true", help="as JSON")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def _add_fuse(commands: Any) -> None:
    fuse = commands.add_parser(
        "fuse",
        help="fuse a hyperspectral image with a multispectral one, or try it on a scene",
        description="Fuse two images (--hsi and --msi), or degrade a scene as two sensors would "
        "see it, fuse these and score the result (--scene). Writes the fused cube to OUT, its "
        "figures and timings to OUT.json and a picture to OUT.png.",
        epilog="Images are .mat, .npy, .npz, .hdr (ENVI), .tif or .zarr files, or folders with a "
        ".png a band; FILE:NAME takes one of several arrays in a file.",
    )
    images = fuse.add_argument_group("images")
    images.add_argument("--hsi", metavar="FILE", help="hyperspectral image of low resolution")
    images.add_argument("--msi", metavar="FILE", help="multispectral image of high resolution")
    images.add_argument("--reference", metavar="FILE", help="the truth, to score the result by")
    images.add_argument(
        "--peak",
        type=float,
        metavar="VALUE",
        help="the value that becomes 1, for all images; by default the largest of all where that "
        "is above 1, a quarter more without a reference. The output is in the input's unit again",
    )
    images.add_argument(
        "--bands-axis", type=int, choices=(0, 1, 2), help="where .mat, .npy, .npz have their bands"
    )
    images.add_argument(
        "--scene", metavar="NAME", help="demo, a scene such as cave:sponges, or a FILE, instead"
    )
    images.add_argument("--scale", type=int, metavar="N", help="how many times finer the MSI is")
    images.add_argument("--out", metavar="OUT", help="the fused cube; its suffix names the format")
    images.add_argument("--no-figure", action="store_true", help="do not draw OUT.png")
    method = fuse.add_argument_group("method")
    method.add_argument(
        "--method", choices=_METHODS, default="regression", help="by default %(default)s"
    )
    method.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as local=False; may be repeated",
    )
    method.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="time limit for what is trained on the pair: fsrvl, and lso and cofusion without "
        "weights",
    )
    method.add_argument(
        "--backend", choices=_BACKENDS, default="auto", help="by default %(default)s"
    )
    method.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    _add_tiles(fuse)
    _add_sensors(fuse)
    _add_progress(fuse)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train LSO or CoFusion on scenes",
        description="Train by a recipe. Writes the best model so far to FOLDER/model.safetensors "
        "(for fuse --method lso --option weights=...), the state to FOLDER/last.safetensors, and "
        "FOLDER/log.csv. Several processes work together under torchrun.",
        epilog="torchrun --nproc-per-node 2 -m fastfusion train ... trains in two processes.",
    )
    train.add_argument(
        "--config",
        required=True,
        metavar="NAME",
        help="a recipe: lso-cave, lso-cave-regression, cofusion-cave, cofusion-pavia, or a .json",
    )
    train.add_argument("--out", required=True, metavar="FOLDER", help="made where not there")
    train.add_argument("--scenes", nargs="+", metavar="NAME[@r0:r1,c0:c1]", help="to train on")
    train.add_argument("--validation", nargs="+", metavar="NAME[@r0:r1,c0:c1]")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another field of the recipe, such as batch=4; may be repeated",
    )
    train.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the model, such as width=32; may be repeated",
    )
    train.add_argument("--minutes", type=float, metavar="N", help="time limit")
    train.add_argument("--resume", action="store_true", help="go on where FOLDER stopped")
    train.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    train.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")
    _add_progress(train)


def _add_tiles(fuse: Any) -> None:
    tiles = fuse.add_argument_group(
        "scenes larger than memory",
        "From disk to disk in tiles, without seams: taken where OUT is .zarr or .tif and any of "
        "these is given, or the result is larger than 1 GiB. Interrupted work goes on when the "
        "same command is given again.",
    )
    tiles.add_argument("--tile", type=int, metavar="N", help="MSI pixels along a tile's side")
    tiles.add_argument(
        "--margin",
        type=int,
        metavar="N",
        help="MSI pixels around a tile for a network; by default all that its pixels depend on",
    )
    tiles.add_argument("--workers", type=int, metavar="N", help="threads; by default as they fit")
    tiles.add_argument(
        "--memory", type=float, metavar="GIB", help="that threads are chosen by; by default 4"
    )
    tiles.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a dask cluster, such as tcp://host:8786"
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score methods on scenes, side by side",
        description="Fuse each scene by each method. Writes FOLDER/table.md and FOLDER/table.csv, "
        "which grow with each result, a picture of each, one that sets the methods side by side, "
        "and, where there are several scales, PSNR against the scale.",
    )
    evaluate.add_argument(
        "--scenes", nargs="+", required=True, metavar="NAME[@N,...]", help="and at which scales"
    )
    evaluate.add_argument(
        "--methods",
        nargs="+",
        default=["bicubic", "regression"],
        metavar="NAME[:OPTION=VALUE,...]",
        help="such as regression:local=False; bicubic and regression if none is named",
    )
    evaluate.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="METHOD=FILE",
        help="the trained network of a method, such as lso=x4.safetensors; may be repeated",
    )
    evaluate.add_argument(
        "--cross-scale",
        choices=("page", "script"),
        help="apply networks of --weights at scales that they were not trained on: page at the "
        "pair's own scale, script after resizing the HSI in the Fourier domain to the network's",
    )
    evaluate.add_argument("--out", required=True, metavar="FOLDER", help="made where not there")
    evaluate.add_argument("--shift", type=float, default=0.0, help="move the HSI, in MSI pixels")
    evaluate.add_argument("--rotate", type=float, default=0.0, help="turn the HSI, in degrees")
    evaluate.add_argument("--zoom", type=float, default=1.0, help="enlarge the HSI, in times")
    evaluate.add_argument("--no-figures", action="store_true", help="tables alone")
    evaluate.add_argument(
        "--quick",
        action="store_true",
        help="leave out what takes long: D_lambda, D_s and QNR where there is a reference, FLOPs, "
        "latency",
    )
    _add_sensors(evaluate)
    _add_progress(evaluate)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the operators here, against their definitions in plain PyTorch",
        description="Each operator on each shape, the contestants taking turns; prints a table "
        "and writes FOLDER/bench.json (pytest-benchmark's layout), bench.csv and bench.html, a "
        "page that needs nothing else. An operator whose result is wrong here gets no figure.",
    )
    bench.add_argument("--op", nargs="+", metavar="NAME", help="by default every operator")
    bench.add_argument(
        "--shape",
        nargs="+",
        metavar="BxCxHxW",
        help="by default 1x64 channels of 64x64, 128x128 and 256x256",
    )
    bench.add_argument(
        "--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32"
    )
    bench.add_argument(
        "--backend", nargs="+", default=["auto"], choices=_BACKENDS, help="by default auto"
    )
    bench.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    bench.add_argument("--backward", action="store_true", help="forward and backward together")
    bench.add_argument(
        "--compiled", action="store_true", help="torch.compile of the definitions takes part too"
    )
    bench.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        metavar="N",
        help="for each row, about; 2 if not given",
    )
    bench.add_argument("--compare", metavar="FILE", help="an earlier bench.json, to set beside it")
    bench.add_argument(
        "--out", metavar="FOLDER", help="made where not there; without, a table alone"
    )


def _add_sensors(command: argparse.ArgumentParser) -> None:
    sensors = command.add_argument_group("sensors", "estimated where they are not known")
    sensors.add_argument(
        "--srf", metavar="FILE", help="the MSI's spectral response: .csv, or a matrix .npy, .mat"
    )
    sensors.add_argument(
        "--psf",
        metavar="KIND",
        help="the HSI's blur: gaussian, gaussian:SIGMA, block, or a matrix .npy, .mat",
    )
    sensors.add_argument(
        "--blind", action="store_true", help="do not tell the method a scene's sensors"
    )


def _add_progress(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr.isatty(),
        help="a bar with the time left; by default on a terminal",
    )
