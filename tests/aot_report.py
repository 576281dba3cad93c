"""What a Triton kernel costs on a GPU that is not there: compile it ahead of time and read the machine code.

Needs no GPU and no driver, about a second per variant. As a script it reads a JSON list of variants from standard input
(the arguments of `compile_report`, `kernel` as "module:function") and prints the list of reports. It must run in a
process without TRITON_INTERPRET.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use: compiling does not check it
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "LDGSTS", "STL", "LDL")


def compile_report(kernel, signature, constants, arch, divisible_by_16=(), **options):
    """Registers, spilled bytes, shared memory and instruction counts of one variant of a @triton.jit function.

    signature: {argument: "*bf16" | "i32" | "fp32" ...}; what it leaves out is a constexpr, given in `constants`.
    divisible_by_16: names of pointers and integers known to be multiples of 16: vector loads and TMA depend on it.
    options: num_warps, num_stages, ...
    Counted: HGMMA and UTCHMMA are the tensor cores of Hopper and Blackwell, HMMA the older and slower ones, UTMALDG the
    bulk copy engine, STL and LDL spills.
    """
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(fn=kernel, signature=full, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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


def disassemble(flag, path):
    return subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout


def report(variant):
    module, function = variant.pop("kernel").split(":")
    return compile_report(getattr(importlib.import_module(module), function), **variant)


if __name__ == "__main__":
    json.dump([report(variant) for variant in json.load(sys.stdin)], sys.stdout)
