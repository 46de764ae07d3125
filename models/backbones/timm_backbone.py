"""Any network of timm (https://github.com/huggingface/pytorch-image-models, Apache-2.0) as a backbone.

Its maps are keyed by measured stride (`timm_measure.py`), and the sizes it takes are measured too:

- as it is, or with `dynamic_img_size`, or with `strict_img_size=False` (Swin; windows and shifts are then worked out
  for the given size): sides are multiples of 32;
- networks that take multiples of their native size only (MaxViT): `size_divisor` is that size, the caller pads;
- networks that take their native size only (MLP-Mixer): the padded image is cut into tiles of that size, each tile
  is processed separately, and the maps are joined again. `model_args: {img_size: 640}` makes the image one tile;
- strides 7, 14, 28 (patch size 14): the image is shrunk by 7/8 first, which makes them 8, 16, 32 of the input.

Parameters that no map depends on (the tail that some of timm's extractors keep) are frozen.

A network whose maps all have one stride (a plain vision transformer) gives its last map to a simple feature pyramid.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import SimpleFeaturePyramid, require
from models.backbones.timm_measure import create_features, measure, timm_package, unused_parameters
from utils.errors import CheckpointError
from utils.log import is_main_process

LEVEL_STRIDES = (2, 4, 8, 16, 32)  # P1 ... P5
DETECTION_STRIDES = (8, 16, 32)
CRASH_IN_CHANNELS_LAST = ("fastvit",)
"""Names, by their beginning, of networks whose training in channels_last crashes on a CPU (oneDNN, PyTorch 2.14)."""


def _between_levels(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.SiLU())


def _check_reachable(hub_id: str | None) -> None:
    """Raise OSError at once if weights are neither cached nor reachable (the hub's client would retry for a minute)."""
    if not hub_id:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    cached = (try_to_load_from_cache(hub_id, file) for file in ("model.safetensors", "pytorch_model.bin"))
    if constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in cached):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # reachable
    except urllib.error.URLError as error:
        raise OSError(f"{constants.ENDPOINT}: {error.reason}") from error


class TimmBackbone(Backbone):
    """A network of timm, its maps keyed by measured stride.

    Args:
        name: timm's name, with or without a tag.
        pretrained: fetch timm's weights (a model that is rebuilt from a checkpoint asks for none). Only rank zero does:
            data-parallel training sends its values to the others.
        extra_levels: add those of `strides` (8, 16, 32 where none are given) that the network lacks, coarser ones by
            strided, finer ones by transposed convolutions from the nearest map.
        strides: of the maps to return; by default all from 2 to 32 that the network has, 8, 16 and 32 of a pyramid.
        widths: channels of the maps of a plain vision transformer's pyramid, one for each stride, or one for all.
        drop_path_rate: stochastic depth, if the network supports it.
        model_args: further arguments of timm's constructor, e.g. `{img_size: 640}`.
        frozen_stages: see `Backbone`; each map that timm can return ends a stage (in a plain transformer, each block).
        norm_eval, normalize: see `Backbone`.
        mean, std: per channel; by default those of timm's pretrained configuration.

    Raises:
        SpecError: unknown name or argument, or no usable feature maps.
        CheckpointError: pretrained weights that cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        extra_levels: bool = False,
        strides: Sequence[int] | None = None,
        widths: int | Sequence[int] = (128, 256, 512),
        drop_path_rate: float = 0.0,
        model_args: Mapping[str, Any] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        normalize: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        name = name.removeprefix("timm/")
        arguments = dict(model_args or {})
        if drop_path_rate:
            require(0 <= drop_path_rate < 1, f"timm/{name}: drop_path_rate is {drop_path_rate}; allowed: 0 to 1")
            arguments["drop_path_rate"] = drop_path_rate
        measured = measure(name, arguments)
        config = timm_package().models.get_pretrained_cfg(name)
        super().__init__(
            normalize,
            mean or (config.mean if config is not None else IMAGENET_MEAN),
            std or (config.std if config is not None else IMAGENET_STD),
        )
        self.name, self.measured = name, measured
        self.channels_last = not name.startswith(CRASH_IN_CHANNELS_LAST)
        self.size_divisor = max(measured.size_divisor, LEVEL_STRIDES[-1])
        is_plain = len(measured.strides) > 1 and len(set(measured.strides)) == 1
        at = {stride: i for i, stride in enumerate(measured.strides) if is_plain or stride in LEVEL_STRIDES}
        taken = sorted(at.items() if is_plain else self._wanted(at, strides, extra_levels))
        self.taken = tuple(stride for stride, _ in taken)
        arguments |= {**dict(measured.arguments), "out_indices": [measured.indices[i] for _, i in taken]}
        self.network = self._build(arguments, pretrained)
        for key in unused_parameters(name, arguments, measured):
            self.network.get_parameter(key).requires_grad_(False)
        own = [FeatureLevel(measured.channels[i], stride) for stride, i in taken]
        self.pyramid: SimpleFeaturePyramid | None = None
        self.finer, self.coarser = nn.ModuleList(), nn.ModuleList()
        if is_plain:
            wanted = DETECTION_STRIDES if strides is None else strides
            self.pyramid = SimpleFeaturePyramid(own[0].channels, own[0].stride, wanted, widths)
            own = [FeatureLevel(w, s) for w, s in zip(self.pyramid.widths, self.pyramid.strides)]
        elif extra_levels:
            own = self._add_levels(own, DETECTION_STRIDES if strides is None else strides)
        self.levels = tuple(own)
        self._depth_of = _depths(self)
        self._stage_of = _stages(self.network)
        self.hold(frozen_stages, norm_eval)

    def _build(self, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
        if not pretrained or not is_main_process():
            return create_features(self.name, arguments)
        config = timm_package().models.get_pretrained_cfg(self.name)
        if config is None or not config.has_weights:
            raise CheckpointError(f"timm/{self.name}: timm has no pretrained weights for it; give False, or a path")
        try:
            _check_reachable(config.hf_hub_id)
            return create_features(self.name, {**arguments, "pretrained": True})
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
            raise CheckpointError(
                f"timm/{self.name}: pretrained weights not available ({reason}); without a network fetch "
                f"{url if config.hf_hub_id else config.url} elsewhere and give it by --backbone-weights <path> or as "
                "{weights: <path>} instead of [pretrained]; [] = random weights"
            ) from error

    def _wanted(self, at: dict[int, int], strides: Sequence[int] | None, extra: bool) -> list[tuple[int, int]]:
        """Return (stride, position) of the network's maps to use."""
        have = f"timm/{self.name}: its maps have strides {list(self.measured.strides)}"
        require(bool(at), f"{have}; 2 to 32 are supported")
        if strides is None:
            return list(at.items())
        wrong = [s for s in strides if s not in LEVEL_STRIDES]
        require(bool(strides) and not wrong, f"timm/{self.name}: strides are {list(strides)}; allowed: {LEVEL_STRIDES}")
        between = [s for s in strides if s not in at and (not extra or min(at) < s < max(at))]
        require(not between, f"{have}, none of {between}; extra_levels: true makes finer and coarser ones")
        # extra levels start at the finest or coarsest map of the network
        sources = {min(at)} if min(strides) < min(at) else set()
        sources |= {max(at)} if max(strides) > max(at) else set()
        return [(s, i) for s, i in at.items() if s in strides or s in sources]

    def _add_levels(self, own: list[FeatureLevel], wanted: Sequence[int]) -> list[FeatureLevel]:
        """Append the requested finer and coarser levels, each computed from the nearest available map."""
        levels = list(own)
        while levels[0].stride > min(wanted):
            first = levels[0]
            level = FeatureLevel(max(first.channels // 2, 16), first.stride // 2)
            up = nn.ConvTranspose2d(first.channels, level.channels, 2, stride=2, bias=False)
            self.finer.append(_between_levels(up, level.channels))
            levels.insert(0, level)
        while levels[-1].stride < max(wanted):
            last = levels[-1]
            level = FeatureLevel(last.channels, last.stride * 2)
            down = nn.Conv2d(last.channels, level.channels, 3, stride=2, padding=1, bias=False)
            self.coarser.append(_between_levels(down, level.channels))
            levels.append(level)
        return levels

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), H and W multiples of `size_divisor` -> one (B, channels, H / stride, W / stride) per level."""
        maps = list(self.forward_features(self.normalized(image)))
        if self.pyramid is not None:
            return self.pyramid(maps[-1])
        for layer in self.finer:
            maps.insert(0, layer(maps[0]))
        for layer in self.coarser:
            maps.append(layer(maps[-1]))
        return tuple(maps)

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return timm's maps of a normalized image as (B, C, H / stride, W / stride), high resolution first."""
        height, width = image.shape[2:]
        x = image
        if self.measured.shrink != 1.0:
            size = (int(height * self.measured.shrink), int(width * self.measured.shrink))
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        maps = self._in_tiles(x) if self.measured.tile else self._maps(x)
        return tuple(_fitted(m, height // s, width // s) for m, s in zip(maps, self.taken))

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = self.network(x)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.measured.channels_last else list(maps)

    def _in_tiles(self, x: Tensor) -> list[Tensor]:
        """Process every tile separately; the tiles of one image are adjacent in the batch."""
        tile = int(self.measured.tile * self.measured.shrink)
        batch, _, height, width = x.shape
        rows, columns = height // tile, width // tile
        tiles = x.unflatten(3, (columns, tile)).unflatten(2, (rows, tile))  # (B, 3, rows, tile, columns, tile)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B rows columns, 3, tile, tile)
        out = []
        for m in self._maps(tiles):
            m = m.unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, h, columns, w)
            out.append(m.flatten(4, 5).flatten(2, 3))
        return out

    def reparameterize(self) -> None:
        """Fuse what timm can fuse (RepVGG, MobileOne, FastViT, RepViT blocks ...), in place."""
        from timm.utils.model import reparameterize_model

        like = torch.empty_like(next(self.network.parameters()))
        usual = torch.get_default_dtype()
        # timm creates the fused layers in the default dtype: in float64 the rounding at the end is the only error.
        torch.set_default_dtype(torch.float64)
        try:
            reparameterize_model(self.network.double(), inplace=True)
        finally:
            torch.set_default_dtype(usual)
        self.network.to(like).train(self.training)

    def param_depth(self, name: str) -> int:
        """Return the depth: blocks are counted in the order in which the network lists them; added layers come last."""
        return self._depth_of.get(_block(name), max(self._depth_of.values()))

    @property
    def num_stages(self) -> int:
        """Number of modules of the network after which timm can return a map, if they are built."""
        return max(self._stage_of.values(), default=0)

    def stage_of(self, name: str) -> int:
        """Return 0 before the first of those modules, n in and before the n-th one, `num_stages` + 1 after them."""
        return self._stage_of.get(name, self.num_stages + 1)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return timm's own state dict under the keys of this module, without what a feature extractor leaves out."""
        own = {_spelling(key.removeprefix("network.")): key for key in self.state_dict() if key.startswith("network.")}
        parts = {key.split(".")[0] for key in own}
        converted = {}
        for key, value in state.items():
            spelled = _spelling(key.removeprefix("module."))
            if spelled in own:
                converted[own[spelled]] = value
            elif spelled.split(".")[0] in parts:
                converted[key] = value  # unused; the report lists it
        return converted

    @property
    def NEW_KEYS(self) -> tuple[str, ...]:  # noqa: N802 (a class attribute elsewhere)
        """Keys that no timm file contains."""
        return ("pyramid.*", "finer.*", "coarser.*")


def _spelling(key: str) -> str:
    """Return one key for `stages.0.x`, `stages_0.x` (a flattened extractor) and `model.stages.0.x` (a wrapped one)."""
    return key.removeprefix("model.").replace("_", ".")


def _block(name: str) -> str:
    """Cut a name after its second number: `network.stages_1.blocks.2.conv.weight` -> `network.stages.1.blocks.2`."""
    parts = re.split(r"[._]", name)
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if name.startswith(("pyramid.", "finer.", "coarser.")) or not numbers:
        return parts[0] if not name.startswith("network.") else ".".join(parts[: max(2, len(parts) - 1)])
    end = numbers[1] if len(numbers) > 1 else numbers[0]
    return ".".join(parts[: end + 1])


def _depths(backbone: nn.Module) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name, _ in backbone.named_parameters():
        depths.setdefault(_block(name), len(depths))
    return depths


def _stages(network: nn.Module) -> dict[str, int]:
    """Return the stage of each parameter of a feature extractor, from the modules whose results timm can return.

    Everything up to a map finer than stride 4 is the stem (0), or else everything before the first map's module.
    """
    names: list[str] = []
    begin = {}
    for path, module in network.named_modules():
        begin[_spelling(path)] = len(names)
        names += [f"{path}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
    spelled = [_spelling(name) for name in names]
    entries = [(e["module"].replace("_", "."), e["reduction"]) for e in network.feature_info.info]  # type: ignore
    ends = {}
    for path, stride in entries:
        inside = [i for i, name in enumerate(spelled) if name.startswith(path + ".")]
        if path in begin:
            ends[inside[-1] + 1 if inside else begin[path]] = stride
    first = min((begin[path] for path, _ in entries if path in begin), default=0)
    stem = max((end for end, stride in ends.items() if stride < 4), default=first if first else 0)
    rising = sorted(end for end in ends if end > stem)
    return {f"network.{name}": 0 if i < stem else 1 + sum(end <= i for end in rising) for i, name in enumerate(names)}


def _fitted(x: Tensor, height: int, width: int) -> Tensor:
    """Resample a map to (height, width) where unpadded convolutions or the 7/8 image made it smaller."""
    if x.shape[2] == height and x.shape[3] == width:
        return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
