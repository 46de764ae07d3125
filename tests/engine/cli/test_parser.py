"""Command lines: spellings, errors in one line, exit statuses."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from engine.cli.config import HYP_RANGES, DetectConfig, Hyperparameters, TrainConfig, ValConfig
from engine.cli.parser import run_main
from engine.compare.config import CompareConfig
from engine.export.config import ExportConfig
from utils.errors import ConfigError, DataError
from utils.files import ROOT


def _run(argv, config=TrainConfig, work=None):
    seen = []
    status = run_main(config, "prog", "text", work or (lambda c: seen.append(c)), argv)
    return status, seen[0] if seen else None


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--batch", "4"], "batch_size", 4),
        (["--batch_size=4"], "batch_size", 4),
        (["--img-size", "320"], "imgsz", 320),
        (["--img", "320"], "imgsz", 320),
        (["--label-smoothing", "0.1"], "label_smoothing", 0.1),
        (["--resume"], "resume", True),
        (["--resume", "a_b/last.pt"], "resume", "a_b/last.pt"),
        (["--cache"], "cache", "ram"),
        (["--freeze", "3", "4"], "freeze", ["3", "4"]),
        (["--cos-lr"], "cos_lr", True),
        (["--evolve_pop", "x"], "evolve_population", "x"),
        (["--resume-ev=x"], "resume_evolve", "x"),
    ],
)
def test_spellings(argv, name, value):
    status, config = _run(argv)
    assert status == 0
    assert getattr(config, name) == value


def test_keywords_take_numbers_of_numpy():
    config = TrainConfig.from_keywords(
        seed=np.int64(3), freeze=[np.int64(10)], epochs=2.0, label_smoothing=np.float32(0.5)
    )
    assert (config.seed, config.freeze, config.epochs, config.label_smoothing) == (3, ["10"], 2, 0.5)
    assert type(config.seed) is type(config.epochs) is int and type(config.label_smoothing) is float


@pytest.mark.parametrize("epochs", [float("inf"), float("nan"), 1.5, True, "2"])
def test_keywords_refuse_what_is_no_integer(epochs):
    with pytest.raises(ConfigError, match="^epochs=.*: an integer is needed$"):
        TrainConfig.from_keywords(epochs=epochs)


def _argument(field, default) -> list[str]:
    """Return the command line of an option at its default value; empty if it cannot be spelled."""
    if default is None or default is False or default == [] or "missing" in field.metadata:
        return []
    return [f"--{field.name}", *(map(str, default) if isinstance(default, list) else [str(default)])]


@pytest.mark.parametrize("config_class", [TrainConfig, ValConfig, DetectConfig, ExportConfig, CompareConfig])
def test_option_at_its_default_value_is_given(config_class):
    defaults = config_class()
    count = 0
    for field in fields(config_class):
        required = ["--cfg", "x"] if config_class is CompareConfig and field.name != "cfg" else []
        words = _argument(field, getattr(defaults, field.name))
        if words and field.name != "cfg":
            status, config = _run([*words, *required], config_class)
            assert status == 0 and config.is_given(field.name), field.name
            assert config.given == {field.name, *(["cfg"] if required else [])}
            assert getattr(config, field.name) == getattr(defaults, field.name)
            count += 1
    assert count >= 10
    required = {"cfg": ["x"]} if config_class is CompareConfig else {}
    assert config_class.from_keywords(**required).given == set(required)


def test_help_states_the_resolved_default(capsys):
    with pytest.raises(SystemExit):
        _run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "parent folder of runs (default: runs/train, with --evolve runs/evolve)" in text
    assert "(default: none, only --hyp)" in text and "(default: 100)" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cfgg", "x"], ["unrecognized", "did you mean '--cfg'"]),
        (["--optimizer", "LION"], ["invalid choice", "SGD"]),
        (["--imgsz", "ten"], ["invalid int"]),
        (["--epochs", "http://u:secret@h/x\x1b"], ["'http://***@h/x"]),
    ],
)
def test_parser_errors_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        _run(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(w in text for w in words), text
    assert text[:-1].isprintable()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--evolve", "0"], ["--evolve: 0 is out of range"]),
        (["--bucket", "x", "--bbox_interval", "3"], ["--bucket: not available", "--bbox-interval: not available"]),
        (["--epochs", "0"], ["--epochs: 0 is out of range"]),
        (["--label-smoothing", "0.9"], ["out of range", "0.5"]),
        (["--weights", "x" * 300], ["--weights: 'xxx", "is too long for a file name"]),
        (["--plugin", "p.py", "y/" * 2100], ["--plugin: 'y/y", "is too long for a file name"]),
        (["--project", "a\0b"], ["--project: 'a\\x00b' holds a NUL character"]),
        (["--project", "http://u:secret@h/x"], ["--project: 'http://***@h/x' is a URL"]),
        (["--name", "\udcff"], ["--name: '\\udcff' is not UTF-8"]),
    ],
)
def test_refused_options(argv, words, capsys):
    status, config = _run(argv)
    text = capsys.readouterr().err
    assert (status, config) == (2, None)
    assert text.count("\n") == 1 and all(w in text for w in words), text


def test_long_addresses_and_odd_names_are_allowed():
    DetectConfig.from_keywords(source=f"https://h/x.jpg?key={'a' * 900}", name="日本語\u3000x", weights=["\udcff.pt"])


def test_passwords_of_addresses_are_not_stored():
    config = TrainConfig.from_keywords(cfg="x", backbone_weights="https://u:secret@h/w.pth?token=secret", seed=3)
    assert config.to_dict()["backbone_weights"] == "https://***@h/w.pth?token=***"
    assert config.command_words("train.py")[-1] == "https://***@h/w.pth?token=***"
    assert DetectConfig.from_keywords(weights=["https://h/w.pt?key=a"]).to_dict()["weights"] == [
        "https://h/w.pt?key=***"
    ]
    assert config.backbone_weights.count("secret") == 2 and config.to_dict()["seed"] == 3


def test_user_errors_become_status_2(capsys):
    def work(_config):
        raise DataError("my.yaml: no such file")

    assert _run([], DetectConfig, work)[0] == 2
    assert capsys.readouterr().err == "prog: error: my.yaml: no such file\n"


def test_run_main_returns_status():
    assert _run([], DetectConfig, lambda c: 1)[0] == 1


def test_keywords_from_python():
    assert TrainConfig.from_keywords(epochs=3).epochs == 3
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        TrainConfig.from_keywords(epoch=3)


def test_hyperparameters_report_all_mistakes_with_lines(tmp_path):
    path = tmp_path / "hyp.yaml"
    path.write_text("lr0: 0.01\nlrff: 0.1\nmomentum: high\n")
    with pytest.raises(ConfigError) as error:
        Hyperparameters.from_yaml(path)
    text = str(error.value)
    assert "hyp.yaml:2: unknown hyperparameter 'lrff'; did you mean 'lrf'?" in text
    assert "hyp.yaml:3: momentum is 'high'" in text
    assert "missing hyperparameter(s) lrf," in text


def test_class_weights_of_a_hyp_file_name_classes_as_written(tmp_path):
    text = (ROOT / "data/hyps/hyp.scratch-low.yaml").read_text() + "class_weights: {02146: 2, no: 3}\n"
    (tmp_path / "h.yaml").write_text(text)
    assert Hyperparameters.from_yaml(tmp_path / "h.yaml").class_weights == {"02146": 2, "no": 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr0", float("nan")), ("box", float("inf")), ("momentum", 2), ("mosaic", 1e30), ("lr0", None), ("degrees", -1),
        ("hsv_h", True), ("nominal_batch", 0), ("anchor_t", 1), ("clip_norm", 0),
    ],
)  # fmt: skip
def test_hyperparameters_have_finite_ranges(key, value):
    values = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml").to_dict()
    with pytest.raises(ConfigError, match=f"hyp.yaml: {key} is .*(allowed|a number is needed)"):
        Hyperparameters.from_mapping({**values, key: value}, "hyp.yaml")


@pytest.mark.parametrize(
    "argv", [["--imgsz", "999999999"], ["--seed", "9" * 30], ["--label-smoothing", "nan"], ["--backbone-lr", "inf"]]
)
def test_options_have_finite_ranges(argv, capsys):
    assert _run(argv)[0] == 2
    assert f"{argv[0]}: " in capsys.readouterr().err


def test_every_numeric_hyperparameter_has_range():
    assert set(HYP_RANGES) == {f.name for f in fields(Hyperparameters)} - {"optimizer", "class_weights"}
