"""YAML with line numbers."""

from __future__ import annotations

import pytest

from utils.errors import ConfigError, DataError
from utils.yaml_lines import dump_yaml, key_text, load_yaml, plain, text_of


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("true", True), ("FALSE", False), ("~", None), ("02146", 2146), ("12:30", "12:30"),
        ("1_000", "1_000"), ("0o17", 15), ("0x1F", 31), ("2.10", 2.1), ("2024-02-30", "2024-02-30"), ("'7'", "7"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(tmp_path, text, value):
    data = load_yaml(_write(tmp_path, f"a: {text}\n{text}: 1\n"))
    assert data["a"] == value and type(data["a"]) is type(value)
    assert text_of(data, "a") == (None if value is None else text.strip("'"))
    assert key_text(data, value) == ("None" if value is None else text.strip("'"))


@pytest.mark.parametrize(
    "text", ["no", "true", "7", "02146", "2.10", "1e3", "", "~", "<<", "12:30", "a: b", "- x", "\u2028"]
)
def test_strings_survive_a_round_trip(tmp_path, text):
    dump_yaml(tmp_path / "out.yaml", {"a": [text], text or "k": 1})
    assert plain(load_yaml(tmp_path / "out.yaml")) == {"a": [text], text or "k": 1}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 26))
MERGE_BOMB = "m0: &m0 {a0: 1}\n" + "".join(
    f"m{k}: &m{k} {{<<: [*m{k - 1}, *m{k - 1}], a{k}: 1}}\n" for k in range(1, 24)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 200000 values"),
        (MERGE_BOMB, "more than 200000 values"),
        ("a: &a [*a]\n", "an alias refers to a value that contains it"),
        ("a: " + "[" * 2000 + "]" * 2000, "levels of nesting"),
        ("".join(f"{' ' * k}k:\n" for k in range(2000)), "levels of nesting"),
        ("a: " + "9" * 5000, "is not of type int"),
        ("a: 0x" + "f" * 5000, "is not of type int"),
        ('a: ["b\\ud800"]', "is not of type str"),
        ("a: !!bool maybe\n", "'maybe' is not of type bool"),
        ("a: !!int abc\n", "'abc' is not of type int"),
        ("a: !!timestamp 2024-02-30\n", "is not allowed"),
        ("a: !!str [b]\n", "not valid YAML"),
        ("a: !!map [b]\n", "a mapping is needed"),
        ("? [a]\n: 1\n", "a key must be a plain value"),
    ],
)
def test_values_that_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(_write(tmp_path, text))
    assert len(str(caught.value)) < 400
