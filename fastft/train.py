"""Fine-tunes a transformer: `deepspeed fastft/train.py`, `fastft train`, or `train(Arguments(...))` from Python.

Read from top to bottom: `train` sets the run up and holds the loop. The loss of every micro-batch is divided by the number
of trained items (tokens or examples) in the whole optimizer step, over all ranks, so that how a step is cut into
micro-batches and ranks does not change what is learnt.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: this folder comes first on sys.path, where the repository belongs
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import math
import warnings

import torch
import torch.distributed as dist
import transformers
from transformers import set_seed
from transformers.integrations import HfDeepSpeedConfig

from fastft import demo
from fastft.arguments import parse_arguments
from fastft.checkpoint import Saver, TrainState, find_checkpoint, keep_step_size, load_checkpoint
from fastft.data import Collator, StepPlan, eval_batches
from fastft.durable import share
from fastft.engine import backward, build_engine, choose_dtype, deepspeed_config, init_ranks, leave
from fastft.export import save_model
from fastft.guard import STOP, Guard, Stopped, report
from fastft.metrics import Recorder, check_output_dir
from fastft.models import load_model, load_tokenizer, patch_model
from fastft.tasks import get_task


def train(args):
    """Runs a whole training run and returns its results, what `all_results.json` holds.

    Raises ValueError, before anything is written, for arguments or data that cannot be used.
    """
    ranks = init_ranks(args.ddp_timeout)
    output_dir = Path(args.output_dir)
    checkpoints = output_dir / "checkpoints"
    checkpoint = find_checkpoint(checkpoints, args.resume_from_checkpoint, verify=args.verify_checkpoint)
    is_demo = args.model_name_or_path is None
    overwrite = args.overwrite_output_dir or (is_demo and (output_dir / "demo").is_dir())
    check_output_dir(output_dir, overwrite=overwrite, resume=args.resume_from_checkpoint is not None)
    if is_demo:
        args = demo_arguments(args, output_dir / "demo", ranks)
    args = keep_step_size(args, checkpoint, ranks.world_size)
    dtype = choose_dtype(args, ranks.device)
    config = deepspeed_config(args, dtype, ranks.world_size)

    # Data: files -> examples
    tokenizer = load_tokenizer(args)
    task = get_task(args)
    splits = task.load_data(tokenizer)
    if "train" not in splits:
        raise ValueError("no training data: give --train_file, or a --dataset_name that has a training split")
    train_set = splits["train"]
    plan = StepPlan(
        train_set.lengths,
        world_size=ranks.world_size,
        micro_batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed,
    )
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps_per_epoch)

    # Model: the same weights on every rank, then a random stream of its own for each rank's dropout
    set_seed(args.seed)
    sharded_loading = HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None  # while it lives
    model = load_model(args, task, tokenizer, dtype, from_scratch=is_demo)
    patch_report, patch_text = patch_model(model, args)
    packing = args.packing and patch_report["packing"] is None
    collate = Collator(tokenizer, model.config, packing=packing)
    engine, schedule = build_engine(model, args, config, dtype, total_steps)
    set_seed(args.seed + ranks.rank)
    state = load_checkpoint(engine, checkpoint, data=plan.identity()) if checkpoint else TrainState()
    recorder = Recorder(args, ranks, total_steps, state)
    recorder.describe(
        task=task.reason,
        dtype=dtype,
        packing=packing,
        splits=splits,
        plan=plan,
        model=model,
        patch=patch_text,
        report=patch_report,
        model_kwargs=task.model_kwargs(),
    )

    def evaluate(split, prefix):
        batches = eval_batches(splits[split], collate, args.per_device_eval_batch_size, ranks.rank, ranks.world_size)
        with recorder.pause():
            metrics = task.evaluate(engine, (to_device(batch, ranks.device) for batch in guard.watch(batches)))
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def saved(act):
        with recorder.pause():
            try:
                act(state)
            except OSError as error:  # the same on all ranks
                if args.on_save_error == "stop":
                    raise
                recorder.note(f"{error}; the run goes on")

    # The loop
    engine.train()
    eval_every = args.eval_steps or plan.steps_per_epoch
    evaluated = None, {}  # the last evaluation: step and metrics
    saver = Saver(engine, checkpoints, keep=args.save_total_limit, data=plan.identity())
    with Guard(args.ddp_timeout) as guard, saver:
        if args.eval_on_start and "validation" in splits and state.step == 0:
            recorder.evaluation(0, evaluate("validation", "eval"))
        for step in range(state.step, total_steps):
            indices = plan.indices(step)
            num_items = train_set.num_items[indices].sum().item() / ranks.world_size  # gradients are averaged
            losses = []
            for micro_batch in plan.micro_batches(step, ranks.rank):
                examples = train_set.take(micro_batch) or [collate.ignored(train_set[0])]
                micro_loss = task.loss(engine, to_device(collate(examples), ranks.device), num_items)
                backward(engine, micro_loss)
                engine.step()
                losses.append(micro_loss.detach())
            state.step = step + 1
            recorder.step(torch.stack(losses).sum(), engine, schedule, train_set.lengths[indices])
            if saver.pending and (not engine.was_step_applied() or guard.everywhere(saver.done)):
                saved(saver.settle)
            count_skipped_steps(engine, state, args, recorder, losses, plan.micro_batches(step, ranks.rank), train_set)

            due = args.save_steps and state.step % args.save_steps == 0
            if state.step % eval_every == 0 and "validation" in splits:
                evaluated = state.step, evaluate("validation", "eval")
                recorder.evaluation(*evaluated)
                due |= is_better(evaluated[1], task, state) and args.load_best_model_at_end
            wish = guard.wish()
            if due or wish:
                saved(saver.settle)
                recorder.settle()
                saved(saver.start)
            if wish:
                saved(saver.settle)
                answer(wish, recorder, state, total_steps)
            if args.early_stopping_patience and state.evaluations_without_improvement >= args.early_stopping_patience:
                recorder.note(f"stopping early: {args.early_stopping_patience} evaluations without improvement")
                break
        saved(saver.settle)

    # The end: the best or the last model, its metrics, and everything written
    if args.load_best_model_at_end and state.best_checkpoint and state.best_step != state.step:
        load_checkpoint(engine, Path(state.best_checkpoint), weights_only=True)
        recorder.note(f"going back to the best model, of step {state.best_step}")
        evaluated = state.step, evaluate("validation", "eval")
    if "validation" in splits and evaluated[0] != state.step:
        evaluated = state.step, evaluate("validation", "eval")
        recorder.evaluation(*evaluated)
    results = dict(evaluated[1])
    if "test" in splits:
        results |= evaluate("test", "test")
    save_model(engine, output_dir, tokenizer)
    if is_demo:
        recorder.note(demo.NEXT)
    del sharded_loading
    return recorder.finish({**results, "skipped_steps": engine.skipped_steps})


def answer(wish, recorder, state, total_steps):
    """What a signal has led to. Raises Stopped where it asked for the end."""
    name = f"step-{state.step:06d}"
    is_saved = Path(state.last_checkpoint or "").name == name
    if wish == STOP:
        after = f"after step {state.step} of {total_steps}"
        place = "there" if is_saved else state.last_checkpoint or "the beginning, as no checkpoint could be written"
        raise Stopped(f"{after}; --resume_from_checkpoint auto goes on from {place}")
    if is_saved:
        recorder.note(f"checkpoint {name} written, as SIGUSR1 asked")


def demo_arguments(args, folder, ranks):
    """The run without a model: one rank of each node writes a generated task and the configuration of a small Llama."""
    if args.train_file or args.dataset_name:
        raise ValueError(
            "--model_name_or_path is missing: name the folder or hub name of the model to train on your data"
        )
    if ranks.local_rank == 0:
        demo.prepare(folder, args.seed)
    dist.barrier()
    return dataclasses.replace(args, **demo.overrides(folder, args, ranks.world_size))


def count_skipped_steps(engine, state, args, recorder, losses, micro_batches, train_set):
    """Tells of a step that NaN or infinite gradients made void, and ends the run after too many in a row.

    losses, micro_batches: this rank's, whose examples are named where the loss was not finite; where it was finite on
    all ranks the backward pass overflowed, and any example of the step may be the reason.
    fp16 finds its loss scale by overflowing, so there a skipped step is no sign of trouble.
    """
    if engine.was_step_applied():
        state.skipped_steps = 0
        return
    state.skipped_steps += 1
    finite = torch.stack(losses).isfinite().tolist()
    bad = [i for micro_batch, fine in zip(micro_batches, finite, strict=True) if not fine for i in micro_batch]
    named = [f"rank {r}: {rows}" for r, rows in enumerate(share(train_set.where(bad) if bad else None)) if rows]
    cause = f"NaN or infinite loss ({'; '.join(named)})" if named else "NaN or infinite gradients of finite losses"
    recorder.note(f"step {state.step} skipped: {cause}; weights and optimizer are as before")
    if state.skipped_steps >= args.max_skipped_steps and not args.fp16:
        saved = state.last_checkpoint or "none, --save_steps was 0 or the run too short"
        raise FloatingPointError(
            f"{state.skipped_steps} steps in a row had NaN or infinite gradients, the last is step {state.step}: "
            "lower --learning_rate, or look at the data of these steps; --max_skipped_steps allows more; "
            f"last good checkpoint: {saved}"
        )


def to_device(batch, device):
    """Tensors of a batch on `device`; on the CPU nothing moves."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def is_better(metrics, task, state):
    """Compares with the best evaluation so far and notes the outcome in `state`."""
    key = f"eval_{task.metric_for_best_model}"
    if key not in metrics:
        known = ", ".join(name.removeprefix("eval_") for name in metrics)
        raise ValueError(
            f"--metric_for_best_model {task.metric_for_best_model}: not a metric of {task.name}; it has {known}"
        )
    value, best = metrics[key], state.best_metric
    better = best is None or (value > best if task.greater_is_better else value < best)
    if better:
        state.best_metric, state.best_step, state.evaluations_without_improvement = value, state.step, 0
    else:
        state.evaluations_without_improvement += 1
    return better


def quiet_libraries():
    """Leaves the screen to the run: no bars for loading and saving, no warnings that nobody here can act on."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")


def run(args):
    """Trains and returns the exit code; what went wrong is said on standard error."""
    quiet_libraries()
    try:
        train(args)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    leave(run(parse_arguments(prog="fastft train")))
