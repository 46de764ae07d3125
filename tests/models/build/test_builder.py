"""Rows of a YAML -> modules and routes: slots, level names, the output of each layer, and every error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from models import backbones, common
from models.backbones import Backbone, FeatureLevel, register_backbone, register_plain
from models.build.builder import build_layers
from models.build.rows import IMAGE, PAD_VALUE, check_size, padded
from models.build.spec import load_model_spec, read_model_spec
from models.yolo import DetectionModel
from tests.helpers.model_rows import build, one_row
from utils.errors import ConfigError, SpecError


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's backbone, registered like a plug-in's, for one test."""
    monkeypatch.setattr(backbones, "_PLUGINS", {})

    @register_backbone("TinyBackbone")
    class _Tiny(Backbone):
        """Average-pool by stride and return the declared levels."""

        def __init__(self, strides: Sequence[int] = (8, 16, 32), size_divisor: int = 32) -> None:
            super().__init__(normalize=False)
            self.levels = tuple(FeatureLevel(stride, stride) for stride in strides)
            self.size_divisor = size_divisor
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            mean = image.mean(1, keepdim=True) * self.scale
            return tuple(
                nn.functional.avg_pool2d(mean, level.stride).expand(-1, level.channels, -1, -1) for level in self.levels
            )

    @register_backbone("NeedyBackbone")
    class _Needy(Backbone):
        """A module with a required argument."""

        def __init__(self, width: int) -> None:
            super().__init__(normalize=False)


# ---- activation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nn.LeakyReLU(0.1)", "LeakyReLU(negative_slope=0.1, inplace=True)"),
        ("nn.LeakyReLU(negative_slope=0.2)", "LeakyReLU(negative_slope=0.2, inplace=True)"),
        ("torch.nn.ReLU()", "ReLU(inplace=True)"),
        ("Hardswish", "Hardswish()"),
        ("nn.GELU()", "GELU(approximate='none')"),
    ],
)
def test_the_files_activation_reaches_every_default_one_and_no_other_model(text: str, expected: str) -> None:
    rows = one_row("C3", [16], activation=text)
    found = {repr(m.act) for m in rows.modules() if isinstance(m, common.Conv)}
    assert found == {expected}
    assert isinstance(common.Conv(3, 8).act, nn.SiLU)
    assert len({id(m.act) for m in rows.modules() if isinstance(m, common.Conv)}) > 1  # each has its own


def test_an_activation_in_the_row_wins() -> None:
    rows = one_row("Conv", [16, 1, 1, None, 1, 1, "nn.Tanh()"], repeats=2, activation="nn.ReLU()")
    acts = [m.act for m in rows.modules() if isinstance(m, common.Conv)]
    assert [type(act) for act in acts] == [nn.Tanh, nn.Tanh] and acts[0] is not acts[1]
    assert isinstance(one_row("GhostBottleneck", [16], activation="nn.ReLU()")[0].conv[2].cv1.act, nn.Identity)


@pytest.mark.parametrize(
    "text", ["nn.LeakyRelu(0.1)", "__import__('os')", "nn.ReLU(os)", "nn.ELU(1, 2, 3, 4)", "nn.Linear(3)", "a.b.ReLU()"]
)
def test_an_unknown_activation_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    assert mistakes(tmp_path, FILE.replace("nc: 3", f'nc: 3\nactivation: "{text}"'))[0].startswith("my.yaml:2: ")


# ---- slots ---------------------------------------------------------------------------------------

TINY_ROW = [-1, 1, "TinyBackbone", []]
HEAD = [[-1], 1, "Detect", ["nc", "anchors"]]


def test_plain_rows_own_one_slot_each() -> None:
    rows, save = build(
        [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-2, 1, "Conv", [16, 3, 2]]],
        [[[-1, 1], 1, "Concat", [1]], [[3, 2], 1, "Detect", ["nc", "anchors"]]],
    )
    assert [route.slot for route in rows.routes] == [0, 1, 2, 3, 4]
    assert [route.sources for route in rows.routes] == [(IMAGE,), (0,), (0,), (2, 1), (3, 2)]
    assert save == [0, 1, 2, 3]  # those not read as -1


def test_a_backbone_row_owns_five_slots() -> None:
    rows, save = build(
        [TINY_ROW, [-1, 1, "Conv", [8]]],  # -1 is the deepest level
        [
            *([3, 1, "Conv", [8]], ["P3", 1, "Conv", [8]], [[-1, 2], 1, "Concat", [1]]),
            [[8, 5], 1, "Detect", ["nc", "anchors"]],
        ],
    )
    assert [route.slot for route in rows.routes] == [0, 5, 6, 7, 8, 9]
    assert [route.sources for route in rows.routes] == [(IMAGE,), (4,), (3,), (2,), (7, 2), (8, 5)]
    assert [route.levels[0].stride for route in rows.routes[1:-1]] == [32, 16, 8, 8]
    assert save == [2, 3, 5, 8]
    assert rows.routes[-1].levels == ()


@pytest.mark.parametrize(
    ("strides", "source", "slot"),
    [
        ((4, 8, 16), -1, 3),  # P5 is empty: the deepest level available
        ((4, 8, 16), -2, 3),  # by number: the slot itself
        ((8, 16, 32), -3, 2),
        ((16, 32), "P4", 3),  # keyed by stride, not by position
        ((1, 8, 64), -1, 2),  # levels beyond P1 ... P5 have no slot
    ],
)
def test_sources_after_a_backbone(strides: Sequence[int], source: int | str, slot: int) -> None:
    arguments = {"strides": list(strides), "size_divisor": 64}
    rows, _ = build([[-1, 1, "TinyBackbone", arguments]], [[source, 1, "Conv", [8]], HEAD], 2)
    assert rows.routes[1].sources == (slot,)
    image = torch.rand(1, 3, 128, 128)
    stride = 2 ** (slot + 1)
    received: list[Tensor] = []
    rows[1].register_forward_pre_hook(lambda _module, args: received.append(args[0]))
    rows.eval()(image)
    expected = nn.functional.avg_pool2d(image.mean(1, keepdim=True), stride).expand(-1, stride, -1, -1)
    torch.testing.assert_close(received[0], expected, rtol=0, atol=1e-6)


def test_level_names_are_those_of_the_latest_backbone_and_image_is_the_image() -> None:
    rows, _ = build(
        [[-1, 1, "TinyBackbone", {"strides": [8]}], ["image", 1, "TinyBackbone", {"strides": [8, 16]}]],
        [["P3", 1, "Conv", [8]], [2, 1, "Conv", [8]], HEAD],
        2,
    )
    assert [route.slot for route in rows.routes] == [0, 5, 10, 11, 12]
    assert [route.sources for route in rows.routes[:4]] == [(IMAGE,), (IMAGE,), (7,), (2,)]
    rows.eval()(torch.rand(1, 3, 64, 64))


def test_maps_are_let_go_after_their_last_reader() -> None:
    rows, _ = build(
        [TINY_ROW, [-1, 1, "Conv", [8]]],
        [["P4", 1, "Conv", [8]], [[5, 6], 1, "Detect", ["nc", "anchors"]]],
    )
    assert [route.releases for route in rows.routes] == [(IMAGE,), (4,), (3,), (5, 6)]
    assert rows.routes[0].outputs == (None, 3, 4)  # P3 is unused

    first: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    plain = build([[-1, 1, "Conv", [8]], [-1, 1, "Conv", [8]], [-1, 1, "Conv", [8]]], [HEAD], 2)[0].eval()
    plain[0].register_forward_hook(lambda _module, _args, out: first.append(weakref.ref(out)))
    plain[2].register_forward_pre_hook(lambda _module, _args: alive.append(first[0]() is not None))
    with torch.no_grad():
        plain(torch.rand(1, 3, 8, 8))
    assert alive == [False]


@pytest.mark.parametrize(
    ("size_divisor", "height", "width", "expected"),
    [(32, 64, 96, (64, 96)), (32, 65, 90, (96, 96)), (96, 64, 97, (96, 192)), (32, 1, 33, (32, 64))],
)
def test_a_backbone_pads_its_own_input(size_divisor: int, height: int, width: int, expected: tuple[int, int]) -> None:
    rows, _ = build([[-1, 1, "TinyBackbone", {"size_divisor": size_divisor}]], [HEAD], 2)
    seen: list[Tensor] = []
    rows[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    image = torch.rand(1, 3, height, width)
    rows.eval()(image)
    assert tuple(seen[0].shape[2:]) == expected
    torch.testing.assert_close(seen[0][:, :, :height, :width], image, rtol=0, atol=0)
    rest = seen[0].clone()
    rest[:, :, :height, :width] = PAD_VALUE
    assert torch.all(rest == rest.new_tensor(PAD_VALUE))
    assert rows.size_multiple == 1


def test_padding_follows_the_neck_too() -> None:
    rows, _ = build([TINY_ROW], [[-1, 1, "Conv", [8, 3, 2]], HEAD], 2)
    assert rows.routes[0].pad_to == 64  # P6 is made behind a backbone that divides by 32
    assert padded(torch.zeros(1, 3, 5, 5), 1).shape == (1, 3, 5, 5)


@pytest.mark.parametrize(("height", "width"), [(96, 100), (100, 96), (1, 1)])
def test_plain_models_refuse_other_sizes(height: int, width: int) -> None:
    rows = one_row("Conv", [8, 32, 32, 0], channels=3)
    with pytest.raises(ConfigError, match=f"image of {height} x {width} pixels: .* stride is 32, .*nearest: "):
        rows(torch.zeros(1, 3, height, width))
    check_size(96, 64, 32)


# ---- mistakes ------------------------------------------------------------------------------------

FILE = """\
nc: 3
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 3, C3, [16]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 0], 1, Concat, [1]]
  - [[4, 2], 1, Detect, [nc, anchors]]
"""
C3 = "[-1, 3, C3, [16]]"  # line 6, row 2
UP = "[-1, 1, nn.Upsample, [None, 2, nearest]]"  # line 8, row 3
CONV0 = "[-1, 1, Conv, [8, 3, 2]]"  # line 4, row 0


def mistakes(folder: Path, text: str, channels: int = 3) -> list[str]:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    spec, problems = read_model_spec(path)
    with pytest.raises(SpecError) as caught:
        build_layers(spec.replaced(channels, None, None), problems)
    return [line.replace(str(path), "my.yaml") for line in str(caught.value).splitlines()]


def test_the_file_without_a_mistake_builds(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(FILE, encoding="utf-8")
    rows, save = build_layers(load_model_spec(tmp_path / "my.yaml"))
    assert save == [0, 2, 4]
    assert [m.stride.tolist() for m in rows if hasattr(m, "stride") and not isinstance(m, nn.Conv2d)] == [[2.0, 4.0]]


CONV_FORM = "it takes [c2, k=1, s=1, p=None, g=1, d=1, act=True]"
CASES = [
    # (what is replaced, by what, what is logged)
    (C3, "[-1, 1, Segment, [nc, anchors, 32, 256]]", "my.yaml:6: row 2 (Segment): unknown module 'Segment'; "
     "segmentation is not supported: use Detect"),
    (C3, "[-1, 3, C33, [16]]", "my.yaml:6: row 2 (C33): unknown module 'C33'; did you mean 'C3'?"),
    (CONV0, "[-1, 1, riformer_s13, []]", "my.yaml:4: row 0 (riformer_s13): unknown module 'riformer_s13'; "
     "did you mean 'riformer_s"),
    (CONV0, "[-1, 1, Conv, []]", f"my.yaml:4: row 0 (Conv): argument 1 (c2) is missing; {CONV_FORM}"),
    (CONV0, "[-1, 1, Conv, [8, 1, 1, 0, 1, 1, True, 5]]",
     f"my.yaml:4: row 0 (Conv): 8 arguments are given; {CONV_FORM}"),
    (CONV0, "[-1, 1, Conv, [8, 3, two]]", "my.yaml:4: row 0 (Conv): argument 3 (s) is 'two'; "
     "allowed: an integer or a list of 2 numbers"),
    (CONV0, "[-1, 1, Conv, [8, [3, 3, 3]]]", "my.yaml:4: row 0 (Conv): argument 2 (k) is [3, 3, 3]; "
     "allowed: an integer or a list of 2 numbers"),
    (CONV0, "[-1, 1, Conv, [0]]",
     "my.yaml:4: row 0 (Conv): argument 1 (c2) is 0; an integer of at least 1 is needed"),
    (CONV0, "[-1, 1, Conv, [8, 3, [1, 2]]]",
     "my.yaml:4: row 0 (Conv): s is [1, 2]; height and width need the same value"),
    (CONV0, "[-1, 1, Conv, [8, 3, 0]]", "my.yaml:4: row 0 (Conv): s is 0; a number above 0 is needed"),
    (CONV0, "[-1, 1, Conv, [8, 3, 1, None, 2]]", "my.yaml:4: row 0 (Conv): cannot be built with "
     "[3, 8, 3, 1, None, 2, 1, True]: in_channels must be divisible by groups"),
    (CONV0, "[-1, 1, Conv, {c2: 8}]", "my.yaml:4: row 0 (Conv): arguments are {'c2': 8}; this module takes a list"),
    (C3, "[-1, 3, C3, [16, maybe]]", "my.yaml:6: row 2 (C3): argument 2 (shortcut) is 'maybe'; allowed: True or False"),
    (C3, "[-1, 1, GhostBottleneck, [24]]", "my.yaml:6: row 2 (GhostBottleneck): cannot be built with [16, 24, 3, 1]: "
     "16 input and 24 output channels; at stride 1 the shortcut needs equal numbers"),
    (C3, "[-1, 1, TransformerBlock, [24, 16, 4, 2]]", "my.yaml:6: row 2 (TransformerBlock): argument 1 (c1) is 24; "
     "the input has 16 channels"),
    (C3, "[-1, 1, TransformerBlock, [16, 3, 1]]", "my.yaml:6: row 2 (TransformerBlock): cannot be built with "
     "[16, 16, 3, 1]: embed_dim must be divisible by num_heads"),
    (C3, "[-1, 1, Expand, [3]]",
     "my.yaml:6: row 2 (Expand): 16 input channels; a multiple of 9 is needed for gain 3"),
    (C3, "[-1, 1, nn.BatchNorm2d, [1, 2]]", "my.yaml:6: row 2 (nn.BatchNorm2d): 2 arguments are given; it takes none "
     "(the channels are those of the input)"),
    (C3, "[[-1, 0], 3, C3, [16]]", "my.yaml:6: row 2 (C3): from refers to 2 slots; exactly one is needed"),
    (C3, "[5, 3, C3, [16]]", "my.yaml:6: row 2 (C3): from refers to slot 5; available: 0 to 1, or -1 to -2"),
    (C3, "[-3, 3, C3, [16]]", "my.yaml:6: row 2 (C3): from refers to slot -3; available: 0 to 1, or -1 to -2"),
    (CONV0, "[0, 1, Conv, [8, 3, 2]]", "my.yaml:4: row 0 (Conv): from refers to slot 0; available: -1, the image"),
    (C3, "[P4, 3, C3, [16]]", "my.yaml:6: row 2 (C3): from refers to level P4, but no earlier row is a backbone; "
     "use a slot index"),
    (C3, "[p3, 3, C3, [16]]",
     "my.yaml:6: row 2 (C3): from is 'p3'; allowed: slot indices, P1, P2, P3, P4, P5, image; "
     "did you mean 'P3'?"),
    (UP, "[-1, 1, nn.Upsample, [None, 2, nearst]]", "my.yaml:8: row 3 (nn.Upsample): mode is 'nearst'; "
     "allowed: nearest, nearest-exact, bilinear, bicubic, area; did you mean 'nearest'?"),
    (UP, "[-1, 1, nn.Upsample, [20]]", "my.yaml:8: row 3 (nn.Upsample): a fixed size has no defined stride; "
     "give a scale_factor, as in [None, 2, nearest]"),
    (UP, "[-1, 1, nn.Upsample, [None, 3]]", "my.yaml:8: row 3 (nn.Upsample): the input has stride 4; "
     "the output would have stride 1.33333"),
    (UP, "[-1, 1, nn.Identity, []]", "my.yaml:9: row 4 (Concat): the inputs have strides 4, 2; "
     "equal strides are needed"),
    ("Concat, [1]", "Concat, [2]", "my.yaml:9: row 4 (Concat): argument 1 (dimension) is 2; allowed: 1 (channels)"),
    ("[[4, 2], 1", "[[4], 1", "my.yaml:10: row 5 (Detect): 1 input levels but 2 rows of anchors; "
     "one row per level is needed"),
    ("[nc, anchors]", "[80, anchors]", "my.yaml:10: row 5 (Detect): argument 1 (nc) is 80; the model has 3 classes; "
     "write nc"),
    ("[nc, anchors]", "[nc, [[1, 2], [3, 4]]]", "my.yaml:10: row 5 (Detect): argument 2 (anchors) differs from the "
     "key 'anchors' of the file; write anchors"),
    ("[nc, anchors]", "[nc]", "my.yaml:10: row 5 (Detect): 1 arguments are given; it takes [nc, anchors]"),
    ("  - [[4, 2], 1, Detect, [nc, anchors]]\n", "",
     "my.yaml:9: row 4 (Concat): Detect or AnchorFreeDetect must be the last row and appear once"),
    ("Detect, [nc, anchors]", "Segment, [nc, anchors, 32, 256]",
     "my.yaml:10: row 5 (Segment): unknown module 'Segment'; segmentation is not supported: use Detect"),
    (CONV0, "[-1, 1, Conv, [8, 999, 2]]", "my.yaml:4: row 0 (Conv): argument 2 (k) is 999; allowed: numbers up to 127"),
    (CONV0, "[-1, 1, Conv, [99999]]",
     "my.yaml:4: row 0 (Conv): argument 1 (c2) is 99999; allowed: numbers up to 16384"),
    (C3, "[-1, 3, C3, [16, True, 1, .nan]]",
     "my.yaml:6: row 2 (C3): argument 4 (e) is nan; allowed: numbers up to 16384"),
    (C3, "[-1, 1, Conv, [16384, 9]]\n  - [-1, 1, Conv, [16384, 3]]",
     "my.yaml:7: row 3 (Conv): has 2.4 billion parameters; allowed: 1 billion"),
    # backbones
    (CONV0, "[-1, 2, TinyBackbone, []]", "my.yaml:4: row 0 (TinyBackbone): number is 2; a backbone row needs number 1"),
    (CONV0, "[-1, 1, TinyBackbone, {width: 3}]",
     "my.yaml:4: row 0 (TinyBackbone): TinyBackbone: unknown argument 'width'; "
     "allowed: weights, partial_weights, strides, size_divisor"),
    (CONV0, "[-1, 1, TinyBackbone, {strides: [8, 8]}]",
     "my.yaml:4: row 0 (TinyBackbone): TinyBackbone: its strides are "
     "[8, 8]; increasing powers of two are needed"),
    (CONV0, "[-1, 1, TinyBackbone, {strides: 8}]",
     "my.yaml:4: row 0 (TinyBackbone): TinyBackbone: strides is 8; allowed: a list of numbers"),
    (CONV0, "[-1, 1, NeedyBackbone, []]", "my.yaml:4: row 0 (NeedyBackbone): cannot be built with []: "),
    (C3, "[-1, 1, TinyBackbone, []]", "my.yaml:6: row 2 (TinyBackbone): TinyBackbone takes RGB images; "
     "it has no argument in_channels for 16 channels"),
    (CONV0, "[-1, 1, TinyBackbone, []]\n  - [P2, 1, Conv, [8]]",
     "my.yaml:5: row 1 (Conv): from refers to P2, P2 of row 0 "
     "(TinyBackbone), which is empty; available: P3 (slot 2), P4 (slot 3), P5 (slot 4)"),
    (CONV0, "[-1, 1, TinyBackbone, []]\n  - [0, 1, Conv, [8]]",
     "my.yaml:5: row 1 (Conv): from refers to slot 0, P1 of row 0 "
     "(TinyBackbone), which is empty; available: P3 (slot 2), P4 (slot 3), P5 (slot 4)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), CASES)
def test_a_mistake_is_reported_with_line_and_row(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in FILE
    found = mistakes(tmp_path, FILE.replace(old, new, 1))
    assert found[0].startswith(said)
    assert len(found) == 1 or "yBackbone" in new  # those rows shift the numbers of the others


def test_a_backbone_takes_three_channels(tmp_path: Path) -> None:
    said = mistakes(tmp_path, FILE.replace(CONV0, "[-1, 1, TinyBackbone, []]"), channels=1)
    assert said[0] == (
        "my.yaml:4: row 0 (TinyBackbone): TinyBackbone takes RGB images; it has no argument in_channels for 1 channels"
    )


def test_mistakes_of_form_and_of_meaning_are_reported_together(tmp_path: Path) -> None:
    text = FILE.replace("nc: 3", "nc: 3\nwidth: 1").replace("[16, 3, 2]", "[16, 3, x]")
    text = text.replace(", 2, nearest", ", 2, nea").replace("[nc, anchors]", "[nc]").replace("[8, 3, 2]", "8")
    lines = [line.split(":")[1] for line in mistakes(tmp_path, text)]
    assert lines == ["2", "5", "6", "9", "11"]


def test_an_unknown_module_does_not_make_later_rows_wrong(tmp_path: Path) -> None:
    # It may have been meant to own five slots: 8 and 6 may be right.
    text = FILE.replace(CONV0, "[-1, 1, RIFourmer, []]").replace("[[4, 2], 1", "[[8, 6], 1")
    assert len(mistakes(tmp_path, text)) == 1


# ---- stem rows and YOLOv5's attributes ------------------------------------------------------------------------------

STEM_MODEL = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": 2,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "RIFormer", {"arch": {"layers": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}, "in_stride": 2}],
    ],
    "head": [[["P3", "P4", "P5"], 1, "Detect", ["nc", "anchors"]]],
}


def test_backbone_row_follows_a_stem_row() -> None:
    model = DetectionModel(STEM_MODEL)
    backbone = model.model[1]
    assert backbone.in_channels == 16 and not backbone.normalize
    assert [(level.channels, level.stride) for level in model.model.routes[1].levels] == [
        (8, 4), (16, 8), (24, 16), (32, 32),
    ]  # fmt: skip
    assert model.stride.tolist() == [8, 16, 32]
    raw = model.train()(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape[2:4]) for level in raw] == [(8, 12), (4, 6), (2, 3)]


def test_rows_carry_yolov5_attributes() -> None:
    model = DetectionModel(STEM_MODEL)
    assert [(m.i, m.f, m.type) for m in model.model] == [
        (0, -1, "Conv"), (1, -1, "RIFormer"), (2, ["P3", "P4", "P5"], "Detect"),
    ]  # fmt: skip
    assert [m.np for m in model.model] == [sum(p.numel() for p in m.parameters()) for m in model.model]
    assert model.inplace is True and model.hyp == {}


def test_forward_accepts_yolov5_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = DetectionModel(STEM_MODEL).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), caplog.at_level("INFO"):
        plain = model(x)[0]
        shown = model.forward(x, False, True, tmp_path)[0]
        assert torch.equal(model._forward_once(x, profile=False, visualize=False)[0], plain)
    assert torch.equal(shown, plain)
    assert "time (ms)" in caplog.text and "RIFormer" in caplog.text
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "0_Conv_P1.png",
        "1_RIFormer_P2.png",
        "1_RIFormer_P3.png",
        "1_RIFormer_P4.png",
        "1_RIFormer_P5.png",
    ]


def test_plug_in_class_named_like_a_layer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("models.backbones._PLAIN", {})
    plugin = ModuleType("plugin")
    exec("from torch import nn\nclass Conv(nn.Module): ...", vars(plugin))  # noqa: S102
    plugin.Conv.__module__ = "plugin"
    register_plain(plugin)
    (tmp_path / "my.yaml").write_text(FILE, encoding="utf-8")
    build_layers(load_model_spec(tmp_path / "my.yaml"))
    assert caplog.text.count("row 0 (Conv): is the built-in layer") == 1


def test_unknown_module_names_the_plugin_option(tmp_path: Path) -> None:
    (said, *_) = mistakes(tmp_path, FILE.replace(CONV0, "[-1, 1, Zyxwvut, []]"))
    assert said.endswith("unknown module 'Zyxwvut'; a class of your own needs --plugin FILE.py")
