"""The PTX of the kernels' inline assembly, executed warp by warp in Python, so that Triton's interpreter can run them.

Only the instructions that the kernels use; every register is an array over the 32 threads of a warp. What a GPU alone
can show (races, reads out of bounds, the compiler) stays for the tests on one.
"""

import ctypes
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LANES = 32

# Shared memory of the program that runs; nothing lies at its first bytes.
SHARED = np.zeros(48 << 10, np.uint8)
SHARED_AT = 1024
SHARED_BYTES = [0]  # of what it has declared


@cache
def statements(assembly: str) -> tuple[str, ...]:
    """Scopes' braces, labels and instructions, in their order."""
    found: list[str] = []
    rest = assembly
    while rest := rest.lstrip():
        if rest[0] in "{}":
            found.append(rest[0])
            rest = rest[1:]
        elif label := re.match(r"(\w+):", rest):
            found.append(label[0])
            rest = rest[label.end() :]
        else:
            text, _, rest = rest.partition(";")
            found.append(text.strip())
    return tuple(found)


@cache
def _operands(text: str) -> tuple[str, ...]:
    """Split at commas that are not within braces or brackets."""
    return tuple(part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text) if part.strip())


def _float(bits: Array) -> Array:
    return bits.astype(np.uint32).view(np.float32)


def _bits(values: Array) -> Array:
    return values.astype(np.float32).view(np.uint32)


def _halves(word: Array) -> tuple[Array, Array]:
    both = word.astype(np.uint32).view(np.uint16).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


def _permuted(a: Array, b: Array, selectors: Array) -> Array:
    """prmt.b32: nibble i of the selectors names the byte that goes to byte i, bit 3 replicates its sign."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a, dtype=np.uint32)
    for i in range(4):
        nibble = selectors >> np.uint32(4 * i) & np.uint32(0xF)
        byte = (source >> (8 * (nibble & np.uint32(7))).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        replicated = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), replicated, byte) << np.uint32(8 * i)
    return out


def _pairs_of(words: Sequence[Array]) -> Array:
    """Words of two float16 each: [lane, word, 2] float32."""
    joined = np.stack([word.astype(np.uint32) for word in words], axis=1)
    return joined.view(np.float16).reshape(LANES, len(words), 2).astype(np.float32)


def _multiplied(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """mma.m16n8k16, or m16n8k8, of which less is given (PTX ISA, "Matrix Fragments for mma.m16n8k16")."""
    lane = np.arange(LANES)
    g, t = lane // 4, lane % 4
    first, second = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    total = np.zeros((16, 8), np.float32)
    a_pairs, b_pairs = _pairs_of(a), _pairs_of(b)
    for i in range(len(a)):
        for e in range(2):
            first[g + 8 * (i % 2), 2 * t + e + 8 * (i // 2)] = a_pairs[:, i, e]
    for i in range(len(b)):
        for e in range(2):
            second[2 * t + e + 8 * i, g] = b_pairs[:, i, e]
    for i in range(4):
        total[g + 8 * (i // 2), 2 * t + i % 2] = _float(c[i])
    total += first @ second
    return [_bits(total[g + 8 * (i // 2), 2 * t + i % 2]) for i in range(4)]


class _Copies:
    """Asynchronous copies: done when they begin, or, where IS_LATE, not before something waits for them."""

    IS_LATE = False

    def __init__(self) -> None:
        self.groups: dict[int, list[list[tuple[int, bytes]]]] = {}

    def begin(self, warp: int, at: int, content: bytes) -> None:
        if self.IS_LATE:
            self.groups.setdefault(warp, [[]])[-1].append((at, content))
        else:
            SHARED[at : at + len(content)] = np.frombuffer(content, np.uint8)

    def close(self, warp: int) -> None:
        self.groups.setdefault(warp, [[]]).append([])

    def wait(self, warp: int, pending: int) -> None:
        *closed, still_open = self.groups.setdefault(warp, [[]])
        done = closed[: max(len(closed) - pending, 0)]
        for at, content in (copy for group in done for copy in group):
            SHARED[at : at + len(content)] = np.frombuffer(content, np.uint8)
        self.groups[warp] = [*closed[len(done) :], still_open]


COPIES = _Copies()


class _Warp:
    """Registers of 32 threads, by name and scope."""

    def __init__(self, operands: dict[str, Array], number: int = 0):
        self.frames: list[dict[str, Array]] = [dict(operands)]
        self.number = number

    def read(self, name: str) -> Array:
        for frame in reversed(self.frames):
            if name in frame:
                return frame[name]
        if name == "%laneid":
            return np.arange(LANES, dtype=np.uint32)
        bits = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(LANES, bits & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def word(self, name: str) -> Array:
        return self.read(name).astype(np.uint32)

    def write(self, name: str, value: Array) -> None:
        frame = next((frame for frame in reversed(self.frames) if name in frame), self.frames[0])
        assert frame is not self.frames[0] or name.startswith("$"), f"{name} is not declared"
        frame[name] = value

    def declare(self, text: str) -> None:
        for name in text.split(None, 2)[2].split(","):
            many = re.fullmatch(r"(\w+)<(\d+)>", name.strip())
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            self.frames[-1].update({name: np.zeros(LANES, np.uint32) for name in names})

    def run(self, assembly: str, outputs: int) -> list[Array]:
        lines = statements(assembly)
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if line == "{":
                self.frames.append({})
            elif line == "}":
                self.frames.pop()
            elif line.startswith(".reg"):
                self.declare(line)
            elif line.startswith(".shared"):
                name, size = re.fullmatch(r"\.shared \.align 1024 \.b8 (\w+)\[(\d+)\]", line).groups()
                if self.number == 0:
                    SHARED[:] = 0xFF  # NaN
                    COPIES.groups.clear()
                    SHARED_BYTES[0] = int(size)
                assert int(size) % 1024 == 0
                assert int(size) + SHARED_AT <= len(SHARED)
                self.frames[-1][name] = np.full(LANES, SHARED_AT, np.uint32)
            elif line.startswith("@") and "prefetch" in line:
                pass  # changes nothing
            elif line.startswith("@") and "st.global" in line:
                guard, name, text = line.split(" ", 2)
                self.store(name, _operands(text), self.read(guard[1:]).astype(bool))
            elif line.startswith("@") and "cp.async" in line:
                guard, _, copy = line.partition(" ")
                self.copy(_operands(copy.partition(" ")[2]), self.read(guard[1:]).astype(bool))
            elif line.startswith("@"):
                guard, _, label = line.split()
                taken = self.read(guard.lstrip("@!")).astype(bool)
                taken = ~taken if "!" in guard else taken
                assert taken.all() or not taken.any()  # bra.uni
                if taken.all():
                    at = lines.index(f"{label}:")
            elif not line.endswith(":"):
                name, _, text = line.partition(" ")
                self.step(name, _operands(text))
        return [self.read(f"${i}") for i in range(outputs)]

    def address(self, text: str) -> Array:
        place, _, offset = text.strip("[]").partition(" + ")
        return self.read(place).astype(np.uint64) + np.uint64(int(offset or 0))

    def copy(self, operands: Sequence[str], is_there: Array) -> None:
        """cp.async."""
        to, source, size = operands
        for at, origin in zip(self.address(to)[is_there], self.address(source)[is_there], strict=True):
            assert at % 16 == origin % 16 == 0
            assert SHARED_AT <= at <= SHARED_AT + SHARED_BYTES[0] - int(size)
            COPIES.begin(self.number, int(at), bytes((ctypes.c_uint8 * int(size)).from_address(int(origin))))

    def store(self, name: str, operands: Sequence[str], is_there: Array) -> None:
        """st: a vector of 4 bytes each to shared or global memory."""
        at, source = operands
        words = np.stack([self.word(one) for one in source.strip("{}").split(", ")], axis=1)[is_there]
        addresses = self.address(at)[is_there].astype(np.int64)
        assert not (addresses % words[:1].nbytes).any()
        for address, own in zip(addresses.tolist(), words, strict=True):
            if "shared" in name:
                assert SHARED_AT <= address <= SHARED_AT + SHARED_BYTES[0] - own.nbytes
                SHARED[address : address + own.nbytes] = own.view(np.uint8)
            else:
                ctypes.memmove(address, np.ascontiguousarray(own).tobytes(), own.nbytes)

    def step(self, name: str, operands: Sequence[str]) -> None:
        """One instruction."""
        kind = name.split(".")
        if kind[:3] == ["cp", "async", "commit_group"]:
            return COPIES.close(self.number)
        if kind[:3] == ["cp", "async", "wait_group"]:
            return COPIES.wait(self.number, int(operands[0]))
        if kind[0] == "bar":
            return None  # all threads of a warp go on together
        if kind[0] == "st":
            return self.store(name, operands, np.ones(LANES, bool))
        to, *arguments = operands
        if kind[0] == "mov" and to.startswith("{"):
            low, high = to.strip("{}").split(", ")
            value = self.read(arguments[0])
            if kind[1] == "b32":
                parts = _halves(value)
            else:
                wide = value.astype(np.uint64).view(np.uint32).reshape(-1, 2)
                parts = wide[:, 0].copy(), wide[:, 1].copy()
            self.write(low, parts[0])
            self.write(high, parts[1])
        elif kind[:2] == ["ld", "shared"]:
            addresses = self.address(arguments[0]).astype(np.int64)
            targets = to.strip("{}").split(", ")
            width = 2 if kind[2] == "u16" else 4
            assert not (addresses % (width * len(targets))).any()
            assert (addresses >= SHARED_AT).all()
            assert (addresses + width * len(targets) <= SHARED_AT + SHARED_BYTES[0]).all()
            for i, target in enumerate(targets):
                read = SHARED[addresses[:, None] + (width * i + np.arange(width))]
                self.write(target, read.view(np.uint16 if width == 2 else np.uint32)[:, 0].astype(np.uint32))
        elif kind[0] == "ld":
            addresses = self.address(arguments[0])
            loaded = np.array([list((ctypes.c_uint32 * 4).from_address(int(one))) for one in addresses], np.uint32)
            for i, target in enumerate(to.strip("{}").split(", ")):
                self.write(target, loaded[:, i].copy())
        elif kind[0] == "mma":
            groups = [[self.read(one) for one in group.strip("{}").split(", ")] for group in arguments]
            for target, value in zip(to.strip("{}").split(", "), _multiplied(*groups), strict=True):
                self.write(target, value)
        elif kind[0] == "cvt" and kind[2] == "f16x2":
            high, low = (_float(self.word(one)).astype(np.float16).view(np.uint16) for one in arguments)
            self.write(to, low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16))
        elif kind[0] == "cvt":
            self.write(to, _bits(self.read(arguments[0]).astype(np.uint16).view(np.float16)))
        elif kind[:3] == ["shfl", "sync", "bfly"]:
            self.write(to, self.word(arguments[0])[np.arange(LANES) ^ self.word(arguments[1])])
        elif kind[:3] == ["shfl", "sync", "idx"]:
            self.write(to, self.word(arguments[0])[self.word(arguments[1]) % LANES])
        elif kind[0] == "vote":
            self.write(to, np.full(LANES, self.read(arguments[0]).astype(bool).any()))
        elif kind[:2] == ["setp", "gt"]:
            is_above = _float(self.word(arguments[0])) > _float(self.word(arguments[1]))
            self.write(to, is_above | self.read(arguments[2]).astype(bool) if kind[2] == "or" else is_above)
        elif kind[0] == "setp":
            is_equal = self.word(arguments[0]) == self.word(arguments[1])
            self.write(to, is_equal if kind[1] == "eq" else ~is_equal)
        elif kind[0] == "movmatrix":
            halves = self.word(arguments[0]).view(np.uint16).reshape(8, 8)
            self.write(to, np.ascontiguousarray(halves.T).view(np.uint32).reshape(-1))
        elif kind[0] in ("cos", "sin", "ex2"):
            function = {"cos": np.cos, "sin": np.sin, "ex2": np.exp2}[kind[0]]
            self.write(to, _bits(function(_float(self.word(arguments[0])))))
        elif kind[-1] == "f32" and kind[0] != "mov":
            a, b = (_float(self.word(one)) for one in arguments)
            function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax}[kind[0]]
            self.write(to, _bits(function(a, b)))
        else:
            self.write(to, self.integer(kind, [self.word(one) for one in arguments], arguments))

    def integer(self, kind: list[str], words: list[Array], arguments: Sequence[str]) -> Array:
        """Instructions on 32 bits."""
        a, *more = words
        if kind[0] == "mov":
            return a if kind[1] != "b64" else self.read(arguments[0])
        if kind[0] == "prmt":
            return _permuted(a, *more)
        if kind[0] == "lop3":
            truth = int(arguments[3], 0)  # bit 4 a + 2 b + c
            terms = [
                (a if i & 4 else ~a) & (more[0] if i & 2 else ~more[0]) & (more[1] if i & 1 else ~more[1])
                for i in range(8)
                if truth >> i & 1
            ]
            return np.bitwise_or.reduce(terms)
        b = more[0]
        wide = a.astype(np.uint64) * b.astype(np.uint64) if kind[0] == "mul" else a
        return {
            "shl": lambda: a << b,
            "shr": lambda: a >> b,
            "and": lambda: a & b,
            "add": lambda: a + b,
            "mul": lambda: wide.astype(np.uint32),
        }[kind[0]]()


def executed(assembly: str, operands: dict[str, Array], outputs: int, warp: int = 0) -> list[Array]:
    """Its outputs, $0 and on, for one warp; operands: by name, an array over the 32 threads each."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _Warp(operands, warp).run(assembly, outputs)


class Results:
    """What stands in for the operation that a compiler would build."""

    def __init__(self, values: list[Any]):
        self.values = values

    def get_result(self, i: int) -> Any:
        """Output i."""
        return self.values[i]


def create_inline_asm(
    self: Any, assembly: str, constraints: str, values: Sequence[Any], types: Sequence[Any], is_pure: bool, pack: int
) -> Results:
    """Takes the place of the method of Triton's interpreter that refuses."""
    from triton.runtime.interpreter import TensorHandle

    assert pack == 1
    outputs = constraints.count("=")
    inputs = [np.asarray(value.data) for value in values]
    shape = np.broadcast_shapes(*(one.shape for one in inputs))
    count = int(np.prod(shape))
    assert count % LANES == 0 or count == 1
    flat = [_as_bits(np.broadcast_to(one, shape).reshape(-1)) for one in inputs]
    found: list[list[Array]] = []
    for warp in range(max(count // LANES, 1)):
        own = [np.resize(one[warp * LANES : (warp + 1) * LANES], LANES) for one in flat]
        found.append(executed(assembly, {f"${outputs + i}": one for i, one in enumerate(own)}, outputs, warp))
    results = []
    for i, kind in enumerate(types):
        scalar = getattr(kind, "scalar", kind)
        bits = np.concatenate([one[i] for one in found])[:count]
        if scalar.primitive_bitwidth == 64:
            data = bits.astype(np.uint64).view(np.int64)
        else:
            data = bits.astype(np.uint32).view(np.float32 if scalar.is_floating() else np.int32)
        data = data.reshape(shape)
        results.append(TensorHandle(data, scalar))
    return Results(results)


def _as_bits(values: Array) -> Array:
    """Numbers as the registers that hold them."""
    wide = values.dtype.itemsize == 8
    if values.dtype == bool:
        return values.astype(np.uint32)
    if wide:
        return values.view(np.uint64)
    if values.dtype.itemsize < 4:
        return values.astype(np.int64).astype(np.uint32)
    return values.view(np.uint32)


def emulated(monkeypatch: Any) -> Iterator[None]:
    """Within this, Triton's interpreter runs inline assembly."""
    from triton.language import core
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    # what an operation returns is Triton's tuple, what the interpreter makes of a literal is Python's
    monkeypatch.setattr(core.tuple, "__radd__", lambda own, other: core.tuple([*other, *own.values]), raising=False)
    yield
