"""Tiny random models of every family, in fp32 and without dropout, and examples for them."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from fastft.data import Collator
from fastft.patching.families import FAMILIES, layer_class

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that what a layer gets wrong is seen in the logits
}
DECODER = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None, "classifier_dropout": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 5},
    "qwen2": {**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mixtral": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {**DECODER, "head_dim": 16},
    "qwen3_moe": {
        **DECODER,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "gemma2": {
        **DECODER,
        "head_dim": 16,
        "sliding_window": 4,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        **DECODER,
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi3": {**DECODER, "sliding_window": 5},
    "olmo2": DECODER,
    "gpt2": {
        "vocab_size": 99,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": None,
        "scale_attn_by_inverse_layer_idx": True,
        **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),
    },
    "gpt_neox": {**SIZES, "pad_token_id": 0, "eos_token_id": None, "classifier_dropout": 0.0},
    "bert": {**SIZES, **NO_DROPOUT},
    "roberta": {**SIZES, **NO_DROPOUT, "pad_token_id": 1},
    "xlm-roberta": {**SIZES, **NO_DROPOUT, "pad_token_id": 1},
    "modernbert": {
        **SIZES,
        "pad_token_id": 1,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        **dict.fromkeys(["cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"], None),
    },
    "deberta-v2": {
        **SIZES,
        **NO_DROPOUT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 16,
    },
    "t5": {
        "vocab_size": 99,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "distilbert": {
        "vocab_size": 99,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
}


@pytest.fixture
def tiny():
    """tiny(family, head, **settings) -> model in training mode; the same arguments give the same weights."""

    def build(family, head=None, **settings):
        head = head or ("ForCausalLM" if FAMILIES[family].decoder else "ForMaskedLM")
        head = "ForTokenClassification" if family == "t5" and head == "ForMaskedLM" else head  # its encoder alone
        config = transformers.AutoConfig.for_model(family, **{**SETTINGS[family], "num_labels": 3, **settings})
        torch.manual_seed(1)
        return layer_class(config, head)(config).train()

    return build


@pytest.fixture
def examples():
    """examples(model, labels) -> five examples of 1 to 11 tokens; labels: one of token, class, number."""

    def make(model, labels="token"):
        generator = torch.Generator().manual_seed(2)
        lengths = (6, 11, 1, 4, 9)
        ids = [torch.randint(5, 99, (n,), generator=generator).tolist() for n in lengths]
        per_example = {"class": [0, 2, 1, 2, 0], "number": [0.5, -1.0, 0.1, 2.0, 0.0]}.get(labels)
        rows = [
            {"input_ids": x, "labels": x if per_example is None else y}
            for x, y in zip(ids, per_example or ids, strict=True)
        ]
        if model.config.model_type == "bert":
            for row in rows:
                row["token_type_ids"] = (
                    [0] * 2 + [1] * (len(row["input_ids"]) - 2) if len(row["input_ids"]) > 2 else [0]
                )
        return rows

    return make


@pytest.fixture
def collate():
    """collate(model, examples, packing) -> batch."""
    return lambda model, rows, packing: Collator(SimpleNamespace(pad_token_id=1), model.config, packing=packing)(rows)


@pytest.fixture
def padded():
    """padded(model, examples, side="right"): input_ids and attention_mask of the examples, padded."""

    def make(model, examples, side="right"):
        rows = [row["input_ids"] for row in examples(model)]
        longest = max(map(len, rows))
        pad = lambda row, fill: (
            [fill] * (longest - len(row)) * (side == "left") + row + [fill] * (longest - len(row)) * (side == "right")
        )
        ids = [pad(row, model.config.pad_token_id) for row in rows]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        }

    return make


@pytest.fixture
def results():
    """results(model, batch): logits of the real tokens, and the gradients of a random function of them."""

    def compute(model, batch):
        model.zero_grad()
        logits = model(**batch).logits
        if logits.dim() == 3:
            logits = logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits.flatten(0, 1)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        (logits * weights).sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    return compute


@pytest.fixture
def assert_close():
    """assert_close(actual, expected, exact=None) compares what `results` returned.

    exact: the same in float64; then `actual` may be no further from it than `expected` is, but for the tolerance.
    """

    def check(actual, expected, exact=None):
        scale = max(x.abs().max() for x in expected[1:]) / 30  # the gradient of a key's bias is 0 but for rounding
        tolerance = 1e-5 if exact else 2e-5  # either is up to 6e-6 from the same model in float64
        for x, y, z in zip(actual, expected, exact or expected, strict=True):
            assert x.shape == y.shape
            assert (x - z).abs().max() <= (y - z).abs().max() + tolerance * max(y.abs().max(), scale)

    return check
