"""Starting `fastft/train.py` through DeepSpeed's launcher, without importing either."""

import argparse
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

# name -> (type, what it is called in the help, help); the type None makes a switch
LAUNCHER_OPTIONS = {
    "num_accelerators": (int, "N", "ranks on each node; by default one for each GPU, or one on the CPU"),
    "num_gpus": (int, "N", "the same"),
    "hostfile": (str, "FILE", "nodes of the run, a line `name slots=ranks` for each"),
    "num_nodes": (int, "N", "use only the first N nodes of the hostfile"),
    "include": (str, "NODES", "use only these, for example localhost:0,2 or worker-1@worker-2:0,1"),
    "exclude": (str, "NODES", "use all but these"),
    "master_addr": (str, "ADDRESS", "address of the first node; by default found through ssh"),
    "master_port": (int, "PORT", "port of the first rank; by default a free one, 29500 with a hostfile"),
    "launcher": (str, "NAME", "what starts the nodes: pdsh (default), openmpi, slurm, mpich, impi or mvapich"),
    "no_ssh": (None, None, "start this node only: run the command on every node, each with its --node_rank"),
    "node_rank": (int, "N", "this node's place in the hostfile, from 0; with --no_ssh"),
    "bind_cores_to_rank": (None, None, "pin each rank to its own cores; needs numactl"),
}


def add_launcher_options(parser):
    """Adds the flags above to a parser or group; those that are not given leave no trace in the result."""
    for name, (kind, metavar, help) in LAUNCHER_OPTIONS.items():
        how = {"action": "store_true"} if kind is None else {"type": kind, "metavar": metavar}
        parser.add_argument(f"--{name}", help=help, default=argparse.SUPPRESS, **how)


def launch(script, arguments, options):
    """Runs DeepSpeed's launcher and returns its exit code, which is that of the rank which failed first.

    Signals go to the ranks of this machine, which save and end by themselves: DeepSpeed's launcher dies of some without
    ending its ranks, and answers others with exit code 1. options: {name: value} of LAUNCHER_OPTIONS. Raises ValueError
    for those that cannot be.
    """
    command, environment = launch_command(script, arguments, options)
    # a session of its own: Ctrl-C reaches this process only
    launcher = subprocess.Popen(command, env=environment, start_new_session=os.name != "nt")

    def pass_on(number, frame):
        for process in _ranks(launcher.pid) or [launcher]:
            process.send_signal(number)

    handlers = {}
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):  # Windows has the first two
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = signal.signal(number, pass_on)
    try:
        code = launcher.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _ranks(launcher):
    """The processes that DeepSpeed's launcher (a process number) has started here to train."""
    import psutil

    try:
        starters = [p for p in psutil.Process(launcher).children() if "deepspeed.launcher.launch" in p.cmdline()]
        return [rank for starter in starters for rank in starter.children()]
    except psutil.Error:
        return []


def launch_command(script, arguments, options):
    """(command line, environment) that start `script` on every rank."""
    _check(options)
    if "hostfile" in options and "no_ssh" not in options:
        _check_shell(arguments)
    options, environment = dict(options), dict(os.environ)
    if "hostfile" not in options:
        options.setdefault("master_port", _free_port())
        if not has_gpu():
            environment.setdefault("DS_ACCELERATOR", "cpu")
            if not {"num_accelerators", "num_gpus", "include", "exclude"} & set(options):
                options["num_accelerators"] = 1  # DeepSpeed would start one rank for each NUMA node
            ranks = options.get("num_accelerators", options.get("num_gpus", 1))
            if ranks > 1:  # each rank would take all cores
                environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    flags = []
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    # level critical: a rank that fails has said why, and the launcher's exit code tells that it did
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    return [*launcher, *flags, str(script), *arguments], environment


def has_gpu():
    """Whether there is a driver for CUDA or ROCm; torch itself would take two seconds to answer."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True


def _check(options):
    for name in ("num_accelerators", "num_gpus", "num_nodes"):
        if options.get(name, 1) < 1:
            raise ValueError(f"--{name} {options[name]}: must be at least 1")
    if not 0 < options.get("master_port", 1) < 65536:
        raise ValueError(f"--master_port {options['master_port']}: must be from 1 to 65535")
    if "hostfile" in options and not Path(options["hostfile"]).is_file():
        raise ValueError(f"--hostfile {options['hostfile']}: no such file")
    counted = [name for name in ("num_accelerators", "num_gpus", "num_nodes") if name in options]
    chosen = [name for name in ("include", "exclude") if name in options]
    if (counted and chosen) or len(chosen) > 1:
        names = " and ".join(f"--{name}" for name in (chosen + counted)[:2])
        raise ValueError(f"{names}: give one of them")
    if options.get("num_nodes", 1) > 1 and "hostfile" not in options:
        raise ValueError(f"--num_nodes {options['num_nodes']}: needs --hostfile, which names the nodes")
    if ("no_ssh" in options) != ("node_rank" in options):
        raise ValueError("--no_ssh and --node_rank: each needs the other")


def _check_shell(arguments):
    """ValueError for what the shells of other nodes would not take as text: pdsh and ssh hand them the command unquoted."""
    for argument in arguments:
        if not re.fullmatch(r"[\w@%+=:,./ -]*", argument):
            raise ValueError(
                f"{argument!r}: has a character that the shells of the other nodes would interpret; "
                "put such values into a --config file, or start every node with --no_ssh"
            )


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
