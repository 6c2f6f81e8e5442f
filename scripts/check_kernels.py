#!/usr/bin/env python3
"""Compile every kernel for GPUs that need not be there: registers, spills, shared memory, instructions.

    scripts/check_kernels.py                      # all capabilities, typical shapes
    scripts/check_kernels.py --capability 90 89   # some

Exit status 1 if a kernel spills registers in a loop or wants more shared memory than a block can have.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from streamer.ops.lossless import kernel as lossless_kernel
from streamer.ops.lossless.layout import BLOCK, coded_parts
from turboquant.layout import BlockLayout, PackedTokens, SideLayout
from turboquant.ops import devices
from turboquant.ops.append import kernel as append_kernel
from turboquant.ops.attend import BiasTerms, bias_terms, fragments
from turboquant.ops.attend import kernel as attend_kernel
from turboquant.ops.encode import kernel as encode_kernel
from turboquant.ops.unpack import kernel as unpack_kernel

# Shared memory that one block can have (CUDA programming guide, table of compute capabilities), bytes.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled. loop_instructions: of its longest loop; spilled: instructions on local memory in loops.

    has_own_shared: besides what Triton takes, which Triton then does not ask the driver for.
    """

    capability: int
    case: str
    kernel: str
    warps: int
    registers: int
    stack_bytes: int
    spilled: int
    shared_bytes: int
    has_own_shared: bool
    loop_instructions: int


class _NoGPU:
    """Stands in for Triton's driver: says what to compile for, and launches nothing."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled, and for what, by the number of the device
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, case: str, calls: Callable[[], None]) -> Iterator[Compiled]:
    """What the kernels become that `calls` would launch."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, **options: Any) -> Any:
        compiled = run(self, *args, **(options | {"warmup": True}))
        found.append((self.__name__, compiled))
        return compiled

    original = devices.capability, devices.shared_memory
    driver.set_active(_NoGPU(capability))
    JITFunction.run = warm_up
    attend_kernel.capability = lambda device: capability
    # one block can have all but what the system takes
    attend_kernel.shared_memory = lambda device: SHARED_BYTES[capability] + 1024
    try:
        calls()
    finally:
        JITFunction.run = run
        attend_kernel.capability, attend_kernel.shared_memory = original
    for name, compiled in found:
        yield _measure(capability, case, name, compiled)


def _measure(capability: int, case: str, name: str, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(program: str, option: str) -> str:
            done = subprocess.run([_TOOLS / program, option, file.name], capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage"))
        if usage is None:
            raise SystemExit(f"cuobjdump does not tell the registers of {name}")
        code = tool("nvdisasm", "-c")
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
    kinds = [re.sub(r"^@!?U?P\d+\s+", "", text).split()[0].split(".")[0] for text in instructions]
    longest = 0
    in_loops: set[int] = set()
    for i, text in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], i + 1) <= i:
            longest = max(longest, i + 1 - labels[target[1]])
            in_loops.update(range(labels[target[1]], i + 1))
    return Compiled(
        capability,
        case,
        name,
        compiled.metadata.num_warps,
        int(usage[1]),
        int(usage[2]),
        sum(kinds[i] in ("LDL", "STL") for i in in_loops),
        int(usage[3]) + compiled.metadata.shared,
        int(usage[3]) > 0,
        longest,
    )


def _most_shared(row: Compiled) -> int:
    return fragments.SHARED_BYTES if row.has_own_shared else SHARED_BYTES[row.capability]


def attend_calls(bits: int, dim: int, group: int, queries: int, dtype: torch.dtype, *, terms: bool) -> None:
    """Launches of one call of attention."""
    heads = 2
    layout = BlockLayout(heads, SideLayout(bits, dim, dtype, terms), SideLayout(bits, dim, dtype, False))
    tail = torch.zeros(1, heads, 196, dim, dtype=dtype)
    counts = torch.zeros(1, dtype=torch.int32)
    records = torch.zeros(4 * layout.nbytes, dtype=torch.uint8)
    packed = PackedTokens(layout, records, torch.zeros(1, 64, dtype=torch.int64), counts, counts, tail, tail, 4, 128)
    matrix = torch.eye(dim)
    attend_kernel.attend_packed(
        torch.zeros(1, heads * group, queries, dim, dtype=dtype),
        packed,
        matrix,
        matrix,
        _bias(heads, dim) if terms else None,
        scale=dim**-0.5,
        softcap=None,
        sink_logits=None,
        most_blocks=64,
        is_mixed=False,
    )


def append_calls(bits: int, dim: int, dtype: torch.dtype) -> None:
    """Launches of one appended token, of a block that leaves the window, and of unpacking it."""
    heads = 2
    layout = BlockLayout(heads, SideLayout(bits, dim, dtype, True), SideLayout(bits, dim, dtype, False))
    records = torch.zeros(4 * layout.nbytes, dtype=torch.uint8)
    table = torch.zeros(1, 64, dtype=torch.int64)
    tokens = torch.zeros(1, heads, 64, dim, dtype=dtype)
    matrix = torch.eye(dim)
    positions = torch.zeros(1, dtype=torch.int32)
    out = torch.empty_like(tokens), torch.empty_like(tokens)
    append_kernel.rotate(tokens, tokens, matrix, matrix, _bias(heads, dim), positions, out)
    for index in (0, 1):
        encode_kernel.encode_records(tokens, layout, index, records, table)
        unpack_kernel.unpack_records(layout, index, records, table[0, :1], tokens[0])


def lossless_calls() -> None:
    """Launches of decoding coded weights: of a tensor, and of a unit's parts."""
    stored = torch.zeros(coded_parts(BLOCK).escapes, dtype=torch.uint8)
    lossless_kernel.decode(stored, torch.zeros(BLOCK, dtype=torch.int16))
    lossless_kernel.compile_parts(lossless_kernel.parts_table([])[0])


def _bias(heads: int, dim: int) -> BiasTerms:
    return bias_terms(torch.zeros(heads, dim), 1e6 ** -torch.linspace(0, 1, dim // 2), 1.0, False)


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    half, brain = torch.float16, torch.bfloat16
    cases: dict[str, Callable[[], None]] = {
        "3 bits, d 128, group 5, key terms": lambda: attend_calls(3, 128, 5, 1, brain, terms=True),
        "append, 3 bits, d 128": lambda: append_calls(3, 128, brain),
        "coded weights": lossless_calls,
    }
    if not options.quick:
        cases |= {
            "4 bits, d 128, group 5, key terms": lambda: attend_calls(4, 128, 5, 1, brain, terms=True),
            "3 bits, d 128, group 5": lambda: attend_calls(3, 128, 5, 1, brain, terms=False),
            "2 bits, d 64, group 7, key terms": lambda: attend_calls(2, 64, 7, 1, half, terms=True),
            "4 bits, d 256, group 8": lambda: attend_calls(4, 256, 8, 1, brain, terms=False),
            "4 bits, d 256, group 4, key terms": lambda: attend_calls(4, 256, 4, 1, brain, terms=True),
            "3 bits, d 128, group 5, 3 queries, key terms": lambda: attend_calls(3, 128, 5, 3, brain, terms=True),
            "3 bits, d 128, group 5, 64 queries, key terms": lambda: attend_calls(3, 128, 5, 64, brain, terms=True),
            "4 bits, d 128, float32": lambda: attend_calls(4, 128, 5, 1, torch.float32, terms=True),
            "3 bits, d 256, float32": lambda: attend_calls(3, 256, 4, 1, torch.float32, terms=False),
            "3 bits, d 80, group 1": lambda: attend_calls(3, 80, 1, 1, half, terms=False),
            "append, 4 bits, d 256": lambda: append_calls(4, 256, brain),
        }
    rows: list[Compiled] = []
    print(f"{'sm':>3} {'kernel':<16} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7} {'loop':>5}  case")
    for capability in options.capability:
        for case, calls in cases.items():
            for row in compile_all(capability, case, calls):
                rows.append(row)
                print(
                    f"{row.capability:>3} {row.kernel:<16} {row.warps:>5} {row.registers:>5} {row.spilled:>6} "
                    f"{row.shared_bytes:>7} {row.loop_instructions:>5}  {case}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [row for row in rows if row.spilled or row.shared_bytes > _most_shared(row)]
    for row in bad:
        print(f"sm_{row.capability} {row.kernel}, {row.case}: spills or too much shared memory", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
