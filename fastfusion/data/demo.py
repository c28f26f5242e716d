"""A scene that needs no file: a village between fields and a river, seen from the air.

What makes fusion hard in real scenes is in it on purpose: more materials than a multispectral
sensor has bands; spectra that vary within a material and not along a line (pigment, moisture,
turbidity); shadows lit by a bluer sky; pixels that mix two materials; roads, cars and trees near
the size of a pixel; fields of fine texture. Pictures and spectra look like the real thing, yet they
are nobody's measurement: figures on this scene are for trying things out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastfusion.data.cube import Cube

# ------------------------------------------------------------------------------------------------
# Spectra: reflectance of a material at wavelengths w (nm), for values p in [0, 1] of its own
# property; every function broadcasts w against p
# ------------------------------------------------------------------------------------------------

Array = np.ndarray


def _bump(w: Array, centre: float, width: float) -> Array:
    return np.exp(-0.5 * ((w - centre) / width) ** 2)


def _step(w: Array, centre: float, width: float | Array) -> Array:
    return 1 / (1 + np.exp(-(w - centre) / width))


def _leaves(w: Array, p: Array) -> Array:
    """Scattering dimmed by chlorophyll, after Beer and Lambert; p: how much of it."""
    absorption = 0.55 + _bump(w, 435, 45) + 0.75 * _bump(w, 490, 28) + 1.1 * _bump(w, 672, 24)
    absorption = absorption - 0.28 * _bump(w, 552, 26) - 0.5 * _step(w, 706, 7)
    return 0.46 * np.exp(-(0.55 + 2.1 * p) * absorption)


def _straw(w: Array, p: Array) -> Array:
    """p: how weathered."""
    return (0.05 + 0.42 * _step(w, 545, 48)) * (1 - 0.35 * p) + 0.05 * p


def _soil(w: Array, p: Array) -> Array:
    """p: moisture, which darkens and deepens the slope."""
    dry = 0.07 + 0.33 * _step(w, 585, 52) - 0.03 * _bump(w, 500, 30)
    return dry ** (1 + 0.55 * p)


def _sand(w: Array, p: Array) -> Array:
    """p: moisture."""
    dry = 0.27 + 0.31 * _step(w, 500, 60)
    return dry ** (1 + 0.8 * p)


def _water(w: Array, p: Array) -> Array:
    """p: turbidity, which moves the peak from blue to green and ochre."""
    return 0.018 + 0.085 * (1 - p) * _bump(w, 470, 55) + 0.14 * p * _bump(w, 570, 62)


def _asphalt(w: Array, p: Array) -> Array:
    return 0.075 + 0.06 * p + 0.03 * (w - 400) / 300


def _concrete(w: Array, p: Array) -> Array:
    return (0.34 + 0.14 * _step(w, 480, 55)) * (1 - 0.3 * p)


def _tiles(w: Array, p: Array) -> Array:
    """p: age; lichen takes the red away."""
    return 0.045 + (0.40 - 0.16 * p) * _step(w, 592, 15 + 12 * p) + 0.03 * p


def _blue_paint(w: Array, p: Array) -> Array:
    return 0.05 + (0.42 - 0.12 * p) * _bump(w, 458, 36) + 0.2 * _step(w, 690, 9)


def _white_paint(w: Array, p: Array) -> Array:
    return 0.78 * _step(w, 408, 9) * (1 - 0.18 * p)


def _yellow_paint(w: Array, p: Array) -> Array:
    return 0.06 + 0.66 * _step(w, 517, 11) * (1 - 0.2 * p)


def _clay(w: Array, p: Array) -> Array:
    """Warm, with the two narrow bands at 542 and 577 nm that skin has too."""
    bands = 1 - (0.14 + 0.16 * p) * (_bump(w, 542, 10) + 1.1 * _bump(w, 577, 9))
    return (0.17 + 0.42 * _step(w, 583, 22)) * bands


def _pool(w: Array, p: Array) -> Array:
    return 0.10 + 0.55 * _bump(w, 488, 40) * (1 - 0.25 * p)


MATERIALS: dict[str, Callable[[Array, Array], Array]] = {
    "leaves": _leaves,
    "straw": _straw,
    "soil": _soil,
    "sand": _sand,
    "water": _water,
    "asphalt": _asphalt,
    "concrete": _concrete,
    "tiles": _tiles,
    "blue paint": _blue_paint,
    "white paint": _white_paint,
    "yellow paint": _yellow_paint,
    "clay": _clay,
    "pool": _pool,
}
#: Light, in units of the sun's on flat ground, that stays within [0, 1] on a white roof.
BRIGHTEST = 1.25
INDEX = {name: index for index, name in enumerate(MATERIALS)}


# ------------------------------------------------------------------------------------------------
# The scene
# ------------------------------------------------------------------------------------------------


def demo_scene(height: int = 256, width: int = 256, bands: int = 31, seed: int = 0) -> Cube:
    """Make the built-in scene; the same arguments give the same values everywhere.

    Args:
        height, width: size in pixels, at least 8; the longer side sees the whole scene. Multiples
            of 8 divide by the usual scales.
        bands: number of bands, evenly spaced from 400 to 700 nm.
        seed: another seed is another village.

    Returns:
        Reflectance as float32 in [0, 1], with wavelengths.

    Raises:
        TypeError, ValueError: an argument is not a whole number, or too small.

    Example:
        >>> cube = demo_scene(64, 96, bands=16)
        >>> cube.shape, cube.wavelengths[[0, -1]].tolist()
        ((16, 64, 96), [400.0, 700.0])
    """
    for name, value, least in [
        ("height", height, 8),
        ("width", width, 8),
        ("bands", bands, 1),
        ("seed", seed, 0),
    ]:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    canvas = _Canvas(int(height), int(width), int(seed))
    _paint_fields(canvas)
    _paint_river(canvas)
    _paint_roads(canvas)
    _paint_buildings(canvas)
    _paint_trees(canvas)
    wavelengths = np.linspace(400, 700, bands) if bands > 1 else np.array([550.0])
    data = _render(canvas, wavelengths)
    metadata = {"scene": f"demo_scene({height}, {width}, {bands}, {seed})"}
    return Cube(data, wavelengths, metadata)


class _Canvas:
    """What lies where: the share of each material in each pixel, its property, and its light.

    Lengths are in units of the longer side. Edges are a pixel wide ramp of coverage rather than a
    hard decision, as a sensor sees them; it also keeps rounding from ever flipping a pixel.
    """

    def __init__(self, height: int, width: int, seed: int) -> None:
        self.seed = seed
        self.pixel = 1 / max(height, width)
        self.y, self.x = np.meshgrid(
            (np.arange(height) + 0.5) * self.pixel,
            (np.arange(width) + 0.5) * self.pixel,
            indexing="ij",
        )
        self.shares = np.zeros((len(MATERIALS), height, width))
        self.property = np.full((height, width), 0.5)
        self.brightness = np.ones((height, width))  # relief and texture
        self.sun = np.ones((height, width))  # 0 in full shadow

    def random(self, *key: int) -> np.random.Generator:
        """Numbers of their own for each part, so that a change in one does not move the others."""
        return np.random.default_rng([self.seed, *key])

    def noise(self, slope: float, *key: int) -> Array:
        """Fractal noise of unit variance; amplitudes fall with frequency to the power -slope."""
        height, width = self.shares.shape[1:]
        spectrum = np.fft.rfft2(self.random(*key).standard_normal((height, width)))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) / self.pixel
        frequency[0, 0] = np.inf  # no mean
        values = np.fft.irfft2(spectrum / np.maximum(frequency, 1) ** slope, (height, width))
        return values / values.std()

    def coverage(self, distance: Array) -> Array:
        """Share of a pixel inside a shape, from the signed distance to its edge (inside < 0)."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def paint(self, material: str, cover: Array, value: Array | float = 0.5) -> None:
        rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
        if rows.size:  # most shapes are small
            top, bottom = rows[0], rows[-1] + 1
            left, right = columns[0], columns[-1] + 1
            shares = self.shares[:, top:bottom, left:right]  # a view
            shares *= 1 - cover[top:bottom, left:right]
            shares[INDEX[material]] += cover[top:bottom, left:right]
        self.property += cover * (value - self.property)

    def cast_shadow(self, cover: Array, depth: float) -> None:
        self.sun *= 1 - depth * cover

    def main_road(self, x: Any) -> tuple[Any, Any]:
        """Where the middle of the main road is at ``x``, and its slope there."""
        phase = 4.2 * x + 6 * self.random(14).random()
        return 0.56 + 0.06 * np.sin(phase), 0.06 * 4.2 * np.cos(phase)

    def rectangle(self, x: float, y: float, length: float, breadth: float, angle: float) -> Array:
        """Signed distance to a turned rectangle, negative inside."""
        along = np.abs((self.x - x) * np.cos(angle) + (self.y - y) * np.sin(angle)) - length / 2
        across = np.abs((self.y - y) * np.cos(angle) - (self.x - x) * np.sin(angle)) - breadth / 2
        return np.maximum(along, across)


def _paint_fields(canvas: _Canvas) -> None:
    """A patchwork of straight-edged fields, each with a crop, a state and a direction of rows."""
    rng = canvas.random(1)
    centres = rng.random((22, 2))
    distances = [np.hypot(canvas.x - x, canvas.y - y) for x, y in centres]
    nearest, second = np.partition(np.stack(distances), 1, axis=0)[:2]
    patches = canvas.noise(1.6, 2)
    grain = canvas.noise(0.4, 3)
    crops = ["leaves", "straw", "soil", "leaves", "straw", "leaves"]
    for number, distance in enumerate(distances):
        others = np.where(distance <= nearest, second, nearest)
        cover = canvas.coverage((distance - others) / 1.6)
        angle, period, state = rng.random(3) * [np.pi, 0.016, 0.7] + [0, 0.012, 0.15]
        rows = np.sin(2 * np.pi / period * (canvas.x * np.cos(angle) + canvas.y * np.sin(angle)))
        value = np.clip(state + 0.12 * patches + 0.07 * grain + 0.10 * rows, 0, 1)
        canvas.paint(crops[number % len(crops)], cover, value)
        canvas.brightness += cover * 0.07 * rows
    hedge = canvas.coverage((second - nearest) - 0.005)
    canvas.paint("leaves", 0.8 * hedge, 0.9)
    canvas.brightness *= 1 + 0.09 * grain


def _paint_river(canvas: _Canvas) -> None:
    """A bent river with sandbanks, clear in the middle and turbid at its sides, and two boats."""
    rng = canvas.random(4)
    phase = rng.random(3) * 2 * np.pi
    middle = (
        0.80 + 0.07 * np.sin(5 * canvas.y + phase[0]) + 0.025 * np.sin(13 * canvas.y + phase[1])
    )
    half = 0.062 + 0.018 * np.sin(7 * canvas.y + phase[2])
    distance = np.abs(canvas.x - middle) - half
    wobble = 0.008 * canvas.noise(1.7, 5)
    canvas.paint("sand", canvas.coverage(distance - 0.016 + wobble), np.clip(-distance * 30, 0, 1))
    turbidity = np.clip(1 + distance / 0.05 + 0.12 * canvas.noise(1.8, 6), 0.03, 1)
    water = canvas.coverage(distance + wobble / 3)
    canvas.paint("water", water, turbidity)
    canvas.brightness += water * (1 + 0.03 * canvas.noise(0.8, 7) - canvas.brightness)
    for y in (0.22, 0.71):
        row = np.argmin(np.abs(canvas.y[:, 0] - y))
        boat = canvas.rectangle(middle[row, 0] - 0.01, y, 0.035, 0.011, 1.2)
        canvas.paint("white paint", canvas.coverage(boat), 0.3)


def _paint_roads(canvas: _Canvas) -> None:
    """A curved main road, straight side roads up to it, a thin footpath to the river, and cars."""
    rng = canvas.random(8)
    bend, slope = canvas.main_road(canvas.x)
    main = np.abs(canvas.y - bend) / np.sqrt(1 + slope**2)
    wear = np.clip(0.4 + 0.2 * canvas.noise(0.9, 9), 0, 1)
    path = np.abs(canvas.y - 0.13 - 0.4 * canvas.x**2) - 0.5 * max(canvas.pixel, 1 / 512)
    dry = 1 - canvas.shares[INDEX["water"]]
    canvas.paint("sand", 0.9 * dry * canvas.coverage(path), 0.2)
    for x, angle, side in [(0.14, 1.35, 1), (0.36, 1.72, -1), (0.57, 1.5, 1)]:
        strip = canvas.rectangle(x, 0.56, 2, 0.010, angle)
        edge = np.maximum(strip, side * (canvas.y - bend))
        canvas.paint("asphalt", canvas.coverage(edge), wear)
    canvas.paint("concrete", canvas.coverage(main - 0.0125), 0.7)
    canvas.paint("asphalt", canvas.coverage(main - 0.0085), wear)
    paints = ["white paint", "yellow paint", "tiles", "blue paint"]
    for number, x in enumerate(rng.random(14) * 0.68 + 0.02):
        middle, slant = canvas.main_road(x)
        y = middle + (0.004 if number % 2 else -0.004)
        car = canvas.rectangle(x, y, 0.011, 0.0055, np.arctan(slant))
        canvas.paint(paints[number % len(paints)], canvas.coverage(car), 0.1)


def _paint_buildings(canvas: _Canvas) -> None:
    """Houses with two roof faces and a shadow, pools, a court with its lines."""
    rng = canvas.random(10)
    roofs = ["tiles", "tiles", "blue paint", "tiles", "concrete", "white paint", "tiles"]
    north = [(x, canvas.main_road(x)[0] - 0.07) for x in (0.05, 0.21, 0.30, 0.39, 0.48, 0.64)]
    south = [(x, canvas.main_road(x)[0] + 0.055) for x in (0.04, 0.13, 0.22, 0.42, 0.51, 0.60)]
    hamlet = [(x, y) for x in (0.37, 0.46, 0.55) for y in (0.83, 0.92)]
    for number, (x, y) in enumerate(north + south + hamlet):
        dx, dy, turn, long, age = rng.random(5)
        x, y, angle = x + 0.02 * dx, y + 0.02 * dy, 0.5 * turn - 0.25
        length, breadth = 0.045 + 0.03 * long, 0.034
        shadow = canvas.rectangle(x + 0.009, y + 0.012, length, breadth, angle)
        canvas.cast_shadow(canvas.coverage(shadow), 0.75)
        roof = canvas.coverage(canvas.rectangle(x, y, length, breadth, angle))
        canvas.paint(roofs[number % len(roofs)], roof, age)
        canvas.sun += roof * (1 - canvas.sun)
        ridge = (canvas.y - y) * np.cos(angle) - (canvas.x - x) * np.sin(angle)
        face = 0.78 + 0.40 * canvas.coverage(ridge)
        canvas.brightness += roof * (face - canvas.brightness)
        if number % 3 == 1:
            behind = -0.04 if y < canvas.main_road(x)[0] else 0.04
            pool = canvas.rectangle(x + 0.01, y + behind, 0.024, 0.013, angle)
            canvas.paint("pool", canvas.coverage(pool), age)
    court = canvas.rectangle(0.13, 0.87, 0.15, 0.085, 0.12)
    canvas.paint("clay", canvas.coverage(court), np.clip(0.5 + 0.2 * canvas.noise(1.2, 11), 0, 1))
    for length, breadth in [(0.125, 0.06), (0.125, 0.0), (0.0, 0.06), (0.06, 0.06)]:
        line = np.abs(canvas.rectangle(0.13, 0.87, length, breadth, 0.12)) - 0.0012
        inside = canvas.coverage(court + 0.01)
        canvas.paint("white paint", inside * canvas.coverage(line), 0.1)


def _paint_trees(canvas: _Canvas) -> None:
    """Round crowns near the size of a few pixels, lit from one side, with shadows."""
    rng = canvas.random(12)
    open_ground = canvas.shares[[INDEX[name] for name in ("leaves", "straw", "soil")]].sum(axis=0)
    rows, columns = open_ground.shape
    for x, y, size, state in rng.random((150, 4)):
        radius = 0.006 + 0.010 * size**2
        row, column = int(y / canvas.pixel), int(x / canvas.pixel)
        grows = open_ground[min(row, rows - 1), min(column, columns - 1)]
        distance = np.hypot(canvas.x - x, canvas.y - y)
        shadow = np.hypot(canvas.x - x - 0.6 * radius, canvas.y - y - 0.8 * radius)
        canvas.cast_shadow(grows * canvas.coverage(shadow - radius), 0.6)
        crown = grows * canvas.coverage(distance - radius)
        canvas.paint("leaves", crown, 0.45 + 0.55 * state)
        lit = 1 - 0.45 * ((canvas.x - x) * 0.6 + (canvas.y - y) * 0.8) / radius
        canvas.brightness += crown * (lit - canvas.brightness)
        canvas.sun += crown * (1 - canvas.sun)


def _render(canvas: _Canvas, wavelengths: Array) -> Array:
    """Mix the spectra of what is in a pixel and light them with sun and sky."""
    relief = canvas.noise(2.2, 13)
    slope = np.gradient(relief, axis=0) * 0.8 + np.gradient(relief, axis=1) * 0.6
    shade = 1 + 0.05 * slope / slope.std()
    haze = 1 - 0.18 * _step(canvas.x * 0.7 + canvas.y, 0.25, -0.12)  # a cloud's soft shadow
    sun = canvas.sun * canvas.brightness * shade * haze
    data = np.empty((wavelengths.size, *sun.shape), np.float32)
    present = [
        (spectrum, share > 0, share)
        for spectrum, share in zip(MATERIALS.values(), canvas.shares, strict=True)
    ]
    for band, wavelength in enumerate(wavelengths):
        reflectance = np.zeros_like(sun)
        for spectrum, where, share in present:
            reflectance[where] += share[where] * spectrum(wavelength, canvas.property[where])
        sky = 0.10 + 0.10 * (450 / wavelength) ** 3
        data[band] = np.clip(reflectance * (sun + sky) / BRIGHTEST, 0, 1)
    return data
