"""fastft.ops.linear_distillation against PyTorch on full logits in fp64: values, gradients, chunks, errors."""

import importlib

import pytest
import torch

from fastft.ops import linear_distillation

CASES = [(d, t) for d in ("forward_kl", "reverse_kl", "js") for t in (1.0, 2.5)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of rows, and several slices of the head."""
    torch.compiler.reset()
    module = importlib.import_module("fastft.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "MIN_ROWS", 4)
    monkeypatch.setattr(module, "MAX_ROWS", 4)
    monkeypatch.setattr(module, "SLICE", 200)


def inputs(dtype=torch.float32):
    """hidden, weight, teacher_hidden, teacher_weight, labels."""
    sizes = ((3, 7, 16), (50, 16), (3, 7, 24), (50, 24))
    tensors = [(0.7 * torch.randn(size)).to(dtype) for size in sizes]
    labels = torch.randint(50, (3, 7))
    labels[0, 2:6] = labels[2, 1] = -100
    return [t.requires_grad_(i < 2) for i, t in enumerate(tensors)] + [labels]


def plain(hidden, weight, teacher_hidden, teacher_weight, labels, divergence, temperature):
    """The loss of each row, [3, 7]."""
    log_q, log_p = (
        torch.log_softmax((h @ w.T) / temperature, -1) for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    values = {
        "forward_kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "js": (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
    }
    return torch.where(labels == -100, 0, values[divergence] * temperature**2)


def differentiate(loss, leaves, dloss):
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("divergence", "temperature"), CASES)
def test_loss_and_gradients(no_worse, divergence, temperature, dtype, reduction):
    *tensors, labels = inputs(dtype)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    reduce = (lambda x: x) if reduction == "none" else (lambda x: x.sum() / (labels != -100).sum())
    ours = linear_distillation(*tensors, labels, divergence=divergence, temperature=temperature, reduction=reduction)
    dloss = torch.randn(ours.shape)
    exact = differentiate(reduce(plain(*wide, labels, divergence, temperature)), wide[:2], dloss)
    eager = differentiate(reduce(plain(*tensors, labels, divergence, temperature)), tensors[:2], dloss)
    ours = differentiate(ours, tensors[:2], dloss)
    # A loss is in fp32, its logits are rounded to `dtype`: half a unit of each, p and q adding up to one each.
    largest = max(float((wide[i] @ wide[i + 1].T).abs().max()) for i in (0, 2))
    rounding = temperature * torch.finfo(dtype).eps * largest + 1e-6 * float(exact[0].abs().max())
    assert ours[0].dtype == torch.float32 and (ours[0] - exact[0]).abs().max() <= rounding
    terms = float(dloss.abs().max()) * temperature * (2 if reduction == "none" else 0.2)  # of the gradients cancel
    for name, a, b, c in zip(("dhidden", "dweight"), ours[1:], eager[1:], exact[1:], strict=True):
        no_worse(name, a, b, c, steps=16, scale=terms)


def test_teacher_against_itself_is_zero_and_without_labels_all_rows_count():
    hidden, weight, *_ = inputs()
    for divergence in ("forward_kl", "reverse_kl", "js"):
        loss = linear_distillation(hidden, weight, hidden, weight, divergence=divergence, reduction="none")
        assert loss.shape == (3, 7) and loss.abs().max() < 1e-5
    *tensors, _ = inputs()
    everything = linear_distillation(*tensors, divergence="js")
    torch.testing.assert_close(everything, linear_distillation(*tensors, divergence="js", reduction="none").mean())
    torch.testing.assert_close(everything * 21 / 7, linear_distillation(*tensors, divergence="js", num_items=7))


def test_frozen_head_and_ignored_rows():
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    linear_distillation(hidden, weight.requires_grad_(False), teacher_hidden, teacher_weight, labels).backward()
    assert weight.grad is None and (hidden.grad[labels == -100] == 0).all()
    assert (hidden.grad[labels != -100].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction):
    *tensors, labels = inputs()
    run = lambda *t: linear_distillation(*t, labels, divergence="js", reduction=reduction)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    dloss = torch.ones_like(run(*tensors).detach())
    results = [differentiate(f(*tensors), tensors[:2], dloss) for f in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, o: a.__setitem__(3, a[3][1:]), "the teacher's vocabulary is 49, the student's 50"),
        (lambda a, o: a.__setitem__(2, a[2][:2]), r"teacher_hidden is \[2, 7, 24\] .* must be \[3, 7, 'K'\]"),
        (lambda a, o: a.__setitem__(1, a[1][:, 1:]), r"weight is \[50, 15\] .* must be \[V, 16\]"),
        (lambda a, o: o.update(divergence="kl"), "divergence is 'kl'; it must be one of forward_kl"),
        (lambda a, o: o.update(temperature=0.0), "temperature is 0.0; it must be positive"),
        (lambda a, o: o.update(reduction="max"), "reduction is 'max'"),
        (lambda a, o: o.update(reduction="sum", num_items=3), "num_items is what a mean is divided by"),
    ],
)
def test_bad_arguments(change, message):
    arguments, options = [t.detach() for t in inputs()], {}
    change(arguments, options)
    with pytest.raises(ValueError, match=message):
        linear_distillation(*arguments, **options)
