"""Model YAML -> ModelSpec: what is read, and what is logged about each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from models.build.spec import ModelSpec, load_model_spec
from models.registry import Registry
from utils.errors import SpecError

GOOD = """\
nc: 3
depth_multiple: 0.33
width_multiple: 0.25
activation: nn.LeakyReLU(0.1)
anchors:
  - [10, 13, 16, 30]
  - [30, 61, 62, 45]
backbone:
  - [-1, 1, Conv, [64, 6, 2, 2]]
  - [-1, 3, C3, [128, False]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 0, P4], 1, Concat, [1]]
  - [[1, 2], 1, Detect, [nc, anchors]]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def errors(folder: Path, text: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(SpecError) as caught:
        load_model_spec(path)
    return [line.replace(str(path), "my.yaml") for line in str(caught.value).splitlines()]


def test_rows_carry_everything_a_builder_needs(tmp_path: Path) -> None:
    spec = load_model_spec(write(tmp_path, GOOD))
    assert (spec.num_classes, spec.depth_multiple, spec.width_multiple) == (3, 0.33, 0.25)
    assert (spec.channel_multiple, spec.activation) == (8, "nn.LeakyReLU(0.1)")
    assert spec.anchors == ((10, 13, 16, 30), (30, 61, 62, 45))
    assert spec.anchors_per_level == 2
    found = [(r.row, r.sources, r.repeats, r.module, r.args, r.line, r.section) for r in spec.layers]
    assert found == [
        (0, (-1,), 1, "Conv", (64, 6, 2, 2), 9, "backbone"),
        (1, (-1,), 3, "C3", (128, False), 10, "backbone"),
        (2, (-1,), 1, "nn.Upsample", (None, 2, "nearest"), 12, "head"),  # the word None is YOLOv5's null
        (3, (-1, 0, "P4"), 1, "Concat", (1,), 13, "head"),
        (4, (1, 2), 1, "Detect", ("nc", "anchors"), 14, "head"),
    ]


def test_mapping_arguments_are_kept(tmp_path: Path) -> None:
    row = "[-1, 1, RIFormer, {arch: s12, weights: None, out: [1, 2]}]"
    spec = load_model_spec(write(tmp_path, GOOD.replace("[-1, 1, Conv, [64, 6, 2, 2]]", row)))
    assert spec.layers[0].args == {"arch": "s12", "weights": None, "out": (1, 2)}


def test_to_dict_is_plain_and_reads_back_the_same(tmp_path: Path) -> None:
    spec = load_model_spec(write(tmp_path, GOOD)).replaced(4, None, None)
    plain = spec.to_dict()
    again = load_model_spec(yaml.safe_load(yaml.safe_dump(plain)))
    assert again.to_dict() == plain
    assert plain["ch"] == 4
    assert plain["head"][1] == [[-1, 0, "P4"], 1, "Concat", [1]]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("yolov5n.yaml", 25),  # in models/
        ("yolov5n6.yaml", 34),  # in models/hub/
        ("yolov5n", 25),  # the suffix may be left out
        ("models/hub/yolov3.yaml", 29),
    ],
)
def test_official_files_are_found_by_name(
    name: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_model_spec(name).layers) == layers


ROW = "[-1, 3, C3, [128, False]]"  # line 10
CASES = [
    # (what is replaced, by what, what is logged)
    ("nc: 3", "nc: 3\nwidth_multiplier: 1",
     ["my.yaml:2: unknown key 'width_multiplier'; allowed: nc, ch, depth_multiple,"
     " width_multiple, channel_multiple, activation, inplace, anchors, backbone, head; "
     "did you mean 'width_multiple'?"]),
    ("nc: 3\n", "", ["my.yaml: key 'nc' is missing"]),
    ("nc: 3", "nc: 0", ["my.yaml:1: nc is 0; allowed: integers from 1 to 10000"]),
    ("nc: 3", "nc: true", ["my.yaml:1: nc is True; allowed: integers from 1 to 10000"]),
    ("0.25", "wide", ["my.yaml:3: width_multiple is 'wide'; allowed: numbers above 0 to 10"]),
    ("nc: 3", "nc: 100000000", ["my.yaml:1: nc is 100000000; allowed: integers from 1 to 10000"]),
    ("0.25", ".inf", ["my.yaml:3: width_multiple is inf; allowed: numbers above 0 to 10"]),
    ("0.25", "1.0e+9", ["my.yaml:3: width_multiple is 1000000000.0; allowed: numbers above 0 to 10"]),
    ("[10, 13, 16, 30]", "[10, 13, 16, .nan]",
     ["my.yaml:5: anchors contain a value that is not a size in pixels (at most 100000); allowed: "
     "one list of width, height, width, height ... in pixels per level, or an integer from 1 to 100"]),
    (ROW, "[-1, 100000, C3, [128]]", ["my.yaml:10: row 1 (C3): number is 100000; allowed: integers from 1 to 100"]),
    ("nn.LeakyReLU(0.1)", "[a]", ["my.yaml:4: activation is ['a']; a string such as nn.LeakyReLU(0.1) is needed"]),
    ("[10, 13, 16, 30]", "[10, 13, 16]",
     ["my.yaml:5: rows of anchors have 3, 4 values; an equal and even number is needed"]),
    ("[10, 13, 16, 30]", "[10, 13, x, 30]",
     ["my.yaml:5: anchors contain a value that is not a size in pixels (at most 100000); allowed: "
     "one list of width, height, width, height ... in pixels per level, or an integer from 1 to 100"]),
    (ROW, "[-1, 3, C3]", ["my.yaml:10: row 1 is [-1, 3, 'C3']; a row is [from, number, module, arguments]"]),
    (ROW, "[-1, 3, C3, [128], x]",
     ["my.yaml:10: row 1 is [-1, 3, 'C3', [128], 'x']; a row is [from, number, module, arguments]"]),
    (ROW, "C3", ["my.yaml:10: row 1 is 'C3'; a row is [from, number, module, arguments]"]),
    (ROW, "[-1, 0, C3, [128]]", ["my.yaml:10: row 1 (C3): number is 0; allowed: integers from 1 to 100"]),
    (ROW, "[-1, 3, C3, 128]", ["my.yaml:10: row 1 (C3): arguments are 128; a list is needed, such as [128]"]),
    (ROW, "[1.5, 3, C3, [128]]",
     ["my.yaml:10: row 1 (C3): from is 1.5; allowed: slot indices and level names such as P4"]),
    (ROW, "[-1, 3, 5, [128]]", ["my.yaml:10: row 1: the module is 5; a name is needed; "
     "a row is [from, number, module, arguments]"]),
    ("  - [-1, 1, Conv, [64, 6, 2, 2]]\n  - " + ROW, "  Conv",
     ["my.yaml:8: backbone is 'Conv'; a list of rows is needed; "
     "a row is [from, number, module, arguments]"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), CASES)
def test_a_mistake_is_reported_with_its_line(old: str, new: str, said: list[str], tmp_path: Path) -> None:
    assert old in GOOD
    assert errors(tmp_path, GOOD.replace(old, new, 1)) == said


def test_all_mistakes_of_a_file_are_reported_together(tmp_path: Path) -> None:
    text = GOOD.replace("nc: 3", "nc: -3").replace(ROW, "[-1, 3, C3]").replace("[nc, anchors]]", "nc]")
    assert [line.split(":")[1] for line in errors(tmp_path, text)] == ["1", "10", "14"]


def test_a_missing_file_names_the_nearest_one() -> None:
    with pytest.raises(SpecError, match=r"yolov5sx\.yaml: no such file .* did you mean 'yolov5.*\.yaml'\?"):
        load_model_spec("yolov5sx.yaml")


@pytest.mark.parametrize(
    ("channels", "num_classes", "anchors", "expected"),
    [
        (3, None, None, (3, 3, ((10, 13, 16, 30), (30, 61, 62, 45)))),
        (1, 7, 4, (1, 7, 4)),
        (3, None, 5.0, (3, 3, 5)),  # as in a hyperparameter file
        (3, None, [[1, 2], [3, 4]], (3, 3, ((1, 2), (3, 4)))),
        (3, None, [[[1, 2], [5, 6]], [[3, 4], [7, 8]]], (3, 3, ((1, 2, 5, 6), (3, 4, 7, 8)))),  # pairs
    ],
)
def test_overrides(channels: int, num_classes: int | None, anchors: Any, expected: Any, tmp_path: Path) -> None:
    spec = load_model_spec(write(tmp_path, GOOD)).replaced(channels, num_classes, anchors)
    assert (spec.channels, spec.num_classes, spec.anchors) == expected


def test_the_files_own_channels_win() -> None:
    assert spec_with(channels=4).replaced(3, None, None).channels == 4


@pytest.mark.parametrize(("num_classes", "anchors"), [(0, None), (True, None), (None, 0), (None, [[1, 2, 3]])])
def test_overrides_out_of_range_are_refused(num_classes: Any, anchors: Any) -> None:
    with pytest.raises(SpecError, match="my.yaml"):
        spec_with().replaced(3, num_classes, anchors)


def spec_with(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"num_classes": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3}
    return ModelSpec(path="my.yaml", **{**values, **changes})


def test_registry_refuses_a_clash_and_suggests_on_a_miss() -> None:
    registry: Registry[object] = Registry("module")
    conv = object()
    assert registry.register("Conv", conv) is registry.get("Conv") is conv
    registry.register("Conv", conv)  # the same object again is no clash
    assert registry.names() == ("Conv",) and "Conv" in registry and "C3" not in registry
    with pytest.raises(SpecError, match="module 'Conv' is already registered"):
        registry.register("Conv", object())
    with pytest.raises(SpecError, match=r"unknown module 'Konv'; did you mean 'Conv'\?"):
        registry.get("Konv")


@pytest.mark.parametrize("line", ["inplace: True", "ch: 3", "channel_multiple: 4"])
def test_load_model_spec_accepts_optional_keys(tmp_path: Path, line: str) -> None:
    load_model_spec(write(tmp_path, f"{line}\n{GOOD}"))
