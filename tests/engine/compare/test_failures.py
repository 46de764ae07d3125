"""Classification of failures of candidates."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from engine.compare.measure.detector import kept_for_backward, training_batch
from engine.compare.worker.jobs import objects_by_area
from engine.compare.worker.process import CRASH, MEMORY, MISTAKE, OTHER, UNSUPPORTED, classify, exit_reason
from utils.errors import SpecError

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2000000 bytes. Error code 12"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (SpecError("a.yaml:3: no\nb"), MISTAKE, "a.yaml:3: no; b"),
        (MemoryError(), MEMORY, "out of memory"),
        (
            RuntimeError(f"[enforce fail at alloc_cpu.cpp:1] err == 0. {NO_MEMORY}"),
            MEMORY, "out of memory (asked for 2 MB more)",
        ),
        (
            SpecError(f"x.yaml:9: row 2: [enforce fail] {NO_MEMORY}"),
            MEMORY, "out of memory (x.yaml:9: row 2; asked for 2 MB more)",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), MEMORY, "out of memory (CUDA out of memory. Tried)"),
        (NotImplementedError("no fft\nmore"), UNSUPPORTED, "unsupported operator (no fft)"),
        (KeyError("x"), OTHER, "KeyError: 'x'"),
    ],
)  # fmt: skip
def test_classify_returns_one_line(error, kind, words):
    assert classify(error) == (kind, words)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [(-signal.SIGKILL, MEMORY, "SIGKILL"), (-signal.SIGSEGV, CRASH, "SIGSEGV"), (1, CRASH, "status 1")],
)
def test_exit_reason(status, kind, words):
    found = exit_reason(status)
    assert found[0] == kind and words in found[1]


def test_bytes_kept_for_backward():
    linear = torch.nn.Linear(10, 20, bias=False)
    x = torch.rand(5, 10)
    assert kept_for_backward(lambda: linear(x).sum(), linear) == 5 * 10 * 4  # the input, for the weight's gradient
    # relu keeps its output, of 5 x 20; once, although two operations use it
    assert kept_for_backward(lambda: linear(x).relu().square().sum(), linear) == 5 * 10 * 4 + 5 * 20 * 4


def test_labels_follow_the_images_into_the_square():
    wide = np.zeros((50, 100, 3), np.uint8)
    sample = [(wide, np.array([[1, 0.5, 0.5, 0.2, 1.0]], np.float32))]
    images, targets = training_batch(sample, 2, 64)
    assert images.shape == (2, 3, 64, 64)
    expected = [[0, 1, 0.5, 0.5, 0.2, 0.5], [1, 1, 0.5, 0.5, 0.2, 0.5]]  # half the height of the square, centered
    torch.testing.assert_close(targets, torch.tensor(expected), rtol=0, atol=1e-6)


def test_objects_by_area():
    class Record:
        height, width = 100, 200
        labels = np.array([[0, 0.5, 0.5, 0.1, 0.2], [0, 0.5, 0.5, 0.2, 0.5], [0, 0.5, 0.5, 0.8, 0.9]])

    assert objects_by_area([Record, Record]) == {"small": 2, "medium": 2, "large": 2}
