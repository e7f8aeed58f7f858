# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint, read by the oracle: size, block kinds, recorded loss, text that reads as English."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import oracle

from nemotron_fast.models import demo_folder

FILES = ["config.json", "generation_config.json", "held_out.txt", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "training.json"]
# Words of the greedy text that a 6 KB excerpt need not hold.
COMMON_WORDS = set(re.findall(r"\w+", """
a about after again all am an and any are art as at away be been before being blood brother but by
call can come could daughter day dead dear death did do does done dost doth down duke each ere every
eye eyes fair false father fear first for friend from full gentle gentleman gentlemen give go god
gods good grace great ha had hand hands hast hath have he hear heart heaven her here him his honour
hope house how i if in is it juliet king know lady leave let life like live long look lord lords
love loved madam made make man many may me men mine more most mother much must my myself name nay
never night no noble none not nothing now o of old on once one or other our out own part peace place
play poor pray prince queen romeo say see self send set shall shalt she should sir sister so some
son soul speak stand stay still such sweet take tell than that the thee their them then there these
they thine thing things think this those thou though thought thousand thus thy time tis to together
tomorrow tongue too true truth two under unto up upon us very villain was way we well went were what
when where which while who why wife will wilt with without woman word words world would ye yet you
young your
"""))


@pytest.fixture(scope="module")
def demo() -> tuple[dict, dict[str, torch.Tensor], Tokenizer, dict]:
    folder = demo_folder()
    config, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "training"))
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    double = {name: weight.double() for name, weight in weights.items()}
    return config, double, Tokenizer.from_file(str(folder / "tokenizer.json")), training


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_files_and_size(demo):
    folder = demo_folder()
    assert sorted(f.name for f in folder.iterdir()) == FILES
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8_000_000
    assert 2_000_000 <= sum(w.numel() for w in demo[1].values()) <= 4_000_000


def test_every_block_kind(demo):
    config, weights, _, _ = demo
    kinds = oracle.layer_kinds(config)
    mixers, ffns = {mixer for mixer, _ in kinds}, {ffn for _, ffn in kinds}
    assert mixers == {1, 2, 4, "linear", None} and ffns == {256, 512, 768, "linear", None}
    assert kinds[0][0] is None and kinds[0][1] is not None  # the first block has no attention
    assert (None, None) in kinds
    assert any(isinstance(mixer, int) and ffn is None for mixer, ffn in kinds)
    schemas = [block["ffn"].keys() & {"ffn_mult", "intermediate_size"} for block in config["block_configs"]]
    assert {"ffn_mult"} in schemas and {"intermediate_size"} in schemas
    shapes = oracle.parameter_shapes(config)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes


def test_tokenizer(demo):
    config, _, tokenizer, _ = demo
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|begin_of_text|>") == config["bos_token_id"]
    assert tokenizer.token_to_id("<|end_of_text|>") in config["eos_token_id"]
    text = (demo_folder() / "held_out.txt").read_text() + "naïve £5 \t\n 東京 🙂"
    ids = tokenizer.encode(text).ids
    assert ids[0] == config["bos_token_id"] and config["bos_token_id"] not in ids[1:]
    assert tokenizer.decode(ids) == text  # every byte has a token


def test_held_out_loss_as_recorded(demo):
    """training.json's definition: windows of ids, each after a BOS of its own, mean over all ids."""
    config, weights, tokenizer, training = demo
    held_out, bos = training["held_out"], config["bos_token_id"]
    text = (demo_folder() / held_out["text"]).read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == held_out["tokens"] and 4000 <= len(text) <= 8000
    total = 0.0
    for start in range(0, len(ids), held_out["window_tokens"]):
        window = ids[start:start + held_out["window_tokens"]]
        log_p = oracle.forward(config, weights, [bos, *window[:-1]]).log_softmax(dim=1)
        total -= float(log_p[range(len(window)), window].sum())
    assert total / len(ids) == pytest.approx(held_out["loss_nats_per_token"], abs=0.01)
    assert held_out["loss_nats_per_token"] < 3.6  # an untrained model has ln 1536 = 7.3


def test_greedy_text_is_english(demo):
    config, weights, tokenizer, training = demo
    prompt, n = training["greedy_sample"]["prompt"], 60
    ids = oracle.greedy(config, weights, tokenizer.encode(prompt).ids, n)
    found = words(tokenizer.decode(ids))[:-1]  # the last word may be cut
    known = COMMON_WORDS | set(words((demo_folder() / "held_out.txt").read_text()))
    unknown = [word for word in found if word not in known and len(word) > 1]  # single letters: 's, 'd, ...
    assert len(found) >= 30 and len(unknown) <= 0.1 * len(found), (found, unknown)
    assert len(set(found)) >= 15, found  # not one word over and over
