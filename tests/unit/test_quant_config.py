# SPDX-License-Identifier: Apache-2.0
"""quant_config: what is read, what is refused by name, how modules are matched, and that nothing else escapes."""

import copy
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fast.errors import ConfigError
from nemotron_fast.quant_config import Fp8Scheme, parse_quant_config, read_quant_config

STATIC, DYNAMIC = Fp8Scheme("tensor", "static"), Fp8Scheme("channel", "dynamic")
FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}
Q_PROJ = "model.layers.3.self_attn.q_proj"


def modelopt(algo="FP8", kv="FP8", **body):
    return {
        "producer": {"name": "modelopt", "version": "0.31.0"},
        "quantization": {"quant_algo": algo, "kv_cache_quant_algo": kv, "exclude_modules": ["lm_head"], **body},
    }


def embedded_modelopt(**body):
    return {
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "ignore": ["lm_head"],
            "kv_cache_scheme": FLOAT8,
            "config_groups": {"group_0": {"input_activations": FLOAT8, "weights": FLOAT8, "targets": ["Linear"]}},
            **body,
        }
    }


def compressed(weights=None, inputs=None, group=None, **body):
    args = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    weights = {**args, "strategy": "channel", "dynamic": False, **(weights or {})}
    inputs = {**args, "strategy": "token", "dynamic": True, **(inputs or {})}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": 1.5,
            "kv_cache_scheme": None,
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": inputs,
                    "output_activations": None,
                    **(group or {}),
                }
            },
            **body,
        }
    }


def test_not_quantised():
    assert parse_quant_config({}, None) is None
    assert parse_quant_config({"quantization_config": None}, None) is None
    assert parse_quant_config({}, modelopt(algo=None, kv=None)) is None


@pytest.mark.parametrize("files", [({}, modelopt()), (embedded_modelopt(), None), (embedded_modelopt(), modelopt())])
def test_modelopt_fp8(files):
    quant = parse_quant_config(*files)
    assert quant.method == "modelopt" and quant.kv_cache_fp8
    assert quant.scheme_for(Q_PROJ) == STATIC
    assert quant.scheme_for("model.layers.0.mlp.linear_mlp") == STATIC
    assert quant.scheme_for("lm_head") is None


def test_modelopt_variants():
    quant = parse_quant_config({}, modelopt("FP8_PER_CHANNEL_PER_TOKEN", kv=None))
    assert quant.scheme_for(Q_PROJ) == DYNAMIC and not quant.kv_cache_fp8
    kv_only = parse_quant_config({}, modelopt(algo=None))
    assert kv_only.kv_cache_fp8 and not kv_only.quantizes_weights and kv_only.scheme_for(Q_PROJ) is None
    without_list = modelopt()
    del without_list["quantization"]["exclude_modules"]
    assert parse_quant_config({}, without_list).scheme_for("lm_head") is None
    assert parse_quant_config({}, modelopt(exclude_modules=[])).scheme_for("lm_head") == STATIC


@pytest.mark.parametrize(
    "pattern,excluded",
    [
        ("*lm_head*", ["lm_head"]),
        ("*self_attn*", [Q_PROJ]),
        ("model.layers.3.*", [Q_PROJ]),
        ("model.layers.3", [Q_PROJ]),
        ("self_attn.q_proj", [Q_PROJ]),
        ("model.layers.[34].self_attn.?_proj", [Q_PROJ]),
        ("layers.1", []),
        ("q_pro", []),
    ],
)
def test_modelopt_wildcards(pattern, excluded):
    quant = parse_quant_config({}, modelopt(exclude_modules=[pattern]))
    for name in (Q_PROJ, "lm_head", "model.layers.13.mlp.up_proj"):
        assert (quant.scheme_for(name) is None) == (name in excluded), name


def test_mixed_precision():
    layers = {Q_PROJ: {"quant_algo": "FP8"}, "model.layers.4.mlp.up_proj": {"quant_algo": None}}
    quant = parse_quant_config({}, modelopt("MIXED_PRECISION", quantized_layers=layers))
    assert quant.scheme_for(Q_PROJ) == STATIC
    assert quant.scheme_for("model.layers.4.mlp.up_proj") is None
    assert quant.scheme_for("model.layers.5.self_attn.q_proj") is None
    layers["lm_head"] = {"quant_algo": "NVFP4", "group_size": 16}
    with pytest.raises(ConfigError, match=r"quantized_layers\['lm_head'\].*NVFP4"):
        parse_quant_config({}, modelopt("MIXED_PRECISION", quantized_layers=layers))


@pytest.mark.parametrize("grain", ["tensor", "channel"])
@pytest.mark.parametrize(
    "inputs,activation",
    [({"strategy": "token", "dynamic": True}, "dynamic"), ({"strategy": "tensor", "dynamic": False}, "static")],
)
def test_compressed_tensors(grain, inputs, activation):
    quant = parse_quant_config(compressed({"strategy": grain}, inputs), None)
    assert quant.scheme_for(Q_PROJ) == Fp8Scheme(grain, activation)
    assert quant.scheme_for("lm_head") is None and not quant.kv_cache_fp8


@pytest.mark.parametrize(
    "pattern,excluded",
    [
        (Q_PROJ, True),
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("re:.*self_attn.*", True),
        ("re:.*\\.layers\\.3\\..*", True),
        ("re:model\\.layers\\.\\d+\\.(self_attn|mlp)\\.[qk]_proj$", True),
        ("re:self_attn", False),
        ("model.layers.3", False),
        ("proj", False),
        ("*q_proj", False),
        ("Linear", False),
    ],
)
def test_compressed_tensors_names(pattern, excluded):
    assert (parse_quant_config(compressed(ignore=[pattern]), None).scheme_for(Q_PROJ) is None) == excluded


def test_compressed_tensors_names_go_before_the_class():
    raw = compressed()
    groups = raw["quantization_config"]["config_groups"]
    groups["group_1"] = copy.deepcopy(groups["group_0"]) | {"targets": ["re:.*q_proj$"]}
    groups["group_1"]["weights"]["strategy"] = "tensor"
    quant = parse_quant_config(raw, None)
    assert quant.scheme_for(Q_PROJ).weight == "tensor"
    assert quant.scheme_for("model.layers.3.self_attn.o_proj").weight == "channel"


def test_compressed_tensors_kv_cache():
    assert parse_quant_config(compressed(kv_cache_scheme=FLOAT8 | {"strategy": "tensor"}), None).kv_cache_fp8


@pytest.mark.parametrize(
    "raw,match",
    [
        ({"quantization_config": {"quant_method": name}}, repr(name))
        for name in ("awq", "gptq", "bitsandbytes", "fp8", "modelopt_fp4", "fbgemm_fp8", None)
    ]
    + [
        ({"quantization_config": []}, "quantization_config is list"),
        (embedded_modelopt(quant_algo="NVFP4"), "NVFP4"),
        (embedded_modelopt(quant_algo="W4A16_AWQ"), "W4A16_AWQ"),
        (embedded_modelopt(quant_algo="FP8_PB_WO"), "FP8_PB_WO"),
        (embedded_modelopt(quant_algo=None), "config_groups without quant_algo"),
        (embedded_modelopt(kv_cache_scheme="NVFP4"), "KV cache scheme 'NVFP4'"),
        (embedded_modelopt(ignore="lm_head"), "ignore / exclude_modules is str"),
        (compressed(format="pack-quantized"), "pack-quantized"),
        (compressed(group={"format": "nvfp4-pack-quantized"}), "nvfp4-pack-quantized"),
        (compressed({"num_bits": 4}), r"weights has .*\('float', 4, True\)"),
        (compressed({"type": "int"}), r"\('int', 8, True\)"),
        (compressed({"strategy": "block"}), "strategy='block'"),
        (compressed(group={"input_activations": None}), "input_activations is None"),
        (compressed(inputs={"strategy": "group"}), "strategy='group'"),
        (compressed(inputs={"strategy": "tensor"}), "strategy='tensor' dynamic=True"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24"),
        (compressed(kv_cache_scheme=FLOAT8 | {"strategy": "attn_head"}), "attn_head"),
        (compressed(kv_cache_scheme=FLOAT8 | {"num_bits": 4}), "KV cache scheme"),
        (compressed(ignore=["re:("]), "not a regular expression"),
    ],
)
def test_refused_by_name(raw, match):
    with pytest.raises(ConfigError, match=match) as caught:
        parse_quant_config(raw, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kv,exclude", [(None, ["lm_head"]), ("FP8", ["lm_head", "*q_proj"])])
def test_contradicting_files(kv, exclude):
    with pytest.raises(ConfigError, match=r"config\.json says .* but hf_quant_config\.json says .*; remove"):
        parse_quant_config(embedded_modelopt(), modelopt(kv=kv, exclude_modules=exclude))
    with pytest.raises(ConfigError, match="remove"):
        parse_quant_config(compressed(), modelopt())


@pytest.mark.parametrize(
    "pattern", ["re:(a+)+$", "re:" + "(.|.)" * 40, "re:" + ".*" * 20 + "x", "re:(?=a)*", "x" * 300]
)
def test_patterns_that_could_hang_are_refused(pattern):
    start = time.process_time()
    with pytest.raises(ConfigError, match="pattern"):
        parse_quant_config(compressed(ignore=[pattern]), None)
    assert time.process_time() - start < 1


def test_read_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_quant_config(tmp_path) is None
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(modelopt()))
    assert read_quant_config(tmp_path).scheme_for(Q_PROJ) == STATIC
    (tmp_path / "hf_quant_config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="not JSON"):
        read_quant_config(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["FP8", "float-quantized", "re:(", "re:.*", "Linear", "tensor", "token"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    ("quantization_config", *rest)
    for rest in (
        (),
        ("quant_algo",),
        ("ignore",),
        ("kv_cache_scheme",),
        ("config_groups",),
        ("format",),
        ("sparsity_config",),
        ("config_groups", "group_0"),
        ("config_groups", "group_0", "targets"),
        ("config_groups", "group_0", "weights"),
        ("config_groups", "group_0", "weights", "strategy"),
        ("config_groups", "group_0", "input_activations"),
        ("config_groups", "group_0", "input_activations", "dynamic"),
        ("quantized_layers",),
    )
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([embedded_modelopt(), compressed()]), st.sampled_from(PATHS), JSON, st.none() | JSON)
def test_any_json_is_read_or_refused(raw, path, value, other):
    raw = copy.deepcopy(raw)
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        quant = parse_quant_config(raw, other)
    except ConfigError:
        return
    assert quant is None or isinstance(quant.scheme_for(Q_PROJ), Fp8Scheme | None)


def test_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import nemotron_fast.quant_config"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_long_lists_are_matched_quickly():
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(400) for part in ("gate", "up", "down")]
    layers = {name: {"quant_algo": "FP8"} for name in names}
    mixed = parse_quant_config({}, modelopt("MIXED_PRECISION", quantized_layers=layers))
    ignoring = parse_quant_config(compressed(ignore=[f"re:{name}$" for name in names]), None)
    start = time.process_time()
    assert all(mixed.scheme_for(name) == STATIC and ignoring.scheme_for(name) is None for name in names)
    assert time.process_time() - start < 10
