"""fastft.ops.lora_linear, lora_group and lora_mlp: results and gradients in every dtype, dropout, torch.compile, errors."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.ops import dispatch, lora, lora_group, lora_linear, lora_mlp, nf4
from fastft.ops.nf4 import product_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["x", "weight", "bias", "lora_a", "lora_b"]


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()


@pytest.fixture(params=["auto", "cpp", "triton", "no kernels"])
def backend(request, monkeypatch):
    if request.param in ("cpp", "triton") and dispatch.unavailable(request.param):
        pytest.skip(dispatch.unavailable(request.param))
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors are on the CPU, and Triton's interpreter is off")
    if request.param == "no kernels":
        monkeypatch.setattr(dispatch, "unavailable", lambda name: "not here")
    with fastft.backend(request.param if request.param in ("cpp", "triton") else "auto"):
        yield request.param


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def layer(out, columns, rank, dtype=torch.float32, adapters=None, bias=True):
    """weight, bias, lora_a, lora_b with outputs of about 1 from both branches."""
    adapters = adapters or dtype
    a, b = draw(rank, columns, dtype=adapters, scale=columns**-0.5), draw(out, rank, dtype=adapters, scale=rank**-0.5)
    return draw(out, columns, dtype=dtype, scale=columns**-0.5), draw(out, dtype=dtype) if bias else None, a, b


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

    Both round the low-rank products to x's dtype before the result, and either may be lucky there: half a unit more.
    """
    steps = 16 + 0.5 * torch.finfo(tensors[0].dtype).eps / torch.finfo(torch.float32).eps
    ours = results(function, tensors)
    with fastft.backend("reference"):
        plain, exact = results(function, tensors), results(function, tensors, torch.float64)
    for i, three in enumerate(zip(ours, plain, exact, strict=True)):
        no_worse(f"result {i}", *three, steps=steps)


SHAPES = [
    ((7, 13), 11, 3),
    ((2, 5, 64), 33, 16),
    ((90, 1), 31, 1),
    ((0, 8), 4, 2),
    ((3, 0, 8), 4, 2),
    ((65, 40), 24, 256),
]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out", "rank"), SHAPES)
def test_linear(backend, no_worse, poisoned, shape, out, rank, dtype, p):
    tensors = draw(*shape, dtype=dtype), *layer(out, shape[-1], rank, dtype)
    compare(no_worse, lambda *t: lora_linear(*t, 0.5, dropout_p=p, seed=9), tensors)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group(backend, no_worse, poisoned, dtype, p):
    """Three layers of different widths and ranks, one without bias."""
    tensors = (
        draw(2, 9, 40, dtype=dtype),
        *layer(24, 40, 4, dtype),
        *layer(8, 40, 1, dtype),
        *layer(9, 40, 7, dtype, bias=False),
    )
    layers = lambda t: [(*t[i : i + 4], scale) for i, scale in ((0, 0.5), (4, 2.0), (8, -1.0))]
    compare(no_worse, lambda x, *t: lora_group(x, layers(t), dropout_p=p, seeds=[1, 2, 3]), tensors)


@pytest.mark.skipif(dispatch.unavailable("triton") is not None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
class TestTriton:
    """Where a table leaves products to PyTorch, and where a gradient or a weight is of another kind."""

    @pytest.fixture(autouse=True)
    def forced(self, monkeypatch):
        monkeypatch.setattr(nf4, "native", lambda dtype: True)  # products in x's dtype, as on a GPU
        with fastft.backend("triton"):
            yield

    @pytest.fixture
    def config(self):
        return importlib.import_module("fastft_kernels.triton._lora_config")

    LEFT = {"every product": (False, False), "thin products": (False, True), "wide products": (True, False)}

    @pytest.mark.parametrize("left", LEFT)
    @pytest.mark.parametrize("p", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_what_is_left_to_pytorch(self, config, monkeypatch, no_worse, poisoned, left, p, dtype):
        thin, wide = self.LEFT[left]
        takes = config.takes_product
        monkeypatch.setattr(config, "takes_thin", lambda *_, **__: thin)
        monkeypatch.setattr(config, "takes_product", lambda low, xs, *rest: (wide or not xs) and takes(low, xs, *rest))
        tensors = draw(9, 40, dtype=dtype), *layer(24, 40, 4, dtype), *layer(8, 40, 1, dtype)
        layers = lambda t: [(*t[i : i + 4], scale) for i, scale in ((0, 0.5), (4, 2.0))]
        compare(no_worse, lambda x, *t: lora_group(x, layers(t), dropout_p=p, seeds=[1, 2]), tensors)

    @pytest.mark.parametrize("p", [0.0, 0.1])
    def test_every_kernel_runs(self, monkeypatch, p):
        kernel, calls = lora.KERNELS["triton"], []
        for name in ("low_rank", "product", "gradients", "adapter_gradients", "input_gradient"):
            run = getattr(kernel, name)
            monkeypatch.setattr(
                kernel, name, lambda *a, run=run, name=name: calls.append((name, run(*a))) or calls[-1][1]
            )
        x, one, two = draw(5, 12), layer(7, 12, 3), layer(4, 12, 3)
        sum(y.sum() for y in lora_group(x, [(*one, 0.5), (*two, 0.5)], dropout_p=p)).backward()
        expected = ["low_rank", "product", "product", "gradients", "gradients", "adapter_gradients", "input_gradient"]
        assert [name for name, _ in calls] == expected and all(result is not None for _, result in calls)

    @pytest.mark.parametrize("count", [1, 2])
    def test_weights_in_4_bits(self, no_worse, count):
        """Several are read into one buffer, one after the other: then it is the low-rank term that a kernel computes."""
        weights = [nf4.quantize_nf4(draw(out, 64, scale=0.1).detach()) for out in (24, 9)[:count]]
        tensors = draw(5, 64), *(draw(3, 64, scale=0.1) for _ in weights), *(draw(W.shape[0], 3) for W in weights)

        def run(x, *t):
            layers = zip(weights, t[:count], t[count:], strict=True)
            return lora_group(x, [(W, None, a, b, 0.5) for W, a, b in layers], dropout_p=0.1, seeds=[1, 2][:count])

        compare(no_worse, run, tensors)

    def test_a_group_of_more_layers_than_a_kernel_takes(self, no_worse):
        tensors = draw(5, 12), *(t for _ in range(4) for t in layer(7, 12, 2))
        layers = lambda t: [(*t[4 * i : 4 * i + 4], 0.5) for i in range(4)]
        compare(no_worse, lambda x, *t: lora_group(x, layers(t), dropout_p=0.1, seeds=[1, 2, 3, 4]), tensors)


def mlp(x, *t, p=0.0, activation="silu"):
    layers = ((*t[i : i + 4], 0.5) for i in (0, 4, 8))
    return lora_mlp(x, *layers, activation=activation, dropout_p=p, seeds=[1, 2, 3])


def mlp_tensors(dtype=torch.float32):
    first = [layer(21, 12, rank, dtype) for rank in (4, 3)]
    return draw(2, 7, 12, dtype=dtype), *first[0], *first[1], *layer(11, 21, 5, dtype)


@pytest.mark.parametrize(("activation", "p"), [("silu", 0.0), ("silu", 0.1), ("gelu", 0.0), ("gelu_tanh", 0.1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(backend, no_worse, poisoned, dtype, activation, p):
    compare(no_worse, lambda *t: mlp(*t, p=p, activation=activation), mlp_tensors(dtype))


@pytest.mark.parametrize("function", ["linear", "mlp"])
def test_products_in_fp32_where_half_precision_is_not_native(monkeypatch, no_worse, function):
    """As on a CPU without bf16 instructions; saved are still x and the parameters as they are."""
    monkeypatch.setattr(nf4, "native", lambda dtype: dtype == torch.float32)
    tensors = draw(5, 12, dtype=torch.bfloat16), *layer(7, 12, 3, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(*tensors, 0.5)
    assert saved[0].data_ptr() == tensors[0].data_ptr() and saved[3].data_ptr() == tensors[1].data_ptr()
    if function == "linear":
        compare(no_worse, lambda *t: lora_linear(*t, 0.5, dropout_p=0.1, seed=1), tensors)
    else:
        compare(no_worse, lambda *t: mlp(*t, p=0.1), mlp_tensors(torch.bfloat16))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strided_inputs_and_expanded_gradients(backend, how):
    x = {"transposed": torch.randn(12, 6, 5).transpose(0, 2), "sliced": torch.randn(5, 6, 24)[:, ::2, ::2]}
    x = x.get(how, torch.randn(1, 6, 12).expand(5, 6, 12)).requires_grad_()
    weight, bias, a, b = layer(7, 12, 3)
    a, b = a.detach().t().contiguous().t().requires_grad_(), b.detach().t().contiguous().t().requires_grad_()
    found = []
    for copy in (x, x.detach().contiguous().requires_grad_()):
        lora_linear(copy, weight, bias, a, b, 0.5, dropout_p=0.1, seed=4).sum().backward()
        found.append([copy.grad, *(t.grad.clone() for t in (weight, bias, a, b))])
        for t in (weight, bias, a, b):
            t.grad = None
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("frozen", [*itertools.combinations(NAMES, 1), ("weight", "bias"), ("x", "weight", "bias")])
def test_frozen_arguments_get_no_gradient(backend, frozen):
    tensors = dict(zip(NAMES, (draw(5, 12), *layer(7, 12, 3)), strict=True))
    for name in frozen:
        tensors[name].requires_grad_(False)
    lora_linear(**tensors, scale=0.5).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is None} == set(frozen)


def test_a_layer_that_nothing_depends_on():
    x, first, second = draw(5, 12), layer(7, 12, 3), layer(4, 12, 2)
    lora_group(x, [(*first, 1.0), (*second, 1.0)])[1].sum().backward()
    assert all(t.grad is None for t in first) and all(t.grad.abs().sum() > 0 for t in second)
    expected = second[0].detach() + second[3].detach() @ second[2].detach()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(5, 12))


def test_saves_its_input_the_parameters_and_the_low_rank_product():
    x, (weight, bias, a, b) = draw(50, 12), layer(70, 12, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, 0.5, dropout_p=0.1)
    known = {t.data_ptr() for t in (x, weight, a, b)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in known) == 50 * 3 + 1  # S and the seed
    assert all(any(t is parameter for t in saved) for parameter in (weight, a, b))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_adapters_wider_than_x(adapters):
    """They are rounded to the dtype of the products, float32 where bf16 is not native; gradients come in their own."""
    x, tensors = draw(5, 12, dtype=torch.bfloat16), layer(7, 12, 3, torch.bfloat16, adapters)
    y = lora_linear(x, *tensors, 0.5)
    y.sum().backward()
    rounded = [t.detach().to(product_dtype(x)) for t in tensors[2:]]
    assert y.dtype == torch.bfloat16 and torch.equal(y, lora_linear(x, *tensors[:2], *rounded, 0.5))
    assert [t.grad.dtype for t in tensors] == [torch.bfloat16, torch.bfloat16, adapters, adapters]


def test_dropout_is_drawn_anew_and_follows_torchs_generator():
    tensors = torch.ones(40, 30), *layer(7, 30, 3)
    run = lambda: lora_linear(*tensors, 1.0, dropout_p=0.3)
    first, second = run(), run()
    torch.manual_seed(0)
    torch.randn(3)
    state = torch.get_rng_state()
    third = run()
    torch.set_rng_state(state)
    assert not torch.equal(first, second) and torch.equal(run(), third)


def test_each_layer_of_a_group_has_its_own_mask():
    x, one = draw(40, 30), layer(7, 30, 3)
    first, second = lora_group(x, [(*one, 1.0)] * 2, dropout_p=0.3)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing(p):
    tensors = mlp_tensors()
    run = lambda x, *t: lora_mlp(x, *((*t[i : i + 4], 0.5) for i in (0, 4, 8)), dropout_p=p)
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
        first, second = lora_group(x, [(*t[0:4], 0.5), (*t[4:8], 0.5)], dropout_p=p, seeds=[1, 2])
        return first.sin(), second, mlp(x, *t, p=p)

    tensors = list(mlp_tensors())
    tensors[1].requires_grad_(False)
    tensors[6] = None
    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    for ours, plain in zip(results(compiled, tensors), results(run, tensors), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_custom_ops_are_sound():
    x, (weight, bias, a, b) = draw(5, 12), layer(7, 12, 3)
    lists = [weight.detach()] * 2, [bias, bias.new_empty(0)], [a, a], [b, b], [0.5, 1.0]
    torch.library.opcheck(lora._group_op, (x, *lists, 0.3, torch.tensor([1, 2]), "reference"))
    weights, _, *lists = ([t.detach() if isinstance(t, torch.Tensor) else t for t in part] for part in lists)
    dys, S, rest = [draw(5, 7).detach()] * 2, torch.randn(5, 6), (0.3, torch.tensor([1, 2]), "reference")
    torch.library.opcheck(lora._group_backward_op, (dys, x.detach(), S, weights, *lists, *rest, [True] * 9))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights):
    x, tensors = draw(5, 12), layer(7, 12, 3, weights, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, *tensors, 0.5)
    y.float().sum().backward()
    low = F.linear(F.linear(x.bfloat16(), tensors[2].bfloat16()), tensors[3].bfloat16()) * 0.5
    expected = F.linear(x.bfloat16(), tensors[0].bfloat16(), tensors[1].bfloat16()) + low
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and tensors[0].grad.dtype == weights
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)


BAD = {
    "x is .*int64": {"x": torch.ones(5, 12, dtype=torch.int64)},
    r"weight is \[7, 11\]": {"weight": torch.ones(7, 11)},
    "weight is .*bfloat16": {"weight": torch.ones(7, 12, dtype=torch.bfloat16)},
    r"bias is \[6\]": {"bias": torch.ones(6)},
    r"lora_a is \[0, 12\]": {"lora_a": torch.ones(0, 12), "lora_b": torch.ones(7, 0)},
    r"lora_a is \[3, 11\]": {"lora_a": torch.ones(3, 11)},
    r"lora_b is \[7, 4\]": {"lora_b": torch.ones(7, 4)},
    "dropout_p is 1": {"dropout_p": 1.0},
    "dropout_p is -0.1": {"dropout_p": -0.1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(zip(NAMES, (draw(5, 12), *layer(7, 12, 3)), strict=True), scale=0.5)
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**good, **BAD[message]})


def test_bad_groups():
    x, one = draw(5, 12), (*layer(7, 12, 3), 0.5)
    with pytest.raises(ValueError, match="one or more"):
        lora_group(x, [])
    with pytest.raises(ValueError, match="1 seeds for 2 layers"):
        lora_group(x, [one, one], dropout_p=0.1, seeds=[1])
    with pytest.raises(ValueError, match="must have the same shape"):
        lora_mlp(x, one, (*layer(8, 12, 3), 0.5), (*layer(3, 7, 2), 0.5))
    with pytest.raises(ValueError, match="activation.*relu"):
        lora_mlp(x, one, one, (*layer(3, 7, 2), 0.5), activation="relu")
    with pytest.raises(fastft.BackendError, match="float64"):
        forced = "cpp" if dispatch.unavailable("triton") else "triton"
        with fastft.backend(forced):
            lora_group(x.double(), [tuple(t.double() if isinstance(t, torch.Tensor) else t for t in one)])
