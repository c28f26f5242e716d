"""Does a kernel read what nobody wrote, or hand it on? Its results are looked at under valgrind.

``python -m tests.reliability.memcheck`` runs itself under valgrind's memcheck and counts the errors
that have the compiled library on their stack, and the results that hold values nobody wrote: they
are given to the system, whose calls memcheck watches byte by byte. First a tensor that was never
written is given to it, and must be found. memcheck knows no AVX-512, so the kernels run as on an
older processor. The exit status is 0 where there are none, 1 where there are, and 77 where valgrind
or the library is missing.

Most of the time goes into Python and torch themselves: 65 of 90 seconds of processor time.
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
#: How memcheck names what is given to the system: a result, and the planted fault.
RESULT, PLANTED = "write(buf)", "pwrite64(buf)"


def calls(limit: int) -> None:
    """Two cases of every operator, forward and backward; every value of the results is given away.

    Each gradient is that of a sum of squares, so that the backward pass reads the results too.
    """
    import torch

    from tests.ops.cases import FIRST_TWO, INTERNAL

    with tempfile.TemporaryFile() as file:
        os.pwrite(file.fileno(), torch.empty(1000).numpy(), 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    done = 0
    for case in [*INTERNAL, *FIRST_TWO][:limit]:
        tensors = {name: t.float().requires_grad_() for name, t in case.tensors().items()}
        outputs = case.outputs(tensors, "cpp")
        loss = sum(y.square().sum() for y in outputs)
        for value in (*outputs, *torch.autograd.grad(loss, list(tensors.values()))):
            os.write(nowhere, value.detach().contiguous().numpy())
        done += 1
    print(done)


def errors(capability: str, limit: int) -> tuple[int, list[str]]:
    """How many cases there were, and what memcheck says of the library at one instruction set."""
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
        command += ["--leak-check=no", "--error-limit=no", "--num-callers=12"]
        command += [sys.executable, "-m", __spec__.name, "calls", str(limit)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the calls failed under valgrind: {done.stderr[-2000:]}")
        found, planted = [], False
        for error in tree.parse(report).getroot().iter("error"):
            frames = [frame.findtext("obj", "") for frame in error.iter("frame")]
            kind, what = error.findtext("kind", ""), error.findtext("what", "")
            planted |= PLANTED in what
            if kind in READS and any("_C_cpu" in frame for frame in frames[:6]):
                where = error.findtext(".//frame/fn", "?")
                found.append(f"{capability}: {kind} in {where}")
            if kind == "SyscallParam" and f" {RESULT}" in what:
                found.append(f"{capability}: a result holds values that nobody wrote")
        if not planted:
            raise RuntimeError("memcheck does not find the planted fault")
        return int(done.stdout.split()[-1]), found


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
    capabilities = ("default", "avx2")
    told = {name: errors(name, limit) for name in capabilities}
    found = [error for _, errors in told.values() for error in errors]
    tried = sum(count for count, _ in told.values())
    print(json.dumps({"calls": tried, "capabilities": " and ".join(told), "errors": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
