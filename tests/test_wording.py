"""Test that code and documentation use the field's terms (PyTorch, torchvision, timm) and American spelling."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    r"pictures?\b|pictured": "image, plot",
    r"data sets?\b": "dataset",
    r"broken (off|in the middle)": "interrupted, truncated",
    r"proofs?\b|proved\b": "verification, verified",
    r"(?<!maximum )suppressions?\b": "NMS",
    r"evolutions?\b": "hyperparameter search",
    r"told\b": "logged, reported",
    r"(which|is|are) said\b": "is logged, is reported",
    r"go(es)? on (with|as)": "continue, resume",
    r"mend(ed|s)?\b": "fix",
    r"at hand|can(not)? be had": "available",
    r"anew": "again, restart",
    r"whole numbers?": "integer",
    r"deployed forms?": "deploy mode, re-parameterized model",
    r"artefacts?": "exported model",
    r"(hold|keep|held|kept)s? still": "freeze",
    r"half-written|whole or not": "no partial files, atomically",
    r"by meaning": "matching layers",
    r"figures say": "metrics are not meaningful",
    r"last words|signs? of life|first to go": "last stderr line, heartbeat",
    r"part of the sides": "normalized",
    r"colou?red|colours?\b(?<!colors)(?<!color)": "color",
    r"(normal|optim|initial|synchron|parameter|serial)is(e|ed|er|ers|es|ing|ation)\b": "American spelling: -ize",
    r"behaviou?r(?<!behavior)s?\b": "behavior",
    r"neighbou?r(?<!neighbor)s?\b": "neighbor",
    r"\bcentres?\b": "center",
    r"\bgrey": "gray",
}
# Texts that quote a term: this table.
EXCEPTIONS = {"tests/test_wording.py"}


def violations(text: str) -> list[str]:
    """Return `line: word -> replacement` for each word that should not be used."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in WORDS.items():
            match = re.search(rf"(?<![.\w-])({pattern})", line, re.IGNORECASE)
            if match:
                found.append(f"{number}: '{match.group(0)}' -> {better}")
    return found


def documents() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.yaml"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split() if name not in EXCEPTIONS]


def test_sources_use_the_terms_of_the_field():
    names = documents()
    assert len(names) > 100
    bad = {name: found for name in names if (found := violations((ROOT / name).read_text(encoding="utf-8")))}
    assert bad == {}


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("the picture of a data set", 2),
        ("a whole number is needed", 1),
        ("the optimiser is initialised", 1),
        ("the centre is grey", 2),
        ("an image of the dataset; the optimizer initializes the center", 0),
        ("behavior and color of neighbors", 0),
        ("behaviour of the neighbour", 2),
    ],
)
def test_violations_are_counted(line, count):
    assert len(violations(line)) == count
