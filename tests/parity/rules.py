"""Input rules and record formats of the reference values (see README.md beside this file).

A record is `{"shape", "mean", "std", "min", "max", "values"}`: statistics in float64 over the float32 array, and the values
at `RandomState(7).choice(numel, 128, replace=False)` of the flat array (all of them when there are at most 128).
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"


def yolov5(name: str) -> Any:
    """Fixture `data/yolov5/<name>.json.gz`."""
    return _load(DATA / "yolov5" / f"{name}.json.gz")


def backbone(name: str) -> Any:
    """Fixture `data/backbones/<name>.json.gz`."""
    return _load(DATA / "backbones" / f"{name}.json.gz")


def official_checkpoint() -> tuple[Path, Any]:
    """The checkpoint file as YOLOv5's training script wrote it, and its expected values."""
    folder = DATA / "official_checkpoint"
    return folder / "yolov5n_bccd.pt", _load(folder / "expected.json.gz")


def _load(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)


# ---- backbones ------------------------------------------------------------------------------------------------------


def backbone_weight(key: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """Value of one state-dict entry of a backbone, from its official key alone."""
    r = np.random.RandomState(zlib.crc32(key.encode()))
    last = key.rsplit(".", 1)[-1]
    if key.endswith(".num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        a = 0.5 + r.rand(*shape)
    elif key.endswith("running_mean"):
        a = 0.1 * r.randn(*shape)
    elif key.endswith("pos_embed"):
        a = 0.2 * r.randn(*shape)
    elif len(shape) >= 2 and not key.endswith("cls_token"):
        a = gain * r.randn(*shape) / np.sqrt(float(np.prod(shape[1:])))
    elif len(shape) == 1 and (key.endswith(".weight") or last.startswith(("layer_scale", "gamma"))):
        a = 1.0 + 0.1 * r.randn(*shape)
    else:
        a = 0.1 * r.randn(*shape)
    return np.asarray(a, np.float64).astype(np.float32)


def backbone_input(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Input of a backbone case: normal noise, float32."""
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def backbone_sample(numel: int, n: int = 128) -> np.ndarray:
    """Flat indices of the sampled values of a backbone record."""
    return np.arange(numel) if numel < n else np.random.RandomState(7).choice(numel, n, replace=False)


# ---- YOLOv5: numpy rules follow -------------------------------------------------------------------------------------


def weight_value(key, shape, current=None):
    """float32 array for one state-dict entry. Entries whose last name part is 'anchors' keep their own value."""
    if key.rsplit(".", 1)[-1] == "anchors":
        return np.asarray(current, np.float32)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    r = np.random.RandomState(zlib.crc32(key.encode()))
    shape = tuple(shape)
    if key.endswith("running_var"):
        v = 0.5 + r.rand(*shape)
    elif key.endswith("running_mean"):
        v = 0.1 * r.randn(*shape)
    elif len(shape) >= 2:
        v = r.randn(*shape) / np.sqrt(np.prod(shape[1:]))
    elif key.endswith(".weight"):
        v = 1 + 0.1 * r.randn(*shape)
    else:
        v = 0.1 * r.randn(*shape)
    return np.asarray(v).astype(np.float32)


def image_batch(seed, shape):
    """Network input in 0..1, shape (B, 3, H, W)."""
    return np.random.RandomState(seed).rand(*shape).astype(np.float32)


def sample_index(numel, k=128):
    return np.arange(numel) if numel <= k else np.random.RandomState(7).choice(numel, k, replace=False)


def shorten(v):
    """float32 -> python float with the shortest decimal string that restores that float32; keeps inf/nan as strings."""
    v = np.float32(v)
    return float(str(v)) if np.isfinite(v) else str(v)


def record(array):
    """shape, float64 statistics and 128 sampled values of the C-order flat array."""
    a = np.ascontiguousarray(array)
    f = a.reshape(-1)
    d = f.astype(np.float64)
    return {
        "shape": list(a.shape),
        "mean": float(d.mean()),
        "std": float(d.std()),
        "min": float(d.min()),
        "max": float(d.max()),
        "values": [shorten(x) for x in f[sample_index(f.size)]],
    }


def compare(rec, array):
    """Largest difference of sampled values and statistics, divided by the record's std (or 1e-12)."""
    a = np.asarray(array)
    assert list(a.shape) == rec["shape"], (list(a.shape), rec["shape"])
    f = a.reshape(-1).astype(np.float64)
    scale = max(rec["std"], abs(rec["mean"]), 1e-12)
    d = np.abs(f[sample_index(f.size)] - np.array(rec["values"], np.float64)).max()
    s = max(
        abs(f.mean() - rec["mean"]), abs(f.std() - rec["std"]), abs(f.min() - rec["min"]), abs(f.max() - rec["max"])
    )
    return max(d, s) / scale


def raw_predictions(seed, batch, grids, nc, na=3):
    """Raw head outputs: one (B, na, ny, nx, 5 + nc) float32 array for each (ny, nx) in grids; objectness lowered by 2."""
    out = []
    for i, (ny, nx) in enumerate(grids):
        p = np.random.RandomState(seed * 10 + i).randn(batch, na, ny, nx, 5 + nc)
        p[..., 4] -= 2.0
        out.append(p.astype(np.float32))
    return out


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def decoded_predictions(seed, nc, images=2, rows=400, size=640.0, objects=25):
    """Decoded predictions (images, rows, 5 + nc): pixel cx, cy, w, h, objectness, class scores; boxes come in clusters."""
    r = np.random.RandomState(seed)
    out = np.zeros((images, rows, 5 + nc))
    for b in range(images):
        center = size * (0.05 + 0.9 * r.rand(objects, 2))
        wh = 16 + 0.35 * size * r.rand(objects, 2)
        # every third object sits on top of the one before it, with another class
        cls = r.randint(0, nc, objects)
        for k in range(2, objects, 3):
            center[k], wh[k], cls[k] = center[k - 1] + 4, wh[k - 1] * 1.05, (cls[k - 1] + 1) % nc
        o = r.randint(0, objects, rows)
        out[b, :, 0:2] = center[o] + 0.10 * wh[o] * r.randn(rows, 2)
        out[b, :, 2:4] = wh[o] * np.exp(0.12 * r.randn(rows, 2))
        obj = _sigmoid(2.0 * r.randn(rows) + 0.5)
        obj[r.rand(rows) < 0.25] *= 0.02  # background
        out[b, :, 4] = obj
        logit = 1.2 * r.randn(rows, nc) - 3.5
        logit[np.arange(rows), cls[o]] += 5.0
        out[b, :, 5:] = _sigmoid(logit)
    return out.astype(np.float32)


def apriori_labels(seed, nc, images=2, size=640.0):
    """Per image a (k, 5) float32 array of class, cx, cy, w, h in pixels (image 0 gets 3 rows, image 1 none, ...)."""
    r = np.random.RandomState(seed + 5000)
    out = []
    for b in range(images):
        k = 3 if b % 2 == 0 else 0
        v = np.zeros((k, 5))
        v[:, 0] = np.arange(k) % nc
        v[:, 1:3] = size * (0.1 + 0.8 * r.rand(k, 2))
        v[:, 3:5] = 30 + 100 * r.rand(k, 2)
        out.append(v.astype(np.float32))
    return out


def ap_inputs(seed, n, m, nc, missing_pred=(), missing_true=()):
    """tp (n, 10) bool, conf (n,) float32, predicted class (n,), true class (m,) for a precision-recall evaluation."""
    r = np.random.RandomState(seed)
    tcls = r.randint(0, nc, m)
    pcls = r.randint(0, nc, n)
    conf = ((r.permutation(n) + 0.5 * r.rand(n)) / n).astype(np.float32)  # all distinct
    q = np.clip(0.25 + 0.5 * r.rand(n) + 0.35 * conf * r.rand(n), 0, 1)
    tcls = tcls[~np.isin(tcls, missing_true)]
    keep = ~np.isin(pcls, missing_pred)
    pcls, conf, q = pcls[keep], conf[keep], q[keep]
    ok = q > 0.5
    for c in range(nc):  # at most as many TP as labels
        idx = np.nonzero((pcls == c) & ok)[0]
        ok[idx[int((tcls == c).sum()) :]] = False
    tp = ok[:, None] & (q[:, None] > 0.5 + 0.04 * np.arange(10)[None])
    return tp, conf, pcls.astype(np.float32), tcls.astype(np.float32)


def jittered_detections(seed, labels, nc, size=640.0, copies=2, noise=0.12, extra=4):
    """Detections (x1, y1, x2, y2, conf, class) around labels (class, x1, y1, x2, y2), sorted by descending confidence."""
    r = np.random.RandomState(seed)
    lab = np.asarray(labels, np.float64).reshape(-1, 5)
    rows = []
    for c, x1, y1, x2, y2 in lab:
        for _ in range(copies):
            w, h = x2 - x1, y2 - y1
            d = noise * r.randn(4) * np.array([w, h, w, h])
            rows.append([x1 + d[0], y1 + d[1], x2 + d[2], y2 + d[3], r.rand(), c if r.rand() < 0.8 else r.randint(nc)])
    for _ in range(extra):
        x, y = size * r.rand(2)
        rows.append([x, y, x + 20 + 100 * r.rand(), y + 20 + 100 * r.rand(), r.rand(), r.randint(nc)])
    rows = np.array(rows, np.float64).reshape(-1, 6)
    return rows[np.argsort(-rows[:, 4], kind="stable")].astype(np.float32)


def random_labels(seed, k, nc, size=640.0):
    """(k, 5) float32 labels class, x1, y1, x2, y2 in pixels."""
    r = np.random.RandomState(seed)
    c = r.randint(0, nc, k)
    xy = size * 0.8 * r.rand(k, 2)
    wh = 20 + 0.2 * size * r.rand(k, 2)
    return np.concatenate((c[:, None], xy, xy + wh), 1).astype(np.float32)


def box_pairs(seed, n):
    """Two (n, 4) float32 sets of x1, y1, x2, y2 boxes: overlapping, touching, nested, equal and far pairs."""
    r = np.random.RandomState(seed)
    a = np.zeros((n, 4))
    a[:, :2] = 200 * r.rand(n, 2)
    a[:, 2:] = a[:, :2] + 5 + 100 * r.rand(n, 2)
    b = a + 30 * r.randn(n, 4)
    b[:, 2:] = np.maximum(b[:, 2:], b[:, :2] + 2)
    b[0] = a[0]
    b[1] = [a[1, 2], a[1, 1], a[1, 2] + 10, a[1, 3]]
    b[2] = [a[2, 0] + 1, a[2, 1] + 1, a[2, 2] - 1, a[2, 3] - 1]
    b[3] = a[3] + 1000
    return a.astype(np.float32), b.astype(np.float32)


def image_u8(seed, h, w):
    """BGR uint8 image."""
    return np.random.RandomState(seed).randint(0, 256, (h, w, 3)).astype(np.uint8)


def label_sizes(seed, n, size=640.0):
    """(n, 2) float32 widths and heights in pixels (log-uniform 4..size*0.8)."""
    r = np.random.RandomState(seed)
    return np.exp(np.log(4) + np.log(size * 0.8 / 4) * r.rand(n, 2)).astype(np.float32)
