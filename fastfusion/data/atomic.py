"""Outputs that are either complete or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(
    path: str | os.PathLike[str],
    *,
    folder: bool = False,
    may_replace: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Write to a temporary place beside ``path`` that takes its name only when all went well.

    The block gets a path with the same file name in a fresh hidden folder on the same file system.
    When the block ends, what it wrote is flushed to the disk and renamed to ``path``, over an
    earlier file. When it raises, Ctrl-C and a full disk included, the temporary folder is removed
    and an earlier file at ``path`` stays as it was. Whatever else the block left beside the file
    (the data file of an ENVI header, say) is moved to the folder of ``path`` too, the named file
    last: where it is there, the others are. A symbolic link at ``path`` is followed.

    Args:
        path: the output to make; its folder must exist.
        folder: the output is a folder; the block gets it empty.
        may_replace: says whether an existing folder that is not empty is an earlier output and may
            be replaced; none may where it is not given. Only for ``folder=True``.

    Raises:
        FileNotFoundError: the folder of ``path`` is not there, or the block wrote nothing.
        FileExistsError: ``path`` is taken by something that must not be replaced.
        OSError: what the file system says (no permission, no space left).

    Example:
        >>> import pathlib, tempfile
        >>> place = pathlib.Path(tempfile.mkdtemp())
        >>> with atomic_path(place / "report.txt") as temporary:
        ...     _ = temporary.write_text("complete")
        >>> [entry.name for entry in place.iterdir()]
        ['report.txt']
    """
    asked = Path(path)
    target = Path(os.path.realpath(asked))
    check_place(asked, folder=folder, may_replace=may_replace)
    with tempfile.TemporaryDirectory(
        prefix=".fastfusion-", dir=target.parent, ignore_cleanup_errors=True
    ) as room:
        temporary = Path(room, asked.name)
        if folder:
            temporary.mkdir()
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {asked}")
        _flush_tree(Path(room))
        _move_into_place(temporary, target)


def check_place(
    path: str | os.PathLike[str],
    *,
    folder: bool = False,
    may_replace: Callable[[Path], bool] | None = None,
) -> None:
    """Refuse what a rename would fail on, or would destroy; to be asked before the work is done.

    Arguments and errors are those of `atomic_path`.
    """
    asked = Path(path)
    target = Path(os.path.realpath(asked))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {asked}: folder {target.parent} does not exist; make it first"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {asked}: no permission to write in {target.parent}")
    if not target.exists():
        return
    if not folder:
        if not target.is_file():  # a folder, a device, a pipe
            raise FileExistsError(f"cannot write {asked}: it is not a regular file; name another")
    elif not target.is_dir():
        raise FileExistsError(f"cannot make the folder {asked}: it is a file; name another")
    elif any(target.iterdir()) and not (may_replace and may_replace(target)):
        raise FileExistsError(
            f"cannot write to the folder {asked}: it holds other things; name a new or empty one"
        )


def _move_into_place(temporary: Path, target: Path) -> None:
    room = temporary.parent
    companions = sorted(entry for entry in room.iterdir() if entry != temporary)
    if temporary.is_dir() and target.exists():
        # A folder cannot be renamed over one that is not empty: the earlier one steps aside into
        # the temporary folder and goes with it, or comes back if the new one cannot take its place.
        earlier = Path(tempfile.mkdtemp(dir=room), "earlier")
        target.rename(earlier)
        try:
            temporary.rename(target)
        except BaseException:
            earlier.rename(target)
            raise
    else:
        if companions:  # an earlier header must never be seen beside new data
            target.unlink(missing_ok=True)
        for companion in companions:
            companion.replace(target.parent / companion.name)
        temporary.replace(target)
    _flush(target.parent)


def _flush_tree(top: Path) -> None:
    for folder, _, names in os.walk(top):
        for name in names:
            _flush(Path(folder, name))
        _flush(Path(folder))


def _flush(path: Path) -> None:
    """Make the kernel write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
