"""Transfer of weights between networks by matching rows; a coincidence is an error."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint.io import Checkpoint
from models.loading import transfer_weights
from models.yolo import DetectionModel
from utils.errors import CheckpointError

C3_ROW = [-1, 1, "C3", [32]]
SPEC: dict[str, Any] = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],  # 0
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3", [16]],  # 2
        [-1, 1, "Conv", [32, 3, 2]],
        C3_ROW,  # 4
    ],
    "head": [
        [-1, 1, "Conv", [16, 1, 1]],  # 5
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],  # 7
        [-1, 1, "C3", [16, False]],
        [[8, 5], 1, "Detect", ["nc", "anchors"]],  # 9
    ],
}


def changed(*edits: tuple[str, int, Any], **keys: Any) -> dict[str, Any]:
    """Return SPEC with rows replaced (section, index, row) and other keys."""
    spec = {**deepcopy(SPEC), **keys}
    for section, index, row in edits:
        spec[section][index] = row
    return spec


def trained(cfg: Any) -> Checkpoint:
    """Return a checkpoint of `cfg` in which every value is unique."""
    model = DetectionModel(deepcopy(cfg))
    state = {
        key: torch.rand_like(value) if value.is_floating_point() else value + 7
        for key, value in model.state_dict().items()
    }
    return Checkpoint(Path("old.pt"), "own", model.yaml, state, {0: "a", 1: "b"}, tuple(model.stride.tolist()))


def transferred(cfg: Any, checkpoint: Checkpoint, **options: Any) -> tuple[Any, dict[int, set[int]]]:
    """Return the report, and for each row of the new model the rows of the old one that its values come from."""
    model = DetectionModel(deepcopy(cfg))
    report = transfer_weights(model, checkpoint, **options)
    origin: dict[int, set[int]] = {}
    state = model.state_dict()
    for key in report.matched:
        row, name = key.split(".", 2)[1:]
        same = [k for k, v in checkpoint.state.items() if v.shape == state[key].shape and torch.equal(v, state[key])]
        rows = {int(k.split(".")[1]) for k in same if k.split(".", 2)[2] == name}
        if not key.endswith("num_batches_tracked"):
            origin.setdefault(int(row), set()).update(rows)
    return report, origin


def test_transfer_to_the_same_network_is_complete():
    report, origin = transferred(SPEC, trained(SPEC), exclude=())
    assert report.transferred == report.total and report.missing == () == report.unexpected
    assert origin == {row: {row} for row in (0, 1, 2, 3, 4, 5, 8, 9)}


@pytest.mark.parametrize(
    ("nc", "exclude", "lacking"),
    [
        (2, ("anchor",), ["anchors"]),
        (5, ("anchor",), ["anchors", "m.0.weight", "m.0.bias", "m.1.weight", "m.1.bias"]),
        (5, (), ["m.0.weight", "m.0.bias", "m.1.weight", "m.1.bias"]),
        (2, ("anchor", "model.0."), ["anchors"]),
    ],
)
def test_transfer_with_other_classes_and_excluded_keys(nc, exclude, lacking):
    checkpoint = trained(SPEC)
    model = DetectionModel(deepcopy(SPEC), nc=nc)
    head = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("model.9.")}
    report = transfer_weights(model, checkpoint, exclude=exclude)
    not_taken = (*report.missing, *(key for key, *_ in report.mismatched))
    own = [key for key in model.state_dict() if key in not_taken and not key.startswith("model.0.")]
    assert own == [f"model.9.{name}" for name in lacking]
    assert any(key.startswith("model.0.") for key in report.missing) == ("model.0." in exclude)
    for key in own:
        torch.testing.assert_close(model.state_dict()[key], head[key], rtol=0, atol=0)
    assert report.summary().startswith(f"Transferred {report.total - len(not_taken)}/{report.total} items")


CHANGES = [
    # (change, new spec, row of the new model -> row that its weights come from)
    ("first row", changed(("backbone", 0, [-1, 1, "Conv", [8, 5, 2]])), {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 8: 8, 9: 9}),
    ("a row's class", changed(("backbone", 4, [-1, 1, "C3x", [32]])), {0: 0, 1: 1, 2: 2, 3: 3, 5: 5, 8: 8, 9: 9}),
    ("a row's depth", changed(("backbone", 2, [-1, 2, "C3", [16]])), {0: 0, 1: 1, 3: 3, 4: 4, 5: 5, 8: 8, 9: 9}),
    (
        "an additional row",
        changed(
            backbone=[*SPEC["backbone"][:3], [-1, 1, "Conv", [16, 3, 1]], *SPEC["backbone"][3:]],
            head=[*SPEC["head"][:4], [[9, 6], 1, "Detect", ["nc", "anchors"]]],
        ),
        {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 6: 5, 9: 8, 10: 9},
    ),
    (
        "written with multiples",
        {
            **deepcopy(SPEC),
            "width_multiple": 0.5,
            "backbone": [[f, n, m, [2 * a[0], *a[1:]]] for f, n, m, a in SPEC["backbone"]],
            "head": [
                [f, n, m, [2 * a[0], *a[1:]] if m in ("Conv", "C3") else a] for f, n, m, a in SPEC["head"]
            ],
        },
        {row: row for row in (0, 1, 2, 3, 4, 5, 8, 9)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "rows"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_transfer_follows_moved_rows(spec, rows):
    _, origin = transferred(spec, trained(SPEC))
    assert origin == {new: {old} for new, old in rows.items()}


def test_transfer_of_the_same_first_rows_only():
    """Another network after the first rows: those are taken, but not similar rows that read other features."""
    deep = [[-1, 4, "C3", [64]], [-1, 4, "C3", [64]]]
    similar = [[-1, 1, "Conv", [32, 3, 2]], *SPEC["head"][:1]]  # row 6 = Conv 32 -> 16 at stride 8, as row 5 of SPEC
    spec = changed(backbone=[*SPEC["backbone"][:3], *deep], head=[*similar, [[6, 6], 1, "Detect", ["nc", "anchors"]]])
    _, origin = transferred(spec, trained(SPEC))
    assert origin == {0: {0}, 1: {1}, 2: {2}}
    _, origin = transferred(spec, trained(SPEC), partial=True)
    assert origin == {0: {0}, 1: {1}, 2: {2}, 6: {5}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("yolov5n.yaml", "yolov5s.yaml"),  # every width differs
        ("yolov5n.yaml", "yolov5-riformer.yaml"),
        ("yolov5s.yaml", "yolov5-riformer-s.yaml"),
        ("yolov5-riformer.yaml", "yolov5n.yaml"),
    ],
)
def test_transfer_from_another_network_is_an_error_and_changes_nothing(old, new):
    checkpoint = trained(old)
    model = DetectionModel(new)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"old\.pt: is for another network"):
        transfer_weights(model, checkpoint)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_partial_transfer_takes_the_rows_that_agree():
    """Neck rows of equal module, arguments and weights, in order; nothing of the backbone."""
    report, origin = transferred("yolov5-riformer.yaml", trained("yolov5n.yaml"), partial=True)
    assert report.matched and all(len(rows) == 1 for rows in origin.values())
    assert 0 not in origin and min(min(rows) for rows in origin.values()) >= 10  # row 10 begins the neck of yolov5n
    assert transferred("yolov5s.yaml", trained("yolov5n.yaml"), partial=True)[0].matched == ()


def test_transfer_of_a_backbone_to_another_neck():
    spec = {
        "nc": 3,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": [[10, 13, 16, 30]],
        "backbone": [[-1, 1, "RIFormer", {"arch": "s12", "weights": None}]],
        "head": [["P4", 1, "Conv", [24]], [-1, 1, "Detect", ["nc", "anchors"]]],
    }
    report, origin = transferred(spec, trained("yolov5-riformer.yaml"))
    assert origin == {0: {0}}
    assert all(not key.startswith("model.0.") for key in report.missing)


def test_transfer_from_p5_to_p6_takes_the_common_rows():
    """yolov5n6 differs from yolov5n after row 6."""
    report, origin = transferred("yolov5n6.yaml", trained("yolov5n.yaml"))
    assert {row: {row} for row in range(7)}.items() <= origin.items()
    assert report.transferred / report.total > 0.1
