"""Facts about the project as a whole: who may import whom, and that torch is not needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hlwq_jax", "ltx_jax", "convert")


def imported(path: Path) -> set[str]:
    """The full names a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"), [("hlwq_jax", {"ltx_jax", "convert"}), ("ltx_jax", {"convert"}), ("convert", set())]
)
def test_imports_point_one_way(package, forbidden):
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name.partition(".")[0] in forbidden | {"scripts", "tests", "generate"}
    }
    assert not wrong


def test_only_load_knows_hlwq():
    users = {
        path.name
        for path in (ROOT / "ltx_jax").rglob("*.py")
        if any(name.partition(".")[0] == "hlwq_jax" for name in imported(path))
    }
    assert users == {"load.py"}


def test_torch_is_never_imported():
    program = "import sys, hlwq_jax, ltx_jax, convert, convert.__main__, generate\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_source_file_names_torch():
    users = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "torch" in imported(path)}
    assert not users


def test_files_stay_small_enough_to_read():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in (*PACKAGES, "scripts", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 600
    }
    assert not long
