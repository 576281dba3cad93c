"""Packed rows through patched models give what the examples give one by one, unpatched."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastft
from fastft.patching.families import FAMILIES

DECODERS = [name for name, family in FAMILIES.items() if family.decoder]
ENCODERS = [name for name, family in FAMILIES.items() if not family.decoder and not family.keeps_attention]
PACKED = DECODERS + ENCODERS
CASES = [(name, "ForCausalLM") for name in DECODERS] + [(name, "ForMaskedLM") for name in ENCODERS]
CASES += [(name, "ForSequenceClassification") for name in PACKED]
CASES += [(name, "ForTokenClassification") for name in ("llama", "distilbert")]


def one_by_one(model, rows, collate):
    return [model(**without_labels(collate(model, [row], False))).logits for row in rows]


def without_labels(batch):
    return {name: x for name, x in batch.items() if name != "labels"}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest element of each tensor or, for gradients, of any of the model: keys have a bias whose is 0."""
    scale = 0.0
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
        scale = max(float(x.abs().max()) for x in expected) / 30
    for x, y in zip(actual, expected, strict=True):
        x, y = x.detach(), y.detach()
        assert x.shape == y.shape and x.isfinite().all()
        error, allowed = float((x - y).abs().max()), tolerance * max(float(y.abs().max()), scale)
        assert error <= allowed, f"{error} > {allowed}"


@pytest.mark.parametrize(("family", "head"), CASES, ids=["-".join(case) for case in CASES])
def test_logits_and_gradients(family, head, tiny, examples, collate):
    model = tiny(family, head)
    rows = examples(model)
    expected = one_by_one(model, rows, collate)
    weights = [torch.randn_like(x) for x in expected]
    sum((x * w).sum() for x, w in zip(expected, weights, strict=True)).backward()
    wanted = gradients(model)

    model.zero_grad()
    assert fastft.patch(model, verbose=False).packing is None
    logits = model(**without_labels(collate(model, rows, True))).logits
    dim = 0 if head == "ForSequenceClassification" else 1
    (logits * torch.cat(weights, dim)).sum().backward()
    assert_close([logits], [torch.cat(expected, dim)])
    assert_close(gradients(model), wanted, 2e-5)


def lora(model, task):
    torch.manual_seed(3)
    targets = ["q_proj", "down_proj", "query", "dense", "q_lin", "lin1"]
    config = LoraConfig(r=4, target_modules=targets, task_type=task, init_lora_weights=False)
    return get_peft_model(model, config)


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


WRAPS = {"plain": lambda model, task: model, "lora": lora, "checkpointing": lambda model, task: checkpointed(model)}
WRAPPED = [
    (name, wrap)
    for name in PACKED
    for wrap in WRAPS
    if wrap == "plain" or name in ("llama", "qwen2", "bert", "distilbert")
]


@pytest.mark.parametrize(("family", "wrap"), [case for case in WRAPPED if case[0] in DECODERS])
def test_losses_of_a_causal_lm(family, wrap, tiny, examples, collate):
    """Each example's loss, with prompts left out of it, equals the one of an unpatched model that saw it alone."""
    model = WRAPS[wrap](tiny(family), "CAUSAL_LM")
    rows = [row for row in examples(model) if len(row["input_ids"]) > 1]
    for row in rows:
        row["labels"] = [-100] * (len(row["labels"]) // 2) + row["labels"][len(row["labels"]) // 2 :]
    expected = [model(**collate(model, [row], False)).loss for row in rows]
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    sum(loss * n for loss, n in zip(expected, counts, strict=True)).backward()
    wanted = gradients(model)

    model.zero_grad()
    fastft.patch(model, verbose=False)
    batch = collate(model, rows, True)
    losses = []
    for i in range(len(rows)):
        labels = torch.full_like(batch["labels"], -100)
        span = slice(batch["cu_seq_lens_q"][i], batch["cu_seq_lens_q"][i + 1])
        labels[:, span] = batch["labels"][:, span]
        losses.append(model(**{**batch, "labels": labels}).loss)
    assert_close(losses, expected)
    model(**batch, num_items_in_batch=1).loss.backward()
    assert_close(gradients(model), wanted, 2e-5)


@pytest.mark.parametrize(
    ("family", "wrap", "kind"),
    [(*case, "class") for case in WRAPPED] + [(name, "plain", "number") for name in ("llama", "bert", "roberta")],
)
def test_losses_of_sequence_classification(family, wrap, kind, tiny, examples, collate):
    """Each example's loss equals that of an unpatched model on the padded batch, and so do the gradients of the mean."""
    settings = {"num_labels": 3} if kind == "class" else {"num_labels": 1, "problem_type": "regression"}
    model = WRAPS[wrap](tiny(family, "ForSequenceClassification", **settings), "SEQ_CLS")
    rows = examples(model, kind)
    # The padding token of a decoder must be the one by which transformers finds the last token.
    unpacked = collate(model, rows, False)
    unpacked["input_ids"][unpacked["attention_mask"] == 0] = model.config.pad_token_id
    criterion = torch.nn.CrossEntropyLoss if kind == "class" else torch.nn.MSELoss
    per_example = lambda logits: criterion(reduction="none")(
        logits if kind == "class" else logits[:, 0], unpacked["labels"]
    )
    outputs = model(**unpacked)
    outputs.loss.backward()
    wanted = gradients(model)

    model.zero_grad()
    fastft.patch(model, verbose=False)
    packed = model(**collate(model, rows, True))
    assert packed.logits.shape == (len(rows), settings["num_labels"])
    assert_close([per_example(packed.logits), packed.loss], [per_example(outputs.logits), outputs.loss])
    packed.loss.backward()
    assert_close(gradients(model), wanted, 2e-5)


@pytest.mark.parametrize("family", PACKED)
def test_position_ids_alone_tell(family, tiny, examples, collate):
    """Also in several rows; and rows that start nowhere anew are not packed."""
    model = tiny(family)
    fastft.patch(model, verbose=False)
    batch = without_labels(collate(model, examples(model), True))
    expected = model(**batch).logits
    named = {name: batch[name] for name in ("input_ids", "position_ids", "token_type_ids") if name in batch}
    assert torch.equal(model(**named).logits, expected)
    rows = model(**{name: x[:, :17].repeat(2, 1) for name, x in named.items()}).logits
    assert_close([rows[0], rows[1]], [expected[0, :17]] * 2)
    first = batch["position_ids"][:, :6]
    assert_close(
        [model(batch["input_ids"][:, 6:12], position_ids=first).logits], [model(batch["input_ids"][:, 6:12]).logits]
    )


def test_a_decoder_reads_the_last_token_that_is_not_padding(tiny, collate):
    """As transformers does, which matters where the end token is the padding token too."""
    model = tiny("llama", "ForSequenceClassification", pad_token_id=7)
    rows = [{"input_ids": ids, "labels": 0} for ids in ([5, 6, 7], [8, 9, 7, 7], [7, 7], [11, 12])]
    expected = torch.cat(one_by_one(model, rows, collate))
    fastft.patch(model, verbose=False)
    packed = without_labels(collate(model, rows, True))
    assert_close([model(**packed).logits], [expected])
    embedded = {**packed, "inputs_embeds": model.model.embed_tokens(packed.pop("input_ids"))}
    del embedded["input_ids"]
    assert_close([model(**embedded).logits[3]], [expected[3]])


def test_encoders_pool_each_sequence_only_for_their_classifier(tiny, examples, collate):
    model = tiny("bert", "ForSequenceClassification")
    rows = examples(model, "class")
    alone = [model.bert(**without_labels(collate(model, [row], False))) for row in rows]
    fastft.patch(model, verbose=False)
    packed = model.bert(**without_labels(collate(model, rows, True)))
    assert_close([packed.last_hidden_state], [torch.cat([x.last_hidden_state for x in alone], 1)])
    assert_close([packed.pooler_output], [torch.cat([x.pooler_output for x in alone])])


def test_mean_pooling(tiny, examples, collate):
    model = tiny("modernbert", "ForSequenceClassification", classifier_pooling="mean")
    rows = examples(model, "class")
    expected = torch.cat(one_by_one(model, rows, collate))
    fastft.patch(model, verbose=False)
    assert_close([model(**without_labels(collate(model, rows, True))).logits], [expected])


def test_the_last_layer_computes_what_is_read(tiny, examples, collate):
    model = tiny("bert", "ForSequenceClassification")
    fastft.patch(model, verbose=False)
    rows = []
    for layer in model.bert.encoder.layer:
        layer.output.register_forward_hook(
            lambda module, args, output: rows.append(args[0].shape[0] * args[0].shape[1])
        )
    model(**collate(model, examples(model, "class"), True))
    assert rows == [31, 5]


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_two_forwards_before_one_backward_under_checkpointing(family, tiny, examples, collate):
    """The recomputation of the first batch comes after the forward of the second."""
    model = tiny(family, "ForSequenceClassification")
    fastft.patch(model, verbose=False)
    rows = examples(model, "class")
    batches = [collate(model, rows[:3], True), collate(model, rows[2:], True)]
    for batch in batches:
        model(**batch).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    checkpointed(model)
    sum(model(**batch).loss for batch in batches).backward()
    assert_close(gradients(model), wanted)


@pytest.mark.parametrize(
    ("family", "dropout"), [("llama", "attention_dropout"), ("bert", "attention_probs_dropout_prob")]
)
def test_compiles_without_a_graph_break(family, dropout, tiny, examples, collate):
    """Attention drops the same scores, compiled or not: it draws one seed per layer."""
    head = "ForCausalLM" if family == "llama" else "ForSequenceClassification"
    model = tiny(family, head, **{dropout: 0.3})
    fastft.patch(model, verbose=False)
    batch = collate(model, examples(model, "token" if head == "ForCausalLM" else "class"), True)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(6)
        loss = run(**batch).loss
        loss.backward()
        results.append((loss, gradients(model)))
    (expected, wanted), (loss, actual) = results
    assert_close([loss], [expected])
    assert_close(actual, wanted)


def test_evaluation_in_inference_mode_spoils_no_training_step(tiny, examples, collate):
    """How a batch is cut up is remembered from one call to the next."""
    model = tiny("bert")
    fastft.patch(model, verbose=False)
    for packing in (True, False):
        batch = collate(model, examples(model), packing)
        with torch.inference_mode():
            expected = model(**batch).loss
        loss = model(**batch).loss
        loss.backward()
        assert torch.equal(loss, expected)


def test_bad_packed_rows(tiny, examples, collate):
    bert, roberta, llama = (tiny(family) for family in ("bert", "roberta", "llama"))
    for model in (bert, roberta, llama):
        fastft.patch(model, verbose=False)
    batch = collate(bert, examples(bert), True)
    for model, changes, message in (
        (bert, {"attention_mask": torch.ones(1, 31)}, "together with attention_mask"),
        (bert, {"position_ids": None}, "a bert need position_ids"),
        (roberta, {"token_type_ids": None}, "every packed sequence of a roberta must start at 2"),
        (bert, {"cu_seq_lens_q": torch.tensor([0, 6, 6, 31], dtype=torch.int32)}, "must have a token"),
        (bert, {"cu_seq_lens_q": torch.tensor([0, 6, 30], dtype=torch.int32)}, r"must rise from 0 to the 31 tokens"),
        (llama, {"token_type_ids": None, "past_key_values": ()}, "together with past_key_values"),
    ):
        changed = {**batch, **changes}
        changed["cu_seq_lens_k"] = changed["cu_seq_lens_q"]
        with pytest.raises(ValueError, match=message):
            model(**{name: x for name, x in changed.items() if x is not None})


def test_packing_is_refused_where_a_head_reads_positions(tiny):
    model = tiny("bert", "ForQuestionAnswering")
    assert fastft.patch(model, verbose=False).packing == "BertForQuestionAnswering reads positions of a padded row"
    assert fastft.patch(copy.deepcopy(model), verbose=False).replaced == {"attention": 2, "norm": 5, "mlp": 2}
