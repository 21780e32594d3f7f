"""The Python files of a model: does Triton find a model in them, and can every import be satisfied?"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from trtbuild.adapters.triton_config import Model
from trtbuild.errors import Problem

# What a self-contained repository may import beside the standard library and its own files; tensorrt_llm needs mpi4py.
_ALLOWED = (
    "numpy",
    "yaml",
    "transformers",
    "triton_python_backend_utils",
    "tensorrt_llm",
    "mpi4py",
    "trtbuild.runtime",
)
# The embedded runtime raises these.
_ALLOWED_EXACTLY = ("trtbuild.errors",)
_CLASS = "TritonPythonModel"
_ENTRY = "model.py"


def check_code(model: Model) -> list[Problem]:
    """Every fault of the model's Python files, read without running them."""
    if model.config.backend != "python":
        return []
    return [problem for version in model.versions() for problem in _check_version(model, version)]


def _check_version(model: Model, version: Path) -> list[Problem]:
    where = f"{model.name}/{version.name}"
    problems: list[Problem] = []
    if not (version / _ENTRY).is_file():
        message = "the file is missing, and Triton hangs at start-up instead of saying so"
        problems.append(Problem(f"{where}/{_ENTRY}", message, "build the package again"))
    for path in sorted(version.glob("*.py")):
        name = f"{where}/{path.name}"
        try:
            tree = ast.parse(path.read_bytes(), filename=name)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            message = f"line {line}: not valid Python ({getattr(error, 'msg', error)})"
            problems.append(Problem(name, message, "build the package again"))
            continue
        problems += [Problem(name, *fault) for fault in _imports(tree, version)]
        if path.name == _ENTRY:
            problems += [Problem(name, *fault) for fault in _entry(tree)]
    return problems


def _entry(tree: ast.Module) -> list[tuple[str, str]]:
    """Triton makes a `TritonPythonModel` and calls its `execute`."""
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == _CLASS]
    if not found:
        return [(f"the class {_CLASS} is missing", "Triton's Python backend looks for exactly this name")]
    methods = {node.name for node in found[-1].body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if "execute" not in methods:
        return [(f"{_CLASS} has no method execute", "Triton's Python backend calls it with every request")]
    return []


def _imports(tree: ast.Module, version: Path) -> list[tuple[str, str]]:
    faults: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            faults += [_foreign(node.lineno, alias.name) for alias in node.names if not _satisfied(alias.name, version)]
        elif isinstance(node, ast.ImportFrom) and node.level:
            faults += _siblings(node, version)
        elif isinstance(node, ast.ImportFrom) and not _satisfied(node.module or "", version):
            faults.append(_foreign(node.lineno, node.module or ""))
    return faults


def _satisfied(module: str, version: Path) -> bool:
    top = module.split(".", 1)[0]
    if top in sys.stdlib_module_names or module in _ALLOWED_EXACTLY or (version / f"{top}.py").is_file():
        return True
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in _ALLOWED)


def _foreign(line: int, module: str) -> tuple[str, str]:
    return (
        f"line {line}: imports {module}, which is no file of the repository and no package that a model may use",
        f"allowed are the standard library, {', '.join(_ALLOWED)}",
    )


def _siblings(node: ast.ImportFrom, version: Path) -> list[tuple[str, str]]:
    """Faults of ``from .name import a, b``: the file exists and defines what is taken from it."""
    if node.level > 1 or node.module is None:
        wanted = [alias.name for alias in node.names] if node.level == 1 else [node.module or ""]
        missing = [name for name in wanted if node.level > 1 or not (version / f"{name}.py").is_file()]
        return [(f"line {node.lineno}: imports {name} from outside its directory", "add the file") for name in missing]
    path = version / f"{node.module}.py"
    if not path.is_file():
        return [(f"line {node.lineno}: imports {path.name}, which is missing", "build the package again")]
    try:
        defined = _defined(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):
        return []  # reported for that file itself
    return [
        (f"line {node.lineno}: {path.name} defines no {alias.name}", "build the package again")
        for alias in node.names
        if alias.name != "*" and alias.name not in defined
    ]


def _defined(tree: ast.Module) -> set[str]:
    """The names that a module binds at its top level."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".", 1)[0] for alias in node.names}
    return names
