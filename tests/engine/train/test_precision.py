"""`--amp` of val.py and detect.py: its dtype, what stays float32, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cli.config import DetectConfig, TrainConfig, ValConfig
from engine.evaluate.evaluator import validate
from engine.predict.predictor import detect
from engine.runtimes.pytorch import PyTorchRuntime
from engine.runtimes.registry import mixed_precision, open_runtime
from tests.helpers.detectors import build, save
from utils.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FAMILIES = ("yolov5", "riformer", "nextvit")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {family: str(save(build(family), folder / f"{family}.pt")) for family in FAMILIES}


def pixels(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("amp", "half", "device", "dtype"),
    [
        ("auto", False, CPU, None),  # also on a CPU with bfloat16 instructions: metrics stay comparable
        ("auto", False, CUDA, None),
        ("auto", True, CUDA, None),  # the weights themselves are float16 then
        ("off", False, CUDA, None),
        ("bf16", False, CPU, torch.bfloat16),
        ("bf16", False, CUDA, torch.bfloat16),
        ("fp16", False, CUDA, torch.float16),
    ],
)
def test_what_amp_means(amp, half, device, dtype, monkeypatch) -> None:
    monkeypatch.setattr("utils.device.cpu_has_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert mixed_precision(amp, half, device) is dtype


@pytest.mark.parametrize(
    ("amp", "half", "words"),
    [
        ("off", True, "--half: means float16, which contradicts --amp off"),
        ("bf16", True, "--half: means float16, which contradicts --amp bf16"),
        ("fp16", False, "--amp fp16: not supported on a CPU"),
    ],
)
def test_contradictions_are_refused(amp, half, words, weights) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        open_runtime([weights["yolov5"]], CPU, half=half, amp=amp)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("amp", ["bf16", "off", "auto"])
@pytest.mark.parametrize("suffix", [".onnx", ".torchscript"])
def test_exported_files_have_their_own_precision(amp, suffix, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(b"")
    monkeypatch.setattr("engine.runtimes.registry.OPENERS", {suffix: lambda *_: "opened"})
    if amp == "bf16":
        with pytest.raises(ConfigError, match=rf"--amp bf16: needs a \.pt file; .*x\{suffix} keeps the precision"):
            open_runtime([str(file)], CPU, amp=amp)
    else:
        assert open_runtime([str(file)], CPU, amp=amp) == "opened"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_narrows_the_network_but_not_the_boxes(family, weights, caplog) -> None:
    with caplog.at_level("INFO"):
        runtime = open_runtime([weights[family]], CPU, amp="bf16")
    assert "Precision: bfloat16" in caplog.text
    assert isinstance(runtime, PyTorchRuntime)
    wanted, wanted_raw = PyTorchRuntime([weights[family]], CPU).with_raw(pixels())
    found, raw = runtime.with_raw(pixels())
    assert found.dtype == torch.float32 and all(level.dtype == torch.bfloat16 for level in raw)
    head = runtime.models[0].head
    torch.testing.assert_close(found, head.decode([level.float() for level in raw]), rtol=0, atol=0)
    for a, b in zip(raw, wanted_raw, strict=True):
        assert float((a.float() - b).std()) < 0.05 * float(b.std())
    assert not torch.equal(found, wanted)


def test_without_amp_the_numbers_are_those_of_float32(weights) -> None:
    plain = PyTorchRuntime([weights["yolov5"]], CPU)(pixels())
    for amp in ("auto", "off"):
        torch.testing.assert_close(open_runtime([weights["yolov5"]], CPU, amp=amp)(pixels()), plain, rtol=0, atol=0)


def test_positions_at_the_far_edge_keep_their_fraction(weights) -> None:
    """At 640 pixels bfloat16 has a resolution of 4 pixels."""
    found = open_runtime([weights["yolov5"]], CPU, amp="bf16")(pixels(64, 640))
    far = found[..., 0][found[..., 0] > 512]
    assert len(far) and float((far % 4).unique().numel()) > 100


def test_all_commands_know_the_same_words() -> None:
    choices = {c: c.__dataclass_fields__["amp"].metadata["choices"] for c in (TrainConfig, ValConfig, DetectConfig)}
    assert set(choices.values()) == {("auto", "fp16", "bf16", "off")}
    assert {c.__dataclass_fields__["amp"].default for c in choices} == {"auto"}


@pytest.mark.parametrize("config", [ValConfig, DetectConfig])
def test_commands_hand_it_on(config, monkeypatch, weights, tmp_path: Path) -> None:
    data = tmp_path / "data.yaml"
    data.write_text("path: .\ntrain: .\nval: .\nnames: [disc, bar, dot]\n")
    seen: dict[str, object] = {}

    class Done(Exception):
        pass

    def opened(weights: object, device: object, **options: object) -> None:
        seen.update(options)
        raise Done

    module = "engine.evaluate.evaluator" if config is ValConfig else "engine.predict.predictor"
    monkeypatch.setattr(f"{module}.open_runtime", opened)
    work = validate if config is ValConfig else detect
    with pytest.raises(Done):
        work(config.from_keywords(amp="bf16", device="cpu", weights=[weights["yolov5"]], data=str(data)))
    assert seen["amp"] == "bf16"
