"""Every public function, called wrongly: a ValueError, TypeError or BackendError in one sentence, raised by fastft itself.

`CASES` holds a right call of everything that `fastft`, `fastft.ops`, `fastft.nn` and `fastft.optim` export; a new export
without one fails here. The wrong calls are made from it: each argument in turn gets values of other types, shapes, dtypes
and devices. A wrong type must be refused; of what has the right type some may pass.
"""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft import nn, ops, optim

HERE = str(Path(fastft.__file__).parent)
ERRORS = (ValueError, TypeError, fastft.BackendError)


def T(*shape):
    return torch.randn(*shape)


def layer(rank=2, inside=8, out=8):
    return T(out, inside), T(out), T(rank, inside), T(out, rank), 0.5


def four_bits():
    return ops.quantize_nf4(T(6, 8))


def model():
    size = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=1))


def using(name):
    with fastft.backend(name):
        pass


def setting(name):
    try:
        fastft.set_backend(name)
    finally:
        fastft.set_backend("auto")


def fresh(optimizer, **options):
    """An optimizer that has made a step."""
    weight = torch.nn.Parameter(T(4, 4))
    weight.grad = T(4, 4)
    made = optimizer([weight], **options)
    made.step()
    return made


def optimizer_cases(optimizer, *options):
    """`options`: keyword arguments of the class, with good values."""
    name = optimizer.__name__
    return {
        f"optim.{name}": (optimizer, lambda: {"params": [torch.nn.Parameter(T(4))], **dict(options)}),
        f"optim.{name}.add_param_group": (
            lambda param_group: fresh(optimizer).add_param_group(param_group),
            lambda: {"param_group": {"params": [torch.nn.Parameter(T(4))], "lr": 0.1}},
        ),
        f"optim.{name}.load_state_dict": (
            lambda state_dict: fresh(optimizer).load_state_dict(state_dict),
            lambda: {"state_dict": fresh(optimizer).state_dict()},
        ),
        f"optim.{name}.step": (lambda closure: fresh(optimizer).step(closure), lambda: {"closure": None}),
    }


# {name: (function, what makes its arguments)}; a layer's `forward` is a case of its own
CASES = {
    "patch": (fastft.patch, lambda: {"model": model(), "verbose": False}),
    "unpatch": (fastft.unpatch, lambda: {"model": model()}),
    "attention_map": (
        fastft.attention_map,
        lambda: {"model": model(), "inputs": torch.tensor([[1, 2, 3]]), "layer": 0, "head": 0, "path": None},
    ),
    "backend": (using, lambda: {"name": "auto"}),
    "set_backend": (setting, lambda: {"name": "auto"}),
    "ops.attention": (
        ops.attention,
        lambda: {
            "q": T(2, 5, 4, 8), "k": T(2, 5, 2, 8), "v": T(2, 5, 2, 8), "causal": True, "scale": 0.5, "window": (3, None),
            "softcap": 20.0, "key_lengths": torch.tensor([5, 4]), "dropout_p": 0.1, "seed": 1, "return_lse": False,
        },
    ),
    "ops.attention, packed": (
        ops.attention,
        lambda: {
            "q": T(7, 4, 8), "k": T(7, 2, 8), "v": T(7, 2, 8), "cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 3, 7], dtype=torch.int32), "max_seqlen_q": 4, "max_seqlen_k": 4,
        },
    ),
    "ops.cross_entropy": (
        ops.cross_entropy,
        lambda: {
            "logits": T(5, 9), "labels": torch.tensor([0, 1, 2, -100, 8]), "ignore_index": -100, "label_smoothing": 0.1,
            "softcap": 9.0, "z_loss": 0.1, "reduction": "mean", "num_items": 3, "return_stats": False, "inplace": True,
        },
    ),
    "ops.dropout": (ops.dropout, lambda: {"x": T(3, 8), "p": 0.5, "seed": 3}),
    "ops.gelu": (ops.gelu, lambda: {"x": T(3, 8), "bias": T(8), "approximate": "tanh"}),
    "ops.rope": (
        ops.rope,
        lambda: {"q": T(2, 4, 5, 8), "k": T(2, 2, 5, 8), "cos": T(2, 5, 8), "sin": T(2, 5, 8), "unsqueeze_dim": 1},
    ),
    "ops.quantize_nf4": (ops.quantize_nf4, lambda: {"weight": T(6, 8), "block": 64, "double_quant": True}),
    "ops.dequantize_nf4": (
        ops.dequantize_nf4, lambda: {"weight": four_bits(), "dtype": torch.float32, "out": T(6, 8)}
    ),
    "ops.nf4_linear": (ops.nf4_linear, lambda: {"x": T(3, 8), "weight": four_bits(), "bias": T(6)}),
    "ops.NF4Weight": (
        ops.NF4Weight, lambda: {f: getattr(four_bits(), f) for f in ("codes", "absmax", "dtype", "block", "double")}
        | {"shape": (6, 8)},
    ),
    "ops.NF4Weight.map": (lambda function: four_bits().map(function), lambda: {"function": torch.clone}),
    "ops.NF4Weight.state": (four_bits().state, dict),
    "ops.NF4Weight.from_state": (
        ops.NF4Weight.from_state, lambda: {"codes": four_bits().codes, "state": four_bits().state()}
    ),
    "ops.geglu": (ops.geglu, lambda: {"gate": T(3, 8), "up": T(3, 8), "approximate": "tanh"}),
    "ops.swiglu": (ops.swiglu, lambda: {"gate": T(3, 8), "up": T(3, 8)}),
    "ops.layer_norm": (
        ops.layer_norm,
        lambda: {
            "x": T(3, 8), "weight": T(8), "bias": T(8), "eps": 1e-5, "residual": T(3, 8), "dropout_p": 0.1, "seed": 1,
        },
    ),
    "ops.rms_norm": (
        ops.rms_norm, lambda: {"x": T(3, 8), "weight": T(8), "eps": 1e-5, "offset": 1.0, "residual": T(3, 8)}
    ),
    "ops.linear": (ops.linear, lambda: {"x": T(3, 8), "weight": T(4, 8), "bias": T(4)}),
    "ops.linear_cross_entropy": (
        ops.linear_cross_entropy,
        lambda: {
            "hidden": T(5, 8), "weight": T(9, 8), "labels": torch.tensor([0, 1, 2, -100, 8]), "bias": T(9),
            "ignore_index": -100, "label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1, "reduction": "mean",
            "num_items": 3, "return_stats": False,
        },
    ),
    "ops.linear_distillation": (
        ops.linear_distillation,
        lambda: {
            "hidden": T(5, 8), "weight": T(9, 8), "teacher_hidden": T(5, 6), "teacher_weight": T(9, 6),
            "labels": torch.tensor([0, 1, 2, -100, 8]), "divergence": "js", "temperature": 2.0, "ignore_index": -100,
            "reduction": "mean", "num_items": 3,
        },
    ),
    "ops.lora_linear": (
        ops.lora_linear,
        lambda: {
            "x": T(3, 8), "weight": T(6, 8), "bias": T(6), "lora_a": T(2, 8), "lora_b": T(6, 2), "scale": 0.5,
            "dropout_p": 0.1, "seed": 1,
        },
    ),
    "ops.lora_group": (
        ops.lora_group, lambda: {"x": T(3, 8), "layers": [layer(), layer(3)], "dropout_p": 0.1, "seeds": [1, 2]}
    ),
    "ops.lora_mlp": (
        ops.lora_mlp,
        lambda: {
            "x": T(3, 8), "gate": layer(), "up": layer(), "down": layer(3), "activation": "gelu", "dropout_p": 0.1,
            "seeds": [1, 2, 3],
        },
    ),
    "nn.Dropout": (nn.Dropout, lambda: {"p": 0.1}),
    "nn.Dropout.forward": (nn.Dropout(0.1), lambda: {"x": T(3, 8)}),
    "nn.FusedAttention": (
        nn.FusedAttention,
        lambda: {"causal": True, "scale": 0.5, "window": (3, None), "softcap": 20.0, "dropout": 0.1},
    ),
    "nn.FusedAttention.forward": (
        nn.FusedAttention(causal=True),
        lambda: {"q": T(2, 5, 4, 8), "k": T(2, 5, 2, 8), "v": T(2, 5, 2, 8), "key_lengths": torch.tensor([5, 4])},
    ),
    "nn.LayerNorm": (
        nn.LayerNorm,
        lambda: {"hidden_size": 8, "eps": 1e-5, "bias": True, "dropout_p": 0.1, "device": "cpu", "dtype": torch.float32},
    ),
    "nn.LayerNorm.forward": (nn.LayerNorm(8), lambda: {"x": T(3, 8), "residual": T(3, 8)}),
    "nn.GELU": (
        nn.GELU, lambda: {"approximate": "tanh", "bias_size": 8, "device": "cpu", "dtype": torch.float32}
    ),
    "nn.GELU.forward": (nn.GELU(bias_size=8), lambda: {"x": T(3, 8)}),
    "nn.RotaryEmbedding": (nn.RotaryEmbedding, lambda: {"dim": 8, "theta": 10000.0}),
    "nn.RotaryEmbedding.forward": (
        nn.RotaryEmbedding(8), lambda: {"q": T(2, 5, 4, 8), "k": T(2, 5, 2, 8), "position_ids": torch.arange(5)[None]}
    ),
    "nn.Linear4bit": (
        nn.Linear4bit,
        lambda: {"in_features": 8, "out_features": 6, "bias": True, "device": "cpu", "dtype": torch.float32},
    ),
    "nn.Linear4bit.forward": (nn.Linear4bit(8, 6), lambda: {"x": T(3, 8)}),
    "nn.Linear4bit.from_linear": (
        nn.Linear4bit.from_linear, lambda: {"linear": torch.nn.Linear(8, 6), "block": 64, "double_quant": True}
    ),
    "nn.Linear4bit.quantize": (nn.Linear4bit(8, 6).quantize, lambda: {"weight": T(6, 8)}),
    "nn.Linear4bit.dequantize": (nn.Linear4bit(8, 6).dequantize, lambda: {"dtype": torch.bfloat16}),
    "nn.Linear4bit.load": (
        nn.Linear4bit(8, 6).load, lambda: {"codes": four_bits().codes, "state": four_bits().state()}
    ),
    "nn.GatedActivation": (nn.GatedActivation, lambda: {"activation": "gelu"}),
    "nn.GatedActivation.forward": (nn.GatedActivation(), lambda: {"gate": T(3, 8), "up": T(3, 8)}),
    "nn.CrossEntropyLoss": (
        nn.CrossEntropyLoss,
        lambda: {
            "ignore_index": -100, "label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1, "reduction": "mean",
            "return_stats": False, "inplace": True,
        },
    ),
    "nn.CrossEntropyLoss.forward": (
        nn.CrossEntropyLoss(), lambda: {"logits": T(5, 9), "labels": torch.tensor([0, 1, 2, -100, 7]), "num_items": 3}
    ),
    "nn.LinearCrossEntropyLoss": (
        nn.LinearCrossEntropyLoss,
        lambda: {
            "ignore_index": -100, "label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1, "reduction": "mean",
            "return_stats": False,
        },
    ),
    "nn.LinearCrossEntropyLoss.forward": (
        nn.LinearCrossEntropyLoss(),
        lambda: {
            "hidden": T(5, 8), "weight": T(9, 8), "labels": torch.tensor([0, 1, 2, -100, 8]), "bias": T(9), "num_items": 3,
        },
    ),
    "nn.LoRALinear": (
        nn.LoRALinear,
        lambda: {
            "in_features": 8, "out_features": 4, "bias": True, "r": 2, "lora_alpha": 4.0, "lora_dropout": 0.1,
            "use_rslora": True, "device": "cpu", "dtype": torch.float32,
        },
    ),
    "nn.LoRALinear.forward": (nn.LoRALinear(8, 4, r=2), lambda: {"x": T(3, 8)}),
    "nn.LoRALinear.from_linear": (nn.LoRALinear.from_linear, lambda: {"linear": torch.nn.Linear(8, 4), "r": 2}),
    "nn.LoRALinear.merge": (nn.LoRALinear(8, 4, r=2).merge, dict),
    "nn.RMSNorm": (
        nn.RMSNorm,
        lambda: {"hidden_size": 8, "eps": 1e-5, "offset": 1.0, "device": "cpu", "dtype": torch.float32},
    ),
    "nn.RMSNorm.forward": (nn.RMSNorm(8), lambda: {"x": T(3, 8), "residual": T(3, 8)}),
    **optimizer_cases(optim.AdamW, ("lr", 0.1), ("betas", (0.9, 0.99)), ("eps", 1e-8), ("weight_decay", 0.1)),
    **optimizer_cases(
        optim.AdamW8bit, ("lr", 0.1), ("betas", (0.9, 0.99)), ("eps", 1e-8), ("weight_decay", 0.1), ("code", "dynamic")
    ),
    **optimizer_cases(
        optim.Lion8bit, ("lr", 0.1), ("betas", (0.9, 0.99)), ("weight_decay", 0.1), ("code", "dynamic")
    ),
    "optim.parameter_groups": (
        optim.parameter_groups, lambda: {"model": torch.nn.Linear(4, 4), "weight_decay": 0.1, "state_bits": 8}
    ),
    "optim.use_row_gradients": (optim.use_row_gradients, lambda: {"model": torch.nn.Linear(4, 4)}),
}  # fmt: skip

# What stands for itself: an error, and what the engine builds from the classes above
NO_CASE = {"BackendError", "nn", "ops", "optim", "optim.average_over_ranks", "optim.buckets"}
NO_CASE |= {f"optim.{name}" for name in optim.__all__ if name.startswith("Replicated")}


MAY_BE_NONE = {("ops.lora_linear", "bias")}


def exported():
    """Everything public: exports, and the methods that a class adds to what torch's have."""
    names = set(fastft.__all__)
    for room, module in (("ops", ops), ("nn", nn), ("optim", optim)):
        for name in module.__all__:
            names.add(f"{room}.{name}")
            value = getattr(module, name)
            if inspect.isclass(value):
                methods = {m for c in value.__mro__ if c.__module__.startswith("fastft.") for m in vars(c)}
                public = {m for m in methods if not m.startswith("_") and callable(getattr(value, m))}
                names |= {f"{room}.{name}.{m}" for m in public - {"extra_repr", "restore_groups"}}
    return {
        name
        for name in names
        if not any(name == n or name.startswith(f"{n}.") for n in NO_CASE - {"nn", "ops", "optim"})
    }


def test_everything_public_has_a_case():
    missing = exported() - NO_CASE - {name.split(",")[0] for name in CASES}
    assert not missing, f"public, and not in CASES: {', '.join(sorted(missing))}"


def other_tensors(t):
    """Tensors of another shape, dtype or device: (what, value)."""
    yield "on meta", t.to("meta")
    yield "without its last element", t.detach()[..., :-1] if t.dim() else t.detach()[None]
    yield "with a dimension more", t.detach()[None]
    yield "a scalar", t.detach().new_ones(())
    yield "empty", t.detach().new_empty(0)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float64, torch.int8):
        if dtype != t.dtype:
            yield str(dtype), t.detach().to(dtype)
    yield "sparse", t.detach().to_sparse()


def wrong(value, optional):
    """(what, value, whether it must be refused): what to pass instead of a good value."""
    everything = [
        ("an object", object()),
        ("a text", "x"),
        ("a list", [None]),
        ("a tensor", T(2, 3)),
        ("a number", 3.5),
    ]
    if not optional:
        everything.append(("nothing", None))
    if isinstance(value, torch.Tensor):
        yield from ((what, v, True) for what, v in everything if what not in ("a tensor", "a number"))
        yield from ((what, v, False) for what, v in [*everything[3:5], *other_tensors(value)])
    elif isinstance(value, bool):
        yield from ((what, v, True) for what, v in everything)
    elif isinstance(value, (int, float)):
        yield from ((what, v, True) for what, v in everything if what not in ("a number", "a tensor"))
        yield from (("a tensor", T(2, 3), False), ("half", 3.5, False), ("NaN", float("nan"), False), ("-7", -7, False))
        yield from (("infinite", float("inf"), False), ("huge", 10**30, False))
    elif isinstance(value, (str, torch.dtype)):
        yield from ((what, v, True) for what, v in everything)
    elif isinstance(value, (list, tuple)):
        yield from ((what, v, True) for what, v in everything if what != "a tensor")
        yield from (
            ("a tensor", T(2, 3), False),
            ("an empty list", [], False),
            ("numbers", [1], False),
            ("long", [*value] * 2, False),
        )
        yield ("objects", [object()] * len(value), True)
    elif value is not None:  # a model, a layer, a dict
        yield from ((what, v, True) for what, v in everything)
        yield from (("a module", torch.nn.ReLU(), False), ("a dict", {}, True))


def calls():
    for name, (function, arguments) in CASES.items():
        good = arguments()
        parameters = inspect.signature(getattr(function, "forward", function)).parameters
        for argument, value in good.items():
            default = parameters[argument].default if argument in parameters else None
            optional = default is None or (name, argument) in MAY_BE_NONE
            for what, v, must in wrong(value, optional):
                yield name, argument, what, v, must


def refused(name, function, arguments, argument, must):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
    except ERRORS as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        place = frame.tb_frame.f_code.co_filename
        assert place.startswith(HERE) or "required positional" in str(error), f"raised by {place}: {error!r}"
        assert 15 < len(str(error)) < 1000 and "\n" not in str(error), f"no sentence: {error!r}"
        last = name.split(".")[-1] if "forward" not in name else name.split(".")[-2]
        names = (argument, argument.split("_")[0], last.split(",")[0], last.split("_")[-1], "cannot serve")
        assert any(n in str(error) for n in names), f"names neither {argument} nor {last}: {error!r}"
        return
    assert not must, "not refused"


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments_are_refused(name):
    function, arguments = CASES[name]
    function(**arguments())  # the right call is right
    for case, argument, what, value, must in calls():
        if case == name:
            try:
                refused(name, function, {**arguments(), argument: value}, argument, must)
            except BaseException as error:
                raise AssertionError(f"{name} with {argument} = {what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    "name", [n for n, (f, a) in CASES.items() if any(isinstance(v, torch.Tensor) for v in a().values())]
)
@pytest.mark.parametrize("backend", ["auto", "cpp", "triton"])
def test_another_device_is_served_or_refused(name, backend):
    """All tensors on a device that no kernel serves."""
    function, arguments = CASES[name]
    moved = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    with fastft.backend(backend):
        refused(name, function, moved, "meta", must=False)
