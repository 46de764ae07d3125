"""Weights of classes in the loss."""

from __future__ import annotations

import numpy as np
import pytest

from data.loading.weights import balanced_class_weights, class_loss_weights, labels_to_class_weights
from utils.errors import ConfigError

NAMES = {0: "red", 1: "white", 2: "platelet", 3: "none of these"}
# 12 red, 3 white, 1 platelet, none of the last class
LABELS = [np.array([[c, 0.5, 0.5, 0.1, 0.1]] * n, np.float32).reshape(-1, 5) for c, n in ((0, 12), (1, 3), (2, 1))]
LABELS.append(np.zeros((0, 5), np.float32))


def test_balanced_weights() -> None:
    weights = balanced_class_weights(LABELS, 4)
    # 16 labels of 3 classes: 16 / (3 * count); 1 for a class without labels
    np.testing.assert_allclose(weights, [16 / 36, 16 / 9, 16 / 3, 1.0])
    counts = np.array([12, 3, 1, 0])
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    usual = labels_to_class_weights(LABELS, 4)
    np.testing.assert_allclose(weights[:3] / weights[0], usual[:3] / usual[0])


def test_balanced_weights_without_labels() -> None:
    assert balanced_class_weights([np.zeros((0, 5), np.float32)], 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "weights"),
    [
        (None, None),
        ("balanced", (16 / 36, 16 / 9, 16 / 3, 1.0)),
        ([1, 2, 0, 0.5], (1.0, 2.0, 0.0, 0.5)),
        ({"platelet": 3}, (1.0, 1.0, 3.0, 1.0)),
        ({1: 0.5, "none of these": 0}, (1.0, 0.5, 1.0, 0.0)),
        ({}, (1.0, 1.0, 1.0, 1.0)),
    ],
)
def test_class_loss_weights_of_every_form(wanted, weights) -> None:
    found = class_loss_weights(wanted, NAMES, LABELS, "hyp.yaml")
    assert found is None if weights is None else found == pytest.approx(weights)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            [1, 2],
            "hyp.yaml: class_weights: 2 numbers; the dataset has 4 classes ('red', 'white', 'platelet', "
            "'none of these')",
        ),
        (
            {"platelets": 2},
            "hyp.yaml: class_weights: no class 'platelets'; there are 'red', 'white', 'platelet', 'none of these'; "
            "did you mean 'platelet'?",
        ),
        ({"4": 2}, "hyp.yaml: class_weights: no class '4'; there are 'red', 'white', 'platelet', 'none of these'"),
    ],
)
def test_class_loss_weights_refuses_mistakes(wanted, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        class_loss_weights(wanted, NAMES, LABELS, "hyp.yaml")
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"02146": 2.0}, (2.0, 1.0, 1.0)),
        ({"no": 2.0}, (1.0, 2.0, 1.0)),
        ({"2": 2.0}, (1.0, 1.0, 2.0)),
        ({1: 3}, (1.0, 3.0, 1.0)),
    ],
)
def test_class_weights_name_classes_as_strings(weights: dict[str | int, float], expected: tuple[float, ...]) -> None:
    names = {0: "02146", 1: "no", 2: "2.10"}
    assert class_loss_weights(weights, names, [], "hyp.yaml") == expected
