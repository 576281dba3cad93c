import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fastft
from fastft.durable import write_json
from fastft.export import merge, save_model


def load(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapter_over(base, folder, dtype="auto", **options):
    """A LoRA model over the base model in a folder, with an adapter that changes the output."""
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(load(base, dtype), LoraConfig(**options), autocast_adapter_dtype=False).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(4, 24)[None]).logits


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_as_it_was(tiny_llama, tmp_path, dtype, tied):
    model = load(tiny_llama, dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    save_model(model, tmp_path, tokenizer)
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path)("1+1=").input_ids == tokenizer("1+1=").input_ids
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied


def test_a_patched_model_is_saved_as_a_standard_one(tiny_llama, tmp_path):
    model = load(tiny_llama)
    plain = logits(model)
    fastft.patch(model, verbose=False)
    save_model(model, tmp_path)
    before, after = (json.loads((Path(folder) / "config.json").read_text()) for folder in (tiny_llama, tmp_path))
    assert {**after, "dtype": None} == {**before, "dtype": None}
    assert torch.equal(logits(load(tmp_path)), plain)


def test_an_adapter_names_a_base_that_can_be_found_from_anywhere(tiny_llama, tmp_path, monkeypatch):
    shutil.copytree(tiny_llama, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = adapter_over("base", tmp_path)
    save_model(model, "out", AutoTokenizer.from_pretrained(tiny_llama))
    monkeypatch.chdir("/")
    out = tmp_path / "out"
    assert names(out) >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert not names(out) & {"model.safetensors", "config.json", "README.md", ".saving"}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(out).eval()), logits(model))

    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args: None
    )  # as without a network
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    save_model(model, out)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/some-model"


def test_an_adapter_over_a_nameless_base_is_refused(tiny_llama, tmp_path):
    model = adapter_over(tiny_llama, tmp_path)
    model.peft_config["default"].base_model_name_or_path = model.get_base_model().name_or_path = ""
    with pytest.raises(ValueError, match="base model has no name to load it by"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class BrokenTokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_model_that_was_there(tiny_llama, tmp_path):
    save_model(load(tiny_llama), tmp_path, AutoTokenizer.from_pretrained(tiny_llama))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = load(tiny_llama)
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(OSError, match="was not saved in .* No space left on device"):
        save_model(model, tmp_path, BrokenTokenizer())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_nothing_of_an_earlier_model_stays_among_the_new_files(tiny_llama, tmp_path):
    save_model(load(tiny_llama), tmp_path)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md", "run.json"):
        (tmp_path / name).write_text("{}")
    save_model(load(tiny_llama), tmp_path)
    assert names(tmp_path) == {"model.safetensors", "config.json", "generation_config.json", "README.md", "run.json"}
    save_model(adapter_over(tiny_llama, tmp_path), tmp_path)
    assert names(tmp_path) == {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"}
    save_model(load(tiny_llama), tmp_path)
    assert names(tmp_path) == {"model.safetensors", "config.json", "generation_config.json", "README.md", "run.json"}


def test_an_adapter_saved_beside_its_base_leaves_the_base(tiny_llama, tmp_path):
    save_model(load(tiny_llama), tmp_path)
    save_model(adapter_over(tmp_path, tmp_path), tmp_path)
    assert names(tmp_path) >= {"model.safetensors", "config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(tiny_llama, tmp_path, dtype):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    save_model(load(tiny_llama, dtype), tmp_path / "base", tokenizer)
    save_model(adapter_over(tmp_path / "base", tmp_path), tmp_path / "adapter", tokenizer)
    exact = logits(PeftModel.from_pretrained(load(tmp_path / "base", torch.float32), tmp_path / "adapter").eval())
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.dtype == dtype and not names(tmp_path / "merged") & {"adapter_config.json"}
    error = (logits(merged).double() - exact).abs().max() / exact.abs().max()
    # fp32: (W + BA)x rounds otherwise than Wx + B(Ax); bf16: weights, activations and logits have 8 bits
    assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("1+1=").input_ids == tokenizer("1+1=").input_ids

    (tmp_path / "base").rename(tmp_path / "moved")
    merge(tmp_path / "adapter", tmp_path / "again", base_model=str(tmp_path / "moved"))
    assert torch.equal(logits(load(tmp_path / "again")), logits(merged))


def test_merge_keeps_the_head_of_a_classifier(tiny_llama, tmp_path):
    kwargs = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, **kwargs)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**options)).eval()
    save_model(model, tmp_path / "adapter", AutoTokenizer.from_pretrained(tiny_llama))
    arguments = {"task": "sequence_classification", "model_name_or_path": tiny_llama}
    write_json(tmp_path / "adapter" / "run.json", {"arguments": arguments, "model_kwargs": kwargs})
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == kwargs["id2label"]
    assert torch.allclose(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_merge_refuses_what_is_no_adapter_and_where_something_is(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no adapter, adapter_config.json is missing"):
        merge(tiny_llama, tmp_path / "merged")
    save_model(adapter_over(tiny_llama, tmp_path), tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for occupied in (tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        with pytest.raises(
            ValueError, match="not an empty folder; merge writes the whole model into a new or empty one"
        ):
            merge(tmp_path / "adapter", occupied)
    assert names(tmp_path / "full") == {"thesis.txt"}
