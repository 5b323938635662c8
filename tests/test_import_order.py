"""Folders import only what stands to their left, and the run-time package never touches torch."""

import ast
from pathlib import Path

import pytest

import gptoss_jax

ORDER = "formats quant ops model sharding checkpoint data evaluation training lab cli".split()
ROOT = Path(gptoss_jax.__file__).parent


def imported_modules(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_left(path):
    folder = path.relative_to(ROOT).parts[0]
    modules = list(imported_modules(path))
    assert not [m for m in modules if m.split(".")[0] == "torch"], f"{path} imports torch"
    if folder not in ORDER:
        return
    for module in modules:
        parts = module.split(".")
        if parts[0] == "gptoss_jax" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(folder), f"{path} imports {module}, which stands to its right"


def test_every_folder_has_its_place():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders == set(ORDER)
