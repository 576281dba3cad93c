"""fastft.ops.dropout: one mask for forward and backward, for every backend, eager, checkpointed and compiled."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.nn import Dropout
from fastft.ops import dispatch, dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()


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


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 7)])
def test_gradient_is_the_same_mask(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = dropout(x, 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == x.shape and torch.equal(y, x * dx)


def test_second_derivatives(backend, device):
    x = torch.randn(50, device=device, requires_grad=True)
    y = dropout(x, 0.5, seed=1)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(second, 24 * y.detach())  # y = 2 x where kept: (8 x^3)'' = 48 x = 24 y


def test_saves_nothing_but_the_seed(backend, device):
    if backend == "reference":
        pytest.skip("the reference stores the mask")
    x, saved = torch.randn(50, device=device, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.5)
    assert sum(t.numel() for t in saved) <= 1


def test_torch_generator_and_checkpointing_decide_the_mask(backend, device):
    x = torch.randn(50, device=device, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x, 0.5)) and not torch.equal(y, dropout(x, 0.5))
    for reentrant in (True, False):
        y = checkpoint(dropout, x, 0.5, use_reentrant=reentrant)
        x.grad = None
        y.sum().backward()
        assert torch.equal(y == 0, x.grad == 0)


def test_a_seed_decides_for_every_backend(backend, device):
    x = torch.randn(3, 50, device=device)
    y = dropout(x, 0.25, seed=11)
    assert torch.equal(y, dropout(x, 0.25, seed=torch.tensor(11)))
    with fastft.backend("reference"):
        assert torch.equal(y, dropout(x, 0.25, seed=11))
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, device, compiler):
    x = torch.randn(40, device=device, requires_grad=True)
    compiled = torch.compile(dropout, backend=compiler, fullgraph=True)
    seed = torch.tensor(9)
    y = compiled(x, 0.5, seed=seed)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, dropout(x, 0.5, seed=seed)) and torch.equal(y, x * dx)
    assert not torch.equal(compiled(x, 0.5), compiled(x, 0.5))


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_custom_op_obeys_the_rules(name):
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))
    x = torch.randn(3, 8, device=DEVICE if name == "triton" else "cpu", requires_grad=True)
    torch.library.opcheck(torch.ops.fastft.dropout.default, (x, 0.5, torch.tensor(3), name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, dtype=torch.int64), 0.5), "torch.int64"),
        ((torch.ones(3), 1.0), "p is 1.0"),
        ((torch.ones(3), float("nan")), "p is nan"),
        ((torch.ones(3), 0.5, 2**63), "seed is 9223372036854775808"),
        ((torch.ones(3), 0.5, torch.ones(2)), r"seed is \[2\] of torch.float32"),
    ],
)
def test_bad_arguments(arguments, message):
    x, p, *seed = arguments
    with pytest.raises(ValueError, match=message):
        dropout(x, p, seed=seed[0] if seed else None)


def test_layer():
    layer = Dropout(0.25)
    x = torch.ones(1000)
    assert 150 < (layer(x) == 0).sum() < 350 and layer.eval()(x) is x and repr(layer) == "Dropout(p=0.25)"
    with pytest.raises(ValueError, match="p is 1.5"):
        Dropout(1.5)
