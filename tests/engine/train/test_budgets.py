"""Budgets of kernel launches and host waits, counted on the pretended CUDA device: the same on every machine."""

from __future__ import annotations

import pytest

from benchmarks.launches import count_training
from tests.helpers.pretend_cuda import pretend_cuda, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
# Estimated launches of a training step in float16; at most 0.75 of those before the budgets (1,526 to 2,577).
BUDGETS = {
    "yolov5n": 950,
    "yolov5s": 950,
    "yolov5-riformer-s": 1320,
    "yolov5-repmlp-s": 1717,
    "yolov5-revvit-s": 1932,
    "yolov5-nextvit-s": 1779,
}


SLOW = [name for name in BUDGETS if "-" in name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in BUDGETS])
def test_launches_and_waits_of_a_training_step(name) -> None:
    with pretend_cuda() as record:
        phases = count_training(name, record)
    total = phases["training step"]
    assert total["launches"] <= BUDGETS[name], phases
    assert total["waits"] <= 1, record.table()
    assert phases["EMA"]["ops"] == 2, "the tensors are listed once"
