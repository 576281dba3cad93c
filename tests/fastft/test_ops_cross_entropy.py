"""fastft.ops.cross_entropy against PyTorch: values, gradients in place of the logits, torch.compile, statistics, errors."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.ops import cross_entropy, dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [{}, {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2}]
VOCABULARY = 50


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    torch.compiler.reset()
    reason = dispatch.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with fastft.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return DEVICE if backend == "triton" else "cpu"


def inputs(device="cpu", dtype=torch.float32):
    """A leaf, and labels of which some are ignored. Logits are twice the leaf, which keeps them no leaf and exact."""
    leaf = torch.randn(3, 7, VOCABULARY, device=device).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (3, 7), device=device)
    labels[0, 2:6] = labels[2, 1] = -100
    return leaf, labels


def plain(logits, labels, reduction="mean", label_smoothing=0.0, softcap=None, z_loss=0.0):
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing)
    loss = loss.view(labels.shape) + z_loss * z.logsumexp(-1).square() * (labels != -100)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (labels != -100).sum()}[reduction]


def differentiate(function, leaf, dloss):
    loss = function(2 * leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf, dloss.to(loss.dtype))[0]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient(backend, device, no_worse, dtype, reduction, options, inplace):
    leaf, labels = inputs(device, dtype)
    wide = leaf.detach().double().requires_grad_()
    dloss = torch.randn(3, 7, device=device) if reduction == "none" else torch.tensor(4.0, device=device)
    ours = differentiate(
        lambda x: cross_entropy(x, labels, reduction=reduction, inplace=inplace, **options), leaf, dloss
    )
    eager = differentiate(lambda x: plain(x, labels, reduction, **options), leaf, dloss)
    exact = differentiate(lambda x: plain(x, labels, reduction, **options), wide, dloss)
    no_worse("loss", ours[0], eager[0], exact[0], steps=8, scale=float(2 * wide.detach().abs().max()))
    # With a row's own factor, and in float16 with the mean's, the gradient is rounded before it is multiplied and after.
    twice = 0.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    no_worse("dlogits", ours[1], eager[1], exact[1], steps=8 + twice)


def test_gradients_numerically():
    leaf, labels = inputs(dtype=torch.float64)
    for reduction in ("mean", "none"):
        run = lambda x: cross_entropy(x, labels[:, :2], reduction=reduction, inplace=False, **OPTIONS[1])  # noqa: B023
        assert torch.autograd.gradcheck(run, leaf.detach()[:, :2].requires_grad_())


def test_the_gradient_takes_the_place_of_the_logits(backend, device):
    leaf, labels = inputs(device)
    logits = 2 * leaf
    logits.register_hook(lambda gradient: handed.append(gradient))
    handed, address = [], logits.data_ptr()
    cross_entropy(logits, labels, reduction="sum").backward()
    assert handed[0].data_ptr() == address and torch.equal(logits, handed[0])
    logits = 2 * leaf
    before = logits.detach().clone()
    loss = cross_entropy(logits, labels, inplace=False)
    first = torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=device), retain_graph=True)
    again = torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=device))
    assert torch.equal(logits, before) and torch.equal(first[0], again[0])


def test_logits_stay_where_no_gradient_is_needed(backend, device):
    leaf, labels = inputs(device)
    before = leaf.detach().clone()
    with torch.no_grad():
        cross_entropy(leaf, labels)
    cross_entropy(leaf.detach(), labels)
    assert torch.equal(leaf, before)


def test_what_would_be_wrong_silently_is_refused(backend, device):
    leaf, labels = inputs(device)
    for of_leaf in (leaf, leaf[...], leaf.transpose(0, 1)):
        with pytest.raises(ValueError, match="logits are a leaf, .* whose values would be lost; pass inplace=False"):
            cross_entropy(of_leaf, labels if of_leaf.shape == leaf.shape else labels.T)
    logits = leaf.exp()  # saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, labels).backward()
    loss = cross_entropy(2 * leaf, labels)
    torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=device), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("layout", ["one row", "a slice", "transposed", "one row for all"])
def test_any_strides(backend, device, layout):
    leaf, labels = inputs(device)
    view = {
        "one row": lambda x: (x[0, 0], labels[0, 0]),
        "a slice": lambda x: (x[..., 3:40], labels.clamp(max=36)),
        "transposed": lambda x: (x.transpose(0, 1), labels.T),
        "one row for all": lambda x: (x[0, 0].expand_as(x), labels),
    }[layout]
    results = []
    for contiguous in (False, True):
        logits, targets = view(2 * leaf)
        logits = logits.clone(memory_format=torch.contiguous_format) if contiguous else logits
        loss = cross_entropy(logits, targets, reduction="none")
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    assert results[0][0].shape == targets.shape
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_num_items_and_statistics(backend, device):
    leaf, labels = inputs(device)
    for items in (5, torch.tensor([5], device=device)):
        loss, stats = cross_entropy(2 * leaf, labels, num_items=items, return_stats=True)
        torch.testing.assert_close(loss, plain(2 * leaf, labels, "sum") / 5)
    kept = labels != -100
    logp = (2 * leaf).log_softmax(-1)
    torch.testing.assert_close(stats.log_probs[kept], logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept])
    assert torch.equal(stats.correct, (leaf.argmax(-1) == labels) & kept)
    torch.testing.assert_close(stats.entropy[kept], -(logp.exp() * logp).sum(-1)[kept])
    assert not any(t.requires_grad for t in stats)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(backend, device, reduction):
    leaf, labels = inputs(device)
    run = lambda x: cross_entropy(2 * x, labels, reduction=reduction, return_stats=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (loss, stats), (theirs, others) = run(leaf), compiled(leaf)
    dloss = torch.full_like(loss.detach(), 2.0)
    pairs = zip((loss, *stats), (theirs, *others), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, dloss)[0] for x in (theirs, loss)))


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_custom_op_obeys_the_rules(name):
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))
    leaf, labels = inputs(DEVICE if name == "triton" else "cpu")
    rows, targets = leaf.detach().flatten(0, 1).requires_grad_(), labels.flatten()
    share = torch.tensor(0.25, device=leaf.device)
    for args in ((share, True, -100, 0.1, None, 0.0, True, name), (None, False, -100, 0.0, 5.0, 1e-3, True, name)):
        torch.library.opcheck(torch.ops.fastft.cross_entropy.default, (rows, targets, *args))


def test_no_row_counts(backend, device):
    leaf, labels = inputs(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = cross_entropy(2 * leaf, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert device == "cuda" or ("every label is -100" in str(caught[0].message) and caught[0].filename == __file__)
    empty = torch.randn(0, VOCABULARY, device=device, requires_grad=True)
    cross_entropy(2 * empty, labels.flatten()[:0]).backward()
    assert empty.grad.shape == (0, VOCABULARY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 7, 5).long()}, "logits are .* of torch.int64"),
        ({"labels": torch.zeros(3, 6).long()}, r"labels are \[3, 6\] .* for logits \[3, 7, 50\] they must be \[3, 7\]"),
        ({"labels": torch.full((3, 7), 50)}, r"a label is 50; labels must be in \[0, 50\), or -100"),
        ({"label_smoothing": 2}, "label_smoothing is 2"),
        ({"softcap": 0}, "softcap is 0"),
        ({"z_loss": -1}, "z_loss is -1"),
        ({"reduction": "max"}, "reduction is 'max'; it must be one of mean, sum, none"),
        ({"reduction": "sum", "num_items": 3}, "num_items is what .* leave it out"),
    ],
)
def test_bad_arguments(change, message):
    leaf, labels = inputs()
    with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
        cross_entropy(**{"logits": 2 * leaf, "labels": labels, **change})


@pytest.mark.parametrize("inplace", [False, True])
def test_the_layer_is_torchs_with_classes_last(inplace):
    logits, labels = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    labels[0, 0] = -100
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    layer = fastft.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum", inplace=inplace)
    loss = layer(ours * 1, labels)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")(theirs.flatten(0, 1), labels.flatten())
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not layer.state_dict()
