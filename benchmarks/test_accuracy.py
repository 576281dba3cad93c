"""What the speed is worth: `pytest benchmarks/test_accuracy.py --benchmark-only --full`.

An epoch of each sentiment job, then the accuracy on sentences that were not trained on, for several seeds: fastft, with its
optimizers and on two ranks, beside the careful Hugging Face loops with the same schedule. Accuracies go into the result; the
times are those of whole runs, start and evaluation included, and nothing to compare.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import get_scheduler

from benchmarks import _sentiment
from benchmarks._harness import ROOT, Replay
from benchmarks.test_scaling import CLI

replay = Replay()
SCHEDULE = {"weight_decay": 0.01, "warmup_ratio": 0.06}
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """A loop over the data of `job`; `arguments` of `fastft train`, or None for a Hugging Face loop."""

    job: str
    loop: str
    arguments: tuple[str, ...] | None
    seeds: tuple[int, ...] = SEEDS
    learning_rate: float = 5e-5


CASES = [
    Case("sst2", "careful", None),
    Case("sst2", "mixed", None),
    Case("sst2", "fastft", ()),
    Case("sst2", "fastft, adamw_8bit", ("--optim", "adamw_8bit")),
    Case("sst2", "fastft, two ranks, ZeRO-2", ("--num_accelerators", "2", "--zero_stage", "2"), seeds=(1,)),
    Case("banking77", "fastft", (), seeds=(1,), learning_rate=2e-4),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.job}, {case.loop}")
def accuracy(request, tmp_path_factory, result):
    """(case, accuracy of each seed, seconds of each)."""
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    if not (toy or full):
        pytest.skip("whole epochs are trained with --full only")
    case, folder = request.param, tmp_path_factory.mktemp("accuracy")
    if toy and (case.arguments or case.job != "sst2"):
        pytest.skip("one run of fastft is enough to see that it still goes")
    if case.loop == "mixed" and (why := _sentiment.why_not("mixed")):
        pytest.skip(why)
    try:
        job, held_out = toy_files(folder) if toy else files(case.job)
    except FileNotFoundError as error:
        pytest.skip(f"{error} (--toy needs nothing)")
    job = replace(job, learning_rate=case.learning_rate)
    accuracies, seconds = [], []
    for seed in case.seeds[:1] if toy else case.seeds:
        start = time.perf_counter()
        if case.arguments is None:
            accuracies.append(hugging_face(replace(job, seed=seed), held_out, case.loop == "mixed"))
        else:
            accuracies.append(fastft(replace(job, seed=seed), held_out, case.arguments, folder / str(seed)))
        seconds.append(time.perf_counter() - start)
    result["accuracies"].append({"job": job.name, "loop": case.loop, "accuracies": accuracies})
    return case, accuracies, seconds


@pytest.mark.benchmark(timer=replay.clock)
def test_accuracy(benchmark, accuracy):
    case, accuracies, seconds = accuracy
    benchmark.group = f"{case.job}: whole runs"
    benchmark.extra_info["eval_accuracy"] = accuracies
    replay(benchmark, seconds)


def files(name):
    job = _sentiment.sst2_job()
    if name == "sst2":
        return job, job.train_file.replace("train.tsv", "dev.tsv")
    folder = _sentiment.data_folder() / "banking77"
    if not (folder / "train.csv").exists():
        raise FileNotFoundError(f"the data is missing: {folder / 'train.csv'}")
    train, test = (str(folder / f"{part}.csv") for part in ("train", "test"))
    return replace(job, name="all-MiniLM-L6-v2 on Banking77", train_file=train), test


def toy_files(folder):
    job = _sentiment.toy_job(folder)
    return job, job.train_file


def fastft(job, held_out, arguments, folder):
    """Accuracy after `fastft train`, in a process of its own."""
    given = {
        "model_name_or_path": job.model,
        "train_file": job.train_file,
        "validation_file": held_out,
        "max_length": job.padded_length,
        "per_device_train_batch_size": job.batch_size // (2 if "--num_accelerators" in arguments else 1),
        "learning_rate": job.learning_rate,
        "num_train_epochs": 1,
        "seed": job.seed,
        "output_dir": folder,
        "report_to": "none",
        **SCHEDULE,
        **({"cache_dir": job.cache_dir} if job.cache_dir else {}),
    }
    command = [
        sys.executable,
        "-c",
        CLI,
        "train",
        *(str(x) for k, v in given.items() for x in (f"--{k}", v)),
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "all_results.json").read_text())["eval_accuracy"]


def hugging_face(job, held_out, mixed):
    """Accuracy after an epoch of the careful Hugging Face loop, or of the mixed one, with fastft's schedule."""
    bench = _sentiment.Bench(job, validation_file=held_out)
    dtypes = {torch.float32: 0.0} if mixed else bench.probe_dtypes()
    side = bench.careful(min(dtypes, key=dtypes.get), weight_decay=SCHEDULE["weight_decay"], autocast=mixed)
    steps = bench.plan.steps_per_epoch
    schedule = get_scheduler("linear", side.optimizer, int(SCHEDULE["warmup_ratio"] * steps), steps)
    for step in range(steps):
        side.step(side.prepare(bench.examples(step)))
        schedule.step()
    side.model.eval()
    right = 0
    held_out = bench.data["validation"]
    with torch.no_grad():
        for first in range(0, len(held_out), job.batch_size):
            batch = side.prepare(held_out.take(range(first, min(first + job.batch_size, len(held_out)))))
            right += (side.model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(held_out)
