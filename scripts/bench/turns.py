"""Two sides of a comparison, each in a process of its own that sleeps while the other computes: neither thread pool spins beside the other.

A worker is a script that reads one JSON object a line and answers each with one. This file imports nothing but the standard library, because workers
run in other Python environments too.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class Worker:
    """A worker process; ask it one thing at a time. A context manager. `variables` are added to its environment."""

    def __init__(self, python: str, script: str, *arguments: str, variables: dict[str, str] | None = None):
        environment = {**os.environ, **(variables or {})}
        self.process = subprocess.Popen([python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
          RuntimeError: the worker ended, or could not do it (with its message).
        """
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended: the empty answer below says so
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the worker {self.process.args[:2]} ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answers requests until the input ends. Whatever else is printed goes to the error stream."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = answer(**json.loads(line))
        except Exception as error:  # the other side decides what a failure means
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


def least_seconds(function: Callable[[], Any], repeats: int, budget: float = 20.0) -> float:
    """Least seconds of a call, after one that is not counted; stops early when the budget is spent."""
    start = time.perf_counter()
    function()
    seconds = []
    while len(seconds) < repeats and (not seconds or time.perf_counter() - start < budget):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
