"""Steps of a Llama-shaped model over equally long sequences: frozen but for adapters on all linear layers (the LoRA job), or
trained whole.

eager      transformers and PEFT as they come, eager attention, fused AdamW, clipping
careful    the same with SDPA
trainer    the careful model in transformers' Trainer, where accelerate is installed
compiled   the same under torch.compile; with --full only, for it compiles for minutes
liger      the same with Liger's kernels, on GPUs, where it is installed; not run yet, for want of one
fastft     what `fastft train` does: packed rows, patched layers, its optimizer in the DeepSpeed engine

A whole model is trained by careful, by fastft, and by fastft with 8-bit AdamW. With its frozen weights in 4 bits (QLoRA) a
model is trained by fastft, by fastft with the 16-bit weights that they stand for, and, where bitsandbytes is installed, by
careful with its layers.

All start from the same random weights, in the dtype that fastft chooses here. Sequences are equally long, so packing gains
nothing: this job shows the kernels alone.
"""

import importlib.util
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import fastft
from benchmarks import _trainer
from benchmarks._processes import alternate, serve_steps
from fastft.arguments import Arguments
from fastft.data import Collator
from fastft.engine import backward, build_engine, choose_dtype, deepspeed_config, init_ranks
from fastft.models import add_lora
from fastft.quantization import dequantize_model, quantizable, quantize_model, whole_modules
from fastft.tasks import get_task
from fastft.train import to_device

SIDES = ("eager", "careful", "trainer", "compiled", "liger", "fastft")
WHOLE_SIDES = ("careful", "fastft 8-bit", "fastft")
QLORA_SIDES = ("bitsandbytes", "fastft 16-bit", "fastft")
WARMUP = 2  # rounds
PAD = 0


@dataclass(frozen=True)
class Job:
    """The model's shape, the batch and the adapters."""

    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = 32_000
    batch_size: int = 4
    length: int = 512
    lora_r: int = 16
    """0: no adapters, all weights are trained"""
    load_in_4bit: bool = False
    lora_dropout: float = 0.0
    learning_rate: float = 2e-4
    max_grad_norm: float = 1.0
    seed: int = 42

    @property
    def name(self):
        kind = "QLoRA (NF4, " if self.load_in_4bit else "LoRA ("
        lora = f"{kind}r = {self.lora_r}, all linear layers, dropout {self.lora_dropout:g}) on"
        return (
            f"{lora if self.lora_r else 'All weights of'} a Llama of {self.num_hidden_layers} layers, {self.hidden_size} wide, "
            f"vocabulary {self.vocab_size:,}"
        )


TOY = Job(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    batch_size=2,
    length=16,
    lora_r=4,
)
WHOLE = Job(lora_r=0, num_hidden_layers=4, learning_rate=2e-5)
WHOLE_TOY = replace(TOY, lora_r=0)
QLORA, QLORA_TOY = replace(Job(), load_in_4bit=True), replace(TOY, load_in_4bit=True)


def run(job, rounds, seconds=None, full=False, names=None, environment=None):
    """Checks that the loops compute the same, then lets them take turns. Returns what goes into a result's `jobs`.

    full: also those that compile for minutes. names: of the loops, of which those run that can. environment: what their
    processes find set.
    """
    bench = Bench(job)
    check = bench.check()
    sides = QLORA_SIDES if job.load_in_4bit else SIDES if job.lora_r else WHOLE_SIDES
    sides = [name for name in sides if names is None or name in names]
    loops = {name: (open_loop, job, name, WARMUP + rounds) for name in sides if why_not(name, full) is None}
    return {
        "job": {"name": job.name, **asdict(job)},
        "dtype": str(bench.dtype).removeprefix("torch."),
        "check": check,
        "tokens": job.batch_size * job.length,
        "apart": True,
        "sides": alternate(loops, rounds, warmup=WARMUP, seconds=seconds, environment=environment),
    }


def why_not(name, full):
    """Why a loop does not run here; None if it does."""
    if name == "compiled" and not full:
        return "torch.compile is measured with --full only"
    if name == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return {"trainer": _trainer.why_not, "liger": why_not_liger}.get(name, lambda: None)()


def open_loop(job, name, steps):
    """serve(pipe) of one loop, in its own process."""
    bench = Bench(job)
    batches = [bench.batch(number) for number in range(steps)]
    if name.startswith("fastft"):
        optim = "adamw_8bit" if name == "fastft 8-bit" else "adamw_torch"
        side = bench.fastft(optim=optim, four_bits=None if name == "fastft 16-bit" else "fastft")
    else:
        attention = "eager" if name == "eager" else "sdpa"
        four_bits = "bitsandbytes" if name == "bitsandbytes" else None
        side = bench.hugging_face(attention, compiled=name == "compiled", liger=name == "liger", four_bits=four_bits)
    prepared = [side.prepare(batch) for batch in batches]
    if name == "trainer":
        return _trainer.serve_trainer(side.model, prepared, job)
    return serve_steps(lambda number: side.step(prepared[number]))


def why_not_liger():
    """Why Liger cannot run here; None if it can."""
    if not torch.cuda.is_available():
        return "Liger's kernels need a GPU"
    return None if importlib.util.find_spec("liger_kernel") else "Liger is not installed"


def _read_by_bitsandbytes(model, dtype):
    """Turns the layers that fastft would quantise into bitsandbytes', as transformers does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in quantizable(model, whole_modules(model)):
        settings = {"quant_type": "nf4", "compress_statistics": True}
        shape = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": False}
        layer = Linear4bit(**shape, compute_dtype=dtype, **settings, device="meta")  # which draws no random numbers
        layer.weight = Params4bit(linear.weight.data, requires_grad=False, module=layer, **settings)
        model.set_submodule(name, layer.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT looks for


class Bench:
    """Data and settings that the loops share."""

    def __init__(self, job):
        self.job = job
        self.args = Arguments(
            model_name_or_path="a random Llama",
            task="causal_lm",
            use_peft=job.lora_r > 0,
            lora_r=job.lora_r or 1,
            lora_alpha=2 * job.lora_r or 1,
            lora_dropout=job.lora_dropout,
            lora_target_modules=["all-linear"],
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=job.max_grad_norm,
            seed=job.seed,
            report_to=["none"],
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = choose_dtype(self.args, self.device)
        self.task = get_task(self.args)

    def batch(self, number):
        """Examples of random tokens, all of them trained."""
        draw = np.random.default_rng((self.job.seed, number))
        ids = draw.integers(1, self.job.vocab_size, (self.job.batch_size, self.job.length), dtype=np.int32)
        return [{"input_ids": row, "labels": row} for row in ids]

    def model(self, attention, dtype, four_bits=None):
        """The same weights each time; lora_B is random too, so that all gradients are there from the first step.

        four_bits: whose layers hold the weights of a QLoRA job, "fastft" or "bitsandbytes"; None: 16-bit layers do.
        """
        shape = {k: v for k, v in asdict(self.job).items() if k.startswith(("hidden", "inter", "num_", "vocab"))}
        config = AutoConfig.for_model("llama", pad_token_id=PAD, max_position_embeddings=self.job.length, **shape)
        set_seed(self.job.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if self.job.load_in_4bit and four_bits == "bitsandbytes":
            _read_by_bitsandbytes(model, dtype)
        elif self.job.load_in_4bit:
            quantize_model(model)
            if four_bits is None:
                dequantize_model(model, dtype)
        if self.job.lora_r:
            model = add_lora(model, self.args, self.task)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.to(self.device).train()

    def hugging_face(self, attention, dtype=None, **options):
        return HuggingFace(self, attention, dtype or self.dtype, **options)

    def fastft(self, dtype=None, **stage):
        return Fastft(self, dtype or self.dtype, **stage)

    def check(self, tolerance=1e-4):
        """{side: {loss, gradient_norm}} of one batch in fp32. AssertionError where sides disagree: nothing is timed then."""
        batch, found = self.batch(0)[:2], {}
        for name, side in {
            "careful": self.hugging_face("sdpa", torch.float32),
            "fastft": self.fastft(torch.float32),
        }.items():
            side.model.eval() if self.job.lora_dropout else None
            loss = side.loss(side.prepare(batch))
            side.backward(loss)
            norms = [p.grad.to_dense().norm() for p in side.model.parameters() if p.grad is not None]
            found[name] = {"loss": loss.item(), "gradient_norm": torch.stack(norms).norm().item()}
        for what, expected in found["careful"].items():
            off = abs(found["fastft"][what] - expected) / expected
            assert off <= tolerance, f"{what} of fastft: {found['fastft'][what]}, of careful: {expected}"
        return found


class HuggingFace:
    """A plain PyTorch loop over transformers and PEFT."""

    def __init__(self, bench, attention, dtype, compiled=False, liger=False, four_bits=None):
        self.bench = bench
        self.model = bench.model(attention, dtype, four_bits)
        if liger:
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model.get_base_model())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=bench.job.learning_rate, fused=True)
        self.call = torch.compile(self.model) if compiled else self.model

    def prepare(self, examples):
        ids = torch.from_numpy(np.stack([e["input_ids"] for e in examples])).long().to(self.bench.device)
        return {"input_ids": ids, "labels": ids}

    def loss(self, batch):
        return self.call(**batch, use_cache=False).loss

    def backward(self, loss):
        loss.backward()

    def step(self, batch):
        loss = self.loss(batch)
        self.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.trained, self.bench.job.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Fastft:
    """The inner loop of fastft/train.py, over the same functions. `roles` and `optim` are what an ablation leaves out.

    four_bits: as of `Bench.model`.
    """

    def __init__(self, bench, dtype, roles=None, optim="adamw_torch", four_bits="fastft"):
        self.bench = bench
        init_ranks()
        args = replace(bench.args, optim=optim)
        self.model = bench.model("sdpa", dtype, four_bits)
        report = fastft.patch(self.model, roles=roles, verbose=False)
        packing = report.packing is None
        self.collate = Collator(SimpleNamespace(pad_token_id=PAD), self.model.config, packing=packing)
        config = deepspeed_config(args, dtype, world_size=1)
        self.engine, _ = build_engine(self.model, args, config, dtype, total_steps=1000)
        self.engine.train()

    def prepare(self, examples):
        return examples

    def loss(self, examples):
        batch = to_device(self.collate(examples), self.bench.device)
        items = sum(len(e["labels"]) - 1 for e in examples)
        return self.bench.task.loss(self.engine, batch, items)

    def backward(self, loss):
        backward(self.engine, loss)

    def step(self, examples):
        loss = self.loss(examples)
        self.backward(loss)
        self.engine.step()
        return loss.item()
