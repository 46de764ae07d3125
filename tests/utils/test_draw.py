"""Images from arrays: content and position, for any name and size."""

import itertools

import cv2
import numpy as np
import pytest
import torch

from utils import draw as plots
from utils.draw import (
    class_color,
    class_name,
    draw_boxes,
    drawable,
    feature_map_image,
    heat_map_image,
    heat_map_sheet,
    image_grid,
)


def _gray(height=120, width=160):
    return np.full((height, width, 3), 90, np.uint8)


def _changed(a, b):
    """Return the bounding box (xyxy) of the pixels in which two images differ."""
    rows, columns = np.nonzero((a != b).any(2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_a_box_is_drawn_on_its_edges_and_the_image_is_not_changed():
    image = _gray()
    before = image.copy()
    out = draw_boxes(image, np.array([[30, 40, 90, 100.0]]), [0], None, 1)
    assert np.array_equal(image, before)
    assert _changed(image, out) == (30, 40, 90, 100)
    assert tuple(out[40, 60]) == class_color(0) and tuple(out[70, 30]) == class_color(0)
    assert tuple(out[70, 60]) == (90, 90, 90)  # hollow


@pytest.mark.parametrize(
    ("box", "plate"),
    [
        ([40, 60, 90, 100], "above"),  # room above the box
        ([40, 2, 90, 100], "inside"),  # no room: inside, below the upper edge
        ([150, 60, 159, 100], "above"),  # too far right: moved left into the image
    ],
)
def test_captions_stay_in_the_image(box, plate):
    image = _gray()
    bare = draw_boxes(image, np.array([box], float), [1], None, 2)
    left, top, right, bottom = _changed(bare, draw_boxes(image, np.array([box], float), [1], ["cat 0.5"], 2))
    assert left >= 0 and right <= 159 and right - left > 25  # the text is complete
    assert (bottom <= box[1] + 2) if plate == "above" else (top <= box[1] + 2 and bottom < box[3])


def test_an_empty_caption_draws_no_plate():
    boxes = np.array([[40, 60, 90, 100.0]])
    assert np.array_equal(draw_boxes(_gray(), boxes, [0], [""], 2), draw_boxes(_gray(), boxes, [0], None, 2))


@pytest.mark.parametrize("count", [2, 12, 60])
def test_captions_do_not_cover_one_another(count):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate((corners, corners + 30), 1).round().astype(int)
    sizes = [plots._plate_size("class 0.50", 0.5)] * count
    places = plots._caption_places(boxes, sizes, (200, 300), (0, 0, 80, 12))
    assert places[-1] is not None and sum(place is not None for place in places) >= min(count, 7)
    covered = np.zeros((200, 300), int)
    covered[:12, :80] = 1
    for place, (width, height) in zip(places, sizes):
        if place is not None:
            assert place[0] + width <= 300 and place[1] + height <= 200
            covered[place[1] : place[1] + height, place[0] : place[0] + width] += 1
    assert covered.max() == 1


def test_title_of_a_cell_is_drawn_once():
    """Text is drawn once: OpenCV 5 spaces an outline differently, which doubled every name."""
    images = torch.full((1, 3, 320, 320), 128, dtype=torch.uint8)
    title = image_grid(images, torch.zeros(0, 6), ["a/IMG_2470.jpg"])[1:19, 1:100]
    (width, height), _ = cv2.getTextSize("IMG_2470.jpg", plots.FONT, 0.4, 1)
    alone = np.full((40, 200, 3), 40, np.uint8)
    cv2.putText(alone, "IMG_2470.jpg", (2, height + 1), plots.FONT, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    assert np.array_equal(title[: height + 1, :width], alone[1 : height + 2, 1 : width + 1])


def test_captions_lie_above_all_boxes():
    """A later box must not be drawn over the caption of an earlier one."""
    boxes = np.array([[10, 60, 150, 110.0], [12, 50, 140, 100.0]])
    alone = draw_boxes(_gray(), boxes[:1], [0], ["first"], 2)
    both = draw_boxes(_gray(), boxes, [0, 1], ["first", ""], 2)
    left, top, right, bottom = _changed(alone, draw_boxes(_gray(), boxes[:1], [0], None, 2))
    assert np.array_equal(alone[top:bottom, left:right], both[top:bottom, left:right])


@pytest.mark.parametrize(
    "box",
    [
        [-50, -50, 500, 500],
        [1e9, 1e9, 2e9, 2e9],
        [float("nan")] * 4,
        [float("-inf"), 0, float("inf"), 10],
        [50, 50, 50, 50],
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (40, 2000), (2000, 40)])
def test_no_box_and_no_size_stops_drawing(box, size):
    out = draw_boxes(_gray(*size), np.array([box], float), [3], ["größe 0.9"], 3)
    assert out.shape == (*size, 3)


@pytest.mark.parametrize(
    ("text", "expected", "expected_ascii"),
    [
        ("cat", "cat", "cat"),
        ("größe", "größe", "grosse"),
        ("café", "café", "cafe"),
        ("図像", "図像", "??"),
        ("a\nb\x00c", "a b c", "a b c"),
        ("lone \ud800", "lone ?", "lone ?"),  # OpenCV 5 crashes on a surrogate
        ("x" * 80, "x" * 57 + "...", "x" * 57 + "..."),
    ],
)
def test_drawable(text, expected, expected_ascii):
    assert drawable(text, unicode_text=True) == expected
    assert drawable(text, unicode_text=False) == expected_ascii


@pytest.mark.parametrize("name", ["größe", "図像", "кот", "😀", "\ud800", "", " ", "\u202eabc"])
@pytest.mark.parametrize("unicode_text", [True, False])
def test_any_name_can_be_drawn(name, unicode_text, monkeypatch):
    monkeypatch.setattr(plots, "UNICODE_TEXT", unicode_text)
    assert draw_boxes(_gray(), np.array([[5, 50, 80, 100.0]]), [0], [name], 3).shape == (120, 160, 3)


def test_colors_are_distinct_and_fixed():
    colors = [class_color(i) for i in range(24)]
    assert len(set(colors)) == 24
    assert all(0 <= v <= 255 for c in colors for v in c)
    assert class_color(np.int64(5)) == class_color(5) and isinstance(class_color(np.int64(5))[0], int)
    near = [np.abs(np.subtract(a, b)).max() for a, b in itertools.pairwise(colors)]
    assert min(near) > 60  # consecutive classes differ


@pytest.mark.parametrize(
    ("names", "index", "expected"),
    [({0: "a"}, 0, "a"), ({0: "a"}, 1, "1"), (["a", "b"], 1, "b"), (["a"], 3, "3"), (["a"], -1, "-1"), (None, 2, "2")],
)
def test_class_name(names, index, expected):
    assert class_name(names, index) == expected


@pytest.mark.parametrize(("count", "shape"), [(1, (240, 330)), (2, (240, 660)), (5, (480, 990)), (16, (960, 1320))])
def test_grid_has_a_place_for_each_image(count, shape):
    images = torch.zeros(count, 3, 240, 330, dtype=torch.uint8)
    grid = image_grid(images, torch.zeros(0, 6))
    assert grid.shape == (*shape, 3) and grid.dtype == np.uint8


def test_grid_puts_boxes_on_their_images_in_rgb_order():
    images = torch.zeros(4, 3, 100, 100, dtype=torch.uint8)
    images[2, 0] = 200  # the third image is red
    targets = torch.tensor([[3, 1, 0.5, 0.5, 0.4, 0.2]])
    grid = image_grid(images, targets, names={1: "x"})
    assert tuple(grid[480, 160]) == (0, 0, 200)  # BGR; lower left cell, enlarged from 100 to 320 pixels
    assert tuple(grid[512, 480]) == class_color(1)  # lower edge of the box in the lower right cell
    assert not grid[5:315, 325:635].any()  # nothing on the second image


def test_grid_takes_floats_and_leaves_out_low_confidence():
    images = np.zeros((1, 3, 100, 100), np.float32)
    images[0, 1] = 1.0
    row = [0, 0, 0.5, 0.5, 0.4, 0.4]
    shown, hidden = (image_grid(images, np.array([[*row, score]])) for score in (0.9, 0.1))
    assert tuple(hidden[160, 160]) == (0, 255, 0)
    assert np.array_equal(hidden, image_grid(images, np.zeros((0, 7))))
    assert not np.array_equal(shown, hidden)


def test_grid_is_scaled_to_its_limit():
    images = torch.zeros(16, 3, 640, 480, dtype=torch.uint8)
    assert max(image_grid(images, torch.zeros(0, 6), max_side=1000).shape) <= 1000


@pytest.mark.parametrize("shape", [(64, 20, 26), (3, 1, 1), (1, 40, 2), (200, 2, 40)])
def test_feature_maps_of_any_shape(shape):
    image = np.zeros((80, 100, 3), np.uint8)
    out = feature_map_image(torch.randn(shape), "0_RIFormer_P3", image)
    assert out.dtype == np.uint8 and out.ndim == 3
    assert feature_map_image(torch.full(shape, float("nan")).half(), "dead").ndim == 3


def test_feature_maps_show_where_a_channel_is_active():
    maps = torch.zeros(2, 4, 4)
    maps[1, 0, 3] = 5.0  # channel 1, upper right cell
    sheet = feature_map_image(maps, "slot", tile=40)
    tile = sheet[-44:-4, 4 + 2 * 44 : 4 + 2 * 44 + 40]  # third tile: mean, channel 0, channel 1
    assert tile[5, 35].min() == 255 and tile[5, 5].max() == 0 and tile[35, 35].max() == 0


def test_readable_text_color():
    image = draw_boxes(_gray(), np.array([[40, 60, 150, 100.0]]), [2], ["WWWW"], 3)  # class 2 is a light green
    assert cv2.inRange(image, (0, 0, 0), (30, 30, 30)).any()  # black text on it


def test_heat_map_changes_an_image_only_where_it_is_hot():
    image, heat = _gray(), np.zeros((120, 160), np.float32)
    heat[40:80, 60:100] = 1
    out = heat_map_image(image, heat)
    assert _changed(image, out) == (60, 40, 99, 79) and out.dtype == np.uint8
    assert out[60, 80, 2] > out[60, 80, 0] + 50  # red, over gray


def test_heat_map_sheet_has_a_tile_of_320_pixels_per_level():
    levels = {name: np.zeros((60, 80), np.float32) for name in ("P3", "P4", "P5")}
    sheet = heat_map_sheet(_gray(60, 80), levels, "title")
    assert sheet.shape[1] >= 4 * 320 and sheet.shape[0] >= 240
