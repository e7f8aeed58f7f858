# SPDX-License-Identifier: Apache-2.0
"""Reading config.json: the file, typed look-ups that collect problems, and the options that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_fast.errors import ConfigError, Problems
from nemotron_fast.files import read_json

MAX_CONFIG_BYTES = 16 << 20
_FOUND_BESIDE = "hf_quant_config.json"  # never named by the user: it lies in the folder of a config.json

# fmt: off
# Keys that say nothing about what inference computes, or that are read elsewhere (quantisation).
_NEUTRAL_KEYS = frozenset({
    "architectures", "attention_dropout", "auto_map", "chunk_size_feed_forward", "dtype", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "quantization_config", "return_dict", "sep_token_id", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache",
})
_READ_KEYS = frozenset({
    "block_configs", "bos_token_id", "eos_token_id", "head_dim", "hidden_size", "intermediate_size",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
})
# Keys with the one value under which the model is a plain Llama stack.
_REQUIRED_VALUES = {
    "attention_bias": False, "mlp_bias": False, "o_proj_bias": False, "hidden_act": "silu", "pretraining_tp": 1,
    "position_embedding_type": "rope", "is_decoder": True,
}
# fmt: on


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The parsed config.json at `path`: the file, which may be a link, or its folder, which a link may not leave.

    Raises:
        ConfigError: no such file, a link out of the folder, larger than 16 MiB, or not a JSON object.
    """
    file = Path(path)
    named_by_folder = file.is_dir()
    file = file / "config.json" if named_by_folder else file
    if not file.exists():
        raise ConfigError(f"cannot read {file}: No such file; give a checkpoint folder or its config.json")
    if named_by_folder or file.name == _FOUND_BESIDE:
        return read_json((file.parent, file.name), MAX_CONFIG_BYTES, ConfigError)
    return read_json(file, MAX_CONFIG_BYTES, ConfigError)


class ConfigReader:
    """Typed look-ups that record a problem and go on with a harmless value."""

    def __init__(self, raw: dict[str, Any], problems: Problems) -> None:
        self._raw, self._problems = raw, problems

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._raw.get(key, default)
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
        return value if self._problems.require(ok, f"{key} is {value!r}, want a positive integer") else 1

    def number(self, key: str, default: float | None = None) -> float:
        value = self._raw.get(key, default)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300
        return float(value) if self._problems.require(ok, f"{key} is {value!r}, want a positive number") else 1.0

    def boolean(self, key: str, default: bool) -> bool:
        value = default if self._raw.get(key) is None else self._raw[key]
        self._problems.require(isinstance(value, bool), f"{key} is {value!r}, want true or false")
        return value is True

    def token_ids(self, key: str, vocab: int) -> tuple[int, ...]:
        value = self._raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        ok = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab for i in ids)
        return (
            tuple(ids) if self._problems.require(ok, f"{key} is {value!r}, want ids below vocab_size={vocab}") else ()
        )


def refuse_unsupported(raw: dict[str, Any], problems: Problems) -> None:
    for key, value in raw.items():
        if key.startswith("_") or key in _NEUTRAL_KEYS or key in _READ_KEYS or value is None:
            continue
        if key in _REQUIRED_VALUES:
            want = _REQUIRED_VALUES[key]
            problems.require(value == want, f"{key}={value!r} is not supported, want {want!r}")
        elif value is not False:
            problems.add(f"unknown option {key}={value!r}")
