"""Models whose linear layers are in 4 bits (NF4): quantised while they load, or loaded as bitsandbytes has saved them.

The linear layers of the body become `fastft.nn.Linear4bit`; embeddings, norms, the head and what is tied to one of these
keep their dtype, as transformers does it. A layer is quantised as soon as its weight is read, from the dtype it is stored
in: never are two layers whole, and every run of a model has the same codes whatever it computes in.
"""

import contextlib

import torch
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastft import ops
from fastft.nn import Linear4bit
from fastft.nn.linear4bit import NAMES

METHOD = "fastft_nf4"


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """What config.json says of such a model, in bitsandbytes' words. skip_modules: linear layers that stay whole.

    error: what quantising changed, the norm of the differences over the norm of the weights; None where it is not known.
    """

    def __init__(self, skip_modules=None, **_):
        self.quant_method, self.skip_modules = METHOD, skip_modules
        self.error, self.sums = None, torch.zeros(2, dtype=torch.float64)

    def quantized(self, weight, layer):
        """Counts a weight that `layer` has just quantised."""
        change = ops.dequantize_nf4(layer.quantized, torch.float32).sub_(weight)
        self.sums += torch.stack([change.norm(), weight.norm(dtype=torch.float32)]).double().square().cpu()
        self.error = (self.sums[0] / self.sums[1]).sqrt().item()

    def to_dict(self):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": self.skip_modules,
        }


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """What transformers asks while it loads a model."""

    is_trainable, is_serializable = True, lambda self: True

    def param_needs_quantization(self, model, param_name, **_):
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def _process_model_before_weight_loading(self, model, **_):
        config = self.quantization_config
        if not self.pre_quantized:
            config.skip_modules = sorted(whole_modules(model))
        elif config.skip_modules is None:
            config.skip_modules = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        for name, module in quantizable(model, config.skip_modules):
            layer = Linear4bit(module.in_features, module.out_features, module.bias is not None, device="meta")
            layer._is_hf_initialized = True  # nothing is drawn for it where the files have no weight
            model.set_submodule(name, layer)

    def get_quantize_ops(self):
        return _Quantize(self.quantization_config)

    def get_weight_conversions(self):
        names = ["weight", *(f"weight.{name}" for name in NAMES)]
        return [WeightConverter(names, "weight", [_Load(self)])] if self.pre_quantized else []


class _Quantize(ConversionOps):
    def __init__(self, config):
        self.config = config

    def convert(self, input_dict, model=None, **_):
        done = {}
        for name, value in input_dict.items():
            layer, _ = get_module_from_name(model, name)
            value = value[0] if isinstance(value, list) else value
            with _named(name):
                layer.quantize(value)
            self.config.quantized(value, layer)
            done[name] = layer.weight
        return done


class _Load(ConversionOps):
    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer  # transformers casts nothing that such an operation takes

    def convert(self, input_dict, model=None, full_layer_name=None, **_):
        tensors = {name: t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        layer, name = get_module_from_name(model, full_layer_name)
        is_ours = isinstance(layer, Linear4bit) and name == "weight"
        if not is_ours and len(tensors) == 1:
            return tensors
        with _named(full_layer_name):
            if not is_ours:
                raise ValueError(f"is in 4 bits, which a {type(layer).__name__} is not read from")
            layer.load(tensors.pop("weight"), {name.removeprefix("weight."): t for name, t in tensors.items()})
        return {"weight": layer.weight}


_FAILURES = []  # of the model that loads: transformers logs an error in a conversion, and raises another without its words


@contextlib.contextmanager
def _named(name):
    """A ValueError gets the name of the weight in front, and is kept for `load_in_4bit`."""
    try:
        yield
    except ValueError as error:
        _FAILURES.append(f"{name}: {error}")
        raise ValueError(_FAILURES[-1]) from None


def quantizable(model, skip):
    """[(name, nn.Linear)]: those that `skip`, patterns of names, does not name."""
    return [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(n, skip)]


def whole_modules(model):
    """Names of the linear layers that stay whole: the head's, those tied to another weight, and the last."""
    body = {module for module in model.base_model.modules()} if model.base_model is not model else set(model.modules())
    head = {name for name, module in model.named_modules() if type(module) is nn.Linear and module not in body}
    return head | set(HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules))


def stored_config(name, trust_remote_code=False):
    """The quantization_config of a model's folder, a dict, or None. ValueError where it is not one that is read here."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    kind = said.get("bnb_4bit_quant_type", "fp4") if said.get("load_in_4bit") else said.get("quant_method")
    if kind != "nf4" or said.get("bnb_4bit_quant_storage") not in (None, "uint8"):
        storage = said.get("bnb_4bit_quant_storage", "uint8")
        raise ValueError(
            f"its weights are quantised as {kind} in {storage}; what is read is bitsandbytes' nf4 in uint8"
        )
    return said


def load_in_4bit(auto_model, name, dtype, *, trust_remote_code=False, ignore_mismatched_sizes=False, **config_options):
    """from_pretrained of a model in 4 bits, what stays whole in `dtype`. ValueError where it cannot be."""
    if is_deepspeed_zero3_enabled():
        raise ValueError("4-bit weights do not work with ZeRO-3, which would shard them: use --zero_stage 0, 1 or 2")
    options = {"trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": ignore_mismatched_sizes}
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **config_options)
    stored = stored_config(name, trust_remote_code)
    if stored is None:
        options["quantization_config"] = NF4Config()
    else:
        config.quantization_config = {"quant_method": METHOD, "skip_modules": stored.get("llm_int8_skip_modules")}
    _FAILURES.clear()
    try:
        model = auto_model.from_pretrained(name, config=config, dtype="auto", **options)
    except RuntimeError:
        if not _FAILURES:
            raise
        raise ValueError(_FAILURES[0]) from None
    layers = four_bit_layers(model)
    missing = [name for name, layer in layers.items() if layer._state is None]
    if missing or not layers:
        raise ValueError(
            f"{missing[0]} has no weight in its files" if missing else "no linear layer of it can be in 4 bits"
        )
    conversions = [c for c in model._weight_conversions or [] if not _is_ours(c)]
    model._weight_conversions = conversions or None
    model.is_quantized = False  # to transformers a plain model: what its layers hold is their own affair
    del model.hf_quantizer, model.quantization_method
    return model.to(dtype)


def _is_ours(conversion):
    return any(isinstance(operation, _Load) for operation in getattr(conversion, "operations", []))


def four_bit_layers(model):
    """{name: Linear4bit} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def quantize_model(model):
    """Puts the linear layers of a transformers model in 4 bits, in place, one after the other; returns their number."""
    config = NF4Config(sorted(whole_modules(model)))
    layers = quantizable(model, config.skip_modules)
    for name, module in layers:
        with _named(name):
            layer = Linear4bit.from_linear(module)
        config.quantized(module.weight.detach(), layer)
        model.set_submodule(name, layer)
    model.config.quantization_config = config
    return len(layers)


@torch.no_grad()
def dequantize_model(model, dtype=None):
    """Gives a model its linear layers back, in place, in `dtype` or that which was quantised; returns their number."""
    layers = four_bit_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.dequantize(dtype))
    config = (model.get_base_model() if hasattr(model, "peft_config") else model).config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return len(layers)
