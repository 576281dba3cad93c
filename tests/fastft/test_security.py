"""Nothing in a checkpoint, model folder, data file or recipe executes, and nothing is written where it was not asked for.

What pickled checkpoints do is in test_checkpoint.py.
"""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastft.arguments import Arguments, parse_arguments
from fastft.durable import write_json
from fastft.models import load_for_inference
from fastft.train import train

ROOT = Path(__file__).parents[2]
MARK = "executed"


class Bomb:
    def __reduce__(self):
        return os.mkdir, (MARK,)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; the folder `executed` must not appear in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / MARK).exists(), "code of the attacker has run"


def copy_without_weights(model, folder):
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def remote_code(folder):
    """Makes a model folder ask for its own code."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({MARK!r})\n")


def test_pickled_weights_are_refused(here, tiny_llama, sums_file):
    folder = copy_without_weights(tiny_llama, here / "model")
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--model_name_or_path .*: cannot be loaded"):
        train(Arguments(model_name_or_path=str(folder), train_file=sums_file, output_dir="out", report_to=["none"]))
    with pytest.raises(ValueError, match="--model .*: its weights are a pickle that would run code"):
        load_for_inference(folder)


def test_a_pickled_adapter_is_refused(here, tiny_llama):
    folder = here / "adapter"
    folder.mkdir()
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": tiny_llama}))
    for file in Path(tiny_llama).glob("tokenizer*"):
        shutil.copy(file, folder)
    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="--model .*: its weights are a pickle that would run code"):
        load_for_inference(folder)


def test_code_of_a_model_runs_only_where_asked(here, tiny_llama, sums_file):
    folder = Path(shutil.copytree(tiny_llama, here / "model"))
    remote_code(folder)
    arguments = {"trust_remote_code": True, "cache_dir": str(here / MARK), "output_dir": str(here / MARK)}
    run = {"arguments": arguments, "model_kwargs": {"trust_remote_code": True, "weights_only": False}}
    write_json(folder / "run.json", run)
    with pytest.raises(ValueError, match="contains custom code"):
        train(Arguments(model_name_or_path=str(folder), train_file=sums_file, output_dir="out", report_to=["none"]))
    with pytest.raises(ValueError, match="custom code|trust_remote_code"):
        load_for_inference(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"arguments": 3}', "[" * 100_000, "\x00", '{"arguments": {"task": 1}}']
)
def test_a_damaged_run_json_is_one_sentence(here, tiny_llama, content):
    folder = Path(shutil.copytree(tiny_llama, here / "model"))
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load_for_inference(folder)
    assert "\n" not in str(error.value)


def test_a_recipe_is_data(here, capsys):
    (here / "recipe.yaml").write_text(f"seed: !!python/object/apply:os.mkdir [{MARK}]\n")
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--config", "recipe.yaml"])
    assert stop.value.code == 2 and "not valid YAML" in capsys.readouterr().err


def test_a_chat_template_is_boxed_in(here, tiny_llama, sums_file):
    folder = Path(shutil.copytree(tiny_llama, here / "model"))
    way_out = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": way_out}))
    with pytest.raises(ValueError, match="the tokenizer's chat template refuses this conversation"):
        train(Arguments(model_name_or_path=str(folder), train_file=sums_file, output_dir="out", report_to=["none"]))


def test_links_in_the_output_folder_lead_nowhere(here, tiny_llama, sums_file):
    """Files that a run writes replace links of their names; what the links point to stays as it is."""
    (here / "mine").write_text("mine")
    (here / "folder").mkdir()
    (here / "folder" / "thesis").write_text("mine")
    out = here / "out"
    out.mkdir()
    names = ("run.json", "metrics.jsonl", "all_results.json", "loss_curve.png", "config.json", "model.safetensors")
    for name in (*names, ".run.json.tmp", ".metrics.jsonl.tmp", ".all_results.json.tmp"):
        (out / name).symlink_to(here / "mine")
    arguments = {
        "model_name_or_path": tiny_llama,
        "train_file": sums_file,
        "output_dir": str(out),
        "report_to": ["none"],
    }
    train(Arguments(**arguments, max_steps=1, save_steps=1, bf16=False, resume_from_checkpoint="auto"))
    assert (here / "mine").read_text() == "mine" and not any((out / name).is_symlink() for name in names)
    (out / ".saving").symlink_to(here / "folder")
    with pytest.raises(OSError, match="was not saved"):
        train(Arguments(**arguments, max_steps=2, bf16=False, resume_from_checkpoint="auto"))
    assert (here / "folder" / "thesis").read_text() == "mine" and len(list((here / "folder").iterdir())) == 1


FORBIDDEN = {
    r"(os\.(system|popen)|eval|exec|__import__)": "runs text as code",
    r"(pickle|cPickle|dill|joblib|marshal|shelve)\.(load|loads|open)": "unpickles",
    r"yaml\.(load|unsafe_load|full_load)": "builds objects from YAML",
}


@pytest.mark.parametrize("path", sorted((ROOT / "fastft").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_that_executes_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        place = f"{path.name}:{node.lineno}: {name}"
        for pattern, what in FORBIDDEN.items():
            assert not re.fullmatch(pattern, name), f"{place} {what}"
        assert options.get("shell", "False") == "False", f"{place} goes through a shell"
        assert options.get("allow_pickle", "False") == "False", f"{place} unpickles"
        if name == "torch.load":
            assert options.get("weights_only") == "True", f"{place} unpickles"
