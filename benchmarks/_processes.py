"""Training loops that take turns, each in a process of its own, as its user would run it.

A process has one memory allocator, whose settings fastft chooses, and one main thread: a loop in another thread would get a
heap and a pool of OpenMP threads of its own, and with more threads than cores none of them spins while it waits. Apart, no
loop runs under what another one has set. They still alternate, step by step, on the same inputs.
"""

import contextlib
import os
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe

from benchmarks._harness import ROOT, measure, peak_bytes, timed

STEP, PEAK = "step", "peak_bytes"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""what DeepSpeed sets in this process, and would make a loop look for other ranks"""


def alternate(loops, rounds, *, warmup, seconds=None, environment=None):
    """{name: runs, as `measure` gives them, with `peak_bytes`} of loops {name: (open_loop, *arguments)}.

    open_loop(*arguments) is called in the loop's process and returns serve(pipe), as `serve_steps` does.
    environment: variables that the processes start with.
    """
    opened = {name: Loop(name, environment or {}, *opening) for name, opening in loops.items()}
    try:
        for loop in opened.values():
            loop.wait()
        runs = measure(opened, rounds, warmup=warmup, seconds=seconds, clock=Loop.step)
        for name, loop in opened.items():
            runs[name][PEAK] = loop.ask(PEAK, 0)
    finally:
        for loop in opened.values():
            loop.end()
    return runs


def serve_steps(step):
    """serve(pipe) of a loop that takes the step of a round by step(number): answers until the pipe is closed."""

    def serve(pipe):
        answers = {STEP: lambda number: timed(step, number), PEAK: lambda number: peak_bytes(lambda: step(number))}
        while True:
            what, number = pipe.recv()
            pipe.send(answers[what](number))

    return serve


class Loop:
    """A training loop in a new process."""

    def __init__(self, name, environment, open_loop, *arguments):
        self.name = name
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "benchmarks._processes", str(theirs.fileno())]
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | environment
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        self._pipe.send((open_loop, arguments))

    def wait(self):
        """Returns what the loop says next. RuntimeError where it has ended instead."""
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"the process of the loop {self.name} has ended; it said why above") from None

    def ask(self, what, number):
        self._pipe.send((what, number))
        return self.wait()

    def step(self, number):
        """(seconds, CPU seconds, loss) of the step of a round."""
        return self.ask(STEP, number)

    def end(self):
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def main(descriptor):
    """What the process of a loop does: opens the loop that it is sent, says so, and serves it."""
    pipe = Connection(descriptor)
    open_loop, arguments = pipe.recv()
    serve = open_loop(*arguments)
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the other end is gone
        serve(pipe)


if __name__ == "__main__":
    main(int(sys.argv[1]))
