# SPDX-License-Identifier: Apache-2.0
"""The exceptions that reach a user, each with the exit code the command line returns for it."""


class NemotronFastError(Exception):
    """Base of every error that has a cause in the input, the machine or the request."""

    exit_code = 1


class RequestError(NemotronFastError, ValueError):
    """A prompt, message list or sampling parameter that cannot be served."""

    exit_code = 2


class ConfigError(NemotronFastError, ValueError):
    """A config.json (or its quantisation part) that cannot be read or is not supported."""

    exit_code = 3


class CheckpointError(NemotronFastError, ValueError):
    """Weights or tokenizer files that are missing, broken or do not match the config."""

    exit_code = 4


class CapacityError(NemotronFastError):
    """What was asked for does not fit in memory or in the context; the message holds the numbers."""

    exit_code = 5


class DeviceError(NemotronFastError, RuntimeError):
    """A device, or a kernel for it, that this machine or this build does not have."""

    exit_code = 6


class NumericsError(NemotronFastError, ArithmeticError):
    """The model computed something that is not a number."""


class Problems:
    """Collects every problem of one input, so that a single error names them all."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, text: str) -> None:
        self._found.append(text)

    def require(self, condition: bool, text: str) -> bool:
        """Record `text` unless `condition` holds; returns the condition."""
        if not condition:
            self._found.append(text)
        return condition

    def raise_if_any(self, error: type[NemotronFastError], what: str) -> None:
        """Raise `error` with all problems on one line, or return if there are none."""
        if self._found:
            count = len(self._found)
            raise error(f"{what}: {count} problem{'s' * (count > 1)}: " + "; ".join(self._found))
