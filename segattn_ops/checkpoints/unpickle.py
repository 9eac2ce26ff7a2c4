"""Reads the pickles of ``torch.save`` without a call of anything that a file names.

``torch.load(weights_only=True)`` calls a list of functions with the arguments of the file. Some of them take any amount
of memory (``bytearray(2**40)``, codecs applied to their own results, a tensor larger than its storage), and a key of
nested tuples overflows the stack of their hash. Here the pickle's instructions build plain values, and tensors after
their sizes have been compared with the storages'.
"""

import io
import pickletools
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before the zip
_FREE, _MULTIPLE = 128 << 20, 16  # bytes of the objects: a constant, and by the size of the file
_DIMS, _SIZE = 64, 1 << 62
_CHUNK = 16 << 20
_ORDINARY = re.findall(
    r"\w+",
    "float16 float32 float64 bfloat16 uint8 uint16 uint32 uint64 int8 int16 int32 int64 bool complex32 complex64 "
    "complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu",
)
_DTYPES = {f"torch {name}": getattr(torch, name) for name in _ORDINARY if hasattr(torch, name)}
_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
    "torch.storage UntypedStorage": torch.uint8,
}
_OTHER_TENSORS = {
    "torch._utils _rebuild_sparse_tensor": "sparse tensors: save them dense",
    "torch._utils _rebuild_qtensor": "quantized tensors: load the checkpoint of the network before its quantization",
    "torch._utils _rebuild_meta_tensor_no_storage": "tensors on the meta device, which holds no values",
    "torch._utils _rebuild_nested_tensor": "nested tensors, which no state dict of a network has",
}


class Damaged(Exception):
    """Why a file is refused, as the end of a sentence."""


def _broken(text: str) -> Damaged:
    return Damaged(f"cannot be read: it is damaged: {text}")


class Foreign(Exception):
    """The pickle needs a class or function beyond those of tensors; its name."""


class _Opaque:
    """The result of what the caller allowed: not built here, only looked past."""


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numel: int
    data: torch.UntypedStorage


def read_archive(file: IO[bytes], size: int, allowed: Container[str] = ()) -> Any:
    """The object in a zip of ``torch.save``. ``allowed``: names ("module name") that are looked past: the result is
    then not the object, but the file keeps to the limits.

    Raises:
        Damaged, Foreign.
    """
    records = _records(file, size)
    data = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(data) != 1:
        raise Damaged(f"is a zip with {len(data)} entries data.pkl, of which torch.save writes one")
    root = data[0].removesuffix("data.pkl")
    swap = None
    if f"{root}byteorder" in records:
        order = _content(file, size, *records[f"{root}byteorder"])
        if order not in (b"little", b"big"):
            raise Damaged(f"has an unknown byte order ({order[:16]!r})")
        swap = order.decode() != sys.byteorder
    storages: dict[str, torch.UntypedStorage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> _Storage:
        record = records.get(f"{root}data/{key}")
        if record is None or view is not None:
            raise _broken("the data of a tensor are missing")
        nbytes = numel * dtype.itemsize
        if nbytes > record[1]:
            raise _broken(f"{record[1]} bytes for a storage of {numel} elements of {dtype}")
        if key not in storages:
            storages[key] = found = torch.UntypedStorage(record[1])
            file.seek(_start(file, size, *record))
            _fill(file, found)
            if swap:
                found.byteswap(dtype)
        return _Storage(dtype, numel, storages[key])

    stream = io.BytesIO(_content(file, size, *records[data[0]]))
    return _Unpickler(size, storage, allowed).load(stream)


def read_old(file: IO[bytes], size: int, allowed: Container[str] = ()) -> Any:
    """As :func:`read_archive`, for the format of PyTorch before 1.6."""
    storages: dict[str, torch.UntypedStorage] = {}
    views: dict[str, torch.UntypedStorage] = {}
    elements: dict[str, torch.dtype] = {}
    total = 0

    def storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> _Storage:
        nonlocal total
        if key not in storages:
            total += numel * dtype.itemsize
            if total > size:  # before the memory is taken
                raise _broken(f"it is cut off, or one of its storages is larger than the file, which has {size} bytes")
            storages[key], elements[key] = torch.UntypedStorage(numel * dtype.itemsize), dtype
        if numel * dtype.itemsize > storages[key].nbytes():
            raise _broken("one storage has two sizes")
        if view is None:
            return _Storage(dtype, numel, storages[key])
        if not (type(view) is tuple and len(view) == 3 and type(view[0]) is str and _whole(view[1:])):
            raise _broken("a view of a storage is of an unknown kind")
        name, start, count = view
        if (start + count) * dtype.itemsize > storages[key].nbytes():
            raise _broken("a view of a storage is larger than the storage")
        if name not in views:
            views[name] = storages[key][start * dtype.itemsize : (start + count) * dtype.itemsize]
        if count * dtype.itemsize > views[name].nbytes():
            raise _broken("one view of a storage has two sizes")
        return _Storage(dtype, count, views[name])

    file.seek(0)
    bytes_left = Window(file, size)
    unpickler = _Unpickler(size, storage, allowed)
    try:
        start = [unpickler.load(bytes_left), unpickler.load(bytes_left)]
    except Damaged:
        start = []
    if [*map(type, start)] != [int, int] or start != [_MAGIC, _PROTOCOL]:
        raise Damaged("is a pickle that torch.save did not write")
    unpickler.load(bytes_left)  # of the machine that wrote it
    result = unpickler.load(bytes_left)
    keys = unpickler.load(bytes_left)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise _broken("its tensors need other storages than it holds")
    for key in keys:
        count = int.from_bytes(bytes_left.read(8), "little")
        if count * elements[key].itemsize != storages[key].nbytes():
            raise _broken("it is cut off, or a storage has another size than its tensors")
        _fill(file, storages[key])
    return result


def _fill(file: IO[bytes], storage: torch.UntypedStorage) -> None:
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    chunk = bytearray(min(_CHUNK, len(whole)))
    for start in range(0, len(whole), _CHUNK):
        wanted = min(_CHUNK, len(whole) - start)
        part = file.read(wanted)
        if len(part) != wanted:
            raise _broken("it is cut off in the data of a tensor")
        chunk[:wanted] = part
        whole[start : start + wanted] = torch.frombuffer(chunk, dtype=torch.uint8, count=wanted)


def check_archive(infos: list[zipfile.ZipInfo], size: int) -> None:
    """Refuses a zip that holds more than the file's own bytes, or one name twice.

    Raises:
        Damaged.
    """
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise Damaged("is a compressed or encrypted zip, and torch.save writes neither: unpack it, and zip it with -0")
    if sum(info.file_size for info in infos) > size:
        raise _broken(f"the entries of the zip have more bytes than the file, which has {size}")
    if len({info.filename for info in infos}) != len(infos):
        raise _broken("the zip has two entries of one name")


def _records(file: IO[bytes], size: int) -> dict[str, tuple[int, int]]:
    """Names of the entries, and where their headers begin and how many bytes they have."""
    file.seek(0)
    infos = zipfile.ZipFile(file).infolist()
    check_archive(infos, size)
    return {info.filename: (info.header_offset, info.file_size) for info in infos}


def _start(file: IO[bytes], size: int, header: int, length: int) -> int:
    file.seek(min(header, size))  # a seek of 2**63 is an error of its own
    fixed = file.read(30)
    if len(fixed) < 30 or not fixed.startswith(b"PK\3\4"):
        raise _broken("an entry of the zip has no header")
    start = header + 30 + int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")
    if start + length > size:
        raise _broken("an entry of the zip ends after the file")
    return start


def _content(file: IO[bytes], size: int, header: int, length: int) -> bytes:
    file.seek(_start(file, size, header, length))
    return file.read(length)


class Window:
    """A file that reads no more than there is: ``read(1 << 40)`` of a small file takes that memory for a moment."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.file.tell(), 0)
        return self.file.read(left if count < 0 else min(count, left))

    def readline(self, count: int | None = -1) -> bytes:
        return self.file.readline(-1 if count is None else count)

    def tell(self) -> int:
        return self.file.tell()


def _whole(numbers: Any) -> bool:
    return all(type(n) is int and 0 <= n < _SIZE for n in numbers)


class _Unpickler:
    """The instructions of ``torch.save``'s pickles.

    Args:
        size: of the file.
        storage: gives the storage of a dtype, key, number of elements and (in old files) view.
        allowed: names ("module name") that are looked past.
    """

    def __init__(
        self, size: int, storage: Callable[[torch.dtype, str, int, Any], _Storage], allowed: Container[str]
    ) -> None:
        self.left = _FREE + _MULTIPLE * size
        self.storage, self.allowed = storage, allowed

    def load(self, stream: IO[bytes] | Window) -> Any:
        try:
            return self._load(pickletools.genops(cast(IO[bytes], stream)))
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
            raise Damaged(
                "cannot be read: it is damaged or cut off: its pickle has instructions that torch.save does not write"
            ) from (error)

    def _spend(self, count: int) -> None:
        """Counts bytes of objects (about what CPython takes), so that short instructions do not fill the memory."""
        self.left -= count
        if self.left < 0:
            raise _broken("its pickle builds more objects than a state dict of this size has")

    def _load(self, instructions: Iterator[tuple[Any, Any, Any]]) -> Any:
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for instruction, argument, _ in instructions:
            name = instruction.name
            self._spend(48)
            match name:
                case "PROTO":
                    pass
                case "BINPUT" | "LONG_BINPUT":
                    self._spend(0 if argument in memo else 104)
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "BINUNICODE":
                    self._spend(len(argument) * (1 if argument.isascii() else 4) + 32)
                    stack.append(argument)
                case "SHORT_BINSTRING":
                    self._spend(len(argument) * 4 + 32)
                    stack.append(argument.encode("latin-1").decode())
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
                case "MARK":
                    self._spend(64)
                    marked.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, marked.pop()
                    self._spend(8 * len(items))
                    stack.append(tuple(items))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(name[-1])
                    if len(stack) < count:
                        raise IndexError
                    self._spend(32)
                    stack[-count:] = [tuple(stack[-count:])]
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    self._spend(200)
                    stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
                case "APPEND":
                    item = stack.pop()
                    self._append(stack[-1], [item])
                case "APPENDS":
                    items, stack = stack, marked.pop()
                    self._append(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self._set(stack[-1], [key, value])
                case "SETITEMS":
                    items, stack = stack, marked.pop()
                    self._set(stack[-1], items)
                case "GLOBAL":
                    stack.append(self._global(argument))
                case "BINPERSID":
                    stack.append(self._persistent(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments = stack.pop()
                    stack[-1] = self._call(stack[-1], arguments)
                case "BUILD":
                    state = stack.pop()
                    _set_state(stack[-1], state)
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(name)
        raise ValueError("no end")

    def _append(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, _Opaque):
            return
        if type(target) is not list:
            raise TypeError
        self._spend(16 * len(items))
        target += items

    def _set(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, _Opaque):
            return
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise TypeError
        self._spend(104 * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _global(self, name: str) -> Any:
        name = name.replace("__builtin__ ", "builtins ")
        if name in self.allowed:
            return _Opaque()
        if name in _OTHER_TENSORS:
            raise Damaged(f"holds {_OTHER_TENSORS[name]}")
        if name in _STORAGES:
            return _StorageType(_STORAGES[name])
        found = _DTYPES.get(name, _FUNCTIONS.get(name))
        if found is None:
            raise Foreign(name)
        return found

    def _persistent(self, identity: Any) -> Any:
        if type(identity) is tuple and len(identity) in (5, 6):
            kind, of, key, _, numel = identity[:5]
            if kind == "storage" and type(of) is _StorageType and type(key) is str and _whole([numel]):
                self._spend(500)
                return self.storage(of.dtype, key, numel, identity[5] if len(identity) == 6 else None)
        raise TypeError

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, _Opaque):
            return _Opaque()
        if type(arguments) is not tuple or not callable(function) or function not in _CALLED:
            raise TypeError
        cost, growing = _CALLED[function]
        self._spend(cost)
        for argument in arguments if growing else ():
            self._spend(growing * len(argument) if isinstance(argument, (str, bytes, list, tuple, dict)) else 0)
        return function(*arguments)


def _key(key: Any) -> Any:
    """A key of a mapping or a set. The hash of nested tuples overflows the stack; that of huge integers, and of many
    that are equal modulo 2**61 - 1, takes long."""
    if type(key) in (str, bytes, bool, float, type(None), _Opaque) or (type(key) is int and abs(key) < 1 << 60):
        return key
    raise TypeError


def _set_state(target: Any, state: Any) -> None:
    """Of a state dict only the versions of its modules, which load_state_dict reads; not other attributes, which could
    take the place of the dictionary's methods."""
    if isinstance(target, _Opaque):
        return
    if type(target) is not OrderedDict or type(state) not in (dict, OrderedDict):
        raise TypeError
    metadata = state.get("_metadata")
    if type(metadata) in (dict, OrderedDict) and all(type(one) in (dict, OrderedDict) for one in metadata.values()):
        setattr(target, "_metadata", metadata)  # noqa: B010 (OrderedDict declares no such attribute)


# What a pickle calls, in place of the functions of these names.


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    result: OrderedDict[Any, Any] = OrderedDict()
    if type(pairs) not in (list, tuple) or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError
    for key, value in pairs:
        result[_key(key)] = value
    return result


def _counter(counts: Any = None) -> Counter[Any]:
    result: Counter[Any] = Counter()
    if counts is not None and type(counts) is not dict:
        raise TypeError
    for key, value in (counts or {}).items():
        result[_key(key)] = value
    return result


def _set_of(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise TypeError
    return {_key(item) for item in items}


def _bytes_of(text: Any, encoding: Any = "latin-1") -> bytes:
    """How protocol 2 stores bytes. No other codec: they import modules, and grow their input."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise TypeError
    return text.encode("latin-1")


def _bytearray_of(text: Any = b"", encoding: Any = "latin-1") -> bytearray:
    return bytearray(text if type(text) is bytes else _bytes_of(text, encoding))


def _complex_of(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise TypeError
    return complex(real, imaginary)


def _size_of(sizes: Any = ()) -> torch.Size:
    if type(sizes) is not tuple or len(sizes) > _DIMS or not _whole(sizes):
        raise TypeError
    return torch.Size(sizes)


def _device_of(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or not (index is None or (type(index) is int and 0 <= index < 128)):
        raise TypeError
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as error:
        raise TypeError from error


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A view of a storage, with as many elements as the storage at most: an expanded one would grow when it is
    copied."""
    if (
        type(storage) is not _Storage
        or type(size) not in (tuple, torch.Size)
        or type(stride) not in (tuple, torch.Size)
    ):
        raise TypeError
    if len(size) != len(stride) or len(size) > _DIMS or not _whole([offset, *size, *stride]):
        raise _broken(f"a tensor has {len(size)} sizes and {len(stride)} strides, or one out of range")
    if metadata:
        raise Damaged("holds conjugated or negated views of tensors: save tensor.resolve_conj().resolve_neg()")
    dtype = dtype or storage.dtype
    elements = storage.numel * storage.dtype.itemsize // dtype.itemsize
    count, whole, last = 1, 1, offset
    for length, step in zip(size, stride, strict=True):
        count, whole, last = count * length, whole * max(length, 1), last + max(length - 1, 0) * step
    if whole >= _SIZE or last >= _SIZE or (count and last >= elements) or count > elements or offset > elements:
        raise _broken(
            f"a tensor of shape {list(size)[:8]} and strides {list(stride)[:8]} from element {offset} on is "
            f"larger than its storage of {elements} elements"
        )
    result = torch.empty(0, dtype=dtype).set_(storage.data, offset, tuple(size), tuple(stride))
    if requires_grad is True and (dtype.is_floating_point or dtype.is_complex):
        result.requires_grad_()
    return result


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    if type(dtype) is not torch.dtype:
        raise TypeError
    return _tensor(storage, offset, size, stride, grad, hooks, metadata, dtype)


def _parameter(data: Any, requires_grad: Any, _hooks: Any = None, _state: Any = None) -> nn.Parameter:
    if not isinstance(data, Tensor):
        raise TypeError
    differentiable = data.is_floating_point() or data.is_complex()
    return nn.Parameter(data.detach(), requires_grad is True and differentiable)


def _with_attributes(function: Any, _kind: Any, arguments: Any, _state: Any) -> Tensor:
    """A tensor to which attributes were given, which are left out."""
    if function not in (_tensor, _typed_tensor, _parameter) or type(arguments) is not tuple:
        raise TypeError
    result: Tensor = function(*arguments)
    return result


def _no_type() -> None:
    """torch.Tensor and Parameter, as the kind of :func:`_with_attributes`. Not called."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "collections Counter": _counter,
    "builtins set": _set_of,
    "builtins bytearray": _bytearray_of,
    "builtins complex": _complex_of,
    "_codecs encode": _bytes_of,
    "torch Size": _size_of,
    "torch device": _device_of,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _typed_tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._tensor _rebuild_from_type_v2": _with_attributes,
    "torch Tensor": _no_type,
    "torch.nn.parameter Parameter": _no_type,
}
# Bytes of a result, and of each element of the arguments.
_CALLED: dict[Callable[..., Any], tuple[int, int]] = {
    _ordered_dict: (400, 200),
    _counter: (400, 200),
    _set_of: (250, 100),
    _bytearray_of: (64, 2),
    _complex_of: (32, 0),
    _bytes_of: (64, 1),
    _size_of: (64, 8),
    _device_of: (64, 0),
    _tensor: (1000, 0),
    _typed_tensor: (1000, 0),
    _parameter: (1500, 0),
    _with_attributes: (1500, 0),
}
