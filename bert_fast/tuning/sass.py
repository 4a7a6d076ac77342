"""Machine code of NVIDIA's GPUs as cuobjdump lists it, read; and rules about it that no compiler's error tells.

A product of compute capability 9.0 (HGMMA) runs beside the instructions after it. It reads A from four registers or,
by a descriptor, from shared memory, and adds to its accumulator's registers, until WARPGROUP.DEPBAR has waited for
the group that it belongs to. Products up to one that names a scoreboard (gsb0) are a group; DEPBAR.LE gsb0, N waits
for all groups but the N newest.

By descriptor, memory is read past the way by which threads write it: with STS and STSM, or by copies that they start
(LDGSTS). FENCE.VIEW.ASYNC.S must stand between, and after the wait for the copies (LDGDEPBAR ends a group of them,
DEPBAR.LE SB0, N waits for all groups but the N newest). So it is for compute capability 10.0's product (UTCHMMA), and
for what the tensor memory accelerator writes to global memory. UTCHMMA has no operand in registers: no other rule is
about it. Compute capability 8.0 has nothing of the kind.

The rules follow every path, round loops too. They know registers exactly and addresses not at all: missing_fences
says what it takes for a write of an operand. Order between threads they do not see.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Async proxy", for what is ordered by what; how
it looks in machine code is undocumented and was read from listings.
"""

import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import TypeVar

State = TypeVar("State")
PRODUCT, WAIT, FENCE = "HGMMA", "WARPGROUP.DEPBAR", "FENCE.VIEW.ASYNC.S"
SPILL = ("STL", "LDL")
STORES = ("STS", "STSM", "ATOMS")  # by threads, to shared memory
COPIES_OUT = ("UTMASTG", "UTMAREDG", "UBLKRED")  # of shared memory, by the tensor memory accelerator
MEMORY = ("LD", "LDG", "LDS", "LDL", "LDC", "ST", "STG", "STS", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG")
# The instructions that this reader knows: without a register as destination, and with one.
WITHOUT = frozenset(re.findall(r"\w+", """
    ACQBULK BAR BRA BREAK BSSY BSYNC CALL CCTL DEPBAR DSETP ERRBAR EXIT FCHK FENCE FSETP HSETP2 ISETP JMP
    LDGDEPBAR LDGSTS MEMBAR NANOSLEEP NOP PLOP3 PREEXIT R2P RED REDG RET ST STG STL STS STSM UBLKCP UBLKPF UBLKRED
    UISETP UPLOP3 USETMAXREG UTMACCTL UTMACMDFLUSH UTMALDG UTMAREDG UTMASTG WARPGROUP WARPSYNC YIELD
"""))  # fmt: skip
WITH = frozenset(re.findall(r"\w+", """
    ATOM ATOMG ATOMS B2R BMOV CS2R CS2UR DADD DFMA DMUL ELECT F2F F2FP F2I FADD FFMA FLO FMNMX FMUL FRND FSEL FSET
    FSWZADD HADD2 HFMA2 HGMMA HMMA HMNMX2 HMUL2 I2F I2FP I2I I2IP IABS IADD3 IDP IMAD IMMA IMNMX ISCADD LD LDC LDG LDL
    LDS LDSM LEA LEPC LOP3 MATCH MOV MUFU P2R POPC PRMT QSPC R2UR REDUX S2R S2UR SEL SGXT SHF SHFL SYNCS UBREV UF2FP
    UFLO UIADD3 UIMAD ULDC ULEA ULEPC ULOP3 UMOV UP2UR UPOPC UPRMT USEL USGXT USHF VABSDIFF VIADD VIADDMNMX VIMNMX
    VIMNMX3 VOTE VOTEU
"""))  # fmt: skip


def access_bytes(opcode: str) -> int:
    """Bytes a thread of a load or store, by its modifiers: LDG.E.128 is 16, LDG.E 4."""
    sizes = [int(width) // 8 for width in re.findall(r"\.[US]?(8|16|64|128|256)\b", opcode)]
    return sizes[-1] if sizes else 4


def _width(name: str, opcode: str, position: int) -> int:
    """Registers that the operand at ``position`` has, of those that are no predicates; 0 is the destination's."""
    if name == "HGMMA":
        columns = int(re.findall(r"x(\d+)x", opcode)[0])
        accumulator = columns // (4 if ".F16" in opcode and ".F32" not in opcode else 2)
        return 4 if position == 1 else accumulator
    if name in ("HMMA", "IMMA"):
        return {1: 4, 2: 2}.get(position, 4)
    if name in ("LDSM", "STSM"):
        count = re.search(r"\.([24])$", opcode)
        return int(count.group(1)) if count and position == (name == "STSM") else 1
    if name in MEMORY:
        return min(4, max(1, access_bytes(opcode) // 4))  # 32 bytes have two operands
    if name == "CS2R":
        return 1 if ".32" in opcode else 2
    if name in ("DADD", "DFMA", "DMUL", "DSETP", "LEPC") or (".F64" in opcode and name[0] != "U"):
        return 2
    return 2 if ".WIDE" in opcode and position in (0, 3) else 1


@dataclass(frozen=True)
class Instruction:
    """One line: ``@P0 LDG.E.64 R2, desc[UR4][R6.64]``. ``reads`` and ``writes`` are numbers of registers, without the
    uniform ones."""

    address: int
    guard: str  # "" where it always runs
    opcode: str  # with its modifiers
    operands: tuple[str, ...]
    reads: frozenset[int] = field(default=frozenset())
    writes: frozenset[int] = field(default=frozenset())

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        last = self.operands[-1] if self.operands else ""
        return int(last, 16) if self.name in ("BRA", "JMP", "CALL") and re.fullmatch(r"0x[0-9a-f]+", last) else None

    @property
    def reads_by_descriptor(self) -> bool:
        """Whether it reads shared memory otherwise than threads do."""
        return self.name in COPIES_OUT or any(operand.startswith("gdesc") for operand in self.operands)

    def numbers(self, position: int) -> frozenset[int]:
        """The registers of an operand, of those that are no predicates; none for RZ, descriptors and memory."""
        found = [o for o in self.operands if not re.match(r"!?U?P(\d|T\b)", o)]
        first = re.match(r"[-|~]*R(\d+)\b", found[position]) if position < len(found) else None
        if first is None:
            return frozenset()
        return frozenset(range(int(first[1]), int(first[1]) + _width(self.name, self.opcode, position)))

    def __str__(self) -> str:
        return f"{self.opcode} at {self.address:04x}"


def _with_registers(plain: Instruction) -> Instruction:
    count = len(plain.operands)
    written = () if plain.name in WITHOUT else (0, 1) if ".ENL2.256" in plain.opcode and plain.name == "LDG" else (0,)
    writes = frozenset().union(*(plain.numbers(i) for i in written))
    reads = frozenset().union(*(plain.numbers(i) for i in range(count) if i not in written))
    for base, pair in re.findall(r"\[R(\d+)(\.64)?\b", ",".join(plain.operands)):  # addresses
        reads |= {int(base), int(base) + 1} if pair else {int(base)}
    return Instruction(plain.address, plain.guard, plain.opcode, plain.operands, reads, writes)


@dataclass(frozen=True)
class Listing:
    """The instructions of one kernel in their order."""

    code: tuple[Instruction, ...]

    @classmethod
    def parse(cls, text: str) -> "Listing":
        """Of what ``cuobjdump -sass`` prints of one function, or of lines of it without the encoding; ValueError for
        several, whose addresses are the same."""
        if text.count("Function :") > 1:
            raise ValueError("the listing has several functions; bert_fast/tuning/sass.py follows branches inside one")
        line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
        code = []
        for address, guard, opcode, rest in line.findall(text):
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            code.append(_with_registers(Instruction(int(address, 16), guard, opcode, operands)))
        return cls(tuple(code))

    @cached_property
    def following(self) -> list[list[int]]:
        """The places in ``code`` that may come after each place."""
        place = {instruction.address: i for i, instruction in enumerate(self.code)}
        result = []
        for i, instruction in enumerate(self.code):
            found = [place[instruction.target]] if instruction.target in place else []
            ends = instruction.name in ("BRA", "JMP", "EXIT", "RET") and not instruction.guard
            conditional = instruction.name == "BRA" and len(instruction.operands) > 1
            if i + 1 < len(self.code) and (not ends or conditional):
                found.append(i + 1)
            result.append(found)
        return result

    @cached_property
    def looped(self) -> set[int]:
        """The places inside loops: from a branch's target to the branch, where that comes later."""
        inside: set[int] = set()
        for i, places in enumerate(self.following):
            inside.update(*(range(first, i + 1) for first in places if first <= i))
        return inside

    def states(self, start: State, step: Callable, merge: Callable) -> dict[int, State]:
        """The state before each place that is reached: ``step(instruction, state)`` is the one after it, ``merge`` of
        two is that where paths meet."""
        found: dict[int, State] = {}
        waiting = [(0, start)] if self.code else []
        while waiting:
            place, state = waiting.pop()
            if place in found:
                state = merge(found[place], state)
                if state == found[place]:
                    continue
            found[place] = state
            after = step(self.code[place], state)
            waiting += [(follower, after) for follower in self.following[place]]
        return found


Groups = tuple[frozenset[int], ...]  # places' addresses: of the group that is not complete, then from the newest on
GROUPS = 8  # those before count as one: a loop without waits comes to an end


def _merged(one: Groups, other: Groups) -> Groups:
    longest = max(len(one), len(other))
    one, other = ((*groups, *[frozenset()] * (longest - len(groups))) for groups in (one, other))
    return tuple(a | b for a, b in zip(one, other, strict=True))


def _completed(groups: Groups) -> Groups:
    groups = (frozenset(), *groups)
    return (*groups[:GROUPS], frozenset().union(*groups[GROUPS:])) if len(groups) > GROUPS else groups


def _kept(wait: Instruction) -> int:
    """How many entries of groups a wait for all but the N newest keeps."""
    return 1 + int(wait.operands[1], 16)


def _products_step(instruction: Instruction, groups: Groups) -> Groups:
    if instruction.opcode.startswith(WAIT):
        return groups[: _kept(instruction)]
    if instruction.name != PRODUCT:
        return groups
    groups = (groups[0] | {instruction.address}, *groups[1:])
    return _completed(groups) if instruction.operands[-1].startswith("gsb") else groups


def early_registers(listing: Listing) -> list[str]:
    """Registers of a product that other instructions use before the wait for it: A's written, accumulators' read,
    written or spilled."""
    products = {i.address: (i, i.numbers(0), i.numbers(1)) for i in listing.code if i.name == PRODUCT}
    if not products:
        return []
    findings = []
    start: Groups = (frozenset(),)
    for place, groups in sorted(listing.states(start, _products_step, _merged).items()):
        used = listing.code[place]
        for address in sorted(frozenset().union(*groups)):
            product, accumulator, operand = products[address]
            same = used.name == PRODUCT and used.numbers(0) == accumulator  # products in their order may add to it
            touched = (used.reads | used.writes) - (used.numbers(0) if same else frozenset())
            for what, early in (("operand", operand & used.writes), ("accumulator", accumulator & touched)):
                if early:
                    verb = "spills" if used.name in SPILL else "writes" if early & used.writes else "reads"
                    findings.append(f"{used} {verb} R{min(early)}, {what} of {product}, before the wait for it")
    return findings


@dataclass(frozen=True)
class _Written:
    """Addresses of stores and copies to shared memory since the last fence."""

    stored: frozenset[int] = frozenset()  # and no barrier since
    shared: frozenset[int] = frozenset()  # a barrier since, and no thread has read any
    arrived: frozenset[int] = frozenset()  # copies that have been waited for
    copies: Groups = (frozenset(),)

    def step(self, instruction: Instruction) -> "_Written":
        if instruction.guard == "!PT":
            return self
        this = {instruction.address}
        if instruction.name in STORES:
            return replace(self, stored=self.stored | this)
        if instruction.opcode.startswith(("BAR.", "SYNCS.ARRIVE")):
            return replace(self, stored=frozenset(), shared=self.shared | self.stored)
        if instruction.name in ("LDS", "LDSM"):
            return replace(self, shared=frozenset())
        if instruction.name == "LDGSTS":
            return replace(self, copies=(self.copies[0] | this, *self.copies[1:]))
        if instruction.name == "LDGDEPBAR":
            return replace(self, copies=_completed(self.copies))
        if instruction.opcode.startswith("DEPBAR.LE") and instruction.operands[0] == "SB0":
            kept = _kept(instruction)
            return replace(self, arrived=self.arrived.union(*self.copies[kept:]), copies=self.copies[:kept])
        return replace(_NOTHING, copies=self.copies) if instruction.opcode.startswith(FENCE) else self

    def merge(self, other: "_Written") -> "_Written":
        stored, shared, arrived = (a | b for a, b in zip(astuple(self)[:3], astuple(other)[:3], strict=True))
        return _Written(stored, shared, arrived, _merged(self.copies, other.copies))


_NOTHING = _Written()


def missing_fences(listing: Listing) -> list[str]:
    """Instructions that read shared memory by descriptor, after threads wrote to it and without a fence between.

    A store counts once a barrier has shared it, unless a thread reads shared memory before the descriptor does: then it
    was for the threads. A copy counts once it has been waited for.
    """
    code = {instruction.address: instruction for instruction in listing.code}
    if not any(instruction.reads_by_descriptor for instruction in listing.code):
        return []
    findings = []
    for place, written in sorted(listing.states(_NOTHING, lambda i, state: state.step(i), _Written.merge).items()):
        reader, unfenced = listing.code[place], written.shared | written.arrived
        if reader.reads_by_descriptor and unfenced:
            findings.append(f"{reader} reads shared memory without a fence after {code[min(unfenced)]}")
    return findings


def idle_waits(listing: Listing) -> int:
    """How many waits for products have fewer than 64 instructions and no product between them and the wait before."""
    idle, since = 0, None
    for at, instruction in enumerate(listing.code):
        if instruction.opcode.startswith(WAIT):
            idle += since is not None and at - since <= 64
            since = at
        elif instruction.name == PRODUCT:
            since = None
    return idle


def unknown(listing: Listing) -> list[str]:
    """Instructions whose registers this reader does not know, in a kernel with asynchronous products."""
    names = {instruction.name for instruction in listing.code}
    return [
        f"{name} is unknown to bert_fast/tuning/sass.py" for name in sorted(names - WITHOUT - WITH) if PRODUCT in names
    ]


RULES = {"registers": early_registers, "fences": missing_fences, "unknown": unknown}  # what makes results wrong
