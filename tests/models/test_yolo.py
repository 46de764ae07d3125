"""DetectionModel: YOLOv5's interface, and properties of every model."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.build.spec import load_model_spec
from models.heads import Detect, ordered_anchors
from models.summary import ModelInfo
from models.yolo import DetectionModel, parse_model, scaled_image, unscaled_boxes
from utils.errors import ConfigError, SpecError

# Rows counted as in the P1 ... P5 recipe, with numbers for the levels.
FIVE_SLOTS = """\
nc: 80
depth_multiple: 0.33
width_multiple: 0.25
anchors:
  - [10, 13, 16, 30, 33, 23]
  - [30, 61, 62, 45, 59, 119]
  - [116, 90, 156, 198, 373, 326]
backbone:
  - [-1, 1, RIFormer, [s12]]            # slots 0..4 = P1..P5; [False] or []: the default architecture, no weights
  - [-1, 1, SPPF, [1024, 5]]            # 5
head:
  - [-1, 1, Conv, [512, 1, 1]]          # 6
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 3], 1, Concat, [1]]           # 3 = P4
  - [-1, 3, C3, [512, False]]           # 9
  - [-1, 1, Conv, [256, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 2], 1, Concat, [1]]           # 2 = P3
  - [-1, 3, C3, [256, False]]           # 13
  - [-1, 1, Conv, [256, 3, 2]]
  - [[-1, 10], 1, Concat, [1]]
  - [-1, 3, C3, [512, False]]           # 16
  - [-1, 1, Conv, [512, 3, 2]]
  - [[-1, 6], 1, Concat, [1]]
  - [-1, 3, C3, [1024, False]]          # 19
  - [[13, 16, 19], 1, Detect, [nc, anchors]]
"""


def small(**keys: Any) -> dict[str, Any]:
    """Two levels, strides 4 and 8, four channels wide."""
    return {
        "nc": 3,
        "anchors": [[4, 6, 8, 5], [16, 20, 30, 18]],
        "channel_multiple": 4,
        "backbone": [[-1, 1, "Conv", [4, 6, 2, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [8]]],
        "head": [
            [-1, 1, "Conv", [8, 3, 2]],
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 2], 1, "Concat", [1]],
            [[5, 3], 1, "Detect", ["nc", "anchors"]],
        ],
    } | keys


def randomized(model: DetectionModel) -> DetectionModel:
    """Move every weight and statistic away from its initial value."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.is_floating_point() and not key.endswith("anchors"):
            one_channel = value.ndim < 2
            value.copy_(value + 0.3 * noise if one_channel else noise / value[0].numel() ** 0.5)
    return model.eval()


def image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("first_row", ["[s12]", "[False]", "[]", "{arch: s12, drop_path_rate: 0.1}"])
def test_the_form_with_five_slots_builds_as_it_stands(first_row: str, tmp_path: Path) -> None:
    path = tmp_path / "five.yaml"
    path.write_text(FIVE_SLOTS.replace("[s12]", first_row), encoding="utf-8")
    with torch.device("meta"):
        model = DetectionModel(path)
    assert model.stride.tolist() == [8, 16, 32]
    assert [route.slot for route in model.model.routes] == [0, *range(5, 21)]
    assert model.model.routes[4].sources == (7, 3)
    assert type(model.model[0]).__name__ == "RIFormer"
    assert all(key.split(".")[1] == "0" for key in model.state_dict() if "patch_embed" in key)


def test_the_names_of_the_rows_mean_the_same_slots(tmp_path: Path) -> None:
    by_name = FIVE_SLOTS.replace("[[-1, 3]", "[[-1, P4]").replace("[[-1, 2]", "[[-1, P3]")
    models = []
    for text in (FIVE_SLOTS, by_name, FIVE_SLOTS.replace("RIFormer, [s12]", "riformer_s12, []")):
        (tmp_path / "five.yaml").write_text(text, encoding="utf-8")
        with torch.device("meta"):
            models.append(DetectionModel(tmp_path / "five.yaml"))
    routes = [[(r.sources, r.outputs, r.levels) for r in model.model.routes] for model in models]
    assert routes[0] == routes[1] == routes[2]


@pytest.mark.parametrize(
    ("name", "same_neck"), [("yolov5-riformer.yaml", "yolov5n.yaml"), ("yolov5-riformer-s.yaml", "yolov5s.yaml")]
)
def test_riformer_models_take_any_size_and_have_the_neck_of_their_size(name: str, same_neck: str) -> None:
    model = DetectionModel(name).eval()
    decoded, raw = model(image(1, 3, 65, 40))
    assert [tuple(level.shape[2:4]) for level in raw] == [(12, 8), (6, 4), (3, 2)]
    assert decoded.shape == (1, 3 * (96 + 24 + 6), 85)
    with torch.device("meta"):
        plain = DetectionModel(same_neck)
    neck, plain_neck = ([route.levels for route in m.model.routes[-16:]] for m in (model, plain))
    differing = [i for i, (a, b) in enumerate(zip(neck, plain_neck, strict=True)) if a != b]
    assert 3 in differing and set(differing) <= {3, 7}  # the two Concats with maps of the backbone


def test_construction_runs_nothing_and_touches_no_statistics() -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("a forward pass")

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        model = DetectionModel(small())
    finally:
        handle.remove()
    assert all(int(v) == 0 for key, v in model.state_dict().items() if key.endswith("num_batches_tracked"))


def test_overrides_and_the_plain_description() -> None:
    model = DetectionModel(small(), ch=1, nc=7, anchors=[[1, 2], [3, 4]])
    assert model.yaml["nc"] == model.nc == model.head.nc == 7
    assert model.names == {i: str(i) for i in range(7)}
    assert model.yaml["ch"] == model.model[0].conv.in_channels == 1
    torch.testing.assert_close(model.head.anchors, torch.tensor([[[0.25, 0.5]], [[0.375, 0.5]]]), rtol=0, atol=0)
    again = DetectionModel(model.yaml)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1] and again.yaml == model.yaml
    again.load_state_dict(model.state_dict())
    x = image(1, 1, 16, 16)
    torch.testing.assert_close(again.eval()(x)[0], model.eval()(x)[0], rtol=0, atol=0)


def test_a_number_of_anchors_gives_placeholders() -> None:
    model = DetectionModel(small(anchors=2))
    pixels = model.head.anchors * model.head.stride.view(-1, 1, 1)
    torch.testing.assert_close(pixels, torch.tensor([[[0.0, 1.0], [2.0, 3.0]]] * 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("anchors", "strides", "reversed_"),
    [
        ([[1, 1], [2, 2]], [8, 16], False),
        ([[2, 2], [1, 1]], [8, 16], True),
        ([[2, 2], [1, 1]], [16, 8], False),
        ([[1, 1], [2, 2]], [16, 8], True),
        ([[3, 3], [3, 3]], [8, 16], False),
    ],
)
def test_anchors_grow_with_the_stride(anchors: list[list[int]], strides: list[int], reversed_: bool) -> None:
    assert ordered_anchors(anchors, strides) == (anchors[::-1] if reversed_ else anchors)


def test_parse_model_gives_rows_and_kept_slots() -> None:
    rows, save = parse_model(small(), [3])
    assert isinstance(rows, nn.Sequential) and len(rows) == 7
    assert save == [2, 3, 5]
    with pytest.raises(SpecError, match="row 0 .C33.: unknown module"):
        parse_model(small(backbone=[[-1, 1, "C33", [8]]]), 3)


def test_backbone_weights_go_into_the_backbone_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(name: str, args: Any, source: object = None) -> Any:
        seen.append((name, args))
        raise SpecError("enough")

    monkeypatch.setattr("models.build.builder.backbone_from_row", note)
    cases = [("[s12]", ("s12", {"weights": "w.pt"})), ("[False]", ({"weights": "w.pt"},)),
             ("[pretrained, {a: 1, weights: x}]", ({"a": 1}, {"weights": "w.pt"})),
             ("[s12, x.pth]", ("s12", {"weights": "w.pt"})),
             ("{arch: s12, weights: x}", {"arch": "s12", "weights": "w.pt"})]  # fmt: skip
    for row, _ in cases:
        (tmp_path / "five.yaml").write_text(FIVE_SLOTS.replace("[s12]", row), encoding="utf-8")
        with pytest.raises(SpecError, match="enough"):
            DetectionModel(tmp_path / "five.yaml", backbone_weights="w.pt")
    assert seen == [("RIFormer", expected) for _, expected in cases]
    with pytest.raises(SpecError, match="0 rows are backbones"):
        DetectionModel(small(), backbone_weights="w.pt")


# ---- forward -------------------------------------------------------------------------------------


def test_training_and_evaluation_return_what_the_loss_and_the_evaluator_take() -> None:
    model = randomized(DetectionModel(small()))
    decoded, raw = model(image(2, 3, 32, 48))
    assert [tuple(level.shape) for level in raw] == [(2, 2, 8, 12, 8), (2, 2, 4, 6, 8)]
    assert decoded.shape == (2, 2 * (96 + 24), 8)
    assert decoded[..., 4:].min() >= 0 and decoded[..., 4:].max() <= 1
    trained = model.train()(image(2, 3, 32, 48))
    assert [level.shape for level in trained] == [level.shape for level in raw]
    assert all(level.requires_grad for level in trained)


def test_decoding_follows_the_equations() -> None:
    head = Detect(3, [[4, 6, 8, 5], [16, 20, 30, 18]], [4, 4], [4, 8])
    raw = [torch.randn(2, 2, 3, 5, 8), torch.randn(2, 2, 2, 3, 8)]
    decoded = head.decode(raw)
    rows = [(0, a, y, x) for a in range(2) for y in range(3) for x in range(5)]
    rows += [(1, a, y, x) for a in range(2) for y in range(2) for x in range(3)]
    assert decoded.shape[1] == len(rows)
    anchors = ([(4, 6), (8, 5)], [(16, 20), (30, 18)])
    for n, (level, a, y, x) in enumerate(rows):  # the order: level, anchor, y, x
        s = raw[level][1, a, y, x].double().sigmoid()
        stride, (w, h) = (4, 8)[level], anchors[level][a]
        expected = [
            *((2 * s[0] - 0.5 + x) * stride, (2 * s[1] - 0.5 + y) * stride),
            *((2 * s[2]) ** 2 * w, (2 * s[3]) ** 2 * h),
            *s[4:],
        ]
        torch.testing.assert_close(decoded[1, n].double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decoding_of_half_precision_is_done_in_float32(dtype: torch.dtype) -> None:
    head = Detect(3, [[10, 13]], [4], [4]).to(dtype)
    head.anchors = head.anchors.float()
    raw = torch.randn(1, 1, 300, 300, 8).to(dtype)
    decoded = head.decode([raw])
    assert decoded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = head.double().decode([raw.double()])
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=1e-3)  # float16 would miss by 0.5


def test_autocast_and_channels_last_give_the_same_predictions() -> None:
    model = randomized(DetectionModel("yolov5n.yaml", nc=3))
    x = image(2, 3, 64, 96)
    expected, raw = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    decoded, levels = last(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-3)
    assert all(level.is_contiguous() for level in levels)
    last.train()(x.contiguous(memory_format=torch.channels_last))[0].sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, levels = model(x)
    assert mixed.dtype == torch.float32 and levels[0].dtype == torch.bfloat16
    for found, wanted in zip(levels, raw, strict=True):  # bfloat16 has 8 bits, and the errors of 60 layers add up
        assert (found.float() - wanted).std() < 0.05 * wanted.std()


def test_a_size_that_is_no_multiple_of_the_stride_is_refused() -> None:
    model = DetectionModel(small()).eval()
    with pytest.raises(ConfigError, match="image of 32 x 36 pixels: this model's largest stride is 8"):
        model(image(1, 3, 32, 36))
    model(image(1, 3, 32, 40))
    # yolov5-p34 predicts at strides 8 and 16, but also has a map of stride 32.
    with pytest.raises(ConfigError, match="largest stride is 32"):
        DetectionModel("yolov5-p34.yaml").eval()(image(1, 3, 48, 48))


def test_augmentation_is_for_evaluation_only_and_leaves_the_input_alone() -> None:
    model = randomized(DetectionModel("yolov5-p34.yaml", nc=1))
    x = image(1, 3, 64, 96)
    before = x.clone()
    decoded, raw = model(x, augment=True)
    plain, plain_raw = model(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    kept = plain.shape[1] - plain_raw[-1][0, ..., 0].numel()
    torch.testing.assert_close(decoded[:, :kept], plain[:, :kept], rtol=0, atol=0)
    torch.testing.assert_close(raw[0], plain_raw[0], rtol=0, atol=0)
    assert [level.shape for level in model.train()(x, augment=True)] == [level.shape for level in plain_raw]


def test_scaled_and_flipped_boxes_come_back() -> None:
    boxes = torch.tensor([[[10.0, 20.0, 4.0, 6.0, 0.5, 0.9]]])
    scaled = boxes.clone()
    scaled[..., :4] *= 0.83
    scaled[..., 0] = 100 * 0.83 - scaled[..., 0]
    torch.testing.assert_close(unscaled_boxes(scaled, 0.83, 100), boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(unscaled_boxes(boxes, 1.0, None), boxes, rtol=0, atol=0)


def test_scaled_image_is_padded_at_right_and_bottom() -> None:
    out = scaled_image(torch.ones(1, 3, 64, 96), 0.67, 32)
    assert out.shape == (1, 3, 64, 96)
    torch.testing.assert_close(out[:, :, :42, :64], torch.ones(1, 3, 42, 64), rtol=0, atol=1e-6)
    assert torch.all(out[:, :, 42:] == 0.447) and torch.all(out[:, :, :, 64:] == 0.447)


# ---- the rest of the interface -------------------------------------------------------------------


def test_copies_and_pickles_compute_the_same() -> None:
    model = randomized(DetectionModel("yolov5-riformer.yaml", nc=2))
    x = image(1, 3, 33, 60)
    expected = model(x)[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x)[0], expected, rtol=0, atol=0)
        assert other.yaml == model.yaml and other.names == model.names


def test_fuse_keeps_the_outputs_and_a_second_time_changes_nothing() -> None:
    model = randomized(DetectionModel("yolov5s-ghost.yaml", nc=2))
    x = image(1, 3, 64, 64)
    expected = model(x)[0]
    assert model.fuse() is model
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    once = {key: value.clone() for key, value in model.state_dict().items()}
    torch.testing.assert_close(dict(model.fuse().state_dict()), once, rtol=0, atol=0)


def test_info_counts_and_leaves_the_model_as_it_was() -> None:
    model = DetectionModel(small())
    model.model[0].eval()
    model.model[1].requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    info = model.info(64)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.parameters - info.gradients == sum(p.numel() for p in model.model[1].parameters())
    assert model.training and not model.model[0].training and model.model[1].training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.info((64, 128)).gflops == pytest.approx(2 * info.gflops)
    assert model.info(60).gflops == info.gflops  # rounded up to the stride
    assert copy.deepcopy(model).half().info(64) == info
    assert str(ModelInfo(2, 1234567, 5, 1.25)) == "2 layers, 1,234,567 parameters, 5 gradients, 1.2 GFLOPs"


def test_operations_are_those_of_the_equations() -> None:
    head = [[[-1], 1, "Detect", ["nc", "anchors"]]]
    model = DetectionModel(small(backbone=[[-1, 1, "Conv", [4, 3, 2]]], head=head, anchors=1))
    cells = 16 * 16
    conv = 2 * cells * 4 * 3 * 9
    norm = 4 * cells * 4
    predictions = 2 * cells * 8 * 4
    assert model.info(32).gflops * 1e9 == conv + norm + predictions


def test_operations_that_cannot_be_counted_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DetectionModel(small())
    monkeypatch.setattr(nn.Upsample, "forward", lambda self, x: x * bool(x.sum().item()))
    assert math.isnan(model.info(64).gflops)


def test_table_of_layers() -> None:
    spec = load_model_spec("yolov5-riformer.yaml").to_dict()
    spec["backbone"][0][3] = {"arch": "s12", "normalize": False}
    table = DetectionModel(spec, nc=3).layer_table().splitlines()
    assert table[0].split() == ["slot", "from", "n", "params", "output", "module"]
    first = "0-4 -1 1 11409856 64@4 128@8 320@16 512@32 RIFormer {arch: s12, normalize: False}"
    assert table[1].split() == first.split()
    assert table[4].split() == ["7", "-1", "1", "0", "128@16", "nn.Upsample", "[None,", "2,", "nearest]"]
    assert table[5].split()[:4] == ["8", "[-1,", "P4]", "1"]
    assert table[6].split()[:7] == ["9", "-1", "1", "115456", "128@16", "C3", "[448,"]
    assert table[-1].split()[:8] == ["20", "[13,", "16,", "19]", "1", "10824", "predictions", "Detect"]


def test_table_of_layers_is_cut_to_a_width() -> None:
    model = DetectionModel("yolov5n.yaml", nc=3)
    full, cut = model.layer_table().splitlines(), model.layer_table(60).splitlines()
    assert [line[:57] for line in full] == [line.removesuffix("...")[:57] for line in cut]
    assert max(map(len, cut)) == 60 and cut[-1].endswith("...") and full[-1].endswith("[64, 128, 256]]")


def test_feature_maps_of_every_slot() -> None:
    model = randomized(DetectionModel("yolov5-riformer.yaml", nc=2))
    maps = model.feature_maps(image(1, 3, 64, 64))
    names = list(maps)
    assert names[:6] == ["0_RIFormer_P2", "0_RIFormer_P3", "0_RIFormer_P4", "0_RIFormer_P5", "1_SPPF_P5", "2_Conv_P5"]
    assert names[6] == "3_Upsample_P4" and names[-1] == "15_C3_P5" and len(names) == 19
    assert maps["0_RIFormer_P2"].shape == (1, 64, 16, 16)
    assert not maps["15_C3_P5"].requires_grad
    assert all(not module._forward_hooks for module in model.model)
    # No module works in place on a returned map.
    parts = model.model[0](image(1, 3, 64, 64))
    torch.testing.assert_close(maps["0_RIFormer_P3"], parts[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but users still have its files
def test_the_head_can_be_exported_and_gives_the_same() -> None:
    model = randomized(DetectionModel("yolov5n.yaml", nc=3))
    x = image(1, 3, 64, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x)[0], model(x)[0], rtol=1e-5, atol=1e-4)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x)[0], model(x)[0], rtol=1e-5, atol=1e-4)
