"""The work folder: one run at a time, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfusion.data.formats.numpy_files import PARSING


@contextlib.contextmanager
def work_folder(work: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Make the folder, or go on in it if it is of the same plan; nobody else works there."""
    text = json.dumps(plan, indent=1, sort_keys=True)
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{work}: another run is at work there; wait for it") from error
        file = work / "plan.json"
        if file.exists():
            earlier = json.loads(file.read_text())
            now = json.loads(text)
            changed = sorted(key for key in now if earlier.get(key) != now[key])
            if changed:
                raise ValueError(
                    f"{work} holds unfinished work that differs in {', '.join(changed)}: repeat "
                    "that call to go on, remove the folder to begin anew, or name another output"
                )
        else:
            _write_atomically(file, text.encode())
        yield


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, **values: Any) -> None:
    data = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in values.items()}
    np.savez(data, **arrays)
    _write_atomically(path, data.getvalue())


def load(path: Path) -> dict[str, Tensor]:
    with PARSING, np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def load_if_there(path: Path) -> dict[str, Tensor] | None:
    return load(path) if path.exists() else None


def remove(work: Path) -> None:
    """The folder, even while a worker that was told to stop still writes its last tile there.

    It is gone at once: of a folder that is half removed some tiles would count as done.
    """
    gone = removed(work)
    if gone.exists():  # a run was killed while it removed this
        shutil.rmtree(gone)
    work.rename(gone)
    shutil.rmtree(gone)


def removed(work: Path) -> Path:
    """What the folder is called while it is removed."""
    return work.with_name(f"{work.name}.removed")
