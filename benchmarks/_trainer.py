"""transformers' Trainer, one optimizer step at a time, so that it takes turns with other loops.

Its own loop, unchanged, waits at the end of every step until the next one is asked for.
"""

import importlib.util
import tempfile

import torch

from benchmarks._harness import Stopwatch
from benchmarks._processes import STEP


def why_not():
    """Why the Trainer cannot run here; None if it can."""
    return None if importlib.util.find_spec("accelerate") else "HF Trainer needs accelerate"


def serve_trainer(model, batches, job):
    """serve(pipe) of the Trainer: a step takes the next of `batches`, each the arguments of one forward call.

    job: has its learning_rate, max_grad_norm and seed.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    def serve(pipe):
        def next_turn():
            what, _ = pipe.recv()
            if what == STEP:
                return Stopwatch()
            pipe.send(None)  # its memory cannot be told: a step is not a call
            return next_turn()

        class Turns(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                nonlocal turn
                pipe.send((*turn.read(), losses[-1].item()))
                turn = next_turn()

        class InOrder(Trainer):
            def _get_train_sampler(self, dataset=None):
                return torch.utils.data.SequentialSampler(batches)

            def training_step(self, *args, **kwargs):
                losses.append(super().training_step(*args, **kwargs))
                return losses[-1]

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=len(batches) + 1,
            per_device_train_batch_size=1,  # one of `batches`
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=job.max_grad_norm,
            optim="adamw_torch_fused",
            use_cpu=not torch.cuda.is_available(),
            seed=job.seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        collate = lambda rows: rows[0]
        losses = []
        trainer = InOrder(model, arguments, collate, train_dataset=batches, callbacks=[Turns()])
        turn = next_turn()
        trainer.train()

    return serve
