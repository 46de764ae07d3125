"""Augmentation: pixels and boxes change alike, as documented, and the one-pass renderer equals paste-then-warp."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data.augment.color import hsv_gains, mixup
from data.augment.config import AugmentConfig
from data.augment.mosaic import LabeledImage, choose_pastes, mirror, mosaic4, mosaic9, paste_mirrored
from data.augment.warp import Canvas, Tile, Warp, box_candidates, draw_warp, render, transform_labels
from data.letterbox import letterbox

RNG_SEEDS = range(4)


def rng(seed=0):
    return np.random.default_rng(seed)


def whole(image):
    """Return a canvas that one image covers."""
    h, w = image.shape[:2]
    return Canvas((Tile(image, (h, w), (0, 0), (0, 0, w, h)),), (h, w))


def random_perspective(image, labels, polygons, config, generator):
    """Warp one image at its own size."""
    warp = draw_warp(config, image.shape[:2], image.shape[:2], generator)
    return render(whole(image), warp), transform_labels(labels, polygons, warp)


def copy_paste(image, labels, polygons, share, generator):
    """Paste mirrored objects into the same image."""
    chosen = choose_pastes(labels, polygons, image.shape[1], share, generator)
    out = image.copy()
    paste_mirrored(out, whole(image), [polygons[i] for i in chosen], Warp(np.eye(3), 1.0, image.shape[:2]))
    return out, *mirror(labels, polygons, chosen, image.shape[1])


def smooth(seed, height, width):
    """An image without edges, so that interpolation hardly matters."""
    coarse = rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def image(seed, height, width, labels=(), zoom=1.0):
    size = (round(height * zoom), round(width * zoom))
    return LabeledImage(smooth(seed, height, width), size, np.array(labels, np.float32).reshape(-1, 5))


def with_box(height, width, x1, y1, x2, y2):
    """Black, with a white box; its label is the box."""
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    return image, np.array([[3, x1, y1, x2, y2]], np.float32)


def bounds(image, threshold=127):
    """Return xyxy of the bright part."""
    ys, xs = np.nonzero(image[..., 0] > threshold)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


# ---- the configuration


def test_config_takes_its_own_keys_only():
    config = AugmentConfig.from_hyp({"hsv_h": 0.1, "mosaic": 1, "lr0": 0.01, "box": 0.05})
    assert config == AugmentConfig(hsv_h=0.1, mosaic=1.0)


# ---- one pass against two steps


def two_steps(canvas, warp):
    """Paint the whole canvas, then warp it: what the renderer must equal. Also where that is far from every edge."""
    height, width = canvas.shape
    painted = np.full((height, width, 3), 114, np.uint8)
    inside = np.zeros((height, width), np.uint8)
    for tile in canvas.tiles:
        (h, w), (ox, oy) = tile.size, tile.offset
        resized = cv2.resize(tile.image, (w, h), interpolation=cv2.INTER_LINEAR)
        x1, y1, x2, y2 = tile.visible
        painted[y1:y2, x1:x2] = resized[y1 - oy : y2 - oy, x1 - ox : x2 - ox]
        inside[y1:y2, x1:x2] = 0
        inside[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3] = 255
    half = np.array(((1, 0, 0.5), (0, 1, 0.5), (0, 0, 1)))
    index = np.linalg.inv(half) @ warp.matrix @ half
    size = warp.shape[::-1]
    out = cv2.warpPerspective(painted, index, size, flags=cv2.INTER_LINEAR, borderValue=(114, 114, 114))
    return out, cv2.warpPerspective(inside, index, size, flags=cv2.INTER_NEAREST) > 0


WARPS = {
    "shift and zoom": AugmentConfig(translate=0.1, scale=0.5),
    "nothing": AugmentConfig(),
    "turn": AugmentConfig(degrees=40, scale=0.2, translate=0.1),
    "shear": AugmentConfig(shear=15),
    "perspective": AugmentConfig(perspective=0.001, degrees=10),
}
FLIPS = [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize("flips", FLIPS, ids=["plain", "ud", "lr"])
@pytest.mark.parametrize("config", WARPS.values(), ids=WARPS)
@pytest.mark.parametrize("count", [4, 9])
def test_render_equals_paste_then_warp(count, config, flips):
    sizes = [(120, 160), (160, 110), (160, 160), (90, 160), (160, 80), (140, 160), (100, 160), (160, 130), (160, 120)]
    for seed in RNG_SEEDS:
        r = rng(seed)
        zooms = [1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0]
        images = [image(i, int(h / z), int(w / z), zoom=z) for i, ((h, w), z) in enumerate(zip(sizes, zooms))]
        canvas, _, _ = (mosaic4 if count == 4 else mosaic9)(images[:count], 160, r)
        warp = draw_warp(config, canvas.shape, (160, 160), r, flips)
        found = render(canvas, warp).astype(int)
        expected, inside = two_steps(canvas, warp)
        difference = np.abs(found - expected).max(2)
        assert inside.mean() > 0.2
        assert difference[inside].max() <= 4  # 1/32 pixel of position, in gray levels of these images
        assert difference[inside].mean() < 0.4
        if count == 4:  # and no gap between tiles: nothing but one pixel beside an edge differs at all
            assert (difference > 12).mean() < 0.06


def test_render_covers_every_pixel_between_tiles():
    """Tiles of one color next to each other: no gray seam, whatever the position."""
    white = np.full((64, 64, 3), 255, np.uint8)
    for seed in range(20):
        canvas, _, _ = mosaic4([LabeledImage(white, (64, 64), np.zeros((0, 5), np.float32))] * 4, 64, rng(seed))
        for config in (AugmentConfig(scale=0.4), AugmentConfig(degrees=45, shear=5), AugmentConfig(perspective=0.001)):
            warp = draw_warp(config, canvas.shape, (64, 64), rng(seed))
            expected, _inside = two_steps(canvas, warp)
            sure = cv2.erode((expected[..., 0] == 255).astype(np.uint8), np.ones((3, 3))) > 0
            assert (render(canvas, warp)[sure] == 255).all()


def test_render_without_change_is_exact():
    image = rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    canvas = Canvas((Tile(image, (50, 70), (5, 3), (5, 3, 75, 53)),), (60, 80))
    warp = draw_warp(AugmentConfig(), (60, 80), (60, 80), rng())
    assert (warp.matrix == np.eye(3)).all()
    out = render(canvas, warp)
    assert np.array_equal(out[3:53, 5:75], image)
    out[3:53, 5:75] = 114
    assert (out == 114).all()


@pytest.mark.parametrize("flips", FLIPS[1:], ids=["ud", "lr"])
def test_flips_mirror_exactly(flips):
    image = rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    canvas = Canvas((Tile(image, (50, 70), (0, 0), (0, 0, 70, 50)),), (50, 70))
    warp = draw_warp(AugmentConfig(), (50, 70), (50, 70), rng(), flips)
    assert np.array_equal(render(canvas, warp), image[::-1] if flips[0] else image[:, ::-1])
    labels = transform_labels(np.array([[0, 10, 5, 30, 25]], np.float32), [], warp)
    assert labels[0, 1:].tolist() == ([10, 25, 30, 45] if flips[0] else [40, 5, 60, 25])


# ---- boxes follow the pixels


@pytest.mark.parametrize("config", WARPS.values(), ids=WARPS)
def test_boxes_follow_pixels(config):
    image, labels = with_box(200, 240, 90, 80, 150, 130)
    for seed in range(6):
        moved, boxes = random_perspective(image, labels, [], config, rng(seed))
        assert boxes.shape == (1, 5) and boxes[0, 0] == 3
        np.testing.assert_allclose(bounds(moved), boxes[0, 1:], atol=1.1)


def test_polygon_gives_a_tighter_box_than_the_corners():
    image = np.zeros((200, 200, 3), np.uint8)
    circle = np.array([(100 + 40 * np.cos(t), 100 + 40 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 40)], np.float32)
    cv2.fillPoly(image, [np.round(circle - 0.5).astype(np.int32)], (255, 255, 255))
    labels = np.array([[0, 60, 60, 140, 140]], np.float32)
    config = AugmentConfig(degrees=45)
    moved, tight = random_perspective(image, labels, [circle], config, rng(3))
    _, loose = random_perspective(image, labels, [], config, rng(3))
    np.testing.assert_allclose(bounds(moved), tight[0, 1:], atol=1.5)
    assert loose[0, 3] - loose[0, 1] > tight[0, 3] - tight[0, 1] + 10
    # A label without a polygon beside one that has one keeps its corners.
    _, both = random_perspective(image, labels.repeat(2, 0), [circle, np.zeros((0, 2), np.float32)], config, rng(3))
    np.testing.assert_allclose(both, np.concatenate((tight, loose)), atol=1e-4)


def test_boxes_that_leave_are_dropped():
    canvas = (100, 100)
    warp = draw_warp(AugmentConfig(), (200, 200), canvas, rng())  # the middle quarter of the canvas stays
    labels = np.array([[0, 0, 0, 40, 40], [1, 80, 80, 120, 120], [2, 30, 60, 55, 90], [3, 20, 60, 53, 90]], np.float32)
    kept = transform_labels(labels, [], warp)
    assert kept[:, 0].tolist() == [1, 2]  # the first is outside; of the last less than a tenth is left
    assert kept[:, 1:].tolist() == [[30, 30, 70, 70], [0, 10, 5, 40]]


CANDIDATES = [  # box after a change (the one before is 100 x 100), kept?
    ((0, 0, 50, 50), True),
    ((0, 0, 2, 50), False),  # not wider than 2 pixels
    ((0, 0, 50, 2), False),
    ((0, 0, 31, 31), False),  # 0.0961 of the area
    ((0, 0, 32, 32), True),  # 0.1024
    ((0, 0, 1000, 5), False),  # 200 times as wide as high
]


@pytest.mark.parametrize(("after", "kept"), CANDIDATES)
def test_box_candidates(after, kept):
    before = np.array([[0, 0, 100, 100]], np.float32)
    assert box_candidates(before.T, np.array([after], np.float32).T).tolist() == [kept]


# ---- mosaics


def test_mosaic4_puts_the_images_around_one_point():
    images = [image(i, 48, 64, [[i, 0.5, 0.5, 0.25, 0.5]]) for i in range(4)]
    canvas, labels, segments = mosaic4(images, 64, rng(5))
    assert canvas.shape == (128, 128) and segments == []
    x = {tile.offset[0] for tile in canvas.tiles[1::2]}.pop()
    y = canvas.tiles[2].offset[1]
    assert [tile.offset for tile in canvas.tiles] == [(x - 64, y - 48), (x, y - 48), (x - 64, y), (x, y)]
    assert 32 <= x < 96 and 32 <= y < 96
    for tile, (c, x1, y1, x2, y2) in zip(canvas.tiles, labels):
        ox, oy = tile.offset
        expected = np.clip((ox + 24, oy + 12, ox + 40, oy + 36), 0, 128)
        assert (x1, y1, x2, y2) == tuple(expected), c


def test_mosaic9_tiles_touch_and_do_not_overlap():
    """Images of one size fill the window without a gap."""
    white = LabeledImage(np.full((64, 64, 3), 255, np.uint8), (64, 64), np.zeros((0, 5), np.float32))
    for seed in RNG_SEEDS:
        canvas, _, _ = mosaic9([white] * 9, 64, rng(seed))
        assert sum((t.visible[2] - t.visible[0]) * (t.visible[3] - t.visible[1]) for t in canvas.tiles) == 128 * 128
        assert (render(canvas, draw_warp(AugmentConfig(), (128, 128), (128, 128), rng())) == 255).all()


def test_mosaic9_corners():
    """Images of different sizes: each one touches the one before it, around the middle one."""
    sizes = [(40, 50), (20, 30), (25, 35), (15, 45), (10, 60), (22, 32), (24, 34), (26, 36), (28, 38)]  # height, width
    images = [image(i, h, w, [[i, 0.5, 0.5, 1, 1]]) for i, (h, w) in enumerate(sizes)]
    _, labels, _ = mosaic9(images, 200, rng(3))  # a window that cuts none of them
    corners = labels[:, 1:3] - labels[0, 1:3]
    expected = [(0, 0), (0, -20), (30, -25), (50, 0), (50, 15), (18, 40), (-16, 40), (-36, 14), (-38, -14)]
    assert corners.tolist() == [list(corner) for corner in expected]


def test_mosaic_polygons_travel_with_their_labels():
    polygon = np.array([(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)], np.float32)
    labels = np.array([[0, 0.5, 0.5, 0.5, 0.5]], np.float32)
    plain = LabeledImage(smooth(0, 64, 64), (64, 64), labels)
    outlined = LabeledImage(smooth(1, 64, 64), (64, 64), labels, (polygon,))
    canvas, boxes, segments = mosaic4([plain, plain, outlined, plain], 64, rng(2))
    assert [len(s) for s in segments] == [0, 0, 3, 0]
    expected = polygon * 64 + np.array(canvas.tiles[2].offset)
    np.testing.assert_allclose(segments[2], expected.clip(0, 128))
    assert len(boxes) == 4


# ---- pasting, blending, color


def test_copy_paste_mirrors_what_has_room():
    image, labels = with_box(100, 200, 20, 30, 50, 60)
    polygon = np.array([(20, 30), (50, 30), (50, 60), (20, 60)], np.float32)
    out, new, polygons = copy_paste(image, labels, [polygon], 1.0, rng())
    assert new.tolist() == [[3, 20, 30, 50, 60], [3, 150, 30, 180, 60]]
    assert (out[31:59, 151:179] == 255).all() and (out[:, 60:140] == 0).all()
    assert sorted(map(tuple, polygons[1].tolist())) == [(150, 30), (150, 60), (180, 30), (180, 60)]
    assert (image[:, 150:] == 0).all()  # the argument is as it was
    same, rows, _ = copy_paste(*with_box(100, 200, 85, 30, 115, 60), [np.add(polygon, (65, 0))], 1.0, rng())
    assert len(rows) == 1 and np.array_equal(same, with_box(100, 200, 85, 30, 115, 60)[0])  # it would hide itself
    assert len(copy_paste(image, labels, [polygon], 0.0, rng())[1]) == 1
    hidden = np.array([*labels.tolist(), [1, 155, 35, 175, 55]], np.float32)  # it would hide another object
    assert len(copy_paste(image, hidden, [polygon, np.zeros((0, 2), np.float32)], 1.0, rng())[1]) == 2


def test_pasting_while_rendering_equals_pasting_first():
    image = smooth(4, 120, 160)
    polygon = np.array([(20, 30), (60, 25), (55, 80), (25, 70)], np.float32)
    labels = np.array([[0, 20, 25, 60, 80]], np.float32)
    warp = draw_warp(AugmentConfig(degrees=15, scale=0.2), (120, 160), (120, 160), rng(1))
    pasted, boxes, polygons = copy_paste(image, labels, [polygon], 1.0, rng())
    whole = Canvas((Tile(pasted, (120, 160), (0, 0), (0, 0, 160, 120)),), (120, 160))
    canvas = Canvas((Tile(image, (120, 160), (0, 0), (0, 0, 160, 120)),), (120, 160))
    out = render(canvas, warp)
    chosen = choose_pastes(labels, [polygon], 160, 1.0, rng())
    assert chosen == [0]
    paste_mirrored(out, canvas, [polygon], warp)
    difference = np.abs(out.astype(int) - render(whole, warp)).max(2)
    assert (difference > 6).mean() < 0.02  # the pixels of the polygon's edge
    appended, turned = mirror(labels, [polygon], chosen, 160)
    np.testing.assert_array_equal(appended, boxes)
    np.testing.assert_array_equal(turned[1], polygons[1])


def test_mixup_blends_and_keeps_all_labels():
    first = (np.full((8, 8, 3), 200, np.uint8), np.ones((2, 5), np.float32))
    second = (np.full((8, 8, 3), 100, np.uint8), np.zeros((3, 5), np.float32))
    values = [int(mixup(first, second, rng(s))[0][0, 0, 0]) for s in range(200)]
    assert min(values) > 120 and max(values) < 180 and np.mean(values) == pytest.approx(150, abs=2)
    assert np.std(values) == pytest.approx(100 / (2 * np.sqrt(65)), rel=0.2)  # of Beta(32, 32)
    assert mixup(first, second, rng())[1][:, 0].tolist() == [1, 1, 0, 0, 0]


def hsv_reference(image, factors):
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.float64)
    hue = np.floor(hsv[..., 0] * factors[0] % 180)
    rest = np.minimum(np.rint(hsv[..., 1:] * factors[1:]), 255)
    return cv2.cvtColor(np.dstack((hue, rest)).astype(np.uint8), cv2.COLOR_HSV2BGR)


def test_hsv_gains_multiply_hue_saturation_and_value():
    image = rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    before = image.copy()
    for seed in range(5):
        out = hsv_gains(image, 0.5, 0.7, 0.4, rng(seed))
        factors = 1 + rng(seed).uniform(-1, 1, 3) * (0.5, 0.7, 0.4)
        assert np.abs(out.astype(int) - hsv_reference(image, factors)).max() <= 2  # products that end in .5
    assert np.array_equal(image, before)
    assert hsv_gains(image, 0, 0, 0, rng()) is image


def test_augmentations_do_not_change_their_arguments():
    image, labels = with_box(100, 100, 30, 30, 60, 60)
    copies = image.copy(), labels.copy()
    polygon = np.array([(30, 30), (60, 30), (60, 60)], np.float32)
    random_perspective(image, labels, [polygon], AugmentConfig(degrees=10, scale=0.5), rng())
    letterbox(image, 64)
    mosaic4([LabeledImage(image, (100, 100), labels / 100, (polygon / 100,))] * 4, 100, rng())
    mixup((image, labels), (image, labels), rng())
    assert np.array_equal(image, copies[0]) and np.array_equal(labels, copies[1])
