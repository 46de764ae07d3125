"""Every layer of the table: its output is as its rule declares, and equals its equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import common
from models.build.layer_rules import LAYERS
from models.build.rows import Rows
from tests.helpers.model_rows import SIDE, build, one_row

LAYER_CASES: list[tuple[str, list[Any], tuple[int, int]]] = [
    # (module, arguments, (channels, SIDE / height) of the output for 16 channels, SIDE x SIDE)
    ("Conv", [24], (24, 1)),
    ("Conv", [24, 3, 2], (24, 2)),
    ("Conv", [24, [1, 3], 1, None, 8, 2, "nn.ReLU()"], (24, 1)),
    ("DWConv", [32, 3, 2], (32, 2)),
    ("Bottleneck", [24, False], (24, 1)),
    ("Bottleneck", [16, True, 2, 0.25], (16, 1)),
    ("BottleneckCSP", [24], (24, 1)),
    ("C3", [24, False, 1, 0.25], (24, 1)),
    ("C3x", [24], (24, 1)),
    ("C3TR", [24], (24, 1)),
    ("C3SPP", [24, [5, 9]], (24, 1)),
    ("C3Ghost", [24], (24, 1)),
    ("GhostConv", [24, 3, 2], (24, 2)),
    ("GhostBottleneck", [24, 3, 2], (24, 2)),
    ("GhostBottleneck", [16], (16, 1)),
    ("SPP", [24, [3, 5]], (24, 1)),
    ("SPPF", [24], (24, 1)),
    ("Focus", [24, 3], (24, 2)),
    ("CrossConv", [24, 3, 2], (24, 2)),
    ("CrossConv", [16, 3, 1, 1, 0.5, True], (16, 1)),
    ("MixConv2d", [24, [1, 3, 5], 2], (24, 2)),
    ("MixConv2d", [24, [3, 5], 1, False], (24, 1)),
    ("TransformerBlock", [24, 4, 2], (24, 1)),
    ("TransformerBlock", [16, 24, 4, 2], (24, 1)),  # YOLOv5's arguments
    ("nn.BatchNorm2d", [], (16, 1)),
    ("nn.MaxPool2d", [2], (16, 2)),
    ("nn.MaxPool2d", [2, 2, 0], (16, 2)),
    ("nn.AvgPool2d", [4], (16, 4)),
    ("Contract", [2], (64, 2)),
]
ENLARGING_CASES: list[tuple[str, list[Any], tuple[int, int]]] = [
    # after a Conv of stride 4, so that upsampling is possible
    ("nn.Upsample", ["None", 2, "nearest"], (16, 2)),
    ("nn.Upsample", ["None", 4, "bilinear"], (16, 1)),
    ("nn.Upsample", ["None", 0.5], (16, 8)),
    ("nn.ConvTranspose2d", [24, 4, 2, 1], (24, 2)),
    ("DWConvTranspose2d", [16, 4, 4], (16, 1)),
    ("Expand", [2], (4, 2)),
    ("nn.Identity", [], (16, 4)),
]


def run_one(rows: Rows, row: int, expected: tuple[int, int]) -> None:
    """The row declares and returns the expected output."""
    found: list[Tensor] = []
    rows[row].register_forward_hook(lambda _module, _args, out: found.append(out))
    rows.eval()(torch.randn(2, 16, SIDE, SIDE))
    level = rows.routes[row].levels[0]
    assert (level.channels, level.stride) == expected
    assert tuple(found[0].shape) == (2, level.channels, SIDE // level.stride, SIDE // level.stride)


@pytest.mark.parametrize(("module", "args", "expected"), LAYER_CASES)
def test_a_layer_gives_what_it_declares(module: str, args: list[Any], expected: tuple[int, int]) -> None:
    run_one(one_row(module, args), 0, expected)


@pytest.mark.parametrize(("module", "args", "expected"), ENLARGING_CASES)
def test_an_enlarging_layer_gives_what_it_declares(module: str, args: list[Any], expected: tuple[int, int]) -> None:
    backbone = [[-1, 1, "Conv", [16, 4, 4, 0]], [-1, 1, module, args]]
    rows, _ = build(backbone, [[[-1], 1, "Detect", ["nc", "anchors"]]], 2, ch=16)
    run_one(rows, 1, expected)


def test_every_layer_of_the_table_is_tried() -> None:
    tried = {case[0] for case in (*LAYER_CASES, *ENLARGING_CASES)}
    assert set(LAYERS.names()) - tried == {
        "Concat",
        "Detect",
        "AnchorFreeDetect",
        "nn.ZeroPad2d",
    }  # yolov3-tiny has the last


@pytest.mark.parametrize(
    ("module", "channels", "gain"),
    [("Contract", 8, 2), ("Expand", 8, 2), ("Contract", 9, 3), ("Expand", 18, 3)],
)
def test_contract_and_expand_undo_each_other(module: str, channels: int, gain: int) -> None:
    there = getattr(common, module)(gain)
    back = {"Contract": common.Expand, "Expand": common.Contract}[module](gain)
    x = torch.randn(2, channels, 6 * gain, 4 * gain)
    torch.testing.assert_close(back(there(x)), x, rtol=0, atol=0)
    assert not torch.equal(there(x).flatten(), x.flatten())


def test_focus_puts_the_pixels_of_a_square_in_the_channels() -> None:
    focus = common.Focus(1, 4)
    focus.conv = nn.Identity()  # type: ignore[assignment]
    out = focus(torch.arange(16.0).view(1, 1, 4, 4))
    squares = [[0.0, 2.0, 8.0, 10.0], [4.0, 6.0, 12.0, 14.0], [1.0, 3.0, 9.0, 11.0], [5.0, 7.0, 13.0, 15.0]]
    assert out.flatten(2)[0].tolist() == squares


def test_sppf_with_5_covers_what_spp_covers_with_5_9_13() -> None:
    sppf, spp = common.SPPF(8, 8, 5).eval(), common.SPP(8, 8, (5, 9, 13)).eval()
    spp.load_state_dict(sppf.state_dict())
    x = torch.randn(2, 8, 20, 20)
    torch.testing.assert_close(sppf(x), spp(x), rtol=0, atol=0)


def test_ghost_layers_follow_the_equations() -> None:
    x = torch.randn(2, 8, 6, 6)
    conv = common.GhostConv(8, 12).eval()
    first = conv.cv1(x)
    torch.testing.assert_close(conv(x), torch.cat((first, conv.cv2(first)), 1), rtol=0, atol=0)
    same = common.GhostBottleneck(8, 8).eval()
    torch.testing.assert_close(same(x), same.conv(x) + x, rtol=0, atol=0)
    half = common.GhostBottleneck(8, 12, 3, 2).eval()
    torch.testing.assert_close(half(x), half.conv(x) + half.shortcut(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block", "branches"),
    [
        (common.C3(8, 12, 2), lambda b, x: (b.m(b.cv1(x)), b.cv2(x))),
        (common.C3SPP(8, 12), lambda b, x: (b.m(b.cv1(x)), b.cv2(x))),
        (common.BottleneckCSP(8, 12, 2), lambda b, x: (b.cv3(b.m(b.cv1(x))), b.cv2(x))),
    ],
)
def test_the_order_of_two_branches(block: nn.Module, branches: Any) -> None:
    x = torch.randn(2, 8, 6, 6)
    joined = torch.cat(branches(block.eval(), x), 1)
    expected = block.cv4(block.act(block.bn(joined))) if hasattr(block, "cv4") else block.cv3(joined)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block", "adds"),
    [
        (common.Bottleneck(8, 8), True),
        (common.Bottleneck(8, 8, False), False),
        (common.Bottleneck(8, 12), False),
        (common.CrossConv(8, 8), False),
        (common.CrossConv(8, 8, shortcut=True), True),
        (common.CrossConv(8, 12, shortcut=True), False),
    ],
)
def test_shortcuts(block: nn.Module, adds: bool) -> None:
    x = torch.randn(2, 8, 6, 6)
    inner = block.cv2(block.eval().cv1(x))
    torch.testing.assert_close(block(x), inner + x if adds else inner, rtol=0, atol=0)


def test_transformer_block_follows_the_equations() -> None:
    block = common.TransformerBlock(8, 8, num_heads=2, num_layers=1).double().eval()
    layer = block.tr[0]
    layer.ma.in_proj_bias.data.normal_()
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)  # (3, 20, 8)
    tokens = tokens + tokens @ block.linear.weight.T + block.linear.bias
    own_weights = (layer.q, layer.k, layer.v)
    parts = zip(own_weights, layer.ma.in_proj_weight.chunk(3), layer.ma.in_proj_bias.chunk(3), strict=True)
    q, k, v = ((tokens @ own.weight.T @ w.T + b).view(3, 20, 2, 4).transpose(1, 2) for own, w, b in parts)
    attended = ((q @ k.transpose(2, 3) / 2.0).softmax(-1) @ v).transpose(1, 2).reshape(3, 20, 8)
    tokens = attended @ layer.ma.out_proj.weight.T + layer.ma.out_proj.bias + tokens
    tokens = tokens @ layer.fc1.weight.T @ layer.fc2.weight.T + tokens
    expected = tokens.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((8, (1, 3)), [4, 4]),
        ((17, (1, 3)), [9, 8]),
        ((16, (1, 3, 5)), [6, 5, 5]),
        ((40, (1, 3), 1, False), [36, 4]),  # 36 * 1 = 4 * 9 weights per input channel
        ((24, (3, 5, 7), 1, False), [15, 6, 3]),  # 15.5, 5.6 and 2.9 round to 16, 6, 3: one too many
        ((10, (1, 3, 5), 1, False), None),  # too few for 5 x 5
    ],
)
def test_mixed_convolutions_share_the_channels(args: tuple[Any, ...], parts: list[int] | None) -> None:
    if parts is None:
        with pytest.raises(ValueError, match="too few"):
            common.MixConv2d(8, *args)
        return
    assert [conv.out_channels for conv in common.MixConv2d(8, *args).m] == parts


@pytest.mark.parametrize(
    ("module", "repeats", "args", "state_key"),
    [
        ("C3", 3, [16], "0.m.0.cv1.conv.weight"),  # depth 0.33: one inner block
        ("C3", 9, [16], "0.m.2.cv1.conv.weight"),  # three inner blocks
        ("Conv", 6, [16], "0.1.conv.weight"),  # two copies
        ("Conv", 1, [16], "0.conv.weight"),
        ("nn.MaxPool2d", 6, [3, 1, 1], None),
    ],
)
def test_repeats(module: str, repeats: int, args: list[Any], state_key: str | None) -> None:
    rows = one_row(module, args, repeats=repeats, depth_multiple=0.33)
    keys = [key for key in rows.state_dict() if key.startswith("0.") and key.endswith("conv.weight")]
    assert state_key is None or state_key in keys
    assert rows.routes[0].repeats == max(round(repeats * 0.33), 1)
    rows.eval()(torch.randn(1, 16, 32, 32))


def test_copies_follow_each_other_in_channels_and_stride() -> None:
    rows = one_row("Conv", [24, 3, 2], repeats=2)
    run_one(rows, 0, (24, 4))


@pytest.mark.parametrize(
    ("width", "keys", "expected"),
    [
        (64, {"width_multiple": 0.25}, 16),
        (68, {"width_multiple": 0.25}, 24),  # 17, rounded up to a multiple of 8
        (68, {"width_multiple": 0.25, "channel_multiple": 4}, 20),
        (16, {"width_multiple": 0.25, "anchors": 2}, 16),  # 2 * (3 + 5): the head's output count stays
        (24, {"width_multiple": 0.25, "anchors": 3}, 24),
        (24, {"width_multiple": 0.25, "anchors": 2}, 8),
    ],
)
def test_width_is_scaled_and_rounded_up(width: int, keys: Mapping[str, Any], expected: int) -> None:
    anchors = keys.get("anchors", 2)
    others = {key: value for key, value in keys.items() if key != "anchors"}
    rows, _ = build([[-1, 1, "Conv", [width]]], [[[-1], 1, "Detect", ["nc", "anchors"]]], anchors, **others)
    assert rows.routes[0].levels[0].channels == expected
