"""Tests that the commands, links and code of README.md, CONTRIBUTING.md and docs/ work.

A block is left out when the comment `<!-- not run: reason -->` stands before it. Commands run in a folder of links to
the project, with a small dataset in the place of each dataset, and fewer epochs and pixels.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.cli.config import DetectConfig, Options, TrainConfig, ValConfig
from engine.cli.parser import _respelled, build_parser
from engine.compare.config import CompareConfig
from engine.export.config import ExportConfig
from models.backbones.published import published_table
from tests.helpers.training import write_project
from utils.files import ROOT

OWN_TESTS = ("docs/add-your-backbone.md",)
"""Pages whose blocks are files that a test of their own writes and runs."""

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS: dict[str, type[Options]] = {
    "train.py": TrainConfig,
    "val.py": ValConfig,
    "detect.py": DetectConfig,
    "export.py": ExportConfig,
    "compare.py": CompareConfig,
}
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced code block: page:line, language, code, and why it is not run."""

    place: str
    language: str
    code: str
    reason: str | None


def blocks_of(text: str, name: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [
        Block(f"{name}:{text[: m.start('code')].count(chr(10)) + 1}", m["language"], m["code"], m["reason"])
        for m in _BLOCK.finditer(text)
    ]


def commands_of(code: str) -> list[str]:
    """Return the commands of a block, continuation lines joined, comments removed."""
    lines = code.replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if shlex.split(line, comments=True)]


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), str(page.relative_to(ROOT)))]


def test_blocks_of_finds_language_line_and_reason() -> None:
    text = "a\n\n<!-- not run: slow -->\n```bash\nx\n```\nb\n```python\ny\n```\n"
    assert blocks_of(text, "p") == [Block("p:5", "bash", "x\n", "slow"), Block("p:9", "python", "y\n", None)]


def test_commands_in_the_documentation_have_valid_options() -> None:
    checked = 0
    for page in PAGES:
        text = page.read_text()
        code = [b.code for b in blocks_of(text, "") if b.language == "bash"] + re.findall(r"`(python [^`\n]+)`", text)
        for command in [c for block in code for part in block.split("&&") for c in commands_of(part)]:
            words = command.split()
            script = next((w for w in words if w in CONFIGS), None)
            if script is None or "..." in words:
                continue
            config, arguments = CONFIGS[script], words[words.index(script) + 1 :]
            given = build_parser(config, f"{page.name}: {script}", "").parse_args(_respelled(config, arguments))
            assert given is not None
            checked += 1
    assert checked > 40


def test_links_in_the_documentation_lead_to_files() -> None:
    broken, checked = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                checked += 1
                broken += [] if (page.parent / target).exists() else [f"{page.name}: {target}"]
    assert checked > 50
    assert not broken


def test_weights_page_lists_every_published_file() -> None:
    text = (ROOT / "docs/weights.md").read_text()
    missing = [
        w.file
        for w in published_table().values()
        if f"| `{w.file}` | {f'`{w.sha256}`' if w.sha256 else ''} |" not in text
    ]
    assert not missing


# ---- running the blocks ---------------------------------------------------------------------------------------------

SHORTER = (
    (r"--epochs \d+", "--epochs 1"),
    (r"--imgsz \d+", "--imgsz 64"),
    (r"--evolve \d+", "--evolve 2"),
    (r"--batch-size \d+", "--batch-size 8"),
    (r"\bbccd\.yaml", "my.yaml"),
    (r"timm/convnext_atto", "models/yolov5n-free.yaml"),
    (r"--device 1\b", "--device cpu"),
    (r"--max-latency-ms 40", "--max-latency-ms 4000"),
    (r"imgsz=\d+, epochs=\d+", "imgsz=64, epochs=1"),
    (r"path/to/this/folder", str(ROOT)),
    (r"a\.jpg|https://example\.org/b\.png", "image.jpg"),
)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the project, a trained run, and the files that the documentation names."""
    folder = tmp_path_factory.mktemp("docs")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    write_project(folder)
    (folder / "data.yaml").rename(folder / "my.yaml")
    run(folder, "python train.py --cfg tiny.yaml --data my.yaml --epochs 1 --imgsz 64 --workers 0")
    best = folder / "runs/train/exp/weights/best.pt"
    shutil.copytree(folder / "runs/train/exp", folder / "runs/train/exp2")
    for name in ("best.pt", "yolov5s.pt"):
        shutil.copy(best, folder / name)
    for name in ("images", "new-images"):
        shutil.copytree(folder / "set/images/val", folder / name)
    shutil.copy(next((folder / "images").glob("*.*")), folder / "image.jpg")
    return folder


def run(folder: Path, command: str) -> None:
    """Run one command of the documentation, made shorter; the test fails with its last lines."""
    for pattern, replacement in SHORTER:
        command = re.sub(pattern, replacement, command)
    words = [sys.executable if w == "python" else w for w in command.split()]
    done = subprocess.run(["env", *words], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stderr[-1500:]}"


def is_run(command: str) -> bool:
    """Whether a command is one of ours, written out, for one machine."""
    words = command.split()
    ours = any(w in CONFIGS for w in words) or words[:2] == ["python", "-m"]
    return ours and "..." not in words and words[0] in ("python", "OMP_NUM_THREADS=1")


RUN = [b for b in BLOCKS if b.reason is None and not b.place.startswith(OWN_TESTS) and b.language in ("bash", "python")]


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(RUN) > 10
    silent = [b.place for b in RUN if b.language == "bash" and not any(is_run(c) for c in commands_of(b.code))]
    assert not silent


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=lambda block: block.place)
def test_block_runs(block: Block, sandbox: Path) -> None:
    if block.language == "python":
        code = block.code
        for pattern, replacement in SHORTER:
            code = re.sub(pattern, replacement, code)
        script = sandbox / "block.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport numpy as np\n"
            f"array = np.zeros((64, 64, 3), np.uint8)\nif __name__ == '__main__':\n{textwrap.indent(code, '    ')}"
        )
        run(sandbox, "python block.py")
    for command in commands_of(block.code) if block.language == "bash" else ():
        if is_run(command):
            run(sandbox, command)
