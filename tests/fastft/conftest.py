"""Launching runs from tests: `launch(cases, ranks)` in one process group, `tiny_llama` to train."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RUN_CASES = Path(__file__).with_name("run_cases.py")


@pytest.fixture(scope="session")
def shared_folder():
    """The folder with data sets and small models, for fixtures that outlive a test."""
    folder = Path(os.environ.get("FASTFT_SHARED", Path(__file__).parents[3] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set FASTFT_SHARED")
    return folder


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """launch(cases, ranks) -> {case: outcome of tests/fastft/run_cases.py}; a hang fails after ten minutes."""

    def run(cases, ranks=2):
        out = tmp_path_factory.mktemp("cases")
        for name, case in cases.items():
            case.setdefault("output_dir", str(out / f"run-{name}"))
        (out / "cases.json").write_text(json.dumps(cases))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(RUN_CASES), str(out / "cases.json"), str(out)]
        logs = [open(out / f"rank{r}.log", "w") for r in range(ranks)]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=logs[r],
                stderr=logs[r],
            )
            for r in range(ranks)
        ]
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process, log in zip(processes, logs, strict=True):
                process.kill()
                log.close()
        tail = lambda r: (out / f"rank{r}.log").read_text()[-3000:]
        assert codes == [0] * ranks, "\n".join(f"rank {r}:\n{tail(r)}" for r in range(ranks))
        return {name: json.loads((out / f"{name}.json").read_text()) for name in cases}

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random two-layer Llama and a character tokenizer: the smallest thing the loop can train."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,?+=\n"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory):
    """61 prompts and completions of very different lengths, in JSONL: not a multiple of any batch."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{a * a}=", "completion": ", ".join([str(a + a * a)] * (1 + a % 7))} for a in range(61)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="session")
def run_arguments(tiny_llama, sums_file):
    """run_arguments(folder, (zero_stage, offload), kind, optimizer, **more): 8 steps of 2 ranks, 4 an epoch."""

    def make(folder, layout=(0, "none"), kind="fp32", optimizer="adamw_torch", **more):
        lora = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "bf16": False}
        kinds = {"fp32": {"bf16": False}, "bf16": {"bf16": True}, "lora": lora}
        return {
            "model_name_or_path": tiny_llama, "train_file": sums_file, "validation_file": sums_file,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3,
            "weight_decay": 0.01, "warmup_steps": 3, "max_steps": 8, "max_eval_samples": 8, "eval_steps": 3,
            "save_steps": 2, "save_total_limit": 2, "logging_steps": 1, "report_to": ["none"], "output_dir": str(folder),
            "zero_stage": layout[0], "offload_optimizer": layout[1], "optim": optimizer,
            "resume_from_checkpoint": "auto", **kinds[kind], **more,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def run_killed():
    """run_killed(cases, out) -> {case: {"folder", "launches": outcomes of kill_cases.py}}."""

    def run(cases, out):
        (out / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, str(RUN_CASES.with_name("kill_cases.py")), str(out / "cases.json"), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        launches = {name: json.loads((out / f"{name}.json").read_text()) for name in cases}
        return {name: {"folder": out / name, "launches": launches[name]} for name in cases}

    return run
