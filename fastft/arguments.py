"""What a run can be told: dataclasses from which the command line and the YAML recipes are generated.

Only the standard library is imported at the top, so that `fastft train --help` answers at once. Field names are
Hugging Face's and TRL's where they have one. Precedence: command line, then `--config recipe.yaml`, then the defaults here.
"""

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path


def option(default, help, choices=None):
    """A dataclass field that carries its own help text and allowed values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


SCHEDULERS = [
    "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
    "cosine_with_restarts",
]  # fmt: skip


@dataclass(kw_only=True)
class ModelArguments:
    model_name_or_path: str | None = option(None, "folder or hub name of the model; without it a small Llama is built")
    tokenizer_name: str | None = option(None, "folder or hub name of the tokenizer, where it is not the model's")
    trust_remote_code: bool = option(False, "run Python code that comes with the model folder")
    kernels: str = option("auto", "which implementation of each op", ["auto", "reference", "triton", "cpp"])
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")


@dataclass(kw_only=True)
class DataArguments:
    task: str | None = option(None, "what to learn; guessed from the columns when left out")
    train_file: str | None = option(None, "JSONL, JSON, CSV, TSV, Parquet or text file to train on")
    validation_file: str | None = option(None, "file to evaluate on; always evaluated at the end")
    test_file: str | None = option(None, "file to evaluate on once, after training")
    dataset_name: str | None = option(None, "name of a dataset on the hub, instead of files")
    dataset_config_name: str | None = option(None, "configuration of that dataset")
    text_column: str | None = option(None, "column with the text (or the first of a pair)")
    text_pair_column: str | None = option(None, "column with the second text of a pair")
    label_column: str | None = option(None, "column with the label")
    prompt_column: str | None = option(None, "column with the prompt")
    completion_column: str | None = option(None, "column with the completion")
    problem_type: str | None = option(None, "how labels are read", ["classification", "regression"])
    max_length: int = option(1024, "longest example in tokens; the rest is cut off and counted")
    completion_only_loss: bool = option(True, "train on the completion alone, not on the prompt")
    packing: bool = option(
        True, "examples of a micro-batch share one row, without padding and without seeing each other"
    )
    preprocessing_num_workers: int | None = option(None, "processes that tokenise; by default chosen by size")
    max_train_samples: int | None = option(None, "use only the first N training examples")
    max_eval_samples: int | None = option(None, "use only the first N validation examples")
    on_bad_row: str = option(
        "error", "what a row that cannot be used does: end the run, or be counted", ["error", "skip"]
    )
    cache_dir: str | None = option(None, "folder for tokenised data; by default that of the datasets library")


@dataclass(kw_only=True)
class LoraArguments:
    use_peft: bool = option(False, "train a LoRA adapter instead of all weights")
    lora_r: int = option(16, "rank of the adapter")
    lora_alpha: float = option(32.0, "the adapter's output is scaled by alpha / r")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    lora_target_modules: list[str] = option(["all-linear"], "names of the layers that get an adapter")
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    use_dora: bool = option(False, "weight-decomposed LoRA")
    load_in_4bit: bool = option(False, "QLoRA: the frozen weights in 4 bits (NF4), quantised while they load")


@dataclass(kw_only=True)
class TrainingArguments:
    per_device_train_batch_size: int = option(8, "examples in a micro-batch of one rank")
    per_device_eval_batch_size: int = option(16, "examples in an evaluation batch of one rank")
    gradient_accumulation_steps: int = option(1, "micro-batches in an optimizer step")
    num_train_epochs: float = option(3.0, "passes over the training data")
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs when positive")
    learning_rate: float = option(5e-5, "highest learning rate")
    lr_scheduler_type: str = option("linear", "shape of the schedule", SCHEDULERS)
    warmup_ratio: float = option(0.0, "part of the steps over which the learning rate rises")
    warmup_steps: int = option(0, "steps over which the learning rate rises; overrides warmup_ratio when positive")
    weight_decay: float = option(0.0, "decoupled weight decay; never on biases and norms")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 turns clipping off")
    label_smoothing_factor: float = option(0.0, "probability mass spread over all classes")
    optim: str = option(
        "adamw_torch",
        "optimizer; 8bit: its state takes a byte per moment, that of norms, biases and embeddings four",
        ["adamw_torch", "adamw_8bit", "lion_8bit", "adamw_bnb_8bit"],
    )
    seed: int = option(42, "seeds data order, initialisation and dropout")
    bf16: bool | None = option(None, "bf16 weights with fp32 master weights; by default where the device computes it")
    fp16: bool = option(False, "fp16 weights with loss scaling")
    zero_stage: int = option(
        0, "what is sharded over ranks: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights", [0, 1, 2, 3]
    )
    offload_optimizer: str = option("none", "where the optimizer state lives", ["none", "cpu"])
    deepspeed: str | None = option(None, "a DeepSpeed configuration file, instead of the one that fastft writes")
    ddp_timeout: int = option(1800, "end with the stacks of all ranks after N seconds without progress")
    max_skipped_steps: int = option(5, "abort after this many steps in a row with NaN or infinite gradients")


@dataclass(kw_only=True)
class OutputArguments:
    output_dir: str = option("outputs", "folder for the model, its logs and checkpoints")
    overwrite_output_dir: bool = option(False, "replace what an earlier run left in output_dir")
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or auto: the newest one, if there is any")
    eval_steps: int = option(0, "evaluate every N steps; 0: at the end of each epoch")
    eval_on_start: bool = option(False, "evaluate before the first step too")
    save_steps: int = option(0, "write a checkpoint every N steps; 0: none but the best")
    save_total_limit: int | None = option(None, "keep only the newest N checkpoints (and the best)")
    on_save_error: str = option("stop", "when a checkpoint cannot be written", ["stop", "continue"])
    verify_checkpoint: str = option(
        "sizes", "what is checked before resuming: sizes and small files, or every byte", ["sizes", "full"]
    )
    logging_steps: int = option(10, "log every N steps")
    load_best_model_at_end: bool = option(
        False, "save the best evaluated model, not the last; saves at each better evaluation"
    )
    metric_for_best_model: str | None = option(None, "metric that decides which is best; by default the task's")
    early_stopping_patience: int | None = option(None, "stop after N evaluations that were not better")
    report_to: list[str] = option(["tensorboard"], "where metrics go besides metrics.jsonl: tensorboard, wandb, none")
    run_name: str | None = option(None, "name of the run in TensorBoard and W&B")
    local_rank: int = option(-1, "set by the launcher")


GROUPS = (ModelArguments, DataArguments, LoraArguments, TrainingArguments, OutputArguments)


@dataclass(kw_only=True)
class Arguments(ModelArguments, DataArguments, LoraArguments, TrainingArguments, OutputArguments):
    """Everything a run can be told. Raises ValueError, naming the argument, for a value that cannot be."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"--{f.name} {value}: must be one of {', '.join(map(str, choices))}")
        at_least = {
            "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
            "max_length": 2, "lora_r": 1, "logging_steps": 1, "eval_steps": 0, "save_steps": 0, "warmup_steps": 0,
            "save_total_limit": 1, "early_stopping_patience": 1, "max_skipped_steps": 1, "ddp_timeout": 1, "weight_decay": 0,
            "max_grad_norm": 0, "learning_rate": 0, "max_train_samples": 1, "max_eval_samples": 1,
            "preprocessing_num_workers": 1, "lora_alpha": 0, "adam_epsilon": 0, "seed": 0,
        }  # fmt: skip
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:  # written so that NaN fails too
                raise ValueError(f"--{name} {value}: must be at least {low}")
        for name in ("warmup_ratio", "lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs {self.num_train_epochs}: must be above 0")
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 true and --fp16 true: choose one of them")
        if self.dataset_name and self.train_file:
            raise ValueError("--dataset_name and --train_file: give one of them")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("--offload_optimizer cpu: needs --zero_stage 1, 2 or 3")
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("--load_in_4bit true: 4-bit weights are frozen, so it needs --use_peft true")
        if self.load_in_4bit and self.zero_stage == 3:
            raise ValueError("--load_in_4bit true: does not work with --zero_stage 3; use 0, 1 or 2")
        if self.load_in_4bit and self.use_dora:
            raise ValueError("--load_in_4bit true: does not work with --use_dora true, which needs whole weights")
        unknown = set(self.report_to) - {"tensorboard", "wandb", "none"}
        if unknown:
            raise ValueError(f"--report_to {' '.join(sorted(unknown))}: must be tensorboard, wandb or none")


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one sentence and exit code 2. Takes `--learning-rate` for `--learning_rate`."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([_underscored(arg) for arg in args], namespace)

    def parse_args(self, args=None, namespace=None):
        for flag in (_underscored(arg).split("=")[0] for arg in args if arg.startswith("--")):
            if flag not in self._option_string_actions:
                near = nearest(flag, self._option_string_actions) or f"; `{self.prog} --help` lists all"
                self.error(f"unknown argument {flag}{near}")
        return super().parse_args(args, namespace)


def parse_arguments(argv=None, prog="fastft train"):
    """Command line -> Arguments; `--config FILE.yaml` lies underneath. One clear sentence and exit code 2 on a mistake."""
    parser = build_parser(prog)
    argv = sys.argv[1:] if argv is None else list(argv)
    given = vars(parser.parse_args(argv))
    try:
        recipe = _read_recipe(given.pop("config"))
        return Arguments(**{**recipe, **given})
    except ValueError as error:
        parser.exit(2, f"{prog}: error: {error}\n")


def build_parser(prog):
    """An argparse parser whose flags are the fields above; a flag that is not given leaves no trace in the result."""
    parser = Parser(
        prog=prog,
        description="Fine-tunes a transformer. Without a model and a file it trains a small Llama on a generated task.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file with any of these arguments")
    for group_class in GROUPS:
        group = parser.add_argument_group(group_class.__name__.removesuffix("Arguments").lower())
        for f in dataclasses.fields(group_class):
            kind, many = _kind(f)
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            shown = " ".join(default) if many else str(default).lower() if isinstance(default, bool) else default
            help = f.metadata["help"] + ("" if default is None else f" (default: {shown})")
            if f.name == "local_rank":
                help = argparse.SUPPRESS
            group.add_argument(
                f"--{f.name}",
                type=_boolean if kind is bool else kind,
                nargs="+" if many else None,
                metavar="{" + ",".join(map(str, f.metadata["choices"])) + "}"
                if f.metadata["choices"]
                else _metavar(kind),
                help=help.replace("%", "%%"),
            )
    return parser


def _read_recipe(path):
    """YAML recipe -> {argument: value}, each value of the field's type; ValueError names file and key."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must hold `argument: value` lines, not a {type(content).__name__}")
    fields = {f.name: f for f in dataclasses.fields(Arguments)}
    recipe = {}
    for key, value in content.items():
        if key not in fields:
            raise ValueError(f"{path}: unknown key {key}{nearest(str(key), fields)}")
        try:
            recipe[key] = _convert(fields[key], value)
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"{path}: {key}: {value!r} is not a {_metavar(_kind(fields[key])[0])}") from None
    return recipe


def _convert(f, value):
    """A YAML value to the field's type. YAML reads `5e-5` as a string, which float() repairs."""
    kind, many = _kind(f)
    if value is None:
        return None
    if many:
        return [kind(v) for v in (value if isinstance(value, list) else [value])]
    if kind is bool:
        return value if isinstance(value, bool) else _boolean(value)
    if kind is int and (isinstance(value, bool) or (isinstance(value, float) and value != int(value))):
        raise ValueError
    return kind(value)


def _kind(f):
    """(scalar type, is a list) of a field; `X | None` counts as X."""
    kind = f.type
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], True
    return kind, False


def _boolean(text):
    if str(text).lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return str(text).lower() == "true"


def _metavar(kind):
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}[kind]


def nearest(name, names):
    """What to add to a sentence about an unknown name: the one of `names` that looks like it, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


def _underscored(arg):
    """--learning-rate=x-y -> --learning_rate=x-y"""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
