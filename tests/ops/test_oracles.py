"""Each reference against something independent, in float64: PyWavelets, SciPy, NumPy, loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, special
from torch import Tensor
from torch.nn import functional as F

from fastfusion import ops
from tests.closeness import assert_close

pywt = pytest.importorskip("pywt", reason="PyWavelets is in the extra 'dev'")

BOUND = 1e-12
REFERENCE = {"backend": "reference"}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# -- Haar --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (1, 6), (5, 1), (64, 33)])
def test_haar_is_pywavelets(size):
    x = rand(2, 3, *size)
    bands = ops.haar_dwt2d(x, **REFERENCE)
    low, details = pywt.dwt2(x.numpy(), "haar", mode="symmetric")
    for band, expected in zip(bands, (low, *details), strict=True):
        # Where an axis has one row its details are 0; PyWavelets leaves rounding there.
        truth = torch.from_numpy(expected)
        assert_close(band, truth, BOUND, "band", scale=x.norm().item())
    full = torch.from_numpy(pywt.idwt2((low, details), "haar"))
    crop = full[..., : size[0], : size[1]]
    assert_close(ops.haar_idwt2d(*bands, size=size, **REFERENCE), crop, BOUND, "inverse")
    assert_close(crop, x, BOUND, "reconstruction")
    alone = pywt.idwt2((low, (None, None, None)), "haar")
    low_only = torch.from_numpy(alone)[..., : size[0], : size[1]]
    split = ops.haar_split2d(x, **REFERENCE)
    assert_close(split[0], low_only, BOUND, "low")
    assert_close(split[1], x - low_only, BOUND, "high", scale=x.norm().item())


# -- depthwise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 7), (13, 5)])
@pytest.mark.parametrize("dilation", [1, 2, (3, 1)])
def test_depthwise_is_scipy_and_conv2d(kernel, dilation):
    x, weight, bias = rand(2, 3, 15, 11), rand(3, 1, *kernel), rand(3)
    y = ops.depthwise_conv2d(x, weight, bias, dilation=dilation, **REFERENCE)
    rows, columns = (dilation, dilation) if isinstance(dilation, int) else dilation
    spread = np.zeros((3, rows * (kernel[0] - 1) + 1, columns * (kernel[1] - 1) + 1))
    spread[:, ::rows, ::columns] = weight[:, 0].numpy()
    expected = np.stack(
        [
            [
                ndimage.correlate(x[b, c].numpy(), spread[c], mode="constant") + bias[c].item()
                for c in range(3)
            ]
            for b in range(2)
        ]
    )
    assert_close(y, torch.from_numpy(expected), BOUND, "against scipy")
    padding = [rows * (kernel[0] // 2), columns * (kernel[1] // 2)]
    plain = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=3)
    assert_close(y, plain, BOUND, "against conv2d")


def test_activations_are_their_formulas():
    x, one = rand(1, 2, 5, 5), torch.ones(2, 1, 1, 1, dtype=torch.float64)
    formulas = {
        "relu": np.maximum(x.numpy(), 0),
        "silu": x.numpy() * special.expit(x.numpy()),
        "gelu": x.numpy() * special.ndtr(x.numpy()),
    }
    for name, expected in formulas.items():
        y = ops.depthwise_conv2d(x, one, activation=name, **REFERENCE)
        assert_close(y, torch.from_numpy(expected), BOUND, name)


def test_large_kernel_attention_is_its_three_steps():
    x = rand(2, 4, 12, 10)
    local, context, mix = rand(4, 1, 5, 5), rand(4, 1, 7, 7), rand(4, 4)
    biases = rand(3, 4)
    y = ops.large_kernel_attention(
        x, local, biases[0], context, biases[1], mix, biases[2], **REFERENCE
    )
    padded = np.zeros((4, 19, 19))
    padded[:, ::3, ::3] = context[:, 0].numpy()
    expected = np.empty(x.shape)
    for b in range(2):
        first = np.stack(
            [
                ndimage.correlate(x[b, c].numpy(), local[c, 0].numpy(), mode="constant")
                + biases[0, c].item()
                for c in range(4)
            ]
        )
        second = np.stack(
            [
                ndimage.correlate(first[c], padded[c], mode="constant") + biases[1, c].item()
                for c in range(4)
            ]
        )
        attention = np.tensordot(mix.numpy(), second, 1) + biases[2].numpy()[:, None, None]
        expected[b] = x[b].numpy() * attention
    assert_close(y, torch.from_numpy(expected), BOUND, "attention")


def test_multiscale_attention_is_a_softmax_over_scales():
    x, biases = rand(1, 3, 9, 8), [rand(3), None]
    weights = [rand(3, 1, 3, 3), rand(3, 1, 5, 5)]
    y = ops.multiscale_attention(x, weights, biases, **REFERENCE)
    responses = np.stack(
        [
            [
                ndimage.correlate(x[0, c].numpy(), w[c, 0].numpy(), mode="constant")
                + (0 if b is None else b[c].item())
                for c in range(3)
            ]
            for w, b in zip(weights, biases, strict=True)
        ]
    )
    expected = (special.softmax(responses, axis=0) * responses).sum(axis=0)[None]
    assert_close(y, torch.from_numpy(expected), BOUND, "attention")


# -- frequency filter --------------------------------------------------------------------------


def dft_matrix(n: int) -> np.ndarray:
    """The discrete Fourier transform by its sum, with exactly reduced phases."""
    k = np.arange(n)
    return np.exp(-2j * np.pi * (np.outer(k, k) % n) / n)


def filter_by_sums(x, mixing, kernel, mixing_bias, gain, bias):
    """The "zeros" form with naive DFTs and loops, for one image."""
    _, rows, columns = x.shape
    half = columns // 2 + 1
    down, across = dft_matrix(rows), dft_matrix(columns)
    spectrum = np.einsum("uh,chw,wv->cuv", down, x, across)[:, :, :half]
    parts = []
    for part, values in enumerate((spectrum.real, spectrum.imag)):
        mixed = np.tensordot(mixing[part], values, 1) + mixing_bias[part][:, None, None]
        filtered = np.stack(
            [
                ndimage.correlate(channel, taps, mode="constant")
                for channel, taps in zip(mixed, kernel[part], strict=True)
            ]
        )
        parts.append(gain[part][:, None, None] * filtered + bias[part][:, None, None])
    z = np.einsum("hu,duv->dhv", down.conj() / rows, parts[0] + 1j * parts[1])
    y = np.zeros((len(z), rows, columns))
    positions = np.arange(columns)
    for v in range(half):
        phase = np.exp(2j * np.pi * ((v * positions) % columns) / columns)
        if v == 0 or 2 * v == columns:
            y += z[:, :, v].real[:, :, None] * phase.real / columns
        else:
            y += 2 * (z[:, :, v, None] * phase).real / columns
    return y


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5), (1, 1), (1, 6), (5, 1)])
def test_frequency_filter_is_its_sums(size):
    x, mixing, kernel = rand(1, 3, *size), rand(2, 4, 3), rand(2, 4, 3, 3)
    mixing_bias, gain, bias = rand(2, 4), rand(2, 4), rand(2, 4)
    y = ops.frequency_filter2d(
        x, mixing, kernel, mixing_bias=mixing_bias, gain=gain, bias=bias, **REFERENCE
    )
    arrays = [t.numpy() for t in (x[0], mixing, kernel, mixing_bias, gain, bias)]
    assert_close(y[0], torch.from_numpy(filter_by_sums(*arrays)), BOUND, "filtered")
    real, imag = ops.frequency_response2d(x, mixing, kernel, mixing_bias=mixing_bias, **REFERENCE)
    spectrum = np.fft.rfft2(x[0].numpy())
    for part, (values, found) in enumerate(((spectrum.real, real), (spectrum.imag, imag))):
        mixed = np.tensordot(mixing[part].numpy(), values, 1)
        mixed += mixing_bias[part].numpy()[:, None, None]
        expected = [
            ndimage.correlate(channel, taps.numpy(), mode="constant")
            for channel, taps in zip(mixed, kernel[part], strict=True)
        ]
        assert_close(found[0], torch.from_numpy(np.stack(expected)), BOUND, "response")


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6), (5, 1), (2, 3)])
def test_circular_filter_is_its_closed_form(size):
    """f_e C_real + f_o C_imag, with the biases as impulses at the origin."""
    x, mixing, kernel = rand(1, 3, *size), rand(2, 4, 3), rand(2, 4, 5, 5)
    mixing_bias, gain, bias = rand(2, 4), rand(2, 4), rand(2, 4)
    y = ops.frequency_filter2d(
        x,
        mixing,
        kernel,
        mixing_bias=mixing_bias,
        gain=gain,
        bias=bias,
        padding_mode="circular",
        **REFERENCE,
    )
    rows, columns = size
    image = x[0].numpy()
    mirrored = image[:, -np.arange(rows) % rows][:, :, -np.arange(columns) % columns]
    expected = np.zeros((4, rows, columns))
    for part, symmetric in enumerate(((image + mirrored) / 2, (image - mirrored) / 2)):
        mixed = np.tensordot(mixing[part].numpy(), symmetric, 1)
        if part == 0:
            mixed[:, 0, 0] += mixing_bias[0].numpy()
        window = np.zeros((4, rows, columns))
        for i in range(-2, 3):
            for j in range(-2, 3):
                phase = i * np.arange(rows)[:, None] / rows + j * np.arange(columns) / columns
                window += kernel[part, :, i + 2, j + 2].numpy()[:, None, None] * np.cos(
                    2 * np.pi * phase
                )
        expected += gain[part].numpy()[:, None, None] * mixed * window
    expected[:, 0, 0] += bias[0].numpy()
    assert_close(y[0], torch.from_numpy(expected), BOUND, "filtered")


# -- coordinate mixing -------------------------------------------------------------------------


def mix_by_loops(candidates, state, k):
    batch, channels, coordinates = candidates.shape
    result = np.array(state)
    for b in range(batch):
        saliency = [sum(abs(float(v)) for v in candidates[b, :, n]) for n in range(coordinates)]
        ranked = sorted(range(coordinates), key=lambda n: (-saliency[n], n))
        for n in sorted(ranked[:k]):
            for c in range(channels):
                if candidates[b, c, n] != 0:
                    result[b, c] = candidates[b, c, n]
    return result


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_coordinate_mixing_is_its_loops(k, ties):
    candidates = rand(3, 5, 10)
    if ties:
        candidates = candidates.sign()
    candidates[torch.rand(candidates.shape) < 0.6] = 0
    candidates[0, 0] = 0
    state = rand(3, 5)
    y = ops.coordinate_mixing(candidates, state, k=k, **REFERENCE)
    expected = torch.from_numpy(mix_by_loops(candidates.numpy(), state.numpy(), k))
    assert torch.equal(y, expected)


def test_coordinate_mixing_sends_the_gradient_to_what_was_accepted():
    candidates = torch.tensor([[[1.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    candidates.requires_grad_()
    state = torch.tensor([7.0, 8.0, 9.0], requires_grad=True)
    y = ops.coordinate_mixing(candidates, state, k=2, **REFERENCE)
    assert y.tolist() == [[3.0, 2.0, 9.0]]
    y.sum().backward()
    assert candidates.grad.tolist() == [[[0, 0, 1], [1, 0, 0], [0, 0, 0]]]
    assert state.grad.tolist() == [0, 0, 1]


# -- latent operator ---------------------------------------------------------------------------

# label, channels, heads, tokens, basis, patch, squash, fundamental, offset
CONFIGURATIONS = [
    ("LSO", 64, 8, 8, 24, (4, 4), True, math.pi, False),
    ("LSM", 32, 8, 4, 12, (16, 16), False, math.pi / 12, True),
]


@pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row[0])
@pytest.mark.parametrize("size", [(16, 32), (18, 5)])
def test_latent_operator_is_attention_series_attention(row, size):
    _, channels, heads, tokens, basis, patch, squash, fundamental, with_offset = row
    width = channels // heads
    x, prompts = rand(2, channels, *size), rand(heads, tokens, width)
    weights = [rand(channels, channels) / math.sqrt(channels) for _ in range(3)]
    biases = [rand(channels) for _ in range(3)]
    sine, cosine = rand(channels, basis), rand(channels, basis)
    offset = rand(channels) if with_offset else None
    y = ops.latent_operator(
        x,
        prompts,
        weights[0],
        biases[0],
        weights[1],
        biases[1],
        weights[2],
        biases[2],
        sine,
        cosine,
        offset,
        patch_size=patch,
        fundamental=fundamental,
        squash=squash,
        **REFERENCE,
    )
    down, across = -(-size[0] // patch[0]), -(-size[1] // patch[1])
    padded = torch.zeros(2, channels, down * patch[0], across * patch[1], dtype=x.dtype)
    padded[:, :, : size[0], : size[1]] = x
    expected = torch.zeros_like(padded)
    for i in range(down):
        for j in range(across):
            place = (
                slice(None),
                slice(None),
                slice(i * patch[0], (i + 1) * patch[0]),
                slice(j * patch[1], (j + 1) * patch[1]),
            )
            pixels = padded[place].flatten(2).transpose(1, 2)  # (B, L, C)
            keys, values, queries = (
                (pixels @ w.T + b).unflatten(-1, (heads, width)).transpose(1, 2)
                for w, b in zip(weights, biases, strict=True)
            )
            asked = prompts.expand(2, -1, -1, -1)
            z = F.scaled_dot_product_attention(asked, keys, values) + asked
            if squash:
                z = torch.from_numpy(math.pi * special.expit(z.numpy()))
            solved = z.clone()
            for h in range(heads):
                for d in range(width):
                    c = h * width + d
                    value = z[:, h, :, d]
                    terms = sum(
                        sine[c, q - 1] * torch.sin(q * fundamental * value)
                        + cosine[c, q - 1] * torch.cos(q * fundamental * value)
                        for q in range(1, basis + 1)
                    )
                    solved[:, h, :, d] = value + terms + (0 if offset is None else offset[c])
            back = F.scaled_dot_product_attention(queries, solved, solved)
            back = back.transpose(1, 2).flatten(2) + pixels
            expected[place] = back.transpose(1, 2).unflatten(-1, patch)
    assert_close(y, expected[:, :, : size[0], : size[1]], BOUND, "operator")


def test_latent_operator_is_decode_of_solve_of_encode():
    x, prompts = rand(1, 6, 7, 9), rand(2, 3, 3)
    key, value, query = rand(6, 6), rand(6, 6), rand(6, 6)
    bias, sine, cosine, offset = rand(6), rand(6, 4), rand(6, 4), rand(6)
    latents = ops.latent_encode(x, prompts, key, bias, value, bias, patch_size=(2, 3))
    assert latents.shape == (1, 12, 3, 6)
    solved = ops.trigonometric_solve(latents, sine, cosine, offset, fundamental=0.7)
    steps = ops.latent_decode(x, solved, query, bias, patch_size=(2, 3), heads=2)
    whole = ops.latent_operator(
        x,
        prompts,
        key,
        bias,
        value,
        bias,
        query,
        bias,
        sine,
        cosine,
        offset,
        patch_size=(2, 3),
        fundamental=0.7,
    )
    assert_close(whole, steps, BOUND, "operator")


def test_whole_image_is_one_patch():
    x, eye, zero = rand(1, 4, 5, 7), torch.eye(4, dtype=torch.float64), torch.zeros(4).double()
    prompts = rand(2, 3, 2)
    one = ops.latent_encode(x, prompts, eye, zero, eye, zero, patch_size=None)
    same = ops.latent_encode(x, prompts, eye, zero, eye, zero, patch_size=(5, 7))
    assert torch.equal(one, same)
