"""The trained model as a folder that transformers or PEFT load: whole weights, or an adapter, from any ZeRO stage.

Weights keep the dtype they were trained in (a bf16 run saves bf16, not its fp32 masters), so that the saved model
computes exactly what the last evaluation saw.
"""

import json
import os
import shutil
from pathlib import Path

import torch

import fastft
from fastft import quantization
from fastft.durable import rank, sync, together, write_json

GROUP_SIZE = 2**28  # elements of ZeRO-3 weights that are whole at a time
OURS = (  # what an earlier save may have left; replaced or removed by the next
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)


def save_model(model, folder, tokenizer=None):
    """Writes a transformers model or PEFT adapter, bare or in an engine, and its tokenizer. Every rank calls it.

    The files are written beside their place and moved in when all of them are complete, so a good model in `folder`
    stays whole until then; afterwards nothing of it is left among the new files. Only rank 0's disk is written to.

    Raises OSError or RuntimeError on all ranks if it fails, ValueError for an adapter whose base model has no name.
    """
    folder = Path(folder)
    engine, model = (model, model.module) if hasattr(model, "module") else (None, model)
    base = _base_of_adapter(model)
    weights = _gather(model, engine, adapter_only=base is not None)
    with together(f"the model was not saved in {folder} (what was there is as before)"):
        if rank() == 0:
            temporary = folder / ".saving"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                model.save_pretrained(temporary, state_dict=weights)
                if base is not None:
                    _finish_adapter(temporary, base)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
                _move_in(temporary, folder, keep_old=base is not None and Path(base) == folder.resolve())
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def merge(adapter_dir, output_dir, base_model=None):
    """Adds an adapter to the weights of its base model, writes a plain model with its tokenizer and returns the errors.

    The sum is taken in fp32 and rounded once, to the dtype that the base model is stored in. A base in 4 bits is read from
    them: the merged model is the one that was trained.
    base_model: folder or hub name, where the base is no longer where the adapter's configuration says.
    Returns {"rounding_error": by that rounding, "quantization_error": of the base's 4 bits, None where it has none or its
    whole weights are not known}, each the norm of the change over the norm of the weights.

    Raises ValueError for a folder without an adapter, and for an output folder that is not empty.
    """
    adapter_dir, output_dir = Path(adapter_dir), Path(output_dir)
    if not (adapter_dir / "adapter_config.json").exists():
        raise ValueError(f"{adapter_dir}: no adapter, adapter_config.json is missing; name the output of a LoRA run")
    _check_empty(output_dir, "merge")
    from peft import PeftConfig
    from transformers import AutoConfig

    from fastft.models import load_for_inference

    base_model = base_model or PeftConfig.from_pretrained(str(adapter_dir)).base_model_name_or_path
    model, tokenizer, _ = load_for_inference(adapter_dir, dtype=torch.float32, base_model=base_model)
    fastft.unpatch(model)
    stored = AutoConfig.from_pretrained(base_model).dtype or torch.float32
    error = getattr(getattr(model.get_base_model().config, "quantization_config", None), "error", None)
    quantization.dequantize_model(model, torch.float32)
    merged = model.merge_and_unload(safe_merge=True)
    rounding = _rounding_error(merged, stored)
    save_model(merged.to(stored), output_dir, tokenizer)
    return {"rounding_error": rounding, "quantization_error": error}


@torch.no_grad()
def _rounding_error(model, dtype):
    changes, sizes = 0.0, 0.0
    for p in model.parameters():
        changes += (p.to(dtype).to(p.dtype) - p).norm().double().square().item()
        sizes += p.norm().double().square().item()
    return (changes / sizes) ** 0.5 if sizes else 0.0


def quantize(model_dir, output_dir):
    """Writes a model with its linear layers in 4 bits (NF4), as bitsandbytes would, and its tokenizer.

    Returns what quantising changed, the norm of the change over the norm of the weights.
    Raises ValueError for an adapter, for a model that is in 4 bits already, and for an output folder that is not empty.
    """
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    _check_empty(output_dir, "quantize")
    from transformers import AutoConfig

    from fastft.models import load_for_inference

    if (model_dir / "adapter_config.json").exists():
        raise ValueError(f"--model {model_dir}: an adapter; `fastft merge` makes a whole model of it first")
    if not (model_dir / "config.json").exists():
        raise ValueError(f"--model {model_dir}: no model there, config.json is missing")
    config = AutoConfig.from_pretrained(str(model_dir))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"--model {model_dir}: its weights are quantised already")
    model, tokenizer, _ = load_for_inference(model_dir, config.dtype or torch.float32, load_in_4bit=True, use_peft=True)
    fastft.unpatch(model)
    save_model(model, output_dir, tokenizer)
    return model.config.quantization_config.error


def _check_empty(output_dir, verb):
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir}: not an empty folder; {verb} writes the whole model into a new or empty one")


def _base_of_adapter(model):
    """Where an adapter's base model can be loaded from: a hub name or an absolute folder. None for a plain model."""
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return None
    name = configs["default"].base_model_name_or_path or model.get_base_model().name_or_path
    if not name:
        raise ValueError(
            "the adapter's base model has no name to load it by; set name_or_path on it before PEFT wraps it"
        )
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _finish_adapter(folder, base):
    """Names the base by a path that holds from any working directory, and drops PEFT's model card, an empty form."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": base})
    (folder / "README.md").unlink()


@torch.no_grad()
def _gather(model, engine, adapter_only):
    """ZeRO-3: {name: whole tensor on the CPU}, filled on rank 0. Other stages: None, every rank holds whole tensors.

    adapter_only: the trained weights, and the embeddings, which PEFT saves when their size has changed.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    if not any(hasattr(p, "ds_id") for _, p in named):
        return None
    import deepspeed

    if adapter_only:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        embeddings = {p for layer in layers if layer is not None for p in layer.parameters()}
        named = [(name, p) for name, p in named if p.requires_grad or p in embeddings]
    if engine is not None:
        engine.optimizer.checkpoint_event_prologue()
    whole = {}
    for group in _groups({p for _, p in named}):
        with deepspeed.zero.GatheredParameters(group):
            if rank() == 0:
                whole |= {p: p.detach().cpu().clone() for p in group}
    if engine is not None:
        engine.optimizer.checkpoint_event_epilogue()
    if rank() != 0:
        return {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: t.cpu() for name, t in model.state_dict().items() if name not in parameters}
    return {**{name: whole[p] for name, p in named}, **buffers}  # tied names share a tensor, as save_pretrained expects


def _groups(params):
    """Lists of ZeRO-3 parameters of about GROUP_SIZE elements together, the same on every rank."""
    group, size = [], 0
    for p in sorted(params, key=lambda p: p.ds_id):
        if group and size + p.ds_numel > GROUP_SIZE:
            yield group
            group, size = [], 0
        group.append(p)
        size += p.ds_numel
    if group:
        yield group


def _move_in(temporary, folder, keep_old):
    """Moves all of `temporary` into `folder`. keep_old: the model there stays, as the base of this adapter."""
    new = sorted(temporary.iterdir())
    for path in temporary.rglob("*"):
        sync(path)
    for path in new:
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    if not keep_old:
        names = {path.name for path in new}
        for old in (path for pattern in OURS for path in folder.glob(pattern)):
            if old.name not in names:
                old.unlink()
    sync(folder)
