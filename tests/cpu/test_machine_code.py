"""The machine code of the inner loops of the CPU libraries: only loads and multiply-adds, and prefetches not removed.

A test cannot bound seconds, but it can bound instructions. Both faults were in the libraries once: an addition to zero
for every broadcast (a quarter of the rate of AVX2), and prefetches that the compiler had removed.
"""

import re
import shutil
import subprocess

import pytest

import segattn_ops
from segattn_ops import _library

CONFIG = segattn_ops.build_config()["cpu"]
SHAPES = {"avx512_bf16": (8, 3), "avx512": (8, 3), "avx2": (4, 3), "baseline": (4, 2)}  # rows, vectors of tile_gemm.h
BUILT = [name for name in SHAPES if name in (CONFIG["built"] or ())]
pytestmark = [
    pytest.mark.skipif(not CONFIG["native"], reason=f"no native CPU kernels: {CONFIG['why_not']}"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
]


@pytest.fixture(scope="module", params=BUILT)
def disassembled(request) -> tuple[str, str]:
    """An instruction set and the assembly of its library."""
    command = [
        "objdump",
        "--disassemble",
        "--demangle",
        "--no-show-raw-insn",
        str(_library._path(f"_cpu_{request.param}")),
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "file format elf64-x86-64" not in text:
        pytest.skip("reads x86 assembly")
    return request.param, text


def functions(text: str, name: str) -> list[list[tuple[int, str]]]:
    """Address and text of every instruction of the functions whose demangled names match."""
    found = []
    for block in text.split("\n\n"):
        head, _, body = block.strip().partition("\n")
        if re.search(name, head):
            lines = (line.split(":\t", 1) for line in body.splitlines() if ":\t" in line)
            found.append([(int(address, 16), instruction.strip()) for address, instruction in lines])
    return found


def longest_loop(code: list[tuple[int, str]], operation: str) -> list[str]:
    """The loop with the most of `operation`; a loop is the code between a backward jump and its target."""
    loops = []
    for address, instruction in code:
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", instruction)
        if jump and int(jump[1], 16) <= address:
            loop = [text for at, text in code if int(jump[1], 16) <= at <= address]
            if not any(re.match(r"(jmp|ret|call)", text) for text in loop):
                loops.append(loop)
    return max(loops, key=lambda loop: sum(re.match(operation, text) is not None for text in loop))


@pytest.mark.parametrize("element, multiply", [("float", r"vfmadd\w+ps|mulps"), ("double", r"vfmadd\w+pd|mulpd")])
def test_a_step_of_the_micro_kernel(disassembled, element, multiply):
    """One load per vector of B, one broadcast per element of A, one multiply-add (SSE2: two instructions) per sum."""
    name, text = disassembled
    rows, vectors = SHAPES[name]
    (code,) = functions(text, rf"detail::micro_kernel<{element}, {rows}, {vectors}>\(")
    loop = longest_loop(code, multiply)
    products = sum(re.match(multiply, line) is not None for line in loop)
    steps = products // (rows * vectors)  # the compiler may unroll
    assert steps >= 1
    assert products == steps * rows * vectors
    assert not [line for line in loop if re.match(r"v?addss|v?addsd", line)]
    fused = name != "baseline"
    # Without FMA a product is a copy, a multiplication and an addition; a broadcast is a load and a shuffle.
    arithmetic = products if fused else 3 * products
    broadcasts = steps * rows if fused else 2 * steps * rows
    assert len(loop) <= arithmetic + broadcasts + steps * (vectors + 8)


def test_products_in_lanes_fetch_ahead(disassembled):
    """lane_product calls a Prefetch for the next operands and one for the results: two instructions each."""
    _, text = disassembled
    code = functions(text, r"lane_product<float __vector\(\d+\), .*multiply<")
    assert code
    for function in code:
        assert sum(instruction.startswith("prefetch") for _, instruction in function) >= 4
