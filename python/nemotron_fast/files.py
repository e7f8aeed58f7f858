# SPDX-License-Identifier: Apache-2.0
"""Reading files of a folder that nobody here has written: no link leads out of it, and no file is too large."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nemotron_fast.errors import CheckpointError, NemotronFastError

Place = Path | tuple[Path, str]
"""What to read: a file that the user has named, which may be a link, or a folder and the name of a file in it."""


def member(folder: Path, name: str, error: type[NemotronFastError] = CheckpointError) -> Path:
    """The regular file `name` in `folder`.

    A link may not leave the folder, except into the `blobs` folder of a Hugging Face cache
    (<repo>/snapshots/<revision>/file -> <repo>/blobs/...).

    Raises:
        error: not a plain name, not there, not a regular file, or outside the folder.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise error(f"{name!r} must be the plain name of a file in {folder}")
    try:
        real, root = (folder / name).resolve(), folder.resolve()
        is_file = real.is_file()
    except (OSError, RuntimeError) as problem:  # a loop of links, a name that is too long
        raise error(f"cannot follow {name[:80]!r} in {folder}: {problem}") from None
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(place) for place in allowed):
        raise error(f"{folder / name} is a link out of its folder, to {real}; copy the file instead")
    if not is_file:
        raise error(f"{folder / name} is missing or not a regular file; download it again")
    return folder / name


def read_bytes(place: Place, limit: int, error: type[NemotronFastError]) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        error: what `member` refuses, an unreadable file, or a larger one.
    """
    path = place if isinstance(place, Path) else member(*place, error)
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise error(f"{path} has {size} bytes, want at most {limit}")
            data = file.read(limit + 1)  # what is no regular file has no size beforehand
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None
    if len(data) > limit:
        raise error(f"{path} has more than {limit} bytes")
    return data


def read_text(place: Place, limit: int, error: type[NemotronFastError]) -> str:
    """A UTF-8 file of at most `limit` bytes, as text.

    Raises:
        error: as `read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(place, limit, error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{_path(place)} cannot be read as UTF-8: {problem}") from None


def read_json(
    place: Place, limit: int, error: type[NemotronFastError], *, optional: bool = False, unique_keys: bool = False
) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; with `optional` an empty one if there is no such file.

    Raises:
        error: as `read_bytes` and `parse_json`.
    """
    path = _path(place)
    if optional and not os.path.lexists(path):
        return {}
    return parse_json(read_bytes(place, limit, error), str(path), error, unique_keys=unique_keys)


def parse_json(data: bytes, what: str, error: type[NemotronFastError], *, unique_keys: bool = False) -> dict[str, Any]:
    """A JSON object; with `unique_keys` none of its tables may name a key twice.

    Raises:
        error: anything else, also text that is not UTF-8 or nested too deeply.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=table if unique_keys else None)
    except RecursionError:
        raise error(f"{what} is not JSON that can be read: nested too deeply") from None
    except ValueError as problem:  # also UnicodeDecodeError
        raise error(f"{what} is not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{what} is JSON but holds a {type(value).__name__}, want an object")
    return value


def _path(place: Place) -> Path:
    return place if isinstance(place, Path) else place[0] / place[1]
