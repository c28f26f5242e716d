"""A process that reads files, one after the other, within bounds, and tells how each went.

Run as ``python -m tests.reliability.reading FOLDER``; it answers each line ``[kind, path]`` by a
line. Readers of damaged files may crash or take all memory: this process is the one that does. It
also watches what is done to the machine: code that a file brings, files written elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import select
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: MiB of memory that reading may take beyond what the libraries do; files here hold a few KiB.
ROOM = 512
#: Seconds after which a reader counts as hung: files here are read in milliseconds.
PATIENCE = 60
FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "socket.connect")


class Reader:
    """The process, from outside; started anew when it has died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def read(self, kind: str, path: Path) -> dict[str, Any]:
        """``{"bytes": of the result}``, ``{"error": type, "says": message}`` or ``{"died": ...}``;
        with ``"peak"``, MiB that it took, and ``"did"``, what it must not do."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.reading", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            self.process.wait()
            return {"died": f"it read for more than {PATIENCE} s", "peak": 0, "did": []}
        answer = self.process.stdout.readline()
        if not answer:
            return {"died": self.process.wait(), "peak": 0, "did": []}
        return json.loads(answer)

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                assert self.process.stdin is not None
                self.process.stdin.close()
            self.process.kill()
            self.process.wait()


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def _cube_bytes(path: Path) -> int:
    from fastfusion.data import read_cube

    return read_cube(path).data.nbytes


def _first_pixels(path: Path) -> int:
    import numpy as np

    from fastfusion.data import open_cube

    return np.asarray(open_cube(path).data[:, :1, :1]).nbytes


def _response(path: Path) -> int:
    from fastfusion.data import read_srf

    return read_srf(path).nbytes


def _model(path: Path) -> int:
    from fastfusion.models import FusionModel

    return sum(value.nbytes for value in FusionModel.load(path).state_dict().values())


def _recipe(path: Path) -> int:
    from fastfusion.training import read_recipe

    return len(str(read_recipe(path).scenes))


KINDS = {
    "cube": _cube_bytes,
    "open": _first_pixels,
    "srf": _response,
    "model": _model,
    "recipe": _recipe,
}


def main() -> None:
    """Serve until the other end is closed."""
    import fastfusion.data
    import fastfusion.models
    import fastfusion.training  # noqa: F401

    for library in ("h5py", "scipy.io", "rasterio", "zarr", "spectral.io.envi", "PIL.Image"):
        with contextlib.suppress(ImportError):
            __import__(library)
    folder = Path(sys.argv[1]).resolve()
    did: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            did.append(event)
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            inside = Path(os.path.realpath(arguments[0])).is_relative_to(folder)
            if writes and not inside and not arguments[0].startswith("/dev/"):
                did.append(f"writes {arguments[0]}")

    answers, sys.stdout = sys.stdout, io.StringIO()
    limit = int((_status("VmSize") + 4096) * 2**20)  # address space; threads and maps take some
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.addaudithook(watch)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        kind, name = json.loads(line)
        did.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        did.clear()
        before = _status("VmRSS")
        try:
            answer: dict[str, Any] = {"bytes": KINDS[kind](Path(name))}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"error": kinds, "says": str(error)}
        answer |= {"peak": _status("VmHWM") - before, "did": list(did)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
