"""Scenes by name: layouts, ranges, and the relations that come with the real data."""

from __future__ import annotations

import numpy as np
import pytest

from fastfusion.data import Cube, load_scene, scene_names, write_cube

pytest.importorskip("PIL", reason="the readers need the extra [io]")


def angle(a, b):
    """Mean spectral angle along the first axis, in degrees."""
    cosine = (a * b).sum(0) / np.maximum(
        np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0), 1e-12
    )
    return np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()


def test_the_demo_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFUSION_DATA", str(tmp_path / "absent"))
    scene = load_scene("demo")
    assert scene.reference.shape == (31, 256, 256)
    assert scene.lr_hsi is None and scene.hr_msi is None


def test_any_file_is_a_scene(tmp_path):
    counts = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)
    write_cube(tmp_path / "mine.npy", Cube(counts))
    scene = load_scene(tmp_path / "mine.npy")
    np.testing.assert_allclose(scene.reference.data, counts / 23, rtol=1e-6)
    np.testing.assert_allclose(scene.reference.restored().data, counts, rtol=1e-6)
    reflectance = np.full((2, 3, 4), 0.25, np.float32)
    write_cube(tmp_path / "mine.npy", Cube(reflectance))
    np.testing.assert_array_equal(load_scene(tmp_path / "mine.npy").reference.data, reflectance)


def test_what_cannot_be_found_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFUSION_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"no scene is called 'sponges'.*jasper_ridge"):
        load_scene("sponges")
    with pytest.raises(FileNotFoundError, match=r"mine\.mat does not exist"):
        load_scene("mine.mat")
    for name in scene_names():
        if name != "demo":
            with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*FASTFUSION_DATA"):
                load_scene(name)


def test_nan_is_refused(tmp_path):
    data = np.zeros((2, 3, 4), np.float32)
    data[1, 1, 1] = np.nan
    write_cube(tmp_path / "mine.npy", Cube(data))
    with pytest.raises(ValueError, match=r"mine\.npy holds 1 values"):
        load_scene(tmp_path / "mine.npy")


def test_a_damaged_scene_is_one_clear_error(monkeypatch, tmp_path):
    (tmp_path / "pavia").mkdir()
    (tmp_path / "pavia" / "paviaU_subimg.mat").write_bytes(b"MATLAB 5.0" + bytes(50))
    monkeypatch.setenv("FASTFUSION_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot read .*paviaU_subimg\.mat"):
        load_scene("pavia")


class TestRealScenes:
    @pytest.fixture(autouse=True)
    def folder(self, scenes, monkeypatch):
        monkeypatch.setenv("FASTFUSION_DATA", str(scenes))

    @pytest.mark.parametrize(
        ("name", "reference", "lr_hsi", "hr_msi"),
        [
            ("cave:sponges", (31, 512, 512), None, None),
            ("jasper_ridge", (198, 100, 100), None, None),
            ("samson", (156, 95, 95), None, None),
            ("paris_eo1", (128, 72, 72), None, (9, 72, 72)),
            ("paris_eo1_pan", None, (128, 72, 58), (1, 216, 174)),
            ("tg1", None, (54, 20, 20), (8, 240, 240)),
            ("pavia", (103, 50, 50), None, None),
        ],
    )
    def test_shapes_and_ranges(self, name, reference, lr_hsi, hr_msi):
        scene = load_scene(name)
        assert scene.name == name and scene.terms
        cubes = {"reference": reference, "lr_hsi": lr_hsi, "hr_msi": hr_msi}
        for attribute, shape in cubes.items():
            cube = getattr(scene, attribute)
            assert (None if cube is None else cube.shape) == shape
            if cube is not None:
                assert cube.data.dtype == np.float32
                assert cube.data.min() >= 0 and cube.data.max() <= 1
                assert cube.data.flags.c_contiguous

    def test_cave_is_the_counts_by_65535_in_order_of_bands(self, scenes):
        from PIL import Image

        scene = load_scene("cave:stuffed_toys")
        for band in (1, 2, 10, 31):
            file = scenes / "cave" / "stuffed_toys_ms" / f"stuffed_toys_ms_{band:02d}.png"
            counts = np.array(Image.open(file)).astype(np.float64)
            np.testing.assert_allclose(scene.reference.data[band - 1], counts / 65535, atol=1e-7)
        np.testing.assert_array_equal(scene.reference.wavelengths, np.arange(400, 701, 10))
        assert scene.srf.shape == (3, 31)
        np.testing.assert_allclose(scene.srf.sum(axis=1), 1, atol=1e-12)

    def test_an_unknown_cave_scene_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"cave:watercolors.*cave:sponges"):
            load_scene("cave:watercolors")

    @pytest.mark.parametrize(("name", "degrees"), [("jasper_ridge", 8), ("samson", 3)])
    def test_unmixing_lies_on_the_pixels_of_the_image(self, name, degrees):
        """The published abundances explain the image only if both are laid out alike."""
        scene = load_scene(name)
        mixed = np.einsum("ge,ehw->ghw", scene.endmembers, scene.abundances)
        assert angle(mixed, scene.reference.data) < degrees
        assert angle(mixed.transpose(0, 2, 1), scene.reference.data) > 2 * degrees
        np.testing.assert_allclose(scene.abundances.sum(axis=0), 1, atol=1e-12)

    def test_jasper_ridge_counts_come_back(self, scenes):
        import scipy.io

        counts = scipy.io.loadmat(scenes / "jasper_ridge" / "jasperRidge2_R198.mat")["Y"]
        image = counts.T.reshape(100, 100, -1, order="F")
        restored = load_scene("jasper_ridge").reference.restored().data
        np.testing.assert_allclose(np.moveaxis(restored, 0, -1), image, rtol=1e-6)

    def test_tg1_sensors_agree_with_its_images(self):
        scene = load_scene("tg1")
        bands, rows, columns = scene.hr_msi.shape
        side = scene.scale
        blocks = scene.hr_msi.data.reshape(bands, rows // side, side, columns // side, side)
        seen = np.einsum("gipjq,pq->gij", blocks.astype(np.float64), scene.psf)
        projected = np.einsum("gb,bij->gij", scene.srf, scene.lr_hsi.data.astype(np.float64))
        np.testing.assert_allclose(projected, seen, atol=1e-6)  # images are float32 here

    def test_paris_has_one_peak_and_bands_where_ali_has_them(self):
        scene = load_scene("paris_eo1")
        assert scene.reference.metadata["peak"] == scene.hr_msi.metadata["peak"]
        weights = scene.srf / scene.srf.sum(axis=1, keepdims=True)
        centres = weights @ scene.reference.wavelengths
        np.testing.assert_allclose(centres, scene.hr_msi.wavelengths, atol=8)
