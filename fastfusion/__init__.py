"""fastfusion: custom kernels and fused models for hyperspectral image fusion in PyTorch."""

from fastfusion import ops
