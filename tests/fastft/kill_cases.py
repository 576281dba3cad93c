"""Runs that are killed and started again: `python kill_cases.py CASES.json OUT_DIR`.

CASES.json: {case: [launch, ...]}, a launch being {"ranks", "arguments", "environment", "hook"}, all but the arguments
optional. The libraries are imported once; the ranks of each launch are forked from here, which takes a second where a
fresh start takes six. Writes OUT_DIR/<case>.json: [{"codes", "seconds", "output"}], one for each launch; `seconds` is how
long the last rank outlived the first.

A hook is [name, *arguments], called in every rank before training: see the functions with its name below.
"""

import gc
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import deepspeed
import torch

from fastft import metrics
from fastft import train as loop
from fastft.arguments import Arguments
from fastft.checkpoint import loading
from fastft.data import StepPlan
from fastft.engine import _import_muon
from fastft.tasks.causal_lm import Task


def kill_in_backward(rank, count, when="saved"):
    """SIGKILL in the back-propagation of a micro-batch, counted from 1: inside an accumulation where count is odd.

    when: `saved` waits for the checkpoint under way, so that the next launch starts from it; `now` does not.
    """
    whole, calls = loop.backward, [0]
    savers = remember_savers()

    def backward(*args):
        calls[0] += 1
        if calls[0] == count and int(os.environ["RANK"]) == rank:
            while when == "saved" and not all(saver.done for saver in savers):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*args)

    loop.backward = backward


def remember_savers():
    """The list that the run's Saver will be in."""
    savers = []

    class Remembered(loop.Saver):
        def __enter__(self):
            savers.append(self)
            return super().__enter__()

    loop.Saver = Remembered
    return savers


def kill_in_evaluation(rank, count):
    whole, calls = Task.evaluate, [0]

    def evaluate(self, model, batches):
        calls[0] += 1
        if calls[0] == count and int(os.environ["RANK"]) == rank:
            next(iter(batches))
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, model, batches)

    Task.evaluate = evaluate


def in_backward(rank, count, what, *arguments):
    """Calls one of the functions below in the back-propagation of a micro-batch, counted from 1."""
    whole, calls = loop.backward, [0]

    def backward(*args):
        calls[0] += 1
        if calls[0] == count and int(os.environ["RANK"]) == rank:
            {"signals": signals, "fail": fail, "hang": hang}[what](*arguments)
        whole(*args)

    loop.backward = backward


def signals(*numbers):
    """Sends them to this process, further apart than what counts as one request."""
    for i, number in enumerate(numbers):
        time.sleep(3.2 if i else 0)
        os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("a bug in the middle of a step")


def hang():
    time.sleep(1000)


def kill_after(ranks, seconds):
    """SIGKILL so long after the start, wherever that is."""
    if int(os.environ["RANK"]) in ranks:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)


def full_disk(seed):
    """Around each save the disk of one rank takes files up to some size only: both are drawn, alike on all ranks."""
    draw, (_, hard) = random.Random(seed), resource.getrlimit(resource.RLIMIT_FSIZE)

    class OnFullDisk(loop.Saver):
        def start(self, state):
            full, size = draw.randrange(2), int(10 ** draw.uniform(3.8, 5.5))
            if full == int(os.environ["RANK"]):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            super().start(state)

        def settle(self, state):
            try:
                super().settle(state)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    loop.Saver = OnFullDisk


def drop(what):
    """A resume that loses a part: what the equality tests must notice."""
    if what == "random streams":
        loading.restore_streams = lambda streams: None
    elif what == "scales":  # of the 8-bit moments
        whole = loop.load_checkpoint

        def load(engine, *args, **options):
            state = whole(engine, *args, **options)
            for held in engine.basic_optimizer.state.values():
                held["exp_avg_sq_absmax"].fill_(1.0)
            return state

        loop.load_checkpoint = load
    elif what == "data position":
        whole = StepPlan._permutation_of
        StepPlan.indices = lambda self, step: whole(self, step + 1)
    else:
        flag = {"optimizer": "load_optimizer_states", "schedule": "load_lr_scheduler_states"}[what]
        whole = deepspeed.DeepSpeedEngine.load_checkpoint
        deepspeed.DeepSpeedEngine.load_checkpoint = lambda *args, **options: whole(*args, **{**options, flag: False})


StepPlan._permutation_of = StepPlan.indices


def start(launch, rank, port, log):
    """Forks one rank."""
    pid = os.fork()
    if pid:
        return pid
    ranks = launch.get("ranks", 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **launch.get("environment", {})}
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    if "hook" in launch:
        name, *arguments = launch["hook"]
        hooks = (kill_in_backward, kill_in_evaluation, in_backward, kill_after, full_disk, drop)
        {f.__name__: f for f in hooks}[name](*arguments)
    loop.leave(loop.run(Arguments(**launch["arguments"])))


def run(launch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = os.memfd_create("log")
    sys.stdout.flush()  # or each rank would print it again
    alive = {start(launch, rank, port, log): rank for rank in range(launch.get("ranks", 2))}
    codes, ends = [None] * len(alive), []
    deadline = time.monotonic() + launch.get("patience", 120)
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[alive.pop(pid)] = os.waitstatus_to_exitcode(status)
            ends.append(time.monotonic())
            if codes != [0] * len(codes):  # as the launcher does: ranks that still wait for a first connection
                deadline = min(deadline, ends[0] + launch.get("grace", 20))
        elif time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
    output = os.pread(log, 1 << 20, 0).decode(errors="replace")
    os.close(log)
    return {"codes": codes, "seconds": ends[-1] - ends[0], "output": output}


def prepare():
    """Does once what each rank would do, so that a fork has it."""
    _import_muon()
    list(deepspeed.ops.__compatible_ops__)
    metrics.draw_losses = lambda *_: None  # a tenth of a run's time, and nothing that a kill could change
    gc.collect()
    gc.freeze()  # or the first collection of each rank would touch, and so copy, all of it


def main(cases, out):
    prepare()
    for name, launches in json.loads(Path(cases).read_text()).items():
        outcome = [run(launch) for launch in launches]
        (Path(out) / f"{name}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
