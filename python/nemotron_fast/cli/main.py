# SPDX-License-Identifier: Apache-2.0
"""Entry point: finds the subcommand, runs it, and turns every failure into one last line and an exit code.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`. Only the chosen one is imported, so
that `inspect` and `plan` never load torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from nemotron_fast.errors import DeviceError, NemotronFastError

COMMANDS = {  # name -> what it does; the module of the same name runs it
    "inspect": "show the block list of a model, its parameters and bytes, as table, JSON or picture",
    "plan": "say what fits on a GPU: memory per rank, context, batch; needs no GPU",
    "doctor": "check this installation, and run a self-test on every backend that is present",
    "generate": "complete prompts",
    "chat": "talk to a model in the terminal",
    "quantize": "write an FP8 copy of a checkpoint",
    "bench": "measure step time and time to first token",
}
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # 128 + the signal's number, as a shell reports it
EPILOG = """\
exit codes:
  0  done
  1  internal error, please report it
  2  a request or an option that cannot be served
  3  a config that cannot be read or is not supported
  4  a checkpoint with missing, broken or contradicting files
  5  does not fit in memory or in the context
  6  a device or a kernel that is not there, or a failed self-test
  130  interrupted (SIGINT)
  141  the reader of the output is gone (SIGPIPE); nothing is printed
  143  terminated (SIGTERM)
The last line on stderr names the cause; --debug adds the traceback.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in the form of every other one, and wants option names whole: scripts must not break
    when a new option shares a prefix with an old one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


class _Version(argparse.Action):
    """Looks the version up only when asked: reading package metadata takes longer than the rest of the start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import nemotron_fast

        try:
            version = nemotron_fast.__version__
        except ModuleNotFoundError:
            version = "(not installed, running from source)"
        print(f"nemotron-fast {version}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        with _sigterm_raises():
            return _run(words)
    except NemotronFastError as error:
        return _fail(error.exit_code, str(error), error, debug)
    except KeyboardInterrupt as error:
        return _fail(INTERRUPTED, "interrupted", error, debug)
    except _Terminated as error:
        return _fail(TERMINATED, "terminated", error, debug)
    except BrokenPipeError:
        # The reader is gone; the interpreter would complain when it flushes stdout at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ImportError as error:
        return _fail(DeviceError.exit_code, _explain_import(error), error, debug)
    except Exception as error:
        hint = "" if debug else " (internal error; --debug shows where)"
        return _fail(1, f"{type(error).__name__}: {error}{hint}", error, debug)


class _Terminated(SystemExit):
    """SIGTERM came; derived from SystemExit, so that nothing takes it for an error of its own."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, the first SIGTERM raises, so that `finally` blocks clean up, and further ones are ignored.

    Only in the main thread, where signals arrive, and where nobody has decided otherwise.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated(TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(words: list[str]) -> int:
    try:
        args = _build_parser(words).parse_args(words)
    except _Terminated:
        raise
    except SystemExit as stop:  # argparse, after --help, --version or a usage error
        return int(stop.code or 0)
    code = args.run(args)
    sys.stdout.flush()  # so that a broken pipe shows here and not at exit
    return code


def _build_parser(words: list[str]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser = _Parser(
        prog="nemotron-fast",
        description="Inference for NVIDIA's NAS-derived (nemotron-nas) Llama models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        if name in words:
            module = importlib.import_module(f"nemotron_fast.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def _explain_import(error: ImportError) -> str:
    """What an installation lacks: a package, or the compiled extension."""
    if error.name == "nemotron_fast._C" or "'_C'" in str(error):
        return "the extension nemotron_fast._C is not built; run: pip install . (nemotron-fast doctor says more)"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name!r} is not installed; reinstall nemotron-fast with its dependencies"
    return f"{error} (nemotron-fast doctor says more)"


def _fail(code: int, message: str, error: BaseException, debug: bool) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
