"""Median milliseconds of a training step: yolov5n, 320 pixels, batch 16. Argument: a name of `training.VARIANTS`."""

import statistics
import sys

import torch

from benchmarks.training import VARIANTS, Step, fresh_model, seconds_of

try:
    from utils.device import keep_freed_memory
except ImportError:  # an older checkout
    pass
else:
    keep_freed_memory()  # as train.py does

device = torch.device("cpu")
step = Step(fresh_model("yolov5n", device), VARIANTS[sys.argv[1]], 320, 16)
seconds = [seconds_of(step, device) for _ in range(12)]
print(f"result: {1000 * statistics.median(seconds[2:])}")
