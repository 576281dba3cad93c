"""transformers' Trainer, one optimizer step at a time, so that it takes turns with other loops.

Its own loop, unchanged, runs in a thread that sleeps at the end of every step until the next one is asked for.
"""

import importlib.util
import tempfile
import threading

import torch


def why_not():
    """Why the Trainer cannot run here; None if it can."""
    return None if importlib.util.find_spec("accelerate") else "HF Trainer needs accelerate"


class SteppedTrainer:
    """trainer.step(): the loss of the next of `batches`, each the arguments of one forward call."""

    def __init__(self, model, batches, *, learning_rate, max_grad_norm, seed):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        asked, done = threading.Semaphore(0), threading.Semaphore(0)
        losses = []

        class Turns(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                done.release()
                asked.acquire()

        class InOrder(Trainer):
            def _get_train_sampler(self, dataset=None):
                return torch.utils.data.SequentialSampler(batches)

            def training_step(self, *args, **kwargs):
                losses.append(super().training_step(*args, **kwargs))
                return losses[-1]

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=len(batches),
            per_device_train_batch_size=1,  # one of `batches`
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=max_grad_norm,
            optim="adamw_torch_fused",
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=batches,
            data_collator=lambda rows: rows[0],
            callbacks=[Turns()],
        )

        def train():
            asked.acquire()
            try:
                trainer.train()
            except BaseException as error:
                losses.append(error)
                raise
            finally:
                done.release()

        self._asked, self._done, self._losses = asked, done, losses
        threading.Thread(target=train, daemon=True).start()

    def step(self, _=None):
        self._asked.release()
        self._done.acquire()
        last = self._losses[-1]
        if isinstance(last, BaseException):
            raise RuntimeError("the Trainer's own loop failed") from last
        return last.item()
