"""torch.compile of a patched model: one graph, forward and backward, with the results of the model as it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastft

HEADS = {"bert": "ForSequenceClassification"}


@pytest.mark.parametrize(
    ("family", "kind"), [("mistral", "padded"), ("bert", "padded"), ("llama", "lora"), ("llama", "packed")]
)
def test_one_graph(family, kind, tiny, examples, collate):
    """mistral has a window narrower than the rows; a LoRA model computes q, k, v and the MLP as one op each."""
    torch.compiler.reset()
    model = tiny(family, HEADS.get(family), num_hidden_layers=1)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    batch = collate(model, examples(model, "class" if family in HEADS else "token"), kind == "packed")
    fastft.patch(model, verbose=False)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, expected in zip(*reversed(found), strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-6
