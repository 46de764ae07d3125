"""Median milliseconds of a forward pass of the fused yolov5s, 640 pixels, float32. Argument: the batch size."""

import statistics
import sys

import torch

from benchmarks.training import seconds_of
from models.fuse import fuse_conv_bn
from models.yolo import DetectionModel
from utils.files import ROOT

try:
    from utils.device import keep_freed_memory
except ImportError:  # an older checkout
    pass
else:
    keep_freed_memory()  # as val.py and detect.py do

torch.manual_seed(0)
model = fuse_conv_bn(DetectionModel(ROOT / "models/yolov5s.yaml", nc=80).eval()).to(memory_format=torch.channels_last)
images = torch.rand(int(sys.argv[1]), 3, 640, 640).contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    seconds = [seconds_of(lambda: model(images), torch.device("cpu")) for _ in range(10)]
print(f"result: {1000 * statistics.median(seconds[2:])}")
