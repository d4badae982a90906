"""Run the Gluon kernel in Python, with NumPy tensors and a thread each for the producer and the consumers.

Triton's interpreter does not support Gluon. Each function of a kernel gets a stand-in for `gl`, whose operations
compute at once. Copies and products are delayed at random: a copy happens some time after it was requested, a product
reads its factors when it is waited for, and chance decides which thread runs next.
"""

from __future__ import annotations

import random
import threading
import types
from typing import Any

import numpy as np
import torch

from int8compile.triton_kernels.launch import DESCRIPTORS, Launch


class Type:
    """An element type."""

    def __init__(self, name: str) -> None:
        self.numpy = np.dtype(name)
        self.primitive_bitwidth = 8 * self.numpy.itemsize


class Value:
    """A tensor; a number is a tensor without dimensions."""

    type = types.SimpleNamespace(layout=None)

    def __init__(self, array: Any) -> None:
        self.array = np.asarray(array)
        self.shape = list(self.array.shape)

    def to(self, dtype: Type, bitcast: bool = False) -> Value:
        return Value(self.array.view(dtype.numpy) if bitcast else self.array.astype(dtype.numpy))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.array.reshape([int(size) for size in shape]))

    def permute(self, order: list[int]) -> Value:
        return Value(self.array.transpose(order))

    def split(self) -> tuple[Value, Value]:
        return Value(self.array[..., 0]), Value(self.array[..., 1])

    def __getitem__(self, key: Any) -> Value:
        return Value(self.array[key])

    def __index__(self) -> int:
        return int(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)


def _operator(name: str) -> Any:
    def operate(self: Value, *others: Any) -> Any:
        if any(isinstance(other, Pointer) for other in others):
            return NotImplemented
        others = tuple(other.array if isinstance(other, Value) else other for other in others)
        with np.errstate(over="ignore"):
            return Value(getattr(self.array[()], name)(*others))

    return operate


for _name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"]:
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Value, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ["lt", "le", "gt", "ge", "eq", "ne", "neg"]:
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Addresses in a tensor's memory."""

    def __init__(self, memory: Any, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        names = {np.dtype(np.float32): "float32", np.dtype(np.int8): "int8", np.dtype(np.int32): "int32"}
        self.dtype = types.SimpleNamespace(element_ty=Type(names[memory.dtype]))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at + (other.array.astype(np.int64) if isinstance(other, Value) else other))

    def places(self, mask: Any) -> tuple[Any, Any]:
        at, inside = np.broadcast_arrays(self.at, True if mask is None else mask.array)
        assert ((at >= 0) & (at < self.memory.size))[inside].all(), "outside of the tensor"
        return at, inside


class Barrier:
    """A barrier in shared memory that takes one arrival and the announced bytes in each phase."""

    def __init__(self) -> None:
        self.phases = 0  # complete phases
        self.missing, self.bytes = 1, 0

    def arrive(self, announced: int = 0) -> None:
        assert self.missing == 1, "a second arrival in one phase"
        self.missing = 0
        self.copied(-announced)

    def copied(self, count: int) -> None:
        self.bytes -= count
        if self.missing == 0 and self.bytes == 0:
            self.phases += 1
            self.missing = 1

    def passes(self, parity: int) -> bool:
        """Return whether the phase with this parity is complete, as far as one bit can tell."""
        return self.phases & 1 != parity


class Memory:
    """Shared memory, or a part of it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def index(self, i: Any) -> Any:
        part = self.array[int(i)]
        return part if isinstance(part, Barrier) else Memory(part)

    def permute(self, order: list[int]) -> Memory:
        return Memory(self.array.transpose(order))

    def store(self, value: Value) -> None:
        self.array[...] = value.array


class Sums:
    """An accumulator whose products have not all been added yet."""

    def __init__(self, value: Value, products: list[tuple[Memory, Memory, Any, Any]]) -> None:
        self.value, self.products = value, products


class Program:
    """A program of a kernel: the stand-in for `gl` and the modules beside it."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], seed: int) -> None:
        self.place, self.grid, self.random = place, grid, random.Random(seed)
        self.copies: list[Any] = []
        self.turns: dict[int, threading.Semaphore] = {}
        self.errors: list[BaseException] = []

    # Chooses the thread that runs next.

    def warp_specialize(self, parts: Any, warps: Any, registers: Any) -> None:
        done = threading.Semaphore(0)

        def work(function: Any, arguments: Any) -> None:
            me = threading.get_ident()
            self.turns[me].acquire()
            try:
                if not self.errors:
                    function(*arguments)
            except BaseException as error:
                self.errors.append(error)
            del self.turns[me]
            if self.turns:
                next(iter(self.turns.values())).release()
            done.release()

        started = threading.Barrier(len(parts) + 1)

        def begin(function: Any, arguments: Any) -> None:
            self.turns[threading.get_ident()] = threading.Semaphore(0)
            started.wait()
            work(function, arguments)

        for function, arguments in parts:
            threading.Thread(target=begin, args=(function, arguments), daemon=True).start()
        started.wait()
        next(iter(self.turns.values())).release()
        for _ in parts:
            assert done.acquire(timeout=60)
        if self.errors:
            raise self.errors[0]
        assert not self.copies

    def turn(self) -> None:
        """Let the copy engine and the other thread run, or not."""
        while self.copies and self.random.random() < 0.5:
            self.copies.pop(self.random.randrange(len(self.copies)))()
        mine, other = threading.get_ident(), self.random.choice(list(self.turns))
        if other != mine:
            self.turns[other].release()
            self.turns[mine].acquire()
        if self.errors:
            raise self.errors[0]

    # Barriers, copies and products.

    def init(self, barrier: Barrier, count: int) -> None:
        assert count == 1

    def wait(self, barrier: Barrier, phase: Any) -> None:
        for _ in range(3000):
            self.turn()
            if barrier.passes(int(phase)):
                return
        raise AssertionError("everybody waits")

    def expect(self, barrier: Barrier, count: int) -> None:
        self.turn()
        barrier.arrive(int(count))

    def arrive(self, barrier: Barrier, count: int) -> None:
        self.turn()
        barrier.arrive()

    def copy(self, matrix: Any, corner: list[Any], barrier: Barrier, to: Memory) -> None:
        self.turn()
        to.array[...] = 77  # Half of the bytes have been copied.
        row, column = (int(each) for each in corner)
        block = np.zeros_like(to.array)
        inside = matrix[row : row + block.shape[0], column : column + block.shape[1]]
        block[: inside.shape[0], : inside.shape[1]] = inside

        def make() -> None:
            to.array[...] = block
            barrier.copied(block.size)

        self.copies.append(make)

    def product(self, x: Memory, w: Memory, acc: Any, is_async: bool) -> Sums:
        self.turn()
        before = acc if isinstance(acc, Sums) else Sums(acc, [])
        return Sums(before.value, [*before.products, (x, w, x.array.copy(), w.array.copy())])

    def product_wait(self, left: int, deps: list[Any]) -> Any:
        self.turn()
        (sums,) = deps
        total, products = sums.value.array, list(sums.products)
        while len(products) > left:
            x, w, x_then, w_then = products.pop(0)
            assert (x.array == x_then).all(), "overwritten while it is read"
            assert (w.array == w_then).all(), "overwritten while it is read"
            # float64 holds the sums exactly and is the fastest way to compute them.
            total = total + (x_then.astype(np.float64) @ w_then.astype(np.float64)).astype(np.int64).astype(np.int32)
        return Sums(Value(total), products) if left else Value(total)

    # The rest of `gl`.

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0, **how: Any) -> Value:
        at, inside = pointer.places(mask)
        found = np.full(at.shape, other, pointer.memory.dtype)
        found[inside] = pointer.memory[at[inside]]
        return Value(found)

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        at, inside = pointer.places(mask)
        values = np.broadcast_to(value.array if isinstance(value, Value) else value, at.shape)
        pointer.memory[at[inside]] = values[inside]

    def atomic_add(self, pointer: Pointer, value: int, **how: Any) -> Value:
        before = self.load(pointer)
        self.store(pointer, before + value)
        return before

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Memory:
        if len(shape) == 2:
            return Memory([Barrier() for _ in range(shape[0])])
        return Memory(np.full(shape, 55, np.int8))

    def language(self) -> types.SimpleNamespace:
        """Return the names in `gl` and `tl` with their stand-ins."""

        def of(function: Any) -> Any:
            # Python's numbers stand for int32.
            return lambda *given: Value(
                function(*(each.array if isinstance(each, Value) else np.int32(each) for each in given))
            )

        nothing = {
            name: lambda *given: None
            for name in ("NVMMADistributedLayout", "DistributedLinearLayout", "BlockedLayout", "SliceLayout")
        }
        return types.SimpleNamespace(
            **nothing,
            **{name: Type(name) for name in ("int8", "int32", "int64", "uint32", "float32")},
            arange=lambda begin, end, layout=None: Value(np.arange(begin, end, dtype=np.int32)),
            zeros=lambda shape, dtype, layout: Value(np.zeros(shape, dtype.numpy)),
            zeros_like=of(np.zeros_like),
            where=of(_where),
            minimum=of(np.minimum),
            maximum=of(np.maximum),
            min=lambda value, axis: Value(value.array.min()),
            reduce_or=lambda value, axis: Value(np.bitwise_or.reduce(value.array)),
            cdiv=lambda a, b: (a + (b - 1)) // b,
            sigmoid=of(_sigmoid),
            program_id=lambda axis: Value(np.int32(self.place[axis])),
            num_programs=lambda axis: Value(np.int32(self.grid[axis])),
            num_warps=lambda: 8,
            static_range=range,
            static_assert=lambda told: None,
            convert_layout=lambda value, layout: value,
            debug_barrier=lambda: None,
            inline_asm_elementwise=lambda text, *about, **how: {"shl.b32 $0, $1, 8;": about[1][0] << 8}[text],
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            load=self.load,
            store=self.store,
            atomic_add=self.atomic_add,
            constexpr=None,
        )

    def function(self, of: Any, made: dict[int, Any]) -> Any:
        """Return a function of the kernel, and the functions it calls, bound to this program's operations."""
        if id(of) in made:
            return made[id(of)]
        names = of.fn.__globals__
        language = self.language()
        inside = {
            "gl": language,
            "tl": language,
            "mbarrier": types.SimpleNamespace(
                init=self.init, wait=self.wait, expect=self.expect, arrive=self.arrive, MBarrierLayout=lambda: None
            ),
            "_copy": self.copy,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
            "fence_async_shared": lambda: None,
        }
        made[id(of)] = types.FunctionType(of.fn.__code__, inside)
        for name in of.fn.__code__.co_names:
            value = names.get(name)
            if name in inside or value is None:
                continue
            inside[name] = self.function(value, made) if hasattr(value, "fn") else getattr(value, "value", value)
        return made[id(of)]


def _sigmoid(y: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-y))


def _where(condition: Any, a: Any, b: Any) -> Any:
    # A number takes the type of the other operand.
    dtype = next((each.dtype for each in (a, b) if isinstance(each, np.ndarray)), np.dtype(np.int32))
    return np.where(condition, np.asarray(a, dtype), np.asarray(b, dtype))


def run(launch: Launch, seed: int) -> None:
    """Run all programs of a kernel, in any order."""
    grid = (*launch.grid, 1)[:2]
    places = [(x, y) for x in range(grid[0]) for y in range(grid[1])]
    random.Random(seed).shuffle(places)
    for number, place in enumerate(places):
        program = Program(place, grid, 1000 * seed + number)
        kernel = program.function(launch.kernel, {})
        kernel(**{name: _argument(value) for name, value in launch.args.items()}, **launch.constants)


def _argument(value: Any) -> Any:
    if isinstance(value, DESCRIPTORS):
        return Described(value.base.numpy())
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1).numpy())
    return value if value is None else Value(np.int32(value))


class Described(np.ndarray):
    """A matrix described to the copy engine."""

    layout = None

    def __new__(cls, matrix: Any) -> Described:
        return matrix.view(cls)
