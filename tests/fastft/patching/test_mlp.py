"""Role `mlp`: activations gated or behind a bias, the same results, alone and with adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastft
from fastft_kernels.cpp import extension


@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
def test_gated_mlps(tiny, examples, padded, results, assert_close):
    """SwiGLU, of two projections or of the halves of one, and Gemma's GEGLU."""
    for family in ("llama", "phi3", "gemma2"):
        model = tiny(family)
        batch = padded(model, examples)
        expected = results(model, batch)
        assert fastft.patch(model, verbose=False).replaced["mlp"] == 2
        assert_close(results(model, batch), expected)


PLAIN_MLPS = ["bert", "roberta", "xlm-roberta", "deberta-v2", "distilbert", "gpt2", "gpt_neox"]


@pytest.fixture
def gelus(monkeypatch):
    """[(whether a bias was added, approximate), ...] of the calls of the op."""
    calls, gelu = [], fastft.ops.gelu

    def record(x, bias=None, *, approximate="none"):
        calls.append((bias is not None, approximate))
        return gelu(x, bias, approximate=approximate)

    monkeypatch.setattr("fastft.ops.gelu", record)
    return calls


@pytest.mark.parametrize("family", PLAIN_MLPS)
def test_plain_mlps_add_the_bias_in_the_activation(family, tiny, examples, gelus, padded, results, assert_close):
    """Also in chunks of a sequence, and not where somebody watches the product: who asks for its output gets it."""
    chunked = {"chunk_size_feed_forward": 1} if family == "distilbert" else {}
    model = tiny(family, **chunked)
    batch = {"input_ids": padded(model, examples)["input_ids"][:2, :6]}
    expected = results(model, batch)
    assert fastft.patch(model, verbose=False).replaced["mlp"] == 2
    assert_close(results(model, batch), expected)
    assert gelus == [(True, "tanh" if family == "gpt2" else "none")] * (12 if chunked else 2)
    gelus.clear()
    products = [m for m in model.modules() if hasattr(m, "fastft_activates")]
    seen = []
    products[0].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    assert_close(results(model, batch), expected)
    assert {biased for biased, _ in gelus} == {True, False}
    x, output = seen[0]
    torch.testing.assert_close(output, type(products[0]).forward(products[0], x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "product"), [("bert", "intermediate.dense"), ("gpt2", "c_fc"), ("distilbert", "lin1")]
)
@pytest.mark.parametrize("order", ["patch, then adapt", "adapt, then patch"])
def test_adapters_on_the_product_of_an_mlp(
    family, product, order, tiny, examples, gelus, padded, results, assert_close
):
    """It keeps its forward, and the activation alone is fused; without the adapter, the bias comes back into it."""
    config = LoraConfig(r=4, target_modules=[product], fan_in_fan_out=family == "gpt2", init_lora_weights=False)

    def adapt(model):
        torch.manual_seed(5)
        return get_peft_model(model, config)

    model = adapt(tiny(family))
    batch = {"input_ids": padded(model, examples)["input_ids"][:2, :6]}
    expected = results(model, batch)
    if order == "patch, then adapt":
        model = tiny(family)
        fastft.patch(model, verbose=False)
        model = adapt(model)
    else:
        fastft.patch(model, verbose=False)
    assert_close(results(model, batch), expected)
    assert gelus and not any(biased for biased, _ in gelus)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, tiny(family)(**batch).logits, rtol=1e-3, atol=1e-4)
    gelus.clear()
    merged = model.merge_and_unload()
    merged(**batch)
    assert gelus and all(biased for biased, _ in gelus)
    fastft.unpatch(merged)
    assert not any(hasattr(m, "fastft_activates") or "forward" in m.__dict__ for m in merged.modules())


def test_mlps_that_are_kept(tiny, examples):
    for family, settings, reason in (
        ("bert", {"hidden_act": "relu"}, "its activation is ReLU"),
        ("gpt2", {"activation_function": "quick_gelu"}, "its activation is QuickGELUActivation"),
        ("llama", {"hidden_act": "relu"}, "its activation is ReLU"),
        ("phi3", {"hidden_act": "gelu"}, "its activation is GELU"),
        ("mixtral", {}, "its experts lie in stacked weights"),
        ("t5", {}, "its activation, mostly ReLU, has a dropout"),
    ):
        report = fastft.patch(tiny(family, **settings), verbose=False)
        assert "mlp" not in report.replaced and report.kept["mlp"].startswith(reason)


@pytest.mark.parametrize("family", ["bert", "gpt2", "distilbert", "modernbert"])
def test_mlps_compile_into_one_graph(family, tiny, assert_close):
    torch.compiler.reset()
    model = tiny(family)
    assert fastft.patch(model, verbose=False).replaced["mlp"] == 2
    part = next(m for m in model.modules() if getattr(m.__dict__.get("forward"), "__module__", "").endswith(".mlp"))
    x = torch.randn(2, 6, 32)
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(run(x).sin().sum(), list(part.parameters())) for run in (compiled, part)]
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
