"""Rules on the structure of a source tree: layers, import cycles, sizes. Each returns the violations it finds."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LAYERS = {"utils": 0, "data": 1, "models": 1, "engine": 2}
SCRIPT_LAYER = 3
SCRIPTS = ("train", "val", "detect", "export", "compare")
MAX_MODULES = 12
MAX_BODY = 50
MAX_FILE = 500
MAX_SCRIPT = 50
INSTALLED_COMMAND = "yolov5_backbones"  # puts the project's folder first, before any other `utils`
# Modules that may import project modules inside a function, and why.
LAZY = {
    "hubconf": "torch.hub lists the entry points without importing torch",
    INSTALLED_COMMAND: "the project's folder has to be first on the path",
    "models.backbones": "a backbone family is imported when its name is used",
    "models.backbones.__main__": "--help does not import torch",
    "engine.compare.worker.process": "output goes to a log before torch is imported",
    **{script: "--help does not import torch" for script in SCRIPTS},
}
# Packages of one layer that must not know each other, or know only what is named.
ONLY = {
    "models.checkpoint": ("models.checkpoint", "utils"),
    "engine.report": ("engine.report", "engine.evaluate", "data", "utils"),
    "engine.runtimes": ("engine.runtimes", "models", "utils"),
}


@dataclass(frozen=True)
class Import:
    """One import of a project module: who, where, what, and whether it is inside a function."""

    importer: str
    line: int
    target: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


class SourceTree:
    """Parsed Python files of the product code below a root folder, by dotted module name."""

    def __init__(self, root: Path) -> None:
        files = [*root.glob("*.py"), *(p for layer in LAYERS for p in (root / layer).rglob("*.py"))]
        self.paths = {self._name(root, path): path for path in sorted(files)}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.paths.items()}

    @staticmethod
    def _name(root: Path, path: Path) -> str:
        return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")

    def package(self, module: str) -> str:
        """Return the package that relative imports of a module start from."""
        return module if self.paths[module].name == "__init__.py" else module.rpartition(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of a project module, function-scope and TYPE_CHECKING imports included."""
        found = []
        for module, tree in self.trees.items():
            inside = {
                id(node)
                for function in ast.walk(tree)
                if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
                for node in ast.walk(function)
            }
            found += [
                Import(module, getattr(node, "lineno", 0), target, id(node) in inside)
                for node in ast.walk(tree)
                for target in self._targets(module, node)
                if target != module
            ]
        return found

    def _targets(self, module: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in self.paths)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = self.package(module).split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                target = name if name in self.paths else base
                if target in self.paths:
                    yield target


def layer_of(module: str) -> int:
    """Return the layer of a module; root scripts are the highest."""
    return LAYERS.get(module.split(".")[0], SCRIPT_LAYER)


def upward_imports(tree: SourceTree) -> list[str]:
    """Return imports of a higher layer, of the sibling package on the same layer, or of another script."""
    bad = []
    for entry in tree.imports:
        here, there = layer_of(entry.importer), layer_of(entry.target)
        sibling = here == there and entry.importer.split(".")[0] != entry.target.split(".")[0]
        if there > here or sibling:
            bad.append(str(entry))
    return bad


def forbidden_imports(tree: SourceTree, only: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return disallowed imports of packages that may import only some others."""
    return [
        str(entry)
        for entry in tree.imports
        for package, allowed in only.items()
        if _within(entry.importer, package) and not any(_within(entry.target, name) for name in allowed)
    ]


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def cycles(tree: SourceTree) -> list[list[str]]:
    """Return the strongly connected components of the import graph with more than one module (Tarjan)."""
    graph: dict[str, set[str]] = defaultdict(set)
    for entry in tree.imports:
        graph[entry.importer].add(entry.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                components.append(sorted(component))

    for module in tree.paths:
        if module not in index:
            visit(module)
    return components


def function_scope_imports(tree: SourceTree, allowed: Mapping[str, str]) -> list[str]:
    """Return project imports inside functions of modules that are not in `allowed`."""
    return [str(entry) for entry in tree.imports if entry.in_function and entry.importer not in allowed]


def crowded_folders(tree: SourceTree) -> list[str]:
    """Return folders with more than MAX_MODULES modules, the root and special files not counted."""
    counts = Counter(path.parent for path in tree.paths.values() if not path.name.startswith("__"))
    roots = {path.parent for name, path in tree.paths.items() if layer_of(name) == SCRIPT_LAYER}
    return [f"{folder.name}: {n} modules" for folder, n in counts.items() if n > MAX_MODULES and folder not in roots]


def repeated_classes(tree: SourceTree) -> list[str]:
    """Return public class names that more than one module defines."""
    owners: dict[str, list[str]] = defaultdict(list)
    for module, parsed in tree.trees.items():
        for node in parsed.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].append(module)
    return [f"{name}: {', '.join(modules)}" for name, modules in owners.items() if len(modules) > 1]


def long_bodies(tree: SourceTree) -> list[str]:
    """Return functions whose body, without the docstring, is longer than MAX_BODY lines."""
    bad = []
    for module, parsed in tree.trees.items():
        for node in ast.walk(parsed):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > MAX_BODY:
                    bad.append(f"{module}.{node.name}: {lines} lines")
    return bad


def long_files(tree: SourceTree) -> list[str]:
    """Return files of more than MAX_FILE lines, and scripts of more than MAX_SCRIPT."""
    bad = []
    for module, path in tree.paths.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (MAX_SCRIPT if module in SCRIPTS else MAX_FILE):
            bad.append(f"{module}: {lines} lines")
    return bad


HEAD_MODULES = ("models.heads", "models.losses", "models.build.layer_rules")


def distinguished_heads(tree: SourceTree) -> list[str]:
    """Return uses of a particular head outside `HEAD_MODULES`: all other code works with any `Head`."""
    names = {"Detect", "AnchorFreeDetect"}
    return [
        f"{module}:{node.lineno}: {name}"
        for module, parsed in tree.trees.items()
        if not any(_within(module, package) for package in HEAD_MODULES)
        for node in ast.walk(parsed)
        if isinstance(node, (ast.Name, ast.Attribute, ast.alias))
        and (name := getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", "")) in names
    ]


FORBIDDEN_CALLS = ("eval", "exec", "builtins.eval", "builtins.exec", "os.system")
UNPICKLERS = ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler")


def forbidden_constructs(tree: SourceTree) -> list[str]:
    """Return constructs that hide what happens or run what a file contains."""
    return [f"{module}:{what}" for module, parsed in tree.trees.items() for what in _forbidden_in(module, parsed)]


def _forbidden_in(module: str, parsed: ast.AST) -> Iterator[str]:
    for node in ast.walk(parsed):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Global):
            yield f"{line}: global"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{line}: star import"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{line}: bare except"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            shell = any(k.arg == "shell" and getattr(k.value, "value", False) for k in node.keywords)
            unpickles = name in UNPICKLERS and not _within(module, "models.checkpoint")
            changes_path = name.startswith("sys.path.") and module != INSTALLED_COMMAND
            if name in FORBIDDEN_CALLS or changes_path or shell or unpickles:
                yield f"{line}: {name}"
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(target).startswith("sys.path") for target in targets):
                yield f"{line}: sys.path"
