"""Models for `torch.hub`: `model = torch.hub.load('path/to/this/folder', 'custom', path='best.pt', source='local')`.

`custom` opens a model file; the other functions build a network from the YAML of that name. Nothing is downloaded. The
project is imported when a model is asked for, not before. See docs/python.md.
"""

import sys as _sys
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ["torch", "torchvision", "cv2", "numpy", "PIL", "yaml", "tqdm", "matplotlib"]


def _check_modules() -> None:
    """Raise an ImportError if the caller has imported modules of its own under the names of this project's folders."""
    root = _Path(__file__).resolve().parent
    for name in ("utils", "data", "models", "engine"):
        module = _sys.modules.get(name)
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "an unknown place")
        if module is not None and not _Path(place).resolve().is_relative_to(root):
            raise ImportError(
                f"module '{name}' is already imported from {place}, so that of {root} cannot be; move yours into a "
                f"package (mypackage/{name}.py), rename it, or load the model in a process of its own"
            )


def custom(path: _Any = "path/to/model.pt", autoshape: bool = True, _verbose: bool = True, device: _Any = None) -> _Any:
    """Open a model file: a checkpoint (ours or official), a list of them (ensemble), .onnx, .torchscript, ...

    Arguments:
        path: the file.
        autoshape: take images and return results; without it: the bare network, for training.
        device: 'cpu', 0, 'cuda:0', a torch.device; None = the first GPU, else the CPU.
    """
    _check_modules()
    from engine.hub.model import load

    return load(path, autoshape, device)


def _entry(name: str, cfg: str) -> _Any:
    """Return the function that builds the network of a YAML."""

    def build(
        pretrained: bool = False,
        channels: int = 3,
        classes: int | None = None,
        autoshape: bool = True,
        _verbose: bool = True,
        device: _Any = None,
        path: _Any = None,
    ) -> _Any:
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
        channels: of the images; others than 3 need autoshape=False.
        classes: number of classes; None = the checkpoint's, or the YAML's.
        autoshape: take images and return results; without it: the bare network, for training.
        device: 'cpu', 0, 'cuda:0', a torch.device; None = the first GPU, else the CPU.
        path: checkpoint whose weights are copied where rows agree.
    """
    return build


yolov5n = _entry("yolov5n", "yolov5n.yaml")
yolov5s = _entry("yolov5s", "yolov5s.yaml")
yolov5m = _entry("yolov5m", "yolov5m.yaml")
yolov5l = _entry("yolov5l", "yolov5l.yaml")
yolov5x = _entry("yolov5x", "yolov5x.yaml")
yolov5n6 = _entry("yolov5n6", "yolov5n6.yaml")
yolov5s6 = _entry("yolov5s6", "yolov5s6.yaml")
yolov5m6 = _entry("yolov5m6", "yolov5m6.yaml")
yolov5l6 = _entry("yolov5l6", "yolov5l6.yaml")
yolov5x6 = _entry("yolov5x6", "yolov5x6.yaml")
yolov5_riformer = _entry("yolov5_riformer", "yolov5-riformer.yaml")
yolov5_riformer_s = _entry("yolov5_riformer_s", "yolov5-riformer-s.yaml")
yolov5_revvit = _entry("yolov5_revvit", "yolov5-revvit.yaml")
yolov5_revvit_s = _entry("yolov5_revvit_s", "yolov5-revvit-s.yaml")
yolov5_repmlp = _entry("yolov5_repmlp", "yolov5-repmlp.yaml")
yolov5_repmlp_s = _entry("yolov5_repmlp_s", "yolov5-repmlp-s.yaml")
yolov5_nextvit = _entry("yolov5_nextvit", "yolov5-nextvit.yaml")
yolov5_nextvit_s = _entry("yolov5_nextvit_s", "yolov5-nextvit-s.yaml")
yolov5_timm = _entry("yolov5_timm", "yolov5-timm.yaml")
yolov5_timm_resnet50 = _entry("yolov5_timm_resnet50", "yolov5-timm-resnet50.yaml")
yolov5_timm_vit = _entry("yolov5_timm_vit", "yolov5-timm-vit.yaml")
yolov5_nextvit_free = _entry("yolov5_nextvit_free", "yolov5-nextvit-free.yaml")
yolov5_repmlp_free = _entry("yolov5_repmlp_free", "yolov5-repmlp-free.yaml")
yolov5_revvit_free = _entry("yolov5_revvit_free", "yolov5-revvit-free.yaml")
yolov5_riformer_free = _entry("yolov5_riformer_free", "yolov5-riformer-free.yaml")
yolov5_timm_free = _entry("yolov5_timm_free", "yolov5-timm-free.yaml")
yolov5l_free = _entry("yolov5l_free", "yolov5l-free.yaml")
yolov5m_free = _entry("yolov5m_free", "yolov5m-free.yaml")
yolov5n_free = _entry("yolov5n_free", "yolov5n-free.yaml")
yolov5s_free = _entry("yolov5s_free", "yolov5s-free.yaml")
yolov5x_free = _entry("yolov5x_free", "yolov5x-free.yaml")
