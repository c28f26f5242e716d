"""Layers over the operators, and the blocks of the papers."""

from fastfusion.nn.layers import (
    CoordinateMixing,
    DepthwiseConv2d,
    FrequencyFilter2d,
    HaarDWT2d,
    HaarIDWT2d,
    HaarSplit2d,
    LargeKernelAttention,
    LatentOperator2d,
    MultiscaleAttention,
)

__all__ = [
    "CoordinateMixing",
    "DepthwiseConv2d",
    "FrequencyFilter2d",
    "HaarDWT2d",
    "HaarIDWT2d",
    "HaarSplit2d",
    "LargeKernelAttention",
    "LatentOperator2d",
    "MultiscaleAttention",
]
