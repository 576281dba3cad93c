"""What ends a run from outside: signals, a rank that dies, ranks that wait for each other for ever.

Exit codes of `fastft train`: 0 done; 2 input that cannot be used; 75 (EX_TEMPFAIL) stopped by a signal after a checkpoint
was written, start again to go on; 130 or 143 stopped at once by a second signal; 1 anything else.
"""

import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from fastft.durable import rank

STOPPED = 75
SAVE, STOP = 1, 2
ONE_REQUEST = 3.0  # seconds: a launcher passes one Ctrl-C on several times, so what comes within them is one request
LINGER = 3.0  # seconds that a rank waits for the others' last words
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


class Stopped(SystemExit):
    """The run ended because a signal asked for it, with all that it needs to go on in a checkpoint."""

    def __init__(self, text):
        super().__init__(STOPPED)
        self.text = text

    def __str__(self):
        return self.text


class Guard:
    """Watches over the training loop: `with Guard(timeout) as guard`, and `guard.wish()` after each step.

    SIGTERM, SIGINT and SIGHUP ask for a checkpoint and the end after the step under way, a second one (after 3 s) ends
    this process at once; SIGUSR1 asks for a checkpoint only. Where no step or evaluation batch is done for `timeout`
    seconds, each rank writes what its threads are doing to standard error and ends.
    """

    def __init__(self, timeout):
        self.timeout = timeout
        self._wish, self._since, self._group = 0, 0.0, None

    def __enter__(self):
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self._alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # agreeing must not wait for the GPU
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):  # Windows has the first two
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._on_signal)
        self._ended = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, daemon=True, name="fastft watchdog").start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def beat(self):
        """Says that this rank makes progress."""
        self._beat = time.monotonic()

    def watch(self, batches):
        """The same batches; each of them is progress."""
        for batch in batches:
            self.beat()
            yield batch

    def wish(self):
        """What signals to any of the ranks have asked for: 0, SAVE or STOP. Every rank calls it, and all get the same."""
        self.beat()
        wish = torch.tensor(self._wish)
        if not self._alone:
            dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=self._group)
        if self._wish == SAVE:
            self._wish = 0
        return wish.item()

    def everywhere(self, flag):
        """Whether `flag` holds on every rank. Every rank calls it, and all get the same."""
        agreed = torch.tensor(int(flag))
        if not self._alone:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
        return bool(agreed.item())

    def _on_signal(self, number, frame):
        if number == getattr(signal, "SIGUSR1", None):
            self._wish = max(self._wish, SAVE)
            return
        name = signal.Signals(number).name
        if self._wish < STOP:
            self._wish, self._since = STOP, time.monotonic()
            self._say(
                f"{name}: this step is finished, then a checkpoint is written and the run ends; once more ends it now"
            )
        elif time.monotonic() - self._since > ONE_REQUEST:
            self._say(f"{name} again: ending now, without a checkpoint")
            os._exit(128 + number)

    def _say(self, text):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"{text}\n".encode())  # print is not to be called from a signal handler

    def _watch(self):
        while not self._ended.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self._beat > self.timeout:
                print(f"rank {rank()}: no progress for {self.timeout} s (--ddp_timeout); its threads:", file=sys.stderr)
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                time.sleep(LINGER)
                os._exit(1)


def report(error):
    """Says on standard error why this rank fails, and returns its exit code.

    What fails alike on several ranks of a machine is said once, a bug with its traceback, and a rank that fails because
    it lost the others says so after they had the time to say more.
    """
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
        time.sleep(LINGER)
        reason = str(error).strip().splitlines()[0]
        text = f"rank {rank()}: another rank ended, killed (out of memory?) or for the reason above ({reason:.200})"
    elif isinstance(error, (ValueError, FloatingPointError, OSError, Stopped)):
        text = f"fastft train: {'stopped' if isinstance(error, Stopped) else 'error'}: {error}"
        if not getattr(error, "of_this_rank", False) and not _first_to_say(text):
            text = None
    else:
        text = f"rank {rank()} failed:\n{''.join(traceback.format_exception(error))}"
    if text is not None:
        print(text, file=sys.stderr, flush=True)
    return STOPPED if isinstance(error, Stopped) else 2 if isinstance(error, ValueError) else 1


def _first_to_say(text):
    """Whether no other rank of this machine has said this; ranks ask each other through the process group's store."""
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return first_here
    key = hashlib.sha256(f"{os.environ.get('CROSS_RANK')} {text}".encode()).hexdigest()
    try:
        return dist.distributed_c10d._get_default_store().add(f"fastft/said/{key}", 1) == 1
    except RuntimeError:  # the rank that holds the store is gone, so it has spoken
        return first_here
