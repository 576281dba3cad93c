"""One run of a tiny model, killed again and again at random instants: `python soak.py --kills 200 --out FOLDER`.

One rank or both are killed, at an instant that is uniform from the start of the process on, so in loading, training,
evaluating, saving and rotating; then the same command starts again. In the end weights and metrics must be those of the run
that nobody disturbed, and no checkpoint may ever have been found broken. Writes FOLDER/soak.json; exit code 1 otherwise.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

import kill_cases
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS_PER_KILL = 12  # enough that the run is not over before the last kill


def prepare(out):
    """A random two-layer Llama over characters, and sums to learn: {"model_name_or_path", "train_file", ...}."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"0123456789+=, "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out / "model")
    torch.manual_seed(0)
    size = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        **size, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(out / "model")
    rows = [{"prompt": f"{a}+{a * a}=", "completion": str(a + a * a)} for a in range(300)]
    (out / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = str(out / "sums.jsonl")
    return {"model_name_or_path": str(out / "model"), "train_file": file, "validation_file": file}


def result(folder):
    """Hashes of the weights, and of the metrics without the times."""
    timed = ("seconds", "tokens_per_second", "samples_per_second", "peak_memory_bytes")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
    weights = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    return weights, len(lines), hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--optim", default="adamw_8bit")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    kill_cases.prepare()
    draw = random.Random(args.seed)
    arguments = {
        **prepare(args.out), "max_steps": STEPS_PER_KILL * args.kills, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "use_peft": True, "lora_r": 4, "lora_dropout": 0.1,
        "bf16": False, "zero_stage": args.zero_stage, "optim": args.optim, "save_steps": 5, "save_total_limit": 2,
        "eval_steps": 20, "max_eval_samples": 16, "logging_steps": 1, "report_to": ["none"],
        "resume_from_checkpoint": "auto",
    }  # fmt: skip
    longest = 4.0  # seconds to the latest kill; adapted, so that about half of them come after new steps
    killed, places, broken, unfinished, began = 0, {}, 0, set(), time.monotonic()
    folder = args.out / "killed"
    while killed < args.kills:
        ranks = draw.choice([[0], [1], [0, 1]])
        hook = ["kill_after", ranks, draw.uniform(0.1, longest)]
        launch = kill_cases.run({"arguments": {**arguments, "output_dir": str(folder)}, "hook": hook, "grace": 4})
        broken += launch["output"].count("cannot be used")
        if launch["codes"] == [0, 0]:
            print(f"the run was over after {killed} kills", flush=True)
            break
        assert any(launch["codes"][rank] == -9 for rank in ranks), launch
        killed += 1
        steps = re.findall(r"^step (\d+)/", launch["output"], re.MULTILINE)
        left = set((folder / "checkpoints").glob(".step-*"))
        saving = left - unfinished
        unfinished = left
        place = "saving or rotating" if saving else "training or evaluating" if steps else "starting or loading"
        places[place] = places.get(place, 0) + 1
        longest = min(10.0, longest * 1.1) if len(steps) < 12 else max(1.0, longest / 1.1)
        if killed % 10 == 0:
            done = max(map(int, steps), default=0)
            print(
                f"{killed} kills, {time.monotonic() - began:.0f} s, step {done} of {arguments['max_steps']}", flush=True
            )
    last = kill_cases.run({"arguments": {**arguments, "output_dir": str(folder)}, "patience": 3600})
    seconds = time.monotonic() - began
    whole = kill_cases.run({"arguments": {**arguments, "output_dir": str(args.out / "whole")}, "patience": 3600})
    assert last["codes"] == whole["codes"] == [0, 0], (last, whole)
    same = result(folder) == result(args.out / "whole")
    record = {
        "kills": killed, "places": places, "broken checkpoints met": broken, "steps": arguments["max_steps"],
        "seconds": round(seconds), "same weights and metrics": same, "zero_stage": args.zero_stage, "optim": args.optim,
        "seed": args.seed, "weights": result(folder)[0],
    }  # fmt: skip
    (args.out / "soak.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    for name in ("killed", "whole"):
        shutil.rmtree(args.out / name)
    return 0 if same and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
