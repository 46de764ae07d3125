"""Non-maximum suppression (NMS): candidates are selected on the device, suppressed in rounds on the CPU."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.boxes import xywh2xyxy
from utils.errors import ConfigError

LOGGER = logging.getLogger(__name__)
CLASS_OFFSET = 7680.0  # pixels that boxes of consecutive classes are moved apart; also the largest side of a box
MAX_CANDIDATES = 30000  # maximum number of boxes per image, the most confident ones
CPU_CHUNK = 512  # minimum number of candidates per round
Classes = int | Iterable[int] | torch.Tensor | np.ndarray | None


def _operator() -> Callable[..., Any]:
    """Return torchvision's NMS: boxes (N, 4) xyxy, scores (N,), threshold -> indices of kept boxes (K,).

    Only torchvision's operator library is loaded, because importing the package (and torch._dynamo with it) takes as
    long as importing torch. The name of that file is private: if it is not found, the package is imported.
    """
    spec = importlib.util.find_spec("torchvision")  # does not import it
    for path in sorted(Path(spec.origin).parent.glob("_C*")) if spec and spec.origin else ():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            LOGGER.debug("%s: cannot be loaded: %s", path, error)
    if hasattr(torch.ops.torchvision, "nms"):
        return torch.ops.torchvision.nms
    LOGGER.debug("no operator library of torchvision with nms; importing the package")
    from torchvision.ops import nms

    return nms


suppress = _operator()


class _Candidates(NamedTuple):
    """Boxes of one image above the threshold, on the CPU.

    Attributes:
        boxes: (K, 4) or wider, float32: cxcywh in pixels.
        row: (M,) row of each candidate in `boxes`.
        conf: (M,) float32 confidence.
        label: (M,) class.
    """

    boxes: torch.Tensor
    row: torch.Tensor
    conf: torch.Tensor
    label: torch.Tensor


def non_max_suppression(
    prediction: torch.Tensor | Sequence[torch.Tensor],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Classes = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Sequence[torch.Tensor] = (),
    max_det: int = 300,
) -> list[torch.Tensor]:
    """Keep the most confident of overlapping boxes of each image.

    A box is dropped if a kept box of the same class (of any class if `agnostic`) with a higher confidence overlaps it
    with an IoU above `iou_thres`. Boxes are sorted by descending confidence, equal ones by row and class.

    Args:
        prediction: (B, N, 5 + nc) float tensor on any device, including half precision: cxcywh in pixels,
            objectness, class scores. A tuple or list holds it as its first entry. Not changed.
        conf_thres: minimum (exclusive) of both objectness and confidence (objectness * class score); 0..1.
        iou_thres: IoU threshold; 0..1.
        classes: keep only this class or these classes; None = all.
        agnostic: let boxes of different classes suppress each other.
        multi_label: a box may have every class above the threshold, not only its best one.
        labels: per image (k, 5) class, cxcywh in pixels: boxes to add with confidence 1; empty = none.
        max_det: boxes kept per image.

    Returns:
        Per image an (n, 6) float32 tensor on the CPU: xyxy in pixels, confidence, class; sorted by descending
        confidence. The host waits for a GPU at most three times, independent of the number of images.

    Raises:
        ConfigError: a threshold outside 0..1, a negative `max_det`, or a tensor of another shape.
    """
    if isinstance(prediction, (list, tuple)):
        prediction = prediction[0]
    assert isinstance(prediction, torch.Tensor)
    _check(prediction, conf_thres, iou_thres, labels, max_det)
    multi_label = multi_label and prediction.shape[2] > 6
    images = 1 if prediction.device.type == "cpu" else max(len(prediction), 1)  # waits for a GPU are per group
    output = []
    for start in range(0, len(prediction), images):
        group = slice(start, start + images)
        for candidates in _select(prediction[group], labels[group], conf_thres, multi_label):
            found = _sorted(candidates, class_numbers(classes))
            output.append(_best_boxes(found, iou_thres, agnostic, max_det))
    return output


def class_numbers(classes: Classes) -> list[int] | None:
    """Return one class number or several, of any shape, as a list; None for all classes."""
    if isinstance(classes, (torch.Tensor, np.ndarray, np.generic)):
        classes = np.ravel(classes.tolist()).tolist()
    return [classes] if isinstance(classes, int) else None if classes is None else list(classes)


def _check(
    prediction: torch.Tensor, conf_thres: float, iou_thres: float, labels: Sequence[torch.Tensor], max_det: int
) -> None:
    for name, value in (("conf-thres", conf_thres), ("iou-thres", iou_thres)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}: {value} is not a threshold; allowed is 0 to 1")
    if max_det < 0:
        raise ConfigError(f"max-det: {max_det} is not a number of boxes; allowed is 0 or more")
    if prediction.ndim != 3 or prediction.shape[2] < 6:
        raise ConfigError(
            f"non_max_suppression: prediction has the shape {tuple(prediction.shape)}; allowed is (B, N, 5 + classes)"
        )
    if len(labels) not in (0, len(prediction)):
        raise ConfigError(f"non_max_suppression: labels of {len(labels)} images for {len(prediction)} images")


def _label_rows(labels: torch.Tensor, width: int) -> torch.Tensor:
    """Return labels (k, 5) class, xywh as prediction rows (k, width) with objectness 1 and class score 1."""
    rows = labels.new_zeros((len(labels), width), dtype=torch.float32)
    rows[:, :4] = labels[:, 1:5]
    rows[:, 4] = 1
    return rows.scatter_(1, labels[:, :1].long() + 5, 1.0)


def _select(
    prediction: torch.Tensor, labels: Sequence[torch.Tensor], conf_thres: float, multi_label: bool
) -> Iterator[_Candidates]:
    """Select the candidates of each image of (B, N, 5 + nc); on a GPU with two or three host waits in total."""
    (index,) = (prediction[..., 4].float().flatten() > conf_thres).nonzero(as_tuple=True)
    rows = prediction.flatten(0, 1).index_select(0, index).float()
    image = index // max(prediction.shape[1], 1)
    for number, boxes in enumerate(labels):
        if len(boxes):
            rows = torch.cat((rows, _label_rows(boxes.to(rows.device), rows.shape[1])))
            image = torch.cat((image, torch.full_like(boxes[:, 0], number, dtype=image.dtype).to(image.device)))
    confs = rows[:, 5:] * rows[:, 4:5]
    if multi_label:
        row, label = (confs > conf_thres).nonzero(as_tuple=True)
        conf = confs[row, label]
    else:
        conf, label = confs.max(1)
        row = torch.arange(len(rows), device=rows.device)
        if rows.device.type == "cpu":  # on a GPU after the copy: each boolean index would be a further wait
            row = row[conf > conf_thres]
            conf, label = conf[row], label[row]
    if rows.device.type == "cpu" and len(prediction) == 1:
        yield _Candidates(rows, row, conf, label)
        return
    if len(conf) > MAX_CANDIDATES * len(prediction) and len(prediction) > 1:  # untrained model: limits memory
        for number in range(len(prediction)):
            one = slice(number, number + 1)
            yield from _select(prediction[one], labels[one], conf_thres, multi_label)
        return
    columns = conf[:, None], label[:, None].float(), image[row][:, None].float()
    packed = torch.cat((rows[row, :4], *columns), 1).cpu()
    packed = packed[packed[:, 4] > conf_thres]
    packed = packed[packed[:, 6].argsort(stable=True)]
    counts = packed[:, 6].long().bincount(minlength=len(prediction)).tolist()
    for part in packed.split(counts):
        yield _Candidates(part, torch.arange(len(part)), part[:, 4], part[:, 5].long())


def _sorted(candidates: _Candidates, classes: Sequence[int] | None) -> torch.Tensor:
    """Return at most MAX_CANDIDATES candidates (m, 6): xyxy, confidence, class; sorted by descending confidence."""
    boxes, row, conf, label = candidates
    if classes is not None:
        keep = torch.isin(label, torch.tensor(classes, dtype=label.dtype))
        row, label, conf = row[keep], label[keep], conf[keep]
    if len(conf) > MAX_CANDIDATES:  # top-k is much cheaper than sorting millions; ties are kept
        possible = conf >= conf.topk(MAX_CANDIDATES, sorted=False).values.min()
        row, label, conf = row[possible], label[possible], conf[possible]
    order = conf.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    row, label, conf = row[order], label[order], conf[order]
    return torch.cat((xywh2xyxy(boxes[row, :4]), conf[:, None], label[:, None].to(conf.dtype)), 1)


def _best_boxes(found: torch.Tensor, iou_thres: float, agnostic: bool, max_det: int) -> torch.Tensor:
    """Run greedy NMS on sorted candidates (m, 6), in rounds until `max_det` boxes are kept.

    Whether a box is kept depends only on kept boxes with higher confidence, so candidates after the last kept box can
    be ignored: the result equals one NMS over all candidates, cut at `max_det`. Kept boxes are prepended to the next
    round; they do not overlap, so all of them are kept again. A round adds at least as many candidates as boxes are
    kept, so that with a large `max_det` repeated comparisons do not dominate.
    """
    # The offset is added in float32 on purpose: it rounds the boxes of high classes to 1/16 pixel, as YOLOv5 does.
    boxes = found[:, :4] if agnostic else found[:, :4] + found[:, 5:] * CLASS_OFFSET
    keep = torch.empty(0, dtype=torch.long)
    start = 0
    while start < len(found) and len(keep) < max_det:
        stop = min(start + max(CPU_CHUNK, len(keep)), len(found))
        candidates = torch.cat((keep, torch.arange(start, stop)))
        # torchvision sorts again; descending positions as scores keep ties in order.
        rank = torch.arange(len(candidates), 0, -1, dtype=boxes.dtype)
        keep = candidates[suppress(boxes[candidates], rank, iou_thres)]
        start = stop
    return found[keep[:max_det]]
