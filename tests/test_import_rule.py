"""The import rule: data flows one way through the package, and so do its imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mipnerf_fast"


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, root: Path, modules: set[str]) -> set[str]:
    """Every module of the package that `path` imports, wherever in the file; `from . import x` may be one."""
    here = _name(path, root)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            # What is no module is a name defined in the module imported from.
            found |= {name if name in modules else source for name in names}
    return {name for name in found if name.split(".")[0] in (PACKAGE, "train")}


def _graph(root: Path) -> dict[str, set[str]]:
    paths = sorted((root / PACKAGE).rglob("*.py"))
    modules = {_name(path, root) for path in paths} | {f"{PACKAGE}._C"}
    return {_name(path, root): _imports(path, root, modules) for path in paths}


def _in(module: str, *names: str) -> bool:
    return any(module == f"{PACKAGE}.{name}" or module.startswith(f"{PACKAGE}.{name}.") for name in names)


def _violations(graph: dict[str, set[str]]) -> list[str]:
    found = []
    for module, imports in graph.items():
        for target in sorted(imports):
            if _in(module, "reference") and not _in(target, "reference"):
                rule = "reference imports nothing else of the package"
            elif _in(module, "ops") and not _in(target, "ops", "backend", "_native", "reference"):
                rule = "ops imports only backend, _native and reference"
            elif _in(module, "model") and _in(target, "training", "evaluation", "rendering"):
                rule = "training, evaluation and rendering import model, not the other way"
            elif target == "train" or (_in(target, "cli") and not _in(module, "cli")):
                rule = "nothing imports cli or train.py"
            else:
                continue
            found.append(f"{module} imports {target}: {rule}")
    return found


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = {start}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting |= graph.get(module, set()) - seen
    return seen


def test_imports_go_one_way() -> None:
    assert _violations(_graph(ROOT)) == []


def test_the_model_is_made_of_ops() -> None:
    assert any(_in(target, "ops") for target in _graph(ROOT)[f"{PACKAGE}.model"])


@pytest.mark.parametrize("module", ["training", "evaluation", "rendering"])
def test_what_uses_the_model_imports_it(module: str) -> None:
    graph = _graph(ROOT)
    graph.pop(PACKAGE)  # the package itself imports everything public
    assert f"{PACKAGE}.model" in _reached(graph, f"{PACKAGE}.{module}") & set(graph)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("reference/ipe.py", "from .. import cameras"),
        ("reference/ipe.py", "from ..cameras import Rays"),
        ("reference/ipe.py", "import mipnerf_fast.backend"),
        ("ops/mlp.py", "from mipnerf_fast import Rays"),
        ("ops/mlp.py", "def late():\n    from ..model import MipNerf"),
        ("model.py", "from . import training"),
        ("training.py", "from .cli import main"),
        ("cameras.py", "import train"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, path: str, line: str) -> None:
    for file, text in {
        "__init__.py": "",
        "_native.py": "",
        "backend.py": "",
        "cameras.py": "",
        "cli.py": "from . import training",
        "model.py": "from . import ops",
        "ops/__init__.py": "from .. import _native, backend, reference\nfrom . import mlp",
        "ops/mlp.py": "from ..reference import mlp",
        "reference/__init__.py": "from .ipe import encode",
        "reference/ipe.py": "import torch",
        "reference/mlp.py": "",
        "training.py": "from .model import MipNerf",
    }.items():
        (tmp_path / PACKAGE / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / file).write_text(text)
    assert _violations(_graph(tmp_path)) == []
    (tmp_path / PACKAGE / path).write_text(line)
    assert len(_violations(_graph(tmp_path))) == 1
