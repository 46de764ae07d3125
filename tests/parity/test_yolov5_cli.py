"""Every option of YOLOv5's commands is accepted, with its default, or refused by name with a reason."""

from __future__ import annotations

import argparse

import pytest

from engine.cli.config import DetectConfig, TrainConfig, ValConfig
from engine.cli.parser import build_parser
from engine.export.config import ExportConfig
from tests.parity import rules

pytestmark = pytest.mark.parity
CLI = rules.yolov5("cli")
CONFIGS = {"train": TrainConfig, "val": ValConfig, "detect": DetectConfig, "export": ExportConfig}

# Ours differ only where the official default would need a download, or depends on the head: for the anchor head an
# empty --hyp and an absent --optimizer are the official hyp.scratch-low.yaml and SGD, see `engine.train`.
OTHER_DEFAULTS = {
    ("train", "hyp"): "",
    ("train", "optimizer"): None,
    ("train", "weights"): "",
    ("train", "data"): "data/shapes.yaml",
    ("val", "weights"): [],
    ("val", "data"): "data/shapes.yaml",
    ("detect", "weights"): [],
    ("detect", "data"): "",
    ("export", "weights"): [],
    ("export", "data"): "",
}


def _same(ours: object, official: object) -> bool:
    """Compare after normalizing the spellings of 'nothing' and of lists."""
    if isinstance(ours, (list, tuple)):
        official = official if isinstance(official, (list, tuple)) else [official]
        return [str(x) for x in ours] == [str(x) for x in official]
    return str(ours).split("main/")[-1] == str(official)


@pytest.mark.parametrize(
    ("command", "official"),
    [(c, o) for c in CONFIGS for o in CLI[c]],
    ids=lambda v: v if isinstance(v, str) else v["flags"][0],
)
def test_option(command, official):
    parser = build_parser(CONFIGS[command], command, "")
    for flag in official["flags"]:
        action = parser._option_string_actions.get(flag)
        assert action is not None, f"{command} {flag} is not taken"
    assert isinstance(action, argparse._StoreTrueAction) == official["switch"]
    if action.nargs != official["nargs"]:
        assert (action.nargs, official["nargs"]) == (0, None) and official["switch"]
    default = OTHER_DEFAULTS.get((command, action.dest), official["default"])
    assert _same(action.default, default), (action.default, default)
    if official["value_without_argument"] not in (None, True):
        assert str(action.const) == str(official["value_without_argument"])
    if official["choices"]:
        assert [c for c in action.choices if c in official["choices"]] == official["choices"]  # ours may add some
