"""Norms, dropout and products of a layer: the same results, fused, wrapped by PEFT, in half precision."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastft


def test_dropout_is_replaced(tiny, examples, padded, assert_close):
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
def test_dropout_sum_and_norm_are_one_call(family, tiny, examples, monkeypatch, padded, results, assert_close):
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


def test_norms_that_peft_wraps(tiny, examples, padded, assert_close):
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


def test_half_precision_on_a_cpu_without_it(tiny, examples, monkeypatch, padded, results):
    monkeypatch.setattr("fastft.patching.native", lambda dtype: dtype == torch.float32)
    model = tiny("llama").bfloat16()
    batch = padded(model, examples)
    plain, exact = results(model, batch), results(copy.deepcopy(model).double(), batch)
    assert fastft.patch(model, verbose=False).replaced["linear"] == 15
    for x, y, z in zip(results(model, batch), plain, exact, strict=True):
        ours, theirs = ((result.double() - z).norm() for result in (x, y))
        assert ours <= 1.5 * theirs + 1e-3 * z.norm()
    assert "linear" not in fastft.patch(tiny("llama"), verbose=False).replaced
