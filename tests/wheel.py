"""Install the wheel into fresh environments, run the operators' parity there: ``make wheel-test``.

``python tests/wheel.py dist/fastfusion-*.whl --environments 3.10:2.10.0 3.13:2.15.0`` names pairs
of a Python and a torch. Each environment holds that torch (any build of it that pip finds), the
wheel with what it requires, and pytest; the tests are copied out of the source tree, so that
nothing but the installed package can be imported. A Python or torch that cannot be had is said and
no failure; that no environment could be made at all, is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Run in each environment: what is tested must be the wheel, and its kernels must load.
CHECK = """
import sys, torch, fastfusion
from pathlib import Path
from fastfusion import native
package = Path(fastfusion.__file__)
assert package.is_relative_to(sys.prefix), f"{package} is not in {sys.prefix}"
reason = native.why_not("cpu")
assert reason is None, reason
for library in sorted(package.parent.glob("_C_*.so")):
    reason = native.why_not(library.name.split(".")[0].removeprefix("_C_"))
    print(f"  {library.name}: {reason or 'loaded'}")
    assert reason is None or torch.version.cuda is None, reason
print(f"  Python {sys.version.split()[0]}, torch {torch.__version__}, {native.capability()}")
"""


class NotToBeHad(Exception):
    """Why an environment cannot be made here."""


def find_python(version: str) -> str:
    """An interpreter of this version, e.g. "3.10": on the path, or among pyenv's."""
    found = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [found, *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for python in filter(None, candidates):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return python
    raise NotToBeHad(f"there is no Python {version} with venv here")


def test(wheel: Path, python: str, torch: str, room: Path) -> str:
    """The last line of the tests' output in a new environment.

    Raises:
        NotToBeHad: this Python or torch cannot be had.
        subprocess.CalledProcessError: the wheel cannot be installed or a test fails.
    """
    interpreter = find_python(python)
    shutil.rmtree(room, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(room / "environment")], check=True)
    inside = str(room / "environment" / "bin" / "python")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTFUSION_"))}

    def run(*command: str) -> str:
        done = subprocess.run(
            [inside, *command],
            cwd=room,
            env=plain,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            print(done.stdout)
            done.check_returncode()
        return done.stdout

    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    try:
        run(*pip, f"torch=={torch}")
    except subprocess.CalledProcessError as error:
        raise NotToBeHad(f"pip finds no torch {torch} for Python {python}") from error
    run(*pip, str(wheel), "pytest", "pytest-timeout", "hypothesis")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", room / "tests", ignore=unwanted)
    print(run("-c", CHECK), end="")
    arguments = ["-p", "no:cacheprovider", "tests/ops/test_parity.py", "-k", "cpp"]
    return run("-m", "pytest", *arguments).splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--environments", nargs="+", required=True, metavar="PYTHON:TORCH")
    parser.add_argument("--room", type=Path, default=ROOT / "build" / "wheel-test")
    parser.add_argument("--keep", action="store_true", help="keep the environments (gigabytes)")
    arguments = parser.parse_args()
    results = {}
    for pair in arguments.environments:
        python, torch = pair.split(":")
        room = arguments.room.resolve() / f"{python}-{torch}"
        print(f"Python {python}, torch {torch}:", flush=True)
        try:
            results[pair] = test(arguments.wheel.resolve(), python, torch, room)
        except NotToBeHad as error:
            results[pair] = f"not to be had: {error}"
        except subprocess.CalledProcessError:
            results[pair] = "FAILED"
        if not arguments.keep:
            shutil.rmtree(room, ignore_errors=True)
        print(f"  {results[pair]}", flush=True)
    tested = [result for result in results.values() if not result.startswith("not to be had")]
    if not tested or "FAILED" in tested:
        sys.exit("wheel-test: " + ("a test failed" if tested else "no environment was tested"))


if __name__ == "__main__":
    main()
