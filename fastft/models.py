"""Models and tokenizers: from a folder, a hub name or a configuration, to train or to use."""

import json
import pickle
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

import fastft
from fastft import patching, quantization
from fastft.arguments import Arguments
from fastft.ops import dispatch
from fastft.tasks import get_task

# What a model's run.json may say about its use. The rest of it, paths and trust_remote_code above all, is not believed.
INHERITED = (
    "task", "text_column", "text_pair_column", "label_column", "prompt_column", "completion_column", "problem_type",
    "max_length", "completion_only_loss", "kernels", "metric_for_best_model", "load_in_4bit",
)  # fmt: skip
HEAD = ("num_labels", "id2label", "label2id", "problem_type")  # the same of its model_kwargs
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


def load_tokenizer(args):
    """The tokenizer of a run, with a padding token (the end token stands in where it has none)."""
    name = args.tokenizer_name or args.model_name_or_path
    flag = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    _check_exists(name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {name}: no tokenizer there: {_first_line(error)}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{flag} {name}: the tokenizer has neither a padding nor an end token; set pad_token in it"
            )
        tokenizer.pad_token = tokenizer.eos_token  # padded positions are masked by position, never by this id
    return tokenizer


def load_model(args, task, tokenizer, dtype, *, from_scratch=False):
    """The model that a task trains: weights in `dtype`, a fresh head where the task needs one, LoRA and checkpointing if asked.

    from_scratch: the folder holds only a configuration; weights are drawn from torch's generator.
    """
    name = args.model_name_or_path
    _check_exists(name, "--model_name_or_path")
    kwargs = {**task.model_kwargs(), "trust_remote_code": args.trust_remote_code}
    try:
        if from_scratch:
            config = AutoConfig.from_pretrained(name, **kwargs)
            model = task.auto_model.from_config(config, dtype=dtype)
            if args.load_in_4bit:
                quantization.quantize_model(model)
        else:
            _check_weights(name)
            model = _from_pretrained(task, name, dtype, args, ignore_mismatched_sizes=True, **kwargs)
            if quantization.four_bit_layers(model) and (not args.use_peft or args.use_dora):
                raise ValueError("its weights are in 4 bits, and frozen: say --use_peft true, without --use_dora")
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        if isinstance(error, ValueError) and str(error).startswith("--"):
            raise
        raise ValueError(
            f"--model_name_or_path {name}: cannot be loaded for {task.name}: {_first_line(error)}"
        ) from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if args.use_peft:
        model = add_lora(model, args, task)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    return model


def _from_pretrained(task, name, dtype, args, **kwargs):
    """The model of a folder or hub name, its linear layers in 4 bits where it is asked for or they are stored so."""
    if args.load_in_4bit or quantization.stored_config(name, args.trust_remote_code) is not None:
        return quantization.load_in_4bit(task.auto_model, name, dtype, **kwargs)
    return task.auto_model.from_pretrained(name, dtype=dtype, **kwargs)


def add_lora(model, args, task):
    """Freezes the model and adds PEFT's LoRA layers, in the dtype of the weights (their fp32 masters are the optimizer's)."""
    from peft import LoraConfig, get_peft_model

    modules = args.lora_target_modules
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        task_type=task.peft_type,
    )
    dtype = model.dtype
    try:
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        if "Target modules" not in str(error):
            raise
        raise ValueError(
            f"--lora_target_modules {' '.join(modules)}: no such layers in {args.model_name_or_path}; "
            f"it has {', '.join(linear_names(model))}, or say all-linear"
        ) from None
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT makes those of a 4-bit layer float32
            parameter.data = parameter.data.to(dtype)
    return model


def linear_names(model):
    """The last part of the name of every linear layer, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})


def patch_model(model, args):
    """(report lines, reason why batches cannot be packed or None): fastft's kernels where the architecture is known."""
    dispatch.set_backend(args.kernels)
    reason = patching.why_not(model)
    if reason is not None:
        if args.kernels != "auto":
            raise ValueError(f"--kernels {args.kernels}: {reason}")
        return {"replaced": {}, "kept": {"model": reason}, "packing": reason}, f"plain layers, padded batches: {reason}"
    report = fastft.patch(model, verbose=False)
    return report.as_dict(), str(report)


def load_for_inference(folder, dtype=torch.float32, **overrides):
    """(model, tokenizer, task) from a folder that fastft or transformers wrote: a model, or a PEFT adapter over its base.

    The model is patched, in evaluation mode, on the GPU where there is one. `overrides` replace arguments of the run;
    Python code in the folder is run only where `trust_remote_code` is among them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--model {folder}: no such folder")
    run = _read_run(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter:
        adapter = json.loads((folder / "adapter_config.json").read_text())
        base = overrides.pop("base_model", None) or adapter["base_model_name_or_path"]
        _check_exists(base, "the adapter's base model")
    elif not (folder / "config.json").exists():
        raise ValueError(f"--model {folder}: neither config.json nor adapter_config.json in it, so it holds no model")
    else:
        base = str(folder)
    known = {k: v for k, v in run.get("arguments", {}).items() if k in INHERITED}
    known |= {"use_peft": is_adapter, "model_name_or_path": base, "tokenizer_name": str(folder)}
    args = Arguments(**{**known, **overrides})
    if args.task is None:
        args.task = "sequence_classification" if _is_classifier(base) else "causal_lm"
    task = get_task(args)
    _check_weights(base)
    kwargs = {k: v for k, v in run.get("model_kwargs", {}).items() if k in HEAD}
    if "id2label" in kwargs:  # JSON has made its keys strings
        kwargs["id2label"] = {int(i): label for i, label in kwargs["id2label"].items()}
    try:
        kwargs["trust_remote_code"] = args.trust_remote_code
        model = _from_pretrained(task, base, dtype, args, **kwargs)
        if is_adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"--model {folder}: its weights are a pickle that would run code: {_first_line(error)}"
        ) from None
    tokenizer = load_tokenizer(args)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    task.restore(model.config)
    patch_model(model, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer, task


def _read_run(folder):
    """run.json of a model's folder, {} where there is none."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(part, dict) for part in (run, run.get("arguments", {}), run.get("model_kwargs", {}))):
            raise ValueError("must hold objects")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"--model {folder}: its run.json is damaged: {error}") from None
    return run


def _is_classifier(path):
    architectures = AutoConfig.from_pretrained(path).architectures or [""]
    return "SequenceClassification" in architectures[0]


def _check_exists(name, flag):
    """A path that looks local must be there; anything else is a hub name, which transformers looks up."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"{flag} {name}: no such folder")


def _check_weights(name):
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ValueError(f"--model_name_or_path {name}: no weights in that folder (model.safetensors is missing)")


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".")
