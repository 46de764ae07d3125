"""List the backbones: levels, parameters, cost, published accuracy and weights.

    python -m models.backbones [NAME ...] [--imgsz 640]
    python -m models.backbones 'timm/*PATTERN*'
    python -m models.backbones --arguments NAME

NAME is a registered name or one of timm's (`timm/resnet50`), for which published weights are listed too. Without a
name, all registered backbones are listed. A pattern (`*`, `?`) lists the models of timm whose names match.
`--arguments` prints the arguments of a backbone: default, published names, meaning, and the values of each
architecture. No memory is allocated and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields

from utils.errors import SpecError, UserError, did_you_mean
from utils.log import aligned, fitted, run_command

HEADER = ("name", "levels (channels@stride)", "params (M)", "GFLOPs", "top-1 (%)", "weights")
SIZES_OF = 50  # searches with up to this many matches build the networks, to count their parameters


def describe(name: str, imgsz: int) -> tuple[str, ...]:
    """Return one line of the list.

    Args:
        name: see `create_backbone`.
        imgsz: side of the square image for the cost, in pixels; rounded up to the backbone's `size_divisor`.

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


def search(pattern: str) -> list[tuple[str, str, str]]:
    """List the models of timm whose names match.

    Args:
        pattern: a name with `*` and `?`, after `timm/` or without.

    Returns:
        Name; millions of parameters without classifier, `-` in long lists; tags of pretrained weights.

    Raises:
        SpecError: no name matches; the nearest one is suggested.
    """
    import torch

    from models.backbones.timm_measure import timm_package

    timm, wanted = timm_package(), pattern.removeprefix("timm/")
    names = timm.list_models(wanted)
    if not names:
        near = did_you_mean(f"timm/{wanted.strip('*?')}", (f"timm/{name}" for name in timm.list_models()))
        raise SpecError(f"'{pattern}': no model of timm {timm.__version__} has such a name{near}")
    rows = []
    for name in names:
        size = "-"
        if len(names) <= SIZES_OF:
            with torch.device("meta"):
                network = timm.create_model(name, num_classes=0)
            size = f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}"
        tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
        rows.append((f"timm/{name}", size, ", ".join(tags) or "-"))
    return rows


def weights_of(name: str) -> list[str]:
    """Return one line per published file of a backbone."""
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
    kinds = "registered names, timm/<name>, or patterns such as 'timm/*vit*'; default: all registered"
    parser.add_argument("names", nargs="*", metavar="NAME", help=kinds)
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
    lines: list[str] = []
    patterns = [name for name in options.names if set("*?") & set(name)]
    for pattern in patterns:
        found = search(pattern)
        lines += aligned([("name", "params (M)", "weights"), *found], left=(0, 2))
        lines.append(f"{len(found)} found; python -m models.backbones {found[0][0]} prints levels and cost of one")
    names = [name for name in options.names if name not in patterns]
    if names or not patterns:
        rows = [describe(name, options.imgsz) for name in names or list_backbones()]
        lines += aligned([HEADER, *rows], left=(0, 1, 5))
    lines += [line for name in names for line in weights_of(name)]
    print(fitted("\n".join(lines), sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
