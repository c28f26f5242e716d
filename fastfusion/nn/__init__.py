"""Layers over the operators, and the blocks of the papers."""

from fastfusion.nn.cofusion import SSCFM, MultiScaleGenerator, SpaCAM, SpeCAM
from fastfusion.nn.fsrvl import (
    FeatureSynchronization,
    FrequencyRecalibration,
    InitialRepresentation,
)
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
    "SSCFM",
    "CoordinateMixing",
    "DepthwiseConv2d",
    "FeatureSynchronization",
    "FrequencyFilter2d",
    "FrequencyRecalibration",
    "HaarDWT2d",
    "HaarIDWT2d",
    "HaarSplit2d",
    "InitialRepresentation",
    "LargeKernelAttention",
    "LatentOperator2d",
    "MultiScaleGenerator",
    "MultiscaleAttention",
    "SpaCAM",
    "SpeCAM",
]
