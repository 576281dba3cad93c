"""Role `lora`: PEFT models compute and train as before, and every state that PEFT can put a layer into is respected."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastft
from fastft import ops
from fastft.ops import dispatch
from fastft.patching import lora


@pytest.fixture
def peft_model(tiny):
    """peft_model(family, dtype, **settings of LoraConfig) -> a model in training mode whose adapters are not zero."""

    def build(family="llama", dtype=torch.float32, **settings):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
        model = get_peft_model(tiny(family).to(dtype), LoraConfig(**settings)).train()
        return fill(model)

    return build


def fill(model):
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    return model


def batch():
    ids = torch.randint(5, 99, (3, 11), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "labels": ids}


def step(model):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(ours, plain, relative=1e-5):
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() <= relative * b.norm()


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the ops."""
    counts = dict.fromkeys(("lora_linear", "lora_group", "lora_mlp"), 0)
    for name in counts:

        def counted(op, name, *args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, functools.partial(counted, getattr(ops, name), name))
    return counts


DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@DORA
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "bert"])
def test_same_losses_and_gradients(family, use_dora, peft_model, calls):
    model = peft_model(family, use_dora=use_dora)
    expected = step(model)
    report = fastft.patch(model, verbose=False)
    assert_close(step(model), expected)
    mlps = 2 if family in ("llama", "qwen2", "gemma2") else 0
    assert calls["lora_mlp"] == mlps and calls["lora_group"] == (0 if family == "phi3" else 2)
    assert calls["lora_linear"] + 3 * (mlps + calls["lora_group"]) == report.replaced["lora"]
    fastft.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


@DORA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_peft(dtype, use_dora, peft_model):
    """32 steps: the curve is PEFT's to rounding, every adapter parameter moves and nothing else does, under PEFT's names."""
    curves, names = [], []
    for patched in (False, True):
        model = peft_model(dtype=dtype, use_dora=use_dora)
        if patched:
            fastft.patch(model, verbose=False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        curves.append([])
        for _ in range(32):
            curves[-1].append(step(model)[0].item())
            optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "lora_" in name}
        assert sum("magnitude" in name for name in moved) == 14 * use_dora
        names.append({name: t.shape for name, t in model.state_dict().items()})
    assert names[1] == names[0]
    assert curves[1][-1] < 0.8 * curves[1][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.skipif(dispatch.unavailable("triton") is not None, reason="needs Triton")
def test_training_with_triton_follows_peft(peft_model):
    """Four steps with the role alone, which the interpreter can bear: every adapter parameter moves."""
    curves = []
    for patched in (False, True):
        model = peft_model()
        with fastft.backend("triton" if patched else "auto"):
            if patched:
                fastft.patch(model, roles="lora", verbose=False)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            curves.append([])
            for _ in range(4):
                curves[-1].append(step(model)[0].item())
                optimizer.step()
        assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {
            n for n in before if "lora_" in n
        }
    assert curves[1][-1] < 0.98 * curves[1][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@DORA
def test_training_with_dropout_follows_peft_in_distribution(use_dora, peft_model):
    """Losses of the last of 32 steps over a few seeds: their means differ by no more than their spread allows."""
    ends = {}
    for patched in (False, True):
        ends[patched] = []
        for seed in range(6):
            model = peft_model(lora_dropout=0.3, use_dora=use_dora)
            if patched:
                fastft.patch(model, verbose=False)
            torch.manual_seed(seed)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
            for _ in range(32):
                loss = step(model)[0].item()
                optimizer.step()
            ends[patched].append(loss)
    theirs, ours = (torch.tensor(ends[patched]) for patched in (False, True))
    assert ours.std() > 0 and ours.max() < 4  # the first loss is that of guessing, log(99)
    assert (ours.mean() - theirs.mean()).abs() <= 4 * ((ours.var() + theirs.var()) / len(ours)).sqrt()


@DORA
def test_dropout_in_training_alone(use_dora, peft_model, calls):
    """On the fast path, drawn anew each time, with the mean of the layer's outputs unchanged."""
    model = peft_model(lora_dropout=0.3, use_dora=use_dora)
    model.eval()
    expected = step(model)
    fastft.patch(model, verbose=False)
    assert_close(step(model), expected)
    model.train()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(4, 32)
    first, *others = (layer(x).detach() for _ in range(2000))
    assert not torch.equal(first, others[0]) and calls["lora_linear"] > 2000
    mean, clean = torch.stack(others).mean(0), layer.eval()(x).detach()
    deviation = torch.stack(others).std(0)
    assert ((mean - clean).abs() <= 5 * deviation / len(others) ** 0.5 + 1e-6).all()


@DORA
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(p, use_dora, peft_model):
    model = peft_model(lora_dropout=p, use_dora=use_dora)
    fastft.patch(model, verbose=False)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(8)
        found.append(step(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
SECOND = LoraConfig(r=2, target_modules=TARGETS)
STATES = {
    "two adapters": (lambda m: (m.add_adapter("b", SECOND), m.base_model.set_adapter(["default", "b"])), True),
    "the other adapter": (lambda m: (m.add_adapter("b", SECOND), fill(m), m.set_adapter("b")), False),
    "merged": (lambda m: m.merge_adapter(), True),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), True),
}


@DORA
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("patch_first", [False, True])
def test_states(state, patch_first, use_dora, peft_model, calls):
    change, falls_back = STATES[state]
    plain = peft_model(target_modules=TARGETS, use_dora=use_dora)
    ours = copy.deepcopy(plain)
    if patch_first:
        fastft.patch(ours, verbose=False)
    for model in (plain, ours):
        torch.manual_seed(9)
        change(model)
    report = fastft.patch(ours, verbose=False)
    logits = [model(input_ids=batch()["input_ids"]).logits for model in (plain, ours)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert falls_back == (sum(calls.values()) == 0)
    if not patch_first:
        assert falls_back == bool(report.lora_kept)


KEPT = {
    "ALoraLinearVariant": {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
    "lora_bias": {"lora_bias": True},
    "output embedding": {"target_modules": ["lm_head"]},
    "class Embedding": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_computes_as_peft_does(reason, peft_model, calls):
    model = peft_model(**KEPT[reason])
    expected = step(model)
    with fastft.backend("cpp"), pytest.raises(fastft.BackendError, match=f"layers, first .*{reason}"):
        fastft.patch(model, verbose=False)
    report = fastft.patch(model, verbose=False)
    assert reason in str(report) and all(reason in why for why in report.lora_kept.values()) and report.lora_kept
    assert_close(step(model), expected)
    assert sum(calls.values()) == 0


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_backend_that_was_asked_for_serves_or_names_the_layer(backend, peft_model, calls):
    """Also where PEFT changes an adapter after patching, and where the backend has no kernel at all."""
    if dispatch.unavailable(backend) is not None or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip(str(dispatch.unavailable(backend) or "the model is on the CPU, and Triton's interpreter is off"))
    model = peft_model(dtype=torch.float64)
    with fastft.backend(backend), pytest.raises(fastft.BackendError, match="14 layers, first .*q_proj: .*float64"):
        fastft.patch(model, verbose=False)
    assert "_fastft_patch" not in model.get_base_model().__dict__
    model = peft_model()
    expected = step(model)
    with fastft.backend(backend):
        fastft.patch(model, verbose=False)
        assert_close(step(model), expected)
        assert calls["lora_group"] == calls["lora_mlp"] == calls["lora_linear"] == 2
        with model.disable_adapter():
            model(**batch())  # nothing of LoRA is left to compute
        model.add_adapter("b", SECOND)
        model.base_model.set_adapter(["default", "b"])
        with pytest.raises(
            fastft.BackendError, match="cannot serve model.layers.0.self_attn.q_proj: 2 of its adapters"
        ):
            step(model)
    step(model)


def test_an_mlp_that_somebody_watches_calls_its_layers(peft_model, calls):
    model = peft_model()
    fastft.patch(model, verbose=False)
    seen = []
    model.get_base_model().model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args[2].shape))
    step(model)
    assert seen == [(3, 11, 48)] and calls["lora_mlp"] == 1


def test_q_k_and_v_draw_a_mask_each(peft_model, calls):
    """One op for the three: with the seeds it drew, each layer's output is that of the layer alone."""
    model = peft_model(lora_dropout=0.5)
    fastft.patch(model, verbose=False)
    attention = model.get_base_model().model.layers[0].self_attn
    layers, x = [attention.q_proj, attention.k_proj, attention.v_proj], torch.randn(1, 7, 32)
    seen = []
    for layer in layers:
        layer.forward = lambda x, layer=layer, forward=layer.forward: seen.append(forward(x)) or seen[-1]
    positions = model.get_base_model().model.rotary_emb(x, torch.arange(7)[None])
    torch.manual_seed(3)
    attention(x, position_embeddings=positions, attention_mask=None)
    torch.manual_seed(3)
    seeds = torch.randint(2**63 - 1, (3,)).tolist()
    assert calls["lora_group"] == 1 and len(set(seeds)) == 3
    for y, layer, seed in zip(seen, layers, seeds, strict=True):
        alone = ops.lora_linear(x, *lora._parameters(layer), dropout_p=0.5, seed=seed)
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)
    assert not any("fastft_ready" in layer.__dict__ for layer in layers)


def test_a_projection_that_somebody_watches_is_called_for_its_own(peft_model, calls):
    model = peft_model()
    expected = step(model)
    fastft.patch(model, verbose=False)
    layer = model.get_base_model().model.layers[0].self_attn.k_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    assert_close(step(model), expected)
    assert calls["lora_group"] == 1


@DORA
def test_fp32_adapters_on_a_bf16_model(use_dora, peft_model, calls):
    model = peft_model(dtype=torch.bfloat16, use_dora=use_dora)
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module:
            module.float()
    fastft.patch(model, verbose=False)
    _, *gradients = step(model)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    assert calls["lora_mlp"] == 2


@DORA
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiles_into_one_graph(p, use_dora, peft_model):
    torch.compiler.reset()
    model = peft_model(lora_dropout=p, use_dora=use_dora)
    fastft.patch(model, verbose=False)
    layer = model.get_base_model().model.layers[0]
    run = torch.compile(lambda x: layer.mlp(x) + layer.self_attn.q_proj(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 32, requires_grad=True)
    run(x).sum().backward()
    assert x.grad.isfinite().all() and layer.mlp.down_proj.lora_A["default"].weight.grad.abs().sum() > 0


def test_reasons_of_a_plain_layer(peft_model):
    model = peft_model()
    assert lora.kept(model.get_base_model()) == {} and len(lora.find(model.get_base_model())) == 14
