"""Ends a process whose loop hangs, so that it can be started again, and leaves behind what it hung in."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Watchdog:
    """Watches that `beat` is called at least every `seconds`; use as a context manager.

    Else it writes the stacks of all threads to `DIRECTORY/hang_process_P.txt` and to standard error, and ends the process with code
    `INTERRUPTED`, without cleaning up: a device or a file system that does not answer would hang that too. The watch begins with the
    first beat. Where the interpreter itself is stuck, so that no thread gets a turn, SIGALRM ends the process after twice that time,
    with the stacks on standard error; nothing else may use that signal meanwhile.

    Args:
      seconds: None watches nothing.
      process: number of this process.
    """

    def __init__(self, seconds: float | None, directory: Path, process: int = 0):
        self._seconds, self._directory, self._process = seconds, directory, process
        self._beat: tuple[float, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            # In C, so that it needs no turn of the interpreter; chained to the default action, which ends the process.
            faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            self._thread.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def beat(self, doing: str) -> None:
        """All is well; what follows is `doing`."""
        self._beat = (time.monotonic(), doing)

    def pause(self) -> None:
        """What follows may take any time; the watch begins again with the next beat."""
        self._beat = None

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._ended.wait(self._seconds / 8):
            beat = self._beat
            signal.setitimer(signal.ITIMER_REAL, 0 if beat is None else 2 * self._seconds)
            if beat is None:
                continue
            since, doing = beat
            if time.monotonic() - since > self._seconds:
                self._end(doing)

    def _end(self, doing: str) -> None:
        path = self._directory / f"hang_process_{self._process}.txt"
        message = (
            f"error: process {self._process} hangs in {doing}: nothing has come of it for {self._seconds:g} s (LoopConfig.hang_seconds). "
            f"The stacks of its threads are in {path}. The process ends with code {INTERRUPTED}; start again to continue from the last "
            "checkpoint.\n"
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                self._dump(file, message)
        except OSError:  # a file system that is gone may be why the run hangs
            message = f"(they could not be written there) {message}"
        self._dump(sys.stderr, message)
        os._exit(INTERRUPTED)

    @staticmethod
    def _dump(file: TextIO, message: str) -> None:
        file.write(message)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
