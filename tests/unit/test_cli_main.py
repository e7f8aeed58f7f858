# SPDX-License-Identifier: Apache-2.0
"""The command line's frame: exit codes, the last line of stderr, lazy imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_fast import errors
from nemotron_fast.cli import main as cli
from nemotron_fast.cli import plan as plan_command

SUPER = str(Path(__file__).parents[1] / "configs" / "super-49b-v1.json")


def run_cli(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def failing(error: BaseException):
    def run(args: object) -> int:
        raise error

    return run


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    assert all(command in out for command in cli.COMMANDS)
    for number in (0, 1, 2, 3, 4, 5, 6, 130, 141, 143):
        assert f"\n  {number}  " in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run_cli(capsys, command, "--help")
    assert code == 0
    assert "exit codes:" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "--version")
    assert code == 0
    assert out.startswith("nemotron-fast ")


ABBREVIATED = [
    ("--vers",),
    ("plan", SUPER, "--gp", "h100"),
    ("bench", "latency", "--model", "demo", "--repeat", "1", "--output-len", "1"),
]


@pytest.mark.parametrize(
    "argv", [(), ("nonsense",), ("plan",), ("plan", SUPER), ("plan", SUPER, "--gpu"), *ABBREVIATED]
)
def test_usage_errors_exit_2_with_the_cause_last(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    code, out, err = run_cli(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "kind",
    [
        errors.RequestError,
        errors.ConfigError,
        errors.CheckpointError,
        errors.CapacityError,
        errors.DeviceError,
        errors.NemotronFastError,
    ],
)
def test_our_errors_are_one_last_line_with_their_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[errors.NemotronFastError]
) -> None:
    monkeypatch.setattr(plan_command, "run", failing(kind("first\nsecond")))
    code, _, err = run_cli(capsys, "plan", SUPER, "--gpu", "h100")
    assert code == kind.exit_code
    assert err == "error: first second\n"


def test_unexpected_errors_exit_1_and_show_a_traceback_only_with_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_command, "run", failing(ZeroDivisionError("oops")))
    code, _, err = run_cli(capsys, "plan", SUPER, "--gpu", "h100")
    assert code == 1
    assert err.splitlines() == ["error: ZeroDivisionError: oops (internal error; --debug shows where)"]
    code, _, err = run_cli(capsys, "plan", SUPER, "--gpu", "h100", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: ZeroDivisionError: oops"


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("import no_such_package", "the package 'no_such_package' is not installed"),
        ("from nemotron_fast import _C", "the extension nemotron_fast._C is not built"),
        ("import nemotron_fast._C", "the extension nemotron_fast._C is not built"),
    ],
)
def test_an_incomplete_installation_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, statement: str, text: str
) -> None:
    import nemotron_fast

    def run(args: object) -> int:
        exec(statement)
        return 0

    monkeypatch.setitem(sys.modules, "nemotron_fast._C", None)
    monkeypatch.delattr(nemotron_fast, "_C", raising=False)
    monkeypatch.setattr(plan_command, "run", run)
    code, _, err = run_cli(capsys, "plan", SUPER, "--gpu", "h100")
    assert code == 6
    assert err.startswith(f"error: {text}")


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "run", failing(KeyboardInterrupt()))
    assert run_cli(capsys, "plan", SUPER, "--gpu", "h100") == (130, "", "error: interrupted\n")


WITH_SIGTERM = """
import os, signal, sys
from nemotron_fast.cli import plan
from nemotron_fast.cli.main import main
def run(args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not stop the cleaning up
        print("cleaned up")
plan.run = run
"""


@pytest.mark.parametrize(
    ("before", "want"),
    [
        ("", (143, "cleaned up\n", "error: terminated\n")),
        ("signal.signal(15, signal.SIG_IGN)", (0, "cleaned up\n", "")),
    ],
    ids=["default", "ignored by the parent"],
)
def test_sigterm_runs_the_finally_blocks(before: str, want: tuple[int, str, str]) -> None:
    script = f"{WITH_SIGTERM}{before}\nsys.exit(main(['plan', {SUPER!r}, '--gpu', 'h100']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == want


def test_main_leaves_the_signal_handlers_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_cli(capsys, "plan", SUPER, "--gpu", "h200")[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "command", [["inspect", SUPER], ["inspect", SUPER, "--json"], ["plan", SUPER, "--gpu", "h200"]]
)
def test_no_torch_and_no_matplotlib_where_they_are_not_needed(command: list[str]) -> None:
    script = (
        "import json, sys\nfrom nemotron_fast.cli.main import main\n"
        f"code = main({command!r})\n"
        "heavy = [m for m in ('torch', 'numpy', 'matplotlib', 'tokenizers') if m in sys.modules]\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]


def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_fast", "inspect", "no-such-folder"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("error: no model 'no-such-folder'")


def test_a_closed_pipe_is_quiet() -> None:
    script = (
        "import os, sys\nfrom nemotron_fast.cli.main import main\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        f"sys.exit(main(['inspect', {SUPER!r}, '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE, "")
