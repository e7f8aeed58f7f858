# SPDX-License-Identifier: Apache-2.0
"""`plan` on the real configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotron_fast.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
SUPER, ULTRA = (str(CONFIGS / f"{name}.json") for name in ("super-49b-v1", "ultra-253b-v1"))
FP8 = ("--quantize", "fp8", "--kv-dtype", "fp8")


def plan_json(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_super_in_fp8_on_one_h100(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan_json(capsys, SUPER, "--gpu", "h100-80gb", *FP8, "--max-model-len", "131072")
    (rank,) = report["ranks"]
    assert rank["weights"] == 51_969_556_480
    assert rank["kv_per_token"] == 100_352
    assert report["fits"] is True
    assert report["max_context"] == 131_072
    assert report["kv_tokens"] == 64 * report["kv_pages"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SUPER, "--gpu", "h100-80gb", *FP8]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("51,969,556,480", "100,352 bytes a token", "67.2 tok/s", "limit", "131,072 tokens for one sequence"):
        assert text in out
    assert main(["plan", ULTRA, "--gpu", "h200", "--tp", "8"]) == 0
    assert "rank 0" in capsys.readouterr().out


def test_weights_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SUPER, "--gpu", "h100-80gb"]) == 5
    out, err = capsys.readouterr()
    assert "so much is missing" in out  # the table comes first, the refusal last
    last = err.splitlines()[-1]
    assert last.startswith("error: does not fit on H100 SXM 80 GB: needs 101.60 GB (99.73 GB bfloat16 weights")
    assert "would fit: FP8 weights, or tensor parallelism over 2 GPUs" in last


def test_refusal_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan_json(capsys, SUPER, "--gpu", "a100-80gb", code=5)
    assert report["fits"] is False
    assert report["ranks"][0]["free_for_kv"] < 0


def test_context_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", SUPER, "--memory-gb", "60", "--quantize", "fp8", "--max-model-len", "131072"]
    assert main(argv) == 5
    assert "max_model_len up to " in capsys.readouterr().err
    assert main(["plan", SUPER, "--gpu", "h200", "--max-model-len", "131073"]) == 5
    assert "131072 positions" in capsys.readouterr().err


def test_memory_gb(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan_json(capsys, SUPER, "--memory-gb", "141.5", "--memory-fraction", "1")
    assert report["budget_bytes"] == 141_500_000_000
    assert report["decode_limit"]["seconds"] is None


@pytest.mark.parametrize(
    "argv",
    [
        ("--gpu", "h900"),
        ("--gpu", "h100", "--memory-gb", "80"),
        ("--memory-gb", "-1"),
        ("--memory-gb", "nan"),
        ("--gpu", "h100", "--tp", "0"),
        ("--gpu", "h100", "--max-model-len", "0"),
        ("--gpu", "h100", "--kv-dtype", "int4"),
    ],
)
def test_bad_options_exit_2(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    assert main(["plan", SUPER, *argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_ranks_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SUPER, "--gpu", "h100", "--tp", "3"]) == 5
    assert "cannot be split" in capsys.readouterr().err


def quantised(folder: Path, *exclude: str) -> str:
    shutil.copy(SUPER, folder / "config.json")
    quant = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": [*exclude]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(quant))
    return str(folder)


def test_an_fp8_checkpoint_is_planned_as_such(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = quantised(tmp_path, "lm_head")
    report = plan_json(capsys, path, "--gpu", "h100")
    assert (report["weight_dtype"], report["options"]["kv_dtype"]) == ("fp8", "fp8")
    assert report["ranks"][0]["weights"] == 51_969_556_480
    again = plan_json(capsys, path, "--gpu", "h100", "--quantize", "fp8")  # as LLM: nothing is left to quantise
    assert again["ranks"] == report["ranks"]


def test_a_partly_quantised_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = quantised(tmp_path, "lm_head", "*.self_attn.*")
    report = plan_json(capsys, path, "--gpu", "h200")
    assert report["weight_dtype"] == "partly fp8"
    assert report["ranks"][0]["weights"] == 51_969_556_480 + 7_398_752_256
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weight_bytes"] == report["ranks"][0]["weights"]
    assert main(["plan", path, "--gpu", "h200", "--quantize", "fp8"]) == 4
    assert "in FP8 already" in capsys.readouterr().err.splitlines()[-1]


def test_dtype_is_of_what_is_not_quantised(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan_json(capsys, SUPER, "--gpu", "h200", "--quantize", "fp8", "--dtype", "float32")
    assert report["ranks"][0]["embedding"] == 4 * 1_050_673_152
    assert report["options"]["kv_dtype"] == "float32"
