"""Modules of config/ import each other in one order, whether or not a type checker looks."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from demo_runs import ROOT

PACKAGE = "aki_megatron.config."


def imports(source: str) -> set[str]:
    """Modules of config/ that a file imports, under TYPE_CHECKING and inside functions too."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {(node.module or "").removeprefix(PACKAGE) for node in nodes if (node.module or "").startswith(PACKAGE)}


def test_config_has_no_import_circle() -> None:
    modules = {path.stem: imports(path.read_text()) for path in (ROOT / "aki_megatron/config").glob("*.py")}
    order = list(TopologicalSorter(modules).static_order())
    assert order.index("run") < order.index("batch_sizes") < order.index("cross_checks") < order.index("load")


def test_the_check_fires() -> None:
    circle = {"a": imports(f"from {PACKAGE}b import x"), "b": imports(f"def f():\n    from {PACKAGE}a import y")}
    with pytest.raises(CycleError):
        list(TopologicalSorter(circle).static_order())
