"""fastft.patch and fastft.unpatch: the same results on padded batches and in generation, and nothing left behind."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import fastft
from fastft.patching import ROLES, attention, why_not
from fastft.patching.families import FAMILIES
from fastft_kernels.cpp import extension

DECODERS = [name for name, family in FAMILIES.items() if family.decoder]


def padded(model, examples, side="right"):
    """input_ids and attention_mask of the examples, padded."""
    rows = [row["input_ids"] for row in examples(model)]
    longest = max(map(len, rows))
    pad = lambda row, fill: (
        [fill] * (longest - len(row)) * (side == "left") + row + [fill] * (longest - len(row)) * (side == "right")
    )
    ids = [pad(row, model.config.pad_token_id) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows])}


def results(model, batch):
    """Logits of the real tokens, and the gradients of a random function of them."""
    model.zero_grad()
    logits = model(**batch).logits
    if logits.dim() == 3:
        logits = logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits.flatten(0, 1)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(actual, expected, exact=None):
    """exact: the same in float64; then `actual` may be no further from it than `expected` is, but for the tolerance."""
    scale = max(x.abs().max() for x in expected[1:]) / 30  # the gradient of a key's bias is 0 but for rounding
    tolerance = 1e-5 if exact else 2e-5  # either is up to 6e-6 from the same model in float64
    for x, y, z in zip(actual, expected, exact or expected, strict=True):
        assert x.shape == y.shape
        assert (x - z).abs().max() <= (y - z).abs().max() + tolerance * max(y.abs().max(), scale)


# Not encoders padded on the left: their positions count from the left edge.
SIDES = [(name, side) for name in FAMILIES for side in ("right", "none")] + [(name, "left") for name in DECODERS]


@pytest.mark.parametrize(("family", "side"), SIDES)
def test_padded_batches(family, side, tiny, examples):
    model = tiny(family)
    batch = padded(model, examples, "left" if side == "left" else "right")
    if side == "none":
        batch = {"input_ids": batch["input_ids"][:2, :6]}
    expected = results(model, batch)
    fastft.patch(model, verbose=False)
    assert_close(results(model, batch), expected)


@pytest.mark.parametrize("family", ["mistral", "bert"])
def test_masks_that_the_user_made(family, tiny, examples):
    """4-D masks, which may allow anything, and a 2-D mask with gaps."""
    model = tiny(family)
    ids = padded(model, examples)["input_ids"]
    allowed = torch.rand(len(ids), 1, 11, 11) > 0.5
    allowed |= torch.eye(11, dtype=torch.bool)
    gaps = torch.ones_like(ids)
    gaps[:, 3] = gaps[1, 7] = 0
    masks = [allowed, torch.where(allowed, 0.0, torch.finfo(torch.float32).min)] + [gaps] * (family == "bert")
    expected = [model(ids, attention_mask=mask).logits for mask in masks]
    fastft.patch(model, verbose=False)
    for mask, wanted in zip(masks, expected, strict=True):
        real = gaps.bool() if mask is gaps else ...
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], wanted[real], rtol=1e-5, atol=1e-5)
    if family == "mistral":
        with pytest.raises(ValueError, match="attention_mask has gaps"):
            model(ids, attention_mask=gaps)


@pytest.mark.parametrize(("family", "cache"), [*((name, "dynamic") for name in DECODERS), ("mistral", "static")])
def test_generation_gives_the_same_tokens(family, cache, tiny, examples):
    """Greedy, left-padded, past the sliding window."""
    model = tiny(family).eval()
    batch = padded(model, examples, "left")
    run = lambda: model.generate(**batch, max_new_tokens=8, do_sample=False, cache_implementation=cache)
    expected = run()
    fastft.patch(model, verbose=False)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *(
            (name, "ForSequenceClassification")
            for name in ("llama", "qwen3", "gpt2", "bert", "distilbert", "modernbert")
        ),
        *((name, None) for name in ("llama", "bert", "distilbert", "t5")),
    ],
)
def test_unpatch_leaves_nothing_behind(family, head, tiny, examples):
    model = tiny(family, head)
    batch = padded(model, examples)
    expected = results(model, batch)
    traces = lambda: [(set(m.__dict__), list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()]
    implementation, before, names = model.config._attn_implementation, traces(), list(model.state_dict())
    fastft.patch(model, verbose=False)
    assert list(model.state_dict()) == names and traces() != before
    fastft.unpatch(model)
    assert traces() == before and model.config._attn_implementation == implementation
    assert all(torch.equal(x, y) for x, y in zip(results(model, batch), expected, strict=True))
    fastft.unpatch(model)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("order", ["patch, then adapt", "adapt, then patch"])
def test_peft(family, order, tiny, examples):
    def adapt(model):
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "query", "value"], init_lora_weights=False)
        return get_peft_model(model, config)

    model = adapt(tiny(family))
    batch = padded(model, examples)
    expected, exact = results(model, batch), results(model.double(), batch)
    model = tiny(family)
    if order == "adapt, then patch":
        model = adapt(model)
        report = fastft.patch(model, verbose=False)
    else:
        report = fastft.patch(model, verbose=False)
        model = adapt(model)
    assert report.replaced["attention"] == 2
    assert fastft.patch(model, verbose=False) is report
    assert_close(results(model, batch), expected, exact)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-4)
    fastft.unpatch(model)
    assert all(torch.equal(x, y) for x, y in zip(results(model, batch), expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_checkpointing(family, reentrant, tiny, examples):
    """The same gradients, from layers that are really computed twice."""
    model = tiny(family)
    batch = padded(model, examples)
    fastft.patch(model, verbose=False)
    expected = results(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    part = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    part.register_forward_hook(lambda *_: calls.append(1))
    assert_close(results(model, batch), expected)
    assert len(calls) == 2


def test_other_models_are_left_alone(tiny, examples):
    """Models built from the same config object, classes, and what is saved."""
    config = tiny("llama").config
    first, second = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    fastft.patch(first, verbose=False)
    assert (
        second.config._attn_implementation == config._attn_implementation == "sdpa" != first.config._attn_implementation
    )
    assert "forward" not in second.model.norm.__dict__ and not second.model._forward_pre_hooks
    assert all(m.config is first.config for m in first.modules() if hasattr(m, "config"))


def test_saved_models_load_without_fastft(tiny, examples, tmp_path):
    model = tiny("qwen3")
    batch = padded(model, examples)
    fastft.patch(model, verbose=False)
    model.save_pretrained(tmp_path)
    assert "fastft" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert_close(results(again, batch), results(model, batch))


def test_a_copy_is_patched_on_its_own(tiny, examples):
    model = tiny("bert", "ForSequenceClassification")
    batch = padded(model, examples)
    fastft.patch(model, verbose=False)
    expected = results(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(results(twin, batch), expected)
    fastft.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa" and model.config._attn_implementation == attention.NAME
    assert model.base_model._forward_pre_hooks and not twin.base_model._forward_pre_hooks


def test_training_gives_the_same_curve(tiny, examples, collate):
    """32 steps of AdamW, unpatched on padded and patched on packed batches."""
    curves = []
    for packing in (False, True):
        model = tiny("llama")
        if packing:
            fastft.patch(model, verbose=False)
        batch = collate(model, examples(model), packing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(32):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.1 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-4)


def test_dropout_is_replaced(tiny, examples):
    """Other masks than torch's, of the same distribution; none in evaluation."""
    model = tiny("bert", "ForSequenceClassification", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = padded(model, examples)
    many = {name: x.repeat(200, 1) for name, x in batch.items()}
    exact = model.eval()(**batch).logits
    with torch.no_grad():
        before = model.train()(**many).logits.view(200, 5, 3)
        report = fastft.patch(model, verbose=False)
        after = model(**many).logits.view(200, 5, 3)
    assert report.replaced["dropout"] == 6
    torch.testing.assert_close(model.eval()(**batch).logits, exact, rtol=1e-5, atol=1e-5)
    spread = (before.var(0) + after.var(0)).sqrt() / 200**0.5
    assert ((before.mean(0) - after.mean(0)).abs() < 5 * spread).all()
    torch.testing.assert_close(before.std(0), after.std(0), rtol=0.35, atol=0)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_dropout_sum_and_norm_are_one_call(family, tiny, examples, monkeypatch):
    """In each block twice, with the masks that dropout alone would draw; a recomputed block draws them again."""
    model = tiny(family, hidden_dropout_prob=0.2)
    batch = padded(model, examples)
    calls = []
    fused = fastft.ops.layer_norm
    record = lambda *args, **kwargs: calls.append(kwargs.get("dropout_p")) or fused(*args, **kwargs)
    monkeypatch.setattr("fastft.ops.layer_norm", record)
    fastft.patch(model, verbose=False)
    run = lambda: torch.manual_seed(3) and results(model, batch)
    expected = run()
    assert calls.count(0.2) == 4
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(run(), expected)
    model.gradient_checkpointing_disable()
    for block in model.base_model.encoder.layer:  # the same, one after the other
        for end in (block.attention.output, block.output):
            del end.__dict__["forward"]
    assert_close(run(), expected)


def test_norms_that_peft_wraps(tiny, examples):
    """A trained copy of each LayerNorm computes, not the frozen original."""
    model = tiny("bert")
    fastft.patch(model, verbose=False)
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["LayerNorm"])
    model = get_peft_model(model, config)
    batch = padded(model, examples)
    end = model.get_base_model().bert.encoder.layer[1].output
    before = model(**batch).logits
    with torch.no_grad():
        end.LayerNorm.modules_to_save["default"].weight.mul_(2)
    assert not torch.equal(model(**batch).logits, before)
    with model.disable_adapter():
        original = model(**batch).logits
    torch.testing.assert_close(original, before, rtol=1e-4, atol=1e-4)
    model(**batch).logits.sum().backward()
    assert end.LayerNorm.modules_to_save["default"].weight.grad is not None


def test_half_precision_on_a_cpu_without_it(tiny, examples, monkeypatch):
    monkeypatch.setattr("fastft.patching.native", lambda dtype: dtype == torch.float32)
    model = tiny("llama").bfloat16()
    batch = padded(model, examples)
    expected = results(model, batch)
    assert fastft.patch(model, verbose=False).replaced["linear"] == 15
    for x, y in zip(results(model, batch), expected, strict=True):
        assert (x - y).abs().max() <= 0.05 * max(y.abs().max(), 0.01 * max(z.abs().max() for z in expected[1:]))
    assert "linear" not in fastft.patch(tiny("llama"), verbose=False).replaced


@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
def test_gated_mlps(tiny, examples):
    """SwiGLU on a CPU is replaced only where its kernel was asked for, for PyTorch's is faster; Gemma's GEGLU always."""
    assert "faster" in fastft.patch(tiny("llama"), verbose=False).kept["mlp"]
    for family, name in (("llama", "cpp"), ("gemma2", "auto")):
        model = tiny(family)
        batch = padded(model, examples)
        expected = results(model, batch)
        with fastft.backend(name):
            assert fastft.patch(model, verbose=False).replaced["mlp"] == 2
            assert_close(results(model, batch), expected)


@pytest.mark.parametrize(
    ("family", "head", "roles"),
    [
        ("llama", None, ["norm"]),
        ("llama", None, ["attention", "loss"]),
        ("bert", None, ("norm", "dropout")),
        ("gemma2", None, "mlp"),
        ("llama", None, []),
    ],
)
def test_roles_that_were_asked_for(family, head, roles, tiny, examples):
    model = tiny(family, head, **({"hidden_dropout_prob": 0.1} if family == "bert" else {})).eval()
    batch = padded(model, examples)
    expected = results(model, batch)
    report = fastft.patch(model, roles=roles, verbose=False)
    asked = {roles} if isinstance(roles, str) else set(roles)
    assert set(report.replaced) == asked and not asked & set(report.kept)
    assert {"attention", "norm"} - asked <= set(report.kept) and "not among the roles" in str(report)
    assert (report.packing is None) == ("attention" in asked)
    assert_close(results(model, batch), expected)
    with pytest.raises(ValueError, match="patched already, with the roles"):
        fastft.patch(model, roles=["dropout", "linear"], verbose=False)
    assert fastft.patch(model, verbose=False) is fastft.patch(model, roles=roles, verbose=False) is report
    fastft.unpatch(model)
    assert all(torch.equal(x, y) for x, y in zip(results(model, batch), expected, strict=True))


def test_roles_that_do_not_exist(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match=f"roles has norms: choose among {', '.join(ROLES)}"):
        fastft.patch(model, roles=["attention", "norms"], verbose=False)
    assert "_fastft_patch" not in model.__dict__


def test_packed_rows_are_refused_where_they_would_be_misread(tiny, examples, collate):
    """A classifier without fastft's pooling reads one token a row."""
    model = tiny("llama", "ForSequenceClassification")
    report = fastft.patch(model, roles=set(ROLES) - {"pooling"}, verbose=False)
    assert report.packing == f"pooling is kept: {report.kept['pooling']}"
    model(**padded(model, examples))
    with pytest.raises(ValueError, match="packed rows for a LlamaForSequenceClassification: pooling is kept"):
        model(**collate(model, examples(model, "class"), True))


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
def test_plain_mlps_add_the_bias_in_the_activation(family, tiny, examples, gelus):
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
def test_adapters_on_the_product_of_an_mlp(family, product, order, tiny, examples, gelus):
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


def test_activations_that_are_not_gelu_are_kept(tiny, examples):
    for family, settings, reason in (
        ("bert", {"hidden_act": "relu"}, "its activation is ReLU"),
        ("gpt2", {"activation_function": "quick_gelu"}, "its activation is QuickGELUActivation"),
        ("t5", {}, "its activation, mostly ReLU, has a dropout"),
    ):
        report = fastft.patch(tiny(family, **settings), verbose=False)
        assert "mlp" not in report.replaced and report.kept["mlp"].startswith(reason)


@pytest.mark.parametrize("family", ["bert", "gpt2", "distilbert", "modernbert"])
def test_mlps_compile_into_one_graph(family, tiny):
    torch.compiler.reset()
    model = tiny(family)
    assert fastft.patch(model, verbose=False).replaced["mlp"] == 2
    part = next(m for m in model.modules() if getattr(m.__dict__.get("forward"), "__module__", "").endswith(".mlp"))
    x = torch.randn(2, 6, 32)
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(run(x).sin().sum(), list(part.parameters())) for run in (compiled, part)]
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_report(tiny, capsys):
    model = tiny("distilbert", "ForSequenceClassification", dropout=0.1)
    report = fastft.patch(model)
    assert report.replaced == {"attention": 2, "norm": 5, "dropout": 3, "mlp": 2, "pooling": 1}
    assert not report.kept and report.packing is None
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    text = "fastft patched DistilBertForSequenceClassification: attention (2), norm (5), dropout (3), mlp (2), "
    text += "pooling (1)\n"
    text += "  packed rows: yes"
    assert str(report) == text and capsys.readouterr().out == text + "\n"
    assert fastft.patch(model, verbose=False) is report and capsys.readouterr().out == ""


def test_a_backend_that_was_asked_for(tiny, examples):
    """Roles that it does not serve stay transformers' own; the model runs, on padded batches."""
    model = tiny("llama").double()
    batch = padded(model, examples)
    expected = results(model, batch)
    with fastft.backend("cpp"):
        report = fastft.patch(model, verbose=False)
    if extension.missing is None:
        assert "q is torch.float64" in report.kept["attention"] and "x is torch.float64" in report.kept["norm"]
    assert report.packing == f"attention is kept: {report.kept['attention']}"
    assert model.config._attn_implementation == "sdpa"
    assert_close(results(model, batch), expected)
    with (
        fastft.backend("cpp"),
        pytest.raises(fastft.BackendError, match="backend 'cpp' was asked for but cannot serve"),
    ):
        other = tiny("llama").double()
        with fastft.backend("reference"):
            fastft.patch(other, verbose=False)
        other(**batch)


def test_what_cannot_be_patched(tiny):
    opt = transformers.OPTConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, ffn_dim=16, vocab_size=9, word_embed_proj_dim=16
    )
    with pytest.raises(ValueError, match=f"'opt' is not one of .*: {', '.join(FAMILIES)}"):
        fastft.patch(transformers.OPTForCausalLM(opt))
    assert "'opt'" in why_not(opt) and why_not(tiny("llama").config) is None
    with pytest.raises(ValueError, match="None is not one of"):
        fastft.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is_decoder"):
        fastft.patch(
            transformers.BertLMHeadModel(
                transformers.BertConfig(**{**tiny("bert").config.to_dict(), "is_decoder": True})
            )
        )
    model = tiny("llama")
    model.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match="something else has replaced the forward of model.norm"):
        fastft.patch(model)
    assert "_fastft_patch" not in model.__dict__ and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["t5", "deberta-v2"])
def test_distances_within_a_row_keep_the_attention(family, tiny, examples):
    """These models keep theirs and their padded rows; what else applies is patched, and the report says why."""
    model = tiny(family)
    report = fastft.patch(model, verbose=False)
    assert "distance of two tokens" in report.kept["attention"] and report.packing.startswith("attention is kept")
    assert "norm" in report.replaced and model.config._attn_implementation != attention.NAME


def test_decoders_that_are_not_causal_are_refused(tiny):
    with pytest.raises(ValueError, match="not causal"):
        fastft.patch(tiny("gemma3_text", use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="add_cross_attention"):
        fastft.patch(tiny("gpt2", add_cross_attention=True))


def test_attentions_cannot_be_returned(tiny):
    model = tiny("bert")
    fastft.patch(model, verbose=False)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(torch.tensor([[5, 6]]), output_attentions=True)
