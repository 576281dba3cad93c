"""Attention against PyTorch: `pytest benchmarks/test_attention.py --benchmark-only`.

    eager       scores in memory, the formula one PyTorch call after the other
    sdpa        torch.nn.functional.scaled_dot_product_attention, its own choice; a padded batch with a mask on CPUs
    flash       SDPA held to FlashAttention, on GPUs
    cudnn       SDPA held to cuDNN, on GPUs
    flex        FlexAttention, compiled, on GPUs; not with --toy
    fastft      what fastft.ops.attention chooses on this machine
    plain       the same without the kernels that only Hopper GPUs take, on those

All but fastft see a packed batch as the padded one that it replaces. Beside the times stand fastft's TFLOP/s: 4 D per
visible score forward, 10 D more backward, as FlashAttention counts. The sides take turns while they are measured; each
test then replays the times of its side for pytest-benchmark's table.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastft
from benchmarks._harness import Replay, multiplied_dtype, speedup, work

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if GPU else "cpu"
SIDES = ["eager", "sdpa", "flash", "cudnn", "flex", "plain", "fastft"]

replay = Replay()


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: tuple[int, int]
    D: int
    dtype: torch.dtype
    causal: bool
    backward: bool
    dropout_p: float = 0.0

    def __str__(self):
        total, n = sum(self.lengths), len(self.lengths)
        size = f"{n} x {self.lengths[0]}" if self.uniform else f"{n} sequences, {total} tokens"
        mask = "causal" if self.causal else "full"
        dropout = f", dropout {self.dropout_p}" if self.dropout_p else ""
        direction = "forward + backward" if self.backward else "forward"
        return f"{size}, {self.heads[0]}/{self.heads[1]} x {self.D}, {self.dtype}, {mask}{dropout}, {direction}"

    @property
    def uniform(self):
        return len(set(self.lengths)) == 1

    def toy(self):
        return replace(self, lengths=tuple(min(n, 24) for n in self.lengths[:3]))

    @property
    def bytes(self):
        """q, k, v and o; in backward these, their gradients and the o of forward."""
        tensors = 2 * self.heads[0] + 2 * self.heads[1]
        return sum(self.lengths) * tensors * self.D * self.dtype.itemsize * (3 if self.backward else 1)

    @property
    def flops(self):
        scores = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return scores * self.heads[0] * self.D * (14 if self.backward else 4)


def cases():
    sentences = tuple(5 + (i * 37) % 56 for i in range(64))  # 5 to 60 tokens
    documents = tuple(256 + (i * 947) % 1537 for i in range(8))  # about 1k tokens
    if GPU:
        for D in (64, 128, 256):
            for causal in (True, False):
                for backward in (False, True):
                    yield Case((8192,) * 2, (4096 // D,) * 2, D, torch.bfloat16, causal, backward)
        yield Case((8192,) * 2, (32, 8), 128, torch.bfloat16, True, True)
        yield Case((2048,) * 8, (32, 32), 96, torch.bfloat16, True, True)
        yield Case(documents, (32, 8), 128, torch.bfloat16, True, True)
        yield Case((512,) * 32, (12, 12), 64, torch.bfloat16, False, True, 0.1)
    else:
        yield Case(sentences, (12, 12), 32, torch.float32, False, True, 0.1)
        yield Case((512,) * 4, (8, 4), 64, multiplied_dtype(), True, True)
        yield Case((2048,), (8, 4), 64, multiplied_dtype(), True, True)
        for length in (16, 64, 256, 1024, 4096):  # the mask that SDPA is fastest with
            for backward in (False, True):
                yield Case((length,) * max(1, 2048 // length), (4, 4), 64, torch.float32, False, backward)
        if multiplied_dtype() == torch.bfloat16:
            yield Case(sentences, (12, 12), 32, torch.bfloat16, False, True, 0.1)
            for length in (16, 64, 256, 1024, 4096):
                yield Case((length,) * max(1, 2048 // length), (4, 4), 64, torch.bfloat16, False, True)


def eager(q, k, v, mask, causal, dropout_p):
    """q [B, H, S, D], k and v with as many heads or fewer."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def sdpa(q, k, v, mask, causal, dropout_p, backend=None):
    if mask is not None and causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    options = {"attn_mask": mask, "is_causal": causal and mask is None, "dropout_p": dropout_p}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def flex(case, S):
    """FlexAttention for the masks of `case`, compiled once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(case.lengths, device=DEVICE)
    see = lambda b, h, i, j: (j < lengths[b]) & ((i >= j) | (not case.causal))
    blocks = create_block_mask(see, len(lengths), None, S, S, device=DEVICE)
    compiled = torch.compile(flex_attention)
    gqa = case.heads[0] != case.heads[1]
    return lambda q, k, v, mask, causal, dropout_p: compiled(q, k, v, block_mask=blocks, enable_gqa=gqa)


def plain(side):
    """A side of fastft's, without the kernels that only Hopper GPUs take."""
    from fastft_kernels.triton import _attention_hopper

    def once(number):
        _attention_hopper.ENABLED = False
        try:
            return side(number)
        finally:
            _attention_hopper.ENABLED = True

    return once


def sides_of(case, toy):
    """{side: f(round)}."""
    lengths = (case.toy() if toy else case).lengths
    case = Case(lengths, case.heads, case.D, case.dtype, case.causal, case.backward, case.dropout_p)
    B, S = len(lengths), max(lengths)
    there = torch.arange(S, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    mask = None if case.uniform else there[:, None, None]
    padded = [torch.randn(B, S, H, case.D, device=DEVICE).to(case.dtype) for H in (case.heads[0], *case.heads[1:] * 2)]
    padded.append(torch.randn_like(padded[0]) * there[:, :, None, None])
    *leaves, do = [x if case.uniform else x[there] for x in padded]
    batch, do_batch = [x.transpose(1, 2).detach() for x in padded[:3]], padded[3].transpose(1, 2)
    for x in (*leaves, *batch):
        x.requires_grad_(case.backward)
    ours = {"causal": case.causal, "dropout_p": case.dropout_p}
    if not case.uniform:
        ours["cu_seqlens_q"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)
        ours["max_seqlen_q"] = ours["max_seqlen_k"] = S

    def run(function, inputs, do):
        def once(_):
            o = function(*inputs)
            return (o, *torch.autograd.grad(o, inputs, do)) if case.backward else (o,)

        return once

    theirs = {"eager": eager, "sdpa": sdpa}
    if GPU and case.uniform:
        theirs |= {"flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)}
        theirs |= {"cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)}
    if GPU and not toy and not case.dropout_p:
        torch.compiler.reset()  # each case is compiled for its own shape
        theirs["flex"] = flex(case, S)
    settings = {"mask": mask, "causal": case.causal, "dropout_p": case.dropout_p}
    sides = {name: run(partial(function, **settings), batch, do_batch) for name, function in theirs.items()}
    sides["fastft"] = run(partial(fastft.ops.attention, **ours), leaves, do)
    if HOPPER:
        sides["plain"] = plain(sides["fastft"])
    for name in [name for name in sides if name != "fastft"]:
        try:
            sides[name](0)
        except RuntimeError as error:  # this GPU, or its memory, does not serve that side
            print(f"{name}: {str(error).splitlines()[0]}")
            del sides[name]
    if not case.dropout_p:
        for mine, other in zip(sides["fastft"](0), sides["sdpa"](0), strict=True):
            other = other.transpose(1, 2)
            other = other if case.uniform else other[there]
            error = (mine.double() - other.double()).norm() / other.double().norm()
            assert error < 4 * torch.finfo(case.dtype).eps, f"fastft differs from SDPA by {error:.1e}: nothing is timed"
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def runs(request, compare):
    toy = request.config.getoption("--toy")
    return compare(sides_of(request.param, toy), warmup=3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", list(cases()), indirect=True, ids=str)
@pytest.mark.benchmark(timer=replay.clock)
def test_attention(request, benchmark, runs, side):
    case = request.node.callspec.params["runs"]
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    benchmark.group = f"attention {'toy ' if request.config.getoption('--toy') else ''}{case}"
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    size = case.toy() if request.config.getoption("--toy") else case
    benchmark.extra_info["work"] = work(case.dtype, moved=size.bytes, flops=size.flops)
    if not request.config.getoption("--toy"):
        benchmark.extra_info["tflops"] = case.flops / min(runs[side]["wall"]) / 1e12
    replay(benchmark, runs[side]["wall"])
