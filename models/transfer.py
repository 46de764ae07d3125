"""Alignment of the rows of two networks, for the transfer of weights.

Copying every entry of equal name and shape gives nonsense as soon as a YAML differs by a row: `model.7` is another
layer then, and a few of its tensors may happen to have the same shape. Here two rows agree if module, arguments after
scaling, stride and the shapes of *all* their weights agree, and their inputs correspond. The rows of both networks are
aligned in order (the alignment with the most weights), and the result is used if it is plausible as a whole:

- it covers at least half of the network: the same network with some rows changed; or
- its part that is connected to the image row by row covers at least a tenth: another network with the same first rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.build.rows import Route
from models.yolo import DetectionModel
from utils.errors import CheckpointError

SAME_NETWORK = 0.5
SAME_BEGINNING = 0.1


@dataclass(frozen=True)
class _Row:
    """A row of a built network.

    Attributes:
        route: its position, and what it was built with.
        kind: name of its module in the YAML; of a backbone, which has several names, the class.
        inputs: the rows it reads, -1 is the image.
        shapes: shapes of its weights, by name within the row.
    """

    route: Route
    kind: str
    inputs: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def agrees(self, other: _Row) -> bool:
        """Return whether two rows compute the same; of a head only the inputs count, not classes and anchors."""
        a, b = self.route, other.route
        if (self.kind, a.layer.section, a.levels) != (other.kind, b.layer.section, b.levels):
            return False
        if len(self.inputs) != len(other.inputs) or self.shapes.keys() != other.shapes.keys():
            return False
        if not a.levels:  # the head; its last argument is the channels of its inputs
            return bool(a.arguments[-1] == b.arguments[-1])
        # A backbone's arguments may be a request for weights, or the default spelled out; its shapes identify it.
        return self.shapes == other.shapes and (a.gives_levels or a.arguments == b.arguments)


def matching_rows(old_model: DetectionModel, new_model: DetectionModel, where: str, partial: bool) -> dict[int, int]:
    """Return which rows of `new_model` can start from which rows of `old_model`.

    Args:
        old_model: network that was trained; only its structure is used, so it may be on the meta device.
        new_model: network to start.
        where: name of the file, for messages.
        partial: use the alignment however little it covers.

    Returns:
        Old row -> new row.

    Raises:
        CheckpointError: too little agrees (see above), unless `partial`.
    """
    old, new = _rows(old_model), _rows(new_model)
    pairs = _aligned(old, new)
    total = sum(len(row.shapes) for row in new)

    def share(chosen: Mapping[int, int]) -> float:
        return sum(len(new[j].shapes) for j in chosen.values()) / max(total, 1)

    if partial or share(pairs) >= SAME_NETWORK:
        return pairs
    connected: dict[int, int] = {}
    for i, j in pairs.items():
        reads_image = -1 in old[i].inputs and -1 in new[j].inputs
        if reads_image or any(a in connected and connected[a] in new[j].inputs for a in old[i].inputs):
            connected[i] = j
    if share(connected) >= SAME_BEGINNING:
        return connected
    raise CheckpointError(
        f"{where}: is for another network: rows with {share(pairs):.0%} of this model's weights look alike, but they "
        "read other features; use a --cfg of the same architecture, or --partial-weights to take them anyway"
    )


def split_key(key: str) -> tuple[int, str]:
    """Return (3, `conv.weight`) for `model.3.conv.weight`; row -1 for a key of another form."""
    head, _, rest = key.partition(".")
    number, _, name = rest.partition(".")
    return (int(number), name) if head == "model" and number.isdecimal() else (-1, key)


def _rows(model: DetectionModel) -> list[_Row]:
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in model.model.routes]
    for key, value in model.state_dict().items():
        row, name = split_key(key)
        shapes[row][name] = tuple(value.shape)
    owner = {slot: route.layer.row for route in model.model.routes for slot in route.outputs}
    rows = []
    for module, route, own in zip(model.model, model.model.routes, shapes, strict=True):
        kind = type(module).__qualname__ if route.gives_levels else route.layer.module
        rows.append(_Row(route, kind, tuple(owner.get(slot, -1) for slot in route.sources), own))
    return rows


def _aligned(old: Sequence[_Row], new: Sequence[_Row]) -> dict[int, int]:
    """Return pairs of agreeing rows (old -> new), in order on both sides, with as many weights as possible."""
    # best[i][j]: weight of the best alignment of old[i:] with new[j:]; a pair counts its tensors plus 1.
    best = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    gain = [[1 + len(a.shapes) if a.agrees(b) else 0 for b in new] for a in old]
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


def _inputs_agree(old: _Row, new: _Row, pairs: Mapping[int, int]) -> bool:
    """Return whether each input is written the same way, or comes from rows that were paired."""
    sources = zip(old.route.layer.sources, new.route.layer.sources, old.inputs, new.inputs, strict=True)
    return all(a == b or (row_a in pairs and pairs[row_a] == row_b) for a, b, row_a, row_b in sources)
