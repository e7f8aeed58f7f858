# SPDX-License-Identifier: Apache-2.0
"""Files of a folder: links that leave it, sizes, and what is no JSON; by the readers that use them."""

import json
import os

import pytest

from nemotron_fast.checkpoint import Checkpoint
from nemotron_fast.config_reader import read_config_json
from nemotron_fast.errors import CheckpointError, ConfigError
from nemotron_fast.files import member, parse_json, read_bytes, read_json, read_text
from nemotron_fast.generation_defaults import GenerationDefaults, read_generation_defaults


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "outside.json").write_text('{"eos_token_id": 7}')
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["../outside.json", "../nowhere"])
def test_member_stays_in_the_folder(folder, target):
    (folder / "a.json").symlink_to(target)
    for error in (ConfigError, CheckpointError):
        with pytest.raises(error, match="a link out of its folder, to .*; copy the file instead"):
            member(folder, "a.json", error)


def test_links_inside_the_folder_and_of_a_hugging_face_cache(folder, tmp_path):
    (folder / "a.json").write_text("{}")
    (folder / "b.json").symlink_to("a.json")
    assert member(folder, "b.json") == folder / "b.json"
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    assert read_config_json(snapshot) == {"a": 1}
    (tmp_path / "link").symlink_to(snapshot)  # the folder that the user names may be a link
    assert read_config_json(tmp_path / "link") == {"a": 1}


@pytest.mark.parametrize("name", ["", ".", "..", "../outside.json", "a\\b", "a\0"])
def test_member_wants_a_plain_name(folder, name):
    with pytest.raises(CheckpointError, match="must be the plain name of a file"):
        member(folder, name)


def test_member_wants_a_regular_file(folder):
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    for name in ("pipe", "dangling", "missing", "loop"):
        with pytest.raises(ConfigError, match="missing or not a regular file|cannot follow"):
            read_json((folder, name), 100, ConfigError)


def test_sizes(folder):
    (folder / "a.json").write_text(json.dumps("x" * 98))
    assert len(read_bytes((folder, "a.json"), 100, ConfigError)) == 100
    with pytest.raises(ConfigError, match="has 100 bytes, want at most 99"):
        read_bytes((folder, "a.json"), 99, ConfigError)
    with pytest.raises(ConfigError, match="/dev/zero has more than 99 bytes"):
        read_bytes(folder / "/dev/zero", 99, ConfigError)


@pytest.mark.parametrize(
    "data, problem",
    [
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON: .*utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[]", "holds a list, want an object"),
        (b"null", "holds a NoneType, want an object"),
    ],
)
def test_what_is_no_json_object(folder, data, problem):
    (folder / "a.json").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"a\.json {problem}|a\.json .*{problem}"):
        read_json((folder, "a.json"), 1 << 20, ConfigError)


def test_optional_files_and_repeated_keys(folder):
    assert read_json((folder, "a.json"), 9, ConfigError, optional=True) == {}
    assert parse_json(b'{"a": 1, "a": 2}', "x", ConfigError) == {"a": 2}
    with pytest.raises(ConfigError, match="x is not JSON: a key occurs twice"):
        parse_json(b'{"b": {"a": 1, "a": 2}}', "x", ConfigError, unique_keys=True)
    (folder / "a").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_text((folder, "a"), 9, ConfigError)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_configs_found_in_a_folder_may_not_be_links_out_of_it(folder, name):
    (folder / name).symlink_to("../outside.json")
    with pytest.raises(ConfigError, match="is a link out of its folder"):
        read_config_json(folder if name == "config.json" else folder / name)


def test_a_config_that_the_user_names_may_be_a_link(folder):
    (folder / "config.json").symlink_to("../outside.json")
    assert read_config_json(folder / "config.json") == {"eos_token_id": 7}


def test_generation_config(folder):
    assert read_generation_defaults(folder) == GenerationDefaults()
    file = folder / "generation_config.json"
    file.symlink_to("../outside.json")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        read_generation_defaults(folder)
    file.unlink()
    file.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_generation_defaults(folder)
    file.write_bytes(b" " * ((16 << 20) + 1))
    with pytest.raises(CheckpointError, match="want at most 16777216"):
        read_generation_defaults(folder)


def test_weight_index(folder):
    (folder / "model.safetensors.index.json").symlink_to("../outside.json")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        Checkpoint.open(folder)
