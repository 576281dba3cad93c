"""Hugging Face's Trainer, Accelerate and TRL's SFTTrainer, the real ones, over patched models and with fastft's optimizers."""

import contextlib
import functools
import importlib.util
import os
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import fastft
from fastft import ops
from fastft.engine import init_ranks
from fastft.optim import AdamW, AdamW8bit

OPS = ("attention", "rms_norm", "layer_norm", "lora_linear", "lora_group", "lora_mlp", "linear_cross_entropy")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def environment():
    """These libraries write into the environment and keep global state."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def calls(monkeypatch):
    """{op: how often it was called}."""
    counts = dict.fromkeys(OPS, 0)
    for name in OPS:

        def counted(op, name, *args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, functools.partial(counted, getattr(ops, name), name))
    return counts


def llama(lora=False):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=1))
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def classifier():
    torch.manual_seed(1)
    rates = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)
    return BertForSequenceClassification(BertConfig(**SIZES, **rates, num_labels=3))


def rows(count=16, classes=False):
    """Sequences of 4 to 11 tokens, padded to 12, with a class each or their tokens as labels."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        ids = torch.randint(3, 64, (12,), generator=generator)
        mask = (torch.arange(12) < 4 + i % 8).long()
        ids = ids * mask
        labels = torch.tensor(i % 3) if classes else ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }


def curve(trainer, *names):
    """What was logged under these names, step by step."""
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


def shape_of_logits(prediction):
    return {"logits": prediction.predictions.shape[-1]}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("lora", {}),
        ("bert", {}),
    ],
)
def test_trainer(kind, more, tmp_path, calls):
    """The same losses in training and evaluation, where logits are there for the metrics; and every op was called."""
    found = []
    for patched in (False, True):
        model = classifier() if kind == "bert" else llama(kind == "lora")
        if patched:
            assert sum(calls.values()) == 0
            fastft.patch(model, verbose=False)
        data = rows(classes=kind == "bert")
        arguments = TrainingArguments(**settings(tmp_path, **more))
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], compute_metrics=shape_of_logits)
        trainer.train()
        found.append(curve(trainer, "loss", "grad_norm", "eval_loss", "eval_logits"))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and len(found[0]) == 12
    assert found[0][0] != pytest.approx(found[0][2], rel=1e-3), "nothing was learnt"
    used = {name for name, count in calls.items() if count}
    decoder = {"attention", "rms_norm", "linear_cross_entropy"}
    adapters = {"lora_linear", "lora_group", "lora_mlp"}
    assert used == {"llama": decoder, "lora": decoder | adapters, "bert": {"attention", "layer_norm"}}[kind]


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_accelerate(kind, calls):
    """A loop of one's own, with autocast and accumulation, and AdamW8bit as the optimizer that steps."""
    found = []
    for patched in (False, True):
        model = llama(kind == "lora")
        if patched:
            fastft.patch(model, verbose=False)
        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        loader = torch.utils.data.DataLoader(rows(), batch_size=4)
        model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
        assert wrapped.optimizer is optimizer
        losses = []
        for _ in range(3):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    wrapped.step()
                    wrapped.zero_grad()
                losses.append(loss.item())
        states = [state for state in optimizer.state.values() if "exp_avg_codes" in state]
        assert states and all(state["step"] == 6 for state in states)
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=0.05) and found[0][-1] < 0.9 * found[0][0]
    assert calls["attention"] == 24 and calls["linear_cross_entropy"] == 12
    assert (calls["lora_group"] == 24) == (kind == "lora")


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)


@needs_trl
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(("lora", "order"), [(False, "before"), (True, "before"), (True, "after")])
def test_sft_trainer(lora, order, padding_free, tmp_path, calls):
    """Padded and packed rows. TRL takes the loss itself, over fastft's layers; the model may be patched before or after."""
    from trl import SFTConfig, SFTTrainer

    texts = [" ".join(f"w{(7 * i + 3 * j) % 61}" for j in range(3 + i % 8)) for i in range(16)]
    data = Dataset.from_list([{"text": text} for text in texts])
    found = []
    for patched in (False, True):
        model = llama(lora)
        if patched and order == "before":
            fastft.patch(model, verbose=False)
        arguments = SFTConfig(
            **settings(tmp_path, bf16=False), padding_free=padding_free, max_length=None if padding_free else 32
        )
        with contextlib.redirect_stdout(None):
            trainer = SFTTrainer(
                model, arguments, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tokenizer()
            )
            if patched and order == "after":
                report = fastft.patch(trainer.model, verbose=False)
                assert "has replaced the forward of LlamaForCausalLM" in report.kept["loss"]
            trainer.train()
        found.append(curve(trainer, "loss", "grad_norm", "eval_loss"))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and len(found[0]) == 10
    assert calls["attention"] >= 12 and calls["rms_norm"] > calls["attention"]
    assert (min(calls["lora_group"], calls["lora_mlp"], calls["lora_linear"]) >= 12) == lora
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("cu_seq_lens_q" in batch) == padding_free
    fastft.unpatch(trainer.model)
    counts = dict(calls)
    output = trainer.model.eval()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]))
    assert output.logits.shape == (1, 3, 64) and calls == counts


def offloading(**more):
    """Accelerate over DeepSpeed, ZeRO 2 with the optimizer's state on the CPU."""
    init_ranks()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False},
        **more,
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


class CPUAdam(torch.optim.SGD):
    """Stands for DeepSpeedCPUAdam, which has to be compiled."""

    __module__ = "deepspeed.ops.adam.cpu_adam"

    def __init__(self, params, adamw_mode=True, **settings):
        super().__init__(params, **settings)


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamW])
def test_offload_in_accelerate_keeps_the_optimizer_or_says_so(optimizer_class, monkeypatch):
    """It builds a DeepSpeedCPUAdam from any optimizer's groups, unless the DeepSpeed configuration says otherwise."""
    import deepspeed

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", CPUAdam)
    for force, expected in ((True, CPUAdam), (False, optimizer_class)):
        torch.manual_seed(0)
        model = nn.Linear(6, 300)
        before = model.weight.detach().clone()
        accelerator = offloading(zero_force_ds_cpu_optimizer=force)
        engine, wrapped = accelerator.prepare(model, optimizer_class(model.parameters(), lr=1e-2))
        assert type(engine.basic_optimizer) is expected
        loss = engine(torch.ones(4, 6)).square().mean()
        if force:
            with pytest.raises(
                RuntimeError, match=f"{optimizer_class.__name__} was replaced by CPUAdam.*zero_force_ds_cpu"
            ):
                accelerator.backward(loss)
        else:
            accelerator.backward(loss)
            wrapped.step()
        assert torch.equal(engine.module.weight, before) == force
        AcceleratorState._reset_state(reset_partial_state=False)
