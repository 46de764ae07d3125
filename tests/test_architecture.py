"""The house rules: who may import whom, and what no file may contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"utils": 0, "data": 1, "models": 1, "engine": 2}
SCRIPT_FLOOR = 3
FAMILY_ALLOWED = {"models.backbones.base", "models.backbones.layers"}
NOT_FAMILIES = {"__init__", "__main__", "base", "layers"}


def _sources() -> list[Path]:
    tops = [p for p in ROOT.glob("*.py")]
    return sorted(tops + [p for name in FLOORS for p in (ROOT / name).rglob("*.py")])


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> int | None:
    top = module.split(".")[0]
    if top in FLOORS:
        return FLOORS[top]
    return SCRIPT_FLOOR if (ROOT / f"{top}.py").is_file() else None


def _imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import, those inside functions and TYPE_CHECKING blocks too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = _module(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names] + [(base, node.lineno)]
    return found


def floor_breaks(path: Path) -> list[str]:
    """Imports of a file that go up, or to the sibling on the same floor."""
    here = _module(path)
    mine = _floor(here)
    out = []
    for name, line in _imports(path):
        theirs = _floor(name)
        if theirs is None or mine is None:
            continue
        sibling = theirs == mine and name.split(".")[0] != here.split(".")[0]
        if theirs > mine or (sibling and mine < SCRIPT_FLOOR):
            out.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {name}")
    return out


def test_imports_go_down():
    assert [b for p in _sources() for b in floor_breaks(p)] == []


def test_backbone_files_stand_alone():
    """A student reads one backbone file beside the paper: it needs only the contract and the shared layers."""
    bad = []
    for path in (ROOT / "models/backbones").glob("*.py"):
        if path.stem in NOT_FAMILIES or path.stem.startswith(("published", "timm_")):
            continue
        for name, line in _imports(path):
            inside = _floor(name) is not None
            if inside and not any(name == a or name.startswith(a + ".") for a in FAMILY_ALLOWED | {"models.backbones"}):
                bad.append(f"{path.name}:{line}: {name}")
            if inside and name.startswith("models.backbones.") and not name.startswith(tuple(FAMILY_ALLOWED)):
                bad.append(f"{path.name}:{line}: {name}")
    assert bad == []


def forbidden(tree: ast.AST, module: str) -> list[str]:
    """Constructs that hide what happens or run what a user wrote."""
    out = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Global):
            out.append(f"{module}:{line}: global")
        elif isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            out.append(f"{module}:{line}: star import")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            out.append(f"{module}:{line}: bare except")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system"):
                out.append(f"{module}:{line}: {name}")
            if any(k.arg == "shell" and getattr(k.value, "value", False) for k in node.keywords):
                out.append(f"{module}:{line}: shell=True")
            if name.startswith("sys.path."):
                out.append(f"{module}:{line}: {name}")
            if name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler") and not module.startswith(
                ("models.checkpoint.io", "models.checkpoint.inert")
            ):
                out.append(f"{module}:{line}: {name}")
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(t).startswith("sys.path") for t in targets):
                out.append(f"{module}:{line}: sys.path")
    return out


def test_nothing_forbidden():
    found = [f for p in _sources() for f in forbidden(ast.parse(p.read_text(encoding="utf-8")), _module(p))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec('1')",
        "from os import *",
        "def f():\n    global x",
        "run('ls', shell=True)",
        "sys.path.insert(0, '.')",
        "sys.path += ['.']",
        "torch.load('x')",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_the_check_sees(text):
    assert forbidden(ast.parse(text), "models.some")


def test_imports_have_no_side_effects(tmp_path):
    """Importing every module prints nothing, writes nothing, and leaves generators, threads and warnings alone."""
    modules = [m for m in map(_module, _sources()) if not m.endswith("__main__")]
    code = f"""
import importlib, os, random, sys
import numpy, torch, torchvision, cv2, matplotlib, logging
before = (os.getcwd(), torch.get_rng_state().sum().item(), numpy.random.get_state()[1].sum(), random.getstate()[1][:5],
          torch.get_num_threads(), cv2.getNumThreads(), list(logging.getLogger().handlers), matplotlib.get_backend(),
          list(sys.path), torch.get_default_dtype(), torch.backends.cudnn.benchmark, dict(os.environ))
for name in {modules!r}:
    importlib.import_module(name)
after = (os.getcwd(), torch.get_rng_state().sum().item(), numpy.random.get_state()[1].sum(), random.getstate()[1][:5],
         torch.get_num_threads(), cv2.getNumThreads(), list(logging.getLogger().handlers), matplotlib.get_backend(),
         list(sys.path), torch.get_default_dtype(), torch.backends.cudnn.benchmark, dict(os.environ))
for i, (a, b) in enumerate(zip(before, after)):
    if a != b:
        raise SystemExit(f"state {{i}} changed: {{a}} -> {{b}}")
if any(tmp for tmp in os.listdir({str(tmp_path)!r})):
    raise SystemExit("files written")
"""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    env["MPLCONFIGDIR"] = str(tmp_path / "..")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["train.py", "val.py", "detect.py", "export.py"])
def test_help_does_not_import_torch(script):
    code = "import sys, runpy\nsys.argv = ['x', '--help']\ntry:\n"
    code += "    runpy.run_path(sys.path.pop(), run_name='__main__')\n"
    code += "except SystemExit:\n    print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT / script)!r})\n" + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().endswith("False"), done.stderr
    assert "--imgsz" in done.stdout
