"""Docstrings of public functions over tensors and arrays state shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("data", "engine", "models", "utils")
TENSOR = re.compile(r"\b(Tensor|ndarray|NDArray|Image|Mask)\b")
STATE_DICT = re.compile(r"(?:dict|Mapping)\[str, (?:torch\.)?Tensor\]")
# (B, C, H, W), (n, 4), (3,), B x C x H x W, scalar, one-dimensional, "shape" of another argument
SHAPE = re.compile(r"\([^()`]*[\w\].](?:, ?[^()`]*)+\)|\w+ x \w+|\bscalar\b|\bshapes?\b")
EXEMPT = ("forward", "__call__", "backward")  # the class docstring states their shapes


def tensor_functions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of the public functions and methods whose annotations mention a tensor."""
    owners: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    owners += [(f"{n.name}.", n.body) for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for prefix, body in owners:
        for node in body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name in EXEMPT:
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hints = [a.annotation for a in arguments] + [node.returns]
            if not ast.get_docstring(node) and prefix:
                continue  # an overriding method; ruff requires docstrings elsewhere
            if any(hint is not None and TENSOR.search(STATE_DICT.sub("", ast.unparse(hint))) for hint in hints):
                yield prefix + node.name, ast.get_docstring(node) or ""


def without_shapes(source: str) -> list[str]:
    """Names of the tensor functions whose docstring states no shape."""
    return [
        name
        for name, text in tensor_functions(ast.parse(source))
        if not SHAPE.search(text) and not text.startswith("See `")
    ]


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return boxes.", ["f"]),
        ("Return boxes (see below).", ["f"]),
        ("Return boxes (n, 4).", []),
        ("Return (B, C, H / stride, W).", []),
        ("Return (..., 4).", []),
        ("See `Head`.", []),  # documented by the protocol
        ("Return a tensor of the same shape.", []),
    ],
)
def test_without_shapes_finds_missing_shapes(doc: str, expected: list[str]) -> None:
    assert without_shapes(f'def f(x: Tensor) -> Tensor:\n    """{doc}"""') == expected


def test_public_tensor_functions_state_shapes() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    assert sum(len(list(tensor_functions(ast.parse(text)))) for text in sources.values()) > 80
    assert [f"{path}: {name}" for path, text in sources.items() for name in without_shapes(text)] == []
