"""Two nodes on one machine: two launchers, each with its own folder as its disk and its own cache, and one rank each.

The same command runs on both, with relative paths, so that nothing which one node writes is found by the other.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from fastft.arguments import Arguments
from fastft.train import train

pytestmark = pytest.mark.distributed
STEPS = 6
COMMON = {"train_file": "rows.jsonl", "validation_file": "rows.jsonl", "learning_rate": 3e-3, "logging_steps": 1}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, tiny_llama, sums_file):
    """Folders that stand for the disks of two nodes, each with the model, the data and a hostfile."""
    folders = [tmp_path_factory.mktemp(f"node-{i}") for i in (1, 2)]
    for folder in folders:
        shutil.copytree(tiny_llama, folder / "model")
        shutil.copy(sums_file, folder / "rows.jsonl")
        (folder / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    return folders


def run_on(nodes, **arguments):
    """Starts the command on both nodes and waits; [(exit code, stdout and stderr)]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    launcher = ["--hostfile", "hosts", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    said = {
        "model_name_or_path": "model",
        "output_dir": "out",
        "bf16": "false",
        "report_to": "none",
        **COMMON,
        **arguments,
    }
    flags = [text for name, value in said.items() for text in (f"--{name}", str(value))]
    processes = []
    for rank, node in enumerate(nodes):
        environment = {**os.environ, "HF_HOME": str(node / "cache"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "fastft", "train", *launcher, "--node_rank", str(rank), *flags]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=node, env=environment, **how))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def losses(folder):
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_two_nodes_train_as_one(nodes, tiny_llama, sums_file, tmp_path):
    first, second = nodes
    for code, output in run_on(nodes, max_steps=STEPS // 2, num_train_epochs=1, save_steps=STEPS // 2):
        assert code == 0, output
    assert (first / "out" / "model.safetensors").exists() and (first / "out" / "all_results.json").exists()
    assert not (second / "out" / "model.safetensors").exists()  # only rank 0's disk gets the results
    half = losses(first)

    for code, output in run_on(nodes, max_steps=STEPS, resume_from_checkpoint="auto"):
        assert code == 0, output
    assert losses(first)[: STEPS // 2] == half

    alone = {**COMMON, "train_file": sums_file, "validation_file": sums_file, "max_steps": STEPS}
    folder = tmp_path / "alone"
    size = 2 * Arguments().per_device_train_batch_size
    train(
        Arguments(
            model_name_or_path=tiny_llama,
            output_dir=str(folder / "out"),
            per_device_train_batch_size=size,
            bf16=False,
            report_to=["none"],
            **alone,
        )
    )
    assert losses(first) == pytest.approx(losses(folder), rel=1e-4)
