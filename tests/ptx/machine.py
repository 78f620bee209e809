"""The machine: blocks of warps that execute a program between barriers in an order that can be chosen.

Warps that are executed at once, those of one number of all blocks or all warps of all blocks, have their lanes in one
array. Lanes that are at different places of the program take turns, those furthest behind first, so that they meet
again where all paths from their branch do. A warp runs until all of its lanes wait at a barrier; then the next one
runs, in an order drawn anew for each stretch between two barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import collectives, transfers
from .collectives import WARP
from .elementwise import find
from .formats import Array
from .memory import AccessError, GlobalMemory, SharedMemory
from .operands import poison, reader, writer
from .program import Instruction, Program, PTXError, Special, Vector

Step = Callable[["Warps", "Array | None"], None]

BLOCKS_AT_ONCE = 32
"""Of a larger grid, so many blocks at a time; more make arrays that leave the processor's cache."""

NOT_AGAIN = np.iinfo(np.int64).max
"""The priority of a lane that waits or has ended."""

ENDED = -1
"""The place of a lane that has ended."""


@dataclass(frozen=True)
class Order:
    """The order in which a kernel is executed.

    Attributes:
        seed: of the order of blocks and of warps between barriers; None is theirs.
        together: all warps of a block execute each instruction at once, and races are not looked for.
        ignore_barriers: every warp runs to its end without waiting for others, and races are not looked for.
    """

    seed: int | None = None
    together: bool = False
    ignore_barriers: bool = False


class Warps:
    """Warps that are executed at once: those of some numbers, of some blocks.

    Attributes:
        number: of these warps in their blocks, the first if there are several.
        lanes: 32 for each warp, block by block.
        registers: (lanes,) of each, replaced and never written into.
        place: (lanes,) the basic block that each lane is at.
        waiting: (lanes,) whether it waits at the barrier before that block.
    """

    def __init__(self, launch: Launch, numbers: range, blocks: Array, shared: SharedMemory) -> None:
        self.launch, self.number, self.shared, self.memory = launch, numbers[0], shared, launch.memory
        self.parameters = launch.parameters
        each = WARP * len(numbers)
        self.lanes = each * len(blocks)
        self.block = np.repeat(np.arange(len(blocks)), each)  # in shared memory
        self.registers = [poison(bits, self.lanes) for bits in launch.program.registers]
        self.place = np.zeros(self.lanes, np.int64)
        self.waiting = np.zeros(self.lanes, np.bool_)
        self.copies: list[transfers.Copy] = []
        self.committed = np.zeros(self.lanes, np.int64)
        thread = np.tile(WARP * numbers[0] + np.arange(each), len(blocks))
        self._special = {"%tid.x": thread, "%laneid": thread % WARP, "%warpid": thread // WARP}
        self._special |= dict.fromkeys(("%tid.y", "%tid.z"), np.zeros(self.lanes, np.int64))
        rest, sizes = np.repeat(blocks, each), (launch.program.threads, 1, 1)
        for axis, along, size in zip("xyz", launch.grid, sizes, strict=True):
            self._special[f"%ctaid.{axis}"], rest = rest % along, rest // along
            self._special[f"%nctaid.{axis}"] = np.full(self.lanes, along)
            self._special[f"%ntid.{axis}"] = np.full(self.lanes, size)

    def special(self, name: str) -> Array:
        return self._special[name]

    def read(self, space: str, lanes: Array | slice, addresses: Array, size: int) -> Array:
        if space == "global":
            return self.memory.read(addresses, size)
        return self.shared.read(self.number, self.block[lanes], addresses, size)

    def write(self, space: str, lanes: Array | slice, addresses: Array, octets: Array) -> None:
        if space == "global":
            self.memory.write(addresses, octets)
        else:
            self.shared.write(self.number, self.block[lanes], addresses, octets)

    def commit(self, mask: Array | None) -> None:
        """The copies issued since the last call are a group."""
        self.committed = self.committed + (1 if mask is None else mask)

    def wait(self, mask: Array | None, left: int | None) -> None:
        """All but the last ``left`` groups arrive, or everything."""
        here = np.ones(self.lanes, np.bool_) if mask is None else mask
        last = np.iinfo(np.int64).max if left is None else self.committed - left
        under_way = []
        for copy in self.copies:
            arrives = here[copy.lanes] & (copy.groups < (last if left is None else last[copy.lanes]))
            lanes = copy.lanes[arrives]
            self.write("shared", lanes, copy.addresses[arrives], copy.octets[arrives])
            if not arrives.all():
                under_way.append(transfers.Copy(*(part[~arrives] for part in copy)))
        self.copies = under_way

    def run(self) -> None:
        """Until every lane waits or has ended."""
        steps = self.launch.code.steps
        while True:
            ready = np.where(self.waiting, NOT_AGAIN, self.launch.code.priorities[self.place])
            lane = ready.argmin()
            if ready[lane] == NOT_AGAIN:
                return
            first = self.place[lane]
            here = (self.place == first) & ~self.waiting
            mask = None if here.all() else here
            self.place = np.where(here, first + 1, self.place)
            for instruction, step in steps[first]:
                try:
                    step(self, mask)
                except AccessError as error:
                    raise instruction.refuse(f"warp {self.number}: {error}") from error


class Code:
    """A program whose instructions are functions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        if program.threads % WARP:
            raise PTXError(f"{program.name}: {program.threads} threads are no whole warps")
        self.priorities = np.array([*program.priorities(), NOT_AGAIN])  # that of lanes that have ended is the last
        self.steps = [[(i, _step(program, i)) for i in block.instructions] for block in program.blocks]


class Launch:
    """A kernel with its grid and arguments.

    Args:
        code: of the kernel.
        grid: blocks along x, y, z.
        parameters: an array of one number for each, by name.
        memory: what its pointers lead to.
        shared: bytes of shared memory of a block.
    """

    def __init__(
        self,
        code: Code,
        grid: tuple[int, int, int],
        parameters: Mapping[str, Array],
        memory: GlobalMemory,
        shared: int,
    ) -> None:
        self.code, self.program = code, code.program
        self.grid, self.parameters, self.memory, self.shared = grid, parameters, memory, shared
        self.order = Order()

    def run(self, order: Order = Order()) -> None:
        """Execute all blocks.

        Raises:
            PTXError: an instruction that is not known, an access that is not allowed, a race.
        """
        self.order = order
        generator = None if order.seed is None else np.random.default_rng(order.seed)
        blocks = np.arange(int(np.prod(self.grid)))
        if generator is not None:
            generator.shuffle(blocks)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), BLOCKS_AT_ONCE):
                self._run_blocks(blocks[start : start + BLOCKS_AT_ONCE], generator)

    def _run_blocks(self, blocks: Array, generator: np.random.Generator | None) -> None:
        order, number = self.order, self.program.threads // WARP
        shared = SharedMemory(len(blocks), self.shared, not (order.ignore_barriers or order.together))
        numbers = [range(number)] if order.together else [range(at, at + 1) for at in range(number)]
        warps = [Warps(self, some, blocks, shared) for some in numbers]
        while True:
            for at in range(len(warps)) if generator is None else generator.permutation(len(warps)):
                warps[at].run()
            places = np.concatenate([w.place.reshape(len(blocks), -1) for w in warps], 1)
            if (places == ENDED).all():
                return
            if (places != places[:, :1]).any():
                raise PTXError(f"{self.program.name}: some threads of a block wait at a barrier, others elsewhere")
            # The blocks that are furthest behind go on, so that they meet the others.
            behind = self.code.priorities[places[:, 0]]
            released = behind == behind.min()
            shared.barrier(released)
            for w in warps:
                w.waiting &= ~np.repeat(released, w.lanes // len(blocks))


# --------------------------------------------------------------------------------------------------------- instructions


def _step(program: Program, instruction: Instruction) -> Step:
    """The instruction as a function of warps and of the lanes that are at it, its guard included."""
    name = instruction.name
    make = _CONTROL.get(name)
    if make is not None:
        step = make(program, instruction)
    elif name in _OTHERS:
        step = _OTHERS[name](instruction)
    else:
        step = _elementwise(instruction)
    if instruction.guard is None:
        return step
    number, negated = instruction.guard.number, instruction.negated

    def step_if(warps: Warps, mask: Array | None) -> None:
        holds = warps.registers[number] ^ negated
        here = holds if mask is None else holds & mask
        if here.all():
            step(warps, None)
        elif here.any():
            step(warps, here)

    return step_if


def _elementwise(instruction: Instruction) -> Step:
    found = find(instruction)
    if found is None:
        raise instruction.refuse("an instruction that is not known")
    if len(instruction.operands) != 1 + len(found.operands):
        raise instruction.refuse(f"{len(instruction.operands)} operands, expected {1 + len(found.operands)}")
    write = writer(instruction, instruction.operands[0])
    reads = [
        reader(instruction, part, kind) for part, kind in zip(instruction.operands[1:], found.operands, strict=True)
    ]
    function = found.function
    return lambda warps, mask: write(warps, function(*[read(warps) for read in reads]), mask)


def _move(instruction: Instruction) -> Step:
    """``mov``: a value, or the halves of one from or to registers."""
    (kind,) = instruction.modifiers
    to, source = instruction.operands
    if isinstance(to, Vector) or isinstance(source, Vector):
        whole = np.dtype(f"u{int(kind[1:]) // 8}")
        parts = to.parts if isinstance(to, Vector) else source.parts  # type: ignore[union-attr]
        part = np.dtype(f"u{whole.itemsize // len(parts)}")
        if isinstance(to, Vector):
            read, writes = reader(instruction, source, whole), [writer(instruction, p) for p in parts]

            def unpack(warps: Warps, mask: Array | None) -> None:
                halves = read(warps).view(part).reshape(-1, len(parts))
                for at, write in enumerate(writes):
                    write(warps, np.ascontiguousarray(halves[:, at]), mask)

            return unpack
        write, reads = writer(instruction, to), [reader(instruction, p, part) for p in parts]
        return lambda warps, mask: write(warps, np.stack([r(warps) for r in reads], 1).view(whole)[:, 0], mask)
    write, read = writer(instruction, to), reader(instruction, source, kind)
    return lambda warps, mask: write(warps, read(warps), mask)


def _branch(program: Program, instruction: Instruction) -> Step:
    (target,) = instruction.operands
    assert isinstance(target, Special)
    to = program.find(target.name)

    def step(warps: Warps, mask: Array | None) -> None:
        warps.place = np.where(True if mask is None else mask, to, warps.place)

    return step


def _end(program: Program, instruction: Instruction) -> Step:
    def step(warps: Warps, mask: Array | None) -> None:
        warps.place = np.where(True if mask is None else mask, ENDED, warps.place)

    return step


def _barrier(program: Program, instruction: Instruction) -> Step:
    if instruction.modifiers == ("warp", "sync"):

        def together(warps: Warps, mask: Array | None) -> None:
            collectives.whole_warps(instruction, warps, mask)

        return together
    numbers = [getattr(operand, "text", None) for operand in instruction.operands]
    if instruction.modifiers not in (("sync",), ("sync", "aligned")) or numbers != ["0"]:
        raise instruction.refuse("a barrier other than that of the whole block")

    def step(warps: Warps, mask: Array | None) -> None:
        if not warps.launch.order.ignore_barriers:
            warps.waiting = warps.waiting | (True if mask is None else mask)

    return step


_CONTROL: dict[str, Callable[[Program, Instruction], Step]] = {
    "bra": _branch, "ret": _end, "exit": _end, "bar": _barrier, "barrier": _barrier,
}  # fmt: skip

_OTHERS: dict[str, Callable[[Instruction], Any]] = {
    "mov": _move,
    "ld": transfers.load,
    "st": transfers.store,
    "cp": transfers.copy_async,
    "atom": transfers.atomic_add,
    "createpolicy": transfers.make_policy,
    "shfl": collectives.shuffle,
    "redux": collectives.reduce,
    "ldmatrix": collectives.load_matrix,
    "mma": collectives.multiply_matrices,
}
