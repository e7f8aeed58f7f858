# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint, read by the oracle: size, block kinds, recorded loss, text that reads as English."""

import json
import re

import oracle
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from nemotron_fast.models import demo_folder

FILES = [
    "config.json",
    "generation_config.json",
    "held_out.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
]
# The 900 commonest words of the training text, single letters aside.
COMMON_WORDS = set(
    re.findall(
        r"\w+",
        """
about above achilles act action after again against age ah air ajax alas all almost alone along already am an and
andrew angelo anne anon another answer antipholus antonio antony any apemantus appear are arm armado arms art as aside
ask at attend attendants away ay back bad banish baptista bardolph base bassanio bastard battle be bear bears beat
beatrice beauty because become bed been before begin behind behold being believe benedick berowne bertram beseech
besides best better between bianca bid black bless blood bloody body bold bolingbroke born bosom both bound boy brave
break breath bring brother brought brutus buckingham business but by caesar caius call came camillo can cannot canst
captain capulet cardinal care case cassio cassius cause celia certain chamber change charge charles child children
citizen city clarence claudio cleopatra clifford clown cold come comes comfort coming command common company confess
conscience content coriolanus costard could counsel count countess country course court cousin cressida crown cry cut
dare daughter day days de dead dear death deed deeds deep deliver demetrius deny desdemona desire devil did didst die
do does dog don done door dost doth doubt down draw dream drink dromio duchess duke dull duty each ear ears earth eat
edward either elizabeth else em emilia en end enemies enemy england english enobarbus enough enter entreat ephesus er
ere even ever every excellent exeunt exit eye eyes face fair faith fal fall false falstaff far fare farewell fast
father fault favour fear fell fellow fetch fie field fight find fire first fit five flesh flourish fly follow fool
foot for force ford form forth fortune fortunes foul found four france free french friar friend friends from full
further gave general gentle gentleman gentlemen get give given gives glad gloster glou gloucester go god gods goes
going gold gone good got grace gracious grant grave great green grief ground grow guard ha had hair half ham hand
hands hang happy hard hark harry has hast haste hastings hate hath have having he head hear heard heart hearts heaven
heavens heavy hector heir helena hell help hence henry her here hero hide high highness him himself his hither ho hold
holy home honest honour honourable hope horse hortensio host hot hour hours house how hundred husband iago if ii iii
ill in indeed into is isabella issue it itself iv john joy julia juliet just justice keep kent kill kind king kings
kiss knave knew knight know known knows lack ladies lady lafeu land last late law lay lead lear learn leave left
leonato leontes less lest let letter letters lie liege lies life light like lion lips little live lives living ll
london long longer look looks lord lords lordship lose loss lost lov love loves loving lucentio lucio lucius macbeth
mad madam made maid majesty make makes malvolio man many march marcius marcus margaret maria mark marriage married
marry master matter may me mean means meet men menenius mercy merry messenger met methinks might mighty mind mine
mistress mock money moon more morning morrow most mother mouth mrs much murder murderer music must my myself name
nature nay ne near need needs neither never new news next night no noble none nor norfolk northumberland not note
nothing now nurse oath of off offer office oft often old olivia on once one only open or orlando othello other others
our ourselves out over own page palace pale pandarus pardon paris parolles part parts pass passion past patience pay
peace pedro people pericles person petruchio pistol pity place plain play please pleasure pluck point pompey poor
portia power pr praise pray present presently pretty pride prince princes princess proteus proud prove provost purpose
put queen question quickly rage rather re read ready reason red remember report rest return revenge rich richard right
ring rome romeo room rosalind royal run sad said saint sake salisbury same save saw say says scene scorn sea sebastian
second see seek seem seems seen self send sense sent servant serve service set shall shallow shalt shame she shepherd
should show shows sicinius sick side sight signior silence silvia simple sin since sing sir sirrah sister sit slain
slave sleep slender so soft soldier soldiers some somerset something son sons soon sorrow soul souls sound sovereign
speak speaks speech speed spirit spirits spoke sport st stand stands state stay still straight strange strength strike
strong such suffolk suit sun sure swear sweet sword sworn syracuse take takes talbot tale talk teach tears tell ten
tender th than thank thanks that the thee their them themselves then there therefore thersites these they thine thing
things think third this those thou though thought thoughts thousand three through thus thy thyself till time times
timon tis titus to toby together told tongue too took touch town traitor tranio troilus true truly trust truth turn
twas twenty two ulysses uncle under unless unto up upon us use valentine valiant very vile villain viola virtue voice
walk want war warrant wars warwick was watch water way we weak wear weep welcome well were what when where wherefore
wherein which while whilst white who whole whom whose why widow wife will wilt win wind wise wish wit with withal
within without witness woe woman women wonder word words work world worse worth worthy would wouldst write wrong ye
yea years yes yet yield york you young your yours yourself youth ythee
""",
    )
)


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
        window = ids[start : start + held_out["window_tokens"]]
        log_p = oracle.forward(config, weights, [bos, *window[:-1]]).log_softmax(dim=1)
        total -= float(log_p[range(len(window)), window].sum())
    assert total / len(ids) == pytest.approx(held_out["loss_nats_per_token"], abs=0.01)
    assert held_out["loss_nats_per_token"] < 3.6  # an untrained model has ln 1536 = 7.3


def test_greedy_text_is_english(demo):
    config, weights, tokenizer, training = demo
    recorded = training["greedy_sample"]
    ids = oracle.greedy(config, weights, tokenizer.encode(recorded["prompt"]).ids, 60)
    assert recorded["text"].startswith(recorded["prompt"] + tokenizer.decode(ids[:24]))
    found = words(tokenizer.decode(ids))[:-1]  # the last word may be cut
    known = COMMON_WORDS | set(words((demo_folder() / "held_out.txt").read_text()))
    unknown = [word for word in found if word not in known and len(word) > 1]  # single letters: 's, 'd, ...
    assert len(found) >= 30 and len(unknown) <= 0.1 * len(found), (found, unknown)
    assert len(set(found)) >= 12, found  # not one word over and over
