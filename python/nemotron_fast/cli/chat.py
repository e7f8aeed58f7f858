# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemotron_fast.cli.options import THINKING, add_model_arguments, add_sampling_arguments, load_llm, sampling_params
from nemotron_fast.errors import NemotronFastError

if TYPE_CHECKING:
    from nemotron_fast.llm import LLM
    from nemotron_fast.sampling_params import SamplingParams

HELP = """\
/system TEXT       set the system message and start over (without TEXT: remove it)
/thinking on|off   reason before the answer, or not; auto leaves it to the model
/reset             forget the conversation, keep the system message
/help              this list
/exit              leave; so does Ctrl-D. Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--thinking", choices=THINKING, default="auto", help="reason before the answer")
    add_model_arguments(parser)
    add_sampling_arguments(parser, max_tokens=None)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends.

    Raises:
        NemotronFastError: the model cannot be loaded; and, where the input is no terminal, a message that cannot
            be answered.
    """
    params = sampling_params(args)
    is_terminal = sys.stdin.isatty()
    with load_llm(args) as llm:
        session = Session(llm, params, args.system, THINKING[args.thinking])
        if is_terminal:
            with contextlib.suppress(ModuleNotFoundError):  # line editing and history, where the platform has them
                import readline  # noqa: F401
            print("/help lists the commands, Ctrl-D leaves")
        while (line := _read_line(is_terminal)) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if not session.command(line):
                    break
                continue
            try:
                session.answer(line)
            except NemotronFastError as error:
                if not is_terminal:
                    raise
                print(f"error: {error} (/reset starts over, /help lists more)", file=sys.stderr)
    return 0


@dataclass
class Session:
    """One conversation: what was said so far and how to go on."""

    llm: LLM
    params: SamplingParams
    system: str | None
    thinking: bool | None
    turns: list[dict[str, Any]] = field(default_factory=list)  # user and assistant, alternating

    def command(self, line: str) -> bool:
        """Carry out a line that starts with "/"; False: leave."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.turns.clear()
            case "/system":
                self.system = rest or None
                self.turns.clear()
            case "/thinking" if rest in THINKING:
                self.thinking = THINKING[rest]
            case "/thinking":
                print("/thinking takes on, off or auto", file=sys.stderr)
            case "/help":
                print(HELP)
            case _:
                print(f"{name} is not a command; /help lists them", file=sys.stderr)
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to one message of the user; what was shown of it joins the conversation."""
        from nemotron_fast.cli.streaming import Writer, interruptible, note, statistics

        said = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        stream = self.llm.stream([*system, *self.turns, said], self.params, thinking=self.thinking)
        writer, content, result = Writer(), "", None
        with interruptible() as interrupted, contextlib.closing(stream):
            for delta in stream:
                writer.write(delta)
                content += delta.content
                result = delta.result or result
                if interrupted():
                    break
        writer.finish()
        self.turns += [said, {"role": "assistant", "content": content}]
        note(statistics([result]) if result is not None else "stopped")


def _read_line(is_terminal: bool) -> str | None:
    """The next line without its newline; None at the end of the input."""
    while True:
        try:
            return input("> ") if is_terminal else input()
        except EOFError:
            if is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(Ctrl-D or /exit leaves)")
