"""Figures: what they show, where they look, and that none is left half written."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastfusion import figures
from fastfusion.data import Degradation, apply_srf


@pytest.fixture
def fusion():
    """Four materials with one bright spot that only the fused cube resolves."""
    spectra = 0.3 * torch.rand(4, 31)
    reference = torch.zeros(31, 48, 64)
    for number, spectrum in enumerate(spectra):
        row, column = divmod(number, 2)
        block = (slice(24 * row, 24 * row + 24), slice(32 * column, 32 * column + 32))
        reference[:, block[0], block[1]] = spectrum[:, None, None]
    reference[:, 40, 10] = 1
    srf = torch.rand(3, 31)
    srf /= srf.sum(1, keepdim=True)
    degradation = Degradation.block(4)
    return {
        "fused": (reference + 0.001 * torch.randn_like(reference)).clamp(0, 1),
        "lr_hsi": degradation(reference),
        "hr_msi": apply_srf(reference, srf),
        "reference": reference,
        "wavelengths": np.arange(400, 701, 10),
        "srf": srf,
        "degradation": degradation,
    }


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_with_reference(fusion, tmp_path):
    figure = figures.fusion_figure(**fusion, title="four materials")
    shown = "\n".join(titles(figure))
    assert figure.get_suptitle() == "four materials"
    for expected in (
        *("LR-HSI  12 x 16 x 31", "HR-MSI  48 x 64 x 3", "Fused  48 x 64 x 31", "Reference"),
        *("Spectral angle", "RMSE over bands", "PSNR of each band"),
    ):
        assert expected in shown
    figures.save_figure(tmp_path / "fusion.png", figure)
    with Image.open(tmp_path / "fusion.png") as image:
        image.load()
        assert image.size == (1300, 1280)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fusion.png"]


def test_the_point_and_the_window_that_gained_most_are_shown(fusion):
    figure = figures.fusion_figure(**fusion)
    assert "Point 4: row 40, column 10" in titles(figure)
    detail = figure.axes[1]
    assert detail.get_xlim()[0] <= 10 < detail.get_xlim()[1]
    assert detail.get_ylim()[1] <= 40 < detail.get_ylim()[0]


def test_the_materials_are_found(fusion):
    points = figures._different_spectra(fusion["lr_hsi"], (48, 64))
    assert len({(row // 24, column // 32) for row, column in points}) == 3


def test_the_window_of_a_large_image():
    gain = torch.zeros(400, 300)
    gain[310:350, 200:240] = 1
    rows, columns = figures._best_window(gain)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (75, 75)
    assert rows.start <= 310 and rows.stop >= 350
    assert columns.start <= 200 and columns.stop >= 240


def test_points_differ_even_where_spectra_do_not():
    assert len(set(figures._different_spectra(torch.ones(5, 6, 6), (12, 12)))) == 3


def test_the_spectra_drawn_are_those_of_the_point(fusion):
    figure = figures.fusion_figure(**fusion)
    axes = next(a for a in figure.axes if a.get_title() == "Point 4: row 40, column 10")
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["fused"], fusion["fused"][:, 40, 10])
    np.testing.assert_array_equal(lines["reference"], fusion["reference"][:, 40, 10])
    np.testing.assert_array_equal(lines["LR-HSI"], fusion["lr_hsi"][:, 10, 2])


def test_no_line_bridges_a_gap_in_the_wavelengths(fusion):
    fusion["wavelengths"] = np.r_[400:550:10, 900:1060:10]
    figure = figures.fusion_figure(**fusion)
    spectrum = figure.axes[-1].get_lines()[0].get_ydata()
    assert np.flatnonzero(np.isnan(spectrum)).tolist() == [15]


def test_without_reference_consistency_is_shown(fusion):
    fusion["reference"] = None
    shown = titles(figures.fusion_figure(**fusion))
    assert any(title.startswith("Error to LR-HSI") for title in shown)
    assert any(title.startswith("Error to HR-MSI") for title in shown)
    fusion["srf"] = fusion["degradation"] = None
    shown = titles(figures.fusion_figure(**fusion))
    assert any(title.startswith("Change to bicubic") for title in shown)


def draw(figure) -> None:
    """All that can fail when it is drawn, in few pixels."""
    figure.savefig(io.BytesIO(), dpi=25)


@pytest.mark.parametrize(
    ("bands", "msi_bands", "low", "scale"),
    [(2, 2, (1, 1), 4), (1, 1, (3, 40), 4), (9, 4, (40, 3), 2)],
)
@pytest.mark.parametrize("with_reference", [False, True])
def test_odd_shapes(bands, msi_bands, low, scale, with_reference):
    high = (low[0] * scale, low[1] * scale)
    images = torch.rand(bands, *high), torch.rand(bands, *low), torch.rand(msi_bands, *high)
    draw(
        figures.fusion_figure(
            *images, reference=torch.rand(bands, *high) if with_reference else None
        )
    )


def test_perfect_flat_black_and_missing_values(fusion):
    draw(figures.fusion_figure(**{**fusion, "fused": fusion["reference"]}))
    black = {name: torch.zeros_like(fusion[name]) for name in ("fused", "lr_hsi", "hr_msi")}
    draw(figures.fusion_figure(**black, reference=black["fused"]))
    fusion["fused"][:, 3, 4] = torch.nan
    draw(figures.fusion_figure(**fusion))


def test_bad_input(fusion, tmp_path):
    def drawn(**changes):
        figures.fusion_figure(**{**fusion, **changes})

    with pytest.raises(TypeError, match="fused: expected a tensor, got ndarray"):
        drawn(fused=fusion["fused"].numpy())
    with pytest.raises(ValueError, match=r"fused: expected \(bands, H, W\)"):
        drawn(fused=fusion["fused"][None])
    with pytest.raises(ValueError, match="lr_hsi: expected 31 bands, got 30"):
        drawn(lr_hsi=fusion["lr_hsi"][:30])
    with pytest.raises(ValueError, match="hr_msi: expected the size of fused"):
        drawn(hr_msi=fusion["hr_msi"][:, :40])
    with pytest.raises(ValueError, match="reference: expected the shape of fused"):
        drawn(reference=fusion["reference"][:30])
    with pytest.raises(ValueError, match=r"wavelengths: expected one a band, \(31,\), got \(4,\)"):
        drawn(wavelengths=[1, 2, 3, 4])
    figure = figures.fusion_figure(**fusion)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        figures.save_figure(tmp_path / "missing" / "x.png", figure)
    with pytest.raises(ValueError, match="format"):
        figures.save_figure(tmp_path / "x.nonsense", figure)
    assert not list(tmp_path.iterdir())


def test_methods_side_by_side(fusion, tmp_path):
    results = {"good": fusion["fused"], "bad": torch.zeros_like(fusion["fused"])}
    pair = {name: fusion[name] for name in ("lr_hsi", "hr_msi", "wavelengths")}
    figure = figures.comparison_figure(results, **pair, reference=fusion["reference"], title="two")
    shown = titles(figure)
    assert {"good", "bad", "PSNR of each band"} < set(shown)
    assert sum(title.startswith("Spectral angle") for title in shown) == 2
    maps = [axes for axes in figure.axes if axes.get_title().startswith("RMSE over bands")]
    limits = {axes.images[0].get_clim() for axes in maps}
    assert len(maps) == 2 and len(limits) == 1  # one scale for all, so that they compare
    curves = next(axes for axes in figure.axes if axes.get_title() == "PSNR of each band")
    assert [text.get_text().split(",")[0] for text in curves.get_legend().get_texts()] == [*results]
    spectra = [axes for axes in figure.axes if axes.get_title().startswith("Point")]
    names = [line.get_label() for line in spectra[0].lines]
    assert names == ["LR-HSI", "reference", "good", "bad"] and len(spectra) == 4
    figures.save_figure(tmp_path / "two.png", figure)
    plain = titles(figures.comparison_figure(results, **pair))
    assert "PSNR of each band" not in plain
    assert sum(title.startswith("Change to bicubic") for title in plain) == 2
    with pytest.raises(ValueError, match="results: expected at least one"):
        figures.comparison_figure({}, **pair)


def test_psnr_against_scale_compares_the_scenes_that_all_scales_have():
    rows = [
        {"scene": scene, "scale": scale, "method": "m", "psnr": 60.0 - scale, "cross_scale": "by x"}
        for scene, scale in [("a", 4), ("a", 8), ("b", 4)]
    ]
    rows.append({"scene": "c", "scale": 3, "method": "m"})  # without a reference
    axes = figures.scale_figure(rows).axes[0]
    assert axes.get_title() == "PSNR against the scale: a\nby x"
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[4, 56], [8, 52]])
    with pytest.raises(ValueError, match="a scene that is there at all of several"):
        figures.scale_figure(rows[:1] + rows[2:])
