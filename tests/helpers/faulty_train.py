"""train.py with a fault: `FAULT=kind:rank:epoch:batch` selects the fault, the process and the time.

Batch -1 is the first validation.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from engine.cli.config import TrainConfig
from engine.cli.parser import run_main
from engine.train.step import TrainStep


def work(config: TrainConfig) -> None:
    """Train, with the fault built in."""
    from engine.evaluate import evaluator
    from engine.train.trainer import train

    kind, *numbers = os.environ.get("FAULT", "none:0:0:0").split(":")
    rank, epoch, number = map(int, numbers)
    original, suppress = TrainStep.backward, evaluator._suppress

    def backward(self: TrainStep, images: Any, targets: Any, at: tuple[int, int], **options: Any) -> Any:
        if at == (epoch, number) and int(os.environ["RANK"]) == rank:
            fail(kind)
        return original(self, images, targets, at, **options)

    def at_validation(*arguments: Any) -> Any:
        evaluator._suppress = suppress  # once
        fail(kind)
        return suppress(*arguments)

    if number < 0 and int(os.environ["RANK"]) == rank:
        evaluator._suppress = at_validation
    TrainStep.backward = backward  # type: ignore[method-assign]
    train(config)


def fail(kind: str) -> None:
    """Trigger the fault."""
    if kind == "raise":
        raise KeyError("a fault")
    if kind == "exit":
        os._exit(7)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "term":  # the agent, which passes it on to all
        os.kill(os.getppid(), signal.SIGTERM)
    if kind == "int":
        os.kill(os.getppid(), signal.SIGINT)
    if kind == "term-one":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run_main(TrainConfig, "train.py", "Train.", work))
