"""What can go wrong in a worker.

    WorkerError
    ├── EngineStartError     the model cannot be served: no such file, a broken file, no such server
    ├── RegistrationRefused  the router does not want this worker, and will not after a retry
    └── JobError             one job failed; carries the `FailureCode` that the router is told

The first two end the process, with `exit_code`; a `JobError` ends only its job.
"""

from __future__ import annotations

from worker.protocol import FailureCode

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: do not restart, somebody must change a setting."""


class WorkerError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class EngineStartError(WorkerError):
    """The engine cannot serve what the settings ask for. The message says what to change."""

    exit_code = EXIT_CONFIG


class RegistrationRefused(WorkerError):
    """The router refused this worker for good. `code` is the router's, stable."""

    exit_code = EXIT_CONFIG

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"the router refused this worker ({code}): {message}")
        self.code = code
        self.message = message


NOT_RETRYABLE = {FailureCode.PROMPT_TOO_LONG, FailureCode.BAD_REQUEST}


class JobError(WorkerError):
    """One job failed. `message` is for operators, and never holds any of the prompt."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    @property
    def retryable(self) -> bool:
        """Whether another worker may do better: not when the job itself is at fault."""
        return self.code not in NOT_RETRYABLE
