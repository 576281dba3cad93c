"""Which examples meet in a step, and which rank computes them."""

import hashlib
import heapq
from functools import lru_cache

import numpy as np


class StepPlan:
    """The order of training: a function of (lengths, seed) that nothing else changes, so that a run can resume
    anywhere.

    Each epoch is a permutation of the examples. Step s of an epoch takes the s-th slice of world_size *
    micro_batch_size * accumulation examples: only this product decides which examples a step sees. They are dealt to
    world_size * accumulation slots of at most micro_batch_size examples, the longest first to the slot with the
    fewest tokens so far. The last step of an epoch may be short. lengths: tokens per example, int [N].
    """

    def __init__(self, lengths, *, world_size, micro_batch_size, accumulation, seed):
        if len(lengths) < world_size:
            raise ValueError(
                f"{len(lengths)} training examples for {world_size} ranks; each rank needs one: use fewer ranks"
            )
        self.lengths = np.asarray(lengths)
        self.world_size, self.micro_batch_size, self.accumulation = world_size, micro_batch_size, accumulation
        self.seed = seed
        self.examples_per_step = world_size * micro_batch_size * accumulation
        self.steps_per_epoch = -(-len(self.lengths) // self.examples_per_step)
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._slots = lru_cache(maxsize=2)(self._deal)

    def indices(self, step):
        """All examples of a step, int64 array; `step` counts from 0 through all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return self._permutation(epoch)[step * self.examples_per_step : (step + 1) * self.examples_per_step]

    def micro_batches(self, step, rank):
        """The examples of a rank in a step: `accumulation` int64 arrays, of which some are empty in a short step."""
        return self._slots(step)[rank :: self.world_size]

    def identity(self):
        """What decides which examples a step meets, in plain values."""
        return {
            "examples": len(self.lengths),
            "lengths": hashlib.sha256(np.ascontiguousarray(self.lengths, np.int64)).hexdigest()[:16],
            "seed": self.seed,
            "examples_per_step": self.examples_per_step,
        }

    def padding(self, steps=100):
        """{"tokens_per_micro_batch": mean, "padding_fraction": part of a padded batch that would be padding}, over
        the first steps. Packed batches have no padding.
        """
        batches = [self.lengths[slot] for step in range(min(steps, self.steps_per_epoch)) for slot in self._slots(step)]
        batches = [lengths for lengths in batches if len(lengths)]
        tokens = sum(int(lengths.sum()) for lengths in batches)
        padded = sum(len(lengths) * int(lengths.max()) for lengths in batches)
        return {"tokens_per_micro_batch": tokens / len(batches), "padding_fraction": 1 - tokens / padded}

    def _permute(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def _deal(self, step):
        """Slots of a step, the fullest first: slot i is micro-batch i // world_size of rank i % world_size, so that
        the ranks meet in a micro-batch with about equal work.
        """
        indices = self.indices(step)
        lengths = self.lengths[indices]
        count = self.world_size * self.accumulation
        slots, loads = [[] for _ in range(count)], [(0, slot) for slot in range(count)]
        for position in np.argsort(-lengths, kind="stable"):
            load, slot = heapq.heappop(loads)
            slots[slot].append(indices[position])
            if len(slots[slot]) < self.micro_batch_size:
                heapq.heappush(loads, (load + int(lengths[position]), slot))
        slots = [np.array(slot, np.int64) for slot in slots]
        return sorted(slots, key=lambda slot: -int(self.lengths[slot].sum()))


def eval_batches(ds, collate, batch_size, rank, world_size):
    """Batches of a rank for evaluation, the longest examples first and together.

    Every rank gets the same number of batches and every example comes once over all ranks; a rank for which none is
    left gets an example with all its labels ignored.
    """
    order = np.argsort(-ds.lengths, kind="stable")
    for start in range(0, len(order), batch_size * world_size):
        indices = order[start : start + batch_size * world_size][rank::world_size]
        yield collate(ds.take(indices) if len(indices) else [collate.ignored(ds[0])])
