"""Every format gives back what was written, and bad files give one clear error."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastfusion.data import Cube, open_cube, read_cube, write_cube
from fastfusion.data.formats import matlab

for library in ("h5py", "PIL", "spectral", "rasterio", "zarr"):
    pytest.importorskip(library, reason="the readers need the extra [io]")

NAMES = ["cube.mat", "cube.npy", "cube.npz", "cube.hdr", "cube.tif", "cube.zarr", "cube"]
EXACT = [name for name in NAMES if name != "cube"]  # PNG holds 16 bits
SHAPE = (7, 10, 12)


def make_cube(dtype="float32", shape=SHAPE, **options):
    values = np.random.default_rng(0).random(shape)
    if np.dtype(dtype).kind != "f":
        values = values * np.iinfo(dtype).max
    return Cube(values.astype(dtype), np.linspace(410.5, 705.25, shape[0]), **options)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# ------------------------------------------------------------------------------------------------
# The cube
# ------------------------------------------------------------------------------------------------


class TestCube:
    @pytest.mark.parametrize(
        ("data", "error", "words"),
        [
            ([[[1.0]]], TypeError, "NumPy array, got list"),
            (np.zeros((4, 5)), ValueError, r"three axes.*\(4, 5\)"),
            (np.zeros((4, 0, 5)), ValueError, "empty"),
            (np.zeros((4, 5, 6), complex), ValueError, "complex128"),
            (np.zeros((4, 5, 6), object), ValueError, "object"),
            (np.zeros((4, 5, 6), bool), ValueError, "bool"),
            (np.full((4, 5, 6), "a"), ValueError, "<U1"),
        ],
    )
    def test_refuses_what_is_no_cube(self, data, error, words):
        with pytest.raises(error, match=words):
            Cube(data)

    @pytest.mark.parametrize("wavelengths", [[400, 500], [[400, 500, 600]], [400, np.nan, 600]])
    def test_refuses_wavelengths_that_do_not_fit(self, wavelengths):
        with pytest.raises(ValueError, match="wavelengths"):
            Cube(np.zeros((3, 2, 2)), wavelengths)

    def test_check_finite_says_how_many_and_where(self):
        cube = make_cube()
        cube.check_finite()
        cube.data[2, 3, 4:6] = np.nan
        cube.data[5, 0, 0] = -np.inf
        with pytest.raises(
            ValueError, match=r"lr_hsi holds 3 values.*first at band 2, row 3, column 4"
        ):
            cube.check_finite("lr_hsi")

    def test_check_finite_reads_a_cube_on_disk(self, tmp_path):
        cube = make_cube()
        cube.data[-1, -1, -1] = np.nan
        write_cube(tmp_path / "cube.zarr", cube)
        with pytest.raises(ValueError, match="1 values"):
            open_cube(tmp_path / "cube.zarr").check_finite()

    def test_normalized_is_undone_by_restored(self):
        counts = make_cube("uint16")
        unit = counts.normalized()
        assert unit.data.dtype == np.float32
        assert unit.data.max() == 1
        assert unit.metadata["peak"] == counts.data.max()
        np.testing.assert_allclose(unit.restored().data, counts.data, rtol=1e-6)
        assert "peak" not in unit.restored().metadata
        assert counts.restored() is counts

    def test_normalized_twice_is_undone_once(self):
        cube = make_cube()
        twice = cube.normalized(4).normalized(0.5)
        np.testing.assert_allclose(twice.restored().data, cube.data, rtol=1e-6)

    def test_normalized_leaves_missing_values_out_of_the_peak(self):
        cube = make_cube()
        cube.data[0, 0, 0], cube.data[1, 1, 1] = np.nan, np.inf
        finite = cube.data[np.isfinite(cube.data)]
        assert cube.normalized().metadata["peak"] == finite.max()

    @pytest.mark.parametrize("peak", [0, -1, np.nan, np.inf])
    def test_normalized_refuses_a_useless_peak(self, peak):
        with pytest.raises(ValueError, match="peak must be positive"):
            make_cube().normalized(peak)

    def test_normalized_refuses_an_all_dark_cube(self):
        with pytest.raises(ValueError, match="peak must be positive"):
            Cube(np.zeros((2, 3, 4))).normalized()


# ------------------------------------------------------------------------------------------------
# Round trips
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"]
)
def test_values_come_back_as_they_were(tmp_path, name, dtype):
    cube = make_cube(dtype)
    write_cube(tmp_path / name, cube)
    back = read_cube(tmp_path / name, dtype=None)
    np.testing.assert_array_equal(back.data, cube.data)
    if dtype != "float16":
        assert back.data.dtype == cube.data.dtype
    assert back.data.flags.c_contiguous and back.data.flags.writeable


@pytest.mark.parametrize("name", NAMES)
def test_wavelengths_come_back_where_the_format_holds_them(tmp_path, name):
    cube = make_cube()
    write_cube(tmp_path / name, cube)
    back = read_cube(tmp_path / name)
    if name == "cube.npy":
        assert back.wavelengths is None
    else:
        np.testing.assert_allclose(back.wavelengths, cube.wavelengths, rtol=1e-12)
    assert back.metadata["source"] == str(tmp_path / name)


@pytest.mark.parametrize("name", EXACT)
def test_a_cube_without_wavelengths_and_with_nan(tmp_path, name):
    cube = Cube(make_cube().data)
    cube.data[1, 2, 3] = np.nan
    write_cube(tmp_path / name, cube)
    back = read_cube(tmp_path / name)
    np.testing.assert_array_equal(back.data, cube.data)
    assert back.wavelengths is None


@pytest.mark.parametrize("name", NAMES)
def test_a_single_pixel_and_a_single_band(tmp_path, name):
    for shape in [(1, 5, 6), (5, 1, 1), (1, 1, 1)]:
        cube = make_cube(shape=shape)
        write_cube(tmp_path / name, cube)
        back = read_cube(tmp_path / name, **({"bands_axis": 0} if name == "cube.npy" else {}))
        np.testing.assert_allclose(back.data, cube.data, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_strided_and_byte_swapped_arrays_are_good_input(tmp_path, name):
    base = make_cube("float64", shape=(12, 10, 14)).data
    view = base.astype(">f8").transpose(2, 0, 1)[::2, ::-1]
    write_cube(tmp_path / name, Cube(view))
    back = read_cube(tmp_path / name, dtype=None, bands_axis=None if name != "cube.npy" else 0)
    np.testing.assert_array_equal(back.data, view)
    assert back.data.dtype == np.float64


@pytest.mark.parametrize("name", NAMES)
def test_integers_stay_counts_except_in_png(tmp_path, name):
    cube = make_cube("uint16")
    write_cube(tmp_path / name, cube)
    expected = cube.data.astype(np.float32)
    if name == "cube":
        np.testing.assert_array_equal(read_cube(tmp_path / name).data, expected / 65535)
    else:
        np.testing.assert_array_equal(read_cube(tmp_path / name).data, expected)
    np.testing.assert_array_equal(read_cube(tmp_path / name, scale=None).data, expected)
    np.testing.assert_array_equal(read_cube(tmp_path / name, scale=1000).data, expected / 1000)
    wide = read_cube(tmp_path / name, scale=1000, dtype="float64").data
    np.testing.assert_array_equal(wide, cube.data / 1000)


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_output_is_replaced(tmp_path, name):
    write_cube(tmp_path / name, make_cube(shape=(9, 6, 8)))
    write_cube(tmp_path / name, make_cube())
    assert read_cube(tmp_path / name).shape == SHAPE
    assert names(tmp_path) == (["cube.hdr", "cube.img"] if name == "cube.hdr" else [name])


@pytest.mark.parametrize("name", ["cube.npy", "cube.hdr", "cube.zarr"])
def test_open_cube_leaves_the_values_on_the_disk(tmp_path, name):
    cube = make_cube("uint16", shape=(3, 300, 200))
    write_cube(tmp_path / name, cube)
    lazy = open_cube(tmp_path / name)
    assert type(lazy.data) is not np.ndarray
    assert lazy.shape == cube.shape
    np.testing.assert_array_equal(lazy.data[1:, 120:140, 5], cube.data[1:, 120:140, 5])
    for copy in ("copy.zarr", "copy.hdr", "copy.tif", "copy.mat", "copy.npz", "copy"):
        write_cube(tmp_path / copy, lazy)
        np.testing.assert_array_equal(read_cube(tmp_path / copy, scale=None).data, cube.data)


def test_open_cube_says_what_it_cannot(tmp_path):
    write_cube(tmp_path / "cube.mat", make_cube())
    with pytest.raises(ValueError, match=r"cube\.mat.*use read_cube"):
        open_cube(tmp_path / "cube.mat")
    write_cube(tmp_path / "cube.zarr", make_cube())
    with pytest.raises(ValueError, match="bands must come first"):
        open_cube(tmp_path / "cube.zarr", bands_axis=2)


# ------------------------------------------------------------------------------------------------
# Which array, which axis
# ------------------------------------------------------------------------------------------------


def save_arrays(path, arrays):
    import scipy.io

    scipy.io.savemat(path, arrays) if path.suffix == ".mat" else np.savez(path, **arrays)


@pytest.mark.parametrize("suffix", [".mat", ".npz"])
class TestChoices:
    def test_the_only_cube_is_taken(self, tmp_path, suffix):
        data = make_cube().data
        save_arrays(tmp_path / f"a{suffix}", {"gt": data, "map": data[0], "name": "x"})
        back = read_cube(tmp_path / f"a{suffix}", bands_axis=0)
        assert back.metadata["variable"] == "gt"
        np.testing.assert_array_equal(back.data, data)

    def test_several_cubes_are_listed(self, tmp_path, suffix):
        data = make_cube().data
        save_arrays(tmp_path / f"a{suffix}", {"HSI": data, "MSI": data[:3], "map": data[0]})
        with pytest.raises(ValueError, match=r"variable=.*HSI \(7, 10, 12\).*MSI \(3, 10, 12\)"):
            read_cube(tmp_path / f"a{suffix}")
        assert read_cube(tmp_path / f"a{suffix}", variable="MSI", bands_axis=0).bands == 3

    def test_an_unknown_name_lists_what_is_there(self, tmp_path, suffix):
        save_arrays(tmp_path / f"a{suffix}", {"HSI": make_cube().data})
        with pytest.raises(ValueError, match=r"no array 'hsi'.*HSI \(7, 10, 12\)"):
            read_cube(tmp_path / f"a{suffix}", variable="hsi")

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.zeros((4, 5)), "three axes"),
            (np.zeros((4, 5, 6, 7)), "three axes"),
            (np.zeros((4, 5, 6), complex), "complex128"),
            (np.full((4, 5), "text"), "three axes"),
        ],
    )
    def test_what_is_no_cube_is_refused(self, tmp_path, suffix, array, words):
        save_arrays(tmp_path / f"a{suffix}", {"x": array})
        with pytest.raises(ValueError, match=rf"a\{suffix}: .*{words}"):
            read_cube(tmp_path / f"a{suffix}")

    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    def test_the_axis_may_be_told(self, tmp_path, suffix, axis):
        data = make_cube().data
        save_arrays(tmp_path / f"a{suffix}", {"x": np.moveaxis(data, 0, axis)})
        back = read_cube(tmp_path / f"a{suffix}", bands_axis=axis)
        np.testing.assert_array_equal(back.data, data)
        assert back.metadata["bands_axis"] == axis % 3

    def test_wavelengths_beside_it_tell_the_axis(self, tmp_path, suffix):
        cube = make_cube()
        for axis in range(3):
            arrays = {"x": np.moveaxis(cube.data, 0, axis), "wavelength": cube.wavelengths / 1000}
            save_arrays(tmp_path / f"a{suffix}", arrays)
            back = read_cube(tmp_path / f"a{suffix}")
            np.testing.assert_array_equal(back.data, cube.data)
            np.testing.assert_allclose(back.wavelengths, cube.wavelengths)

    def test_wavelengths_of_another_sensor_are_left_out(self, tmp_path, suffix):
        save_arrays(tmp_path / f"a{suffix}", {"x": np.zeros(SHAPE), "wl": np.arange(400, 490)})
        assert read_cube(tmp_path / f"a{suffix}").wavelengths is None


@pytest.mark.parametrize(
    ("name", "shape", "bands"),
    [
        ("a.npy", (128, 24, 24), 128),  # a small image with many bands
        ("a.npy", (31, 40, 50), 31),
        ("a.npy", (31, 31, 31), 31),
        ("a.mat", (24, 24, 128), 128),
        ("a.mat", (72, 58, 128), 128),
        ("a.npy", (512, 512, 31), None),  # written bands last
        ("a.mat", (31, 512, 512), None),  # written bands first
        ("a.npy", (31, 24, 31), None),
    ],
)
def test_the_convention_of_the_format_and_where_the_shape_speaks_against_it(
    tmp_path, name, shape, bands
):
    data = np.zeros(shape, np.uint8)
    np.save(tmp_path / name, data) if name == "a.npy" else save_arrays(tmp_path / name, {"x": data})
    if bands is None:
        with pytest.raises(ValueError, match="bands_axis="):
            read_cube(tmp_path / name)
    else:
        assert read_cube(tmp_path / name).bands == bands


def test_an_axis_that_is_none(tmp_path):
    write_cube(tmp_path / "a.npy", make_cube())
    with pytest.raises(ValueError, match="bands_axis must be from -3 to 2"):
        read_cube(tmp_path / "a.npy", bands_axis=3)


@pytest.mark.parametrize("name", ["cube.hdr", "cube.tif", "cube"])
@pytest.mark.parametrize("option", [{"variable": "x"}, {"bands_axis": 0}])
def test_options_that_a_format_has_no_use_for(tmp_path, name, option):
    write_cube(tmp_path / name, make_cube())
    with pytest.raises(ValueError, match="leave variable="):
        read_cube(tmp_path / name, **option)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "uint8"}, ValueError),
        ({"scale": 0}, ValueError),
        ({"scale": float("nan")}, ValueError),
        ({"scale": "peak"}, TypeError),
        ({"scale": True}, TypeError),
        ({"scale": 2.0, "dtype": None}, ValueError),
    ],
)
def test_options_are_checked_before_the_file(options, error):
    with pytest.raises(error, match=r"scale|dtype"):
        read_cube("absent.npy", **options)


# ------------------------------------------------------------------------------------------------
# MATLAB v7.3
# ------------------------------------------------------------------------------------------------


def test_v73_as_matlab_lays_it_out(tmp_path):
    """MATLAB's (rows, columns, bands) is (bands, columns, rows) in HDF5."""
    h5py = pytest.importorskip("h5py")
    cube = make_cube("float64")
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["Z"] = cube.data.transpose(0, 2, 1)
        file["Z"].attrs["MATLAB_class"] = np.bytes_("double")
        file["title"] = np.zeros((5, 1, 1), np.uint16)  # a char array is stored as numbers
        file["title"].attrs["MATLAB_class"] = np.bytes_("char")
        file["wavelengths"] = cube.wavelengths[:, None]
        file.create_group("#refs#")["a"] = np.zeros((2, 3, 4))
    back = read_cube(tmp_path / "a.mat", dtype="float64")
    np.testing.assert_array_equal(back.data, cube.data)
    np.testing.assert_array_equal(back.wavelengths, cube.wavelengths)
    assert back.metadata["bands_axis"] == 2


def test_v73_is_written_where_v5_is_too_small(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(matlab, "LARGEST_V5_BYTES", 100)
    cube = make_cube("uint16")
    write_cube(tmp_path / "a.mat", cube)
    back = read_cube(tmp_path / "a.mat", dtype=None)
    np.testing.assert_array_equal(back.data, cube.data)
    np.testing.assert_array_equal(back.wavelengths, cube.wavelengths)
    header = (tmp_path / "a.mat").read_bytes()[:128]
    assert header.startswith(b"MATLAB 7.3 MAT-file") and header.endswith(b"\x00\x02IM")
    with h5py.File(tmp_path / "a.mat") as file:
        assert file["data"].shape == (7, 12, 10)
        assert file["data"].attrs["MATLAB_class"] == b"uint16"
        assert file["wavelengths"].attrs["MATLAB_class"] == b"double"


# ------------------------------------------------------------------------------------------------
# ENVI
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_envi_written_by_another_library(tmp_path, interleave, order):
    envi = pytest.importorskip("spectral.io.envi")
    cube = make_cube("int16")
    envi.save_image(
        str(tmp_path / "a.hdr"),
        np.moveaxis(cube.data, 0, -1),
        interleave=interleave,
        byteorder="little" if order == "<" else "big",
        ext=".dat",
        metadata={
            "wavelength": (cube.wavelengths / 1000).tolist(),
            "wavelength units": "Micrometers",
            "fwhm": [0.01] * 7,
            "map info": ["UTM", "1", "1", "5000", "6000", "30", "30", "31", "North"],
        },
    )
    back = read_cube(tmp_path / "a.hdr", dtype=None)
    np.testing.assert_array_equal(back.data, cube.data)
    np.testing.assert_allclose(back.wavelengths, cube.wavelengths)
    np.testing.assert_allclose(back.metadata["fwhm"], [10] * 7)

    write_cube(tmp_path / "b.hdr", back)  # the rest of the header and the interleave go on
    again = read_cube(tmp_path / "b.hdr", dtype=None)
    np.testing.assert_array_equal(again.data, cube.data)
    np.testing.assert_allclose(again.wavelengths, cube.wavelengths)
    assert f"interleave = {interleave}" in (tmp_path / "b.hdr").read_text()
    assert again.metadata["envi"]["map info"][3] == "5000"
    assert again.metadata["fwhm"] == back.metadata["fwhm"]


def write_envi(folder, values, **fields):
    """A header and raw bytes, by hand."""
    bands, lines, samples = values.shape
    header = {
        "samples": samples,
        "lines": lines,
        "bands": bands,
        "header offset": 0,
        "data type": {"uint8": 1, "int16": 2, "float32": 4}[values.dtype.name],
        "interleave": "bsq",
        "byte order": 0,
    }
    text = "".join(
        f"{key} = {value}\n" for key, value in {**header, **fields}.items() if value != ""
    )
    (folder / "a.hdr").write_text("ENVI\n" + text)
    (folder / "a.img").write_bytes(values.tobytes())
    return folder / "a.hdr"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"wavelength": "{450, 550, 650}", "wavelength units": "Nanometers"}, [450, 550, 650]),
        ({"wavelength": "{450, 550, 650}"}, [450, 550, 650]),
        ({"wavelength": "{.45, .55, .65}", "wavelength units": "Unknown"}, [450, 550, 650]),
        ({"wavelength": "{.45, .55, .65}", "wavelength units": "um"}, [450, 550, 650]),
        ({"wavelength": "{1, 2, 3}", "wavelength units": "Index"}, None),
        ({"wavelength": "{450, 550}"}, None),
        ({"wavelength": "{a, b, c}"}, None),
    ],
)
def test_envi_units_of_wavelengths(tmp_path, field, expected):
    back = read_cube(write_envi(tmp_path, np.zeros((3, 2, 4), np.uint8), **field)).wavelengths
    assert (back is None) if expected is None else np.allclose(back, expected)


def test_envi_scale_factor_and_missing_values(tmp_path):
    counts = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 100
    counts[1, 2, 3] = -9999
    fields = {"reflectance scale factor": 10000, "data ignore value": -9999}
    path = write_envi(tmp_path, counts, **fields)
    back = read_cube(path)
    assert np.isnan(back.data[1, 2, 3])
    assert np.isnan(back.data).sum() == 1
    np.testing.assert_allclose(back.data[0], counts[0] / 10000, rtol=1e-6)
    np.testing.assert_array_equal(read_cube(path, dtype=None).data, counts)
    write_cube(tmp_path / "b.hdr", back)  # reflectance now: it must not be divided again
    np.testing.assert_array_equal(read_cube(tmp_path / "b.hdr").data, back.data)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bands": 5}, "can hold only 24: it is truncated, or its header is wrong"),
        ({"lines": 10**12, "samples": 10**12}, "can hold only"),
        ({"header offset": 4}, "can hold only 20"),
        ({"header offset": -4}, "positive"),
        ({"bands": 0}, "positive"),
        ({"lines": -3}, "positive"),
        ({"data type": 5}, "can hold only"),
        ({"data type": 6, "bands": 1, "lines": 1, "samples": 3}, "complex64"),
        ({"data type": 77}, "77"),
        ({"interleave": "bzip"}, "interleave must be"),
        ({"byte order": ""}, "byte order"),
        ({"lines": "many"}, "many"),
        ({"file type": "ENVI Spectral Library"}, "spectral library"),
        ({"file compression": 1}, "compressed"),
        ({"reflectance scale factor": 0}, "scale factor"),
    ],
)
def test_envi_headers_that_lie(tmp_path, fields, words):
    path = write_envi(tmp_path, np.zeros((2, 3, 4), np.uint8), **fields)
    with pytest.raises(ValueError, match=rf"a\.hdr: .*({words})"):
        read_cube(path)


def test_envi_without_its_data(tmp_path):
    path = write_envi(tmp_path, np.zeros((2, 3, 4), np.uint8))
    (tmp_path / "a.img").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.hdr: no data file"):
        read_cube(path)


# ------------------------------------------------------------------------------------------------
# GeoTIFF
# ------------------------------------------------------------------------------------------------


def test_geotiff_keeps_its_place_on_earth(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.Affine(30, 0, 450000, 0, -30, 5400000)
    cube = make_cube()
    place = {"driver": "GTiff", "count": 7, "height": 10, "width": 12, "dtype": "float32"}
    with rasterio.open(
        tmp_path / "a.tif", "w", crs="EPSG:32631", transform=transform, **place
    ) as image:
        image.write(cube.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_cube(tmp_path / "b.tif", read_cube(tmp_path / "a.tif"))
    with rasterio.open(tmp_path / "b.tif") as image:
        assert image.crs.to_epsg() == 32631
        assert image.transform == transform
        np.testing.assert_array_equal(image.read(), cube.data)


def test_geotiff_without_a_place_reads_and_writes_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_cube(tmp_path / "a.tif", make_cube())
        assert "transform" not in read_cube(tmp_path / "a.tif").metadata


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_geotiff_scale_offset_and_missing_values(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    counts = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) * 100
    place = {"driver": "GTiff", "count": 2, "height": 3, "width": 4, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", nodata=0, **place) as image:
        image.write(counts)
        image.scales, image.offsets = (1e-4, 2e-4), (0, -0.1)
    back = read_cube(tmp_path / "a.tif").data
    assert np.isnan(back[0, 0, 0]) and np.isnan(back).sum() == 1
    np.testing.assert_allclose(back[1], counts[1] * 2e-4 - 0.1, atol=1e-7)
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif", dtype=None).data, counts)


# ------------------------------------------------------------------------------------------------
# A folder of PNGs
# ------------------------------------------------------------------------------------------------


def write_pngs(folder, values, name="x_ms_{}.png"):
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number, band in enumerate(values, 1):
        Image.fromarray(band).save(folder / name.format(number))
    return folder


def test_png_bands_are_ordered_by_number(tmp_path):
    values = make_cube("uint16", shape=(31, 4, 5)).data
    folder = write_pngs(tmp_path / "x_ms", values)  # x_ms_10 sorts before x_ms_2
    (folder / "x_RGB.bmp").write_bytes(b"not a band")
    cube = read_cube(folder)
    np.testing.assert_array_equal(cube.data, values.astype(np.float32) / np.float32(65535))
    np.testing.assert_array_equal(cube.wavelengths, np.arange(400, 701, 10))


def test_png_folder_as_the_published_archive_unpacks(tmp_path):
    (tmp_path / "x_ms").mkdir()
    write_pngs(tmp_path / "x_ms" / "x_ms", make_cube("uint8").data)
    assert read_cube(tmp_path / "x_ms", scale=None).shape == SHAPE


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "x_ms_3.png").unlink(), "band 3 is missing"),
        (lambda f: (f / "x_ms_3.png").rename(f / "cover.png"), "no band number"),
        (lambda f: (f / "y_3.png").write_bytes(b""), "both band 3"),
        (lambda f: (f / "x_ms_3.png").write_bytes(b""), "cannot identify"),
        (lambda f: write_pngs(f, [np.zeros((4, 4), np.uint8)]), r"first band is \(4, 4\)"),
        (lambda f: write_pngs(f, [np.zeros((10, 12, 3), np.uint8)]), "RGB, not grey"),
        (lambda f: [entry.unlink() for entry in f.iterdir()], "no .png file"),
    ],
)
def test_png_folders_that_are_not_whole(tmp_path, damage, words):
    folder = write_pngs(tmp_path / "x", make_cube("uint16").data)
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_cube(folder)


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan, np.inf])
def test_png_refuses_what_it_cannot_hold(tmp_path, value):
    cube = make_cube()
    cube.data[3, 0, 0] = value
    with pytest.raises(ValueError, match=r"\[0, 1\], band 3"):
        write_cube(tmp_path / "x", cube)
    with pytest.raises(ValueError, match="got int32"):
        write_cube(tmp_path / "x", make_cube("int32"))
    assert names(tmp_path) == []


def test_png_does_not_replace_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="other things"):
        write_cube(tmp_path / "thesis", make_cube())
    assert names(tmp_path / "thesis") == ["thesis.tex"]


# ------------------------------------------------------------------------------------------------
# zarr
# ------------------------------------------------------------------------------------------------


def test_zarr_keeps_what_json_can_hold(tmp_path):
    metadata = {"crs": "EPSG:32631", "peak": 1.5, "source": "elsewhere", "function": len}
    write_cube(tmp_path / "a.zarr", make_cube(metadata=metadata))
    back = read_cube(tmp_path / "a.zarr").metadata
    assert back["crs"] == "EPSG:32631" and back["peak"] == 1.5
    assert back["source"] == str(tmp_path / "a.zarr") and "function" not in back


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_groups_of_other_libraries(tmp_path, version):
    zarr = pytest.importorskip("zarr")
    cube = make_cube()
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    for name, values in [("hsi", cube.data), ("wavelength", cube.wavelengths)]:
        group.create_array(name, data=values)
    back = read_cube(tmp_path / "a.zarr")
    np.testing.assert_array_equal(back.data, cube.data)
    np.testing.assert_array_equal(back.wavelengths, cube.wavelengths)
    group.create_array("msi", data=cube.data[:2])
    with pytest.raises(ValueError, match=r"variable=.*hsi \(7, 10, 12\)"):
        read_cube(tmp_path / "a.zarr")


def test_zarr_that_lost_a_chunk(tmp_path):
    write_cube(tmp_path / "a.zarr", make_cube(shape=(2, 200, 130)))
    (tmp_path / "a.zarr" / "c" / "0" / "1" / "1").unlink()
    with pytest.raises(ValueError, match="3 of its 4 chunks"):
        read_cube(tmp_path / "a.zarr")


# ------------------------------------------------------------------------------------------------
# Bad files
# ------------------------------------------------------------------------------------------------


def test_absent_files_and_unknown_suffixes(tmp_path):
    for name in (*NAMES, "cube.xyz"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_cube(tmp_path / name)
    (tmp_path / "cube.xyz").write_bytes(b"")
    (tmp_path / "cube.zarr").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'\.xyz' is not one of \.mat, \.npy"):
        read_cube(tmp_path / "cube.xyz")
    with pytest.raises(ValueError, match=r"'\.xyz' is not one of \.mat, \.npy"):
        write_cube(tmp_path / "out.xyz", make_cube())
    with pytest.raises(ValueError, match=r"cube\.zarr: it is not a zarr store"):
        read_cube(tmp_path / "cube.zarr")


@pytest.mark.parametrize("name", NAMES)
def test_an_output_is_checked_before_the_work(tmp_path, name, monkeypatch):
    from fastfusion.data import check_output

    check_output(tmp_path / name)
    assert names(tmp_path) == []
    write_cube(tmp_path / name, make_cube())
    check_output(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="make it first"):
        check_output(tmp_path / "absent" / name)
    taken = tmp_path / "taken" / name
    taken.mkdir(parents=True)
    (taken / "thesis.tex").write_bytes(b"")
    with pytest.raises(FileExistsError, match="name a"):
        check_output(taken)
    library = {"cube.hdr": "spectral", "cube.tif": "rasterio", "cube": "PIL", "cube.zarr": "zarr"}
    if name in library:
        monkeypatch.setitem(sys.modules, library[name], None)
        with pytest.raises(ImportError, match=rf"needs {library[name]}.*fastfusion\[io\]"):
            check_output(tmp_path / name)
    with pytest.raises(ValueError, match=r"'\.xyz' is not one of"):
        check_output(tmp_path / "cube.xyz")


def test_only_cubes_are_written(tmp_path):
    with pytest.raises(TypeError, match="got ndarray"):
        write_cube(tmp_path / "a.npy", np.zeros(SHAPE))


@pytest.mark.parametrize("name", [name for name in NAMES if "." in name and name != "cube.zarr"])
def test_a_file_of_another_format_under_this_name(tmp_path, name):
    for content in (b"", b"some text\n" * 100, pickle.dumps({"x": 1}), bytes(3000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot read"):
            read_cube(tmp_path / name)


class Explosive:
    """Unpickling it would say so."""

    def __reduce__(self):
        return (os.mkdir, (str(Explosive.trace),))


@pytest.mark.parametrize("name", ["cube.npy", "cube.npz"])
def test_pickles_are_never_opened(tmp_path, name):
    Explosive.trace = tmp_path / "exploded"
    array = np.array([[[Explosive()]]], object)
    if name == "cube.npy":
        np.save(tmp_path / name, array, allow_pickle=True)
    else:
        np.savez(tmp_path / name, x=array)
    with pytest.raises(ValueError, match=r"object|three axes"):
        read_cube(tmp_path / name)
    assert not Explosive.trace.exists()


@pytest.mark.parametrize("name", [*NAMES, "v73.mat"])
def test_truncated_files(tmp_path, name, monkeypatch):
    if name == "v73.mat":
        monkeypatch.setattr(matlab, "LARGEST_V5_BYTES", 0)
    cube = make_cube()
    write_cube(tmp_path / name, cube)
    victim = {
        "cube.hdr": tmp_path / "cube.img",
        "cube.zarr": tmp_path / "cube.zarr" / "c" / "0" / "0" / "0",
        "cube": tmp_path / "cube" / "cube_04.png",
    }.get(name, tmp_path / name)
    whole = victim.read_bytes()
    for share in (0.0, 0.02, 0.5, 0.97):
        victim.write_bytes(whole[: int(len(whole) * share)])
        if share > 0.9 and name in ("cube", "cube.tif"):  # only what follows the values is cut
            np.testing.assert_allclose(read_cube(tmp_path / name).data, cube.data, atol=1e-5)
            continue
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            read_cube(tmp_path / name)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_v5_tag_that_would_crash_the_reader(tmp_path, compressed):
    """scipy takes the type of an array's values for an index, unchecked, in compiled code."""
    import struct
    import zlib

    import scipy.io

    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"x": np.zeros((2, 3, 4), np.float32), "z": np.ones((2, 2), complex)})
    assert read_cube(path, bands_axis=0).metadata["variable"] == "x"
    with pytest.raises(ValueError, match="'z' is complex"):
        read_cube(path, variable="z")
    whole = path.read_bytes()
    position = whole.index(struct.pack("<II", 7, 96))  # 24 singles
    for kind, length in [(255, 96), (7, 4), (9, 96), (7, 2**31)]:
        mutated = bytearray(whole)
        mutated[position : position + 8] = struct.pack("<II", kind, length)
        if compressed:
            size = 8 + struct.unpack_from("<I", whole, 132)[0]
            packed = zlib.compress(bytes(mutated[128 : 128 + size]))
            mutated = mutated[:128] + struct.pack("<II", 15, len(packed)) + packed
        path.write_bytes(mutated)
        with pytest.raises(ValueError, match=r"a\.mat: it is damaged: 'x' is said to be"):
            read_cube(path)


def test_a_npz_that_claims_more_than_it_holds(tmp_path):
    """The header of a member says 8 TB; nothing may be allocated for it."""
    import io
    import zipfile

    header = io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": (10**4, 10**4, 10**4)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match="8000000000000 bytes"):
        read_cube(tmp_path / "a.npz")


FUZZED = ["cube.npy", "cube.npz", "cube.mat", "cube.hdr", "cube"]


@pytest.mark.parametrize("name", FUZZED)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_mutated_files_raise_only_what_is_documented(tmp_path_factory, name, data):
    place = fuzzed_original(tmp_path_factory, name)
    victim = place / "cube" / "cube_02.png" if name == "cube" else place / name
    whole = (place / "original").read_bytes()
    reach = min(len(whole), 400) - 1  # headers are at the start
    changes = data.draw(
        st.lists(st.tuples(st.integers(0, reach), st.integers(0, 255)), min_size=1, max_size=6)
    )
    mutated = bytearray(whole)
    for position, value in changes:
        mutated[position] = value
    victim.write_bytes(mutated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cube = read_cube(place / name)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and name in str(error)
        else:
            assert cube.data.nbytes < 2**20  # what a lying header promised was not allocated


_originals: dict[str, Path] = {}


def fuzzed_original(factory, name):
    """A folder with a small cube and a copy of the bytes that are mutated, made once."""
    if name not in _originals:
        place = factory.mktemp("fuzz")
        write_cube(place / name, make_cube(shape=(3, 4, 5)))
        victim = place / "cube" / "cube_02.png" if name == "cube" else place / name
        (place / "original").write_bytes(victim.read_bytes())
        _originals[name] = place
    return _originals[name]


# ------------------------------------------------------------------------------------------------
# Writing that fails
# ------------------------------------------------------------------------------------------------

FULL_DISK = """
import json, resource, signal, sys
import numpy as np
import h5py, PIL.Image, rasterio, scipy.io, spectral.io.envi, zarr
from fastfusion.data import Cube, write_cube
from fastfusion.data.formats import geotiff, matlab

folder = sys.argv[1]
cube = Cube(np.random.default_rng(0).random((7, 140, 150), np.float32))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # bytes that a file may grow to
outcome = {}
for name in sys.argv[2:]:
    matlab.LARGEST_V5_BYTES = 0 if name == "v73.mat" else 2**31
    if name == "late.tif":  # the disk fills up after the space was asked for, and GDAL says nothing
        geotiff.reserve = lambda path, size: None
        cube = Cube(cube.data[:3, :20, :20])
    try:
        write_cube(f"{folder}/{name}", cube)
        outcome[name] = "written"
    except OSError as error:
        outcome[name] = str(error)
sys.stdout.write(json.dumps(outcome))
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    """The kernel refuses to let files grow: what every library makes of it, in a real process."""
    outputs = [*NAMES, "v73.mat", "late.tif"]
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), *outputs],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout)
    assert list(outcome) == outputs
    for name, message in outcome.items():
        assert f"cannot write {tmp_path / name}: " in message
    assert names(tmp_path) == []


CTRL_C = """
import sys
import numpy as np
import zarr
from fastfusion.data import Cube, write_cube

cube = Cube(np.random.default_rng(0).random((31, 900, 900), np.float32))
try:
    write_cube(sys.argv[1], cube)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_stops_the_threads_of_zarr_too(tmp_path):
    """They would go on and bring the temporary folder back after it was removed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, str(tmp_path / "a.zarr")], stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not any(tmp_path.rglob("c/0/0/*")):
        time.sleep(0.01)  # until it is in the middle, however fast it is
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert names(tmp_path) == ([] if said == "interrupted\n" else ["a.zarr"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_interruption_in_the_middle_leaves_what_was_there(
    tmp_path, name, earlier, error, monkeypatch
):
    cube = make_cube()
    if earlier:
        write_cube(tmp_path / name, cube)
        before = names(tmp_path)

    class Interrupting:
        """An array on disk that raises when the writer comes to the second half of it."""

        shape, dtype = cube.data.shape, cube.data.dtype

        def __getitem__(self, key):
            if isinstance(key, int) and key < 3:
                return cube.data[key]
            raise error

        def __array__(self, *args, **kwargs):
            return cube.data

    def write_a_little(file, *args, **kwargs):
        file.write(b"half")
        raise error

    for function in ("numpy.save", "numpy.savez", "scipy.io.savemat"):  # these take it whole
        monkeypatch.setattr(function, write_a_little)
    with pytest.raises(type(error)):
        write_cube(tmp_path / name, Cube(Interrupting()))
    monkeypatch.undo()
    if earlier:
        assert names(tmp_path) == before
        np.testing.assert_allclose(
            read_cube(tmp_path / name).data, cube.data, atol=1e-5 if name == "cube" else 0
        )
    else:
        assert names(tmp_path) == []


@pytest.mark.parametrize(("name", "victim"), [("a.zarr", "a.zarr/c/0/0/0"), ("a.tif", "a.tif")])
def test_damaged_values_are_told_once_with_the_file(tmp_path, name, victim):
    write_cube(tmp_path / name, Cube(np.random.default_rng(0).random((3, 40, 30))))
    opened = open_cube(tmp_path / name).data
    values = bytearray((tmp_path / victim).read_bytes())
    (tmp_path / victim).write_bytes(values[: len(values) // 2])
    for read in (lambda: opened[:], lambda: read_cube(tmp_path / name)):
        with pytest.raises(ValueError, match=f"^cannot read .*{name}") as told:
            read()
        assert str(told.value).count("cannot read") == 1


def test_an_opened_zarr_store_is_a_sequence_of_bands(tmp_path):
    values = np.random.default_rng(0).random((3, 4, 5))
    write_cube(tmp_path / "a.zarr", Cube(values))
    opened = open_cube(tmp_path / "a.zarr").data
    assert np.array_equal(np.stack(list(opened)), values)
    assert np.array_equal(opened[-1], values[-1])
