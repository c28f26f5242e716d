"""Files that are damaged or that lie: an error that names the file, in bounded memory, no crash.

Every format is mutated from a real one by hypothesis, and read in a process of its own, which
watches for code that a file brings and for files written elsewhere (reading.py).
tests/data/test_files.py holds the wording of the errors.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfusion.data import Cube, write_cube
from fastfusion.data.formats import matlab
from fastfusion.models import LSO, CoFusion
from fastfusion.models.base import write_checkpoint
from tests.reliability.effort import counted, effort, largest
from tests.reliability.reading import ROOM, Reader

#: What is read, how, and which of its files is mutated.
FORMATS = {
    "npy": ("cube", "a.npy", "a.npy"),
    "npz": ("cube", "a.npz", "a.npz"),
    "mat-v5": ("cube", "a.mat", "a.mat"),
    "mat-v73": ("cube", "b.mat", "b.mat"),
    "envi": ("cube", "a.hdr", "a.hdr"),
    "geotiff": ("cube", "a.tif", "a.tif"),
    "geotiff-open": ("open", "a.tif", "a.tif"),
    "png": ("cube", "bands", "bands/bands_02.png"),
    "zarr": ("cube", "a.zarr", "a.zarr/zarr.json"),
    "zarr-open": ("open", "a.zarr", "a.zarr/zarr.json"),
    "zarr-chunk": ("cube", "a.zarr", "a.zarr/c/0/0/0"),
    "zarr-group": ("cube", "b.zarr", "b.zarr/wavelengths/zarr.json"),
    "zarr-format-2": ("cube", "c.zarr", "c.zarr/.zarray"),
    "srf-csv": ("srf", "srf.csv", "srf.csv"),
    "srf-npy": ("srf", "srf.npy", "srf.npy"),
    "srf-mat": ("srf", "srf.mat", "srf.mat"),
    "safetensors": ("model", "model.safetensors", "model.safetensors"),
    "json": ("recipe", "recipe.json", "recipe.json"),
}
DOCUMENTED = {"ValueError", "TypeError", "OSError"}
WORDS = [
    *(b"-1", b"0", b"99999999999", b"1e999", b"nan", b"null", b"../../x"),
    *(b"[" * 3000, b"9" * 5000),
]
TEXT = ("envi", "zarr", "zarr-open", "zarr-group", "zarr-format-2", "srf-csv", "json")


def _zarr_group(path: Path, count: int) -> None:
    """A cube of 3 bands and, as an array of its own, a list of so many wavelengths."""
    zarr = pytest.importorskip("zarr")
    group = zarr.create_group(path)
    group.create_array("cube", data=np.ones((3, 6, 5), "f4"))
    # Not one chunk of it is written: it takes no room, whatever its length.
    group.create_array("wavelengths", shape=(count,), chunks=(1000,), dtype="f8", fill_value=500)


def _zarr_format_2(path: Path, **codecs: object) -> None:
    path.mkdir()
    described = {"shape": [3, 6, 5], "chunks": [3, 6, 5], "dtype": "<f4", "order": "C"}
    described |= {"zarr_format": 2, "fill_value": 0, **codecs}
    (path / ".zarray").write_text(json.dumps(described))
    (path / "0.0.0").write_bytes(np.ones((3, 6, 5), "f4").tobytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small file of every kind."""
    import scipy.io

    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    cube = Cube(rng.random((3, 6, 5)).astype("f4"), np.array([450.0, 550.0, 650.0]))
    for name in ("a.npy", "a.npz", "a.mat", "a.hdr", "a.tif", "bands", "a.zarr"):
        write_cube(folder / name, cube)
    limit, matlab.LARGEST_V5_BYTES = matlab.LARGEST_V5_BYTES, 0
    write_cube(folder / "b.mat", cube)
    matlab.LARGEST_V5_BYTES = limit
    _zarr_group(folder / "b.zarr", 3)
    _zarr_format_2(folder / "c.zarr", compressor=None, filters=None)
    (folder / "srf.csv").write_text(
        "wavelength_nm,red,green\n" + "".join(f"{w},{w % 7},1\n" for w in range(400, 700, 30))
    )
    np.save(folder / "srf.npy", np.ones((2, 5)))
    scipy.io.savemat(folder / "srf.mat", {"srf": np.ones((2, 5))})
    tiny = {"width": 4, "heads": 2, "tokens": 2, "basis": 2, "guide_width": 4, "guide_blocks": 1}
    LSO(3, 2, 2, **tiny).save(folder / "model.safetensors")
    (folder / "recipe.json").write_text(json.dumps({"model": "LSO", "scenes": ["x"], "batch": 2}))
    return folder


@pytest.fixture(scope="module")
def reader(place: Path) -> Iterator[Reader]:
    found = Reader(place)
    yield found
    found.close()


def judge(answer: dict, path: Path) -> None:
    """The reading ended as documented."""
    assert "died" not in answer, f"the reader died: {answer['died']}"
    assert not answer["did"], answer["did"]
    assert answer["peak"] < ROOM, f"{answer['peak']:.0f} MiB for a file of a few KiB"
    largest("files", "MiB at most to read one", round(answer["peak"]))
    if "error" in answer:
        assert DOCUMENTED & set(answer["error"]), answer
        assert "\n" not in answer["says"].strip() and path.name in answer["says"], answer
        counted("files", "refused")
    else:
        counted("files", "read all the same")


@st.composite
def mutations(draw, whole: bytes, text: bool) -> bytes:
    """Some of: bytes changed, numbers that lie, the end cut off, something appended."""
    data = bytearray(whole)
    kinds = ["bytes", "number", "cut", "longer", *(["word"] * 3 if text else [])]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(kinds))
        if not data:
            break
        reach = min(len(data), draw(st.sampled_from([64, 400, 4000]))) - 1
        at = draw(st.integers(0, reach))
        if kind == "bytes":
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            width = draw(st.sampled_from([2, 4, 8]))
            value = draw(
                st.sampled_from([0, 1, 0x7F, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1])
            )
            order = draw(st.sampled_from(["little", "big"]))
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, order)
        elif kind == "cut":
            del data[at:]
        elif kind == "longer":
            data += draw(st.binary(max_size=64))
        else:  # a number or a name of the text becomes another
            words = [found.span() for found in re.finditer(rb"[-\w.]+", bytes(data))]
            if words:
                start, end = draw(st.sampled_from(words))
                data[start:end] = draw(st.sampled_from(WORDS))
    return bytes(data)


@pytest.mark.parametrize("part", FORMATS)
def test_mutated_files(place: Path, reader: Reader, part: str) -> None:
    kind, name, victim = FORMATS[part]
    whole = (place / victim).read_bytes()

    @settings(max_examples=effort(20, 2000))
    @given(mutations(whole, part in TEXT))
    def holds(data: bytes) -> None:
        (place / victim).write_bytes(data)
        judge(reader.read(kind, place / name), place / name)
        counted("files", "mutated files")

    try:
        holds()
    finally:
        (place / victim).write_bytes(whole)


# ------------------------------------------------------------------------------------------------
# Lies that no random change would tell
# ------------------------------------------------------------------------------------------------

TERA = 10**4


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        described = {"descr": "<f8", "fortran_order": False, "shape": (TERA, TERA, TERA)}
        np.lib.format.write_array_header_1_0(file, described)
        file.write(bytes(64))


def _npy_matrix(path: Path) -> None:
    with path.open("wb") as file:
        described = {"descr": "<f8", "fortran_order": False, "shape": (4, 2 * TERA**2)}
        np.lib.format.write_array_header_1_0(file, described)
        file.write(bytes(64))


def _hdf5(path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (TERA, TERA, TERA), "f4", chunks=(1, 10, 10))
        file["x"][0, :2, :2] = 1


def _zarr(path: Path, chunk: int = 10) -> None:
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(
        path, shape=(TERA, TERA, TERA), chunks=(1, chunk, chunk), dtype="f4", fill_value=0.5
    )
    array[0, :chunk, :chunk] = 1


def _zarr_chunk(path: Path) -> None:
    """One chunk, which is there, and which is said to hold a terabyte."""
    _zarr(path)
    file = path / "zarr.json"
    described = json.loads(file.read_text())
    described["shape"] = [TERA, TERA, TERA]
    described["chunk_grid"]["configuration"]["chunk_shape"] = [TERA, TERA, TERA]
    file.write_text(json.dumps(described))


def _tiff(path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    options = {"driver": "GTiff", "count": 8, "dtype": "float64", "SPARSE_OK": True}
    options["interleave"] = "band"
    blocks = {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "compress": "deflate"}
    with rasterio.open(path, "w", width=60_000, height=60_000, **options, **blocks) as image:
        window = rasterio.windows.Window(0, 0, 16, 16)
        image.write(np.ones((16, 16)), 1, window=window)


def _png(path: Path) -> None:
    path.mkdir()
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 16, 0, 0, 0, 0)
    for band in range(3):
        with (path / f"{path.name}_{band}.png").open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            pixels = zlib.compress(bytes(64))
            for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
                check = struct.pack(">I", zlib.crc32(kind + data))
                file.write(struct.pack(">I", len(data)) + kind + data + check)


def _envi(path: Path) -> None:
    path.write_text(
        f"ENVI\nlines = {TERA}\nsamples = {TERA}\nbands = {TERA}\nheader offset = 0\n"
        "data type = 5\ninterleave = bsq\nbyte order = 0\n"
    )
    path.with_suffix(".img").write_bytes(bytes(64))


def _safetensors(path: Path) -> None:
    """A true digest of an honest file whose configuration would take years to build."""
    model = CoFusion(3, 2, 2, width=4, depths=(1, 1, 1))
    config = {**model.config, "depths": [10**9, 1, 1]}
    write_checkpoint(path, {"model": "CoFusion", "config": json.dumps(config)}, model.state_dict())


def _safetensors_wide(path: Path) -> None:
    model = CoFusion(3, 2, 2, width=4, depths=(1, 1, 1))
    config = {**model.config, "width": 10**12}
    write_checkpoint(path, {"model": "CoFusion", "config": json.dumps(config)}, model.state_dict())


def _deep_json(path: Path) -> None:
    path.write_text("[" * 200_000)


def _large_csv(path: Path) -> None:
    path.write_text("wavelength_nm,a\n" + "9" * 10**6 + ",1\n")


def _binary_csv(path: Path) -> None:
    path.write_bytes(b"wavelength_nm,a\n\xff\xfe\0,1\n")


LIES = {
    "lie.npy": ("cube", _npy),
    "lie-matrix.npy": ("srf", _npy_matrix),
    "lie.mat": ("cube", _hdf5),
    "lie.zarr": ("cube", _zarr),
    "lie-chunk.zarr": ("cube", _zarr_chunk),
    "lie-chunk-open.zarr": ("open", _zarr_chunk),
    "lie.tif": ("cube", _tiff),
    "lie": ("cube", _png),
    "lie.hdr": ("cube", _envi),
    "lie.safetensors": ("model", _safetensors),
    "wide.safetensors": ("model", _safetensors_wide),
    "lie.json": ("recipe", _deep_json),
    "large.csv": ("srf", _large_csv),
    "binary.csv": ("srf", _binary_csv),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(place: Path, reader: Reader, name: str) -> None:
    kind, make = LIES[name]
    path = place / name
    make(path)
    try:
        answer = reader.read(kind, path)
        judge(answer, path)
        assert "error" in answer, "a terabyte was believed"
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hdf5_group(path: Path, count: int) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["cube"] = np.ones((3, 6, 5), "f4")
        file.create_dataset("wavelengths", (count,), "f8", chunks=(1000,), fillvalue=500)


@pytest.mark.parametrize(("name", "make"), [("long.zarr", _zarr_group), ("long.mat", _hdf5_group)])
def test_a_list_of_wavelengths_that_takes_gigabytes(
    place: Path, reader: Reader, name: str, make: Callable[[Path, int], None]
) -> None:
    """It is no list of this cube's, so it is left where it is."""
    make(place / name, 400_000_000)
    answer = reader.read("cube", place / name)
    judge(answer, place / name)
    assert answer["bytes"] == 3 * 6 * 5 * 4


class Code:
    """What a pickle would run."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("kind", ["cube", "model"])
@pytest.mark.parametrize("name", ["code.npy", "code.npz", "code.mat", "code.safetensors"])
def test_nothing_is_unpickled(place: Path, reader: Reader, kind: str, name: str) -> None:
    path = place / name
    if name.endswith("npy"):
        np.save(path, np.array([[[Code()]]]), allow_pickle=True)
    elif name.endswith("npz"):
        np.savez(path, x=np.array([[[Code()]]]))
    else:
        torch.save(Code(), path)
    answer = reader.read(kind, path)
    judge(answer, path)
    assert "error" in answer


@pytest.mark.parametrize("place_of_code", ["compressor", "filters"])
@pytest.mark.parametrize("kind", ["cube", "open"])
@pytest.mark.parametrize("dtype", ["|O", "<f4"])
@pytest.mark.parametrize("name", ["cube", "wavelengths"])
def test_no_chunk_is_unpickled(
    place: Path, reader: Reader, place_of_code: str, kind: str, dtype: str, name: str
) -> None:
    """Stores of format 2 name their codecs, and one of those unpickles what it gets."""
    path = place / "code.zarr"
    path.mkdir()
    codec, text = {"id": "pickle"}, {"id": "vlen-utf8"}
    codecs = {"compressor": codec, "filters": [text]}
    if place_of_code == "filters":
        codecs = {"compressor": None, "filters": [text, codec]}
    if dtype == "<f4":
        codecs = {"compressor": None, "filters": None} | {
            place_of_code: codec if place_of_code == "compressor" else [codec]
        }
    try:
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        _zarr_format_2(path / "cube", compressor=None, filters=None)
        if name == "cube":
            shutil.rmtree(path / "cube")
        _zarr_format_2(path / name, **codecs)
        file = path / name / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
        (path / name / "0.0.0").write_bytes(pickle.dumps(Code()))
        answer = reader.read(kind, path)
        judge(answer, path)
        assert "error" in answer or name != "cube"
    finally:
        shutil.rmtree(path)


def test_a_codec_that_unpickles_is_refused_before_it_is_asked() -> None:
    """Newer versions of numcodecs refuse as well; here nobody relies on that."""
    from types import SimpleNamespace

    from fastfusion.data.formats.zarr_store import _decodable

    codec = SimpleNamespace(codec_id="pickle")
    for compressor, filters in ((codec, None), (None, (codec,))):
        metadata = SimpleNamespace(zarr_format=2, compressor=compressor, filters=filters)
        with pytest.raises(ValueError, match="its chunks are pickles, which are never read"):
            _decodable(SimpleNamespace(metadata=metadata))


def test_names_inside_a_file_lead_nowhere(place: Path, reader: Reader) -> None:
    """Members of archives and links of HDF5 that point out of the folder."""
    import zipfile

    secret = place.parent / "secret.npy"
    np.save(secret, np.ones((3, 4, 5)))
    with zipfile.ZipFile(place / "outside.npz", "w") as archive:
        archive.write(secret, "../../secret.npy")
    reader_answer = reader.read("cube", place / "outside.npz")
    judge(reader_answer, place / "outside.npz")
    assert not (place.parent.parent / "secret.npy").exists()
    h5py = pytest.importorskip("h5py")
    with h5py.File(place.parent / "secret.h5", "w") as file:
        file["x"] = np.ones((3, 4, 5))
    with h5py.File(place / "link.mat", "w") as file:
        file["x"] = h5py.ExternalLink("../secret.h5", "x")
    answer = reader.read("cube", place / "link.mat")
    judge(answer, place / "link.mat")
    assert "error" in answer, "another file was read"
    (place / "raw").write_bytes(bytes(240))
    with h5py.File(place / "outside.mat", "w") as file:
        file.create_dataset("x", (3, 4, 5), "f4", external=[(str(place / "raw"), 0, 240)])
    answer = reader.read("cube", place / "outside.mat")
    judge(answer, place / "outside.mat")
    assert "error" in answer, "another file was read"
