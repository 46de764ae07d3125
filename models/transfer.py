"""Start a network from the weights of another one: rows are matched by what they are, not by number or by chance.

Copying whatever has an equal name and shape gives nonsense as soon as a YAML differs by a row: `model.7` is another
layer then, and a few of its tensors may happen to have the shape. Here two rows agree when section, module, arguments
and the shapes of *all* their weights agree, and their inputs correspond. The rows of both files are brought into line
in order (the alignment with the most weights), and the result is used if it makes sense as a whole:

- it covers at least half of the network: the same network with some rows changed; or
- its part that is connected to the picture row by row covers at least a tenth: another network with the same beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.spec import LayerSpec, ModelSpec, load_model_spec
from models.weights import LoadReport
from utils.errors import CheckpointError

if TYPE_CHECKING:
    from models.yolo import DetectionModel

SAME_NETWORK = 0.5
SAME_BEGINNING = 0.1
BACKBONE_SLOTS = 5  # a backbone row owns P1..P5
WEIGHT_ARGUMENTS = ("weights", "pretrained")


@dataclass(frozen=True)
class Row:
    """A row of a model YAML with the shapes of its weights; `inputs` are the rows that its `from` means."""

    layer: LayerSpec
    inputs: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def is_head(self) -> bool:
        return self.layer.module == "Detect"

    @property
    def arguments(self) -> Any:
        """Arguments that shapes do not tell: all but the width of a row with weights, and no request for weights."""
        args = self.layer.args
        if isinstance(args, Mapping):
            return {key: value for key, value in args.items() if key not in WEIGHT_ARGUMENTS}
        return () if self.is_head else tuple(args[1:] if self.shapes else args)


def transfer_rows(
    model: DetectionModel,
    spec: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    exclude: Sequence[str] = (),
    partial: bool = False,
    where: str = "weights",
) -> LoadReport:
    """Copy the weights of the rows of (`spec`, `state`) that agree with rows of `model` into it.

    Args:
        model: changed in place.
        spec, state: the other network as a mapping, and its state dict with keys `model.<row>.<name>`.
        exclude: entries whose key contains one of these texts keep their values.
        partial: use the alignment however little it covers.
        where: the file, for messages.

    Raises:
        CheckpointError: too little agrees (see above), unless `partial`.
    """
    own = model.state_dict()
    old, new = _rows(load_model_spec(spec), state), _rows(load_model_spec(model.yaml), own)
    pairs = _sensible(old, new, _aligned(old, new), partial, where)
    ready: dict[str, Tensor] = {}
    unexpected: list[tuple[str, str]] = []
    for key, value in state.items():
        row, name = _split(key)
        target = f"model.{pairs[row]}.{name}" if row in pairs else ""
        if target not in own:
            unexpected.append((key, "its row has no counterpart"))
        elif any(text in target for text in exclude):
            unexpected.append((key, "left out"))
        elif own[target].shape != value.shape:
            unexpected.append((key, f"{list(value.shape)} -> {list(own[target].shape)}"))
        else:
            ready[target] = value
    with torch.no_grad():
        for key, value in ready.items():
            own[key].copy_(value)
    return LoadReport(
        matched=tuple(key for key in own if key in ready),
        missing=tuple(key for key in own if key not in ready),
        unexpected=tuple(unexpected),
    )


def _split(key: str) -> tuple[int, str]:
    """`model.3.conv.weight` -> (3, `conv.weight`); row -1 for a key of another form."""
    head, _, rest = key.partition(".")
    number, _, name = rest.partition(".")
    return (int(number), name) if head == "model" and number.isdecimal() else (-1, key)


def _rows(spec: ModelSpec, state: Mapping[str, Tensor]) -> list[Row]:
    from models.backbones import is_backbone_name  # it imports the loader beside this module

    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in spec.layers]
    for key, value in state.items():
        row, name = _split(key)
        if 0 <= row < len(shapes):
            shapes[row][name] = tuple(value.shape)
    rows: list[Row] = []
    slots: list[int] = []  # the row that owns each slot
    for layer, own in zip(spec.layers, shapes, strict=True):
        rows.append(Row(layer, _inputs(layer, slots), own))
        slots += [layer.row] * (BACKBONE_SLOTS if is_backbone_name(layer.module) else 1)
    return rows


def _inputs(layer: LayerSpec, slots: Sequence[int]) -> tuple[int, ...]:
    """The row behind each number in `from`; -1 for the picture, and for a level by name the row before."""
    numbers = [source if isinstance(source, int) else -1 for source in layer.sources]
    places = [number + len(slots) if number < 0 else number for number in numbers]
    return tuple(slots[place] if 0 <= place < len(slots) else -1 for place in places)


def _agree(old: Row, new: Row) -> bool:
    """Whether two rows do the same to their inputs. Of a head only the widths of its inputs count, not the classes."""
    a, b = old.layer, new.layer
    if (a.section, a.module, len(a.sources)) != (b.section, b.module, len(b.sources)):
        return False
    if old.shapes.keys() != new.shapes.keys():
        return False
    if old.is_head:
        inputs = [key for key, shape in old.shapes.items() if len(shape) == 4]
        return all(old.shapes[key][1:] == new.shapes[key][1:] for key in inputs)
    return old.shapes == new.shapes and old.arguments == new.arguments


def _aligned(old: Sequence[Row], new: Sequence[Row]) -> dict[int, int]:
    """Pairs of agreeing rows, in order on both sides, with as many weights as possible; old row -> new row."""
    # best[i][j]: weight of the best alignment of old[i:] with new[j:]; a pair counts its tensors, and 1 for itself.
    best = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    gain = [[1 + len(a.shapes) if _agree(a, b) else 0 for b in new] for a in old]
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            together = gain[i][j] + best[i + 1][j + 1] if gain[i][j] else 0
            best[i][j] = max(together, best[i + 1][j], best[i][j + 1])
    pairs: dict[int, int] = {}
    i = j = 0
    while i < len(old) and j < len(new):
        if gain[i][j] and best[i][j] == gain[i][j] + best[i + 1][j + 1]:
            if _inputs_agree(old[i], new[j], pairs):
                pairs[i] = j
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _inputs_agree(old: Row, new: Row, pairs: Mapping[int, int]) -> bool:
    """Whether each input is written the same way, or comes from rows that were paired."""
    sources = zip(old.layer.sources, new.layer.sources, old.inputs, new.inputs, strict=True)
    return all(a == b or (row_a in pairs and pairs[row_a] == row_b) for a, b, row_a, row_b in sources)


def _sensible(
    old: Sequence[Row], new: Sequence[Row], pairs: dict[int, int], partial: bool, where: str
) -> dict[int, int]:
    """The pairs to use; CheckpointError when they are a coincidence."""
    total = sum(len(row.shapes) for row in new)

    def share(chosen: Mapping[int, int]) -> float:
        return sum(len(new[j].shapes) for j in chosen.values()) / max(total, 1)

    if partial or share(pairs) >= SAME_NETWORK:
        return pairs
    connected: dict[int, int] = {}
    for i, j in pairs.items():
        if (i, j) == (0, 0) or any(a in connected and connected[a] in new[j].inputs for a in old[i].inputs):
            connected[i] = j
    if share(connected) >= SAME_BEGINNING:
        return connected
    raise CheckpointError(
        f"{where}: is for another network: rows with {share(pairs):.0%} of this model's weights look alike, but they "
        "read other features; use a --cfg of the same architecture, or --partial-weights to take them all the same"
    )
