"""Device selection, `--amp` on a device, and detection of bfloat16 support."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from utils import device as devices
from utils.device import amp_dtype, cpu_has_bf16, select_device
from utils.errors import ConfigError
from utils.files import ROOT

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


@pytest.mark.parametrize("text", ["²", "٣", "0.5", "gpu", "-1"])
def test_what_is_no_device_is_refused(text):
    with pytest.raises(ConfigError, match="not a device"):
        select_device(text)


def test_no_float16_on_a_cpu():
    with pytest.raises(ConfigError, match="allowed: bf16, off"):
        amp_dtype("fp16", CPU)


@pytest.mark.gpu
def test_no_bfloat16_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ConfigError, match="--amp bf16: .* has no bfloat16 arithmetic; allowed: fp16, off"):
        amp_dtype("bf16", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert amp_dtype("bf16", CUDA) == torch.bfloat16


@pytest.mark.gpu
def test_float32_arithmetic_of_a_gpu(monkeypatch):
    options = (torch.backends.cudnn, torch.backends.cuda.matmul)
    torch.backends.cudnn.benchmark = True
    for option, other in zip(options, (False, True)):
        option.allow_tf32 = other
    assert select_device("0") == CUDA
    assert [option.allow_tf32 for option in options] == [True, False]
    assert not torch.backends.cudnn.benchmark


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


FAULTS = """
import resource, sys
import numpy as np
from utils.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 * 2**20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_reused() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("keep", "default")
    }
    assert found["keep"] < 10 < found["default"]
