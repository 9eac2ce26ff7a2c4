"""Hostile checkpoints and pictures, and a process of its own that opens them: a crash ends that process, not the tests.

``python -m tests.modules.hostile KIND SEED COUNT`` opens COUNT mutations of valid files (all crafted files too for SEED
0) and prints what happened as JSON. The last line before a crash or a hang names the input.
"""

import codecs
import contextlib
import io
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from segattn_ops import checkpoints, nn

CANARY = "hostile-code-ran"
MULTIPLE, CONSTANT = 24, 256 << 20  # of segattn_ops.checkpoints.read, with a safetensors file's header
MESSAGE = 60_000  # characters: six lists of names of 8000 each, and sentences
SECONDS = 30  # for one file
# What a file must not cause while it is read. "import" and "exec" are also those of modules that are first needed then:
# `watched` reads valid and broken files before.
FORBIDDEN = {"import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"} | {
    "ctypes.dlopen", "socket.connect", "marshal.loads", "code.__new__", "function.__new__", "os.remove", "os.rename"
}  # fmt: skip


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.PositionAttention(16).state_dict()


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def old(content: Any) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


def valid() -> dict[str, bytes]:
    """Files of every format that is read, and of every kind of tensor."""
    from safetensors.torch import save

    plain = state()
    wrapped = {
        "state_dict": {f"module.{name}": torch.nn.Parameter(value) for name, value in plain.items()},
        "optimizer": torch.optim.SGD(nn.PositionAttention(16).parameters(), lr=0.1, momentum=0.9).state_dict(),
        "epoch": 3,
        "classes": ["a", "b"],
        "seed": b"\x00\xff",
        "done": {1, 2},
        "size": torch.Size([1, 2]),
        "half": {f"h.{name}": value.bfloat16() for name, value in plain.items()},
        "shared": [plain["key_conv.weight"][:1], plain["key_conv.weight"].to(torch.complex64)],
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
    }
    return {
        "zip": saved(plain),
        "zip of a run": saved(wrapped),
        "old": old(plain),
        "old of a run": old(wrapped),
        "safetensors": save({name: value.contiguous() for name, value in plain.items()}, {"format": "pt"}),
    }


# Pickles by hand.


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def call(name: str, *arguments: bytes) -> bytes:
    """A call of a global ("module name") with arguments."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def whole(body: bytes, key: str = "w") -> bytes:
    """A pickle of {key: body}."""
    return b"\x80\x02}" + text(key) + body + b"s."


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(numel: int, key: str = "0", kind: str = "torch FloatStorage", extra: bytes = b"") -> bytes:
    where = f"c{kind}\n".replace(" ", "\n").encode()
    return b"(" + text("storage") + where + text(key) + text("cpu") + number(numel) + extra + b"tQ"


def tensor(data: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    return call(
        "torch._utils _rebuild_tensor_v2", data, number(offset), numbers(size), numbers(stride), b"\x89",
        call("collections OrderedDict"),
    )  # fmt: skip


def zipped(data: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of two entries of one name
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for name, content in (records or {"data/0": bytes(64)}).items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(data: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    start = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    found = {"0": bytes(64)} if storages is None else storages
    rest = b"".join(struct.pack("<q", len(content) // 4) + content for content in found.values())
    return start + data + pickle.dumps(list(found), 2) + rest


COMMAND = f"touch {CANARY}"
STATEMENT = f"open({CANARY!r}, 'w')"
GADGETS: dict[str, bytes] = {
    **{f"{name} of a command": call(name, text(COMMAND)) for name in (
        "os system", "posix system", "nt system", "os popen", "subprocess getoutput", "subprocess check_output",
        "commands getoutput", "popen2 popen2", "platform popen", "webbrowser open", "pty spawn",
    )},
    **{f"{name} of a statement": call(name, text(STATEMENT)) for name in (
        "builtins eval", "builtins exec", "__builtin__ eval", "__builtin__ execfile", "timeit timeit", "cProfile run",
        "profile run", "pdb run", "trace Trace", "code interact", "doctest debug_script", "bdb Bdb",
        "numpy.testing._private.utils runstring", "torch.fx.graph_module _exec_with_source", "ast literal_eval",
        "torch._dynamo.guards GuardBuilder", "torch.jit.unsupported_tensor_ops execWrapper",
        "torch.utils._config_module load_config", "torch.distributed.rpc _load_return_value",
    )},
    **{f"{name} of a file": call(name, text("/tmp/hostile.py")) for name in (
        "runpy run_path", "torch load", "torch.serialization load", "torch.jit load", "torch.hub load",
        "torch.package PackageImporter", "torch.ops load_library", "ctypes CDLL", "torch._ops load_library",
        "shelve open", "builtins open", "io open", "os remove", "shutil rmtree", "numpy load", "imp load_source",
        "torch.storage _load_from_bytes", "torch.classes load_library", "torch.utils.cpp_extension load",
    )},
    **{f"{name} of a module": call(name, text("antigravity")) for name in (
        "importlib import_module", "builtins __import__", "pydoc locate", "pkgutil resolve_name", "torch._lazy_init",
    ) if " " in name},
    "getattr": call("builtins getattr", b"ctorch\nTensor\n", text("__reduce_ex__")),
    "partial": call("functools partial", b"cos\nsystem\n", text(COMMAND)),
    "methodcaller": call("operator methodcaller", text("system"), text(COMMAND)),
    "attrgetter": call("operator attrgetter", text("system")),
    "_reconstructor": call("copyreg _reconstructor", b"cos\nsystem\n", b"cbuiltins\nobject\n", b"N"),
    "__newobj__": call("copyreg __newobj__", b"cos\nsystem\n"),
    "__setstate__": call("collections OrderedDict") + b"}" + text("items") + b"cos\nsystem\n" + b"sb",
    "attributes of a mapping": call("collections OrderedDict") + b"}" + text("items") + text("x") + b"sb",
    "metadata of another type": call("collections OrderedDict") + b"}" + text("_metadata") + text("x") + b"sb",
    "a state of a tensor": tensor(storage(16), 0, (16,), (1,)) + b"}" + text("data") + text("x") + b"sb",
    "_rebuild_from_type_v2": call(
        "torch._tensor _rebuild_from_type_v2", b"cos\nsystem\n", b"ctorch\nTensor\n", b"(" + text(COMMAND) + b"t", b"}"
    ),
    "_rebuild_from_type_v2 of itself": call(
        "torch._tensor _rebuild_from_type_v2", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nTensor\n", b")",
        b"}",
    ),
    "_rebuild_wrapper_subclass": call(
        "torch._utils _rebuild_wrapper_subclass", b"cos\nsystem\n", b"N", b")", b")", b"K\0", b"N", b"N", b"\x89"
    ),
    "a tensor of a function": call(
        "torch._utils _rebuild_tensor_v2", b"cos\nsystem\n", b"K\0", b")", b")", b"\x89", b"}"
    ),
    "a parameter of a function": call("torch._utils _rebuild_parameter", b"cos\nsystem\n", b"\x89", b"}"),
    "INST": b"(" + text(COMMAND) + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + text(COMMAND) + b"o",
    "NEWOBJ": b"cos\nsystem\n" + text(COMMAND) + b"\x85\x81",
    "NEWOBJ_EX": b"cos\nsystem\n" + text(COMMAND) + b"\x85}\x92",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R",
    "EXT1": b"\x82\x01",
    "a persistent name": text(COMMAND) + b"Q",
    "a persistent line": b"Pos.system\n",
    "a persistent module": b"(" + text("module") + b"cos\nsystem\n" + text("a") + text("b") + b"tQ",
    "a persistent tuple of a function": b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\1tQ",
    "a global with spaces": b"cos system\nos\n)R",
    "a global of a megabyte": b"cos\n" + b"a" * (1 << 20) + b"\n)R",
    "a global with control characters": b"cos\x1b[2J\n\x07sys\x00tem\n)R",
    "torch attributes": b"ctorch\n_inductor\n)R",
    "a codec": call("_codecs encode", text("x"), text("../../x")),
    "a codec that imports": call("_codecs encode", text("x"), text("idna")),
}  # fmt: skip
BIG = 1 << 60
SHAPES: dict[str, bytes] = {
    "a negative offset": tensor(storage(16), -1, (16,), (1,)),
    "a negative size": tensor(storage(16), 0, (-16,), (1,)),
    "a negative stride": tensor(storage(16), 15, (16,), (-1,)),
    "2**60 elements": tensor(storage(16), 0, (BIG,), (1,)),
    "2**60 elements of stride 0": tensor(storage(16), 0, (BIG,), (0,)),
    "a terabyte when copied": tensor(storage(16), 0, (1 << 19, 1 << 19), (0, 0)),
    "a product that overflows": tensor(storage(16), 0, (1 << 32, 1 << 32), (0, 0)),
    "a product that overflows to 16": tensor(storage(16), 0, (1 << 60, 1 << 8, 16), (0, 0, 1)),
    "no elements, and 2**62": tensor(storage(16), 0, (0, 1 << 61, 1 << 61), (1 << 61, 1 << 61, 1)),
    "an extent that overflows": tensor(storage(16), 0, (2, 8), (1 << 63, 1)),
    "sizes of 100 digits": tensor(storage(16), 0, (10**100,), (1,)),
    "one element too many": tensor(storage(16), 1, (16,), (1,)),
    "fewer strides": tensor(storage(16), 0, (4, 4), (4,)),
    "a thousand dimensions": tensor(storage(16), 0, (1,) * 1000, (1,) * 1000),
    "a size that is a string": call(
        "torch._utils _rebuild_tensor_v2", storage(16), b"K\0", text("16"), numbers((1,)), b"\x89", b"}"
    ),
    "a storage of 2**60": tensor(storage(BIG), 0, (16,), (1,)),
    "a storage of 2**70": tensor(storage(1 << 70), 0, (16,), (1,)),
    "a storage of -1": tensor(storage(-1), 0, (16,), (1,)),
    "a storage that is missing": tensor(storage(16, "../../../etc/passwd"), 0, (16,), (1,)),
    "a storage of strings": tensor(storage(16, kind="torch StringStorage"), 0, (16,), (1,)),
    "a quantized storage": tensor(storage(16, kind="torch QInt8Storage"), 0, (16,), (1,)),
    "a view of a storage": tensor(storage(16, extra=b"(" + text("v") + number(BIG) + number(4) + b"t"), 0, (4,), (1,)),
    "a sparse tensor": call("torch._utils _rebuild_sparse_tensor", b"N", b")"),
    "a quantized tensor": call("torch._utils _rebuild_qtensor", storage(16), b"K\0", b")", b")", b")", b"\x89", b"}"),
    "a nested tensor": call("torch._utils _rebuild_nested_tensor", b"N", b"N", b"N", b"N"),
    "a tensor without data": call("torch._utils _rebuild_meta_tensor_no_storage", b"N", numbers((BIG,)), b")", b"\x89"),
    "a tensor of numpy": call("torch._utils _rebuild_device_tensor_from_numpy", b"N", b"N", b"N", b"\x89"),
    "a tensor of 2**40": call("torch FloatTensor", number(1 << 40)),
    "a bytearray of 2**36": call("builtins bytearray", number(1 << 36)),
    "a device of a name": call("torch device", text("cuda:\x1b[31m" + "9" * 5000)),
    "a complex parameter": call("torch._utils _rebuild_parameter", tensor(storage(
        4, kind="torch ComplexFloatStorage"), 0, (4,), (1,)), b"\x88", b"}"),
    "a parameter of integers": call("torch._utils _rebuild_parameter", tensor(storage(
        8, kind="torch LongStorage"), 0, (8,), (1,)), b"\x88", b"}"),
    "a conjugated view": call(
        "torch._utils _rebuild_tensor_v2", storage(4, kind="torch ComplexFloatStorage"), b"K\0", numbers((4,)),
        numbers((1,)), b"\x89", b"}", b"}" + text("conj") + b"\x88s",
    ),
    "4-bit numbers": call(
        "torch._utils _rebuild_tensor_v3", storage(64, kind="torch.storage UntypedStorage"), b"K\0", numbers((64,)),
        numbers((1,)), b"\x89", b"}", b"ctorch\nfloat4_e2m1fn_x2\n",
    ),
}  # fmt: skip
NAMES = [
    "\0", "a\nb", "\x1b[2Jx", "\ud800", "\u202egpj", "x" * (1 << 20), "__class__", "__dict__", "../../x",
    "a." * 240 + "b",
    "query_conv.weight\n", "gamma\r", "module." * 60 + "gamma", "%s%n{0.__class__}", "", ".", "...", "\u0301" * 400,
]  # fmt: skip


def repeated(body: bytes, count: int) -> bytes:
    return b"\x80\x02" + body * count + b"."


def crafted(many: int) -> Iterator[tuple[str, bytes]]:
    """Every hostile file, with what is hostile about it. ``many``: bytes of instructions that build much."""
    for name, body in {**GADGETS, **SHAPES}.items():
        yield f"{name}, zip", zipped(whole(body))
        yield f"{name}, old", legacy(whole(body))
        yield f"{name}, bare", whole(body)
        yield f"{name}, at the top", zipped(b"\x80\x02" + body + b".")
    for count, name in enumerate(NAMES):
        for value in ({name: torch.ones(2)}, {name: {"gamma": torch.zeros(1)}}, {**state(), name: torch.ones(1)}):
            yield f"name {count}", saved(value)
        yield f"name {count}, not of a tensor", saved({name: 1, "epoch": 2})
    yield from bombs(many)
    yield from structures(many)
    yield from archives()
    yield from headers()


def bombs(many: int) -> Iterator[tuple[str, bytes]]:
    """Short instructions that build much."""
    for name, body in {
        "sets": b"\x8f", "dictionaries": b"}", "lists": b"]", "marks": b"(", "tuples in tuples": b"\x85",
        "integers": b"M\0\xff", "pairs": b"NN\x86", "ordered dictionaries": b"ccollections\nOrderedDict\n)R",
        "big integers": b"\x8a\x08" + b"\x7f" * 8, "fractions": b"G" + b"\x01" * 8, "empty strings": b"U\x01a",
    }.items():  # fmt: skip
        data = b"N" * (name == "tuples in tuples") + body * (many // len(body))
        yield f"many {name}, zip", zipped(b"\x80\x02" + data + b".")
        yield f"many {name}, old", legacy(b"\x80\x02" + data + b".")
    memo = b"N" + b"".join(b"r" + struct.pack("<I", index * 4096) for index in range(many // 5))
    yield "far memo indices", zipped(b"\x80\x02" + memo + b".")
    doubled = text("x" * 64)
    for _ in range(40):
        doubled = call("_codecs encode", doubled, text("hex"))
    yield "a codec that doubles, 40 times", zipped(whole(doubled))
    latin = b"U\xff" + b"\xe9" * 255
    yield "a string that doubles in UTF-8", zipped(whole(latin * 99))
    listed = b"](" + b"N" * 10_000 + b"eq\1" + b"".join(call("builtins set", b"h\1") for _ in range(20_000))
    yield "sets of one list, many times", zipped(b"\x80\x02" + listed + b".")
    values = b"(" + b"K\1" * 60 + b"tq\1" + b"h\1" * 200_000
    yield "a tuple, many times", zipped(b"\x80\x02" + values + b".")
    shared = tensor(storage(16), 0, (16,), (1,))
    body = b"".join(text(f"layer{index}.weight") + shared for index in range(6_000))
    yield "thousands of views", zipped(b"\x80\x02}(" + body + b"u.")


def structures(many: int) -> Iterator[tuple[str, bytes]]:
    """Mappings and tuples that are deep or contain themselves."""
    body = b"".join(b"}" + text("a") for _ in range(100_000)) + b"N" + b"s" * 100_000
    yield "dictionaries 100,000 deep", zipped(b"\x80\x02" + body + b".")
    yield "a key of nested tuples", zipped(b"\x80\x02}N" + b"\x85" * many + b"Ns.")
    yield (
        "a member of nested tuples",
        zipped(b"\x80\x02" + call("builtins set", b"](N" + b"\x85" * many + b"e") + b"."),
    )
    yield "nested tuples as a kind of storage", zipped(b"\x80\x02N" + b"\x85" * many + b"Q.")
    for keys in (1, 1000):
        named = b"".join(text(f"k{index}") + b"h\1" for index in range(keys))
        inside = text("gamma") + tensor(storage(1), 0, (1,), (1,))
        yield f"a mapping that contains itself {keys} times", zipped(b"\x80\x02}q\1(" + named + b"u.")
        yield f"and a tensor, {keys}", zipped(b"\x80\x02}q\1(" + named + inside + b"u.")
    long = text("n" * (1 << 20)) + b"q\2"
    shared = b"}q\1(" + b"".join(b"}h\2h\3s" if index else text("a") + b"N" for index in range(1)) + b"u"
    nested = b"".join(text(f"d{index}") + b"}h\2h\1s" for index in range(20_000))
    yield "a long name in many mappings", zipped(b"\x80\x02" + long + b"0" + shared + b"}(" + nested + b"u.")
    yield "a list that contains itself", zipped(whole(b"]q\1h\1a"))
    collide = b"".join(number(index * ((1 << 61) - 1)) + b"N" for index in range(1, 50_000))
    yield "integers of one hash", zipped(b"\x80\x02}(" + collide + b"u.")
    bases = [f"p{index}." for index in range(3_000)]
    for names in (
        [base + name for base in bases for name in ("query_conv.weight", "key_conv.weight", "gamma")],
        [base + "gamma" for base in bases],
        [base + f"layer{index}.0.conv1.weight" for base in bases[:1000] for index in (1, 4)],
        [f"a{index}." * 100 + "gamma" for index in range(500)],
    ):
        value = tensor(storage(1), 0, (1,), (1,))
        yield f"{len(names)} names", zipped(b"\x80\x02}(" + b"".join(text(name) + value for name in names) + b"u.")


def archives() -> Iterator[tuple[str, bytes]]:
    """Zips that lie."""
    data = whole(tensor(storage(16), 0, (16,), (1,)))
    yield "a bomb in the data", zipped(data, {"data/0": bytes(96 << 20)}, zipfile.ZIP_DEFLATED)
    yield "a bomb in the pickle", zipped(b"\x80\x02" + b"N" * (96 << 20), method=zipfile.ZIP_DEFLATED)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compressed by method {method}", zipped(data, method=method)
    good = zipped(data)
    directory = good.rindex(b"PK\1\2")
    for field, length in ((10, 2), (8, 2), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4), (6, 2)):
        for value in (0, 1, 8, (1 << 8 * length) - 1):
            start = directory + field
            yield (
                f"field {field} of the directory is {value}",
                (good[:start] + value.to_bytes(length, "little") + good[start + length :]),
            )
    end = good.rindex(b"PK\5\6")
    for field, length in ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)):
        for value in (0, 1, (1 << 8 * length) - 1):
            start = end + field
            yield (
                f"field {field} of the end is {value}",
                good[:start] + value.to_bytes(length, "little") + good[start + length :],
            )
    twice = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)
        for content in (data, whole(GADGETS["os system of a command"])):
            archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(64))
    yield "two pickles of one name", twice.getvalue()
    yield "two roots", zipped(data, {"data/0": bytes(64), "x/data.pkl": data})
    yield "an entry above", zipped(data, {"../../data/0": bytes(64)})
    yield "a strange byte order", good.replace(b"little", b"\x1b[31m!")
    yield "another byte order", zipped(data).replace(b"little", b"big\0\0\0")
    yield "two archives", good + good
    yield "an archive behind a script", b"#!/bin/sh\n" + good
    yield "a pickle before an archive", whole(GADGETS["os system of a command"]) + good
    yield "no entries", b"PK\x05\x06" + bytes(18)
    yield "a header alone", b"PK\3\4" + bytes(300)
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    count = 100_000
    yield (
        "100,000 entries of no name",
        b"PK\3\4"
        + bytes(26)
        + entry * count
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(entry) * count, 30, 0),
    )


def headers() -> Iterator[tuple[str, bytes]]:
    """safetensors' header."""

    def of(header: bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    def one(**change: Any) -> bytes:
        return json.dumps({"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | change}).encode()

    yield "a good header", of(one())
    for length in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        yield f"a header of {length} bytes", of(one(), length=length)
    for shape in ([BIG], [2**32, 2**32], [2**64], [-1], [1.5], ["16"], [[16]], [0] * 10_000, None, [0, 2**63]):
        yield f"shape {str(shape)[:20]}", of(one(shape=shape))
    for dtype in ("F4", "F8_E4M3", "F8_E8M0", "F6_E2M3", "C64", "BOOL", "STRING", "U16", "", None, 3, "\x1b[2J"):
        yield f"dtype {dtype!r}", of(one(dtype=dtype))
        yield f"dtype {dtype!r} of 64 bytes", of(one(dtype=dtype, shape=[64]))
    for offsets in ([0, 65], [64, 0], [-1, 63], [1, 65], [0, 2**64], [2**63, 2**63 + 64], [0], "x"):
        yield f"offsets {offsets}", of(one(data_offsets=offsets))
    part = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    yield "overlapping tensors", of(json.dumps({"a": part, "b": part}).encode())
    yield "a gap", of(json.dumps({"a": part | {"data_offsets": [64, 128]}}).encode(), bytes(128))
    yield "one name twice", of(b'{"a":' + json.dumps(part).encode() + b',"a":' + json.dumps(part).encode() + b"}")
    yield "deep JSON", of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "a million sizes", of(one(shape=[0] * 500_000, data_offsets=[0, 0]), b"")
    yield (
        "many empty tensors",
        of(
            json.dumps(
                {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
            ).encode(),
            b"",
        ),
    )
    yield "metadata that is no text", of(json.dumps({"__metadata__": {"a": 1}, "w": part}).encode())
    for count, name in enumerate(NAMES):
        yield f"name {count} in safetensors", of(json.dumps({name: part}).encode("utf-8", "surrogatepass"))
    yield "bytes that are no UTF-8", of(b'{"\xff\xfe": 1}')


def mutated(original: bytes, generator: random.Random) -> bytes:
    """One to eight changes of a file: a bit, a byte, a number, a cut, a copy of one part over or into another."""
    data = bytearray(original)
    for _ in range(generator.choice((1, 1, 1, 2, 4, 8))):
        if not data:
            break
        at = generator.randrange(len(data))
        length = generator.choice((1, 2, 4, 8, 30, 46, generator.randrange(1, 600)))
        change = generator.randrange(8)
        if change == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif change == 1:
            data[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, *b"(.}]RQbctusX\x81\x85\x93"))
        elif change == 2:
            number = generator.choice((0, 1, -1, 1 << 31, 1 << 32, 1 << 62, -(1 << 63)))
            data[at : at + 8] = struct.pack("<q", number)[: generator.choice((1, 2, 4, 8))]
        elif change == 3:
            del data[at:]
        elif change == 4:
            del data[at : at + length]
        else:
            start = generator.randrange(len(data))
            data[at : at + (length if change == 5 else 0)] = data[start : start + length]
    return bytes(data)


def mutate_pickle(original: bytes, generator: random.Random) -> bytes:
    """A zip whose pickle alone is changed, so that the change is not stopped at the directory."""
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, mutated(content, generator) if name.endswith("data.pkl") else content)
    return file.getvalue()


def cuts(original: bytes) -> list[int]:
    """Offsets at which a format has a boundary, and those beside them."""
    marks = [0, 1, 2, 4, 8, 9, 30, 46, 255, 256, 257, len(original) // 2, len(original) - 22, len(original) - 1]
    for mark in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\x80\x02", b"q", b"R", b"}", b"."):
        at = original.find(mark)
        while at >= 0 and len(marks) < 400:
            marks += [at, at + 1, at + len(mark)]
            at = original.find(mark, at + 97)
    return sorted({mark for mark in marks if 0 <= mark < len(original)})


def hostile_checkpoints(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    originals = valid()
    if seed == 0:
        yield from crafted(1 << 20 if count >= 5000 else 1 << 16)
        for name, original in originals.items():
            yield from ((f"{name} of {end} bytes", original[:end]) for end in cuts(original)[:: 1 + (count < 5000) * 3])
    generator = random.Random(seed)
    for index in range(count):
        name = generator.choice(list(originals))
        change = mutate_pickle if name.startswith("zip") and generator.random() < 0.6 else mutated
        yield f"{name}, mutation {index} of seed {seed}", change(originals[name], generator)


# Pictures.


def pictures() -> dict[str, bytes]:
    """Files of the formats that people have, in unusual modes too."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 4), np.uint8)
    picture = Image.fromarray(pixels[:, :, :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(np.roll(pixels[:, :, 0], n)) for n in range(4)]
    made: dict[str, bytes] = {}

    def add(name: str, image: Any, kind: str, **options: Any) -> None:
        file = io.BytesIO()
        image.save(file, kind, **options)
        made[name] = file.getvalue()

    add("jpeg", picture, "JPEG", exif=exif)
    add("jpeg cmyk", picture.convert("CMYK"), "JPEG")
    add("png", picture, "PNG")
    add("png opacity", Image.fromarray(pixels), "PNG", compress_level=9)
    add("png 16 bit", Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PNG")
    add("png palette", picture.quantize(16), "PNG")
    add("png animated", frames[0], "PNG", save_all=True, append_images=frames[1:])
    add("gif animated", frames[0], "GIF", save_all=True, append_images=frames[1:])
    add("tiff", picture, "TIFF", compression="tiff_lzw")
    add("tiff float", Image.fromarray(pixels[:, :, 0].astype(np.float32)), "TIFF")
    add("bmp", picture, "BMP")
    add("webp", picture, "WEBP")
    add("ppm", picture, "PPM")
    add("ico", picture.resize((32, 32)), "ICO")
    return made


def png(width: int, height: int, data: bytes = b"", kind: int = 2, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def crafted_pictures() -> Iterator[tuple[str, bytes]]:
    rows = zlib.compress(bytes(12_000 * 12_001), 9)
    yield "a bomb of 144 million pixels", png(12_000, 12_000, rows, kind=0)
    yield "a bomb just below PIL's error", png(13_000, 13_000, zlib.compress(bytes(99)), kind=6)
    text = zlib.compress(bytes(64 << 20), 9)
    block = b"Comment\0\0" + text
    ztxt = struct.pack(">I", len(block)) + b"zTXt" + block + struct.pack(">I", zlib.crc32(b"zTXt" + block))
    yield "a bomb in a comment", png(2, 2, zlib.compress(bytes(14)), extra=ztxt)
    for width, height in ((0, 0), (0, 9), (1 << 31, 1 << 31), ((1 << 31) - 1, 1), (1, (1 << 32) - 1), (65_535, 65_535)):
        yield f"png of {width} x {height}", png(width, height, zlib.compress(b""))
        yield f"ppm of {width} x {height}", b"P6 %d %d 255\n" % (width, height)
        size = struct.pack("<2i", width & 0x7FFFFFFF, -(height & 0x7FFFFFFF))
        yield (
            f"bmp of {width} x {height}",
            b"BM" + struct.pack("<3I", 54, 0, 54) + struct.pack("<I", 40) + size + bytes(28),
        )
        yield f"gif of {width} x {height}", b"GIF89a" + struct.pack("<2H", width & 65535, height & 65535) + bytes(99)
    yield "ppm of a long number", b"P6 " + b"9" * 10_000 + b" 1 255\n"
    yield (
        "postscript",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch " + CANARY.encode() + b") (w) file\n",
    )
    yield "xpm", b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c \x1b[2J",\n"a"};'
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9999999" height="9999999"/>'
    yield "nothing", b""
    yield "a checkpoint", saved(state())


def hostile_pictures(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    originals = pictures()
    if seed == 0:
        yield from crafted_pictures()
        for name, original in originals.items():
            ends = [*range(0, 64, 3), *range(64, len(original), max(len(original) // 40, 1))]
            yield from ((f"{name} of {end} bytes", original[:end]) for end in ends)
    generator = random.Random(seed)
    for index in range(count):
        name = generator.choice(list(originals))
        yield f"{name}, mutation {index} of seed {seed}", mutated(originals[name], generator)


# The process that opens them.


def open_checkpoint(path: Path, index: int) -> str:
    """Reads the file, by its path or as a file object, and loads it."""
    block = nn.PositionAttention(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of NaN in the checkpoint
        checkpoints.load(block, path if index % 2 else io.BytesIO(path.read_bytes()))
        checkpoints.load(block, path, strict=False, inplace_abn=True)
    return "loaded"


def open_picture(path: Path, _index: int) -> str:
    from segattn_ops.visualize.images import as_image

    pixels = as_image(path)
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.min() >= 0 and pixels.max() <= 1
    return "opened"


KINDS: dict[str, tuple[Callable[[int, int], Iterator[tuple[str, bytes]]], Callable[[Path, int], str], str]] = {
    "checkpoints": (hostile_checkpoints, open_checkpoint, ".pth"),
    "pictures": (hostile_pictures, open_picture, ".png"),
}
# Of pictures: the pixels of the largest picture as float32, and their copies (segattn_ops.visualize.overlay).
PICTURE_CONSTANT = 36 * 89_478_485


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_of_status() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def watched(kind: str, seed: int, count: int) -> dict[str, Any]:
    """Opens the files and returns counts, and a remark on each that broke a promise."""
    make, opened, suffix = KINDS[kind]
    faults: list[str] = []
    events: list[str] = []
    watching = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in FORBIDDEN:
            events.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(audit)
    outcomes = {"refused": 0, "opened": 0}
    slowest, largest = (0.0, ""), 0.0
    tried = ran = 0
    limit, constant = (MULTIPLE, CONSTANT) if kind == "checkpoints" else (MULTIPLE, PICTURE_CONSTANT)
    for codec in ("cp437", "unicode_escape", "raw_unicode_escape", "idna"):  # of zipfile, messages and pickletools
        codecs.lookup(codec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"hostile{suffix}"
        for warm in (valid() if kind == "checkpoints" else pictures()).values():
            for content in (warm, warm[: len(warm) // 2], warm[:20]):
                path.write_bytes(content)
                with contextlib.suppress(ValueError):
                    opened(path, 0)
        measurable = reset_peak()
        for index, (name, content) in enumerate(make(seed, count)):
            print(f"{index} {name[:200]!r}", file=sys.stderr, flush=True)
            path.write_bytes(content)
            size = len(content)
            del content
            reset_peak()
            before, begin, message = resident(), time.perf_counter(), None
            watching = True
            try:
                opened(path, index)
                outcomes["opened"] += 1
            except ValueError as error:
                message = str(error)
                outcomes["refused"] += 1
            except BaseException as error:  # any other kind is a fault, PanicException of Rust too
                faults.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                if isinstance(error, KeyboardInterrupt):
                    raise
            watching = False
            tried += 1
            seconds = time.perf_counter() - begin
            slowest = max(slowest, (seconds, name[:200]))
            taken = (peak_of_status() if measurable else peak()) - before
            largest = max(largest, taken / (limit * size + constant))
            if taken > limit * size + constant:
                faults.append(f"{name}: {taken >> 20} MiB for a file of {size} bytes")
            if seconds > SECONDS:
                faults.append(f"{name}: {seconds:.0f} s")
            if events:
                faults.append(f"{name}: {events}")
                ran += 1
                events = []
            if message is not None and (len(message) > MESSAGE or not message.replace("\n", "").isprintable()):
                faults.append(f"{name}: a message of {len(message)} characters, {message[:300]!r}")
            if message is not None and not message.startswith(("checkpoints", "visualize")):
                faults.append(f"{name}: {message[:300]!r}")
            if Path(CANARY).exists():
                faults.append(f"{name}: the canary is there")
                ran += 1
                Path(CANARY).unlink()
    return {"tried": tried, "ran": ran, **outcomes, "faults": faults, "slowest": slowest, "largest share": largest}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(watched(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
