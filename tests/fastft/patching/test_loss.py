"""Role `loss`: the same loss and gradients without logits, in every family and under PEFT; logits where they are wanted."""

import copy
import inspect
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastft
from fastft.patching import why_not_fused
from fastft.patching.families import FAMILIES

DECODERS = [name for name, family in FAMILIES.items() if family.decoder]


def batch(**more):
    ids = torch.randint(5, 99, (3, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, **more}


def results(model, inputs):
    """The loss, and the gradient of every trained parameter."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradients_without_logits(family, tied, tiny):
    softcap = {"final_logit_softcapping": 3.0} if family.startswith("gemma") else {}
    model = tiny(family, tie_word_embeddings=tied, **softcap)
    expected = [results(model, inputs) for inputs in (batch(), batch(num_items_in_batch=7.0))]
    report = fastft.patch(model, verbose=False)
    assert report.replaced["loss"] == 1 and why_not_fused(model) is None
    for wanted, inputs in zip(expected, (batch(), batch(num_items_in_batch=torch.tensor(7.0))), strict=True):
        assert_close(results(model, inputs), wanted)
        assert model(**inputs).logits is None
    fastft.unpatch(model)
    assert torch.equal(results(model, batch())[0], expected[0][0]) and model(**batch()).logits is not None


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_heads_of_more_than_a_product_keep_their_loss(family, tiny):
    model = tiny(family, "ForCausalLM")
    expected = results(model, batch())
    report = fastft.patch(model, verbose=False)
    assert "transforms the hidden states" in report.kept["loss"] and model(**batch()).logits is not None
    assert_close(results(model, batch()), expected)


def test_logits_where_they_are_wanted(tiny):
    model = tiny("llama")
    fastft.patch(model, verbose=False)
    shape = (3, 9, 99)
    assert model(input_ids=batch()["input_ids"]).logits.shape == shape
    assert model(**batch(logits_to_keep=9)).logits.shape == shape
    model.eval()
    output = model(**batch())
    assert output.logits.shape == shape and output.loss is not None
    loss, *_ = model(**batch(return_dict=False))
    assert torch.equal(loss, output.loss)


def test_statistics_and_smoothing(tiny):
    model = tiny("llama").eval()
    inputs = batch()
    logits, labels = (
        model(input_ids=inputs["input_ids"]).logits[:, 3:-1].flatten(0, 1),
        inputs["labels"][:, 4:].flatten(),
    )
    fastft.patch(model, verbose=False)
    output = model(**inputs, return_stats=True)
    assert output.logits is None and torch.equal(output.correct, logits.argmax(-1) == labels)
    torch.testing.assert_close(output.log_probs, torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0])
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(model.train()(**inputs, label_smoothing=0.2).loss, smooth)


def test_shifted_labels_and_positional_arguments(tiny):
    model = tiny("llama")
    fastft.patch(model, verbose=False)
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    expected = model(**inputs).loss
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, expected)
    assert torch.equal(model(inputs["input_ids"], labels=inputs["labels"]).loss, expected)
    assert "labels" in inspect.signature(model.forward).parameters  # Trainer keeps the columns that it finds there
    _, logits = model(**inputs, return_dict=False)[:2]
    assert logits is None or not isinstance(logits, torch.Tensor) or logits.shape != (3, 9, 99)


def test_all_labels_ignored(tiny):
    model = tiny("llama")
    fastft.patch(model, verbose=False)
    inputs = batch()
    inputs["labels"].fill_(-100)
    with pytest.warns(UserWarning, match="every label is -100"):
        loss, *gradients = results(model, inputs)
    assert loss == 0 and all(g.abs().sum() == 0 for g in gradients)


@pytest.mark.parametrize("order", ["patch, then adapt", "adapt, then patch"])
@pytest.mark.parametrize("kind", ["layers", "saved head", "adapter on the head"])
def test_peft(kind, order, tiny):
    settings = {
        "layers": {"target_modules": ["q_proj"]},
        "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    }[kind]

    def adapt(model):
        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings))

    model = adapt(tiny("llama"))
    expected = results(model, batch())
    model = tiny("llama")
    if order == "patch, then adapt":
        fastft.patch(model, verbose=False)
        model = adapt(model)
    else:
        model = adapt(model)
        report = fastft.patch(model, verbose=False)
        assert ("loss" in report.replaced) == (kind != "adapter on the head")
        assert kind != "adapter on the head" or "its head is a Linear" in report.kept["loss"]
    assert_close(results(model, batch()), expected)
    fused = kind != "adapter on the head"
    assert (model(**batch()).logits is None) == fused and (why_not_fused(model) is None) == fused
    if not fused and order == "patch, then adapt":
        with pytest.raises(ValueError, match="label_smoothing need the fused loss, which cannot serve here: the head"):
            model(**batch(), label_smoothing=0.1)


def test_a_copy_and_a_loss_of_the_users_own(tiny):
    model = tiny("llama")
    fastft.patch(model, verbose=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other(**batch()).logits is None and not torch.equal(other(**batch()).loss, model(**batch()).loss)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    output = model(**batch())
    assert output.logits is not None and torch.equal(output.loss, output.logits.sum())
    assert json.dumps(fastft.patch(other, verbose=False).as_dict())


def test_compiles_without_a_break(tiny):
    torch.compiler.reset()
    model = tiny("llama")
    fastft.patch(model, verbose=False)
    inputs = batch(num_items_in_batch=torch.tensor(7.0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(**inputs).loss
    torch.testing.assert_close(compiled(**inputs).loss, expected)
