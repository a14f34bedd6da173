"""One side of a case in a process of its own, so that its peak memory is its own: it answers one JSON line for each JSON line.

A side has prepare(), check(), step(), device_mb(), and minilora's also profile(steps). Memory is the high-water
mark of what is resident from the end of `prepare` on, where the system lets it be set back (Linux), else of the whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..backend import set_device
from ..studies.memory import forget_peak, resident_mb
from . import minilora_side, torch_side
from .cases import Case, write_start

SIDES: dict[str, Any] = {"minilora": minilora_side.KINDS, "torch": torch_side.KINDS}
PAUSE = 0.25                                               # seconds until the other side's threads have stopped spinning
PROGRAM = "from minilora.bench.worker import serve; serve()"


class Worker:
    """The other end of the pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, what: str, argument: int = 0) -> Any:
        """What the process answers. Raises RuntimeError with its message if it fails."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([what, argument]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("a benchmark process ended early (its message is above)")
        value = json.loads(answer)
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(value["error"])
        return value


@contextmanager
def started(side: str, case: Case, folder: str, environment: dict[str, str]) -> Iterator[Worker]:
    """A process that serves one side ("minilora", "torch") while the block runs, or ("start") writes what both start from."""
    command = [sys.executable, "-c", PROGRAM, side, json.dumps(case.to_dict()), folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.communicate()


class Server:
    """The process's own end: a side, and what it answers to each request. The "start" side only writes what both start from."""

    def __init__(self, side: str, case: Case, folder: str) -> None:
        self.case, self.folder = case, folder
        self.work: Any = None if side == "start" else SIDES[side][case.kind](case, folder)
        self.idle = 0.0                                    # memory at the end of `prepare`: libraries, weights, optimiser

    def answer(self, what: str, argument: int) -> Any:
        """Plain data for JSON."""
        if what == "start":
            return write_start(self.case, Path(self.folder))
        if what == "turn":
            return turn(self.work, argument)
        if what == "memory":
            return {"peak": self.work.device_mb() or resident_mb(), "idle": self.idle}
        if what == "profile":
            return self.work.profile(argument)
        answer = getattr(self.work, what)()
        if what == "prepare":
            forget_peak()
            self.idle = self.work.device_mb() or resident_mb()
        return answer


def serve() -> None:
    """The process: answer requests on standard input until it closes."""
    side, fields, folder = sys.argv[1:]
    case = Case.from_dict(json.loads(fields))
    set_device(case.device if side == "minilora" else "cpu")
    server = Server(side, case, folder)
    for line in sys.stdin:
        try:
            answer = server.answer(*json.loads(line))
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def turn(work: Any, steps: int) -> list[float]:
    """The seconds of each of `steps` steps. One more, before several, only warms the caches up again; a long one needs none."""
    time.sleep(PAUSE)
    seconds = []
    for _ in range(steps + 1 if steps > 1 else 1):
        start = time.perf_counter()
        work.step()                                        # returns when the device has done it
        seconds.append((time.perf_counter() - start) / work.case.updates)
    return seconds[-steps:]
