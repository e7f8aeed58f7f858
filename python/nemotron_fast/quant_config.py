# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is quantised: config.json's `quantization_config` and ModelOpt's hf_quant_config.json.

Read formats, all with float8_e4m3fn weights:

    modelopt            quant_algo FP8 (a scale per tensor, static activations), FP8_PER_CHANNEL_PER_TOKEN (a
                        scale per output row, dynamic activations), MIXED_PRECISION whose layers are all FP8
    compressed-tensors  format float-quantized, weights per tensor or per channel, activations static per
                        tensor or dynamic per token

Everything else is refused by its name. Sources: NVIDIA Model-Optimizer `modelopt/torch/export/quant_utils.py`
and `convert_hf_config.py`; the compressed-tensors package, `quant_config.py` and `utils/match.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemotron_fast.config import read_config_json
from nemotron_fast.errors import ConfigError, Problems
from nemotron_fast.module_patterns import matches_target, matches_wildcard, read_patterns

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
MODELOPT_FILE = "hf_quant_config.json"
SUPPORTED = "ModelOpt FP8 or compressed-tensors float-quantized FP8"


@dataclass(frozen=True)
class Fp8Scheme:
    """One linear in float8_e4m3fn: its weight scales, and where its activation scale comes from."""

    weight: Literal["tensor", "channel"]  # one scale, or one per output row
    activation: Literal["static", "dynamic"]  # one stored scale, or one computed per token


FP8_STATIC = "fp8-static"  # the name of MODELOPT_FP8 where options choose how to quantise

Rule = tuple[str, Fp8Scheme]  # target pattern -> scheme
_ALGORITHMS = {
    "FP8": Fp8Scheme("tensor", "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8Scheme("channel", "dynamic"),
}


@dataclass(frozen=True)
class QuantConfig:
    """Which modules are FP8 and how. Equal configs state the same thing, whichever file they came from."""

    method: str  # MODELOPT or COMPRESSED
    kv_cache_fp8: bool  # the checkpoint is meant to run with an FP8 KV cache
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...]  # patterns of the modules left in the activation dtype, sorted

    @property
    def quantizes_weights(self) -> bool:
        """False where only the KV cache is quantised."""
        return bool(self.rules)

    def scheme_for(self, module_name: str) -> Fp8Scheme | None:
        """Scheme of a linear such as "model.layers.3.self_attn.q_proj" or "lm_head"; None: not quantised.

        ModelOpt patterns are wildcards, and also match what lies inside a named module. Patterns of
        compressed-tensors are names, ends of names, `re:` expressions, or the class name "Linear", which
        yields to a name.
        """
        matches = matches_wildcard if self.method == MODELOPT else matches_target
        if any(matches(pattern, module_name) for pattern in self.ignore):
            return None
        by_name = [s for target, s in self.rules if target != "Linear" and matches(target, module_name)]
        by_class = [s for target, s in self.rules if target == "Linear"]
        return next(iter(by_name + by_class), None)


# The layout of NVIDIA's own FP8 checkpoints.
MODELOPT_FP8 = QuantConfig(MODELOPT, False, (("*", _ALGORITHMS["FP8"]),), ("lm_head",))


def read_quant_config(folder: str | Path) -> QuantConfig | None:
    """How the checkpoint in `folder` is quantised; None: not at all.

    Raises:
        ConfigError: unreadable, unsupported or contradictory files.
    """
    file = Path(folder) / MODELOPT_FILE
    return parse_quant_config(read_config_json(folder), read_config_json(file) if file.exists() else None)


def parse_quant_config(config_json: dict[str, Any], hf_quant_json: dict[str, Any] | None = None) -> QuantConfig | None:
    """Read the parsed config.json and, if there is one, hf_quant_config.json; None: not quantised.

    Raises:
        ConfigError: naming every unsupported option, or the two files disagree.
    """
    found: dict[str, QuantConfig | None] = {}
    embedded = _object(config_json, "config.json").get("quantization_config")
    if embedded is not None:
        found["config.json"] = _parse_embedded(_object(embedded, "quantization_config"))
    if hf_quant_json is not None:
        found[MODELOPT_FILE] = _parse_modelopt_file(_object(hf_quant_json, MODELOPT_FILE))
    if len({*found.values()}) > 1:
        told = " but ".join(f"{f} says {c or 'not quantised'}"[:300] for f, c in found.items())
        raise ConfigError(f"{told}; remove the file or the entry that is wrong")
    return next(iter(found.values()), None)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is {type(value).__name__}, want an object")
    return value


def _parse_embedded(raw: dict[str, Any]) -> QuantConfig | None:
    """The `quantization_config` object of config.json."""
    problems = Problems()
    method = raw.get("quant_method")
    if method == MODELOPT:
        config = _parse_modelopt(raw, raw.get("ignore"), raw.get("kv_cache_scheme"), problems)
    elif method == COMPRESSED:
        config = _parse_compressed(raw, problems)
    else:
        raise ConfigError(f"quant_method={method!r} is not supported, want {SUPPORTED}")
    problems.raise_if_any(ConfigError, "quantization_config")
    return config


def _parse_modelopt_file(raw: dict[str, Any]) -> QuantConfig | None:
    """hf_quant_config.json: {producer, quantization: {quant_algo, kv_cache_quant_algo, exclude_modules}}."""
    problems = Problems()
    body = _object(raw.get("quantization"), f"{MODELOPT_FILE}: quantization")
    config = _parse_modelopt(body, body.get("exclude_modules"), body.get("kv_cache_quant_algo"), problems)
    problems.raise_if_any(ConfigError, MODELOPT_FILE)
    return config


def _parse_modelopt(body: dict[str, Any], ignore: Any, kv: Any, problems: Problems) -> QuantConfig | None:
    """The part that both ModelOpt files share.

    Without a list of excluded modules lm_head is excluded, as in all standard recipes. `config_groups` only
    repeats `quant_algo` (and calls dynamic activations static), so it is not read.
    """
    algo = body.get("quant_algo")
    rules: list[Rule] = []
    if algo == "MIXED_PRECISION":
        layers = body.get("quantized_layers")
        if problems.require(isinstance(layers, dict), "MIXED_PRECISION without an object quantized_layers"):
            for name, layer in layers.items():
                layer_algo = layer.get("quant_algo") if isinstance(layer, dict) else layer
                scheme = _modelopt_scheme(layer_algo, f"quantized_layers[{name!r}].", problems)
                rules += [(name, scheme)] if scheme else []
    else:
        scheme = _modelopt_scheme(algo, "", problems)
        rules += [("*", scheme)] if scheme else []
    if algo is None and body.get("config_groups"):
        problems.add("config_groups without quant_algo")
    kv_fp8 = _parse_kv_scheme({"num_bits": 8, "type": "float"} if kv == "FP8" else kv, problems)
    excluded = ("lm_head",) if ignore is None else read_patterns(ignore, "ignore / exclude_modules", problems)
    return _finish(MODELOPT, kv_fp8, rules, excluded)


def _modelopt_scheme(algo: Any, where: str, problems: Problems) -> Fp8Scheme | None:
    scheme = _ALGORITHMS.get(algo) if isinstance(algo, str) else None
    if not scheme and algo is not None:
        problems.add(f"{where}quant_algo={algo!r} is not supported, want {SUPPORTED}")
    return scheme


def _parse_compressed(raw: dict[str, Any], problems: Problems) -> QuantConfig | None:
    groups = raw.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise ConfigError(f"config_groups is {type(groups).__name__}, want an object")
    formats = {"float-quantized", "mixed-precision"} if groups else {"float-quantized", "dense", None}
    _require_in(raw, "format", formats, "", problems)
    _require_in(raw, "quantization_status", {"compressed", "frozen", None}, "", problems)
    for key in ("sparsity_config", "transform_config"):
        value = raw.get(key)
        problems.require(not value or value == {"format": "dense"}, f"{key}={value!r} is not supported")
    rules: list[Rule] = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise ConfigError(f"{where} is {type(group).__name__}, want an object")
        problems.require(not group.get("output_activations"), f"{where}.output_activations is not supported")
        kind = {"format": group.get("format") or raw.get("format")}
        _require_in(kind, "format", {"float-quantized"}, f"{where}.", problems)
        scheme = _compressed_scheme(group, where, problems)
        targets = read_patterns(group.get("targets"), f"{where}.targets", problems)
        rules += [(target, scheme) for target in targets] if scheme else []
    kv_fp8 = _parse_kv_scheme(raw.get("kv_cache_scheme"), problems)
    ignore = read_patterns(raw.get("ignore") or [], "ignore", problems)
    return _finish(COMPRESSED, kv_fp8, rules, ignore)


def _compressed_scheme(group: dict[str, Any], where: str, problems: Problems) -> Fp8Scheme | None:
    """Scheme of one group; None, and a problem, unless weights and activations are both FP8 as supported."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    for part, args in (("weights", weights), ("input_activations", inputs)):
        if not isinstance(args, dict):
            problems.add(f"{where}.{part} is {args!r}, want FP8 weights with FP8 activations ({SUPPORTED})")
            return None
        got = (args.get("type"), args.get("num_bits"), args.get("symmetric", True))
        if got != ("float", 8, True):
            problems.add(f"{where}.{part} has (type, num_bits, symmetric)={got}, want {SUPPORTED}")
            return None
    grain = weights.get("strategy")
    moving = (inputs.get("strategy"), inputs.get("dynamic") or False)
    problems.require(not weights.get("dynamic"), f"{where}.weights: dynamic scales are not supported")
    if grain not in ("tensor", "channel"):
        problems.add(f"{where}.weights.strategy={grain!r} is not supported, want 'tensor' or 'channel'")
    elif moving not in (("token", True), ("tensor", False)):
        got = f"strategy={moving[0]!r} dynamic={moving[1]!r}"
        problems.add(f"{where}.input_activations has {got}, want dynamic 'token' or static 'tensor'")
    else:
        return Fp8Scheme(grain, "dynamic" if moving[1] else "static")
    return None


def _parse_kv_scheme(value: Any, problems: Problems) -> bool:
    """True for {num_bits 8, type float, static, per tensor}; absent means not quantised."""
    if value is None:
        return False
    fields = value if isinstance(value, dict) else {}
    grain = (fields.get("dynamic") or False, fields.get("strategy") or "tensor")
    ok = (fields.get("type"), fields.get("num_bits"), *grain) == ("float", 8, False, "tensor")
    return problems.require(ok, f"KV cache scheme {value!r} is not supported, want FP8 with one static scale")


def _require_in(raw: dict[str, Any], key: str, wanted: set[str | None], where: str, problems: Problems) -> None:
    value = raw.get(key)
    known = (value is None or isinstance(value, str)) and value in wanted
    problems.require(known, f"{where}{key}={value!r} is not supported, want {SUPPORTED}")


def _finish(method: str, kv_fp8: bool, rules: list[Rule], ignore: tuple[str, ...]) -> QuantConfig | None:
    config = QuantConfig(method, kv_fp8, tuple(sorted(rules, key=lambda r: r[0])), tuple(sorted(set(ignore))))
    return config if rules or kv_fp8 else None
