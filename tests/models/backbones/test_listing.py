"""`python -m models.backbones`: one line per backbone, correct values, errors in one line."""

from __future__ import annotations

import pytest

from models.backbones import list_backbones
from models.backbones.__main__ import describe, main


def test_a_line_tells_levels_size_cost_accuracy_and_weights() -> None:
    name, levels, params, flops, accuracy, weights = describe("riformer_s12", 640)
    assert (name, levels) == ("riformer_s12", "64@4 128@8 320@16 512@32")
    assert params == "11.41"  # fixture: 11,409,856
    # published: 1.82e9 multiply-adds at 224 pixels with the classifier (0.0005e9), 2 operations each, scaled to 640
    assert float(flops) == pytest.approx(2 * 1.82 * (640 / 224) ** 2, rel=0.03)
    assert (accuracy, weights) == ("76.90 @224", "riformer-s12_in1k (+1)")


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--imgsz", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *list_backbones()]


def test_a_name_lists_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nextvit_small", "timm/test_resnet", "--imgsz", "64"]) == 0
    text = capsys.readouterr().out
    assert "  nextvit_small.bd_in1k_384: top-1 84.04 @384, layout timm, https://huggingface.co/" in text
    assert "timm/test_resnet" in text


def test_a_pattern_lists_what_timm_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timm/test_vit?"]) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header == "name            params (M)  weights"
    assert rows[0].split()[0] == "timm/test_vit2" and "r160_in1k" in rows[0]
    # 8 blocks of 41,856 (64 channels, MLP 3 x), patches 49,216, positions 6,464, class token 64, norm 128
    assert rows[0].split()[1] == "0.39"
    assert last.startswith(f"{len(rows)} found; ")


def test_a_pattern_goes_with_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test_vit2*", "riformer_s12", "--imgsz", "64"]) == 0
    text = capsys.readouterr().out
    assert "timm/test_vit2" in text and "64@4 128@8 320@16 512@32" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["riformer_s1"], "did you mean 'riformer_s12'?"),
        (["--imgsz", "8"], "--imgsz 8: allowed are integers"),
        (["timm/*fastvitt*"], "no model of timm"),
        (["timm/*fastvitt*"], "did you mean 'timm/fastvit_t8'?"),
    ],
)
def test_errors_are_one_line_and_status_two(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "riformer_m36",
            ["arch = m36", "out_indices = None", "init_cfg = refused", "m36: layers (6, 6, 18, 6)", "1e-06"],
        ),
        (
            "NextViT",
            ["drop_path_rate (published: path_dropout) = 0.0", "stochastic depth", "small: depths (3, 4, 10, 3)"],
        ),
        ("RevVisionTransformer", ["arch = base", "small, s: embed_dims 768"]),
    ],
)
def test_arguments_are_printed(name: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arguments", name]) == 0
    text = capsys.readouterr().out
    for words in expected:
        assert words in text


def test_arguments_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arguments", "riformer_m63"]) == 2
    assert "did you mean 'riformer_m36'" in capsys.readouterr().err
