"""Facts of the machine that a measurement ran on, and the memory of this process."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python", "onnx", "onnxruntime", "openvino")
MB = 1e6


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Return processor, threads, memory, GPU and versions; no names of hosts or folders."""
    process = psutil.Process()
    found: dict[str, Any] = {
        "processor": _match("/proc/cpuinfo", r"model name\s*: (.+)") or platform.processor() or platform.machine(),
        "cores": len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
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
    found: dict[str, Any] = {"load": round(psutil.getloadavg()[0], 2)}
    cores = [core.current for core in psutil.cpu_freq(percpu=True) or ()]
    if cores:
        found["cpu_mhz"] = [round(min(cores)), round(max(cores))]
    governor = _match("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", r"(\w+)")
    if governor:
        found["governor"] = governor
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        fields = ("clocks.sm", "clocks.mem", "temperature.gpu")
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i"]
        done = subprocess.run([*command, str(device.index or 0)], capture_output=True, text=True)
        found["gpu"] = dict(zip(fields, done.stdout.strip().split(", ")))
    return found


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    return float(psutil.Process().memory_info().rss) / MB


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB.

    Linux: VmHWM, since psutil has no peak there and `getrusage` starts with the peak of the parent process.
    """
    peak = _match("/proc/self/status", r"VmHWM:\s*(\d+)")
    if peak:
        return float(peak) * 1024 / MB
    return float(getattr(psutil.Process().memory_info(), "peak_wset", 0)) / MB or resident_mb()


def limit_memory(limit: float) -> None:
    """Limit the private writable memory of this process to `limit` bytes, where the system supports it (Linux)."""
    if limit != float("inf") and hasattr(psutil, "RLIMIT_DATA"):
        process = psutil.Process()
        process.rlimit(psutil.RLIMIT_DATA, (int(limit), process.rlimit(psutil.RLIMIT_DATA)[1]))


def _match(path: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1].strip() if found else ""
