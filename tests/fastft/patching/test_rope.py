"""Role `rope`: the rotation of single attention layers, with every kind of angles that transformers computes."""

import functools
import sys

import pytest
import torch

import fastft
from fastft.ops import dispatch
from fastft.patching import rope
from fastft.patching.families import FAMILIES
from fastft_kernels.cpp import extension
from fastft_kernels.reference.rope import rope as reference

ROTATED = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "olmo2"]
ROTATED += ["gpt_neox", "modernbert"]

default = {"rope_theta": 100.0}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0, **default},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **default},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **default},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        **default,
    },
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5, **default},
}


def results(model, ids, **more):
    """Logits, and the gradients of a random function of them."""
    model.zero_grad()
    logits = model(ids, **more).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(actual, expected):
    scale = max(x.abs().max() for x in expected[1:]) / 30  # the gradient of a key's bias is 0 but for rounding
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape and (x - y).abs().max() <= 1e-5 * max(y.abs().max(), scale)


@pytest.fixture
def calls(monkeypatch):
    """The calls of fastft.ops.rope, as they come."""
    seen, op = [], fastft.ops.rope
    monkeypatch.setattr("fastft.ops.rope", lambda *args, **kwargs: seen.append(args[0].shape) or op(*args, **kwargs))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_that_rotates(family, tiny, calls):
    model = tiny(family)
    theirs = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    report = fastft.patch(model, verbose=False)
    model(torch.randint(5, 99, (2, 7)))
    assert (report.replaced.get("rope"), len(calls)) == ((2, 2) if family in ROTATED else (None, 0))
    assert getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None) is theirs
    fastft.unpatch(model)
    model(torch.randint(5, 99, (2, 7)))
    assert len(calls) == (2 if family in ROTATED else 0)


def test_a_forward_that_is_wrapped_keeps_its_rotation(tiny, monkeypatch):
    Attention = type(tiny("llama").model.layers[0].self_attn)
    stock = Attention.forward
    monkeypatch.setattr(Attention, "forward", functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs)))
    report = fastft.patch(tiny("llama"), verbose=False)
    assert report.kept["rope"] == "LlamaAttention.forward does not itself call apply_rotary_pos_emb"


@pytest.mark.parametrize(
    ("family", "scaling"), [*(("llama", kind) for kind in SCALED if kind != "partial"), ("phi3", "partial")]
)
def test_scaled_and_partial_angles(family, scaling, tiny, calls):
    """Longer than what the model was made for, where dynamic angles change."""
    model = tiny(family, rope_parameters=SCALED[scaling], max_position_embeddings=16)
    ids = torch.randint(5, 99, (2, 24))
    expected = results(model, ids)
    fastft.patch(model, verbose=False)
    assert_close(results(model, ids), expected)
    assert len(calls) == 2
    rotary = model.model.rotary_emb
    cos, _ = rotary(torch.ones(1), torch.arange(24)[None])
    assert cos.shape[-1] == (4 if scaling == "partial" else 8)


@pytest.mark.parametrize("family", ROTATED)
def test_no_worse_than_the_function_that_is_replaced(family, tiny, no_worse):
    """In bfloat16, with angles in the dtype in which the family has them."""
    model = tiny(family)
    theirs = sys.modules[type(model).__module__].apply_rotary_pos_emb
    q, k = torch.randn(2, 2, 3, 7, 16).bfloat16()
    angles = torch.randn(1, 7, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    if family != "olmo2":  # which keeps its angles in float32
        cos, sin = cos.bfloat16(), sin.bfloat16()
    exact = reference(*(x.double() for x in (q, k, cos, sin)))
    for name, *each in zip("qk", rope.rotate(q, k, cos, sin), theirs(q, k, cos, sin), exact, strict=True):
        no_worse(name, *each)


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_backend_that_was_asked_for(name, tiny, calls):
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))
    model = tiny("gpt_neox")
    ids = torch.randint(5, 99, (2, 7))
    expected = results(model, ids)
    with fastft.backend(name):
        assert fastft.patch(model, verbose=False).replaced["rope"] == 2
        wide = tiny("llama").double()
        assert "q is torch.float64" in fastft.patch(wide, verbose=False).kept["rope"]
    if name == "cpp":  # in Triton's interpreter the whole model would take long
        with fastft.backend(name):
            assert_close(results(model, ids), expected)
        assert len(calls) == 2


@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
def test_compiled_it_is_one_op_a_layer(tiny):
    """The name is looked up in the layer's own globals, not in transformers' module."""
    torch.compiler.reset()
    targets = []
    record = lambda graph, _: targets.extend(str(node.target) for node in graph.graph.nodes) or graph
    model = tiny("llama", "Model", num_hidden_layers=1)
    fastft.patch(model, verbose=False)
    ids = torch.randint(5, 99, (2, 7))
    compiled = torch.compile(model, backend=record, fullgraph=True)(ids).last_hidden_state
    torch.testing.assert_close(compiled, model(ids).last_hidden_state)
    assert targets.count("fastft.rope.default") == 1
