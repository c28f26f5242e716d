"""What ``import fastfusion`` brings along, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_only_torch_and_numpy_and_loads_no_compiled_library():
    heavy = "triton scipy h5py PIL spectral rasterio zarr tqdm torchmetrics safetensors matplotlib"
    code = (
        "import sys, torch; before = set(sys.modules); import fastfusion\n"
        f"print([m for m in {heavy.split()} if m in sys.modules and m not in before])\n"
        "print(hasattr(torch.ops.fastfusion_cpu, 'capability'))\n"
        "import torch.utils.flop_counter as f\n"
        "print('fastfusion.haar_split2d' in map(str, f.flop_registry))"
    )
    assert run(code).splitlines() == ["[]", "False", "True"]


def test_flops_are_registered_whoever_comes_first():
    code = (
        "import torch.utils.flop_counter as f, fastfusion\n"
        "print('fastfusion.haar_split2d' in map(str, f.flop_registry))"
    )
    assert run(code) == "True"
