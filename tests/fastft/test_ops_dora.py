"""LoRA's ops with a magnitude, DoRA: results and gradients in every dtype, dropout, torch.compile, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft import ops
from fastft.ops import dispatch, dora, lora_group, lora_linear, lora_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["x", "weight", "bias", "lora_a", "lora_b", "magnitude"]


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()


@pytest.fixture(params=["auto", "cpp", "no kernels"])
def backend(request, monkeypatch):
    if request.param == "cpp" and dispatch.unavailable("cpp"):
        pytest.skip(dispatch.unavailable("cpp"))
    if request.param == "no kernels":
        monkeypatch.setattr(dora, "_KERNELS", {})
        monkeypatch.setattr(dispatch, "unavailable", lambda name: "not here")
    with fastft.backend("cpp" if request.param == "cpp" else "auto"):
        yield request.param


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def layer(out, columns, rank, dtype=torch.float32, adapters=None, bias=True):
    """weight, bias, lora_a, lora_b, magnitude; the magnitudes are from 0.2 to 2 times what they start at, and one is zero."""
    adapters = adapters or dtype
    weight = draw(out, columns, dtype=dtype, scale=columns**-0.5)
    a, b = draw(rank, columns, dtype=adapters, scale=columns**-0.5), draw(out, rank, dtype=adapters, scale=rank**-0.5)
    magnitude = weight.detach().float().norm(dim=1) * torch.empty(out).uniform_(0.2, 2)
    magnitude[out // 2] = 0
    return weight, draw(out, dtype=dtype) if bias else None, a, b, magnitude.to(adapters).requires_grad_()


def results(function, tensors, dtype=None):
    """The outputs of `function` and the gradients of a fixed random function of them; None for what has none."""
    tensors = [
        t if t is None or dtype is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors
    ]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]


def compare(no_worse, function, tensors):
    """`function` under the backend in force against PyTorch in the same dtype, and against float64.

    Both round z, and with dropout the two products of it, to x's dtype before the result: half a unit more, as for LoRA.
    """
    steps = 16 + 0.5 * torch.finfo(tensors[0].dtype).eps / torch.finfo(torch.float32).eps
    ours = results(function, tensors)
    with fastft.backend("reference"):
        plain, exact = results(function, tensors), results(function, tensors, torch.float64)
    for i, three in enumerate(zip(ours, plain, exact, strict=True)):
        no_worse(f"result {i}", *three, steps=steps)


def formula(x, weight, bias, a, b, magnitude, scale):
    """DoRA as its authors write it, with the whole updated weight and a constant norm; without dropout."""
    updated = weight + scale * b @ a
    return F.linear(x, (magnitude / updated.detach().norm(dim=1))[:, None] * updated, bias)


SHAPES = [
    ((7, 13), 11, 3),
    ((2, 5, 64), 33, 16),
    ((90, 1), 31, 1),
    ((0, 8), 4, 2),
    ((3, 0, 8), 4, 2),
    ((65, 40), 130, 1),
    ((65, 40), 24, 256),
]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out", "rank"), SHAPES)
def test_linear(backend, no_worse, poisoned, shape, out, rank, dtype, p):
    tensors = draw(*shape, dtype=dtype), *layer(out, shape[-1], rank, dtype)
    run = lambda x, w, bias, a, b, m: lora_linear(x, w, bias, a, b, 0.5, m, dropout_p=p, seed=9)
    compare(no_worse, run, tensors)


def test_the_reference_is_the_formula_of_the_paper(backend):
    tensors = draw(2, 5, 12), *layer(7, 12, 3)
    run = lambda x, w, bias, a, b, m: lora_linear(x, w, bias, a, b, 0.5, m)
    expected = results(lambda *t: formula(*t, 0.5), tensors, torch.float64)
    with fastft.backend("reference"):
        exact = results(run, tensors, torch.float64)
    for ours, reference, wanted in zip(results(run, tensors), exact, expected, strict=True):
        torch.testing.assert_close(reference, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


def split(t, start, scale):
    weight, bias, a, b, magnitude = t[start : start + 5]
    return weight, bias, a, b, scale, magnitude


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group(backend, no_worse, poisoned, dtype, p):
    """Three layers of different widths and ranks, one without bias and one without magnitude."""
    tensors = (
        draw(2, 9, 40, dtype=dtype),
        *layer(24, 40, 4, dtype),
        *layer(8, 40, 1, dtype)[:4],
        None,
        *layer(9, 40, 7, dtype, bias=False),
    )
    layers = lambda t: [split(t, i, scale) for i, scale in ((0, 0.5), (5, 2.0), (10, -1.0))]
    compare(no_worse, lambda x, *t: lora_group(x, layers(t), dropout_p=p, seeds=[1, 2, 3]), tensors)


def mlp(x, *t, p=0.0, activation="silu", seeds=(1, 2, 3)):
    return lora_mlp(x, *(split(t, i, 0.5) for i in (0, 5, 10)), activation=activation, dropout_p=p, seeds=seeds)


def mlp_tensors(dtype=torch.float32):
    first = [layer(21, 12, rank, dtype) for rank in (4, 3)]
    return draw(2, 7, 12, dtype=dtype), *first[0], *first[1], *layer(11, 21, 5, dtype)


@pytest.mark.parametrize(("activation", "p"), [("silu", 0.0), ("silu", 0.1), ("gelu", 0.0), ("gelu_tanh", 0.1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(backend, no_worse, poisoned, dtype, activation, p):
    compare(no_worse, lambda *t: mlp(*t, p=p, activation=activation), mlp_tensors(dtype))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_strided_inputs_and_expanded_gradients(backend, p):
    x, tensors = torch.randn(12, 6, 5).transpose(0, 2).requires_grad_(), layer(7, 12, 3)
    found = []
    for copy in (x, x.detach().contiguous().requires_grad_()):
        weight, bias, a, b, m = leaves = [t.detach().requires_grad_() for t in tensors]
        lora_linear(copy, weight, bias, a, b, 0.5, m, dropout_p=p, seed=4).sum().backward()
        found.append([copy.grad, *(t.grad for t in leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [*itertools.combinations(NAMES, 1), ("weight", "bias"), ("x", "weight", "bias")])
def test_frozen_arguments_get_no_gradient(backend, frozen, p):
    tensors = dict(zip(NAMES, (draw(5, 12), *layer(7, 12, 3)), strict=True))
    expected = {}
    for round in range(2):
        for name, t in tensors.items():
            t.grad = None
            t.requires_grad_(round == 0 or name not in frozen)
        lora_linear(**tensors, scale=0.5, dropout_p=p, seed=2).sum().backward()
        if round == 0:
            expected = {name: t.grad for name, t in tensors.items() if name not in frozen}
    assert {name for name, t in tensors.items() if t.grad is None} == set(frozen)
    for name, gradient in expected.items():
        assert torch.equal(tensors[name].grad, gradient)


def test_a_new_adapter_changes_nothing():
    """Its B is zero and its magnitudes are the norms of the rows, rounded: they are divided by the same, rounded alike."""
    for dtype in DTYPES:
        x, (weight, _, a, b, _) = draw(5, 40, dtype=dtype), layer(70, 40, 3, dtype)
        start = weight.detach().float().norm(dim=1).to(dtype)
        with torch.no_grad():
            ours = lora_linear(x, weight, None, a, torch.zeros_like(b), 2.0, start)
            assert torch.equal(ours, lora_linear(x, weight, None, a, torch.zeros_like(b), 2.0))


def test_norms_where_the_update_undoes_the_weight():
    """The three sums of the square, each without B A, would lose all their digits here."""
    b, a = torch.randn(9, 2), torch.randn(2, 300)
    noise = torch.randn(9, 300) * 1e-3
    weight = noise - 0.5 * b @ a
    norms = dora.row_norms(weight, weight, a, b, 0.5, torch.ones(9))
    exact = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-4, atol=0)


def test_norms_in_pieces(monkeypatch):
    weight, _, a, b, magnitude = layer(33, 12, 3)
    whole = dora.row_norms(weight, weight, a, b, 0.5, magnitude)
    monkeypatch.setitem(dora.reference._ELEMENTS, "cpu", 12 * 4 + 1)
    assert not whole.requires_grad
    torch.testing.assert_close(dora.row_norms(weight, weight, a, b, 0.5, magnitude), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_one_tensor_of_the_size_of_the_result(p):
    x, (weight, bias, a, b, m) = draw(50, 12), layer(70, 12, 3)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, 0.5, m, dropout_p=p)
    for t in (x, weight, a, b):
        saved.pop(t.data_ptr(), None)
    assert sum(saved.values()) == 50 * 70 + 50 * 3 + 2 * 70 + 1  # z, S, gain and norms, and the seed


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapters_wider_than_x(p):
    x, tensors = draw(5, 12, dtype=torch.bfloat16), layer(7, 12, 3, torch.bfloat16, torch.float32)
    weight, bias, a, b, m = tensors
    y = lora_linear(x, weight, bias, a, b, 0.5, m, dropout_p=p, seed=1)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert [t.grad.dtype for t in tensors] == [torch.bfloat16] * 2 + [torch.float32] * 3


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_in_float64(p, dtype):
    """All in float64 are computed so; adapters, bias and magnitude of it beside a float32 weight get gradients of it."""
    tensors = [t.detach().to(torch.float64 if i > 1 else dtype) for i, t in enumerate((draw(5, 12), *layer(7, 12, 3)))]
    tensors = [t.requires_grad_() for t in tensors]
    run = lambda x, w, bias, a, b, m: lora_linear(x, w, bias, a, b, 0.5, m, dropout_p=p, seed=1)
    ours = results(run, tensors)
    with fastft.backend("reference"):
        exact = results(run, tensors, torch.float64)
    assert [t.dtype for t in ours] == [dtype] * 3 + [torch.float64] * 4
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=close, atol=close)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing(p):
    tensors, run = mlp_tensors(), lambda *t: mlp(*t, p=p, seeds=None)
    checkpointed = lambda *t: torch.utils.checkpoint.checkpoint(run, *t, use_reentrant=False)
    found = []
    for function in (run, checkpointed):
        torch.manual_seed(5)
        found.append(results(function, tensors))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_into_one_graph(backend, compiler, p):
    def run(x, *t):
        first, second = lora_group(x, [split(t, 0, 0.5), split(t, 5, 0.5)], dropout_p=p, seeds=[1, 2])
        return first.sin(), second, mlp(x, *t, p=p)

    tensors = list(mlp_tensors())
    tensors[1].requires_grad_(False)
    tensors[7] = None
    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    for ours, plain in zip(results(compiled, tensors), results(run, tensors), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_weights_in_4_bits(no_worse, p, compiled):
    x, (weight, bias, a, b, m) = draw(5, 64), layer(48, 64, 3)
    quantized = ops.quantize_nf4(weight.detach())
    whole = ops.dequantize_nf4(quantized)
    run = lambda x, bias, a, b, m: lora_linear(x, quantized, bias, a, b, 0.5, m, dropout_p=p, seed=9)
    ours = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    plain = lambda x, bias, a, b, m: lora_linear(x, whole, bias, a, b, 0.5, m, dropout_p=p, seed=9)
    for one, other in zip(results(ours, (x, bias, a, b, m)), results(plain, (x, bias, a, b, m)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights, p):
    x, tensors = draw(5, 12), layer(7, 12, 3, weights, torch.float32)
    weight, bias, a, b, m = tensors
    run = lambda *t: lora_linear(*t[:5], 0.5, t[5], dropout_p=p, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, *tensors)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and weight.grad.dtype == weights
    with fastft.backend("reference"):
        expected = run(*(t.detach().to(torch.float64) for t in (x, *tensors)))
    torch.testing.assert_close(y.double(), expected, rtol=2**-6, atol=2**-6)


BAD = {
    r"magnitude is \[6\] .*must be \[7\]": {"magnitude": torch.ones(6)},
    r"magnitude is \[7, 1\]": {"magnitude": torch.ones(7, 1)},
    r"magnitude is \[7\] of torch.int64 .*floating": {"magnitude": torch.ones(7, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(zip(NAMES, (draw(5, 12), *layer(7, 12, 3)), strict=True), scale=0.5)
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**good, **BAD[message]})
    with pytest.raises(TypeError, match="magnitude is 1.0; it must be a tensor"):
        lora_linear(**{**good, "magnitude": 1.0})
