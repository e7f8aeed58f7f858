# SPDX-License-Identifier: Apache-2.0
"""The model that ships inside the package: a small nemotron-nas checkpoint with every block kind."""

import pathlib

from nemotron_fast.errors import CheckpointError


def demo_folder() -> pathlib.Path:
    """Folder of the demo checkpoint, laid out as a Hugging Face one (config.json, model.safetensors, ...)."""
    return pathlib.Path(__file__).resolve().parent / "demo"


def resolve_model(model: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint folder of a model: "demo", or the path of a folder.

    Raises:
        CheckpointError: no such folder.
    """
    folder = demo_folder() if model == "demo" else pathlib.Path(model).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"no model {str(model)!r}: want a checkpoint folder, or 'demo' for the embedded model")
    return folder
