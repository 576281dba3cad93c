"""`fastft doctor`: what works on this machine, what does not, what is lost by it, and what to do.

Every check imports what it looks at by itself, so that the report is written even where torch is missing.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fastft import __version__
from fastft.launch import has_gpu

MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Finding:
    """One entry of the report. state: "ok"; "note", training runs but something is lost; or "bad", it cannot run."""

    name: str
    state: str
    text: str
    advice: str | None = None

    def __str__(self):
        advice = f"\n{'':<16}-> {self.advice}" if self.advice else ""
        return f"{MARKS[self.state]} {self.name:<10} {self.text}{advice}"


def examine():
    """Prints the report and returns the exit code: 0 when training can run here."""
    states = set()
    for check in CHECKS:
        try:
            found = check()
        except Exception as error:  # whatever is broken belongs into the report
            found = Finding(check.__name__, "bad", f"{type(error).__name__}: {error}")
        states.add(found.state)
        print(found, flush=True)
    if "bad" in states:
        print("\nTraining cannot run here until what is marked BAD is mended.")
        return 1
    print("\nTraining can run here. Try: fastft train")
    return 0


def system():
    machine = f"{platform.system()} {platform.machine()}"
    text = f"fastft {__version__}, Python {platform.python_version()}, {machine}"
    if machine != "Linux x86_64":
        untested = "only Linux x86_64 is tested; elsewhere the plain PyTorch path should work"
        return Finding("system", "note", text, untested)
    return Finding("system", "ok", text)


def packages():
    """What fastft asks for, and what is installed."""
    from packaging.requirements import Requirement

    if _version("fastft") is None:
        return Finding("packages", "note", "not checked, because fastft itself is not installed", "pip install .")
    asked = [Requirement(line) for line in importlib.metadata.requires("fastft")]
    found, wrong = [], []
    for requirement in (r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})):
        version = _version(requirement.name)
        found.append(f"{requirement.name} {version or 'MISSING'}")
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"'{requirement.name}{requirement.specifier}'")
    if wrong:
        return Finding("packages", "bad", ", ".join(found), f"pip install {' '.join(wrong)}")
    return Finding("packages", "ok", ", ".join(found))


def devices():
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
        return Finding("devices", "ok", text)
    text = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if has_gpu():
        return Finding("devices", "note", f"{text}; torch sees no GPU, but there is a driver", _why_no_cuda(torch))
    return Finding("devices", "ok", f"{text}; no GPU")


def precision():
    from fastft.arguments import Arguments
    from fastft.engine import choose_dtype

    default = choose_dtype(Arguments(), _device())
    try:
        choose_dtype(Arguments(fp16=True), _device())
        fp16 = "--fp16 true works too"
    except ValueError:
        fp16 = "--fp16 true is refused"
    return Finding("precision", "ok", f"{str(default).removeprefix('torch.')} by default; {fp16}")


def extension():
    from fastft.ops import dispatch

    reason = dispatch.unavailable("cpp")
    if reason is None:
        return Finding("extension", "ok", f"built; its CPU kernels use {dispatch.instruction_set()}")
    lost = "on CPUs plain PyTorch stands in for its kernels, at a loss of speed"
    return Finding("extension", "note", lost, reason)


def triton():
    from fastft.ops import dispatch

    version, reason = _version("triton"), dispatch.unavailable("triton")
    if reason is None:
        return Finding("triton", "ok", f"{version}; its kernels run on the GPU")
    if _device().type == "cuda":
        return Finding("triton", "note", "on GPUs plain PyTorch stands in for its kernels, at a loss of speed", reason)
    return Finding("triton", "ok", f"{version or 'not installed'}, not needed: {reason}")


def compilers():
    cxx, nvcc = (_first_line(*names) for names in (("c++", "g++", "clang++", "cl"), ("nvcc",)))
    if cxx is None:
        lost = "no C++ compiler: the extension cannot be built"
        return Finding("compilers", "note", lost, "install g++ or clang++, then install fastft again")
    return Finding("compilers", "ok", cxx + (f"; {nvcc}" if nvcc else "; no nvcc, and none is needed"))


def training():
    """One optimizer step through the engine of `fastft train`."""
    import torch
    import torch.distributed as dist

    os.environ.setdefault("DS_ACCELERATOR", _device().type)
    from fastft.arguments import Arguments
    from fastft.engine import backward, build_engine, choose_dtype, deepspeed_config, init_ranks

    ranks, args = init_ranks(), Arguments()
    try:
        dtype = choose_dtype(args, ranks.device)
        model = torch.nn.Linear(8, 8).to(ranks.device, dtype)
        engine, _ = build_engine(model, args, deepspeed_config(args, dtype, ranks.world_size), dtype, total_steps=1)
        before = model.weight.detach().clone()
        backward(engine, engine(torch.ones(1, 8, device=ranks.device, dtype=dtype)).sum())
        engine.step()
        assert not torch.equal(before, model.weight), "the optimizer step changed nothing"
        text = f"a step through DeepSpeed {_version('deepspeed')} on {ranks.device.type} over {dist.get_backend()}"
    finally:
        dist.destroy_process_group()
    return Finding("training", "ok", f"{text}; none of its compiled ops is needed")


CHECKS = (system, packages, devices, precision, extension, triton, compilers, training)


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_no_cuda(torch):
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only: install a build with CUDA"
    return "check that the driver is new enough for this torch, and CUDA_VISIBLE_DEVICES"


def _cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _first_line(*programs):
    """What the first of these programs that is there says of its version, or None."""
    path = next(filter(None, map(shutil.which, programs)), None)
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True)
    lines = [line for line in (answer.stdout or answer.stderr).splitlines() if line.strip()]
    release = next((line for line in lines if "release" in line), None)  # nvcc's first line is its name
    return release or (lines[0] if lines else path)
