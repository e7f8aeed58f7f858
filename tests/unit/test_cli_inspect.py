# SPDX-License-Identifier: Apache-2.0
"""`inspect` on the real configs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from nemotron_fast.cli import block_plot
from nemotron_fast.cli.inspect import collapse_runs
from nemotron_fast.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
SUPER, ULTRA, MINI = (CONFIGS / f"{name}.json" for name in ("super-49b-v1", "ultra-253b-v1", "mini-all-blocks"))


def inspect_json(capsys: pytest.CaptureFixture[str], path: Path | str) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_super(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_json(capsys, SUPER)
    assert report["num_blocks"] == 80
    assert (report["attention_blocks"], report["noop_attention_blocks"], report["linear_attention_blocks"]) == (
        49,
        31,
        0,
    )
    assert (report["ffn_blocks"], report["noop_ffn_blocks"], report["linear_ffn_blocks"]) == (80, 0, 0)
    assert report["empty_blocks"] == 0
    assert report["live_sub_blocks"] == 129
    assert report["ffn_widths"] == {"2816": 6, "5632": 8, "7168": 10, "14336": 6, "17920": 1, "28672": 49}
    assert report["kv_heads"] == {"8": 49}
    assert report["parameters"] == {
        "embedding": 1_050_673_152,
        "attention": 7_398_752_256,
        "linear": 0,
        "ffn": 40_365_981_696,
        "norm": 1_064_960,
        "lm_head": 1_050_673_152,
        "total": 49_867_145_216,
    }
    assert report["weight_bytes"] == report["weight_bytes_as"]["bfloat16"] == 99_734_290_432
    assert report["kv_bytes_per_token"] == {"bfloat16": 200_704, "fp8": 100_352}
    assert report["quantization"] is None


def test_ultra(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_json(capsys, ULTRA)
    assert report["num_blocks"] == 162
    assert (report["attention_blocks"], report["ffn_blocks"], report["empty_blocks"]) == (64, 81, 81)
    assert report["live_sub_blocks"] == 145
    assert report["parameters"]["total"] == 253_401_268_224
    assert report["kv_bytes_per_token"]["bfloat16"] == 262_144
    widest = max(report["blocks"], key=lambda b: b["ffn"].get("width", 0))
    assert (widest["index"], widest["ffn"]["width"]) == (134, 425_984)


def test_every_kind_of_block(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_json(capsys, MINI)
    assert (report["linear_attention_blocks"], report["linear_ffn_blocks"]) == (2, 2)
    assert (report["noop_attention_blocks"], report["noop_ffn_blocks"]) == (2, 2)
    assert report["kv_heads"] == {"2": 2, "4": 6, "8": 2}
    linear, no_ffn = report["blocks"][2], report["blocks"][5]
    assert linear["attention"] == {"kind": "linear", "parameters": 2048 * 2049, "bytes": 2 * 2048 * 2049}
    assert no_ffn["ffn"] == {"kind": "noop", "parameters": 0, "bytes": 0}
    slots = [b["attention"]["kv_slot"] for b in report["blocks"] if b["attention"]["kind"] == "attention"]
    assert slots == list(range(10))


@pytest.mark.parametrize("path", [SUPER, ULTRA, MINI], ids=lambda p: p.stem)
def test_blocks_hold_everything_but_the_ends(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    report = inspect_json(capsys, path)
    parts = report["parameters"]
    ends = parts["embedding"] + parts["lm_head"] + report["hidden_size"]  # and the last norm
    assert sum(b["parameters"] for b in report["blocks"]) == parts["total"] - ends
    assert sum(b["bytes"] for b in report["blocks"]) == report["weight_bytes"] - 2 * ends


def test_table_collapses_equal_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(SUPER)]) == 0
    text = capsys.readouterr().out
    assert "12-41 (x30)" in text
    assert "49,867,145,216 parameters" in text
    assert "200,704 bytes as bfloat16" in text
    assert main(["inspect", str(SUPER), "--all"]) == 0
    everything = capsys.readouterr().out
    assert "(x30)" not in everything
    assert len(everything.splitlines()) == len(text.splitlines()) + 80 - 25


def test_collapsed_runs_hold_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = inspect_json(capsys, ULTRA)["blocks"]
    assert [b for run in collapse_runs(blocks) for b in run] == blocks


def test_folder_and_quantisation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copy(SUPER, tmp_path / "config.json")
    quant = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quant))
    report = inspect_json(capsys, tmp_path)
    assert report["name"] == tmp_path.name
    assert report["quantization"] == "modelopt"
    assert report["weight_bytes"] == report["weight_bytes_as"]["fp8"] == 51_969_556_480
    assert inspect_json(capsys, tmp_path / "config.json") == report


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_json(capsys, "demo")
    assert report["parameters"]["total"] == 3_673_344


@pytest.mark.parametrize(
    ("text", "code"), [("{}", 3), ("[]", 3), ("not json", 3), ('{"model_type": "gpt2"}', 3), (None, 4)]
)
def test_bad_configs(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, code: int) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    assert main(["inspect", str(file)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", [SUPER, ULTRA, MINI], ids=lambda p: p.stem)
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"blocks.{ending}"
    assert main(["inspect", str(path), "--plot", str(file)]) == 0
    head = file.read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in file.read_bytes()[:2000]
    if ending == "svg" and path == ULTRA:
        assert "425,984" in file.read_text()


def test_plot_cuts_only_the_widths_that_would_flatten_the_rest() -> None:
    assert block_plot._scale([28672, 2816, 0]) == (28672, 28672)
    full, height = block_plot._scale([5376, *[53248] * 30, 425984, 301056])
    assert full == 53248 < height
    assert block_plot._scale([0, 0])[0] > 0


def test_plot_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["inspect", str(MINI), "--plot", str(tmp_path / "a.gif")]) == 2
    assert "unknown ending" in capsys.readouterr().err
    assert main(["inspect", str(MINI), "--plot", str(tmp_path / "no" / "a.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(MINI), "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install 'nemotron-fast[plot]'" in capsys.readouterr().err
