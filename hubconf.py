"""Models for `torch.hub`: `model = torch.hub.load('path/to/this/folder', 'custom', path='best.pt', source='local')`.

`custom` opens a model file; the other functions build a network from the YAML of that name. Nothing is downloaded. The
project is imported only when a model is requested. See docs/python.md.
"""

from __future__ import annotations

import sys as _sys
import typing as _typing
from pathlib import Path as _Path

if _typing.TYPE_CHECKING:
    from collections.abc import Callable as _Callable

    from engine.hub.model import Device as _Device
    from engine.hub.model import HubModel as _HubModel
    from engine.hub.model import Weights as _Weights
    from models.yolo import DetectionModel as _DetectionModel

dependencies = ["torch", "torchvision", "cv2", "numpy", "PIL", "yaml", "tqdm", "matplotlib"]


def _check_modules() -> None:
    """Raise an ImportError if the caller has imported its own modules under the names of this project's folders."""
    root = _Path(__file__).resolve().parent
    for name in ("utils", "data", "models", "engine"):
        module = _sys.modules.get(name)
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "an unknown place")
        if module is not None and not _Path(place).resolve().is_relative_to(root):
            raise ImportError(
                f"module '{name}' is already imported from {place}, so that of {root} cannot be; move yours into a "
                f"package (mypackage/{name}.py), rename it, or load the model in a process of its own"
            )


def custom(
    path: _Weights = "path/to/model.pt", autoshape: bool = True, _verbose: bool = True, device: _Device = None
) -> _HubModel | _DetectionModel:
    """Open a model file: a checkpoint (ours or official), a list of them (ensemble), .onnx, .torchscript, ...

    Arguments:
        path: the file.
        autoshape: return a model that takes images and returns results; False = the network, for training.
        device: 'cpu', 0, 'cuda:0', a torch.device; None = the first GPU, else the CPU.
    """
    _check_modules()
    from engine.hub.model import load

    return load(path, autoshape, device)


def _entry(name: str, cfg: str) -> _Callable[..., _HubModel | _DetectionModel]:
    """Return the function that builds the network of a YAML."""

    def build(
        pretrained: bool = False,
        channels: int = 3,
        classes: int | None = None,
        autoshape: bool = True,
        _verbose: bool = True,
        device: _Device = None,
        path: str | _Path | None = None,
    ) -> _HubModel | _DetectionModel:
        _check_modules()
        from engine.hub.model import create
        from utils.errors import ConfigError

        if pretrained:
            raise ConfigError(
                f"{name}: pretrained=True: nothing is downloaded here; fetch {name}.pt yourself and give it: "
                f"torch.hub.load(..., 'custom', path='{name}.pt', source='local')"
            )
        return create(
            cfg,
            path=path,
            channels=channels,
            classes=classes,
            autoshape=autoshape,
            verbose=_verbose,
            device=device,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""The network of {cfg}, with random weights unless `path` names a checkpoint.

    Arguments:
        pretrained: not possible, since nothing is downloaded; give `path`.
        channels: input channels; values other than 3 need autoshape=False.
        classes: number of classes; None = the checkpoint's, or the YAML's.
        autoshape: return a model that takes images and returns results; False = the network, for training.
        device: 'cpu', 0, 'cuda:0', a torch.device; None = the first GPU, else the CPU.
        path: checkpoint to copy the weights of matching layers from.
    """
    return build


_models = _Path(__file__).resolve().parent / "models"
for _path in (*_models.glob("yolov5*.yaml"), *_models.glob("hub/yolov5[nsmlx]6.yaml")):
    _name = _path.stem.replace("-", "_")
    globals()[_name] = _entry(_name, _path.name)
