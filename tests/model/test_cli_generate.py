# SPDX-License-Identifier: Apache-2.0
"""generate, chat and quantize with the demo model; `generate` as a user runs it, in processes of its own."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemotron_fast.cli import main as cli
from nemotron_fast.cli import streaming
from nemotron_fast.cli.main import main
from nemotron_fast.cli.options import sampling_params
from nemotron_fast.models import demo_folder

SAMPLE = json.loads((demo_folder() / "training.json").read_text())["greedy_sample"]  # as the training recorded it
PROMPT = SAMPLE["prompt"]
CONTINUATION = SAMPLE["text"].removeprefix(PROMPT)
FAST = ("--model", "demo", "--device", "cpu", "--max-tokens", "8", "--temperature", "0")


def process(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemotron_fast", *argv], input=stdin, capture_output=True, text=True, timeout=120
    )


def generated(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["generate", *FAST, *argv]) == 0
    return capsys.readouterr().out


def feed_stdin(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def test_the_same_greedy_text_in_two_processes() -> None:
    first = process("generate", *FAST, "--prompt", PROMPT)
    second = process("generate", *FAST, "--prompt-file", "-", "--no-stream", stdin=PROMPT + "\n")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert len(first.stdout) > 10 and CONTINUATION.startswith(first.stdout.removesuffix("\n"))
    assert re.match(r"\d+ prompt tokens, 8 generated", first.stderr.splitlines()[-1])


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(generated(capsys, "--prompt", PROMPT, "--prompt", "KING.", "--n", "2", "--json"))
    assert report["model"] == "demo"
    assert [len(r["outputs"]) for r in report["results"]] == [2, 2]
    result = report["results"][0]
    assert result["prompt"] == PROMPT
    assert CONTINUATION.startswith(result["outputs"][0]["text"])
    num_prompt = len(result["prompt_token_ids"])
    assert result["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 16,
        "total_tokens": num_prompt + 16,
    }
    assert result["timings"]["total_s"] > 0


def test_several_texts_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(capsys, "--prompt", PROMPT, "--prompt", "KING.")
    first, second = text.removeprefix("--- 1 ---\n").split("\n--- 2 ---\n")
    assert CONTINUATION.startswith(first) and second and second != first


def test_echo_and_stop(capsys: pytest.CaptureFixture[str]) -> None:
    stop = CONTINUATION.split()[2]
    text = generated(capsys, "--prompt", PROMPT, "--echo", "--stop", stop)
    assert text == PROMPT + CONTINUATION[: CONTINUATION.index(stop)] + "\n"


def test_seed_decides_a_random_text(capsys: pytest.CaptureFixture[str]) -> None:
    random = ("--prompt", PROMPT, "--temperature", "1")
    assert generated(capsys, *random, "--seed", "1") == generated(capsys, *random, "--seed", "1")
    assert generated(capsys, *random, "--seed", "1") != generated(capsys, *random, "--seed", "2")


def test_chat_flag_renders_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(generated(capsys, "--chat", "--prompt", "hi", "--json"))
    assert "hi" in report["results"][0]["prompt"] != "hi"


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (("--prompt", "word " * 3000), (2, 5), "context"),
        (("--prompt", PROMPT, "--max-tokens", "-1"), (2,), "max_tokens=-1"),
        (("--prompt", PROMPT, "--temperature", "nan"), (2,), "temperature"),
        (("--prompt", ""), (2,), "empty"),
        ((), (2,), "no prompt"),
        (("--prompt", "a", "--model", "no-such-model"), (4,), "no-such-model"),
        (("--prompt", "a", "--thinking", "on"), (2,), "--chat"),
        (("--prompt", "a", "--max-thinking-tokens", "5"), (2,), "--max-thinking-tokens need --chat"),
        (("--prompt", "a", "--chat", "--max-thinking-tokens", "-1"), (2,), "max_thinking_tokens=-1"),
        (("--prompt", "a", "--chat", "--max-thinking-tokens", "5"), (2,), "max_thinking_tokens needs chat"),
        (("--prompt", "a", "--max-num-seqs", "0"), (2,), "max_num_seqs=0"),
        (("--prompt", "a", "--stream", "--json"), (2,), "--stream"),
        (("--prompt", "a", "--max-model-len", "100000"), (2, 5), "max_model_len=100000"),
        (("--prompt-file", "no-such-file"), (2,), "no-such-file"),
        (("--prompt", "a", "--device", "tpu"), (2,), "--device"),
        (("--prompt", "\udcff"), (2,), "UTF-8"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: tuple[int, ...], text: str) -> None:
    assert main(["generate", *FAST, *argv]) in code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert text in err.splitlines()[-1]


def test_max_num_seqs_and_max_thinking_tokens_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    class Stop(Exception):
        pass

    def fake_llm(model: str, **options: object) -> None:
        seen.append(options)
        raise Stop

    monkeypatch.setattr("nemotron_fast.llm.LLM", fake_llm)
    for argv in (["chat", *FAST], ["generate", *FAST, "--prompt", "a"]):
        assert main([*argv, "--max-num-seqs", "3"]) == main(argv) == 1
    assert [o.get("max_num_seqs") for o in seen] == [3, None, 3, None]
    assert sampling_params(parsed("chat", *FAST, "--max-thinking-tokens", "7")).max_thinking_tokens == 7
    assert sampling_params(parsed("chat", *FAST)).max_thinking_tokens is None


def parsed(*argv: str) -> argparse.Namespace:
    return cli._build_parser([*argv]).parse_args(argv)


def test_stdin_that_is_not_utf8(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, b"\xff\xfe")
    assert main(["generate", *FAST, "--prompt", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_chat_from_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, "Hello\n\n/reset\nHello\n/nonsense\n/thinking maybe\n/help\n/exit\nnot read\n")
    assert main(["chat", *FAST]) == 0
    out, err = capsys.readouterr()
    answers = out[: out.index("/system TEXT")]  # /help came last
    half = len(answers) // 2
    assert answers[:half] == answers[half:] != ""  # after /reset the conversation began anew
    assert err.count("8 generated") == 2
    assert "/nonsense is not a command" in err
    assert "/thinking takes" in err


def test_chat_remembers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, "Hello\nHello\n")
    assert main(["chat", *FAST]) == 0
    prompts = [int(line.split()[0]) for line in capsys.readouterr().err.splitlines() if "prompt tokens" in line]
    assert len(prompts) == 2
    assert prompts[1] > prompts[0]


def test_chat_from_a_pipe_ends_at_the_first_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed_stdin(monkeypatch, "/thinking on\nHello\n")  # the demo has no such switch
    assert main(["chat", *FAST]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_quantize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "fp8"
    assert main(["quantize", "demo", str(target)]) == 0
    assert "written to" in capsys.readouterr().err
    assert main(["inspect", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] is not None
    assert report["weight_bytes"] == report["weight_bytes_as"]["fp8"]
    assert main(["quantize", "demo", str(target)]) == 4
    assert "not an empty folder" in capsys.readouterr().err


def test_a_terminated_quantize_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom nemotron_fast import quantize\nfrom nemotron_fast.cli.main import main\n"
        "plain = quantize.Writer.write\n"
        "def write(*args):\n    plain(*args)\n    assert os.listdir(sys.argv[1])\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "quantize.Writer.write = write\n"
        "sys.exit(main(['quantize', 'demo', sys.argv[1] + '/fp8']))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (143, "error: terminated\n")
    assert not [*tmp_path.iterdir()]


def delta(reasoning: str = "", content: str = "") -> SimpleNamespace:
    return SimpleNamespace(reasoning=reasoning, content=content)


def test_reasoning_goes_to_stderr_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    writer = streaming.Writer()
    for piece in (delta("hm"), delta("m"), delta(content="four")):
        writer.write(piece)
    writer.finish()
    assert capsys.readouterr() == ("four\n", "hmm\n")


def test_reasoning_is_dim_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    writer = streaming.Writer()
    for piece in (delta("hm"), delta("m"), delta(content="four")):
        writer.write(piece)
    writer.finish()
    assert capsys.readouterr().out == f"{streaming.DIM}hmm{streaming.PLAIN}\nfour\n"


def test_first_interrupt_is_noted_and_the_second_raises() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    with streaming.interruptible() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_bench_latency(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((demo_folder() / "config.json").read_text())
    sizes = ("--batch", "1,3", "--input-len", "5", "--output-len", "4", "--repeats", "2", "--max-batched-tokens", "6")
    argv = ["bench", "latency", "--model", str(config), "--random-weights", "--quantize", "fp8", *sizes]
    assert main([*argv, "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["results"]
    assert report["max_batched_tokens"] == 6
    assert [(r["metric"], r["batch_size"]) for r in rows] == [("time_to_first_token", 1), ("step", 1), ("step", 3)]
    assert all(0 < r["min_ms"] <= r["median_ms"] <= r["max_ms"] for r in rows)
    assert main([*argv, "--device", "cpu", "--output-len", "0", "--json"]) == 0
    assert [r["metric"] for r in json.loads(capsys.readouterr().out)["results"]] == ["time_to_first_token"]
    assert main([*argv, "--device", "cpu", "--output-len", "-1"]) == 2
    assert "--output-len is -1, want at least 0" in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv, "--device", "cpu", "--input-len", "5000"]) == 2
    assert "the prompt has 5000 tokens" in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv, "--device", "cpu", "--max-num-seqs", "2"]) == 2
    assert "at least the largest batch, 3" in capsys.readouterr().err.splitlines()[-1]


def test_bench_throughput(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = ["bench", "throughput", "--model", "demo", "--device", "cpu", "--max-num-seqs", "3"]
    sizes = ("--num-prompts", "5", "--input-len", "9", "--output-len", "4")
    assert main([*argv, *sizes, "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert (report["num_requests"], report["total_input_tokens"], report["total_output_tokens"]) == (5, 45, 20)
    assert report["tokens_per_second"] == pytest.approx(65 / report["elapsed_time"])
    assert 0 < report["median_itl_ms"] <= report["p99_itl_ms"] and report["max_num_seqs"] == 3


def test_bench_throughput_of_a_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    entries = [{"prompt": "To be, or not to be " * 20, "max_tokens": n} for n in (2, 3, 4)] + [{"prompt": [5, 6]}]
    dataset.write_text("\n".join(json.dumps(e) for e in entries) + "\n\n")
    argv = ["bench", "throughput", "--model", "demo", "--device", "cpu", "--dataset", str(dataset), "--output-len", "2"]
    assert main([*argv, "--prefix-caching", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total_output_tokens"] == 2 + 3 + 4 + 2 and report["prefix_hit_rate"] > 0.3
    assert main([*argv, "--num-prompts", "1"]) == 0
    assert capsys.readouterr().out.startswith("1 requests in ")
    for text, message in (("", "holds no prompts"), ("{", "line 1"), ('{"a": 1}', 'want an object with "prompt"')):
        dataset.write_text(text)
        assert main(argv) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv[:-4], "--dataset", str(tmp_path / "none")]) == 2
