"""An output is complete or not there, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from fastfusion.data import atomic_path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_makes_a_file_and_leaves_nothing_else(tmp_path):
    with atomic_path(tmp_path / "cube.mat") as temporary:
        assert temporary.name == "cube.mat"
        assert temporary.parent.parent == tmp_path  # same file system
        temporary.write_bytes(b"new")
        assert not (tmp_path / "cube.mat").exists()
    assert names(tmp_path) == ["cube.mat"]
    assert (tmp_path / "cube.mat").read_bytes() == b"new"


def test_has_the_permissions_an_ordinary_file_has(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), SystemExit(1)]
)
@pytest.mark.parametrize("earlier", [None, b"old"])
@pytest.mark.parametrize("folder", [False, True])
def test_an_interruption_leaves_what_was_there(tmp_path, error, earlier, folder):
    place = tmp_path / "output"
    if earlier is not None:
        if folder:
            place.mkdir()
            (place / "01.png").write_bytes(earlier)
        else:
            place.write_bytes(earlier)
    with (
        pytest.raises(type(error)),
        atomic_path(place, folder=folder, may_replace=lambda path: True) as temporary,
    ):
        (temporary / "01.png" if folder else temporary).write_bytes(b"half")
        raise error
    assert names(tmp_path) == ([] if earlier is None else ["output"])
    if earlier is not None:
        assert (place / "01.png" if folder else place).read_bytes() == earlier


def test_an_interruption_while_flushing_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "output").write_bytes(b"old")

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"), atomic_path(tmp_path / "output") as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == ["output"]
    assert (tmp_path / "output").read_bytes() == b"old"


def test_companions_come_along_and_the_named_file_comes_last(tmp_path, monkeypatch):
    for name in ("cube.hdr", "cube.img"):
        (tmp_path / name).write_text("old")

    def seen_while_moving(source, destination, replace=os.replace):
        assert not (tmp_path / "cube.hdr").exists()
        replace(source, destination)

    monkeypatch.setattr(os, "replace", seen_while_moving)
    with atomic_path(tmp_path / "cube.hdr") as temporary:
        temporary.write_text("new")
        (temporary.parent / "cube.img").write_text("new")
    assert names(tmp_path) == ["cube.hdr", "cube.img"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


def test_replaces_a_folder_whole(tmp_path):
    place = tmp_path / "bands"
    for name in ("01.png", "02.png"):
        with atomic_path(place, folder=True, may_replace=lambda path: True) as temporary:
            (temporary / name).write_bytes(b"")
    assert names(place) == ["02.png"]
    assert names(tmp_path) == ["bands"]


def test_the_earlier_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch
):
    place = tmp_path / "bands"
    place.mkdir()
    (place / "old.png").write_bytes(b"")
    rename = type(place).rename

    def refuses_the_new_one(self, target):
        if self.name == "bands" and self != place:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(place), "rename", refuses_the_new_one)
    with (
        pytest.raises(OSError, match="Input/output"),
        atomic_path(place, folder=True, may_replace=lambda path: True) as temporary,
    ):
        (temporary / "new.png").write_bytes(b"")
    assert names(place) == ["old.png"]
    assert names(tmp_path) == ["bands"]


def test_follows_a_symbolic_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.npy").symlink_to(tmp_path / "elsewhere" / "real")
    with atomic_path(tmp_path / "link.npy") as temporary:
        assert temporary.name == "link.npy"
        temporary.write_bytes(b"new")
    assert (tmp_path / "link.npy").is_symlink()
    assert (tmp_path / "elsewhere" / "real").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda p: None, {"path": "absent/out.npy"}, FileNotFoundError, "does not exist"),
        (lambda p: (p / "out").mkdir(), {"path": "out"}, FileExistsError, "regular file"),
        (lambda p: os.mkfifo(p / "out"), {"path": "out"}, FileExistsError, "regular file"),
        (
            lambda p: (p / "out").write_bytes(b""),
            {"path": "out", "folder": True},
            FileExistsError,
            "is a file",
        ),
        (
            lambda p: ((p / "out").mkdir(), (p / "out" / "thesis.tex").write_bytes(b"")),
            {"path": "out", "folder": True},
            FileExistsError,
            "other things",
        ),
    ],
)
def test_refuses_before_any_work(tmp_path, make, options, error, words):
    make(tmp_path)
    before = names(tmp_path)
    path = tmp_path / options.pop("path")
    with pytest.raises(error, match=words), atomic_path(path, **options):
        pytest.fail("the work was started")
    assert names(tmp_path) == before


def test_writing_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "x"):
        pass
    assert names(tmp_path) == []
