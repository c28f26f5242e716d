"""What the Triton kernels share: tables of tiles, launches, tuning on demand, and recording.

Only the operators' ``kernels.py`` import this module, and those are imported at the first call that
needs them: Triton reads ``TRITON_INTERPRET`` when it is imported, and the user may still set it.

A launcher computes one operator: it makes the outputs and calls :func:`launch` with a
:class:`Tile` out of its :class:`Table`. How that looks, from the table to the tests, stands in
docs/architecture.md ("To add a Triton kernel").
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.ops.operator import layout_of, log

R = TypeVar("R")
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

#: The architectures for which every kernel is compiled by the tests.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


# -- tiles -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tile:
    """One configuration of a kernel: its block sizes by name, warps, pipeline stages.

    ``registers`` is how many a thread may have, on NVIDIA. Unless told, the assembler aims at more
    threads at a time with fewer registers, and now and then spills where it need not: 255, the
    most there are, forbids that.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 1
    registers: int | None = None

    def options(self, architecture: str) -> dict[str, int]:
        """What the compiler is told."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and architecture.startswith("sm_"):
            found["maxnreg"] = self.registers
        return found

    def __getitem__(self, name: str) -> int:
        return self.blocks[name]


@dataclasses.dataclass(frozen=True)
class Table:
    """The tested tiles of a kernel: by shape class, then by architecture ("" is any other).

    The architecture "cpu" is the interpreter. A tile under "other", which is none, is compiled and
    tested as all are, and only tuning takes it. What AMD has of its own in a class stands for all
    that class has there, as its warps are of 64 threads.

    >>> small = Tile({"BLOCK": 64})
    >>> table = Table("scale", {"rows": {"": Tile({"BLOCK": 256}), "gfx942": small}})
    >>> table.tile("rows", "sm_90")["BLOCK"], table.tile("rows", "gfx942")["BLOCK"]
    (256, 64)
    >>> len(table.all("rows", "gfx942"))
    1
    """

    name: str
    tiles: Mapping[str, Mapping[str, Tile]]

    def tile(self, shape_class: str, architecture: str) -> Tile:
        """The tile for calls of this class on this architecture."""
        choices = self.tiles[shape_class]
        return choices.get(architecture, choices[""])

    def all(self, shape_class: str, architecture: str) -> list[Tile]:
        """The different tiles of a class that may run on an architecture, to be tested and timed:
        those of AMD on AMD if it has its own, else those of the others."""
        choices = self.tiles[shape_class]
        own = architecture.startswith("gfx") and any(chip.startswith("gfx") for chip in choices)
        distinct: list[Tile] = []
        for chip, tile in choices.items():
            if chip != "cpu" and chip.startswith("gfx") == own and tile not in distinct:
                distinct.append(tile)
        return distinct


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``"cpu"`` under the interpreter."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.architecture
    if device.type == "cpu":
        return "cpu"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def tuned(
    table: Table, shape_class: str, like: Tensor, run: Callable[[Tile], R], *key: object
) -> R:
    """Run with the tile that the table gives.

    With ``FASTFUSION_AUTOTUNE=1`` all tiles of the class are timed at the first call with this
    dtype and ``key`` (by default the shape of ``like``) and the fastest is kept, on disk as well
    (``FASTFUSION_CACHE``, by default ``~/.cache/fastfusion``). ``run`` must therefore be able to
    run more than once. Nothing is timed while a CUDA graph is captured.
    """
    chip = architecture(like.device)
    recorder = _recorder.get()
    if recorder is not None:
        for tile in table.all(shape_class, chip):
            result = run(tile)
        return result
    tile = table.tile(shape_class, chip)
    if os.environ.get("FASTFUSION_AUTOTUNE") == "1" and like.device.type == "cuda":
        name = f"{table.name} {shape_class} {like.dtype} {key or tuple(like.shape)}"
        tile = fastest(name, chip, table.all(shape_class, chip), run) or tile
    return run(tile)


# -- tuning, when asked for --------------------------------------------------------------------


def _cache_file() -> Path:
    folder = os.environ.get("FASTFUSION_CACHE")
    root = Path(folder) if folder else Path.home() / ".cache" / "fastfusion"
    return root / "tiles.json"


def _device_seconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20)) / 1e3


def fastest(
    name: str,
    chip: str,
    tiles: Sequence[Tile],
    run: Callable[[Tile], object],
    seconds: Callable[[Callable[[], object]], float] = _device_seconds,
) -> Tile | None:
    """The fastest of the tiles: from the cache on disk, or timed now; None while capturing."""
    if len(tiles) == 1:
        return tiles[0]
    path = _cache_file()
    name = f"{name} on {chip}, Triton {triton.__version__}"
    known = {**_kept(path), **_unwritten}
    described = [dataclasses.asdict(tile) for tile in tiles]
    if name in known and known[name] in described:
        return tiles[described.index(known[name])]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    times = [seconds(functools.partial(run, tile)) for tile in tiles]
    best = times.index(min(times))
    try:
        _keep(path, name, described[best])
    except OSError as error:  # no room, or no permission: the next process times again
        _unwritten[name] = described[best]
        log.debug("the tiles of %s are kept in this process alone: %s", name, error)
    return tiles[best]


#: What this process found out and could not write.
_unwritten: dict[str, Any] = {}


def _kept(path: Path) -> dict[str, Any]:
    """The tiles on disk; none where the file is not there or is damaged."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _keep(path: Path, name: str, tile: dict[str, Any]) -> None:
    """Add a tile to those on disk, one process at a time, so that none writes over another's."""
    import fcntl  # where Triton is, this is

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                json.dump({**_kept(path), name: tile}, file, indent=1)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    finally:
        os.close(folder)


# -- launching ---------------------------------------------------------------------------------


def launch(kernel: Any, grid: Sequence[int], tile: Tile, /, **arguments: Any) -> None:
    """Run a kernel on the device and the current stream of its first tensor.

    The tile's blocks are arguments by their names. Nothing is launched on an empty grid.
    """
    arguments |= {n: size for n, size in tile.blocks.items() if n in kernel.arg_names}
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, tile, arguments))
        return
    if 0 in grid:
        return
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[tuple(grid)](**arguments, **tile.options(architecture(first.device)))


def blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def power_of_two(size: int, low: int = 1) -> int:
    """The smallest power of two not below ``size`` and ``low``."""
    return max(low, triton.next_power_of_2(size))


def strides(x: Tensor, *names: str) -> dict[str, int]:
    """The strides of a tensor as a kernel's arguments, a name for each dimension."""
    return dict(zip(names, x.stride(), strict=True))


def match(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the layout of ``like``; a copy only where that differs."""
    return x.contiguous(memory_format=layout_of(like))


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape with the same strides; copies only where these differ."""
    if all(x.stride() == tensors[0].stride() for x in tensors):
        return tensors
    return tuple(match(x, tensors[0]) for x in tensors)


# -- recording ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Launch:
    """A launch that was recorded: what has to be compiled for it."""

    kernel: Any
    tile: Tile
    arguments: dict[str, Any]

    def source(self) -> Any:
        """What ``triton.compile`` takes, specialised as a launch at run time would be."""
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = _type_name(value)
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


@dataclasses.dataclass
class _Recorder:
    architecture: str
    launches: list[Launch]


_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar(
    "fastfusion_recorder", default=None
)

_TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _type_name(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if type(value) is int:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"pass {value!r} as tl.constexpr: eager mode and Inductor type it differently")


def meta(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A tensor without memory, for :func:`recording`."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Record what would be launched on an architecture, each tile of a table, and run nothing.

    Call the launchers on tensors of the meta device.
    """
    recorder = _Recorder(architecture, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


# -- device functions --------------------------------------------------------------------------


@triton.jit
def narrow(x, kind: tl.constexpr):
    """Float32 values in a tensor's dtype, rounded to nearest, ties to even.

    The interpreter's own cast to bfloat16 cuts where the hardware rounds.
    """
    if _INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(kind)


@triton.jit
def both(mask, condition):
    """``mask & condition`` where the condition may be a scalar's.

    Those are spread as integers by the interpreter of Triton 3.9, which refuses integers as masks.
    """
    return (mask.to(tl.int32) & condition.to(tl.int32)) > 0


@triton.jit
def normal_cdf(x):
    """The standard normal distribution function of float32 values.

    Unlike ``(1 + erf) / 2`` it keeps its digits in the left tail: erfc by Chebyshev fitting, whose
    relative error is 1.2e-7 everywhere (Numerical Recipes in C, section 6.2).
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    p = -0.82215223 + t * 0.17087277
    p = -1.13520398 + t * (1.48851587 + t * p)
    p = -0.18628806 + t * (0.27886807 + t * p)
    p = 0.37409196 + t * (0.09678418 + t * p)
    p = -1.26551223 + t * (1.00002368 + t * p)
    tail = 0.5 * t * tl.exp(p - z * z)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gelu(x):
    """The exact GELU of float32 values."""
    return x * normal_cdf(x)


@triton.jit
def gelu_slope(x):
    """The derivative of the exact GELU."""
    return normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
