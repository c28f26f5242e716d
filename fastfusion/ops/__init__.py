"""The functional API: every operator of the library, on every backend.

Each is a ``torch.library`` op in the namespace ``fastfusion``, with autograd. Its folder holds its
definition (``reference.py``), its kernels, and a README with the mathematics.
"""

from fastfusion.ops.coordinate_mixing import coordinate_mixing
from fastfusion.ops.depthwise import (
    depthwise_conv2d,
    large_kernel_attention,
    multiscale_attention,
)
from fastfusion.ops.frequency_filter import frequency_filter2d, frequency_response2d
from fastfusion.ops.haar import haar_dwt2d, haar_idwt2d, haar_split2d
from fastfusion.ops.latent_operator import (
    latent_decode,
    latent_encode,
    latent_operator,
    trigonometric_solve,
)

__all__ = [
    "coordinate_mixing",
    "depthwise_conv2d",
    "frequency_filter2d",
    "frequency_response2d",
    "haar_dwt2d",
    "haar_idwt2d",
    "haar_split2d",
    "large_kernel_attention",
    "latent_decode",
    "latent_encode",
    "latent_operator",
    "multiscale_attention",
    "trigonometric_solve",
]
