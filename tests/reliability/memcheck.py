"""Does a kernel read what nobody wrote? Its results are asked for a decision, under valgrind.

``python -m tests.reliability.memcheck`` runs itself under valgrind's memcheck and counts the errors
that have the compiled library on their stack; memcheck knows no AVX-512, so the kernels run as on
an older processor. The exit status is 0 where there are none, 1 where there are, and 77 where
valgrind or the library is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Kinds of errors that the library is to have none of.
READS = ("UninitCondition", "UninitValue", "InvalidRead", "InvalidWrite", "InvalidFree")


def calls(limit: int) -> None:
    """The first case of every operator, forward and backward; a decision on every result."""
    import torch

    from tests.ops.cases import EVERY

    for case in EVERY[:limit]:
        tensors = {name: t.float().requires_grad_() for name, t in case.tensors().items()}
        outputs = case.outputs(tensors, "cpp")
        grads = torch.autograd.grad(sum(y.sum() for y in outputs), list(tensors.values()))
        # tolist and min decide nothing; a comparison in Python does, value by value.
        for value in (*outputs, *grads):
            assert all(number == number for number in value.detach().flatten().tolist())


def errors(capability: str, limit: int) -> list[str]:
    """What memcheck has to say about the library at one instruction set."""
    with tempfile.TemporaryDirectory() as room:
        report = Path(room, "report.xml")
        environment = {
            **os.environ,
            "FASTFUSION_CPU_CAPABILITY": capability,
            "ATEN_CPU_CAPABILITY": "default",
            "OMP_NUM_THREADS": "1",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(ROOT),
        }
        command = ["valgrind", "--tool=memcheck", "--xml=yes", f"--xml-file={report}"]
        command += ["--undef-value-errors=yes", "--error-limit=no", "--num-callers=30"]
        command += [sys.executable, "-m", __spec__.name, "calls", str(limit)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the calls failed under valgrind: {done.stderr[-2000:]}")
        found = []
        for error in tree.parse(report).getroot().iter("error"):
            frames = [frame.findtext("obj", "") for frame in error.iter("frame")]
            if error.findtext("kind") in READS and any("_C_cpu" in frame for frame in frames[:6]):
                where = error.findtext(".//frame/fn", "?")
                found.append(f"{capability}: {error.findtext('kind')} in {where}")
        return found


def main() -> int:
    """Run under valgrind, or, with ``calls N``, be what runs there."""
    if sys.argv[1:2] == ["calls"]:
        calls(int(sys.argv[2]))
        return 0
    from fastfusion import native

    missing = None if shutil.which("valgrind") else "valgrind is not installed"
    missing = missing or native.why_not(native.CPU)
    if missing:
        print(json.dumps({"skipped": missing}))
        return 77
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    from tests.ops.cases import EVERY

    capabilities = ("default", "avx2")
    found = [error for capability in capabilities for error in errors(capability, limit)]
    told = {"calls": len(EVERY[:limit]), "capabilities": " and ".join(capabilities)}
    print(json.dumps({**told, "errors": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
