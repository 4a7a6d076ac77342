"""Gluon on a CPU: the operations that attention_hopper.py uses, tile by tile, with every hazard an error.

Triton's interpreter does not know Gluon. ``load_module(name)`` runs a kernel file once more with these operations in
the place of triton.experimental.gluon, so that its own Python code runs, launcher included. Numbers are rounded as the
hardware's types are. Layouts are ignored but for which thread holds an element: the same layout is the same thread.

What runs asynchronously is late: copies into shared memory arrive when they are waited for (until then the place holds
NaN), products read their operands when they are waited for, and a result that was not waited for cannot be used. Shared
memory remembers of every element who wrote and read it since which barrier, and raises Race where

    a thread reads or overwrites what another wrote, or overwrites what another reads, with no barrier between;
    a product reads what was written without a fence_async_shared and then a barrier;
    anything is written that a copy or a product under way uses, or that one used which was waited for after the last
    barrier: other threads may not have waited yet.

Global memory is checked too: no access outside a tensor, and no element written twice in a launch.
"""

import dataclasses
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = 227 * 1024


class Race(AssertionError):
    """The kernel's result would depend on which thread, copy or product comes first."""


@dataclasses.dataclass(frozen=True)
class DType:
    name: str
    numpy: type  # what holds its values: bf16 and fp16 are kept in float32, already rounded
    of_torch: torch.dtype | None = None
    bytes: int = 4


float32 = DType("fp32", np.float32, torch.float32)
bfloat16 = DType("bf16", np.float32, torch.bfloat16, 2)
float16 = DType("fp16", np.float32, torch.float16, 2)
int32, int64 = DType("i32", np.int32, torch.int32), DType("i64", np.int64, torch.int64, 8)
uint32, uint64 = DType("u32", np.uint32), DType("u64", np.uint64, None, 8)
boolean = DType("i1", np.bool_, torch.bool, 1)
_OF_TORCH = {d.of_torch: d for d in (float32, bfloat16, float16, int32, int64)}
_OF_NUMPY = {np.dtype(d.numpy): d for d in (float32, int32, int64, uint32, uint64, boolean)}


def _convert(values: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype in (bfloat16, float16):
        rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype.of_torch)
        return rounded.float().numpy().reshape(values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype.numpy)


class Tile:
    """A tensor of the kernel, or a number whose width matters. Immutable."""

    def __init__(self, data, dtype: DType | None = None, layout=None):
        self.data = np.asarray(data)
        self.dtype = dtype or _OF_NUMPY[self.data.dtype]
        self.layout = layout

    shape = property(lambda self: list(self.data.shape))

    def to(self, dtype: DType) -> "Tile":
        return Tile(_convert(self.data, dtype), dtype, self.layout)

    def __getitem__(self, key):
        return Tile(self.data[key], self.dtype)

    def _with(self, other, operation, swap=False):
        if isinstance(other, Pointer):
            return NotImplemented
        if self.dtype in (bfloat16, float16) or (isinstance(other, Tile) and other.dtype in (bfloat16, float16)):
            raise TypeError("arithmetic in 16 bits is not what the kernel means: convert to float32 first")
        value = other.data if isinstance(other, Tile) else other
        if isinstance(value, float):
            value = np.float32(value)
        with np.errstate(over="ignore", invalid="ignore"):
            return Tile(operation(value, self.data) if swap else operation(self.data, value), None, self.layout)

    def __bool__(self):
        return bool(self.data)

    def __index__(self):
        return int(self.data)


def _operators():
    names = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
             "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift, "floordiv": np.floor_divide,
             "truediv": np.divide, "mod": np.remainder}  # fmt: skip
    for name, operation in names.items():
        setattr(Tile, f"__{name}__", lambda self, other, f=operation: self._with(other, f))
        setattr(Tile, f"__r{name}__", lambda self, other, f=operation: self._with(other, f, swap=True))
    for name, operation in {"lt": np.less, "gt": np.greater, "ge": np.greater_equal, "ne": np.not_equal}.items():
        setattr(Tile, f"__{name}__", lambda self, other, f=operation: self._with(other, f))


_operators()


class Pointer:
    """Elements of one torch tensor, by their offsets from its first."""

    def __init__(self, tensor: torch.Tensor, offset=0):
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=_OF_TORCH[tensor.dtype])

    def __add__(self, other):
        value = other.data.astype(np.int64) if isinstance(other, Tile) else int(other)
        return Pointer(self.tensor, self.offset + value)

    def inside(self, mask) -> np.ndarray:
        """The offsets, where ``mask`` is set; an access outside the tensor raises."""
        offset = np.asarray(self.offset)
        mask = np.broadcast_to(True if mask is None else mask.data, offset.shape)
        wrong = mask & ((offset < 0) | (offset >= self.tensor.numel()))
        if wrong.any():
            raise IndexError(f"{int(wrong.sum())} accesses outside a tensor of {tuple(self.tensor.shape)}")
        return np.where(mask, offset, 0), mask


# --------------------------------------------------------------------------------------------------------------
# Shared memory and what is under way


@dataclasses.dataclass
class Program:
    """One program: its place in the grid, its barriers so far, what it has under way."""

    ids: tuple[int, ...]
    grid: tuple[int, ...]
    warps: int
    epoch: int = 0  # barriers so far
    shared_bytes: int = 0
    buffers: list = dataclasses.field(default_factory=list)
    copies: list = dataclasses.field(default_factory=list)  # started
    groups: list = dataclasses.field(default_factory=list)  # of copies, committed
    products: list = dataclasses.field(default_factory=list)  # under way, in order


_program: Program | None = None


class Buffer:
    """An allocation; for every element, what was done to it last."""

    def __init__(self, dtype: DType, shape: list[int]):
        poison = np.nan if dtype.numpy is np.float32 else 0x7A7A7A7A
        self.dtype, self.data = dtype, np.full(shape, poison, dtype.numpy)
        self.written = np.full(shape, -2)  # epoch of the last write; -2: never
        self.fenced = np.full(shape, -2)  # epoch of the first fence since, -1: none yet
        self.read = np.full(shape, -2)  # epoch of the last read since, by a thread or, when waited for, a product
        self.writer = np.full(shape, -1)  # numbers of layouts: which thread; -1: no thread in particular
        self.reader = np.full(shape, -1)
        self.busy = np.zeros(shape, np.int32)  # copies and products under way that use it
        self.copied = np.zeros(shape, bool)  # of those, a copy
        _program.buffers.append(self)
        _program.shared_bytes += int(np.prod(shape)) * dtype.bytes
        if _program.shared_bytes > SHARED_BYTES:
            raise MemoryError(f"{_program.shared_bytes} bytes of shared memory")


_STATE = ("data", "written", "fenced", "read", "writer", "reader", "busy", "copied")
_layout_numbers: dict = {}


def _thread(layout) -> int:
    return -1 if layout is None else _layout_numbers.setdefault(repr(layout), len(_layout_numbers))


class Shared:
    """A view of an allocation."""

    def __init__(self, buffer: Buffer, view=None):
        self.buffer, self.dtype = buffer, buffer.dtype
        for name in _STATE:
            setattr(self, name, view[name] if view else getattr(buffer, name))

    shape = property(lambda self: list(self.data.shape))

    def index(self, i) -> "Shared":
        if not 0 <= int(i) < self.data.shape[0]:
            raise IndexError(f"part {int(i)} of {self.data.shape[0]}")
        return Shared(self.buffer, {name: getattr(self, name)[int(i)] for name in _STATE})

    def slice(self, start, length) -> "Shared":
        if start < 0 or start + length > self.data.shape[0]:
            raise IndexError(f"rows {start} to {start + length} of {self.data.shape[0]}")
        return Shared(self.buffer, {name: getattr(self, name)[start : start + length] for name in _STATE})

    def permute(self, order) -> "Shared":
        return Shared(self.buffer, {name: getattr(self, name).transpose(order) for name in _STATE})

    def load(self, layout) -> Tile:
        thread, now = _thread(layout), _program.epoch
        if self.copied.any():
            raise Race("a read of what a copy under way writes")
        others = (self.written == now) & ((self.writer != thread) | (thread < 0))
        if others.any():
            raise Race(f"a read of {int(others.sum())} elements that other threads wrote after the last barrier")
        self.reader[...] = np.where((self.read == now) & (self.reader != thread), -1, thread)
        self.read[...] = now
        return Tile(self.data.copy(), self.dtype, layout)

    def store(self, value: Tile) -> None:
        if not isinstance(value, Tile) or value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"{getattr(value, 'shape', value)} does not fit in {self.dtype.name} {self.shape}")
        thread = _thread(value.layout)
        self.overwrite(thread)
        self.data[...] = value.data
        self.wrote(thread)

    def overwrite(self, thread: int) -> None:
        """Raise where a write now, by ``thread`` (-1: any), could meet a use by something else."""
        now = _program.epoch
        if self.busy.any():
            raise Race("a write to what a copy or a product under way uses")
        reads = (self.read == now) & ((self.reader != thread) | (thread < 0))
        writes = (self.written == now) & ((self.writer != thread) | (thread < 0))
        if reads.any() or writes.any():
            raise Race(f"a write to {int((reads | writes).sum())} elements in use since the last barrier")

    def wrote(self, thread: int) -> None:
        self.written[...], self.fenced[...], self.writer[...] = _program.epoch, -1, thread
        self.read[...], self.reader[...] = -2, -1


class Product:
    """acc + a @ b in float32, made when it is waited for."""

    def __init__(self, a, b, acc: Tile, use_acc: bool):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.result: Tile | None = None
        for operand in self.operands():
            if operand.copied.any():
                raise Race("a product of what a copy under way writes")
            if (operand.written == -2).any():
                raise Race("a product of what was never written")
            if ((operand.fenced < 0) | (operand.fenced == _program.epoch)).any():
                raise Race("a product of what was written without a fence and then a barrier")
            operand.busy += 1

    def operands(self) -> list[Shared]:
        return [x for x in (self.a, self.b) if isinstance(x, Shared)]

    def finish(self) -> None:
        a, b = (torch.from_numpy(np.ascontiguousarray(x.data)) for x in (self.a, self.b))
        product = (a @ b).numpy()
        self.result = Tile(self.acc.data + product if self.use_acc else product, float32, self.acc.layout)
        for operand in self.operands():
            operand.busy -= 1
            operand.read[...], operand.reader[...] = _program.epoch, -1  # by this warp group; others may still wait


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False) -> Product:
    if isinstance(acc, Product):
        raise Race("a sum that was not waited for")
    (m, k), (k2, n) = a.shape, b.shape
    if k != k2 or acc.shape != [m, n] or m % 64 or n % 8 or k % 16:
        raise TypeError(f"a product of {a.shape} and {b.shape} to {acc.shape}")
    if a.dtype != b.dtype or a.dtype not in (bfloat16, float16) or acc.dtype != float32 or not isinstance(b, Shared):
        raise TypeError(f"a product of {a.dtype.name} and {b.dtype.name} to {acc.dtype.name}")
    if isinstance(a, Tile) and not repr(a.layout).startswith("('DotOperandLayout'"):
        raise TypeError(f"a left operand in registers in layout {a.layout}")
    product = Product(a, b, acc, bool(use_acc))
    _program.products.append(product)
    if not is_async:
        warpgroup_mma_wait(0, (product,))
    return product


def warpgroup_mma_wait(num_outstanding=0, deps=()):
    while len(_program.products) > num_outstanding:
        _program.products.pop(0).finish()
    if any(isinstance(d, Product) and d.result is None for d in deps):
        raise Race("the result of a product that was not waited for")
    results = tuple(d.result if isinstance(d, Product) else d for d in deps)
    return results[0] if len(results) == 1 else results


def fence_async_shared() -> None:
    for buffer in _program.buffers:
        buffer.fenced[(buffer.fenced == -1) & ~buffer.copied] = _program.epoch


def barrier() -> None:
    _program.epoch += 1


def async_copy_global_to_shared(tile: Shared, pointer: Pointer, mask=None) -> None:
    tile.overwrite(-1)
    offset, mask = pointer.inside(mask)
    values = pointer.tensor.reshape(-1)[torch.from_numpy(offset)].float().numpy()
    tile.data[...] = np.nan
    tile.busy += 1
    tile.copied[...] = True
    _program.copies.append((tile, np.where(mask, values, 0.0)))


def commit_group() -> None:
    _program.groups.append(_program.copies)
    _program.copies = []


def wait_group(num_outstanding=0) -> None:
    while len(_program.groups) > num_outstanding:
        for tile, values in _program.groups.pop(0):
            tile.data[...] = values
            tile.busy -= 1
            tile.copied[...] = False
            tile.wrote(-1)


# --------------------------------------------------------------------------------------------------------------
# The rest of the language


class Layout:
    """A layout by its arguments; two of equal arguments are one."""

    def __init__(self, *args, **kwargs):
        self.args = (type(self).__name__, args, kwargs)

    def __repr__(self):
        return repr(self.args)


def _layout(name: str) -> type:
    return type(name, (Layout,), {})


def _value(x):
    return x.data if isinstance(x, Tile) else np.float32(x) if isinstance(x, float) else x


def load(pointer: Pointer, mask=None, other=0.0):
    offset, mask = pointer.inside(mask)
    dtype = pointer.dtype.element_ty
    values = pointer.tensor.reshape(-1)[torch.from_numpy(offset)]
    values = (values.float() if dtype.numpy is np.float32 else values).numpy()
    return Tile(np.where(mask, values, dtype.numpy(other)), dtype)


_written: dict[int, np.ndarray] = {}  # by the storage's address, in this launch


def store(pointer: Pointer, value: Tile, mask=None) -> None:
    if value.dtype != pointer.dtype.element_ty or np.shape(pointer.offset) != tuple(value.shape):
        raise TypeError(f"{value.dtype.name} {value.shape} stored to {pointer.dtype.element_ty.name}")
    offset, mask = pointer.inside(mask)
    flat, where = pointer.tensor.view(-1), offset[mask]
    count = _written.setdefault(flat.data_ptr(), np.zeros(flat.numel(), bool))
    if count[where].any() or len(np.unique(where)) != where.size:
        raise Race("an element of global memory is written twice")
    count[where] = True
    flat[torch.from_numpy(where)] = torch.from_numpy(value.data[mask]).to(flat.dtype)


def cast(x, dtype: DType) -> Tile:
    if not isinstance(x, Tile):
        bits = 8 * dtype.bytes
        x = int(x) % 2**bits
        x -= 2**bits if np.issubdtype(dtype.numpy, np.signedinteger) and x >= 2 ** (bits - 1) else 0
        return Tile(np.array(x, dtype.numpy), dtype)
    return x.to(dtype)


def where(condition, a, b):
    if not isinstance(condition, Tile):
        return a if condition else b
    layout = next((x.layout for x in (a, b) if isinstance(x, Tile)), None)
    return Tile(np.where(condition.data, _value(a), _value(b)), None, layout)


def _scalar_or(function, operation):
    return lambda a, b: function(int(a), int(b)) if np.ndim(_value(a)) == 0 else Tile(operation(_value(a), _value(b)))


def _language() -> types.SimpleNamespace:
    def keep_layout(x, layout, assert_trivial=False):
        return Tile(x.data, x.dtype, layout)

    named = {name: _layout(name) for name in (
        "BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout",
        "SharedLinearLayout", "DistributedLinearLayout", "DotOperandLayout",
    )}  # fmt: skip
    return types.SimpleNamespace(
        **named,
        constexpr=Constant,
        float32=float32, int32=int32, int64=int64, uint32=uint32, uint64=uint64,
        arange=lambda start, end, layout=None: Tile(np.arange(start, end, dtype=np.int32), int32, layout),
        zeros=lambda shape, dtype, layout=None: Tile(np.zeros(shape, dtype.numpy), dtype, layout),
        full=lambda shape, value, dtype, layout=None: Tile(np.full(shape, value, dtype.numpy), dtype, layout),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(Buffer(dtype, shape)),
        convert_layout=keep_layout,
        join=lambda a, b: Tile(np.stack([a.data, b.data], -1), a.dtype),
        split=lambda x: tuple(Tile(part, x.dtype) for part in np.moveaxis(x.data, -1, 0)),
        permute=lambda x, order: Tile(x.data.transpose(order), x.dtype),
        reshape=lambda x, shape: Tile(x.data.reshape(shape), x.dtype),
        sum=lambda x, axis: Tile(x.data.sum(axis, dtype=x.dtype.numpy), x.dtype),
        max=lambda x, axis: Tile(x.data.max(axis), x.dtype),
        exp2=lambda x: Tile(_exp2(x.data), float32, x.layout),
        log2=lambda x: Tile(np.log2(x.data), float32, x.layout),
        minimum=_scalar_or(min, np.minimum),
        maximum=_scalar_or(max, np.maximum),
        static_range=range,
        num_warps=lambda: _program.warps,
        program_id=lambda axis: _program.ids[axis],
        num_programs=lambda axis: _program.grid[axis],
        load=load, store=store, cast=cast, where=where, barrier=barrier,
    )  # fmt: skip


def _exp2(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp2(values)


class Constant:
    """gl.constexpr: a number that also has ``.value``; in annotations, nothing."""

    def __new__(cls, value):
        kind = type(value)
        return type(kind.__name__, (kind,), {"value": value})(value)


class Kernel:
    """What @gluon.jit makes of a function: called by other kernels, launched over a grid."""

    def __init__(self, function):
        self.function = function
        self.arg_names = list(function.__code__.co_varnames[: function.__code__.co_argcount])

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __getitem__(self, grid):
        def launch(num_warps, **arguments):
            global _program
            _written.clear()
            arguments = {k: Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            for ids in itertools.product(*map(range, grid)):
                _program = Program(ids, grid, num_warps)
                try:
                    self.function(**arguments)
                    if _program.products or any(_program.groups) or _program.copies:
                        raise Race("a program ends with products or copies under way")
                finally:
                    _program = None

        return launch


def _jit(function=None, **options):
    return Kernel(function) if function is not None else Kernel


def load_module(name: str, edit=lambda source: source) -> types.ModuleType:
    """kernels/<name>.py, its text as ``edit`` gives it, run by this emulation as a module of its own."""
    language = _language()
    async_copy = types.SimpleNamespace(
        async_copy_global_to_shared=async_copy_global_to_shared, commit_group=commit_group, wait_group=wait_group
    )
    hopper = types.SimpleNamespace(
        async_copy=async_copy, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
        fence_async_shared=fence_async_shared,
    )  # fmt: skip
    gluon = types.SimpleNamespace(jit=_jit, constexpr_function=lambda function: function, language=language)
    base = "triton.experimental"
    replaced = {
        base: types.SimpleNamespace(gluon=gluon),
        f"{base}.gluon": gluon,
        f"{base}.gluon.language": language,
        f"{base}.gluon.language.nvidia": types.SimpleNamespace(hopper=hopper),
        f"{base}.gluon.language.nvidia.hopper": hopper,
    }
    before = {key: sys.modules.get(key) for key in replaced}
    path = ROOT / "kernels" / "experiments" / f"{name}.py"
    module = types.ModuleType(f"bert_fast.kernels.experiments.{name}_emulated")
    module.__package__ = "bert_fast.kernels.experiments"
    try:
        sys.modules.update(replaced)
        exec(compile(edit(path.read_text(encoding="utf-8")), str(path), "exec"), module.__dict__)
    finally:
        for key, original in before.items():
            if original is None:
                del sys.modules[key]
            else:
                sys.modules[key] = original
    return module
