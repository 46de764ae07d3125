"""Printed values: passwords hidden, control characters escaped, long values cut."""

from __future__ import annotations

import pytest

from utils.errors import DataError, SpecError, UserError, hide_passwords, listed, printable, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtsp://user:secret@10.0.0.8:554/live/1", "rtsp://***@10.0.0.8:554/live/1"),
        ("rtsp://u:p/ss@h/1", "rtsp://***@h/1"),
        ("rtsp://u:p@ss@h/1", "rtsp://***@h/1"),
        ("http://h/x.jpg?password=a&size=1", "http://h/x.jpg?password=***&size=1"),
        ("rtsp://h:554/user=admin&password=a1", "rtsp://h:554/user=***&password=***"),
        ("rtsp://h/user=admin_password=a1_channel=1", "rtsp://h/user=***"),
        ("http://h/x?token=a b", "http://h/x?token=*** b"),
        ("http:/user:secret@h/x.pt: no such file", "http:/***@h/x.pt: no such file"),  # as pathlib writes it
        ("http://h/v.cgi?loginuse=admin&loginpas=a1", "http://h/v.cgi?loginuse=***&loginpas=***"),
        ("http://h/x?X-Amz-Signature=a1&api-key=b2", "http://h/x?X-Amz-Signature=***&api-key=***"),
        ("http://h/x?token=a:b: no such file", "http://h/x?token=***: no such file"),
        ("rtsp://h/1#psw=a1", "rtsp://h/1#psw=***"),
        ("rtsp://host/a@b", "rtsp://host/a@b"),
        ("C:/a@b.jpg", "C:/a@b.jpg"),
        ("d.yaml:/tmp/a@b", "d.yaml:/tmp/a@b"),
        ("http://host:8080/a/b.jpg", "http://host:8080/a/b.jpg"),
        ("a.yaml:3: user=x", "a.yaml:3: user=x"),
    ],
)
def test_hide_passwords(text: str, expected: str) -> None:
    assert hide_passwords(text) == expected


def test_printable_escapes_control_characters() -> None:
    assert printable("a\x1b[31m\u202eb\x00\udcff\n日本 ü") == "a\\x1b[31m\\u202eb\\x00\\udcff\n日本 ü"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [["a"] * 1000] * 1000, 10**5000, {i: i for i in range(1000)}, b"x" * 999],
    ids=["str", "list", "int", "dict", "bytes"],
)
def test_shown_is_short(value: object) -> None:
    assert len(shown(value)) <= 80


def test_a_cut_does_not_uncover_a_password() -> None:
    url = f"rtsp://user:{'secret' * 20}@host/{'a' * 200}"
    assert shown(url).startswith("'rtsp://***@host") and "secret" not in shown([{"url": url}])
    assert "secret" not in str(UserError("x " * 1995 + url))


def test_shown_of_short_values_is_repr() -> None:
    assert [shown(v) for v in ("a", 1.5, None, ["a", 2], {"a": 7})] == ["'a'", "1.5", "None", "['a', 2]", "{'a': 7}"]


def test_user_errors_are_printable_and_bounded() -> None:
    assert str(DataError("rtsp://u:p@h\x1b")) == "rtsp://***@h\\x1b"
    assert len(str(UserError("x" * 10**6))) < 5000


def test_messages_are_one_line() -> None:
    assert str(DataError("x: cannot be read: first\n  - second\r\n")) == "x: cannot be read: first - second"
    assert str(SpecError("a:1: x\na:2: y")) == "a:1: x\na:2: y"  # a line for each mistake of a model YAML


def test_listed_is_bounded() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(["x" * 1000] * 1000).endswith("and 988 more") and len(listed(["x" * 1000] * 1000)) < 1100
