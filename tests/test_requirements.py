"""requirements.txt and the extras of pyproject.toml agree, and runtime dependencies are all that imports need."""

from __future__ import annotations

import ast
import sys
import tomllib

from tests.helpers.structure import LAYERS, SCRIPTS, SourceTree
from utils.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Packages with another module name.
PACKAGES = {"cv2": "opencv-python", "PIL": "Pillow", "yaml": "PyYAML"}


def test_requirements_are_those_of_the_project() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    optional = [line for line in EXTRAS["export"] if not line.startswith("openvino")]  # large, for one format
    assert required == [*PROJECT["dependencies"], *optional, *EXTRAS["dev"]]


def test_modules_import_runtime_dependencies_only() -> None:
    runtime = {line.partition(">=")[0].lower() for line in PROJECT["dependencies"]}
    own = {*LAYERS, *SCRIPTS, "hubconf", "yolov5_backbones", *sys.stdlib_module_names}
    for module, tree in SourceTree(ROOT).trees.items():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - own:
                assert PACKAGES.get(name, name).lower() in runtime, f"{module} imports {name}"
