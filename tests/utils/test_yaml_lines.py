"""YAML with line numbers."""

from __future__ import annotations

import pytest

from utils.errors import ConfigError, DataError
from utils.yaml_lines import dump_yaml, load_yaml, plain


def _write(tmp_path, text: str | bytes):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines(tmp_path):
    text = "# note\nnc: 3\nbackbone:\n  - [-1, 1, Conv,\n     [8, 3]]\n  - [-1, 1, C3, [8]]\n"
    data = load_yaml(_write(tmp_path, text))
    assert data.lines == {"nc": 2, "backbone": 3}
    assert data["backbone"].lines == [4, 6]
    assert data["backbone"][0][3] == [8, 3]
    assert type(plain(data)["backbone"][0]) is list


def test_merge_keys(tmp_path):
    data = load_yaml(_write(tmp_path, "base: &b {x: 1, y: 2}\nsub:\n  <<: *b\n  z: 3\n"))
    assert data["sub"] == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a\.yaml:3: not valid YAML: key 'a' is given twice \(first in line 1\)"),
        ("a: [1, 2\n", r"a\.yaml:2: not valid YAML"),
        ("", "is empty"),
        ("- 1\n", "holds a list"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_yaml(_write(tmp_path, text), error=DataError)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_yaml(tmp_path / "none.yaml")


def test_dump_and_load(tmp_path):
    dump_yaml(tmp_path / "out.yaml", {"b": (1, 2), "a": {"ü": None}})
    assert plain(load_yaml(tmp_path / "out.yaml")) == {"b": [1, 2], "a": {"ü": None}}
    assert (tmp_path / "out.yaml").read_text(encoding="utf-8").startswith("b:")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("-2E3", -2000.0), ("1.5e-3", 1.5e-3), ("3", 3), ("e5", "e5"), ("1e", "1e")]
)
def test_numbers_with_an_exponent(tmp_path, text, value):
    found = load_yaml(_write(tmp_path, f"a: {text}\n"))["a"]
    assert found == value and type(found) is type(value)
