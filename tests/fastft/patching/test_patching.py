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

# Not encoders padded on the left: their positions count from the left edge.
SIDES = [(name, side) for name in FAMILIES for side in ("right", "none")] + [(name, "left") for name in DECODERS]


@pytest.mark.parametrize(("family", "side"), SIDES)
def test_padded_batches(family, side, tiny, examples, padded, results, assert_close):
    model = tiny(family)
    batch = padded(model, examples, "left" if side == "left" else "right")
    if side == "none":
        batch = {"input_ids": batch["input_ids"][:2, :6]}
    expected = results(model, batch)
    fastft.patch(model, verbose=False)
    assert_close(results(model, batch), expected)


@pytest.mark.parametrize("family", ["mistral", "bert"])
def test_masks_that_the_user_made(family, tiny, examples, padded, assert_close):
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
def test_generation_gives_the_same_tokens(family, cache, tiny, examples, padded):
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
def test_unpatch_leaves_nothing_behind(family, head, tiny, examples, padded, results):
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
def test_peft(family, order, tiny, examples, padded, results, assert_close):
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
def test_gradient_checkpointing(family, reentrant, tiny, examples, padded, results, assert_close):
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


def test_saved_models_load_without_fastft(tiny, examples, tmp_path, padded, results, assert_close):
    model = tiny("qwen3")
    batch = padded(model, examples)
    fastft.patch(model, verbose=False)
    model.save_pretrained(tmp_path)
    assert "fastft" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert_close(results(again, batch), results(model, batch))


def test_a_copy_is_patched_on_its_own(tiny, examples, padded, results, assert_close):
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


def test_training_gives_the_same_curve(tiny, examples, collate, assert_close):
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
def test_roles_that_were_asked_for(family, head, roles, tiny, examples, padded, results, assert_close):
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


def test_packed_rows_are_refused_where_they_would_be_misread(tiny, examples, collate, padded):
    """A classifier without fastft's pooling reads one token a row."""
    model = tiny("llama", "ForSequenceClassification")
    report = fastft.patch(model, roles=set(ROLES) - {"pooling"}, verbose=False)
    assert report.packing == f"pooling is kept: {report.kept['pooling']}"
    model(**padded(model, examples))
    with pytest.raises(ValueError, match="packed rows for a LlamaForSequenceClassification: pooling is kept"):
        model(**collate(model, examples(model, "class"), True))


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


def test_a_backend_that_was_asked_for(tiny, examples, padded, results, assert_close):
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
