"""Cross-entropy kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import importlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from fastft_kernels.cpp import extension
from fastft_kernels.reference.cross_entropy import cross_entropy as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [  # label_smoothing, softcap, z_loss
    (0.0, None, 0.0),
    (0.1, None, 0.0),
    (0.0, 5.0, 0.0),
    (0.0, None, 1e-2),
    (0.2, 30.0, 1e-3),
]
IGNORED = -100


@pytest.fixture(params=["reference", "cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.cross_entropy")


@pytest.fixture
def device(kernel):
    return "cuda" if kernel.__name__.startswith("fastft_kernels.triton") and torch.cuda.is_available() else "cpu"


def inputs(shape, dtype, device="cpu", spread=3.0):
    """logits and labels; every third label is ignored."""
    logits = (spread * torch.randn(shape, device=device)).to(dtype)
    labels = torch.randint(shape[1], shape[:1], device=device)
    labels[1::3] = IGNORED
    return logits, labels


def differentiate(logits, labels, scale, options, dtype=None):
    """loss, log_prob, correct, entropy and dlogits of the reference, computed in `dtype`, by autograd."""
    leaf = logits.to(dtype or logits.dtype).detach().requires_grad_()
    loss, *stats = reference(leaf, labels, IGNORED, *options)
    total = (loss if scale is None else loss * scale).sum()
    return loss.detach(), *(s.detach() for s in stats), torch.autograd.grad(total, leaf)[0]


def check(no_worse, kernel, logits, labels, scale, options):
    plain = differentiate(logits, labels, scale, options)
    exact = differentiate(logits, labels, scale, options, torch.float64)
    ours = logits.clone()
    results = kernel.forward(ours, labels, scale, IGNORED, *options, True)
    kept = logits.clone()
    for with_gradient, without in zip(
        results, kernel.forward(kept, labels, scale, IGNORED, *options, False), strict=True
    ):
        assert torch.equal(with_gradient, without)
    assert torch.equal(kept, logits)
    # The terms of a loss and of an entropy are logits.
    scale_of = float(logits.double().abs().max()) if logits.numel() else 0.0
    for name, a, b, c in zip(("loss", "log_prob", "correct", "entropy"), results, plain, exact, strict=False):
        if name == "correct":
            assert a.dtype == torch.bool and torch.equal(a, c)
        else:
            no_worse(name, a, b, c, steps=8, scale=scale_of)
    no_worse("dlogits", ours, plain[4], exact[4], steps=8)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 33), (6, 1000)])
def test_loss_statistics_and_gradient(kernel, device, no_worse, shape, dtype, options):
    logits, labels = inputs(shape, dtype, device)
    check(no_worse, kernel, logits, labels, None, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_blocks_and_their_scales(kernel, device, no_worse, dtype):
    logits, labels = inputs((4, 17003), dtype, device)
    scale = torch.tensor([2.0, 0.0, -0.5, 1.5], device=device)
    labels[0] = 17002
    check(no_worse, kernel, logits, labels, scale, (0.1, 20.0, 1e-3))


def test_loss_is_that_of_pytorch(kernel, device):
    logits, labels = inputs((9, 40), torch.float32, device)
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.3)
    loss, log_prob, _, entropy = kernel.forward(logits.clone(), labels, None, IGNORED, 0.3, None, 0.0, False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(-log_prob, F.cross_entropy(logits, labels, reduction="none"))
    wanted = torch.distributions.Categorical(logits=logits).entropy() * (labels != IGNORED)
    torch.testing.assert_close(entropy, wanted)


def test_first_of_equal_logits_is_the_answer(kernel, device):
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0]] * 4, device=device)
    labels = torch.tensor([1, 3, 0, IGNORED], device=device)
    _, _, correct, _ = kernel.forward(logits, labels, None, IGNORED, 0.0, None, 0.0, True)
    assert correct.tolist() == [True, False, False, False]


def test_empty_and_rows_far_apart(kernel, device):
    for shape in ((0, 7),):
        logits, labels = inputs(shape, torch.float32, device)
        assert all(r.shape == (0,) for r in kernel.forward(logits, labels, None, IGNORED, 0.0, None, 0.0, True))
    wide = torch.full((5, 60), 7.0, device=device)
    logits, labels = inputs((5, 50), torch.float32, device)
    expected = logits.clone()
    wide[:, 3:53] = logits
    results = kernel.forward(wide[:, 3:53], labels, None, IGNORED, 0.1, None, 0.0, True)
    for ours, others in zip(
        results, kernel.forward(expected, labels, None, IGNORED, 0.1, None, 0.0, True), strict=True
    ):
        assert torch.equal(ours, others)
    assert torch.equal(wide[:, 3:53], expected) and (wide[:, :3] == 7).all() and (wide[:, 53:] == 7).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(kernel, device, dtype):
    """NaN stays in its row; forbidden tokens (-inf) have no share; a label outside the vocabulary gives NaN, no crash."""
    logits, _ = inputs((5, 33), dtype, device)
    labels = torch.tensor([4, 5, 6, 40, IGNORED], device=device)
    logits[1, 7], logits[2, 8:] = float("nan"), float("-inf")
    logits[4] = float("nan")
    loss, log_prob, correct, entropy = kernel.forward(logits, labels, None, IGNORED, 0.0, None, 0.0, True)
    assert loss.isnan().tolist() == log_prob.isnan().tolist() == [False, True, False, True, False]
    assert entropy[[0, 2, 4]].isfinite().all() and not correct[[1, 3, 4]].any()
    assert logits[0].isfinite().all() and torch.equal(logits[2, 8:], torch.zeros_like(logits[2, 8:]))
    assert logits[1].isnan().all() and torch.equal(logits[4], torch.zeros_like(logits[4]))


@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_thread_count_and_instruction_set(dtype):
    kernel = importlib.import_module("fastft_kernels.cpp.cross_entropy")
    logits, labels = inputs((40, 3001), dtype)
    before, threads, results = extension.C.isa(), torch.get_num_threads(), []
    try:
        for isa in extension.C.isas():
            for count in (1, 3):
                extension.C.set_isa(isa)
                torch.set_num_threads(count)
                mine = logits.clone()
                results.append([mine, *kernel.forward(mine, labels, None, IGNORED, 0.1, 9.0, 1e-3, True)])
    finally:
        extension.C.set_isa(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
