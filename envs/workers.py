"""Environments in processes of their own, and what is done when one of them dies or hangs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from runs.config import RunFailed

TIMEOUT = 60.0  # seconds that a step or reset may take


class WorkerFault(RunFailed):
    """Some environments failed; `rows` (N,) says which ones."""

    def __init__(self, rows: np.ndarray, reason: str) -> None:
        """Name the first of them."""
        super().__init__(f"env {int(rows.argmax())} failed: {reason}")
        self.rows = rows


class Workers(AsyncVectorEnv):
    """N processes, each with one environment; a failure of some is a `WorkerFault`, after which `rebuild` helps.

    An exception in an environment, a process that died, and one that is silent for `timeout` seconds are failures.
    """

    def __init__(self, ones: Sequence[Callable[[], gymnasium.Env]], timeout: float = TIMEOUT) -> None:
        """Start the processes; not by fork, which would copy the threads of emulator and learner dead."""
        self._ones = [functools.partial(_deaf, one, os.getpid()) for one in ones]
        self._timeout = timeout
        super().__init__(self._ones, autoreset_mode=AutoresetMode.SAME_STEP, context="forkserver")

    def rebuild(self) -> None:
        """Start all processes anew; their environments must then be reset."""
        self._end()
        metadata = self.metadata
        super().__init__(self._ones, autoreset_mode=AutoresetMode.SAME_STEP, context="forkserver")
        self.metadata = metadata

    def close_extras(self, **keywords: Any) -> None:
        """End the processes at once: an environment that hangs would never answer."""
        self._end()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()

    def step_async(self, actions: Any) -> None:
        """See `AsyncVectorEnv`; raises WorkerFault."""
        try:
            super().step_async(actions)
        except OSError as error:
            raise self._fault(error) from error

    def step_wait(self, timeout: float | None = None) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """See `AsyncVectorEnv`; raises WorkerFault."""
        try:
            return super().step_wait(self._timeout if timeout is None else timeout)
        except Exception as error:  # an environment's own exception is raised here under its own type
            raise self._fault(error) from error

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See `AsyncVectorEnv`; raises WorkerFault."""
        try:
            self.reset_async(seed, options)
            return self.reset_wait(self._timeout)
        except Exception as error:
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> WorkerFault:
        """Who failed: whose pipe was closed after an exception, whose process is gone, or who is silent."""
        if isinstance(error, (EOFError, OSError)):  # the pipe breaks a moment before the process is gone
            connection.wait([process.sentinel for process in self.processes], timeout=1.0)
        failed = []
        for pipe, process in zip(self.parent_pipes, self.processes, strict=True):
            process.join(0)
            late = isinstance(error, multiprocessing.TimeoutError) and pipe is not None and not pipe.poll(0)
            failed.append(pipe is None or not process.is_alive() or late)
        rows = np.array(failed) if any(failed) else np.ones(self.num_envs, bool)
        what = f"no answer in {self._timeout:g} s" if isinstance(error, multiprocessing.TimeoutError) else ""
        died = "its process died" if isinstance(error, (EOFError, OSError)) else ""
        return WorkerFault(rows, what or died or f"{type(error).__name__}: {error}")


def _deaf(one: Callable[[], gymnasium.Env], parent: int) -> gymnasium.Env:
    """Make an env; Ctrl-C, which a terminal sends to all processes, is left to the parent."""
    if os.getpid() != parent:  # gymnasium makes one env in the parent, too
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return one()
