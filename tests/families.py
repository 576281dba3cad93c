"""`make families`: every text architecture of transformers that can be built tiny, patched or refused; a table of what came.

For each model type of the mappings for causal, masked, sequence-to-sequence models and classifiers: its configuration is
shrunk generically and a model built from it. Rules, without exception: an architecture that is not in the table of
fastft/patching/families.py is refused with the supported list, and the model is as it was; one that is in it gives the
logits and gradients of before (no further from float64 than transformers' own), and after `unpatch` to the bit.

    python tests/families.py [--write docs/families.md] [model types ...]
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto

import fastft
from fastft.patching.families import FAMILIES

HEADS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classes": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
TYPES = sorted(set().union(*HEADS.values()))
ELEMENTS = 2e7  # a model with more is not tiny: something was not shrunk

HIDDEN, HEAD_DIM, COUNT, VOCABULARY, LENGTH = 32, 8, 4, 99, 64
SMALL = {
    HIDDEN: "hidden_size d_model n_embd dim embed_dim model_dim hidden_dim d_embed word_embed_proj_dim embedding_size",
    48: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner inner_dim ffn_hidden_size d_inner "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size mlp_hidden_size dim_ff",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_experts_per_tok num_key_value_heads n_kv_heads kv_n_heads top_k num_hash_layers",
    COUNT: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
    HEAD_DIM: "head_dim d_kv kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_head rotary_dim",
    16: "q_lora_rank kv_lora_rank qk_head_dim sliding_window",
    VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input",
    LENGTH: "max_position_embeddings n_positions max_position max_seq_len max_sequence_length n_ctx",
}
SMALL = {name: value for value, names in SMALL.items() for name in names.split()}


@dataclass
class Row:
    """What came of one model type with one head."""

    model_type: str
    head: str
    outcome: str
    """patched, refused, or not built"""
    detail: str


def shrink(model_type):
    """A configuration of the type whose sizes are small wherever they have a common name."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    default = config_class()
    given = {name: value for name, value in SMALL.items() if isinstance(getattr(default, name, None), int)}
    given = {name: value for name, value in given.items() if not isinstance(getattr(default, name), bool)}
    names = getattr(config_class, "attribute_map", {})
    given = {name: value for name, value in given.items() if name not in names}
    tokens = [name for name in vars(default) if name.endswith("_token_id") and isinstance(getattr(default, name), int)]
    given |= {name: min(getattr(default, name), 3) for name in tokens}
    rates = [name for name, value in vars(default).items() if "dropout" in name and isinstance(value, float)]
    given |= dict.fromkeys(rates, 0.0)
    for name in [name for name, value in vars(default).items() if name.endswith("_pdrop") and isinstance(value, float)]:
        given[name] = 0.0
    if isinstance(getattr(default, "layer_types", None), list):
        given["layer_types"] = default.layer_types[:2]
    config = config_class(**given)
    for part in config.sub_configs or {}:  # of models of several parts: nothing to read their names from but the parts
        sub = getattr(config, part, None)
        for name, value in SMALL.items():
            held = getattr(sub, name, None)
            if isinstance(held, int) and not isinstance(held, bool) and name not in type(sub).attribute_map:
                setattr(sub, name, value)
    config.num_labels = 3
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def build(model_type, head):
    """A tiny model, in float32 and without dropout; raises whatever comes."""
    cls = getattr(transformers, _class_name(HEADS[head][model_type]))
    config = shrink(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > ELEMENTS:
        raise MemoryError(f"{size / 1e6:.0f} million parameters after shrinking")
    torch.manual_seed(1)
    model = cls(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default computes no float64
    return model


def _class_name(names):
    return names if isinstance(names, str) else names[0]


def run(model_type, head):
    """The Row of one model. Raises AssertionError where the rule is broken; what else is raised breaks it too."""
    try:
        model = build(model_type, head)
    except Exception as error:
        if model_type in FAMILIES:
            raise
        return Row(model_type, head, "not built", f"{type(error).__name__}: {_first_line(error)}")
    known = model.config.model_type in FAMILIES  # gpt-sw3 is a GPT2Config
    return _patched(model, model_type, head) if known else _refused(model, model_type, head)


def _refused(model, model_type, head):
    before = traces(model)
    try:
        fastft.patch(model, verbose=False)
    except ValueError as error:
        assert all(name in str(error) for name in FAMILIES), f"refused without the supported list: {error}"
        assert traces(model) == before, "refused, but changed"
        return Row(model_type, head, "refused", "not one of those that fastft patches")
    raise AssertionError("patched although it is not in the table")


def _patched(model, model_type, head):
    batch = make_batch(model, head)
    expected = results(model.train(), batch)
    before = traces(model)  # a classifier writes into its configuration what it has learnt from the first labels
    exact = results(model.double(), batch)
    model.float()
    report = fastft.patch(model, verbose=False)
    assert report.replaced, "nothing was replaced"
    assert_close(results(model, batch), expected, exact)
    fastft.unpatch(model)
    assert traces(model) == before, "unpatch left something behind"
    again = results(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), "unpatch is not to the bit"
    roles = ", ".join(f"{role} ({count})" for role, count in report.replaced.items())
    kept = "; ".join(f"kept {role}: {reason}" for role, reason in report.kept.items())
    packed = "" if report.packing is None else "no packed rows"
    return Row(model_type, head, "patched", "; ".join(part for part in (roles, kept, packed) if part))


def make_batch(model, head):
    """Three rows of which two are padded on the right."""
    generator = torch.Generator().manual_seed(2)
    pad = model.config.pad_token_id
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 3:] = 0
    ids[mask == 0] = 0 if pad is None else pad
    model.config.pad_token_id = int(ids[2, -1])
    if model.config.is_encoder_decoder and head == "classes":
        ids[torch.arange(3), mask.sum(1) - 1] = model.config.eos_token_id  # its head reads the last of these
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "decoder_input_ids": ids[:, :5].clone()} if head == "seq2seq" else batch


def results(model, batch):
    """Logits of the real tokens, the gradients of a random function of them, and the same of the model's own loss."""
    model.zero_grad()
    logits = model(**batch).logits
    if logits.dim() == 3 and "decoder_input_ids" not in batch:
        logits = logits[batch["attention_mask"].bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights.to(logits.dtype)).sum().backward()
    found = [logits.detach(), *gradients(model)]
    model.zero_grad()
    loss = model(**batch, labels=labels_of(model, batch, logits)).loss
    loss.backward()
    return [*found, loss.detach()[None], *gradients(model)]


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def labels_of(model, batch, logits):
    """A class for each row, or the tokens themselves."""
    if logits.dim() == 2 and len(logits) == len(batch["input_ids"]):
        return torch.tensor([0, 2, 1])
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    return ids if "decoder_input_ids" in batch else ids.masked_fill(batch["attention_mask"] == 0, -100)


def assert_close(actual, expected, exact):
    """Each no further from float64 than transformers' own float32, but for rounding in another order."""
    scale = max(x.abs().max() for x in exact[1:]) / 30  # the gradient of a key's bias is 0 but for rounding
    for i, (x, y, z) in enumerate(zip(actual, expected, exact, strict=True)):
        allowed = (y - z).abs().max() + 1e-5 * max(z.abs().max(), scale)
        error = (x - z).abs().max()
        assert error <= allowed, f"result {i}, {list(x.shape)}: off by {error:.2e}, allowed {allowed:.2e}"


def traces(model):
    """What `patch` could leave on a model."""
    return [
        (set(m.__dict__), list(m._forward_pre_hooks), list(m._forward_hooks), str(getattr(m, "config", None)))
        for m in model.modules()
    ] + [model.config._attn_implementation, *model.state_dict()]


def _first_line(error):
    lines = str(error).strip().splitlines() or [""]
    return lines[0].replace("|", "/").replace(os.sep + "/".join(Path(sys.prefix).parts[1:]), "")[:100]


def table(rows):
    """The record, in Markdown."""
    counts = Counter(row.outcome for row in rows)
    of_types = {outcome: len({row.model_type for row in rows if row.outcome == outcome}) for outcome in counts}
    patched = [row for row in rows if row.outcome == "patched"]
    lines = [
        "# Families",
        "",
        f"What `make families` found with transformers {transformers.__version__}: every model type of the mappings for",
        "causal, masked and sequence-to-sequence models and for classifiers, built tiny from its configuration class where",
        "that works. Patched: logits, losses and gradients are no further from float64 than transformers' own, and `unpatch`",
        "gives them back to the bit. Refused: with the list of supported architectures, and nothing was changed.",
        "",
        "; ".join(f"{outcome}: {counts[outcome]} models of {of_types[outcome]} types" for outcome in sorted(counts))
        + ".",
        "",
        "## Patched",
        "",
        "| model type | head | roles |",
        "|---|---|---|",
        *(f"| {row.model_type} | {row.head} | {row.detail} |" for row in patched),
    ]
    refused = dict.fromkeys(row.model_type for row in rows if row.outcome == "refused")
    lines += ["", "## Refused", "", ", ".join(refused) + "."]
    lines += ["", "## Not built", "", "| model type | head | what its class said |", "|---|---|---|"]
    lines += [f"| {row.model_type} | {row.head} | {row.detail} |" for row in rows if row.outcome == "not built"]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def quiet():
    """Without the warnings of three hundred models."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", default=[])
    parser.add_argument("--write", type=Path, metavar="FILE", help="the record goes there")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.model_types) - set(TYPES))
    if unknown:
        parser.error(f"no text model type of transformers {transformers.__version__}: {', '.join(unknown)}")
    torch.set_num_threads(1)
    rows, broken = [], []
    for model_type in args.model_types or TYPES:
        for head in [head for head, names in HEADS.items() if model_type in names]:
            try:
                with quiet():
                    rows.append(run(model_type, head))
            except Exception as error:
                broken.append(f"{model_type} ({head}): {type(error).__name__}: {error}")
                print("BROKEN", broken[-1], flush=True)
                continue
            print(f"{model_type:24} {head:8} {rows[-1].outcome:10} {rows[-1].detail}", flush=True)
    if args.write and not broken:
        args.write.write_text(table(rows), encoding="utf-8")
    print(f"{len(rows)} models, {len(broken)} break the rule")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
