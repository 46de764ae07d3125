"""What a measurement ran on: processor, threads, clocks, versions, and how much memory the process holds."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python", "onnx", "onnxruntime", "openvino")
MB = 1e6


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, threads, memory, GPU and versions; no names of hosts or folders."""
    found: dict[str, Any] = {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gb": round(_meminfo("MemTotal") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    found["device"] = device.type
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def clocks(device: torch.device) -> dict[str, Any]:
    """Return the current load, core clocks in MHz and governor, and a GPU's clocks and temperature."""
    found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}
    mhz = [float(v) for v in _all_cpuinfo("cpu MHz")]
    if mhz:
        found["cpu_mhz"] = [round(min(mhz)), round(max(mhz))]
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file():
        found["governor"] = governor.read_text(encoding="utf-8").strip()
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        fields = ("clocks.sm", "clocks.mem", "temperature.gpu")
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i"]
        done = subprocess.run([*command, str(device.index or 0)], capture_output=True, text=True)
        found["gpu"] = dict(zip(fields, done.stdout.strip().split(", ")))
    return found


def available_memory() -> float:
    """Return the bytes available without swapping, infinite where the system does not report them."""
    return _meminfo("MemAvailable") or float("inf")


def resident_mb() -> float:
    """Memory of this process that lies in RAM now, in MB; the peak where only that is known."""
    found = _status("VmRSS")
    return found if found else peak_mb()


def peak_mb() -> float:
    """Most memory that this process had in RAM, in MB.

    Linux: since the program was started. The figure of `getrusage` there begins with that of the parent process.
    """
    found = _status("VmHWM")
    if found:
        return found
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def limit_memory(limit: float) -> None:
    """Make allocations beyond so many bytes fail in this process, instead of the whole machine running out of memory.

    It counts private writable memory. Does nothing where the system has no such limit.
    """
    if limit == float("inf") or not sys.platform.startswith("linux"):
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _all_cpuinfo(key: str) -> list[str]:
    pairs = [line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line]
    return [value.strip() for name, value in pairs if name.strip() == key]


def _cpuinfo(key: str) -> str:
    return next(iter(_all_cpuinfo(key)), "")


def _meminfo(key: str) -> float:
    found = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith(f"{key}:")]
    return float(found[0]) * 1024 if found else 0.0


def _status(key: str) -> float:
    found = [line.split()[1] for line in _lines("/proc/self/status") if line.startswith(f"{key}:")]
    return float(found[0]) * 1024 / MB if found else 0.0
