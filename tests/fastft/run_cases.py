"""Runs several training runs in one process group: `python run_cases.py CASES.json OUT_DIR`, started once per rank.

CASES.json: {case name: arguments}. Start-up costs seconds and a run of a tiny model less, so tests share launches.
Rank 0 writes OUT_DIR/<case>.json: {"losses", "skipped", "results"} or {"error"}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch


def poison(step, rank):
    """Makes the loss of one rank NaN at one optimizer step (counted from 0)."""
    from fastft.tasks.causal_lm import Task

    whole, calls = Task.loss, [0]

    def loss(self, model, batch, num_items):
        value = whole(self, model, batch, num_items)
        calls[0] += 1
        return value * float("nan") if calls[0] == step + 1 and int(os.environ["RANK"]) == rank else value

    Task.loss = loss
    return lambda: setattr(Task, "loss", whole)


def main(cases_file, out_dir):
    torch.set_num_threads(1)
    import torch.distributed as dist

    from fastft.arguments import Arguments
    from fastft.engine import leave
    from fastft.optim import row_gradients
    from fastft.train import train

    for name, case in json.loads(Path(cases_file).read_text()).items():
        undo = poison(*case.pop("poison")) if "poison" in case else lambda: None
        row_gradients.MIN_ELEMENTS = case.pop("min_elements_of_row_gradients", 2**20)
        try:
            args = Arguments(**{"report_to": ["none"], "logging_steps": 1, **case})
            results = train(args)
            lines = [json.loads(line) for line in (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()]
            outcome = {"losses": [line["loss"] for line in lines if "loss" in line], "results": results}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        finally:
            undo()
        if os.environ["RANK"] == "0":
            (Path(out_dir) / f"{name}.json").write_text(json.dumps(outcome))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
