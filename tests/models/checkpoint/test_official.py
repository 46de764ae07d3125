"""Official checkpoints are read as data: malicious files are refused, and nothing in them is executed."""

from __future__ import annotations

import codecs
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoint import inert
from models.checkpoint.inert import MODULE_CLASSES, VALUE_CLASSES
from models.checkpoint.io import read_checkpoint
from tests.helpers.pickles import official_module, save, stand_in, zipped
from utils.errors import CheckpointError

SPEC = {"nc": 1, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[1, 2]], "backbone": [], "head": []}
CONV = b"cmodels.common\nConv\n"
RECORD: list[str] = []
WATCHED = ("os.", "exec", "compile", "import", "subprocess.", "socket.", "pickle.find_class", "ctypes.", "shutil.")
recording = False


def _watch(event: str, args: tuple) -> None:
    if recording and event.startswith(WATCHED):
        RECORD.append(f"{event} {args!r:.120}")


sys.addaudithook(_watch)


@pytest.fixture
def nothing_runs(tmp_path):
    """Return a check that reading a file is an error and imports, compiles or executes nothing and creates no file."""
    for codec in ("rot13", "zlib"):  # torch allows `_codecs.encode`, which imports codecs of the standard library
        codecs.lookup(codec)
    warm = zipped(tmp_path / "warm.pt", b"\x80\x02" + CONV + b".")
    for _ in range(2):  # torch and zipfile import some of themselves on first use
        with pytest.raises(CheckpointError):
            read_checkpoint(warm)
    files = sorted(os.listdir(tmp_path))

    def check(path: Path, message: str) -> None:
        global recording  # noqa: PLW0603 (an audit hook cannot be removed)
        RECORD.clear()
        recording = True
        try:
            with pytest.raises(CheckpointError) as caught:
                read_checkpoint(path)
        finally:
            recording = False
        assert [event for event in RECORD if not event.startswith("os.listdir")] == []
        assert sorted(os.listdir(tmp_path)) == sorted({*files, path.name})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    return check


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """GLOBAL, a tuple of strings, REDUCE."""
    return b"\x80\x02" + CONV + b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR."


def stack_call(module: str, name: str, *arguments: str) -> bytes:
    """The same with the STACK_GLOBAL of protocol 4, which follows dots in the name."""
    return b"\x80\x04" + CONV + text(module) + text(name) + b"\x93(" + b"".join(map(text, arguments)) + b"tR."


HOSTILE_NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("__builtin__", "eval"),
    ("__builtin__", "apply"),
    ("importlib", "import_module"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
    ("copyreg", "_reconstructor"),
    ("codecs", "decode"),
    ("collections", "namedtuple"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.jit", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_import_dotted_name"),
    ("torch.serialization", "load"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("numpy", "load"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy._core.multiarray", "frombuffer"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.f2py.crackfortran", "myeval"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath.write_text"),
    # attribute chains and deeper paths under the allowed prefixes
    ("torch.nn.modules.module", "os.system"),
    ("torch.nn.modules.module.os", "system"),
    ("torch.nn.modules.module", "torch.os.system"),
    ("torch.nn.modules", "module.os.system"),
    ("torch.nn", "modules.module.os.system"),
    ("torch.nn.modules.module", "__builtins__"),
    ("models.x.y", "z"),
    ("models.common", "os.system"),
    ("models", "common.os.system"),
    ("models.common", "__import__"),
    ("models.", "system"),
    ("modelsx.common", "Conv"),
    ("collections", "OrderedDict.fromkeys"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
]


@pytest.mark.parametrize(("module", "name"), HOSTILE_NAMES)
def test_other_globals_are_refused_by_name(tmp_path, nothing_runs, module, name):
    path = zipped(tmp_path / "hostile.pt", call(module, name, f"touch {tmp_path}/executed"))
    nothing_runs(path, f"global '{module.replace('__builtin__', 'builtins')}.{name}'")


@pytest.mark.parametrize(("module", "name"), HOSTILE_NAMES)
def test_globals_by_stack_are_refused(tmp_path, nothing_runs, module, name):
    path = zipped(tmp_path / "hostile.pt", stack_call(module, name, f"touch {tmp_path}/executed"))
    nothing_runs(path, "refused, nothing of it was executed: Unsupported operand 147")


TORCH_FUNCTIONS = [
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch", "_utils._rebuild_tensor_v2"),
    ("torch._tensor", "_rebuild_from_type_v2"),
]


@pytest.mark.parametrize(("module", "name"), TORCH_FUNCTIONS)
def test_tensor_functions_with_other_arguments_are_errors(tmp_path, nothing_runs, module, name):
    """Names that torch allows in every weights file."""
    path = zipped(tmp_path / "hostile.pt", call(module, name, f"touch {tmp_path}/executed"))
    nothing_runs(path, "cannot be read, damaged")


INERT_NAMES = [("models.common", "os"), ("torch.nn.modules.module", "warnings"), ("models", "common.Conv")]


@pytest.mark.parametrize(("module", "name"), INERT_NAMES)
def test_allowed_names_are_not_looked_up(tmp_path, nothing_runs, module, name):
    path = zipped(tmp_path / "hostile.pt", call(module, name, f"touch {tmp_path}/executed"))
    nothing_runs(path, f"holds a {module}.{name}; only")


TRICKS = [
    ("state on a class", b"\x80\x02" + CONV + b"}" + text("__setstate__") + CONV + b"sb.",
     "refused, nothing of it was executed: Can only build"),
    ("slots on an object", b"\x80\x02" + CONV + b")\x81N}" + text("__class__") + CONV + b"s\x86b.",
     "holds a models.common.Conv"),
    ("constructor arguments", b"\x80\x02" + CONV + text("x") + b"\x85\x81.", "holds a models.common.Conv"),
    ("keyword arguments", b"\x80\x04" + CONV + b")}\x92.", "Unsupported operand 146"),
    ("object called", b"\x80\x02" + CONV + b")\x81)R.", "call reduce for unrecognized function"),
    ("string called", b"\x80\x02" + text("os.system") + b")R.", "call reduce for unrecognized function os.system"),
    ("OBJ", b"(cos\nsystem\n" + text("true") + b"o.", "Unsupported operand 111"),
    ("OBJ of a class", b"(" + CONV + text("true") + b"o.", "Unsupported operand 111"),
    ("INST", b"(" + text("true") + b"ios\nsystem\n.", "Unsupported operand 105"),
    ("EXT1", b"\x80\x02\x82\x01.", "Unsupported operand 130"),
    ("PERSID", b"Pos.system\n.", "Unsupported operand 80"),
    ("out-of-band buffer", b"\x80\x05\x97.", "Unsupported operand 151"),
    ("new OrderedDict", b"\x80\x02ccollections\nOrderedDict\n)\x81.", "not a checkpoint"),
    ("items of an object", b"\x80\x02" + CONV + b")\x81" + text("a") + text("b") + b"s.", ".pt: "),
    ("append to an object", b"\x80\x02" + CONV + b")\x81Na.", "Can only append to list"),
    ("codec", b"\x80\x02c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.", "not a checkpoint"),
    ("codec zip", b"\x80\x02c_codecs\nencode\n" + text("x") + text("zlib") + b"\x86R.", "cannot be read, damaged"),
    ("object dtype", b"\x80\x02cnumpy\ndtype\n" + text("O8") + b"\x85R.", "holds a numpy.dtype"),
    ("record dtype", b"\x80\x02cnumpy\ndtype\n" + text("V8") + b"\x85R.", "holds a numpy.dtype"),
    ("array of a class", b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + CONV + b"K\x00\x85c_codecs\nencode\n"
     + text("b") + b"\x85R\x87R.", "holds a numpy.core.multiarray._reconstruct"),
    ("storage by path", b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../../x") + text("cpu")
     + b"K\x01tQ.", "cannot be read, damaged"),
    ("persistent id of another kind", b"\x80\x02" + text("os.system") + b"\x85Q.",
     "Only persistent_load of storage is allowed"),
    ("storage of a class", b"\x80\x02(" + text("storage") + CONV + text("0") + text("cpu") + b"K\x01tQ.",
     "cannot be read, damaged"),
    ("deep key", b"\x80\x02}(" + b")" + b"\x85" * 5000 + b"Nu.", "not a checkpoint of a detector (found: keys tuple)"),
    ("truncated", b"\x80\x02}q\x00(" + text("a"), "cannot be read, damaged"),
    ("missing memo", b"\x80\x02h\x07.", "cannot be read, damaged"),
    ("empty stack", b"\x80\x02CMODEL"[:3] + b"R.", "Unsupported operand 67"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), [t[1:] for t in TRICKS], ids=[t[0] for t in TRICKS])
def test_other_instructions_are_refused(tmp_path, nothing_runs, data, message):
    nothing_runs(zipped(tmp_path / "hostile.pt", b"\x80\x02" + CONV + data), message)


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


FOUR = np.arange(4, dtype="<f4").tobytes()


def tensor_pickle(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], numel: int, kind: str = "Float"
) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"Storage\n" + text("0") + text("cpu")
    storage += number(numel) + b"tQ"
    empty = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride)
        + b"\x89" + empty + b"tR"
    )  # fmt: skip


def model_pickle(*tensors: bytes) -> bytes:
    """{'model': Model with one parameter per tensor}."""
    entries = b"".join(text(f"p{i}") + tensor for i, tensor in enumerate(tensors))
    state = b"}(" + text("_parameters") + b"}(" + entries + b"u" + text("yaml") + b"}" + text("nc") + b"K\x01su"
    return b"\x80\x02}" + text("model") + b"cmodels.yolo\nModel\n)\x81" + state + b"bs."


@pytest.mark.parametrize(
    ("tensors", "record", "message"),
    [
        ([(1, (4,), (1,), 4)], 16, "cannot be read, damaged"),
        ([(0, (2, 2), (3, 1), 4)], 16, "cannot be read, damaged"),
        ([(-1, (4,), (1,), 4)], 16, "cannot be read, damaged"),
        ([(0, (2,), (-1,), 4)], 16, "cannot be read, damaged"),
        ([(0, (4,), (1, 1), 4)], 16, "cannot be read, damaged"),
        ([(0, (1 << 40,), (0,), 4)], 16, "more numbers in its tensors than in the file"),  # 4 TiB out of 16 bytes
        ([(0, (4,), (1,), 4)], 12, "damaged"),
        ([(0, (1 << 30,), (1,), 1 << 30)], 16, "cannot be read, damaged"),
        ([(0, (4,), (1,), 4)], None, "damaged"),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, tensors, record, message):
    stored = {} if record is None else {"0": FOUR[:record]}
    path = zipped(tmp_path / "x.pt", model_pickle(*(tensor_pickle(*t) for t in tensors)), stored)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ((0, (4,), (1,), 4), [0.0, 1.0, 2.0, 3.0]),
        ((2, (2,), (1,), 4), [2.0, 3.0]),
        ((1, (3,), (1,), 4), [1.0, 2.0, 3.0]),
        ((0, (2, 2), (1, 2), 4), [[0.0, 2.0], [1.0, 3.0]]),
        ((3, (), (), 4), 3.0),
        ((0, (0,), (1,), 4), []),
    ],
)
def test_views_of_a_storage_become_separate_tensors(tmp_path, tensor, expected):
    whole = tensor_pickle(0, (4,), (1,), 4)
    path = zipped(tmp_path / "x.pt", model_pickle(whole, tensor_pickle(*tensor)), {"0": FOUR})
    state = read_checkpoint(path).state
    torch.testing.assert_close(state["p1"], torch.tensor(expected), rtol=0, atol=0)
    state["p1"].zero_()
    torch.testing.assert_close(state["p0"], torch.arange(4.0), rtol=0, atol=0)


def test_module_that_contains_itself_is_refused(tmp_path):
    model = stand_in("models.yolo.Model", yaml=SPEC)
    model._modules = {"again": model}  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_checkpoint(save({"model": model}, tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}, 1], dtype=object), "NumPy type 'O8', not a plain number"),
        (np.zeros(2, [("a", "f4")]), "NumPy type 'V4', not a plain number"),
        (stand_in("numpy.ndarray"), None),
        (stand_in("numpy.core.multiarray.scalar"), "cannot be read, damaged"),
        (stand_in("numpy.core.multiarray._reconstruct", shape=3), "cannot be read, damaged"),
    ],
)
def test_numpy_values_other_than_numbers_are_refused(tmp_path, value, message):
    model = official_module(nn.Conv2d(1, 1, 1), "models.yolo.Model", yaml=SPEC, names=["a", "b"])
    path = save({"model": model, "opt": {"x": value}}, tmp_path / "x.pt")
    if message is None:  # an object of that class is a name without content
        assert read_checkpoint(path).metadata["opt"] == {"x": "<numpy.ndarray>"}
        return
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert message in str(caught.value)


def test_training_state_may_be_larger_than_the_limit_of_plain_values(tmp_path, monkeypatch):
    monkeypatch.setattr(inert, "MAX_VALUES", 1000)
    model = official_module(nn.Conv2d(1, 1, 1), "models.yolo.Model", yaml=SPEC, names=["a", "b"])
    buffers = {index: {"momentum_buffer": torch.ones(900)} for index in range(3)}
    file = {"model": model, "optimizer": {"state": buffers}}
    train = read_checkpoint(save(file, tmp_path / "x.pt")).train
    assert train is not None
    torch.testing.assert_close(train["optimizer"]["state"][2]["momentum_buffer"], torch.ones(900))


def test_modules_that_double_at_every_level_are_refused(tmp_path):
    """40 objects that describe 2 ** 40 modules."""
    inner = stand_in("models.common.Conv")
    for _ in range(40):
        inner = stand_in("models.common.Conv", _modules={"a": inner, "b": inner})
    model = stand_in("models.yolo.Model", yaml=SPEC, _modules={"model": inner})
    with pytest.raises(CheckpointError, match="too many of them"):
        read_checkpoint(save({"model": model}, tmp_path / "x.pt"))


def test_metadata_that_contains_itself_is_refused(tmp_path):
    loop: list = []
    loop.append(loop)
    model = official_module(nn.Conv2d(1, 1, 1), "models.yolo.Model", yaml=SPEC, names=["a", "b"])
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_checkpoint(save({"model": model, "opt": {"x": loop}}, tmp_path / "x.pt"))


def test_compressed_record_is_refused(tmp_path):
    """torch.save compresses nothing; a file of a few bytes must not unpack to gigabytes."""
    data = model_pickle(tensor_pickle(0, (4,), (1,), 4))
    path = zipped(tmp_path / "x.pt", data, {"0": FOUR}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"damaged: record archive/.* is compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["models.yolo.DetectionModel", "models.yolo.Model"])
def test_read_checkpoint_returns_modules_metadata_and_training_state(tmp_path, legacy, name):
    torch.manual_seed(0)
    raw = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()
    average = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()
    average.register_buffer("hidden", torch.ones(2), persistent=False)
    about = {"yaml": SPEC, "names": ["a", "b"], "stride": torch.tensor([8.0, 16.0]), "hyp": {"lr0": 0.01}}
    file = {
        "epoch": 7,
        "best_fitness": np.array([0.25]),
        "model": official_module(raw, name, **about),
        "ema": official_module(average, name, **about),
        "updates": 31,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.full((3,), 2.0)}},
            "param_groups": [{"lr": np.float64(0.1)}],
        },
        "opt": {"save_dir": Path("runs/train/exp"), "device": "", "seed": np.int64(3), "data": Path("/a/b")},
        "date": "2026",
    }
    checkpoint = read_checkpoint(save(file, tmp_path / "last.pt", legacy))
    assert checkpoint.source == "official"
    assert list(checkpoint.state) == list(average.state_dict())
    for key, value in average.state_dict().items():
        torch.testing.assert_close(checkpoint.state[key], value.float() if value.is_floating_point() else value)
        assert checkpoint.state[key].dtype in (torch.float32, torch.int64)
    assert (checkpoint.names, checkpoint.stride, checkpoint.epoch) == ({0: "a", 1: "b"}, (8.0, 16.0), 7)
    assert checkpoint.metadata["opt"] == {"save_dir": "runs/train/exp", "device": "", "seed": 3, "data": "/a/b"}
    assert checkpoint.train is not None
    assert (checkpoint.train["best_fitness"], checkpoint.train["updates"]) == (0.25, 31)
    torch.testing.assert_close(checkpoint.train["model"]["0.weight"], raw[0].weight.float().detach())
    torch.testing.assert_close(checkpoint.train["optimizer"]["state"][0]["momentum_buffer"], torch.full((3,), 2.0))
    assert checkpoint.train["optimizer"]["param_groups"] == [{"lr": 0.1}]


@pytest.mark.parametrize(
    "file",
    [
        {"model": "M"},  # old files have no 'ema'
        {"model": "M", "ema": None},
        {"model": None, "ema": "M"},
        "M",  # the module alone
    ],
)
def test_read_checkpoint_finds_the_model(tmp_path, file):
    module = official_module(nn.Conv2d(1, 2, 1), "models.yolo.Model", yaml=SPEC, names={0: "a", 1: "b"}, stride=None)
    value = module if file == "M" else {k: module if v == "M" else v for k, v in file.items()}
    checkpoint = read_checkpoint(save(value, tmp_path / "x.pt"))
    assert list(checkpoint.state) == ["weight", "bias"]
    assert checkpoint.stride == (32.0,)  # YOLOv5's default for a file without stride
    assert checkpoint.train is None


def test_read_checkpoint_skips_pixel_anchors_of_old_heads(tmp_path):
    module = nn.Conv2d(1, 2, 1)
    module.register_buffer("anchors", torch.ones(1, 3, 2))
    module.register_buffer("anchor_grid", torch.ones(1, 1, 3, 1, 1, 2))
    tree = stand_in(
        "models.yolo.Model",
        yaml=SPEC,
        names=["a", "b"],
        _modules={"model": official_module(module, "models.yolo.Detect")},
    )
    checkpoint = read_checkpoint(save({"model": tree}, tmp_path / "x.pt"))
    assert list(checkpoint.state) == ["model.weight", "model.bias", "model.anchors"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"model": stand_in("models.yolo.SegmentationModel", yaml=SPEC)},
            "SegmentationModel; segmentation is not supported; give the detector",
        ),
        ({"model": stand_in("models.yolo.ClassificationModel", yaml=SPEC)}, "classification is not supported"),
        ({"model": stand_in("models.yolo.Model")}, "no 'yaml'"),
        ({"model": stand_in("models.yolo.Model", yaml=SPEC)}, "has no weights"),
        (
            {"net": stand_in("models.yolo.Model", yaml=SPEC)},
            "no pickled model in it under 'ema' or 'model' (found: keys net)",
        ),
        ([stand_in("models.yolo.Model", yaml=SPEC)], "not a checkpoint of a detector (found: list)"),
        (
            {"model": stand_in("models.yolo.Model", yaml=SPEC, _parameters={"a": stand_in("models.common.Conv")})},
            "'a' is a models.common.Conv, not a tensor",
        ),
    ],
)
def test_read_checkpoint_says_what_is_wrong_with_the_model(tmp_path, value, message):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(save(value, tmp_path / "x.pt"))
    assert message in str(caught.value)


def test_read_checkpoint_swaps_bytes_of_big_endian_files(tmp_path):
    big = np.arange(4, dtype=">f4").tobytes()
    path = zipped(tmp_path / "x.pt", model_pickle(tensor_pickle(0, (4,), (1,), 4)), {"0": big}, byteorder=b"big")
    torch.testing.assert_close(read_checkpoint(path).state["p0"], torch.arange(4.0), rtol=0, atol=0)


def test_legacy_pickle_of_another_program_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_legacy_file_of_a_real_module_is_refused_with_a_hint(tmp_path):
    """torch wrote the source code of module classes into such files; weights_only does not read them."""
    torch.save({"model": nn.Conv2d(1, 1, 1)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6; save it again with a later torch"):
        read_checkpoint(tmp_path / "x.pt")


ALLOWED = ["models.common.Conv", "torch.nn.modules.conv.Conv2d", "numpy.core.multiarray.scalar", "numpy.dtype",
           "numpy._core.multiarray._reconstruct", "numpy.ndarray", "pathlib.PosixPath",
           "pathlib._local.WindowsPath"]  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_names(name):
    assert MODULE_CLASSES.fullmatch(name) or VALUE_CLASSES.fullmatch(name)
