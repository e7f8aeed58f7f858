# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of the element types, as plain data: for options, plans and file headers, without torch."""

from __future__ import annotations

from collections.abc import Collection

from nemotron_fast.errors import RequestError

FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of activations and unquantised weights
FP8 = "fp8"  # float8_e4m3fn: quantised linears and the KV cache
DTYPE_BYTES = FLOAT_BYTES | {FP8: 1}
STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", FP8: "F8_E4M3"}  # in safetensors headers

FP8_MAX = 448.0  # largest finite float8_e4m3fn
SCALE_BYTES = FLOAT_BYTES["float32"]


def dtype_name(name: str, auto: str, choices: Collection[str] = DTYPE_BYTES, what: str = "dtype") -> str:
    """`name`, or `auto` where it is "auto".

    Raises:
        RequestError: not one of `choices`; the message calls it `what`.
    """
    if name != "auto" and name not in choices:
        raise RequestError(f"{what}={name!r}, want 'auto' or one of {', '.join(choices)}")
    return auto if name == "auto" else name
