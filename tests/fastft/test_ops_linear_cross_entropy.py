"""fastft.ops.linear_cross_entropy against PyTorch on full logits: values, gradients, statistics, memory, errors."""

import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.nn import LinearCrossEntropyLoss
from fastft.ops import dispatch, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [{}, {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2}]
VOCABULARY = 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of rows, and several slices of the head."""
    torch.compiler.reset()
    for name, value in (("MIN_ROWS", 4), ("MAX_ROWS", 4), ("SLICE", 200)):
        monkeypatch.setattr(module(), name, value)


def module():
    return importlib.import_module("fastft.ops.linear_cross_entropy")


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    reason = dispatch.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with fastft.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return DEVICE if backend == "triton" else "cpu"


def inputs(device="cpu", dtype=torch.float32):
    """hidden, weight, bias, labels of which some are ignored."""
    tensors = [torch.randn(size, device=device).to(dtype) for size in ((3, 7, 16), (VOCABULARY, 16), (VOCABULARY,))]
    labels = torch.randint(VOCABULARY, (3, 7), device=device)
    labels[0, 2:6] = labels[2, 1] = -100
    return *(t.requires_grad_() for t in tensors), labels


def plain(hidden, weight, bias, labels, reduction="mean", label_smoothing=0.0, softcap=None, z_loss=0.0):
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing)
    loss = loss.view(labels.shape) + z_loss * z.logsumexp(-1).square() * (labels != -100)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (labels != -100).sum()}[reduction]


def differentiate(loss, leaves, dloss):
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients(backend, device, no_worse, dtype, reduction, options):
    *leaves, labels = inputs(device, dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], reduction=reduction, **options)
    # A power of two, as in training; what else multiplies a sum's finished gradient costs one more rounding.
    dloss = torch.randn(loss.shape, device=device) if reduction == "none" else torch.tensor(2.0, device=device)
    ours = differentiate(loss, leaves, dloss)
    exact = differentiate(plain(*wide, labels, reduction, **options), wide, dloss)
    eager = differentiate(plain(*leaves, labels, reduction, **options), leaves, dloss)
    # The loss is in fp32, its logits are rounded to `dtype`: half a unit of the largest, for a target and the others.
    z = F.linear(*wide).abs().max()
    rounding = torch.finfo(dtype).eps * z * (16 if reduction == "sum" else 1) * (1 + 2e-2 * z)
    assert ours[0].dtype == torch.float32 and (ours[0] - exact[0]).abs().max() <= rounding
    terms = float(dloss.abs().max() * max(t.abs().max() for t in wide)) / (16 if reduction == "mean" else 1)
    for name, a, b, c in zip(("dhidden", "dweight", "dbias"), ours[1:], eager[1:], exact[1:], strict=True):
        # The gradient of the logits is rounded to `dtype` before and after it is scaled: half a unit more than eagerly.
        steps = 16 + 0.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        no_worse(name, a, b, c, steps=steps, scale=terms)


def test_gradients_numerically():
    hidden, weight, bias, labels = (
        t.detach()[..., :4] if t.dim() == 2 and i == 1 else t.detach() for i, t in enumerate(inputs())
    )
    args = [t.double().requires_grad_() for t in (hidden[:2, :4, :4], weight[:9], bias[:9])]
    labels = labels[:2, :4] % 9
    labels[0, 1] = -100
    for reduction in ("mean", "none"):
        run = lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, reduction=reduction, **OPTIONS[1])  # noqa: B023
        assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(backend, device, reduction):
    *leaves, labels = inputs(device)
    run = lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, reduction=reduction, return_stats=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (loss, stats), (theirs, others) = run(*leaves), compiled(*leaves)
    dloss = torch.ones_like(loss.detach())
    for a, b in zip(differentiate(loss, leaves, dloss), differentiate(theirs, leaves, dloss), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(stats, others, strict=True))


def test_custom_op_obeys_the_rules(backend, device):
    hidden, weight, bias, labels = inputs(device)
    args = (hidden.flatten(0, 1), weight, bias, labels.flatten(), None, -100, 0.1, None, 0.0)
    for needs in ((True, True, True), (True, False, False)):
        tensors = [t if t is None or not isinstance(t, torch.Tensor) else t.detach() for t in args]
        for tensor, need in zip(tensors, needs, strict=False):
            tensor.requires_grad_(need)
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(
            torch.ops.fastft.linear_cross_entropy.default, (*tensors, *needs, backend), test_utils=utils
        )


def test_statistics(backend, device):
    hidden, weight, _, labels = inputs(device)
    loss, stats = linear_cross_entropy(hidden, weight, labels, reduction="none", return_stats=True)
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    kept = labels != -100
    torch.testing.assert_close(stats.log_probs, -loss.detach())
    assert torch.equal(stats.correct, (log_p.argmax(-1) == labels) & kept) and not stats.entropy.requires_grad
    torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(-1).detach() * kept, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        without, same = linear_cross_entropy(hidden, weight, labels, reduction="none", return_stats=True)
    assert torch.equal(without, loss) and all(torch.equal(a, b) for a, b in zip(same, stats, strict=True))


@pytest.mark.parametrize("items", [5, 2.5, torch.tensor(5), torch.tensor([2.5])])
def test_num_items(items):
    hidden, weight, _, labels = inputs()
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, num_items=items), (total / items).view(()))


def test_incoming_gradient():
    *leaves, labels = inputs(dtype=torch.bfloat16)
    loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2])
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for three, one in zip(torch.autograd.grad(loss, leaves, torch.tensor(-3.0)), once, strict=True):
        torch.testing.assert_close(three.float(), -3 * one.float(), rtol=2**-7, atol=0)


def test_frozen_head_costs_no_gradient(monkeypatch):
    hidden, weight, _, labels = inputs()
    asked = []
    add = module().add_weight_gradient
    monkeypatch.setattr(module(), "add_weight_gradient", lambda *a: asked.append(1) or add(*a))
    linear_cross_entropy(hidden, weight.requires_grad_(False), labels).backward()
    assert not asked and weight.grad is None and hidden.grad.abs().sum() > 0


def test_ignored_rows_are_not_multiplied(monkeypatch):
    hidden, weight, _, labels = inputs()
    rows = []
    logits_of = module().logits_of
    monkeypatch.setattr(module(), "logits_of", lambda x, *a: rows.append(len(x)) or logits_of(x, *a))
    linear_cross_entropy(hidden, weight, labels)
    assert rows == [4, 4, 4, 4] and (labels != -100).sum() == 16


def test_backward_twice_and_tied_head():
    hidden, weight, _, labels = inputs()
    table = weight.detach().clone().requires_grad_()
    loss = linear_cross_entropy(F.embedding(labels.clamp(min=0), table), table, labels)
    loss.backward(retain_graph=True)
    once = table.grad.clone()
    loss.backward()
    torch.testing.assert_close(table.grad, 2 * once)
    wide = table.detach().double().requires_grad_()
    plain(F.embedding(labels.clamp(min=0), wide), wide, None, labels).backward()
    torch.testing.assert_close(once, wide.grad.float())


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, _, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.equal(loss, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels))
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_all_ignored_is_zero_with_a_warning():
    hidden, weight, bias, labels = inputs()
    with pytest.warns(UserWarning, match="every label is -100, ignored: the loss is 0"):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias=bias)
    loss.backward()
    assert loss == 0 and all(t.grad.abs().sum() == 0 for t in (hidden, weight, bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_cross_entropy(hidden[:0], weight, labels[:0]) == 0


@pytest.mark.parametrize("vocabulary", [1000, 30_000])
def test_memory_does_not_grow_with_the_vocabulary(monkeypatch, vocabulary):
    """No tensor that the op makes has more elements than the budget allows, or than the head where that is trained."""
    monkeypatch.undo()
    monkeypatch.setitem(module().BUDGET, "cpu", 2**20)
    monkeypatch.setattr(module(), "MIN_ROWS", 4)
    sizes = []
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: sizes.append(empty(self, *a, **k)) or sizes[-1]
    )
    hidden, weight = torch.randn(600, 8, requires_grad=True), torch.randn(vocabulary, 8)
    linear_cross_entropy(hidden, weight, torch.randint(vocabulary, (600,))).backward()
    assert max(t.numel() * t.element_size() for t in sizes) <= 2**20


def test_layer():
    hidden, weight, bias, labels = inputs()
    layer = LinearCrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum", label_smoothing=0.1)
    assert torch.equal(layer(hidden, weight, labels, bias), expected) and "label_smoothing=0.1" in repr(layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(hidden=a["hidden"].long()), "hidden is .* of torch.int64; it must be"),
        (lambda a: a.update(weight=a["weight"][:, 1:]), r"weight is \[50, 15\] .* must be \[V, 16\]"),
        (
            lambda a: a.update(weight=a["weight"].bfloat16()),
            "weight is .* of torch.bfloat16 .* of torch.float32 on cpu",
        ),
        (lambda a: a.update(bias=a["bias"][1:]), r"bias is \[49\] .* must be \[50\]"),
        (lambda a: a.update(labels=a["labels"][1:]), r"labels are \[2, 7\] .* must be \[3, 7\] of torch.int64"),
        (lambda a: a.update(labels=a["labels"].int()), "labels are .* of torch.int32"),
        (lambda a: a["labels"].__setitem__((1, 1), 50), r"a label is 50; labels must be in \[0, 50\), or -100"),
        (lambda a: a["labels"].__setitem__((1, 1), -1), "a label is -1"),
        (lambda a: a.update(reduction="max"), "reduction is 'max'; it must be one of mean, sum, none"),
        (lambda a: a.update(label_smoothing=1.5), r"label_smoothing is 1.5; it must be in \[0, 1\]"),
        (lambda a: a.update(softcap=0.0), "softcap is 0.0; it must be positive"),
        (lambda a: a.update(z_loss=-1.0), "z_loss is -1.0; it must not be negative"),
        (lambda a: a.update(reduction="sum", num_items=3), "num_items is what a mean is divided by"),
        (lambda a: a.update(num_items=0), "num_items is 0; it must be positive"),
        (lambda a: a.update(num_items=torch.ones(2)), r"num_items is \[2\]; it must be a number or a tensor of one"),
    ],
)
def test_bad_arguments(change, message):
    names = ("hidden", "weight", "bias", "labels")
    arguments = dict(zip(names, (t.detach() for t in inputs()), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
