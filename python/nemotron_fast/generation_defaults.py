# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: a checkpoint's own sampling defaults and end-of-sequence ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_fast.errors import CheckpointError
from nemotron_fast.files import read_json
from nemotron_fast.sampling_params import NEUTRAL, SamplingParams

GENERATION_FILE = "generation_config.json"
MAX_GENERATION_BYTES = 16 << 20


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says about generating."""

    sampling: dict[str, Any] = field(default_factory=dict)  # values for fields of NEUTRAL
    eos_token_ids: tuple[int, ...] = ()


def read_generation_defaults(folder: Path, *, sampling: bool = True) -> GenerationDefaults:
    """The defaults of a checkpoint folder; none if it has no generation_config.json. `do_sample: false` means greedy.

    Without `sampling` only the end-of-sequence ids are looked at.

    Raises:
        CheckpointError: the file cannot be read, is a link out of the folder, or holds values out of range.
    """
    file = folder / GENERATION_FILE
    raw = read_json((folder, GENERATION_FILE), MAX_GENERATION_BYTES, CheckpointError, optional=True)
    try:
        values = {k: raw[k] for k in NEUTRAL if sampling and raw.get(k) is not None}
        if sampling and raw.get("do_sample") is False:
            values = {"temperature": 0.0} | {k: v for k, v in values.items() if k == "repetition_penalty"}
        SamplingParams(**values)
        eos = raw.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return GenerationDefaults(values, tuple(int(i) for i in eos_ids))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}; mend it or pass generation_config='none'") from None
