# SPDX-License-Identifier: Apache-2.0
"""The planner, against the published sizes of the real models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nemotron_fast.blocks import GatedMLP, Skip, make_blocks
from nemotron_fast.config import ModelConfig
from nemotron_fast.errors import CapacityError, CheckpointError, RequestError
from nemotron_fast.footprint import param_bytes, weight_bytes_by_kind, workspace_bytes
from nemotron_fast.hardware import GPUS, custom_gpu, get_gpu
from nemotron_fast.models import demo_folder
from nemotron_fast.pages import PAGE_SIZE
from nemotron_fast.planner import Plan, PlanOptions, kv_bytes_per_token, num_pages_that_fit, plan, weight_bytes
from nemotron_fast.quant_config import QuantConfig, parse_quant_config, read_quant_config
from nemotron_fast.sharding import param_plan

CONFIGS = Path(__file__).parents[1] / "configs"
SUPER = ModelConfig.from_path(CONFIGS / "super-49b-v1.json")
ULTRA = ModelConfig.from_path(CONFIGS / "ultra-253b-v1.json")
MINI = ModelConfig.from_path(CONFIGS / "mini-all-blocks.json")
H100 = get_gpu("h100-80gb")


def fp8_plan(**options: object) -> Plan:
    return plan(SUPER, gpu=H100, quantize="fp8", kv_dtype="fp8", **options)


@pytest.mark.parametrize(
    ("config", "dtype", "quantize", "want"),
    [
        (SUPER, "bfloat16", None, 2 * 49_867_145_216),
        (SUPER, "auto", None, 2 * 49_867_145_216),
        (SUPER, "float32", None, 4 * 49_867_145_216),
        # FP8: 1 byte for attention and FFN, those of the dtype for embedding, lm_head and norms
        (SUPER, "auto", "fp8", 7_398_752_256 + 40_365_981_696 + 2 * (2 * 1_050_673_152 + 1_064_960)),
        (SUPER, "float32", "fp8", 7_398_752_256 + 40_365_981_696 + 4 * (2 * 1_050_673_152 + 1_064_960)),
        (ULTRA, "bfloat16", None, 2 * 253_401_268_224),
        (ULTRA, "auto", "fp8", 36_507_222_016 + 212_688_961_536 + 2 * (4_202_692_608 + 2_392_064)),
    ],
)
def test_weight_bytes(config: ModelConfig, dtype: str, quantize: str | None, want: int) -> None:
    parts = weight_bytes_by_kind(config, dtype=dtype, quantize=quantize)
    assert sum(parts.values()) - parts["scales"] == want
    assert weight_bytes(config, dtype=dtype, quantize=quantize) == sum(parts.values())


def test_fp8_super_is_51_97_gb_and_scales_are_apart() -> None:
    parts = weight_bytes_by_kind(SUPER, quantize="fp8")
    assert sum(parts.values()) - parts["scales"] == 51_969_556_480
    assert weight_bytes(SUPER, quantize="fp8") == 51_969_556_480 + parts["scales"]
    # a float32 per output row: 49 x (10240 + 8192) of attention, 2 F + 8192 of each FFN
    widths = [b.ffn.width for b in SUPER.blocks if isinstance(b.ffn, GatedMLP)]
    assert parts["scales"] == 4 * (49 * (10240 + 8192) + sum(2 * w + 8192 for w in widths))


@pytest.mark.parametrize(
    ("config", "dtype", "want"),
    [
        (SUPER, "bfloat16", 200_704),
        (SUPER, "fp8", 100_352),
        (ULTRA, "bfloat16", 262_144),
        (ULTRA, "fp8", 131_072),
        (MINI, "bfloat16", 11_264),  # KV heads 4, 2, 8 of 64 in ten of fourteen blocks: 44 heads
    ],
)
def test_kv_bytes_per_token_counts_only_attention_blocks(config: ModelConfig, dtype: str, want: int) -> None:
    assert kv_bytes_per_token(config, dtype) == want


def test_kv_heads_are_replicated_where_there_are_fewer_than_ranks() -> None:
    per_rank = [kv_bytes_per_token(MINI, "bfloat16", rank, 8) for rank in range(8)]
    assert per_rank == [10 * 2 * 64 * 2] * 8  # one KV head of every attention block


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("config", [SUPER, ULTRA, MINI], ids=["super", "ultra", "mini"])
def test_ranks_are_balanced(config: ModelConfig, size: int) -> None:
    made = plan(config, gpu=get_gpu("h200"), tp=size, quantize="fp8")
    assert made.rank_ratio < 1.1
    assert len(made.ranks) == size
    if config is not MINI:  # no KV head is replicated: the ranks hold the model once
        assert sum(r.kv_per_token for r in made.ranks) == kv_bytes_per_token(config)
        assert sum(r.linears for r in made.ranks) == weight_bytes_by_kind(config, quantize="fp8")["linear"]


def test_the_parts_add_up() -> None:
    made = fp8_plan()
    (rank,) = made.ranks
    assert rank.weights == rank.embedding + rank.linears + rank.norms + rank.lm_head == 51_969_556_480
    work = rank.activations + rank.logits + rank.tables
    assert rank.total == rank.weights + rank.scales + work + rank.reserve
    assert rank.free_for_kv == made.budget - rank.total
    assert made.budget == int(H100.memory_bytes * 0.95)
    assert made.num_pages == rank.free_for_kv // (64 * 100_352)
    assert made.num_pages == num_pages_that_fit(SUPER, rank.free_for_kv, "fp8")
    assert made.kv_tokens == 64 * made.num_pages
    assert 260_000 < made.kv_tokens < 280_000
    assert made.max_context == 131_072
    assert made.sequences_at(131_072) == 2
    assert made.sequences_at(65) == made.num_pages // 2


def test_workspace_is_its_formula() -> None:
    work = workspace_bytes(SUPER, num_tokens=100, num_seqs=7)
    assert work["activations"] == 100 * 2 * (2 * 8192 + 3 * 28672 + 8192)
    assert work["logits"] == 7 * 128256 * (2 + 8)
    assert work["tables"] == 131072 * 128 * 4 + 7 * 131072 // PlanOptions().page_size * 4
    assert PlanOptions().page_size == PAGE_SIZE


def test_decode_limit_is_bytes_over_bandwidth() -> None:
    made = fp8_plan()
    read = 49_868_226_560 - 8192 * 2 + made.ranks[0].scales  # all but the embedding
    assert made.decode_limit_s() == pytest.approx(read / 3.35e12, rel=1e-6)
    assert 1 / made.decode_limit_s() == pytest.approx(67.2, abs=0.05)
    assert made.decode_limit_s(8192) > made.decode_limit_s()
    assert plan(SUPER, gpu=10**12).decode_limit_s() is None


def test_tied_embedding_is_read_and_held_once() -> None:
    tied = dataclasses.replace(SUPER, tie_word_embeddings=True)
    made = plan(tied, gpu=get_gpu("h200"))
    (rank,) = made.ranks
    assert rank.lm_head == 0
    assert rank.read_per_step == rank.weights


def test_require_accepts_what_fits() -> None:
    fp8_plan().require()
    fp8_plan(max_model_len=131_072).require()
    plan(ULTRA, gpu=H100, tp=8, max_model_len=131_072).require()


def test_weights_that_do_not_fit_are_refused_with_numbers_and_a_way_out() -> None:
    made = plan(SUPER, gpu=H100)
    assert not made.weights_fit
    assert (made.num_pages, made.kv_tokens, made.max_context) == (0, 0, 0)
    with pytest.raises(CapacityError) as caught:
        made.require()
    message = str(caught.value)
    assert "99.73 GB bfloat16 weights" in message
    assert f"has {made.budget / 1e9:.2f} GB" in message
    assert "would fit: FP8 weights, or tensor parallelism over 2 GPUs" in message
    assert "\n" not in message


def test_every_remedy_in_the_refusal_works() -> None:
    made = fp8_plan(max_num_seqs=4096)
    options = dataclasses.asdict(made.options) | {"kv_dtype": "bfloat16"}
    refused = plan(SUPER, gpu=H100, max_model_len=131_072, **options)
    with pytest.raises(CapacityError, match=r"would fit: max_model_len up to (\d+), or FP8 KV, or tensor parall") as e:
        refused.require()
    length = int(str(e.value).split("up to ")[1].split(",")[0])
    refused.require(length)
    with pytest.raises(CapacityError):
        refused.require(length + 1)
    plan(SUPER, gpu=H100, max_model_len=131_072, **(options | {"kv_dtype": "fp8"})).require()
    plan(SUPER, gpu=H100, max_model_len=131_072, **(options | {"tp": 2})).require()


def test_hopeless_is_said_to_be_hopeless() -> None:
    with pytest.raises(CapacityError, match="neither FP8 nor 8 such GPUs would be enough"):
        plan(ULTRA, gpu=get_gpu("l4")).require()


def test_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(CapacityError, match="max_model_len=131073 exceeds the model's 131072 positions"):
        fp8_plan(max_model_len=131_073).require()


def test_heads_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(CapacityError, match="cannot be split over tensor_parallel_size=3"):
        plan(SUPER, gpu=H100, tp=3)


def test_a_model_without_attention_has_no_kv_cache() -> None:
    config = dataclasses.replace(MINI, blocks=make_blocks([(Skip(), GatedMLP(256))] * 2))
    made = plan(config, gpu=10**10, max_model_len=2048)
    assert made.num_pages is None
    assert made.sequences_at(1024) is None
    assert made.max_context == 2048
    assert num_pages_that_fit(config, 10**9) is None
    made.require()
    json.dumps(made.to_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 0},
        {"max_num_seqs": 0},
        {"page_size": 0},
        {"max_batched_tokens": -1},
        {"memory_fraction": 0.0},
        {"memory_fraction": 1.1},
        {"dtype": "int3"},
        {"dtype": "fp8"},  # of the linears alone: that is quantize
        {"quantize": "int4"},
        {"kv_dtype": "fp16"},
        {"max_model_len": 0},
    ],
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(RequestError):
        plan(SUPER, gpu=H100, **options)


def test_to_dict_is_json() -> None:
    report = json.loads(json.dumps(fp8_plan(tp=2, max_model_len=4096).to_dict()))
    assert report["fits"] is True
    assert len(report["ranks"]) == 2
    assert report["ranks"][0]["kv_per_token"] == 50_176
    assert set(report["sequences_at"]) == {"1024", "2048", "8192", "32768", "131072"}


def test_gpu_names() -> None:
    assert get_gpu("H100 80GB") == get_gpu("h100_80gb") == get_gpu("h100") == H100
    assert all(get_gpu(name).name == name and GPUS[name].bandwidth for name in GPUS)
    with pytest.raises(RequestError, match="want one of h200, h100-80gb"):
        get_gpu("h900")
    with pytest.raises(RequestError):
        custom_gpu(0)
    assert 84e9 < H100.memory_bytes < 85.6e9


def test_param_bytes_sum_to_weight_bytes() -> None:
    params = param_plan(MINI, 1, 2)
    total = sum(sum(param_bytes(p, MINI, quantize="fp8")) for p in params)
    assert total == weight_bytes(MINI, quantize="fp8", rank=1, size=2)


def modelopt(algo: str = "FP8", exclude: tuple[str, ...] = ("lm_head",), kv: str | None = None) -> QuantConfig:
    body = {"quant_algo": algo, "exclude_modules": [*exclude], "kv_cache_quant_algo": kv}
    return parse_quant_config({}, {"quantization": body})


def test_excluded_modules_keep_their_dtype() -> None:
    partly = modelopt(exclude=("lm_head", "*.self_attn.*"))
    attention, ffn, rest = 7_398_752_256, 40_365_981_696, 2 * 1_050_673_152 + 1_064_960
    parts = weight_bytes_by_kind(SUPER, quant=partly)
    assert sum(parts.values()) - parts["scales"] == 2 * attention + ffn + 2 * rest
    everything = weight_bytes_by_kind(SUPER, quant=modelopt(exclude=()))
    assert everything["lm_head"] == 1_050_673_152
    assert everything["embed"] == 2 * 1_050_673_152
    made = plan(SUPER, gpu=get_gpu("h200"), quant=partly)
    assert made.ranks[0].linears == parts["linear"] == 2 * attention + ffn
    assert made.to_dict()["weight_dtype"] == made.weight_dtype == "partly fp8"


def test_scales_of_a_quantised_checkpoint() -> None:
    rows = 49 * (10240 + 8192) + sum(2 * b.ffn.width + 8192 for b in SUPER.blocks if isinstance(b.ffn, GatedMLP))
    per_row = weight_bytes_by_kind(SUPER, quant=modelopt("FP8_PER_CHANNEL_PER_TOKEN"))
    assert per_row == weight_bytes_by_kind(SUPER, quantize="fp8")
    assert per_row["scales"] == 4 * rows
    # One scale a tensor, and one for its input: qkv and gate_up may need one per row, o and down do not.
    per_tensor = weight_bytes_by_kind(SUPER, quant=modelopt())["scales"]
    assert per_tensor == 4 * (rows - 49 * 8192 - 80 * 8192 + 129 + 2 * 129)


def test_quantize_of_a_quantised_checkpoint() -> None:
    full, partly = modelopt(), modelopt(exclude=("*.mlp.*",))
    assert weight_bytes(SUPER, quantize="fp8", quant=full) == weight_bytes(SUPER, quant=full)
    for call in (weight_bytes, lambda c, **o: plan(c, gpu=H100, **o)):
        with pytest.raises(CheckpointError, match="'fp8' on a checkpoint with 196 of 436 linears in FP8 already"):
            call(SUPER, quantize="fp8", quant=partly)
    with pytest.raises(CapacityError, match="neither FP8 nor 8 such GPUs"):  # a remedy that is refused is not offered
        plan(SUPER, gpu=10**9, quant=partly).require()


def test_kv_dtype_follows_the_checkpoint_then_the_dtype() -> None:
    assert plan(SUPER, gpu=H100, quant=modelopt(kv="FP8")).options.kv_dtype == "fp8"
    assert plan(SUPER, gpu=H100, quant=modelopt(kv="FP8"), kv_dtype="float16").options.kv_dtype == "float16"
    assert plan(SUPER, gpu=H100, dtype="float32").options.kv_dtype == "float32"


def test_workspace_is_of_the_dtype() -> None:
    narrow, wide = (plan(SUPER, gpu=H100, dtype=d).ranks[0] for d in ("auto", "float32"))
    assert wide.activations == 2 * narrow.activations


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_what_was_planned(tmp_path: Path, dtype: str) -> None:
    import torch

    from nemotron_fast.quantize import quantize_checkpoint
    from nemotron_fast.weights import load_weights

    demo, stored, as_torch = demo_folder(), tmp_path / "fp8", getattr(torch, dtype)
    config = ModelConfig.from_path(demo)
    for how in ({}, {"quantize": "fp8"}):
        assert load_weights(demo, config, dtype=as_torch, **how).nbytes == weight_bytes(config, dtype=dtype, **how)
    quantize_checkpoint(demo, stored)
    quant = read_quant_config(stored)
    assert load_weights(stored, config, quant, dtype=as_torch).nbytes == weight_bytes(config, dtype=dtype, quant=quant)
