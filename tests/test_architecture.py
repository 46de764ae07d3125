"""Tests of the structure that docs/architecture.md describes. Each rule is also tested on a small bad tree."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import structure
from tests.helpers.structure import LAZY, ONLY, SourceTree

ROOT = Path(__file__).resolve().parents[1]
FAMILY_MAY_IMPORT = (
    "models.backbones.base",
    "models.backbones.layers",
    "models.backbones.nextvit_attention",
    "models.backbones.reversible",
)
FAMILIES = ("nextvit", "repmlp", "revvit", "riformer")

RULES: dict[str, Callable[[SourceTree], list]] = {
    "layers": structure.upward_imports,
    "restricted packages": lambda tree: structure.forbidden_imports(tree, ONLY),
    "import cycles": structure.cycles,
    "imports inside functions": lambda tree: structure.function_scope_imports(tree, LAZY),
    "modules per folder": structure.crowded_folders,
    "unique class names": structure.repeated_classes,
    "function length": structure.long_bodies,
    "file length": structure.long_files,
    "any head": structure.distinguished_heads,
    "forbidden constructs": structure.forbidden_constructs,
}
BAD_TREES: dict[str, list[dict[str, str]]] = {
    "layers": [
        {"utils/a.py": "import models.b", "models/b.py": ""},
        {"data/a.py": "def f():\n    from models import b", "models/b.py": ""},
        {"models/a.py": "if TYPE_CHECKING:\n    from engine.b import c", "engine/b.py": ""},
        {"engine/a.py": "import train", "train.py": ""},
    ],
    "restricted packages": [
        {"models/checkpoint/io.py": "from models.yolo import DetectionModel", "models/yolo.py": ""},
        {"engine/report/html.py": "from engine.train.trainer import Trainer", "engine/train/trainer.py": ""},
    ],
    "import cycles": [
        {"engine/a.py": "import engine.b", "engine/b.py": "import engine.a"},
        {
            "models/a.py": "from . import b",
            "models/b.py": "def f():\n    from models.c import d",
            "models/c.py": "import models.a",
        },
        {"data/a.py": "if TYPE_CHECKING:\n    import data.b", "data/b.py": "import data.a"},
    ],
    "imports inside functions": [{"engine/a.py": "def f():\n    import utils.b", "utils/b.py": ""}],
    "modules per folder": [{f"engine/tune/m{i}.py": "" for i in range(structure.MAX_MODULES + 1)}],
    "unique class names": [{"engine/x/run.py": "class Run: ...", "engine/y/run.py": "class Run: ..."}],
    "function length": [{"utils/a.py": "def f():\n" + "    x = 1\n" * (structure.MAX_BODY + 1)}],
    "file length": [
        {"utils/a.py": "x = 1\n" * (structure.MAX_FILE + 1)},
        {"train.py": "x = 1\n" * (structure.MAX_SCRIPT + 1)},
    ],
    "any head": [
        {"engine/a.py": "from models.heads import AnchorFreeDetect", "models/heads.py": ""},
        {"engine/a.py": "import models.heads\nisinstance(x, models.heads.Detect)", "models/heads.py": ""},
    ],
    "forbidden constructs": [
        {"utils/a.py": text}
        for text in (
            "eval('1')",
            "exec('1')",
            "from os import *",
            "def f():\n    global x",
            "run('ls', shell=True)",
            "sys.path.insert(0, '.')",
            "sys.path += ['.']",
            "torch.load('x')",
            "try:\n    pass\nexcept:\n    pass",
        )
    ],
}


@pytest.fixture(scope="module")
def project() -> SourceTree:
    tree = SourceTree(ROOT)
    assert len(tree.paths) > 100 and len(tree.imports) > 300
    return tree


@pytest.mark.parametrize("rule", RULES)
def test_project_keeps_rule(project, rule):
    assert RULES[rule](project) == []


@pytest.mark.parametrize(("rule", "files"), [(rule, files) for rule, trees in BAD_TREES.items() for files in trees])
def test_rule_finds_violation(tmp_path, rule, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert RULES[rule](SourceTree(tmp_path)) != []


def test_every_rule_has_a_bad_tree():
    assert RULES.keys() == BAD_TREES.keys()


def test_lazy_modules_exist(project):
    assert project.paths.keys() >= LAZY.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_file_imports_only_contract_and_layers(project, family):
    targets = {entry.target for entry in project.imports if entry.importer == f"models.backbones.{family}"}
    assert targets and targets <= set(FAMILY_MAY_IMPORT)


def test_packages_are_empty_except_public_ones(project):
    allowed = {"models.backbones", "data.augment", "engine.runtimes"}
    packages = {name: path for name, path in project.paths.items() if path.name == "__init__.py"}
    assert [name for name, path in packages.items() if path.read_text().strip() and name not in allowed] == []


def test_imports_have_no_side_effects(project, tmp_path):
    """Importing every module prints nothing, writes no files, and leaves global state unchanged."""
    modules = [name for name in project.paths if not name.endswith("__main__")]
    code = f"""
import importlib, os, random, sys
import numpy, torch, torchvision, cv2, matplotlib, logging
def state():
    return (os.getcwd(), torch.get_rng_state().sum().item(), numpy.random.get_state()[1].sum(),
            random.getstate()[1][:5], torch.get_num_threads(), cv2.getNumThreads(), matplotlib.get_backend(),
            list(logging.getLogger().handlers), list(sys.path), torch.get_default_dtype(),
            torch.backends.cudnn.benchmark, dict(os.environ))
before = state()
for name in {modules!r}:
    importlib.import_module(name)
for i, (a, b) in enumerate(zip(before, state())):
    if a != b:
        raise SystemExit(f"state {{i}} changed: {{a}} -> {{b}}")
if os.listdir({str(tmp_path)!r}):
    raise SystemExit("files written")
"""
    env = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MPLCONFIGDIR": str(tmp_path / ".."),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


@pytest.mark.parametrize("script", structure.SCRIPTS)
def test_help_does_not_import_torch(script):
    code = f"import sys, runpy\nsys.argv = ['{script}.py', '--help']\ntry:\n"
    code += f"    runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')\n"
    code += "except SystemExit:\n    print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n" + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().endswith("False"), done.stderr
    assert "--imgsz" in done.stdout


def test_test_modules_do_not_import_each_other() -> None:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(paths) > 80
    pattern = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)
    assert pattern.search("from tests.engine.test_a import b")
    assert [str(path.relative_to(ROOT)) for path in paths if pattern.search(path.read_text())] == []
