"""The structure of the package: no circles of imports, no private imports of JAX, no print."""

from __future__ import annotations

import ast
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "omni_jax").rglob("*.py"))


def test_no_import_cycles() -> None:
    """Neither between files nor between packages; lazy imports count."""
    graph = grimp.build_graph("omni_jax", cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    for module in sorted(graph.modules - packages):
        for imported in graph.find_modules_directly_imported_by(module):
            chain = graph.find_shortest_chain(imported, module)
            assert chain is None, f"{module} -> {' -> '.join(chain)}"
    for package in sorted(packages - {"omni_jax"}):
        if package in graph.modules:
            graph.squash_module(package)
    for module in sorted(graph.modules - {"omni_jax"}):
        for imported in graph.find_modules_directly_imported_by(module) - {module}:
            chain = graph.find_shortest_chain(imported, module)
            assert chain is None, f"packages: {module} -> {' -> '.join(chain)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_jax_and_no_star_imports(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            assert all(alias.name != "*" for alias in node.names)
        else:
            continue
        assert not any(name.startswith("jax._src") for name in names), names
