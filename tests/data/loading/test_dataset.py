"""DetectionDataset: samples are functions of (seed, epoch, index); caches change speed only."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest

from data.augment.config import AugmentConfig
from data.labels.labels import ImageRecord
from data.loading import image_cache as image_store
from data.loading.dataset import DetectionDataset
from data.loading.image_cache import ImageStore
from data.loading.order import SampleKey
from tests.helpers.image_files import write_set
from utils.errors import ConfigError, DataError

RECIPE = AugmentConfig(
    hsv_h=0.1, hsv_s=0.5, hsv_v=0.4, degrees=5, translate=0.1, scale=0.5, flipud=0.5, fliplr=0.5, mosaic=0.7,
    mosaic9=0.3, mixup=0.3,
)  # fmt: skip


@pytest.fixture
def records(tmp_path):
    return write_set(tmp_path, 20)


def same(a, b):
    return np.array_equal(a.image, b.image) and np.array_equal(a.labels, b.labels)


def test_sample_is_a_function_of_seed_epoch_and_index(records):
    first = DetectionDataset(records, 64, augment=RECIPE, seed=3)
    again = DetectionDataset(records, 64, augment=RECIPE, seed=3)
    keys = [(e, i) for e in (0, 1) for i in range(20)]
    forward = {key: first[key] for key in keys}
    assert all(same(forward[key], again[key]) for key in reversed(keys))  # regardless of earlier requests
    assert not any(same(forward[0, i], forward[1, i]) for i in range(20))
    other = DetectionDataset(records, 64, augment=RECIPE, seed=4)
    assert not any(same(forward[0, i], other[0, i]) for i in range(20))
    assert same(first[5], forward[0, 5])
    assert not same(first[SampleKey(0, 5, repeat=1)], forward[0, 5])  # an image drawn twice differs


def test_training_samples_are_well_formed(records):
    dataset = DetectionDataset(records, 64, augment=RECIPE)
    for i in range(20):
        s = dataset[1, i]
        assert s.image.shape == (64, 64, 3) and s.image.dtype == np.uint8 and s.image.flags.c_contiguous
        assert s.labels.dtype == np.float32 and s.labels.shape[1] == 5
        assert s.index == i and s.path == str(records[i].path)
        x, y, w, h = s.labels[:, 1:].T
        assert ((x - w / 2 >= -1e-6) & (y - h / 2 >= -1e-6) & (x + w / 2 <= 1) & (y + h / 2 <= 1)).all()


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(fliplr=1.0),
        AugmentConfig(flipud=1.0),
        AugmentConfig(scale=0.3, translate=0.1, fliplr=0.5),
        AugmentConfig(mosaic=1.0, scale=0.3),
        AugmentConfig(mosaic=1.0, mosaic9=1.0, fliplr=0.5),
    ],
)
def test_boxes_lie_on_their_objects(tmp_path, config):
    """Black images, each with one white box: bright pixels and boxes cover the same area."""
    records = []
    for i in range(12):
        image = np.zeros((96, 128, 3), np.uint8)
        x, y = 20 + 5 * i, 30 + 2 * i
        image[y : y + 30, x : x + 30] = 255
        path = tmp_path / f"{i}.png"
        cv2.imwrite(str(path), image)
        labels = np.array([[0, (x + 15) / 128, (y + 15) / 96, 30 / 128, 30 / 96]], np.float32)
        records.append(ImageRecord(path, 96, 128, labels))
    dataset = DetectionDataset(records, 128, augment=config)
    for i in range(12):
        s = dataset[0, i]
        covered = np.zeros((128, 128), bool)
        for _, x, y, w, h in s.labels * 128:
            covered[round(y - h / 2) : round(y + h / 2), round(x - w / 2) : round(x + w / 2)] = True
        bright = s.image[..., 0] > 180
        assert (bright & ~covered).sum() <= 0.12 * max(bright.sum(), 500)  # slivers of dropped boxes
        assert (covered & ~bright).sum() <= 0.12 * max(covered.sum(), 500)
        assert bright.any() or not len(s.labels)


def test_tiny_boxes_are_left_out_with_and_without_a_flip(tmp_path):
    """Sides of at most 2 pixels, as in YOLOv5, also where the geometry does not change."""
    record = write_set(tmp_path, 1, sizes=((100, 100),))[0]
    rows = [(0, 0.5, 0.5, 0.02, 0.2), (1, 0.5, 0.5, 0.03, 0.2), (2, 0.001, 0.5, 0.4, 0.4), (3, 0, 0, 0.4, 0.1)]
    record = replace(record, labels=np.array(rows, np.float32), segments=())
    for flip in (0.0, 1.0):
        dataset = DetectionDataset([record], 100, augment=AugmentConfig(fliplr=flip))
        assert dataset[0].labels[:, 0].tolist() == [1, 2, 3]
    assert DetectionDataset([record], 100)[0].labels[:, 0].tolist() == [0, 1, 2, 3]  # validation counts them all


def test_mosaic_partners_are_other_images_of_the_window(tmp_path):
    """Images of one gray value each: the values in a mosaic identify its images."""
    records = []
    for i in range(100):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((32, 32, 3), 2 * i, np.uint8))
        records.append(ImageRecord(tmp_path / f"{i}.png", 32, 32, np.zeros((0, 5), np.float32)))
    dataset = DetectionDataset(records, 32, augment=AugmentConfig(mosaic=1.0), seed=1)
    for i in range(0, 100, 7):
        found = set(np.unique(dataset[2, i].image)) - {114}
        members = {int(v) // 2 for v in found}
        window = set(dataset._window(SampleKey(2, i)).tolist())
        assert 1 <= len(members) <= 4 and members <= window and i in window
    explicit = np.array([5, 6, 7, 8])
    found = set(np.unique(dataset[SampleKey(0, 5, window=explicit)].image)) - {114}
    assert {int(v) // 2 for v in found} <= {5, 6, 7, 8}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mosaics_of_small_sets(tmp_path, count):
    config = AugmentConfig(mosaic=1.0, mosaic9=0.5, mixup=0.5)
    dataset = DetectionDataset(write_set(tmp_path, count), 64, augment=config)
    assert all(dataset[e, i].image.shape == (64, 64, 3) for e in range(3) for i in range(count))


def test_rect_training_has_batch_shapes_and_no_mosaic(records):
    dataset = DetectionDataset(records, 64, augment=RECIPE, rect=True, batch_size=4, stride=16)
    order = dataset.visiting_order
    ratios = [records[i].height / records[i].width for i in order]
    assert ratios == sorted(ratios)
    for batch, shape in enumerate(dataset.batch_shapes):
        samples = [dataset[0, i] for i in order[4 * batch : 4 * batch + 4].tolist()]
        assert {s.image.shape[:2] for s in samples} == {shape}
        assert all(s.shapes is not None for s in samples)
    assert len(set(dataset.batch_shapes)) > 1


def test_small_images_are_enlarged_and_large_ones_shrunk(tmp_path):
    records = write_set(tmp_path, 2, sizes=((30, 40), (300, 400)))
    dataset = DetectionDataset(records, 80)
    for i in range(2):
        s = dataset[i]
        assert s.image.shape == (80, 80, 3)
        assert (s.image[:10] == 114).all() and (s.image[70:] == 114).all() and not (s.image[10:70] == 114).all(2).any()
        assert s.shapes.pad == (0, 10)
        assert s.shapes.ratio == (80 / records[i].width, 80 / records[i].width)


def test_mosaics_end_with_the_epoch_they_are_closed_from(records):
    """Before it samples are as without the option; from it on they are single images: no mixup, no copy-paste."""
    always = AugmentConfig(hsv_v=0.4, scale=0.5, fliplr=0.5, mosaic=1.0, mixup=1.0, copy_paste=1.0)
    plain = DetectionDataset(records, 64, augment=always, seed=3)
    closing = DetectionDataset(records, 64, augment=always, seed=3, close_mosaic_from=2)
    copy = pickle.loads(pickle.dumps(closing))
    for i in range(6):
        assert all(same(plain[epoch, i], closing[epoch, i]) for epoch in (0, 1))
        assert plain[2, i].shapes is None
        assert all(closing[epoch, i].shapes is not None and len(closing[epoch, i].labels) <= 2 for epoch in (2, 7))
        assert same(closing[2, i], copy[2, i]) and not same(closing[2, i], closing[3, i])
    assert closing.mosaic_closed(2) and not closing.mosaic_closed(1) and not plain.mosaic_closed(10**6)


def outlined(records):
    """The records with a polygon for each label: a diamond in its box."""
    diamond = np.array([(0, -0.5), (0.5, 0), (0, 0.5), (-0.5, 0)], np.float32)
    return [replace(r, segments=tuple(row[1:3] + diamond * row[3:5] for row in r.labels)) for r in records]


def test_copy_paste_adds_objects_and_depends_on_the_key_alone(records):
    shrink = np.array((1, 0.6, 1, 0.5, 0.5), np.float32)  # small and on the left: the mirror image has room
    records = [replace(r, labels=r.labels[:1] * shrink) for r in records]
    never, always = (AugmentConfig(mosaic=1.0, copy_paste=share) for share in (0.0, 1.0))
    plain = DetectionDataset(outlined(records), 64, augment=never)
    first, second = (DetectionDataset(outlined(records), 64, augment=always) for _ in range(2))
    keys = [(e, i) for e in range(2) for i in range(10)]
    pasted = {key: first[key] for key in keys}
    assert all(same(pasted[key], second[key]) for key in reversed(keys))
    assert sum(len(pasted[key].labels) for key in keys) > 1.3 * sum(len(plain[key].labels) for key in keys)
    boxes = DetectionDataset(records, 64, augment=never)
    without = DetectionDataset(records, 64, augment=always)  # boxes alone: nothing to cut out
    assert all(same(boxes[key], without[key]) for key in keys)


def test_index_out_of_range(records):
    with pytest.raises(IndexError, match="20"):
        DetectionDataset(records, 64)[20]


# ---- caches


@pytest.mark.parametrize("augment", [None, RECIPE], ids=["val", "train"])
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_caches_do_not_change_samples(tmp_path, cache, augment):
    records = write_set(tmp_path, 8, sizes=((48, 64), (100, 60)))
    plain = DetectionDataset(records, 64, augment=augment)
    cached = DetectionDataset(records, 64, augment=augment, cache=cache, cache_folder=tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(cached))
    for i in range(8):
        assert same(plain[1, i], cached[1, i]) and same(plain[1, i], copy[1, i])


def test_memory_cache_does_not_read_again(tmp_path):
    records = write_set(tmp_path, 3)
    dataset = DetectionDataset(records, 64, cache="ram")
    for record in records:
        record.path.unlink()
    assert all(dataset[i].image.shape == (64, 64, 3) for i in range(3))


def test_memory_cache_is_left_out_when_it_does_not_fit(tmp_path, monkeypatch, caplog):
    records = write_set(tmp_path, 3)
    monkeypatch.setattr(image_store, "available_memory", lambda: 1000)
    dataset = DetectionDataset(records, 64, cache="ram")
    assert "not cached in memory" in caplog.text and "0.0 GiB free" in caplog.text
    assert dataset[0].image.shape == (64, 64, 3)


def test_available_memory_is_a_plausible_number():
    free = image_store.available_memory()
    assert 2**20 < free < 2**50


def test_disk_cache_is_read_until_its_image_changes(tmp_path):
    records = write_set(tmp_path, 2)
    store = ImageStore(records, 64, smooth=True, mode="disk")
    file = store.file_of(0)
    assert file.parent == tmp_path and file.name.startswith("000.")
    expected = store[0].copy()
    original = records[0].path.read_bytes()
    status = records[0].path.stat()
    records[0].path.write_bytes(bytes(len(original)))  # same size and time: only the cache holds the image now
    os.utime(records[0].path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (ImageStore(records, 64, smooth=True, mode="disk")[0] == expected).all()
    os.utime(records[0].path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))  # replaced, even by an older file
    with pytest.raises(DataError, match="cannot be decoded"):
        ImageStore(records, 64, smooth=True, mode="disk")


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: d[:20], lambda _: b""]
)
def test_damaged_disk_cache_is_not_used(tmp_path, damage):
    records = write_set(tmp_path, 1)
    store = ImageStore(records, 64, smooth=True, mode="disk")
    expected, file = store[0].copy(), store.file_of(0)
    file.write_bytes(damage(file.read_bytes()))
    assert (store[0] == expected).all()


def test_disk_cache_never_overwrites_a_file_of_the_user(tmp_path):
    records = write_set(tmp_path, 1)
    depth = records[0].path.with_suffix(".npy")
    np.save(depth, np.full((48, 64), 0.5, np.float32))
    store = ImageStore(records, 64, smooth=True, mode="disk")
    assert np.load(depth).dtype == np.float32
    store.file_of(0).write_bytes(b"notes of mine")
    with pytest.raises(DataError, match="not a cache file of ours"):
        ImageStore(records, 64, smooth=True, mode="disk")
    assert store.file_of(0).read_bytes() == b"notes of mine"


def test_special_file_under_the_name_of_a_disk_cache_is_refused(tmp_path):
    (record,) = write_set(tmp_path, 1)
    os.mkfifo(f"{record.path}.image-cache")
    with pytest.raises(DataError, match="is not a cache file of ours"):
        ImageStore([record], 64, smooth=False, mode="disk")


def test_disk_cache_of_a_read_only_dataset_is_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    records = write_set(tmp_path / "set", 1)
    (tmp_path / "set").chmod(0o555)
    store = ImageStore(records, 64, smooth=True, mode="disk")
    (tmp_path / "set").chmod(0o755)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["000.png"] and store[0].shape == (48, 64, 3)
    assert len(list((tmp_path / "cache").rglob("000-*"))) == 1


def test_disk_cache_in_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another cache folder"):
        DetectionDataset(write_set(tmp_path, 1), 64, cache="disk", cache_folder=tmp_path / "file")


def test_recent_images_are_read_once_within_the_limit(tmp_path, monkeypatch):
    records = write_set(tmp_path, 6, sizes=((64, 64),))
    reads = []
    decode = image_store.read
    monkeypatch.setattr(image_store, "read", lambda path: (reads.append(path), decode(path))[1])
    store = ImageStore(records, 64, smooth=False, recent_bytes=3 * 64 * 64 * 3)
    for i in (0, 1, 2, 0, 3, 0, 1):  # 3 pushes out 1, the one that was used longest ago
        store[i]
    assert [int(path.stem) for path in reads] == [0, 1, 2, 3, 1]


def test_errors_name_the_image(tmp_path):
    records = write_set(tmp_path, 3)
    cv2.imwrite(str(records[1].path), np.zeros((10, 20, 3), np.uint8))
    records[2].path.unlink()
    dataset = DetectionDataset(records, 64)
    with pytest.raises(DataError, match=r"001.png: 20x10 pixels, but 48x64"):
        dataset[1]
    with pytest.raises(DataError, match="002.png"):
        dataset[2]
    with pytest.raises(ConfigError, match="allowed are 'ram', 'disk'"):
        DetectionDataset(records, 64, cache="tape")
