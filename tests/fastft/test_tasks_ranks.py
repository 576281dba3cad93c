"""Two ranks evaluate as one does, though five examples do not divide by two, and a file is tokenised once per machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.distributed
def test_two_ranks(tmp_path, tiny_llama):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("task_checks.py")), str(tmp_path), tiny_llama]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    logs = [open(tmp_path / f"rank{rank}.log", "w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            log.close()
    assert codes == [0, 0], "\n".join((tmp_path / f"rank{rank}.log").read_text()[-2000:] for rank in range(2))
