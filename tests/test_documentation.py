"""Tests that the commands, links and code of README.md, CONTRIBUTING.md and docs/ work.

A block is skipped when the comment `<!-- not run: reason -->` precedes it. The blocks of a page run in order, in a
folder of links to the project, with a small dataset in place of each dataset, fewer epochs and pixels.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from data.config import load_data_config
from engine.cli.config import DetectConfig, Options, TrainConfig, ValConfig
from engine.cli.parser import _respelled, build_parser
from engine.compare.config import CompareConfig
from engine.export.config import ExportConfig
from models.backbones.published import published_table
from models.yolo import DetectionModel
from tests.helpers.training import write_project
from tests.helpers.videos import write_video
from utils.files import ROOT

OWN_TESTS = ("docs/add-your-backbone.md",)
"""Pages whose blocks are files that a test of their own writes and runs."""

CHECKED_APART = ("README.md", "docs/datasets.md")
"""Pages whose YAML blocks have tests of their own."""

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


def test_results_in_the_readme_are_those_of_the_file() -> None:
    with open(ROOT / "benchmarks/results/compare.csv", encoding="utf-8") as stream:
        measured = [row for row in csv.DictReader(stream) if row["status"] == "measured"]
    expected = set()
    for row in measured:
        accuracy = [f"{float(row[name]):.3f}" for name in ("map", "map_range_low", "map_range_high", "map50")]
        time = [f"{float(row[f'pytorch_deployed_b1_ms{end}']):.1f}" for end in ("", "_low", "_high")]
        expected.add(
            f"| {row['backbone']} | {row['head']} | {accuracy[0]} | {accuracy[1]} to {accuracy[2]} | {accuracy[3]} | "
            f"{time[0]} ({time[1]} to {time[2]}) | {int(row['parameters']) / 1e6:.2f} |"
        )
    assert set(re.findall(r"^\| \S+ \| (?:anchor|free) \| .*$", (ROOT / "README.md").read_text(), re.M)) == expected


def test_images_are_small_and_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for path in (ROOT / "docs/images").glob("*.[jp][pn]g"):
        assert path.stat().st_size < 200_000 and f"images/{path.name}" in text


# ---- running the blocks ---------------------------------------------------------------------------------------------

SHORTER = (
    (r"--epochs \d+", "--epochs 1"),
    (r"--imgsz \d+", "--imgsz 64"),
    (r"--tile \d+", "--tile 64"),
    (r"--evolve \d+", "--evolve 2"),
    (r"--batch-size \d+", "--batch-size 8"),
    (r"--batch 1 8", "--batch 2"),
    (r"--seeds [\d ]+", "--seeds 0 "),
    (r"(python train\.py (?!--resume)(?!.*--epochs).*)", r"\1 --epochs 1"),
    (r"(python (?:train|compare)\.py (?!--resume)(?!.*--imgsz).*)", r"\1 --imgsz 64"),
    (r"(python compare\.py .*)", r"\1 --rounds 3 --seconds 0 --workers 0"),
    (r"\bbccd\.yaml", "my.yaml"),
    (r"timm/convnext_atto", "tiny.yaml"),
    (r"--device 1\b", "--device cpu"),
    (r"--max-latency-ms 40", "--max-latency-ms 4000"),
    (r"imgsz=\d+, epochs=\d+", "imgsz=64, epochs=1"),
    (r"path/to/this/folder", str(ROOT)),
    (r"a\.jpg|https://example\.org/b\.png", "image.jpg"),
)
NOT_RUN = {
    "pip install optuna": "installs a package",
    "python train.py --resume": "needs an interrupted training; tests/engine/train/test_interrupt.py makes some",
}


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the project, a trained run, and the files that the documentation names."""
    folder = tmp_path_factory.mktemp("docs")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    write_project(folder)
    with open(folder / "data.yaml", "a", encoding="utf-8") as stream:
        stream.write("test: images/test\n")
    shutil.copy(folder / "data.yaml", folder / "my.yaml")
    run(folder, "python train.py --cfg tiny.yaml --data my.yaml --epochs 1 --imgsz 64 --workers 0")
    best = folder / "runs/train/exp/weights/best.pt"
    shutil.copytree(folder / "runs/train/exp", folder / "runs/train/exp2")
    for name in ("best.pt", "yolov5s.pt"):
        shutil.copy(best, folder / name)
    for name in ("images", "new-images"):
        shutil.copytree(folder / "set/images/val", folder / name)
    shutil.copy(next((folder / "images").glob("*.*")), folder / "image.jpg")
    write_video(folder / "video.mp4", code="mp4v")
    run(folder, "python -m data.convert my.yaml coco --to coco")
    shutil.copy(folder / "coco/annotations/train.json", folder / "annotations.json")
    shutil.copytree(folder / "coco/images/train", folder, dirs_exist_ok=True)
    return folder


def shorter(code: str) -> str:
    """Return commands or Python code with small sizes and the files of the sandbox."""
    for pattern, replacement in SHORTER:
        code = re.sub(pattern, replacement, code)
    return code


def run(folder: Path, command: str) -> None:
    """Run a command and print its wall time; the test fails with its last lines."""
    start = time.perf_counter()
    words = [sys.executable if w == "python" else w for w in command.split()]
    done = subprocess.run(["env", *words], cwd=folder, capture_output=True, text=True, timeout=1200)
    print(f"{time.perf_counter() - start:6.1f} s  {command}")
    assert done.returncode == 0, f"{command}\n{done.stderr[-1500:]}"


def is_run(command: str) -> bool:
    """Return whether a command is one of ours, written out, for one machine."""
    words = command.split()
    ours = any(w in CONFIGS for w in words) or words[:2] == ["python", "-m"]
    return ours and command not in NOT_RUN and words[0] in ("python", "OMP_NUM_THREADS=1")


RUN = [b for b in BLOCKS if b.reason is None and not b.place.startswith(OWN_TESTS) and b.language in ("bash", "python")]


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(RUN) > 10
    commands = [c for b in RUN if b.language == "bash" for c in commands_of(b.code)]
    assert [c for c in commands if not is_run(c) and c not in NOT_RUN] == []
    assert set(NOT_RUN) <= set(commands)
    others = [b.place for b in BLOCKS if b.language not in ("bash", "python", "") and b.reason is None]
    assert [place for place in others if not place.startswith((*OWN_TESTS, *CHECKED_APART))] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(b.place.partition(":")[0] for b in RUN))
def test_blocks_of_a_page_run(page: str, sandbox: Path) -> None:
    for block in (b for b in RUN if b.place.partition(":")[0] == page):
        if block.language == "python":
            (sandbox / "block.py").write_text(
                f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport numpy as np\n"
                "array = np.zeros((64, 64, 3), np.uint8)\n"
                f"if __name__ == '__main__':\n{textwrap.indent(shorter(block.code), '    ')}"
            )
            run(sandbox, "python block.py")
        for command in commands_of(block.code) if block.language == "bash" else ():
            if is_run(command):
                run(sandbox, shorter(command))


def code_of(page: str, language: str) -> str:
    """Return the only block of a language of a page."""
    (block,) = (b for b in BLOCKS if b.place.startswith(f"{page}:") and b.language == language)
    return block.code


def test_backbone_in_one_row_is_a_model() -> None:
    spec = yaml.safe_load(code_of("README.md", "yaml"))
    values = {"nc": 1, "depth_multiple": 1.0, "width_multiple": 0.25, "anchors": [[10, 13]]}
    spec["head"].append([[-1], 1, "Detect", ["nc", "anchors"]])
    model = DetectionModel({**values, **spec}).eval()
    assert model(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4 * 4, 6)  # P4 in the end


def test_dataset_yaml_is_read(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / "datasets/blood/images" / split).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/blood.yaml").write_text(code_of("docs/datasets.md", "yaml"))
    data = load_data_config(tmp_path / "data/blood.yaml")
    assert list(data.names.values()) == ["RBC", "WBC", "Platelets"] and set(data.splits) == {"train", "val", "test"}
