"""What can go wrong in a worker.

    WorkerError
    ├── EngineStartError     the model cannot be served: no file, a broken file, a wrong setting
    │   └── EngineAbsent     ... or the server in front of which this worker stands does not answer
    ├── EngineDied           the engine was running and has stopped for good
    ├── EngineAway           the engine's server has gone, and may come back
    ├── RegistrationRefused  the router does not want this worker, and will not after a retry
    ├── ConnectionLost       the line to the router broke (`worker.connection`); a new one is tried
    └── JobError             one job failed; carries the `FailureCode` that the router is told

Those that end the process carry its `exit_code`, of sysexits.h. A `JobError` ends only its job.
"""

from __future__ import annotations

from worker.protocol import FailureCode

EXIT_UNAVAILABLE = 69
"""EX_UNAVAILABLE: something that the worker needs is not there; a restart later may help."""

EXIT_SOFTWARE = 70
"""EX_SOFTWARE: a restart helps."""

EXIT_CONFIG = 78
"""EX_CONFIG: do not restart, somebody must change a setting."""

EXIT_INTERRUPTED = 130
"""Ctrl-C before the worker could take it as a wish to stop; what a shell reports for it."""


class WorkerError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class EngineStartError(WorkerError):
    """The engine cannot serve what the settings ask for. The message says what to change."""

    exit_code = EXIT_CONFIG


class EngineAbsent(EngineStartError):
    """No server answers where the settings say. It may only be late."""

    exit_code = EXIT_UNAVAILABLE


class EngineDied(WorkerError):
    """The engine stopped while it served. Only a new process has a new one."""

    exit_code = EXIT_SOFTWARE


class EngineAway(WorkerError):
    """The engine's server does not answer any more. No jobs may be taken until it does."""


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
