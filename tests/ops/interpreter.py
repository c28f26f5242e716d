"""A pytest plugin that lets Triton's interpreter do without work that changes no result.

Twice or three times as quick::

    TRITON_INTERPRET=1 pytest -p tests.ops.interpreter tests/ops/test_parity.py -k triton

- At each call of a device function the interpreter looks through its whole language for what is
  still to be replaced. Once a launch and module is enough: what is replaced stays so to its end.
- It looks at each integer sum and product for overflows, computing it again in int64. The matrix's
  images are far too small for one; ``make triton-sanitize`` looks on.

The last line tells which kernels ran, so that a test can say which did not.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_ran: set[str] = set()


def install() -> None:
    """From now on in this process."""
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        _ran.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = type(options)(sanitize_overflow=False)
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launched


def pytest_configure(config: Any) -> None:
    install()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(" ".join(["kernels:", *sorted(_ran)]))
