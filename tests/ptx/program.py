"""The text of a PTX kernel, as instructions in basic blocks.

A basic block ends at a branch, a barrier or a return, and before a label. Registers become numbers; immediates stay
text until an instruction says of which type they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PTXError(Exception):
    """A refusal, with the line of the program."""


@dataclass(frozen=True)
class Register:
    number: int
    bits: int  # 1 for a predicate


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Special:
    """A special register, a symbol or the sink ``_``."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Special
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """The two destinations ``d|p``."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Special | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool

    @property
    def ends_block(self) -> bool:
        return self.name in ("bra", "ret", "exit") or (self.name in ("bar", "barrier") and "warp" not in self.modifiers)

    def refuse(self, reason: str) -> PTXError:
        return PTXError(f"line {self.line}: {self.text}: {reason}")


@dataclass
class Block:
    label: str | None
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: of the entry.
        parameters: type of each parameter by name, in order.
        threads: of a block.
        registers: width in bits of every register, by number.
        blocks: in the order of the text; the end of one leads to the next.
    """

    name: str
    parameters: dict[str, str]
    threads: int
    registers: list[int]
    blocks: list[Block]

    def find(self, label: str) -> int:
        return next(at for at, block in enumerate(self.blocks) if block.label == label)

    def successors(self, block: int) -> list[int]:
        """The blocks that may follow; none after the end."""
        after = [block + 1] if block + 1 < len(self.blocks) else []
        if not self.blocks[block].instructions:
            return after
        last = self.blocks[block].instructions[-1]
        if last.name not in ("bra", "ret", "exit"):
            return after
        taken = [self.find(last.operands[0].name)] if last.name == "bra" else []  # type: ignore[union-attr]
        return taken + (after if last.guard is not None else [])

    def priorities(self) -> list[int]:
        """The order in which blocks are to be executed if lanes are at several of them, the first of all being 0.

        A block comes before each that post-dominates it: that all its paths lead through. So lanes that a branch has
        parted, of which some reach the place where all paths meet, wait there for the others.
        """
        number = len(self.blocks)
        every = (1 << number) - 1
        after = [self.successors(block) for block in range(number)]
        found = [every] * number  # of each block a set of those that post-dominate it, and itself, as bits
        changed = True
        while changed:
            changed = False
            for block in reversed(range(number)):
                common = every if after[block] else 0
                for follower in after[block]:
                    common &= found[follower]
                common |= 1 << block
                changed |= common != found[block]
                found[block] = common
        order = sorted(range(number), key=lambda block: (-found[block].bit_count(), block))
        return [order.index(block) for block in range(number)]


_TYPE = re.compile(r"pred|[bsuf](8|16|32|64)")
_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_STATEMENT = re.compile(r"\n|[\w$]+:(?!:)|\.loc[^\n]*|[{}]|[^\s{};][^;\n{}]*(?:\{[^}]*\}[^;\n{}]*)*;")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def parse(text: str) -> Program:
    """The one kernel of a module.

    Raises:
        PTXError: there is not one kernel, or a statement is not understood.
    """
    # Comments go, lines stay: they are what errors name.
    text = re.sub(r"//[^\n]*", "", text)
    found = list(_ENTRY.finditer(text))
    if len(found) != 1:
        raise PTXError(f"got {len(found)} kernels, expected one")
    entry = found[0]
    parameters = {}
    for declaration in filter(str.strip, entry[2].split(",")):
        words = declaration.split()
        parameters[words[-1]] = words[1].lstrip(".")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise PTXError(f"{entry[1]}: it does not say how many threads it requires")
    body = _Body(set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", text)))
    for line, statement in _statements(text, entry.end()):
        body.add(line, statement)
    return Program(entry[1], parameters, int(threads[1]), body.registers, body.blocks)


def _statements(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Line and text of each statement of the body. Braces that open a scope are skipped: names in it are unique."""
    depth, line = 1, text.count("\n", 0, start) + 1
    for token in _STATEMENT.finditer(text, start):
        found = token[0]
        if found == "\n":
            line += 1
        elif found in "{}":
            depth += 1 if found == "{" else -1
            if depth == 0:
                return
        elif not found.startswith((".loc", ".pragma")):
            yield line, found.rstrip(";").strip()
    raise PTXError("the kernel's body has no end")


class _Body:
    def __init__(self, targets: set[str]) -> None:
        self.targets = targets  # other labels are for debuggers
        self.numbers: dict[str, int] = {}
        self.registers: list[int] = []
        self.blocks = [Block(None)]

    def add(self, line: int, statement: str) -> None:
        if statement.endswith(":"):
            if statement[:-1] in self.targets:
                self.blocks.append(Block(statement[:-1]))
        elif statement.startswith(".reg"):
            self._declare(line, statement)
        else:
            instruction = self._instruction(line, statement)
            self.blocks[-1].instructions.append(instruction)
            if instruction.ends_block:
                self.blocks.append(Block(None))

    def _declare(self, line: int, statement: str) -> None:
        declared = re.fullmatch(r"\.reg\s+\.(\w+)\s+([%\w$]+)(?:<(\d+)>)?", statement)
        kind = None if declared is None else _TYPE.fullmatch(declared[1])
        if declared is None or kind is None:
            raise PTXError(f"line {line}: {statement}: a declaration that is not understood")
        names = [declared[2]] if declared[3] is None else [f"{declared[2]}{at}" for at in range(int(declared[3]))]
        for name in names:
            if name not in self.numbers:  # a scope of one line declares the same name again
                self.numbers[name] = len(self.registers)
                self.registers.append(int(kind[1] or 1))

    def _instruction(self, line: int, statement: str) -> Instruction:
        matched = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", statement, re.DOTALL)
        if matched is None:
            raise PTXError(f"line {line}: {statement}: a statement that is not understood")
        negated, guard, name, modifiers, rest = matched.groups()
        operands = tuple(self._operand(line, part.strip()) for part in _OPERAND.findall(rest))
        condition = None
        if guard is not None:
            operand = self._operand(line, guard)
            if not isinstance(operand, Register) or operand.bits != 1:
                raise PTXError(f"line {line}: {statement}: the guard is no predicate")
            condition = operand
        # Of a cluster of blocks, which no launch here makes, each has its own shared memory.
        parts = tuple(modifiers.replace("shared::cta", "shared").split(".")[1:])
        return Instruction(line, " ".join(statement.split()), name, parts, operands, condition, negated == "!")

    def _operand(self, line: int, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(line, part.strip()) for part in text[1:-1].split(",")))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            at = self._operand(line, base.strip())
            if not isinstance(at, Register | Special):
                raise PTXError(f"line {line}: {text}: an address that is not understood")
            return Address(at, int(offset or "0", 0))
        if "|" in text:
            first, second = (self._operand(line, part.strip()) for part in text.split("|"))
            return Pair(first, second)
        if text in self.numbers:
            number = self.numbers[text]
            return Register(number, self.registers[number])
        if re.fullmatch(r"0[xX][0-9A-Fa-f]+U", text):
            return Immediate(text.removesuffix("U"))
        if re.fullmatch(r"-?\d+|0[xX][0-9A-Fa-f]+|0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}|-?\d+\.\d+", text):
            return Immediate(text)
        return Special(text)
