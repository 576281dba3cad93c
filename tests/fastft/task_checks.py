"""Checks that need several ranks: `python task_checks.py FOLDER TOKENIZER`, started once per rank; fails by an assertion."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from fastft.arguments import Arguments
from fastft.data import Collator, build, eval_batches
from fastft.engine import leave
from fastft.tasks import get_task

FILES = {
    "classes.csv": "text,label\nab,x\nabc,y\na,z\nhello,y\nxy,x\n",
    "scores.csv": "text,score\nab,0.5\nabc,2\na,1.25\nhello,4.0\nxy,3\n",
    "prompts.csv": "prompt,completion\nab,ba\nabc,cba\na,a\nhello,olleh\nxy,yx\n",
}


class Model(torch.nn.Module):
    """Logits of each token, or of the sum of an example's tokens."""

    def __init__(self, outputs, per_token):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.per_token = torch.nn.Embedding(60, outputs), per_token

    def forward(self, input_ids, attention_mask, **kwargs):
        hidden = self.table(input_ids)
        logits = hidden if self.per_token else (hidden * attention_mask[..., None]).sum(1)
        return type("Output", (), {"logits": logits})


def main(folder, tokenizer):
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    collate = Collator(tokenizer, None, packing=False)
    assembled = []
    assemble = build._assemble
    build._assemble = lambda *args: assembled.append(1) or assemble(*args)
    for name, content in FILES.items():
        path = Path(folder) / name
        if rank == 0:
            path.write_text(content)
        dist.barrier()
        task = get_task(Arguments(train_file=str(path), cache_dir=folder))
        ds = task.load_data(tokenizer)["train"]
        outputs = 60 if task.name == "causal_lm" else task.model_kwargs()["num_labels"]
        model = Model(outputs, task.name == "causal_lm")
        metrics = task.evaluate(model, eval_batches(ds, collate, 1, rank, world_size))
        everyone = [None] * world_size
        dist.all_gather_object(everyone, metrics)
        assert everyone == [metrics] * world_size, "every rank has the same metrics"
        if rank == 0:
            alone = evaluate_alone(task, model, ds, collate)
            assert flat(metrics).keys() == flat(alone).keys()
            for key, value in flat(alone).items():
                assert np.isclose(flat(metrics)[key], value, rtol=1e-6), (name, key, flat(metrics)[key], value)
        dist.barrier()
    counts = [None] * world_size
    dist.all_gather_object(counts, len(assembled))
    assert sum(counts) == len(FILES), f"each file is tokenised by one rank alone, not {counts}"
    dist.barrier()
    leave(0)


def evaluate_alone(task, model, ds, collate):
    """The metrics that one process gets, without the process group."""
    is_initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        return task.evaluate(model, eval_batches(ds, collate, 3, 0, 1))
    finally:
        dist.is_initialized = is_initialized


def flat(metrics):
    inner = {f"{c}.{k}": v for c, values in metrics.get("per_class", {}).items() for k, v in values.items()}
    return {**{k: v for k, v in metrics.items() if k != "per_class"}, **inner}


if __name__ == "__main__":
    main(*sys.argv[1:])
