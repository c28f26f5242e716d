"""Every Python block of the documentation and the README runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fastfusion.ops import operator

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in path.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after another in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # The guides that add operators must not add them to what other tests run over.
    monkeypatch.setattr(operator, "OPERATORS", dict(operator.OPERATORS))
    names: dict[str, object] = {"__name__": "a_page"}
    text = page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block.group(1), str(page), "exec")
        exec(code, names)


def _citizenship() -> list[list[str]]:
    """The cells of the table of `docs/citizenship.md`, without its head."""
    text = (ROOT / "docs" / "citizenship.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_cell_of_the_citizenship_table_has_its_test() -> None:
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    rows = _citizenship()
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row[-1])
        assert len(row) == 4 and all(row) and names, row
        assert set(names) <= defined, f"{row[0]}: {set(names) - defined} are no tests"


def test_the_citizenship_table_holds_for_every_operator() -> None:
    """What it says of "every operator" runs over one table of calls; what that leaves out is named.

    Those are steps inside a layer or a method, which are no functions of `fastfusion.ops`.
    """
    from fastfusion import ops
    from fastfusion.ops.operator import OPERATORS
    from tests.ops.cases import CASES

    tested = {case.operator for case in CASES}
    assert set(ops.__all__) <= tested
    page = (ROOT / "docs" / "citizenship.md").read_text()
    assert {name for name in OPERATORS if f"`{name}`" in page} == set(OPERATORS) - tested


def test_pages_name_files_that_exist() -> None:
    """Links between the pages, and commands that run a file or a module of the repository."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:\s]+?)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page}: {target}"
        for module in re.findall(r"python -m (benchmarks\.\w+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page}: {module}"
        for script in re.findall(r"python (examples/\w+\.py)", text):
            assert (ROOT / script).exists(), f"{page}: {script}"
