"""What a Triton kernel costs on a GPU that is not there: compile it ahead of time and read the machine code.

Needs no GPU and no driver, a second to ten per variant. As a script it reads a JSON list of variants from standard input
(the arguments of `compile_report`, `kernel` as "module:function") and prints the list of reports, or with --ttgir what the
compiler's GPU passes leave of each. It must run in a process without TRITON_INTERPRET.

Reports are kept in tests/kernels/aot/reports/<module>.json, under a hash of the kernel's source, the variant and the
version of Triton: what has not changed is not compiled again. What has is compiled, and the file rewritten, to be committed.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REPORTS = Path(__file__).parent / "kernels" / "aot" / "reports"
CUOBJDUMP = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use: compiling does not check it
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "LDGSTS", "STL", "LDL")


def compile_report(kernel, signature, constants, arch, divisible_by_16=(), **options):
    """Registers, spilled bytes, shared memory and instruction counts of one variant of a @triton.jit function.

    signature: {argument: "*bf16" | "i32" | "fp32" ...}; what it leaves out is a constexpr, given in `constants`.
    divisible_by_16: names of pointers and integers known to be multiples of 16: vector loads and TMA depend on it.
    options: num_warps, num_stages, ...; products and sums are fused unless they say otherwise, as the launchers ask for.
    Counted: HGMMA and UTCHMMA are the tensor cores of Hopper and Blackwell, HMMA the older and slower ones, UTMALDG the
    bulk copy engine, STL and LDL spills.
    """
    compiled = compile_variant(kernel, signature, constants, arch, divisible_by_16, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = disassemble("-res-usage", cubin.name)
        code = disassemble("-sass", cubin.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "warps": compiled.metadata.num_warps,
        **{opcode: len(re.findall(rf"\b{opcode}", code)) for opcode in COUNTED},
    }


def compile_variant(kernel, signature, constants, arch, divisible_by_16=(), **options):
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(fn=kernel, signature=full, constexprs=constants, attrs=attrs)
    options = {"enable_fp_fusion": True} | options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(flag, path):
    return subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout


def kernel_and_rest(variant):
    module, function = variant["kernel"].split(":")
    return getattr(importlib.import_module(module), function), {k: v for k, v in variant.items() if k != "kernel"}


def report(variant):
    kernel, rest = kernel_and_rest(variant)
    return compile_report(kernel, **rest)


def ttgir(variant):
    kernel, rest = kernel_and_rest(variant)
    return compile_variant(kernel, **rest).asm["ttgir"]


def key(variant):
    source = kernel_and_rest(variant)[0].cache_key  # of all functions that it calls, too
    text = json.dumps([triton.__version__, source, variant], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reports(variants):
    """The report of each variant, from the file of its module where it is known."""
    files = {}
    for variant in variants:
        files.setdefault(REPORTS / f"{variant['kernel'].split(':')[0].split('.')[-1]}.json", []).append(variant)
    found = {}
    for path, members in files.items():
        known = json.loads(path.read_text()) if path.exists() else {}
        kept = {key(variant): variant for variant in members}
        for name, variant in kept.items():
            function = variant["kernel"].split(":")[1]
            sizes = {k: v for k, v in variant["constants"].items() if type(v) is int}
            head = {"kernel": function, "arch": variant["arch"], "constants": sizes}
            found[name] = known[name] if name in known else head | report(variant)
        # Of kernels that were not asked about now, what is known stays.
        asked = {entry["kernel"] for entry in (found[name] for name in kept)}
        others = {name: entry for name, entry in known.items() if entry["kernel"] not in asked}
        entries = others | {name: found[name] for name in kept}
        if entries != known and os.access(path.parent, os.W_OK):
            lines = (f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return [found[key(variant)] for variant in variants]


if __name__ == "__main__":
    variants = json.load(sys.stdin)
    json.dump([ttgir(variant) for variant in variants] if "--ttgir" in sys.argv else reports(variants), sys.stdout)
