"""fastft.attention_map against the attentions that transformers returns, on patched models."""

import struct
import zlib

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastft
from fastft.patching.families import FAMILIES

ATTENDED = [name for name, family in FAMILIES.items() if family.keeps_attention is None]


def attentions(model, inputs):
    """Of all layers, by the model's own eager attention."""
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    with torch.no_grad():
        result = model.eval()(**inputs, output_attentions=True).attentions
    model.train()
    model.config._attn_implementation = before
    return result


@pytest.mark.parametrize("family", ATTENDED)
def test_equals_transformers_and_leaves_no_trace(family, tiny):
    model = tiny(family)
    inputs = {"input_ids": torch.randint(5, 99, (1, 9))}
    expected = attentions(model, inputs)
    fastft.patch(model, verbose=False)
    model.get_input_embeddings().eval()  # a mode of its own, to be kept
    modes, logits = [m.training for m in model.modules()], model(**inputs).logits
    for layer, head in ((0, 1), (-1, -2)):
        got = fastft.attention_map(model, inputs["input_ids"][0], layer, head)
        torch.testing.assert_close(got, expected[layer][0, head], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.sum(-1), torch.ones(9))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model(**inputs).logits, logits)


def test_padding_is_left_out_and_lora_counts(tiny):
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    ids = torch.randint(5, 99, (1, 6))
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], 1),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
        "labels": torch.zeros(1, 9, dtype=torch.int64),
    }
    expected = fastft.attention_map(model, ids, 1, 0)
    assert expected.shape == (6, 6)
    torch.testing.assert_close(fastft.attention_map(model, padded, 1, 0), expected, rtol=1e-5, atol=1e-6)
    model.disable_adapter_layers()
    assert (fastft.attention_map(model, ids, 1, 0) - expected).abs().max() > 1e-3


def test_draws_a_png(tiny, tmp_path):
    model, ids = tiny("bert"), torch.randint(5, 99, (1, 7))
    probabilities = fastft.attention_map(model, ids, 0, 0, tmp_path / "map.png")
    data = (tmp_path / "map.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    size, zoom = width, width // 7
    assert width == height >= 600
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    rows = torch.tensor(list(zlib.decompress(data[at + 4 : at + 4 + length]))).view(size, size + 1)
    assert not rows[:, 0].any()
    drawn = 255 - rows[::zoom, 1::zoom]
    assert torch.equal(drawn, (probabilities / probabilities.max() * 255).round().long())


def test_bad_input(tiny):
    model, ids = tiny("bert"), torch.randint(5, 99, (2, 7))
    for arguments, message in (
        ((ids, 0, 0), r"input_ids are \[2, 7\]: one sample is needed"),
        (({"attention_mask": ids}, 0, 0), "inputs have attention_mask: input_ids are missing"),
        ((ids[:1], 2, 0), "layer 2: the model has 2, from 0 to 1"),
        ((ids[:1], 0, -5), "head -5: the model has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.attention_map(model, *arguments)
    for family in ("t5", "deberta-v2"):
        with pytest.raises(ValueError, match="has an attention of its own"):
            fastft.attention_map(tiny(family), ids[:1], 0, 0)
