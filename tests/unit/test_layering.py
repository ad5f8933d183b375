"""The layers: a module imports only from rows above it; torch from layer 6 up, cuda from layer 4 up.

The table is the one of the architecture. A new module is entered here first, which is when its place is decided.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fa2gen"

# Layer -> modules. Within a layer, too, a module imports only from those before it.
LAYERS: dict[int, tuple[str, ...]] = {
    0: ("_version", "errors", "arch", "log", "files", "env", "_paths", "_when_imported", "_lazy_operators"),
    1: ("expression", "spec", "options", "layout", "ptx"),
    2: ("features", "plan", "catalog"),
    3: ("source", "render", "select", "launch", "groups"),
    4: ("compile", "store"),
    5: ("kernel", "build"),
    6: (
        *(
            "cpu",
            "testing",
            "reference",
            "flex",
            "gpus",
            "ops",
            "serving",
            "padding",
            "distributed",
            "integrations",
            "shim",
        ),
        *("cases_cached", "cases", "bench"),
    ),
    7: ("tune", "explain", "report", "verify", "doctor"),
    8: ("__init__", "cli", "__main__"),
}
ROW = {module: row for row, module in enumerate(module for modules in LAYERS.values() for module in modules)}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}


@dataclass(frozen=True)
class Import:
    where: str  # "ops.py:12"
    target: str  # "fa2gen.spec", "torch.library"
    at_import_time: bool  # not inside a function, nor for type checkers only


def module_of(path: Path) -> str:
    """The row a file belongs to: fa2gen/plan/sm90.py is part of `plan`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[Import]:
    """Every import in a file, wherever it stands."""

    def walk(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = f"{path.relative_to(PACKAGE)}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(where, alias.name, at_import_time)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    raise AssertionError(f"{where}: relative import; write fa2gen.<module>")
                for alias in child.names:
                    # `from fa2gen import spec` names a module, `from fa2gen.spec import Problem` a thing in one.
                    yield Import(where, f"{child.module}.{alias.name}", at_import_time)
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from walk(child, at_import_time and not deferred)

    yield from walk(ast.parse(path.read_text(), str(path)), at_import_time=True)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if module_of(path) not in ("templates", "specs"))


def test_every_module_has_a_layer():
    assert {module_of(path) for path in FILES} <= ROW.keys(), "enter the new module in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_above(path):
    module = module_of(path)
    for found in imports(path):
        if found.target.startswith("fa2gen."):
            other = found.target.split(".")[1]
            other = other if other in ROW else "__init__"
            assert ROW[other] < ROW[module] or other == module, f"{found.where}: {module} may not import {found.target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_and_cuda_stay_in_their_layers(path):
    layer = LAYER[module_of(path)]
    for found in imports(path):
        root = found.target.split(".")[0]
        if root == "torch":
            assert layer >= 6, f"{found.where}: torch belongs to layers 6 and up"
            assert layer == 6 or not found.at_import_time, f"{found.where}: import torch inside the function"
        if root == "cuda":
            assert layer >= 4, f"{found.where}: cuda belongs to layers 4 and up"
            assert layer in (4, 5) or not found.at_import_time, f"{found.where}: import cuda inside the function"


def run_python(code: str) -> str:
    """Run `code` in a new interpreter; its standard output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layers_0_to_3_work_without_torch_and_cuda():
    """Specs, plans, renders and selection work on a laptop: with neither package installed."""
    modules = [module for layer in range(4) for module in LAYERS[layer] if (PACKAGE / f"{module}.py").is_file()]
    modules += [module for layer in range(4) for module in LAYERS[layer] if (PACKAGE / module).is_dir()]
    run_python(
        "import importlib, sys\n"
        "sys.modules['torch'] = sys.modules['cuda'] = None  # now `import torch` raises ImportError\n"
        f"for module in {modules!r}: importlib.import_module('fa2gen.' + module)\n"
    )


@pytest.mark.parametrize("module", ["fa2gen", "fa2gen.cli"])
def test_import_needs_neither_torch_nor_cuda(module):
    loaded = run_python(f"import sys, {module}; print(*sorted(sys.modules))").split()
    light = {"pydantic"} if module == "fa2gen.cli" else set()  # its options are made from the models' fields
    heavy = {"torch", "cuda", "numpy", "jinja2", "pydantic", "rich.progress"} - light
    assert not heavy & {*loaded, *(name.split(".")[0] for name in loaded)}
