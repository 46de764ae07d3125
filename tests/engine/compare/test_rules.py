"""Pure functions of a comparison: rounds, ties, front, pick, bootstrap, keys, labels, failures."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.config import load_data_config
from engine.compare import candidates, store
from engine.compare.candidates import resolve, unique_labels, write_spec
from engine.compare.config import CompareConfig
from engine.compare.context import resolve_recipe
from engine.compare.measure import rounds
from engine.compare.measure.bootstrap import ImageBootstrap
from engine.compare.measure.rounds import Spread
from engine.compare.measure.speed import groups_of_phases
from engine.compare.pareto import Limits, Point, excesses, front, pick
from engine.compare.results import Accuracy
from engine.compare.store import Store
from engine.compare.worker.jobs import levels_read
from engine.evaluate.accumulator import ImageOutcome
from models.yolo import DetectionModel
from utils.errors import ConfigError
from utils.metrics import ap_per_class


def spread(middle: float, low: float | None = None, high: float | None = None, seeds: int = 2) -> Spread:
    low, high = middle if low is None else low, middle if high is None else high
    return Spread(middle, low, high, (low, high)[:seeds])


# ---- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file whose first byte cannot be read")
def test_candidate_that_cannot_be_read_is_reported_later():
    config = CompareConfig.from_keywords(cfg=["x"])
    assert candidates._key(Path("/proc/self/mem"), False, config) != candidates._key(Path("gone.yaml"), False, config)


def test_turns_are_interleaved():
    assert [name for _, name in rounds.turns("ABC", 3)] == list("ABCABCABC")


def test_run_rounds_skips_failed_candidates():
    asked = []

    def ask(name):
        asked.append(name)
        return None if name == "B" and asked.count("B") == 2 else {"total": float(len(asked))}

    ticks = []
    found = rounds.run_rounds("ABC", 4, ask, lambda: ticks.append(1))
    assert asked == list("ABCABCACAC")
    assert set(found) == {"A", "C"} and len(ticks) == 12
    assert found["A"]["total"].values == (1.0, 4.0, 7.0, 9.0)
    assert found["A"]["total"].middle == 5.5


def test_quartiles():
    found = Spread.of([1, 2, 3, 4, 100])
    assert (found.low, found.middle, found.high) == (2, 3, 4)


@pytest.mark.parametrize(
    ("took", "seconds", "most", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, 40.0, 15, 10),  # a turn is one call that counts and one that does not
        ({"a": 1.0, "b": 1.0}, 1.0, 15, 5),  # never fewer than five
        ({"a": 1.0}, 1.0, 3, 3),  # unless fewer are asked for
        ({"a": 0.001}, 100.0, 15, 15),
        ({}, 10.0, 15, 15),
    ],
)
def test_rounds_fit_into_the_time(took, seconds, most, expected):
    assert rounds.rounds_that_fit(took, seconds, most) == expected


def test_quick_candidates_make_more_calls_in_a_turn():
    assert [rounds.calls_per_visit(s) for s in (10.0, 0.1, 0.001)] == [1, 2, 20]


@pytest.mark.parametrize(
    ("given", "smaller", "expected"),
    [
        ({"a": spread(2, 1, 3), "b": spread(10, 9, 11)}, True, {"a": "1", "b": "2"}),
        ({"a": spread(2, 1, 3), "b": spread(10, 9, 11)}, False, {"b": "1", "a": "2"}),
        ({"a": spread(2, 1, 3), "b": spread(3.5, 3, 4), "c": spread(9)}, True, {"a": "1=", "b": "1=", "c": "3"}),
        # c overlaps with b, but not with a, which is clearly better
        (
            {"a": spread(2, 1, 3), "b": spread(3.5, 3, 4), "c": spread(4.5, 4, 5)},
            True,
            {"a": "1=", "b": "1=", "c": "2="},
        ),
        # the wide one is behind a only, whatever its mean
        (
            {"a": spread(0.476), "b": spread(0.45), "c": spread(0.447), "wide": spread(0.442, 0.42, 0.463)},
            False,
            {"a": "1", "b": "2=", "c": "3=", "wide": "2="},
        ),
        ({}, True, {}),
    ],
)
def test_ties_share_a_place(given, smaller, expected):
    assert rounds.ranks(given, smaller) == expected


def test_seeds_have_a_mean_and_a_range():
    found = rounds.over_seeds([0.2, 0.5, 0.2])
    assert found.middle == pytest.approx(0.3) and (found.low, found.high) == (0.2, 0.5)
    assert rounds.deviation([0.2]) is None
    assert rounds.deviation([0.2, 0.4]) == pytest.approx(0.1 * 2**0.5)
    assert Spread.from_plain(json.loads(json.dumps(asdict(found)))) == found


def test_reparameterized_forms_come_first_and_small_batches_before_large_ones():
    config = CompareConfig(cfg=["x"], runtimes=["onnx", "pytorch"], batch=[8, 1])
    found = [[(p.runtime, p.form, p.batch) for p in group] for group in groups_of_phases(config, 2)]
    assert found == [
        [("onnx", "deployed", 1), ("onnx", "deployed", 8)],
        [("pytorch", "deployed", 1), ("pytorch", "deployed", 8)],
        [("pytorch", "training", 1), ("pytorch", "training", 8), ("pytorch", "step", 2)],
    ]
    for group in found:  # the memory of a process is its peak so far
        assert len({(runtime, form) for runtime, form, _ in group if form != "step"}) == 1
    alone = groups_of_phases(replace(config, runtimes=["onnx"]), 2)
    assert [str(p) for p in alone[1]] == ["training step, batch 2"]


# ---- front and pick -------------------------------------------------------------------------------------------------


def point(ms=None, accuracy=None, parameters=1.0, **more) -> Point:
    return Point(
        spread(ms) if isinstance(ms, (int, float)) else ms,
        spread(accuracy) if isinstance(accuracy, (int, float)) else accuracy,
        parameters,
        **more,
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({"slow": point(9, 0.5), "fast": point(1, 0.3), "bad": point(5, 0.2)}, ["fast", "slow"]),
        ({"a": point(1, 0.5), "b": point(1, 0.4)}, ["a"]),
        ({"a": point(1, 0.5), "b": point(2, 0.5)}, ["a"]),
        ({"a": point(1, 0.5), "twin": point(1, 0.5)}, ["a", "twin"]),
        # nominally slower and less accurate, but within the ranges
        ({"a": point(spread(9, 8, 10), spread(0.5, 0.4, 0.6)), "b": point(spread(9.5, 9, 10), spread(0.49, 0.4, 0.6))},
         ["a", "b"]),
        # without accuracy: latency and parameters
        ({"small": point(9, parameters=1), "fast": point(5, parameters=2), "bad": point(10, parameters=3)},
         ["fast", "small"]),
        ({"small": point(spread(9, 8, 10), parameters=1), "large": point(spread(8.5, 8, 9), parameters=2)},
         ["large", "small"]),
        ({}, []),
    ],
)  # fmt: skip
def test_front(points, expected):
    assert front(points) == expected


TIED = {
    "best": point(30, spread(0.60, 0.58, 0.62), 5.0),
    "near": point(20, spread(0.59, 0.57, 0.61), 5.0),
    "worse": point(5, spread(0.40, 0.39, 0.41), 5.0),
}


@pytest.mark.parametrize(
    ("points", "limits", "label", "words"),
    [
        ({"a": point(9, 0.5), "b": point(5, 0.6)}, Limits(), "b", "best mAP50-95 (0.600 [0.600, 0.600]) of all"),
        ({"a": point(9, 0.5), "b": point(50, 0.6)}, Limits(latency_ms=10), "a", "of the 1 that keep the limits"),
        (TIED, Limits(), "near", "0.590 [0.570, 0.610] ties with best"),
        (TIED, Limits(latency_ms=10), "worse", "best mAP50-95 (0.400"),
        ({"a": point(9, spread(0.5, seeds=1))}, Limits(), "a", "the variation between seeds is not included"),
        ({"a": point(9, 0.5, has_interval=False)}, Limits(), None, "too few validation images for an interval"),
        ({"a": point(9, 0.00018), "b": point(5, 0.00039)}, Limits(), None, "not trained long enough to rank: the best "
         "mAP50-95 is 0.000; below 0.05"),
        ({"a": point(9), "b": point(5)}, Limits(), None, "no accuracy was measured"),
        (
            {"a": point(spread(9, 8, 10), 0.5, 1), "b": point(spread(8.5, 8, 9), 0.5, 2)},
            Limits(), "a", "smallest of the candidates that tie for the lowest latency",
        ),
        ({"a": point(20), "b": point(30)}, Limits(latency_ms=10), None, "nearest is a: latency 20 ms > 10"),
        ({"a": point(None)}, Limits(latency_ms=10), None, "latency unknown"),
        ({"a": point(1, 0.5), "b": point(1, None)}, Limits(), "a", "best"),
        ({}, Limits(), None, "no candidate was measured"),
    ],
)  # fmt: skip
def test_pick(points, limits, label, words):
    found = pick(points, limits)
    assert found.label == label
    assert words in found.reason


def test_pick_is_ranked():
    """A fast candidate below the floor ties with the best one, but has no rank."""
    points = {"fast": point(1, spread(0.045, 0.03, 0.06)), "best": point(9, spread(0.055, 0.04, 0.08))}
    assert pick(points, Limits()).label == "best"
    assert pick({**points, "fast": point(1, spread(0.05, 0.03, 0.06))}, Limits()).label == "fast"


def test_pick_without_accuracy_names_the_front():
    found = pick({"a": point(9, parameters=1), "b": point(5, parameters=2), "c": point(9.5, parameters=3)}, Limits())
    assert (found.label, found.front) == (None, ("b", "a"))


# ---- bootstrap ------------------------------------------------------------------------------------------------------


def outcome(correct: list[bool], confidence: list[float], classes: list[int], labels: list[int]) -> ImageOutcome:
    detections = torch.tensor([[0.0, 0, 1, 1, s, c] for s, c in zip(confidence, classes)]).reshape(-1, 6)
    tp = torch.tensor(correct, dtype=torch.bool)[:, None].expand(-1, 10)
    return ImageOutcome("", (1, 1), detections, torch.tensor([[c, 0.0, 0, 1, 1] for c in labels]).reshape(-1, 5), tp)


def random_outcomes(count: int) -> list[ImageOutcome]:
    rng = np.random.default_rng(1)
    return [
        outcome((rng.random(4) < 0.5).tolist(), rng.random(4).tolist(), rng.integers(0, 2, 4).tolist(), [0, 0, 1, 1])
        for _ in range(count)
    ]


def test_bootstrap_agrees_with_metrics_of_repeated_images():
    bootstrap, outcomes = ImageBootstrap(), random_outcomes(12)
    for o in outcomes:
        bootstrap(o)
    rng = np.random.default_rng(3)
    expected = []
    for _ in range(20):
        drawn = [outcomes[i] for i in np.sort(rng.integers(0, 12, 12))]
        rows = torch.cat([o.detections for o in drawn]).numpy()
        found = ap_per_class(
            torch.cat([o.correct for o in drawn]).numpy(), rows[:, 4], rows[:, 5],
            torch.cat([o.labels for o in drawn])[:, 0].numpy(),
        )  # fmt: skip
        expected.append(found.ap.mean())
    np.testing.assert_allclose(bootstrap.map_values(20, seed=3), expected, atol=0.02)
    assert np.std(expected) > 0.02
    assert bootstrap.map_values() == bootstrap.map_values()


def test_bootstrap_needs_images_and_labels():
    few, unlabeled, perfect = ImageBootstrap(), ImageBootstrap(), ImageBootstrap()
    for _ in range(9):
        few(outcome([True], [0.9], [0], [0]))
    for _ in range(12):
        unlabeled(outcome([False], [0.9], [0], []))
        perfect(outcome([True], [0.9], [0], [0]))
    assert few.map_values() == unlabeled.map_values() == []
    assert perfect.map_values(5) == pytest.approx([0.995] * 5, abs=0.006)


def test_map_range_holds_seeds_and_bootstrap():
    results = [{"map": 0.4, "bootstrap": [0.3, 0.5]}, {"map": 0.5, "bootstrap": [0.4, 0.6]}]
    found = Accuracy((0, 1), tuple(results)).map_range()
    assert (found.middle, found.low, found.high) == pytest.approx((0.45, 0.355, 0.545))
    alone = Accuracy((0,), ({"map": 0.4, "bootstrap": []},))
    assert not alone.has_interval and alone.map_range().low == 0.4


def test_every_limit_counts():
    tight = Limits(latency_ms=1, parameters_m=1, gflops=1, memory_mb=1)
    found = excesses(point(2, 0.5, 3.0, gflops=4.0, memory_mb=5.0), tight)
    assert found == [
        ("latency 2 ms > 1", 2), ("parameters 3 M > 1", 3), ("operations 4 GFLOPs > 1", 4), ("memory 5 MB > 1", 5),
    ]  # fmt: skip
    assert excesses(point(1, 0.5, 1.0, gflops=1.0, memory_mb=1.0), tight) == []


# ---- keys and stored results ----------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "set/images" / split / "a.jpg"), np.zeros((20, 30, 3), np.uint8))
        (tmp_path / "set/labels" / split / "a.txt").write_text("0 .5 .5 .1 .1")
    path = tmp_path / "data.yaml"
    path.write_text("path: set\ntrain: images/train\nval: images/val\nnames: [one, two]\n")
    return path


def test_data_key_changes_with_images_labels_and_classes(dataset: Path):
    def key(*splits):
        return store.data_key(load_data_config(dataset), splits)

    first, validation = key("train", "val"), key("val")
    assert key("train", "val") == first
    label = dataset.parent / "set/labels/train/a.txt"
    label.write_text("1 .5 .5 .1 .1")
    os.utime(label, ns=(1, 1))
    assert key("train", "val") != first
    assert key("val") == validation  # the other split is unchanged
    os.utime(dataset.parent / "set/images/val/a.jpg", ns=(1, 1))
    assert key("val") != validation
    validation = key("val")
    dataset.write_text(dataset.read_text().replace("two", "three"))
    assert key("val") != validation


def test_data_key_includes_annotation_files(dataset: Path):
    file = dataset.parent / "set/val.json"
    content = {
        "images": [{"id": 1, "file_name": "images/val/a.jpg", "width": 30, "height": 20}],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}],
    }
    file.write_text(json.dumps(content))
    dataset.write_text(dataset.read_text().replace("val: images/val", "val: val.json"))
    before = store.data_key(load_data_config(dataset), ["val"])
    content["annotations"][0]["category_id"] = 2
    file.write_text(json.dumps(content))
    assert store.data_key(load_data_config(dataset), ["val"]) != before


def test_code_key_leaves_out_reporting():
    names = ["engine/compare", "engine/train"]
    assert store.code_key(names) == store.code_key(names)
    assert store.code_key(["engine/compare"]) != store.code_key(["engine/compare"], store.REPORTING)
    for name in store.REPORTING:
        assert (Path(store.__file__).parent / name).is_file(), name


@pytest.mark.parametrize(("a", "b"), [({"x": 1, "y": 2}, {"y": 2, "x": 1}), ((1, 2), [1, 2]), (b"x", b"x")])
def test_equal_values_have_equal_keys(a, b):
    assert store.digest(a) == store.digest(b)


@pytest.mark.parametrize(("a", "b"), [({"x": 1}, {"x": 1.5}), ([1, 2], [2, 1]), (b"x", b"y"), (1, "1"), (0, False)])
def test_other_values_have_other_keys(a, b):
    assert store.digest(a) != store.digest(b)


def test_results_are_found_again_unless_they_are_damaged_or_not_wanted(tmp_path: Path):
    kept = Store(tmp_path / "results")
    assert kept.find("speed", "abc") is None
    kept.save("speed", "abc", {"a": [1, None]}, "about")
    assert kept.find("speed", "abc") == {"a": [1, None]}
    assert kept.find("accuracy", "abc") is None
    assert Store(tmp_path / "results", fresh=True).find("speed", "abc") is None
    (tmp_path / "results/speed-abc.json").write_text('{"version": 1, "resu')
    assert kept.find("speed", "abc") is None


# ---- candidates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([["a", "x/a"], ["b", "x/b"]], ["a", "b"]),
        ([["a", "x/a"], ["a", "y/a"]], ["x/a", "y/a"]),
        ([["a", "p/a", "x/p/a"], ["a", "p/a", "y/p/a"], ["b"]], ["x/p/a", "y/p/a", "b"]),
        ([["a"], ["a"], ["a"]], ["a", "a (2)", "a (3)"]),
        ([["a"], ["a", "x/a"]], ["a", "x/a"]),
    ],
)
def test_labels_are_short_and_different(names, expected):
    assert unique_labels(names) == expected


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", "timm/deit_tiny_patch16_224", "RIFormer"])
def test_write_spec_adds_the_neck_of_yolov5n(name, tmp_path):
    path = write_spec(name, False, tmp_path)
    model = DetectionModel(path, nc=2)
    parts = {part.name: part.parameters for part in model.info(64).parts}
    assert model.stride.tolist() == [8, 16, 32]
    assert 600_000 < parts["neck"] < 800_000
    assert write_spec(name, False, tmp_path) == path
    assert write_spec(name, True, tmp_path) != path


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [("yolov5n.yaml", [[8, 64], [16, 128], [32, 256]]), ("yolov5-timm.yaml", [[8, 80], [16, 160], [32, 256]])],
)
def test_levels_that_the_neck_reads(cfg, expected):
    assert levels_read(DetectionModel(cfg)) == expected


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--cfg and --weights are empty", {}),
        ("did you mean 'onnx'", {"cfg": ["a"], "runtimes": ["onxx"]}),
        ("is repeated", {"cfg": ["a"], "seeds": [1, 1]}),
        ("--epochs: -1 is out of range", {"cfg": ["a"], "epochs": -1}),
        ("--head fre: unknown head; allowed: anchor, free; did you mean 'free'", {"cfg": ["a"], "head": ["fre"]}),
        ("--head: free free is repeated", {"cfg": ["a"], "head": ["free", "free"]}),
    ],
)
def test_check_refuses_invalid_options(words, options):
    with pytest.raises(ConfigError, match=words):
        CompareConfig(**options).check()


def test_command_words_hold_the_given_options():
    config = CompareConfig(cfg=["a b.yaml", "c"], epochs=3, seeds=[0, 1], fresh=True, max_latency_ms=40.0, cache="ram")
    words = "python compare.py --cfg|a b.yaml|c --epochs|3 --seeds|0|1 --max-latency-ms|40 --cache|ram --fresh"
    assert config.command_words("compare.py") == words.replace(" --", "|--").replace(
        "python compare.py", "python|compare.py"
    ).split("|")


def test_options_without_effect_are_named(dataset, tmp_path, caplog):
    data = load_data_config(dataset)
    options = {"data": str(dataset), "pretrained": True, "seeds": [0, 1]}
    caplog.set_level(logging.WARNING)
    resolve(CompareConfig(cfg=["yolov5n.yaml", "riformer_s12"], **options), data, tmp_path)
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "--pretrained has no effect on 'yolov5n.yaml': t", "--seeds has no effect: nothing is trained; add ",
    ]  # fmt: skip
    caplog.clear()
    resolve(CompareConfig(cfg=["riformer_s12"], epochs=1, **options), data, tmp_path)
    assert not caplog.records


def test_resolve_combines_every_cfg_with_every_head(dataset, tmp_path):
    data = load_data_config(dataset)
    options = {"cfg": ["yolov5n.yaml", "yolov5s.yaml"], "data": str(dataset)}
    found = resolve(CompareConfig(**options, head=["anchor", "free"]), data, tmp_path)
    assert [c.label for c in found] == ["yolov5n (anchor)", "yolov5n (free)", "yolov5s (anchor)", "yolov5s (free)"]
    assert [(c.backbone, c.head) for c in found[1:3]] == [("yolov5n", "free"), ("yolov5s", "anchor")]
    assert len({c.key for c in found}) == 4
    (plain,) = resolve(CompareConfig(cfg=["yolov5n.yaml"], data=str(dataset)), data, tmp_path)
    assert (plain.label, plain.backbone, plain.head) == ("yolov5n", "yolov5n", None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("SGD", 0.01, "SGD")),
        ({"optimizer": "AdamW"}, ("AdamW", 0.01, "AdamW")),
        ({"hyp": "hyp.auto.yaml", "epochs": 3}, ("AdamW", 0.002 * 5 / 6, "auto")),  # 2 classes
        ({"hyp": "hyp.auto.yaml", "optimizer": "SGD"}, ("SGD", 0.01, "SGD")),
    ],
)
def test_recipe_is_chosen_as_in_training(dataset, options, expected):
    optimizer, hyp = resolve_recipe(CompareConfig(cfg=["a"], **options), load_data_config(dataset))
    assert (optimizer, hyp.lr0, hyp.optimizer) == (expected[0], pytest.approx(expected[1], abs=1e-6), expected[2])
