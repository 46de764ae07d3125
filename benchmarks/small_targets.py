"""Targets without a positive at the first training step, by the initial biases of the anchor-free head.

    python -m benchmarks.small_targets --data path/to/bccd.yaml [--imgsz 320] [--scales 1 0.5 0.25]

Every cell predicts what the biases give: the class prior and the initial distances. A target counts as without a
positive if its largest soft target is at most 0.05. "ramp" are the head's biases, "equal bins" those of a distribution
that starts uniform. A scale multiplies the boxes of the training split, which are placed at the centers they have.

Results: benchmarks/results/small_targets.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.report import machine, markdown_table, write_results
from data.config import load_data_config
from data.formats.yolo import ImageRecord
from data.labels.labels import load_annotations
from models.heads import AnchorFreeDetect
from models.losses.anchor_free import assign, find_candidates, paired_ciou, prepare
from models.points import distances
from utils.boxes import xywh2xyxy

STRIDES = (8, 16, 32)
POSITIVE = 0.05  # smallest soft target that counts
Biases = Mapping[int, tuple[Tensor, Tensor]]


def biases(num_classes: int, uniform: bool) -> Biases:
    """Return the initial distance logits (4R,) and class logits (C,) by stride."""
    head = AnchorFreeDetect(num_classes, (16, 16, 16), STRIDES)
    levels = zip(STRIDES, head.box, head.cls, strict=True)
    found = {stride: (box[-1].bias.detach(), cls[-1].bias.detach()) for stride, box, cls in levels}
    return {stride: (box * (not uniform), cls) for stride, (box, cls) in found.items()}


def targets_of(record: ImageRecord, imgsz: int, scale: float) -> Tensor:
    """Return the targets (M, 6) of an image in a square, image 0, class, xyxy in pixels, multiplied by `scale`."""
    width, height = record.width, record.height
    labels = torch.from_numpy(record.labels.copy())
    fit = imgsz / max(width, height)
    boxes = labels[:, 1:] * torch.tensor([width, height, width, height]) * fit
    boxes[:, :2] += torch.tensor([imgsz - width * fit, imgsz - height * fit]) / 2
    boxes[:, 2:] *= scale
    return torch.cat((torch.zeros(len(labels), 1), labels[:, :1], xywh2xyxy(boxes)), 1)


def largest_soft_targets(targets: Tensor, levels: Biases, imgsz: int) -> Tensor:
    """Return the largest soft target (M,) of each target (M, 6) where all cells of a level predict the same."""
    sizes = [(imgsz // stride, imgsz // stride) for stride in STRIDES]
    points = sum(height * width for height, width in sizes)
    candidates = find_candidates(targets, sizes, STRIDES)
    bins = torch.arange(len(levels[STRIDES[0]][0]) // 4, dtype=torch.float32)
    pairs, _ = prepare(candidates, (1, points), len(bins), torch.device("cpu"))
    strides = candidates.stride[:, 0].long().tolist()
    ltrb = torch.stack([distances(levels[stride][0], bins) for stride in strides])
    logits = torch.stack([levels[stride][1][0] for stride in strides])
    iou = paired_ciou(torch.addcmul(pairs.center, ltrb, pairs.stride), pairs)
    soft = assign(iou, logits, pairs, len(targets), points)
    return torch.zeros(len(targets)).scatter_reduce_(0, candidates.target, soft, "amax")


def without_positive(
    records: Sequence[ImageRecord], num_classes: int, imgsz: int, scale: float, uniform: bool
) -> float:
    """Return the fraction of targets without a positive."""
    levels = biases(num_classes, uniform)
    targets = [targets_of(record, imgsz, scale) for record in records if len(record.labels)]
    found = torch.cat([largest_soft_targets(rows, levels, imgsz) for rows in targets])
    return float((found <= POSITIVE).double().mean())


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset YAML")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    arguments = parser.parse_args()
    data = load_data_config(arguments.data)
    records = load_annotations(data.split("train"), len(data.names)).records
    rows = [
        {
            "scale": scale,
            "ramp": without_positive(records, len(data.names), arguments.imgsz, scale, uniform=False),
            "equal bins": without_positive(records, len(data.names), arguments.imgsz, scale, uniform=True),
        }
        for scale in arguments.scales
    ]
    text = f"Targets without a positive at the first step, training split at {arguments.imgsz} pixels.\n\n"
    cells = [[f"{row['scale']:g}", f"{row['equal bins']:.1%}", f"{row['ramp']:.1%}"] for row in rows]
    text += markdown_table(["scale of the boxes", "equal bins", "ramp"], cells) + "\n"
    results = {"machine": machine(torch.device("cpu")), "imgsz": arguments.imgsz, "rows": rows}
    write_results("small_targets", results, text)


if __name__ == "__main__":
    main()
