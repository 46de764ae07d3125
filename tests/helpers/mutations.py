"""Random changes of data and text, for tests/fuzz."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import yaml

ODD_VALUES: list[Any] = [
    0, -1, 2, 255, 2**31, 2**63, 10**20, 10**400, -(10**30), 1.5, -0.0, 1e308, 1e-320, float("inf"),
    float("nan"), True,
    None, "", " ", "a" * 5000, "\u202eevil", "\x1b[31mred", "line\nbreak", "..", "../../../../etc/passwd",
    "/dev/zero",
    "~nosuchuser/x", "~", "[]", [], {}, [[[[[[]]]]]], {"a": {}}, [None], {1: 2}, "nan", "1e5", "0x10",
    "ünïcødé", "日本語",
    "__import__('os').getcwd()", "x" * 300, "http://127.0.0.1:1/x.zip", "file:///etc/passwd", "\x00", "\ud800",
]  # fmt: skip


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys that lead to each value of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return ([prefix] if prefix else []) + [path for key, value in items for path in paths(value, (*prefix, key))]


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def mutate_tree(tree: Any, rng: random.Random, values: list[Any] = ODD_VALUES) -> str:
    """Change nested dicts and lists in place; return the names of the changes."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        every = paths(tree)
        if not every:
            break
        path, other = rng.choice(every), rng.choice(every)
        parent, key = _parent(tree, path), path[-1]
        change = rng.choice(["drop", "value", "value", "value", "wrap", "rename", "copy", "number"])
        if change == "drop":
            del parent[key]
        elif change == "value":
            parent[key] = rng.choice(values)
        elif change == "wrap":
            parent[key] = rng.choice([[parent[key]], {"x": parent[key]}, {0: parent[key]}, str(parent[key])[:10_000]])
        elif change == "rename" and isinstance(parent, dict):
            parent[rng.choice([f"{key}s", str(key).upper(), "", 1, None, True, 1.5])] = parent.pop(key)
        elif change == "copy":
            parent[key] = copy.deepcopy(_parent(tree, other)[other[-1]])
        elif change == "number" and isinstance(parent[key], (int, float)):
            parent[key] = rng.choice([-parent[key], parent[key] * 1000, parent[key] + 1, 10 ** rng.randint(1, 30)])
        done.append(change)
    return "+".join(done)


def mutate_yaml(text: str, rng: random.Random) -> tuple[str, str]:
    """Change the text of a YAML file; return it and the name of the change."""
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    j = rng.randrange(len(text))
    key = lines[i].split(":")[0]
    name = rng.choice(sorted(_CHANGES))
    size = rng.choice([8, 50, 300, 2000])
    changed = _CHANGES[name](lines, i, size, rng, key)
    if name == "flip":
        return text[:j] + rng.choice("[]{}:,#&*!|>'\"%@`-?\t\\") + text[j + 1 :], name
    return "\n".join(changed) + "\n", name


def _bomb(count: int) -> list[str]:
    return ["b0: &b0 [a, a]", *(f"b{k}: &b{k} [*b{k - 1}, *b{k - 1}]" for k in range(1, min(count, 30)))]


def _merges(count: int) -> list[str]:
    return ["m0: &m0 {x: 1}", *(f"m{k}: &m{k} {{<<: [*m{k - 1}, *m{k - 1}]}}" for k in range(1, min(count, 24)))]


_TAGS = ["!!python/name:os.system", "!!binary AAAA", "!!int abc", "!!float x", "!!timestamp 2001-99-99",
"!!set {a, b}",
         "!!bool maybe", "!local x", "!!str [a]", "!!map [a]", "!!seq {a: 1}", "!!int ''"]  # fmt: skip
_SCALARS = ["0b", "0x", "1__", "0o9", "08", "1:30:00", "2001-02-30", "-.inf", "=", "no", "02146", "9" * 5000]
_KEYS = ["? [a]\n: 1", "? {a: 1}\n: 1", "? .nan\n: 1\n? .nan\n: 2", "&k key: *k", "? &q [*q]\n: 1", "z: *nowhere"]

_CHANGES: dict[str, Callable[[list[str], int, int, random.Random, str], list[str]]] = {
    "tab": lambda s, i, n, r, k: [*s[:i], "\t" + s[i], *s[i + 1 :]],
    "duplicate": lambda s, i, n, r, k: [*s, s[i]],
    "drop": lambda s, i, n, r, k: s[:i] + s[i + 1 :],
    "indent": lambda s, i, n, r, k: [*s[:i], " " * r.randint(1, 9) + s[i], *s[i + 1 :]],
    "bomb": lambda s, i, n, r, k: [*_bomb(n), *s[:i], f"{k}: *b{min(n, 30) - 1}", *s[i + 1 :]],
    "merge bomb": lambda s, i, n, r, k: [*s, *_merges(n)],
    "cycle": lambda s, i, n, r, k: [*s[:i], f"{k}: &n [*n]", *s[i + 1 :]],
    "tag": lambda s, i, n, r, k: [*s[:i], f"{k}: {r.choice(_TAGS)}", *s[i + 1 :]],
    "scalar": lambda s, i, n, r, k: [*s[:i], f"{k}: {r.choice(_SCALARS)}", *s[i + 1 :]],
    "key": lambda s, i, n, r, k: [*s, r.choice(_KEYS)],
    "deep": lambda s, i, n, r, k: [*s, *("  " * d + f"k{d}:" for d in range(n))],
    "brackets": lambda s, i, n, r, k: [*s[:i], f"{k}: {'[' * n}{']' * n}", *s[i + 1 :]],
    "long": lambda s, i, n, r, k: [*s[:i], s[i] + "x" * 200_000, *s[i + 1 :]],
    "cut": lambda s, i, n, r, k: s[:i],
    "mark": lambda s, i, n, r, k: ["\ufeff" + s[0], *s[1:]],
    "control": lambda s, i, n, r, k: [*s[:i], s[i] + r.choice(["\x00", "\x07", "\x85", "\u2028"]), *s[i + 1 :]],
    "document": lambda s, i, n, r, k: [*s[:i], r.choice(["---", "...", "%YAML 9.9", "%TAG ! x"]), *s[i:]],
    "flip": lambda s, i, n, r, k: s,
}


def dump(tree: Any) -> str:
    """Return data as YAML text; what YAML cannot hold becomes an empty mapping."""
    try:
        return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=200))
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        return "{}\n"
