# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast generate`: complete prompts, or answer them with --chat."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fast.cli.options import THINKING, add_model_arguments, add_sampling_arguments, load_llm, sampling_params
from nemotron_fast.errors import RequestError

if TYPE_CHECKING:
    from nemotron_fast.llm import LLM
    from nemotron_fast.outputs import Result
    from nemotron_fast.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256


class _AppendSource(argparse.Action):
    """Collects (kind, value) in the order of the command line, so that texts and files can be mixed."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.sources = [*(namespace.sources or []), (self.const, values)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts (any number; one final newline of a file or of stdin is dropped)")
    prompts.add_argument("--prompt", metavar="TEXT", action=_AppendSource, const="text", help="- reads stdin")
    prompts.add_argument("--prompt-file", metavar="FILE", action=_AppendSource, const="file", help="- reads stdin")
    prompts.add_argument("--chat", action="store_true", help="each prompt is a user's message, not text to continue")
    prompts.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    prompts.add_argument("--thinking", choices=THINKING, default="auto", help="reason before the answer, with --chat")
    add_model_arguments(parser)
    add_sampling_arguments(parser, max_tokens=DEFAULT_MAX_TOKENS)
    parser.add_argument("--n", metavar="N", type=int, default=1, help="completions per prompt (default 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the full results as JSON")
    output.add_argument("--echo", action="store_true", help="print the prompt before its completion")
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print text as it comes (default: yes for one prompt, not for JSON)",
    )
    parser.set_defaults(sources=None)


def run(args: argparse.Namespace) -> int:
    """Generate and print.

    Raises:
        NemotronFastError: a prompt, option or model that cannot be served.
    """
    prompts = read_prompts(args.sources or [])
    for_chat = (args.system is not None, args.thinking != "auto", args.max_thinking_tokens is not None)
    if not args.chat and any(for_chat):
        raise RequestError("--system, --thinking and --max-thinking-tokens need --chat")
    single = len(prompts) == 1 and args.n == 1
    if args.stream and (args.json or not single):
        raise RequestError("--stream prints one completion as text; leave out --json, --n and further prompts")
    params = sampling_params(args, n=args.n)
    with load_llm(args) as llm:
        if single and not args.json and args.stream is not False:
            _stream(llm, args, prompts[0], params)
        else:
            _batch(llm, args, prompts, params)
    return 0


def read_prompts(sources: list[tuple[str, str]]) -> list[str]:
    """The prompts named on the command line.

    Raises:
        RequestError: none at all, an unreadable file, or bytes that are not UTF-8.
    """
    if not sources:
        raise RequestError("no prompt: give --prompt TEXT or --prompt-file FILE (- reads stdin)")
    prompts = [_read_prompt(kind, value) for kind, value in sources]
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise RequestError(f"prompt {number} is empty; give at least one character")
    return prompts


def _read_prompt(kind: str, value: str) -> str:
    try:
        if value == "-":
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        if kind == "file":
            return Path(value).read_bytes().decode("utf-8").removesuffix("\n")
        value.encode("utf-8")  # an argument that is not UTF-8 arrives with lone surrogates
        return value
    except UnicodeError as error:
        raise RequestError(f"a prompt is not UTF-8: {error}") from None
    except OSError as error:
        raise RequestError(f"cannot read the prompt file {value}: {error.strerror}") from None


def _messages(args: argparse.Namespace, prompt: str) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [*system, {"role": "user", "content": prompt}]


def _stream(llm: LLM, args: argparse.Namespace, prompt: str, params: SamplingParams) -> None:
    from nemotron_fast.cli.streaming import Writer, note, statistics

    source = _messages(args, prompt) if args.chat else prompt
    deltas = llm.stream(source, params, thinking=THINKING[args.thinking])
    if args.echo:
        sys.stdout.write(prompt + ("\n" if args.chat else ""))
    writer = Writer()
    result: Result | None = None
    for delta in deltas:
        writer.write(delta)
        result = delta.result or result
    writer.finish()
    if result is not None:
        note(statistics([result]))


def _batch(llm: LLM, args: argparse.Namespace, prompts: list[str], params: SamplingParams) -> None:
    from nemotron_fast.cli import render
    from nemotron_fast.cli.streaming import note, statistics

    if args.chat:
        results = llm.chat([_messages(args, p) for p in prompts], params, thinking=THINKING[args.thinking])
    else:
        results = llm.generate(prompts, params)
    if args.json:
        render.print_json({"model": args.model, "results": [r.to_dict() for r in results]})
        return
    several = sum(len(r.outputs) for r in results) > 1
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), 1):
        for output in result.outputs:
            if several:
                print(f"--- {number}" + (f".{output.index + 1}" if args.n > 1 else "") + " ---")
            if args.echo:
                print(prompt, end="\n" if args.chat else "")
            print((output.content if args.chat else output.text).removesuffix("\n"))
    note(statistics(results))
