"""QLoRA: models in 4 bits train as PEFT does on their values, resume, checkpoint and merge; what cannot be is refused."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastft
from fastft import cli, ops
from fastft.arguments import Arguments
from fastft.export import merge, quantize
from fastft.models import load_for_inference
from fastft.nn import Linear4bit
from fastft.quantization import dequantize_model, four_bit_layers, load_in_4bit, quantize_model

RUN = {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_dropout": 0.1, "bf16": False}
IDS = torch.arange(4, 24)[None]


@pytest.fixture(autouse=True)
def one_thread():
    """These models are smaller than the work of a barrier."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder, dtype=torch.float32):
    return load_in_4bit(AutoModelForCausalLM, folder, dtype).eval()


def whole(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def with_lora(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(model.get_base_model().dtype)
    return model


def test_loading_quantises_what_is_stored(tiny_llama, tmp_path):
    """The same codes whatever the run computes in; embeddings, norms and head stay whole; a plain state dict afterwards."""
    model = load(tiny_llama)
    layers = four_bit_layers(model)
    assert len(layers) == 14 and all(".layers." in name for name in layers)
    plain = whole(tiny_llama)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight) and model.dtype == torch.float32
    for name, layer in four_bit_layers(load(tiny_llama, torch.bfloat16)).items():
        expected = ops.quantize_nf4(plain.get_submodule(name).weight.detach())
        for found in (layer, layers[name]):
            assert torch.equal(found.weight, expected.codes) and torch.equal(found.quantized.absmax, expected.absmax)
    error = model.config.quantization_config.error
    assert 0.05 < error < 0.12 and quantize_model(plain) == 14
    assert plain.config.quantization_config.error == pytest.approx(error) and torch.equal(logits(plain), logits(model))
    assert dequantize_model(plain) == 14 and not four_bit_layers(plain)
    assert torch.equal(logits(plain), logits(model))


def test_a_4_bit_folder(tiny_llama, tmp_path, capsys):
    """As bitsandbytes names things: what is saved loads again, bit for bit, by the command line too."""
    folder = tmp_path / "four"
    assert cli.main(["quantize", "--model", tiny_llama, "--output_dir", str(folder)]) == 0
    assert "weights changed by 0.0" in capsys.readouterr().out
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = {key for key in file.keys() if key.startswith("model.layers.0.mlp.up_proj.")}
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.float32
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    assert keys == {f"model.layers.0.mlp.up_proj.weight{part}" for part in ("", *(f".{part}" for part in parts))}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes" and said["bnb_4bit_quant_type"] == "nf4" and said["load_in_4bit"]
    model = load(folder)
    assert torch.equal(logits(model), logits(load(tiny_llama))) and model.config.quantization_config.error is None
    assert torch.equal(logits(load_for_inference(folder)[0]), logits(load_for_inference(folder)[0]))
    for source, sentence in ((folder, "quantised already"), (tmp_path, "config.json is missing")):
        with pytest.raises(ValueError, match=sentence):
            quantize(source, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_peft_on_the_values(tiny_llama, dtype):
    """32 steps: the losses of PEFT on the dequantised weights, to rounding; every adapter weight moves and nothing else."""
    curves = []
    for four_bit in (False, True):
        base = load(tiny_llama, dtype)
        if not four_bit:
            dequantize_model(base, dtype)
        model = with_lora(base)
        if four_bit:
            report = fastft.patch(model, verbose=False)
            assert report.replaced["lora"] == 14 and not report.lora_kept
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        curves.append([])
        for _ in range(32):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "lora_" in name}
    assert curves[1][-1] < 0.95 * curves[1][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4 if dtype == torch.float32 else 3e-2)


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_gradient_checkpointing_and_plain_peft(tiny_llama):
    model = with_lora(load(tiny_llama))
    plain = gradients(model)
    fastft.patch(model, verbose=False)
    patched = gradients(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), patched, strict=True))
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(patched, plain, strict=True))
    fastft.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), plain, strict=True))


def test_memory_of_a_step_holds_one_layer(tiny_llama):
    """No allocation of a step is a dequantised weight: there is one buffer, which was there before."""
    config = whole(tiny_llama).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 128, 384, 4, 32
    model = AutoModelForCausalLM.from_config(config)
    quantize_model(model)
    model = with_lora(model)
    fastft.patch(model, verbose=False)
    gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients(model)
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(events) < 128 * 384 * 4 / 2


@pytest.fixture(scope="module")
def outcomes(launch, run_arguments, tmp_path_factory, tiny_llama):
    """Two ranks: the stages, a resumed run, a 4-bit folder, and what is refused."""
    out = tmp_path_factory.mktemp("qlora")
    quantize(tiny_llama, out / "four")
    case = lambda name, stage=0, **more: {
        **run_arguments(out / name, (stage, "none"), "lora"), **RUN, "resume_from_checkpoint": None, "eval_steps": 8, **more
    }  # fmt: skip
    cases = {
        "0": case("0", save_steps=4),
        "resumed": case("resumed", resume_from_checkpoint=str(out / "0" / "checkpoints" / "step-000004")),
        "1": case("1", 1, gradient_checkpointing=True),
        "2": case("2", 2, optim="adamw_8bit"),
        "bf16": case("bf16", 2, bf16=True),
        "folder": case("folder", load_in_4bit=False, model_name_or_path=str(out / "four")),
        "3": case("3", 3, load_in_4bit=False, model_name_or_path=str(out / "four")),
        "frozen": case("frozen", load_in_4bit=False, use_peft=False, model_name_or_path=str(out / "four")),
    }
    return out, launch(cases)


@pytest.mark.distributed
def test_the_stages_agree_and_a_resumed_run_goes_on_bit_for_bit(outcomes):
    out, found = outcomes
    for name, outcome in found.items():
        assert name in ("3", "frozen") or "error" not in outcome, outcome["traceback"]
    curves = {name: outcome["losses"] for name, outcome in found.items() if "losses" in outcome}
    assert len(curves["0"]) == 8 and curves["0"][-1] < curves["0"][0]
    assert curves["resumed"] == curves["0"][4:] and curves["folder"] == curves["0"]
    assert curves["1"] == pytest.approx(curves["0"], rel=1e-4)
    assert curves["2"] == pytest.approx(curves["0"], rel=1e-2) and curves["bf16"] == pytest.approx(
        curves["0"], rel=3e-2
    )
    files = [(out / name / "adapter_model.safetensors").read_bytes() for name in ("0", "resumed")]
    assert files[0] == files[1]
    shards = list((out / "0" / "checkpoints").rglob("*model_states.pt"))
    assert shards and all(b"absmax" not in shard.read_bytes() for shard in shards)
    assert "do not work with ZeRO-3" in found["3"]["error"] and "say --use_peft true" in found["frozen"]["error"]


@pytest.mark.distributed
def test_the_adapter_of_a_run(outcomes, tmp_path, tiny_llama, capsys):
    """PEFT loads it over the original model; fastft over the 4 bits it was trained with; merge gives that model, whole."""
    out, _ = outcomes
    adapter = out / "0"
    assert AutoPeftModelForCausalLM.from_pretrained(adapter).get_base_model().model.layers[0].mlp.up_proj.r == {
        "default": 4
    }
    model, *_ = load_for_inference(adapter)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer) is Linear4bit
    by_hand = PeftModel.from_pretrained(whole_of_4_bits(tiny_llama), adapter).eval()
    assert (logits(model) - logits(by_hand)).abs().max() < 1e-4
    assert cli.main(["merge", "--model", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    assert "read from 4 bits: 0.0" in capsys.readouterr().out
    assert (logits(whole(tmp_path / "merged")) - logits(model)).abs().max() < 1e-4
    errors = merge(out / "folder", tmp_path / "again")
    assert errors == {"rounding_error": 0.0, "quantization_error": None}
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def whole_of_4_bits(folder):
    model = load(folder)
    dequantize_model(model)
    return model


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"use_peft": False}, "--load_in_4bit true: 4-bit weights are frozen, so it needs --use_peft true"),
        ({"zero_stage": 3}, "does not work with --zero_stage 3"),
        ({"use_dora": True}, "does not work with --use_dora true"),
    ],
)
def test_arguments_that_do_not_go_together(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        Arguments(**{**RUN, **more})


def test_files_that_cannot_be_read(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "four")
    path, config = tmp_path / "four" / "model.safetensors", tmp_path / "four" / "config.json"
    tensors, said, name = load_file(path), json.loads(config.read_text()), "model.layers.1.mlp.down_proj.weight"

    def refused(sentence):
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / "four")

    save_file({**tensors, f"{name}.absmax": tensors[f"{name}.absmax"][:3]}, path, {"format": "pt"})
    refused(f"{name}: NF4: absmax is .3.")
    save_file({key: t for key, t in tensors.items() if not key.startswith(name)}, path, {"format": "pt"})
    refused("down_proj has no weight in its files")
    quant = said["quantization_config"]
    for changes, sentence in (
        ({"bnb_4bit_quant_type": "fp4"}, "quantised as fp4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "nf4 in bfloat16"),
        ({"load_in_4bit": False, "quant_method": "gptq"}, "quantised as gptq"),
    ):
        config.write_text(json.dumps({**said, "quantization_config": {**quant, **changes}}))
        refused(sentence)
    bad = tmp_path / "bad"
    shutil.copytree(tiny_llama, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors[name][3, 4] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: .*holds NaN or infinity"):
        load(bad)
