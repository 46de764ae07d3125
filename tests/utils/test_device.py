"""What `--amp` means on a device, and how a processor's bfloat16 is seen."""

from __future__ import annotations

import pytest
import torch

from utils import device as devices
from utils.device import amp_dtype, cpu_has_bf16
from utils.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("text", "device", "wanted"),
    [
        ("auto", CUDA, torch.float16),
        ("auto", CPU, None),
        ("auto", torch.device("mps"), None),
        ("off", CUDA, None),
        ("off", CPU, None),
        ("bf16", CPU, torch.bfloat16),
        ("fp16", CUDA, torch.float16),
    ],
)
def test_amp(text, device, wanted):
    assert amp_dtype(text, device) == wanted


def test_no_float16_on_a_cpu():
    with pytest.raises(ConfigError, match="allowed there are bf16 and off"):
        amp_dtype("fp16", CPU)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("flags\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t: fpu avx512f amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t: fpu avx2 avx512f\nmodel name : bf16less\n", False),
        (None, False),
    ],
)
def test_a_processor_that_computes_in_bfloat16(text, wanted, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(devices, "CPUINFO", file)
    cpu_has_bf16.cache_clear()
    try:
        assert cpu_has_bf16() is wanted
    finally:
        cpu_has_bf16.cache_clear()
