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
STEPS = 4
COMMON = {
    "train_file": "rows.jsonl", "validation_file": "rows.jsonl", "learning_rate": 3e-3, "logging_steps": 1,
    "lr_scheduler_type": "constant",  # that does not ask how many steps there will be
}  # fmt: skip


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
    for code, output in run_on(nodes, max_steps=STEPS // 2, save_steps=STEPS // 2):
        assert code == 0, output
    outputs = run_on(nodes, max_steps=STEPS, resume_from_checkpoint="auto")
    for code, output in outputs:
        assert code == 0, output
    assert f"resumed    after step {STEPS // 2}" in outputs[0][1]
    assert (first / "out" / "model.safetensors").exists() and (first / "out" / "all_results.json").exists()
    assert [path.name for path in (second / "out").iterdir()] == ["checkpoints"]  # its part of them, and nothing else

    files = {"train_file": sums_file, "validation_file": sums_file}
    batch = 2 * Arguments().per_device_train_batch_size
    alone = Arguments(
        **{**COMMON, **files, "model_name_or_path": tiny_llama, "output_dir": str(tmp_path / "out"), "bf16": False},
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        report_to=["none"],
    )
    train(alone)
    assert losses(first) == pytest.approx(losses(tmp_path), rel=1e-4)
