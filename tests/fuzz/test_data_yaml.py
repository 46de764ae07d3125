"""Dataset YAMLs, changed in structure, values and text; names are compared with the YAML's own."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data.config import load_data_config
from data.labels.labels import load_annotations
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from tests.helpers.mutations import dump, mutate_tree, mutate_yaml
from utils.errors import UserError

pytestmark = pytest.mark.fuzz
VOC_SETS = {"sets": [{"folder": "V/V", "list": "train", "split": "train"}], "corner_base": 1}
VALUES: dict[str, list[Any]] = {
    "path": ["", ".", "..", "~", "~nosuchuser/x", "x" * 300, "a\x00b", "loop", 3, None, [], "fifo", "ü/日本",
             "C:\\data", " "],
    "train": ["", ".", "~nosuchuser/x", "x" * 300, "y/" * 3000, "a\x00b", "loop", "fifo", "/dev/zero",
              "../images/train",
              "images/train/0.png", ["images/train"] * 2, [[]], {}, 1, True, ["images/train", 5],
              "list.txt", "x.json"],
    "names": [[], {}, ["a", "a"], {0: "a", 2: "b"}, {"0": "a"}, {1: "a", 0: "b"}, {-1: "a"}, ["", "b"],
              [None], [1, 2.5],
              ["a\nb"], ["a" * 10_000], "abc", 3, [["a"]], {0: ["a"]}, ["ü", "日"], [float("nan")], ["a"] * 2000,
              {10**30: "a"}],
    "nc": [0, 1, 2, 3, -1, 1.0, "3", True, None, 10**6, 10**30, float("nan"), [3]],
    "download": ["", "x", False, 3, [], {}, {"files": []}, {"files": [3]}, {"files": [{"url": 3}]}, "bash x.sh",
                 {"files": [{"url": "http://127.0.0.1:1/.."}]}, {"files": [{"url": "http://[::1/x.zip"}]},
                 {"files": [{"url": "http://127.0.0.1:99999/x.zip"}]}, "http://[::1/x.zip",
                 "http://127.0.0.1:1/x.zip"],
    "generate": ["shapes", "x", 3, [], {}, {"kind": "shapes", "train": 0}, {"kind": "shapes", "imgsz": 1.5},
                 {"kind": "shapes", "train": 1, "val": 1, "test": 0, "imgsz": 64}, {"kind": ["shapes"]}, {1: 2}],
    "images": ["", ".", 3, [], {}, {"x": "y"}, {"train": 3}, {"train": "nowhere"}, "~nosuchuser", "loop", "a\x00b"],
}  # fmt: skip


def write_set(folder: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(folder / f"images/{split}/{i}.png"), np.full((32, 40, 3), 50 + i, np.uint8))
            (folder / f"labels/{split}/{i}.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    os.symlink("loop", folder / "loop")
    os.mkfifo(folder / "fifo")
    (folder / "list.txt").write_text("./images/train/0.png\n")


def bases(folder: Path) -> list[dict[str, Any]]:
    splits = {"train": "images/train", "val": "images/val"}
    shapes = {"kind": "shapes", "train": 2, "val": 2, "test": 1, "imgsz": 64}
    files = [{"url": f"file://{folder}/x.zip", "md5": "00", "unpack": ".", "strip": 0}]
    return [
        {"path": str(folder), **splits, "names": ["a", "b", "c"]},
        {"path": ".", **splits, "test": None, "nc": 2, "names": {0: "a", 1: "b"}},
        {**splits, "nc": 3},
        {"path": "drawn", **splits, "names": ["circle", "square"], "generate": shapes},
        {"path": "got", **splits, "names": ["a"], "download": {"files": files, "voc": VOC_SETS}},
        {"path": str(folder), **splits, "names": ["a"], "images": {"train": "images/train"}},
    ]


def make(rng: random.Random, folder: Path) -> Case:
    write_set(folder)
    tree = copy.deepcopy(rng.choice(bases(folder)))
    kind = rng.choice(["value", "value", "values", "tree", "text"])
    if kind in ("value", "values"):
        for _ in range(1 if kind == "value" else 3):
            key = rng.choice(sorted(VALUES))
            tree[key] = rng.choice(VALUES[key])
    elif kind == "tree":
        kind += " " + mutate_tree(tree, rng)
    text = dump(tree)
    if kind == "text":
        text, change = mutate_yaml(text, rng)
        kind += " " + change
    (folder / "d.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    names = tree.get("names") if kind[:4] != "text" else None
    return Case(lambda: check(folder, names), kind, text)


def check(folder: Path, names: Any) -> None:
    config = load_data_config(folder / "d.yaml")
    comparable = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if comparable and list(config.names.values()) != names:
        raise WrongResult(f"names {config.names}, {names} expected")
    recipe = config.shapes
    if recipe and max(recipe.train, recipe.val, recipe.test) * recipe.imgsz**2 > 20 * 128 * 128:
        return  # takes long
    for split in config.splits:
        try:
            sources = config.split(split)
        except UserError:
            continue
        load_annotations(sources, config.num_classes, progress=False, cache_folder=folder)


def test_data_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert faults(make, seeds(), tmp_path) == []
