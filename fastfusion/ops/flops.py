"""FLOP formulas for ``torch.utils.flop_counter``, registered when that module is first imported.

It imports Triton where that is installed, which takes longer than all of fastfusion and must not
happen before a user has set ``TRITON_INTERPRET``; so fastfusion does not import it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_pending: list[tuple[Any, Callable[..., int]]] = []


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Let ``FlopCounterMode`` count ``op`` (an overload packet) by the formula of its shapes."""
    _pending.append((op, formula))
    if _COUNTER in sys.modules:
        _register_pending()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register_pending() -> None:
    from torch.utils.flop_counter import register_flop_formula

    while _pending:
        op, formula = _pending.pop()
        register_flop_formula(op)(formula)


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for the import of the counter, registers what is pending, and is gone."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register_pending()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
