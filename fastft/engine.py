"""DeepSpeed, set up so that every ZeRO stage computes the same thing and one rank pays next to nothing for it.

Stage 0 keeps DeepSpeed's engine for its interface and does the arithmetic in `fastft.optim.Replicated`: the engine's own
clipping, reduction and 16-bit section would triple a small step. Stages 1 to 3 use DeepSpeed's.
"""

import atexit
import contextlib
import ctypes
import importlib
import io
import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import get_scheduler

from fastft.optim import AdamW, AdamW8bit, Lion8bit, Replicated, parameter_groups, use_row_gradients


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `node_first` is true for one rank on each node."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


class LauncherError(ValueError):
    """What a launcher should have said of this rank is missing or cannot be."""

    of_this_rank = True  # so each rank says it for itself


def check_launcher(environment):
    """Raises LauncherError for half a launcher's variables, which DeepSpeed would fill by asking MPI, or wait for ever."""
    remedy = "start ranks with `fastft train`, `deepspeed` or `torchrun`, or unset RANK and WORLD_SIZE to train alone"
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if "RANK" in missing and environment.get("WORLD_SIZE", "1") in ("1", ""):
        return
    if missing:
        given = " and ".join(f"{n}={environment[n]}" for n in ("RANK", "WORLD_SIZE") if environment.get(n))
        raise LauncherError(f"{given} is set, but not {', '.join(missing)}: {remedy}")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_SIZE"):
        text = environment.get(name, "0" if name == "LOCAL_RANK" else "1")
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise LauncherError(f"{name}={text!r:.40} is set, which must be a whole number: {remedy}")
        numbers[name] = int(text)
    for name, low, end in (("WORLD_SIZE", 1, 10**9), ("RANK", 0, numbers["WORLD_SIZE"]), ("MASTER_PORT", 1, 65536)):
        if not low <= numbers[name] < end:
            raise LauncherError(f"{name}={numbers[name]} is set, which must be from {low} to {end - 1}: {remedy}")


def init_ranks(timeout=1800):
    """Joins the process group that the launcher describes, or a group of one where there is no launcher.

    timeout: seconds after which a rank gives up waiting for the others; a minute later than the loop's own watchdog.
    Raises LauncherError (a ValueError) where the launcher's variables are incomplete or cannot be.
    """
    if not dist.is_initialized():
        check_launcher(os.environ)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory all-reduce at start-up: 45 s and a compiler, for what gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on the variable
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # each rank of this machine would take all of its cores
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))
    if "RANK" not in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # no launcher, so no port either
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout + 60))
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def leave(code):
    """Ends this process with an exit code, at once, once what Python has to do at its end is done.

    Torn down by the interpreter, the threads of a gloo group abort the process now and then (torch 2.13: 2 of 18 ranks that
    had finished their work), and the launcher would take that for a failed run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_freed_memory():
    """Tells glibc to keep large blocks when they are freed, instead of returning and faulting them in again every step.

    A BERT-sized step took 16,955 page faults and 39 ms of system time without, 1,028 and 2 ms with.
    """
    mmap_threshold, trim_threshold = -3, -1  # from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def choose_dtype(args, device):
    """The dtype of the weights: as asked, otherwise bf16 where the device computes it natively, else fp32."""
    if device.type == "cuda":
        native = {"bf16": torch.cuda.is_bf16_supported(including_emulation=False), "fp16": True}
    else:
        native = {
            "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    if args.fp16:
        if not native["fp16"]:
            raise ValueError(
                "--fp16 true: this CPU has no fp16 arithmetic; use --bf16 true, or leave both out for fp32"
            )
        return torch.float16
    use_bf16 = native["bf16"] if args.bf16 is None else args.bf16
    return torch.bfloat16 if use_bf16 else torch.float32


def deepspeed_config(args, dtype, world_size):
    """The DeepSpeed configuration of a run: written here, or read from `--deepspeed FILE` with `auto` filled in."""
    ours = {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size,
        "gradient_clipping": args.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": args.zero_stage,
            "overlap_comm": False,  # stage 2 has computed wrong gradients with it (DeepSpeed #7965)
            "offload_optimizer": {"device": args.offload_optimizer},
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},  # the default accumulates in the weights' dtype
    }
    if args.zero_stage == 3:
        # frozen and small tensors stay sharded only above this size; the demo models lie far below it
        ours["zero_optimization"]["stage3_param_persistence_threshold"] = 10_000
    if args.deepspeed:
        return _merge(_read_config(args.deepspeed), ours, args.deepspeed)
    return ours


def build_engine(model, args, config, dtype, total_steps):
    """(engine, schedule): the model under DeepSpeed with AdamW and a learning rate schedule of `total_steps`."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    stage = config["zero_optimization"]["stage"]
    optimizer_class = choose_optimizer(args, config, dtype)
    is_lion = issubclass(optimizer_class, Lion8bit)
    eight_bits = issubclass(optimizer_class, (AdamW8bit, Lion8bit))
    groups = parameter_groups(model, args.weight_decay, state_bits=8 if eight_bits else None)
    hyper = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if not is_lion:
        hyper["eps"] = args.adam_epsilon
    if stage == 0:
        if optimizer_class in (AdamW, AdamW8bit) and next(model.parameters()).device.type == "cpu":
            use_row_gradients(model)
        optimizer = replicated(optimizer_class)(
            groups,
            **hyper,
            max_grad_norm=config["gradient_clipping"],
            accumulate=config["gradient_accumulation_steps"] > 1,
            loss_scale=2.0**16 if dtype == torch.float16 else 1.0,
        )
        unused = {"gradient_clipping": 0.0, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
        config = {**config, **unused}
    else:
        optimizer = optimizer_class(groups, **hyper)
    warmup = args.warmup_steps or int(args.warmup_ratio * total_steps)
    extra = {"min_lr_rate": 0.1} if args.lr_scheduler_type == "cosine_with_min_lr" else None
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total_steps, scheduler_specific_kwargs=extra)
    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)
    _import_muon()
    with contextlib.redirect_stdout(io.StringIO()):  # the bf16 wrapper prints its memory use, unasked
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    if stage == 0:
        engine.enable_backward_allreduce = False  # the optimizer reduces, once a step and in fp32
    return engine, schedule


def _import_muon():
    """Imports an optimizer of DeepSpeed's that nobody here uses, without compiling it.

    DeepSpeed imports it to look at its class, and it is decorated with torch.compile, which loads all of inductor: 4 s of
    each rank's start.
    """
    whole = torch.compile
    torch.compile = lambda *args, **options: args[0] if args else lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:  # other versions may not have it
        pass
    finally:
        torch.compile = whole


def choose_optimizer(args, config, dtype):
    """The optimizer class that `--optim` names. Raises ValueError for what DeepSpeed could not run with it."""
    name, zero = args.optim, config["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    if name != "adamw_torch":
        reasons = {
            "offload to NVMe: DeepSpeed swaps float32 state only": offload.get("device") == "nvme",
            f"offload_optimizer.ratio {offload.get('ratio')}: DeepSpeed splits its own Adam only": offload.get(
                "ratio", 1
            )
            < 1,
            "super_offload: DeepSpeed brings an optimizer of its own": bool(offload.get("super_offload")),
            "zenflow: DeepSpeed brings an optimizer of its own": "zenflow" in zero,
            "elastic_checkpoint: it cuts the padding off every state tensor": bool(zero.get("elastic_checkpoint")),
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(
                    f"--optim {name} does not work with {reason}; use --optim adamw_torch or leave that out"
                )
    for section in ("bf16", "fp16"):
        if config.get(section, {}).get(f"{section}_master_weights_and_grads"):
            raise ValueError(f"--optim {name} does not work with {section}_master_weights_and_grads")
    if name == "adamw_bnb_8bit":
        if zero["stage"] == 0 and dtype != torch.float32:
            raise ValueError(
                "--optim adamw_bnb_8bit with 16-bit weights keeps no float32 copy of them: use --zero_stage 1, 2 or 3, "
                "which do, or --optim adamw_8bit"
            )
        try:
            from bitsandbytes.optim import AdamW8bit as theirs
        except ImportError:
            raise ValueError(
                "--optim adamw_bnb_8bit: bitsandbytes is not installed: pip install bitsandbytes, or use adamw_8bit"
            ) from None
        return theirs
    return {"adamw_torch": AdamW, "adamw_8bit": AdamW8bit, "lion_8bit": Lion8bit}[name]


def replicated(optimizer_class):
    """The class that does what `Replicated` says with this optimizer's arithmetic."""
    made = {subclass.__bases__[1]: subclass for subclass in Replicated.__subclasses__() if len(subclass.__bases__) == 2}
    return made.get(optimizer_class) or type(f"Replicated{optimizer_class.__name__}", (_Foreign, optimizer_class), {})


class _Foreign(Replicated):
    """A replicated step around an optimizer that is not fastft's and reads `.grad`."""

    def _update(self, grads, grad_divisor=1.0):
        kept = {p: p.grad for p in grads}
        for p, grad in grads.items():
            p.grad = grad.to(p.dtype) / grad_divisor
        super(Replicated, self).step()
        for p, grad in kept.items():
            p.grad = grad


def backward(engine, loss):
    """Back-propagates; the loss is already normalised over the whole optimizer step, so nothing divides it again.

    The product makes a new tensor even where the scale is 1: DeepSpeed 0.19.8 divides the gradient of a tensor that the
    model returned by the accumulation steps, whatever `scale_wrt_gas` says, when that tensor itself is back-propagated.
    """
    optimizer = engine.optimizer
    engine.backward(loss * (optimizer.loss_scale if isinstance(optimizer, Replicated) else 1.0), scale_wrt_gas=False)


def _read_config(path):
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: must hold a JSON object, not a {type(config).__name__}")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"--deepspeed {path}: the section {section!r} is not used; remove it and say --optim, --learning_rate, "
                "--lr_scheduler_type and --warmup_ratio instead"
            )
    return config


def _merge(theirs, ours, path):
    """Their configuration over ours. What both say of the batch must agree, because the loss is normalised by it."""
    fixed = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    for key in (*fixed, "bf16", "fp16"):
        said = theirs.get(key, "auto")
        if isinstance(said, dict):
            said = {k: v for k, v in said.items() if k == "enabled" and v != "auto"} or "auto"
        if said != "auto" and said != ours[key]:
            raise ValueError(f"--deepspeed {path}: {key} is {said}, but the arguments give {ours[key]}; say auto there")
    merged = dict(ours)
    for key, value in theirs.items():
        if value == "auto":
            continue
        merged[key] = {**ours.get(key, {}), **_without_auto(value)} if isinstance(value, dict) else value
    return merged


def _without_auto(section):
    kept = {k: v for k, v in section.items() if v != "auto"}
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in kept.items()}
