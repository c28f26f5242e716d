"""The built-in scene: the same everywhere, within [0, 1], and no easy case for fusion."""

from __future__ import annotations

import numpy as np
import pytest

from fastfusion.data import demo_scene
from fastfusion.data.demo import MATERIALS

#: Bands 0, 12, 20 and 30 at three pixels: a field, another, the river.
WRITTEN_DOWN = [
    [0.025045, 0.104113, 0.030682],
    [0.043418, 0.132309, 0.088954],
    [0.125595, 0.215027, 0.084963],
    [0.046809, 0.140469, 0.023319],
]


@pytest.fixture(scope="module")
def scene():
    return demo_scene()


def test_is_a_reflectance_cube(scene):
    assert scene.shape == (31, 256, 256)
    assert scene.data.dtype == np.float32
    assert scene.data.min() > 0 and scene.data.max() <= 1
    np.testing.assert_allclose(scene.wavelengths, np.arange(400, 701, 10))


def test_the_same_arguments_give_the_same_bytes(scene):
    assert demo_scene().data.tobytes() == scene.data.tobytes()
    assert not np.array_equal(demo_scene(seed=1).data, scene.data)


def test_values_are_the_same_on_every_machine(scene):
    """Written down once; another random stream, order of painting or spectrum would move them."""
    seen = scene.data[[0, 12, 20, 30]][:, [10, 130, 200], [30, 140, 215]]
    np.testing.assert_allclose(seen, WRITTEN_DOWN, atol=1e-6)


def test_more_bands_are_a_finer_look_at_the_same_scene(scene):
    np.testing.assert_allclose(demo_scene(bands=61).data[::2], scene.data, atol=1e-6)
    assert demo_scene(16, 16, bands=1).shape == (1, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 96), (50, 33)])
@pytest.mark.parametrize("seed", range(4))
def test_any_size_and_seed(height, width, seed):
    data = demo_scene(height, width, bands=4, seed=seed).data
    assert data.shape == (4, height, width)
    assert data.min() >= 0 and data.max() <= 1
    assert data.std() > 0.02


def test_spectra_are_physical():
    wavelengths = np.linspace(400, 700, 301)[:, None]
    for name, spectrum in MATERIALS.items():
        values = spectrum(wavelengths, np.linspace(0, 1, 11))
        assert values.shape == (301, 11), name
        assert values.min() > 0 and values.max() < 1, name
        assert np.abs(np.diff(values, axis=0)).max() < 0.03, name  # smooth: a step a nanometre


def test_is_not_explained_by_few_spectra(scene):
    """With three components, as many as an RGB sensor has bands, far from exact; nor with six."""
    pixels = scene.data.reshape(31, -1).astype(np.float64)
    pixels -= pixels.mean(axis=1, keepdims=True)
    left_over = np.cumsum(np.linalg.svd(pixels, compute_uv=False)[::-1] ** 2)[::-1] / pixels.size
    psnr = -10 * np.log10(left_over)  # [k]: of the best approximation by k components
    assert psnr[3] < 45
    assert psnr[6] < 55


def test_has_detail_that_a_coarse_sensor_loses(scene):
    for scale in (4, 8):
        blocks = scene.data.reshape(31, 256 // scale, scale, 256 // scale, scale)
        loss = np.mean((blocks - blocks.mean(axis=(2, 4), keepdims=True)) ** 2)
        assert -10 * np.log10(loss) < 32


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"height": 7}, ValueError, "height must be at least 8"),
        ({"width": 0}, ValueError, "width must be at least 8"),
        ({"bands": 0}, ValueError, "bands must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"height": 64.0}, TypeError, "height must be a whole number"),
        ({"bands": True}, TypeError, "bands must be a whole number"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        demo_scene(**arguments)
