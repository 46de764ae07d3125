"""List the backbones: levels, parameters, cost, published accuracy and weights.

    python -m models.backbones [NAME ...] [--imgsz 640]
    python -m models.backbones --arguments NAME

NAME is a registered name or one of timm's (`timm/resnet50`), for which published weights are listed too. Without a
name, all registered backbones are listed. `--arguments` prints the arguments of a backbone: default, published names,
meaning, and the values of each architecture. No memory is allocated and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields

from utils.errors import UserError
from utils.log import aligned, run_command

HEADER = ("name", "levels (channels@stride)", "params (M)", "GFLOPs", "top-1 (%)", "weights")


def describe(name: str, imgsz: int) -> tuple[str, ...]:
    """One line of the list.

    Args:
        name: see `create_backbone`.
        imgsz: side of the square image that the cost is for, in pixels; rounded up to the backbone's `size_divisor`.

    Returns:
        Name; levels; millions of parameters; 10^9 floating-point operations (a multiply-add is two) of one image; the
        published ImageNet-1k accuracy of the default weights with their resolution; their name, and how many more
        there are.

    Raises:
        SpecError: unknown name.
    """
    import torch

    from models.backbones import create_backbone
    from models.backbones.published import published_for
    from models.summary import count_flops

    with torch.device("meta"):
        backbone = create_backbone(name).eval()
    side = -(-imgsz // backbone.size_divisor) * backbone.size_divisor
    weights = published_for(name)
    best = f"{weights[0].top1:.2f} @{weights[0].resolution}" if weights else "-"
    return (
        name,
        " ".join(f"{level.channels}@{level.stride}" for level in backbone.levels),
        f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.2f}",
        f"{count_flops(backbone, (1, 3, side, side)) / 1e9:.1f}",
        best,
        weights[0].name + (f" (+{len(weights) - 1})" if len(weights) > 1 else "") if weights else "-",
    )


def weights_of(name: str) -> list[str]:
    """One line per published file of a backbone."""
    from models.backbones.published import published_for

    return [f"  {w.name}: top-1 {w.top1:.2f} @{w.resolution}, layout {w.layout}, {w.url}" for w in published_for(name)]


def argument_table(name: str) -> list[tuple[str, str, str]]:
    """Return name, default and meaning of every argument of a backbone.

    Published names that are translated follow their argument; those that are refused come last, with the reason.

    Raises:
        SpecError: unknown name.
    """
    from models.backbones import backbone_class, named_arguments

    cls, named = backbone_class(name), named_arguments(name)
    meanings = _meanings(inspect.getdoc(cls) or "") | {
        "normalize": "subtract mean and divide by std", "mean": "mean of each channel", "std": "standard deviation",
        "frozen_stages": "freeze the stem (0) or the stem and the first n stages",
        "norm_eval": "keep norms in eval mode",
    }  # fmt: skip
    rows = [("weights", "None", "path, URL or published name; true for the default published weights")]
    for parameter in inspect.signature(cls).parameters.values():
        published = [key for key, own in cls.ALIASES.items() if own == parameter.name]
        title = parameter.name + (f" (published: {', '.join(published)})" if published else "")
        default = "" if parameter.default is inspect.Parameter.empty else str(parameter.default)
        default = str(named.get(parameter.name, default))
        rows.append((title, default, meanings.get(parameter.name, "")))
    return rows + [(key, "refused", reason) for key, reason in cls.REFUSED.items()]


def architecture_lines(name: str) -> list[str]:
    """Return one line per architecture of a backbone's class, with its values; aliases share a line."""
    from models.backbones import backbone_class

    known = getattr(sys.modules[backbone_class(name).__module__], "ARCHITECTURES", {})
    names: dict[object, list[str]] = {}
    for key, value in known.items():
        names.setdefault(value, []).append(key)
    lines = []
    for value, keys in names.items():
        values = ", ".join(f"{f.name} {getattr(value, f.name)}" for f in fields(value))  # type: ignore[arg-type]
        lines.append(f"  {', '.join(keys)}: {values}")
    return lines


def _meanings(doc: str) -> dict[str, str]:
    """Return the text of each argument in the section `Args:` of a docstring; one entry may name several arguments."""
    section = doc.partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + section):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            found[name] = " ".join(text.split())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the list of backbones and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.backbones", description="List the backbones.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="registered names or timm/<name>; default: all registered"
    )
    parser.add_argument("--arguments", metavar="NAME", help="print the arguments of one backbone")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the image for the cost, in pixels")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an internal error")
    options = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: _print(options), options.debug)


def _print(options: argparse.Namespace) -> None:
    from models.backbones import list_backbones

    if options.arguments:
        for title, default, text in argument_table(options.arguments):
            print(f"{title} = {default}\n    {text}")
        print("\n".join(["architectures:", *architecture_lines(options.arguments)]))
        return
    if options.imgsz < 32:
        raise UserError(f"--imgsz {options.imgsz}: allowed are integers from 32 on")
    rows = [describe(name, options.imgsz) for name in options.names or list_backbones()]
    print("\n".join(aligned([HEADER, *rows], left=(0, 1, 5))))
    for name in options.names:
        print("\n".join(weights_of(name)))


if __name__ == "__main__":
    sys.exit(main())
