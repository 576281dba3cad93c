"""8-bit moments: the kernels equal the reference bit for bit, and neither falls into the pits of 8 bits."""

import importlib
import importlib.util

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference import adamw8bit as reference
from fastft_kernels.reference.adamw import scalars

SIZES = [1, 7, 255, 256, 257, 1000, 16384, 40000]
MAPS = {"companded": None, "dynamic": reference.dynamic_maps()}


@pytest.fixture(params=["reference", "cpp"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    return importlib.import_module(f"fastft_kernels.{request.param}.adamw8bit")


@pytest.fixture(params=MAPS)
def maps(request):
    return MAPS[request.param]


def fresh(n):
    blocks = -(-n // 256)
    codes, absmax = torch.zeros(blocks, 256, dtype=torch.uint8), torch.zeros(blocks)
    return codes, absmax


class Run:
    """Weights and state of one tensor under one kernel; `step` feeds a gradient."""

    def __init__(self, kernel, w, maps=None, copy=None, lion=False, **hyper):
        self.kernel, self.maps, self.copy, self.lion = kernel, maps, copy, lion
        self.w, self.state, self.t = w.clone(), [*fresh(w.numel()), *fresh(w.numel())], 0
        self.hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0} | hyper

    def step(self, g, divisor=1.0):
        self.t += 1
        state = [[s] for s in (self.state[:2] if self.lion else self.state)]
        update = self.kernel.lion8bit if self.lion else self.kernel.adamw8bit
        update([self.w], [g], [self.copy], *state, scalars(**self.hyper, step=self.t, grad_divisor=divisor), self.maps)
        return self

    def moments(self):
        m, v = (
            reference.dequantize(*self.state[i : i + 2], self.w.numel(), signed, self.maps)
            for i, signed in ((0, True), (2, False))
        )
        return m, v


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("lion", [False, True], ids=["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("room", ["cpp", "triton"])
def test_kernels_are_the_reference_bit_for_bit(room, maps, dtype, lion):
    if room == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if room == "triton" and (importlib.util.find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("runs in Triton's interpreter")
    kernel = importlib.import_module(f"fastft_kernels.{room}.adamw8bit")
    for n in SIZES if room == "cpp" else [1, 257, 700]:
        w = torch.randn(n)
        copies = [None if dtype == torch.float32 else torch.full((n,), float("nan"), dtype=dtype) for _ in range(2)]
        ours, plain = (
            Run(k, w, maps, c, lion, weight_decay=0.1) for k, c in zip((kernel, reference), copies, strict=True)
        )
        for t in range(4):
            g = (torch.randn(n) * 10.0 ** torch.randint(-8, 2, (n,))).to(dtype)
            g[torch.rand(n) < 0.1] = 0
            g[::101] = [float("nan"), float("inf"), -float("inf"), 1e-40][t]
            ours.step(g, 3.0), plain.step(g, 3.0)
        assert torch.equal(ours.w, plain.w), n
        assert all(torch.equal(a, b) for a, b in zip(ours.state, plain.state, strict=True)), n
        if dtype != torch.float32:
            assert torch.equal(ours.copy, ours.w.to(dtype))


@pytest.mark.parametrize("signed", [True, False])
def test_quantising_again_changes_nothing(kernel, maps, signed):
    """q(dq(q(x))) == q(x), zero and the largest are exact, and only zero becomes an unsigned zero."""
    for scale in (1e-15, 1e-6, 1.0, 1e30):
        for n in SIZES[:6]:
            x = torch.randn(n) * 10.0 ** torch.randint(-9, 1, (n,)) * scale
            x[n // 2 :: 5] = 0
            if maps is not None and signed:  # bitsandbytes' map has no -1: a largest that is negative shrinks
                x[::256] = 2 * x.abs().max()
            x = x if signed else x.abs()
            codes, absmax = kernel.quantize(x, signed, maps)
            back = kernel.dequantize(codes, absmax, n, signed, maps)
            again, absmax_again = kernel.quantize(back, signed, maps)
            assert torch.equal(absmax, absmax_again) and torch.equal(codes, again)
            assert (back[x == 0] == 0).all()
            top = x.abs().argmax()
            assert back[top] == x[top]
            assert signed or ((back > 0) == (x > 0)).all()


def test_every_code_survives():
    """All 256 codes beside an absmax, at the ends of the range."""
    for absmax in (2.0**-90, 3e-20, 0.7, 2.0**126):
        for signed in (True, False):
            codes = torch.arange(256, dtype=torch.uint8)[None]
            if signed:
                codes = codes[:, codes[0] != 128].repeat(1, 2)[:, :256]  # -128 is never written
            scale = torch.tensor([absmax])
            again, absmax_again = reference.quantize(reference.dequantize(codes, scale, 256, signed), signed)
            assert torch.equal(again, codes) and torch.equal(absmax_again, scale)


def test_error_of_a_code():
    """Companded codes keep half a step: |sqrt|x/absmax|| to 0.5/127, and the fourth root of v to 0.5/255."""
    x = torch.rand(256 * 64)
    for signed, power, steps in ((True, 2, 127), (False, 4, 255)):
        codes, absmax = reference.quantize(x, signed)
        scale = absmax.repeat_interleave(256)
        back = reference.dequantize(codes, absmax, x.numel(), signed)
        error = (x / scale) ** (1 / power) - (back / scale) ** (1 / power)
        assert error.abs().max() < 0.501 / steps


@pytest.mark.parametrize("lion", [False, True], ids=["adamw", "lion"])
def test_zero_gradients_move_nothing(kernel, maps, lion):
    """Neither a block of zeros nor single zeros among large gradients drift (bitsandbytes' CPU kernel moves them)."""
    w = torch.randn(700)
    run = Run(kernel, w, maps, lion=lion)
    live = torch.zeros(700, dtype=torch.bool)
    live[300::3] = True
    for _ in range(50):
        run.step(torch.where(live, torch.randn(700), 0.0))
    assert torch.equal(run.w[~live], w[~live]) and (run.w[live] != w[live]).all()
    assert run.state[1][0] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_bad_gradient_stays_in_its_element(kernel, maps, bad):
    w, g = torch.randn(300), torch.randn(300)
    clean, hit = Run(kernel, w, maps).step(g), Run(kernel, w, maps)
    dirty = g.clone()
    dirty[17] = bad
    hit.step(dirty)
    others = torch.arange(300) != 17
    assert hit.w[17] == w[17] and torch.equal(hit.w[others], clean.w[others])
    for _ in range(5):
        hit.step(g)
    assert all(x.isfinite().all() for x in (hit.w, *hit.moments())) and hit.w[17] != w[17]


def test_denormal_gradients_and_no_epsilon(kernel, maps):
    """Gradients whose squares vanish, with eps = 0: no division by zero, ever."""
    for size in (1e-45, 1e-30, 1e-18):
        run = Run(kernel, torch.ones(257), maps, eps=0.0)
        for _ in range(3):
            run.step(torch.full((257,), size))
        assert run.w.isfinite().all() and (run.w - 1).abs().max() < 0.2


def test_a_step_is_never_much_larger_than_adamws(kernel, maps):
    """Small second moments beside a large one: |step| stays within a few learning rates, as AdamW's does."""
    w = torch.zeros(256)
    run = Run(kernel, w, maps, lr=1.0)
    for t in range(20):
        before = run.w.clone()
        run.step(10.0 ** -torch.linspace(0, 7, 256) * (1 if t % 3 else -1))
        assert (run.w - before).abs().max() < 4.0


def test_views_at_odd_addresses(kernel, maps):
    n = 515
    w, g = torch.randn(n), torch.randn(n)
    expected = Run(kernel, w, maps).step(g)
    run = Run(kernel, w, maps)
    room = torch.zeros(n + 9)
    run.w = room[3 : 3 + n]
    run.w.copy_(w)
    run.state = [torch.cat([s.flatten()[:1], s.flatten()])[1:].view(s.shape) for s in run.state]
    run.step(torch.cat([g[:5], g])[5:])
    assert torch.equal(run.w, expected.w) and room[:3].eq(0).all() and room[3 + n :].eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(run.state, expected.state, strict=True))


def test_follows_float32_adamw(kernel):
    """On a noisy quadratic the 8-bit weights end as near to the minimum as those of float32 AdamW, within 10 %."""
    target, w = torch.randn(1024), torch.zeros(1024)
    plain = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0)
    run = Run(kernel, w)
    for _ in range(400):
        noise = torch.randn(1024) * 0.3
        plain.grad = plain.detach() - target + noise
        optimizer.step()
        run.step(run.w - target + noise)
    ours, theirs = ((x - target).norm() for x in (run.w, plain.detach()))
    assert ours < 1.1 * theirs
