"""What the kernels become on each GPU generation, found without a GPU: compiled ahead of time and disassembled.

    python dev/compile_report.py [--targets 80,90,100] [--kernels attention,mlm] [--json PATH]

kernels/aot.py names every kernel's default configurations at BERT's sizes, ``aot_cases(capability)``. Each is compiled
for each target by Triton, and read with the cuobjdump of Triton's package. The exit status is 1 where a rule is broken:

    spills      no register is spilled (STL, LDL: stores to and loads from local memory)
    registers   nothing touches a register that an asynchronous product still reads or adds to (sass.py)
    fences      a fence stands between writes to shared memory and a product that reads them by descriptor (sass.py)
    programs    as many fit a multiprocessor as occupancy.json states: one register more may cost a quarter of them
    shared      shared memory fits the part's limit for one program, tensor memory its 512 columns
    products    a 16-bit kernel with matrix products uses its target's own tensor-core instruction
    waits       the products of a Gluon kernel, which issues them asynchronously, have not been made to wait in turn,
                and no wait follows another at once, where the kernel has work for the threads meanwhile
    width       a row operator reads and writes memory by 16 bytes: "wide" is at least a half
    coverage    every kernel that the host launches is in a case

A broken rule that is known of this pair of Triton and ptxas and tolerated (bert_fast/compilers.py) is listed as known.
"waits" are instructions that wait for asynchronous products (HGMMA): as many of them as of products mean that the
assembler saw their registers used meanwhile and made them wait in turn. Triton's own pipelining (num_stages of 2 and
more) leads to that in some kernels: there it is shown, and no rule. The assembler also moves waits up, and work down
past them, unless something that it does not move stands between.
Occupancy is computed from registers, shared memory, tensor memory and warps, not measured. "wasted" is the share of
the scores that an attention kernel's tiles compute past the ends of sequences of Wikipedia's lengths at 512 and at
128 (a quarter of each length). "wide" is the share of accesses to global memory of 16 bytes a thread or more, by the
bytes that instructions name; each counts once, also one that reads a single number a row, and one for a tensor's
last, masked piece. Nothing here says how fast a kernel is.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that nobody installed

import torch

from bert_fast import compilers
from bert_fast.tuning import sass

ROOT = Path(__file__).resolve().parent.parent
OCCUPANCY = ROOT / "dev" / "occupancy.json"  # kernel -> compute capability (by a release) -> programs a multiprocessor


@dataclass(frozen=True)
class Part:
    """Limits of a compute capability (CUDA C++ Programming Guide, "Technical Specifications")."""

    shared_per_program: int  # bytes
    shared_per_sm: int  # bytes
    tensor_core: str  # the SASS opcode of its own 16-bit matrix product
    registers_per_sm: int = 65536
    warps_per_sm: int = 64
    programs_per_sm: int = 32
    reserved_shared: int = 1024  # bytes the system takes of each program's shared memory


PARTS = {
    80: Part(163 * 1024, 164 * 1024, "HMMA"),
    90: Part(227 * 1024, 228 * 1024, "HGMMA"),
    100: Part(227 * 1024, 228 * 1024, "UTCHMMA"),
}
ELEMENTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
            "i32": torch.int32, "i64": torch.int64}  # fmt: skip
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "UTCQMMA", "IMMA", "IGMMA", "DMMA")
BULK_COPY = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")
GLOBAL_ACCESS = ("LDG", "STG", "LDGSTS")
ROW_OPERATORS = ("embedding_layernorm", "residual_layernorm", "bias_gelu")


@dataclass
class Row:
    """One kernel in one configuration on one target."""

    kernel: str
    target: int
    warps: int
    registers: int
    spills: int  # instructions
    local_bytes: int
    shared_bytes: int
    programs: int  # that fit a multiprocessor
    occupancy: float  # share of the part's warps that they are
    tensor_core: dict[str, int]  # opcode -> instructions
    product_waits: int  # instructions that wait for asynchronous products
    bulk_copies: int  # instructions
    wide: float | None  # share of the bytes that accesses to global memory name in 16 bytes or more; None without any
    wasted: dict[int, float] = field(default_factory=dict)  # full length -> share of the computed scores
    idle_waits: int = 0  # waits with little between them and the wait before, and no product
    broken: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)  # broken too, and tolerated with these versions


def programs(part: Part, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """How many fit a multiprocessor; registers are given out in units of 256 a warp, on each of its four parts apart,
    tensor memory in columns."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        part.programs_per_sm,
        part.warps_per_sm // warps,
        part.registers_per_sm // 4 // per_warp * 4 // warps,
        part.shared_per_sm // (shared + part.reserved_shared),
        TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else part.programs_per_sm,
    )


@functools.cache
def wasted_scores(block_m: int, block_n: int, seq: int) -> float:
    """The share of computed scores that belong to no sequence, over Wikipedia's histogram scaled to ``seq`` tokens."""
    from benchmarks.predict.step_model import tiled
    from bert_fast.data import wikipedia_lengths

    useful = computed = 0
    for length, count in enumerate(wikipedia_lengths().tolist(), 1):
        own, tiles = tiled([max(1, round(length * seq / 512))], block_m, block_n)
        useful, computed = useful + count * own, computed + count * tiles
    return 1 - useful / computed


def wide_share(instructions: Counter) -> float | None:
    """See Row.wide; ``instructions`` with their modifiers."""
    found = Counter()
    for name, count in instructions.items():
        if name.partition(".")[0] in GLOBAL_ACCESS:
            size = sass.access_bytes(name)
            found[size >= 16] += count * size
    return found[True] / found.total() if found else None


def broken_rules(row: Row, part: Part, needs_tensor_core: bool, tensor_memory: int, asynchronous: bool) -> list[str]:
    """What ``row``'s numbers break, in words."""
    broken = []
    if row.shared_bytes > part.shared_per_program:
        broken.append(f"{row.shared_bytes} bytes of shared memory, the limit is {part.shared_per_program}")
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        broken.append(f"{tensor_memory} columns of tensor memory, the limit is {TENSOR_MEMORY_COLUMNS}")
    if needs_tensor_core and part.tensor_core not in row.tensor_core:
        found = ", ".join(row.tensor_core) or "none"
        broken.append(f"products without {part.tensor_core} (tensor-core instructions: {found})")
    products = row.tensor_core.get("HGMMA", 0)
    if asynchronous and products <= row.product_waits:
        broken.append(f"{row.product_waits} waits for {products} products: the assembler has made them wait in turn")
    if asynchronous and row.idle_waits:
        broken.append(f"{row.idle_waits} waits for products follow another at once: the assembler has moved them up")
    if row.kernel.startswith(ROW_OPERATORS) and row.wide is not None and row.wide < 0.5:
        broken.append(
            f"{row.wide:.0%} of the bytes of global memory are read and written by 16, expected a half or more"
        )
    return broken


def _cuobjdump(option: str, path: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _summary(findings: list[str]) -> list[str]:
    """The first of a rule's findings about a kernel, and how many more there are."""
    more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
    return [findings[0] + more] if findings else []


def judge_code(row: Row, listing: sass.Listing, faults: list[compilers.Fault]) -> None:
    """Adds to ``row.broken`` what the instructions break, or to ``row.known`` where one of ``faults`` tolerates it."""
    spills = [place for place, instruction in enumerate(listing.code) if instruction.name in sass.SPILL]
    if spills:
        inside = sum(place in listing.looped for place in spills)
        row.broken.append(f"{len(spills)} instructions spill registers, {inside} of them in a loop")
    for rule, check in sass.RULES.items():
        fault = compilers.tolerated(rule, faults)
        for line in _summary(check(listing)):
            if fault:
                row.known.append(f"{line}: {fault.what}")
            else:
                row.broken.append(line)


def judge_occupancy(row: Row, stated: dict[str, dict[str, int]], triton: str) -> None:
    """Adds to ``row.broken`` where fewer programs fit a multiprocessor than ``stated``, or where none are. What is
    stated of "90 by Triton 3.6" holds for that release, what is stated of "90" for all others."""
    release, of_kernel = ".".join(triton.split(".")[:2]), stated.get(row.kernel, {})
    least = of_kernel.get(f"{row.target} by Triton {release}", of_kernel.get(str(row.target)))
    if least is None:
        row.broken.append(f"{OCCUPANCY.name} does not state how many programs fit a multiprocessor: {row.programs}")
    elif row.programs < least:
        row.broken.append(f"{row.programs} programs fit a multiprocessor, {OCCUPANCY.name} states {least}")


def _disassemble(cubin: bytes) -> tuple[int, int, sass.Listing]:
    """Registers a thread, local bytes a thread (stack included), and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], sass.Listing.parse(code)


class _NoDevice:
    """In the place of a GPU's driver: all that Triton asks of one before it compiles."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device, and each target has its own

    def get_current_stream(self, device: int) -> int:
        return 0


def _argument(kind, divisible: bool):
    """An argument that Triton takes for one of type ``kind``, as aot.py writes types."""
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(kind, tuple):
        return tuple(_argument(part, divisible) for part in kind)
    if kind.startswith("*"):
        return MockTensor(ELEMENTS[kind[1:]])  # aligned to 16 bytes
    if kind.startswith("tensordesc"):
        element, block = re.fullmatch(r"tensordesc<(\w+)\[(.*)\]>", kind).groups()
        shape = [int(size) for size in block.split(",")]
        return TensorDescriptor.from_tensor(torch.empty(shape, dtype=ELEMENTS[element]), shape)
    return 0.5 if kind.startswith("fp") else 16 if divisible else 17


def compile_as_launched(case: dict, capability: int):
    """What Triton's launcher would compile for ``case``, and find in its cache where that is there already."""
    from triton.runtime import driver

    driver.set_active(_NoDevice(capability))
    given = {name: _argument(kind, name in case["divisible_by_16"]) for name, kind in case["signature"].items()}
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"], "grid": (1,)}
    return case["kernel"].warmup(**given, **case["constexprs"], **options)


def compile_case(case: dict, capability: int, stated: dict | None) -> Row:
    """Compile one case as the launcher would and judge what came out; ``stated`` is what occupancy.json has."""
    import triton

    kernel, part = case["kernel"], PARTS[capability]
    compiled = compile_as_launched(case, capability)
    metadata = compiled.metadata
    registers, local_bytes, listing = _disassemble(compiled.asm["cubin"])
    opcodes = Counter(instruction.name for instruction in listing.code)
    warps, tensor_memory = metadata.num_warps, getattr(metadata, "tmem_size", 0) or 0
    resident = programs(part, registers, metadata.shared, warps, tensor_memory)
    row = Row(
        kernel=case["name"],
        target=capability,
        warps=warps,
        registers=registers,
        spills=sum(opcodes[name] for name in sass.SPILL),
        local_bytes=local_bytes,
        shared_bytes=metadata.shared,
        programs=resident,
        occupancy=resident * warps / part.warps_per_sm,
        tensor_core={name: opcodes[name] for name in TENSOR_CORE if opcodes[name]},
        product_waits=sum(instruction.opcode.startswith(sass.WAIT) for instruction in listing.code),
        bulk_copies=sum(opcodes[name] for name in BULK_COPY),
        wide=wide_share(Counter(instruction.opcode for instruction in listing.code)),
        wasted={seq: wasted_scores(*case["score_tile"], seq) for seq in (512, 128) if "score_tile" in case},
        idle_waits=sass.idle_waits(listing),
    )
    sixteen_bits = any(kind in ("*bf16", "*fp16") for kind in case["signature"].values())
    row.broken = broken_rules(row, part, case["dot"] and sixteen_bits, tensor_memory, kernel.is_gluon())
    ptxas = compilers.ptxas_version(capability)
    judge_code(row, listing, compilers.known_faults(triton.__version__, ptxas, capability))
    if stated is not None:
        judge_occupancy(row, stated, triton.__version__)
    return row


def _load(path: Path, folder: Path):
    if folder == ROOT / "kernels":
        return importlib.import_module(".".join(("bert_fast", *path.relative_to(ROOT).with_suffix("").parts)))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def launched_kernels(source: str) -> set[str]:
    """Names of the file's @triton.jit functions that it launches from the host: ``name[grid](...)``."""
    tree = ast.parse(source)
    kernels = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    launched = {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}
    return kernels & launched


def collect(folder: Path, targets: list[int]) -> tuple[list[tuple[int, dict]], list[str]]:
    """Every (target, case) of the folder's files, and the launched kernels that no case covers, in words."""
    cases, launched, covered = [], {}, set()
    for path in sorted((*folder.glob("*.py"), *folder.glob("experiments/*.py"))):
        names = launched_kernels(path.read_text(encoding="utf-8"))
        module = _load(path, folder)
        launched.update({getattr(module, name): f"{path.name}: {name}" for name in names})
        if hasattr(module, "aot_cases"):
            of_target = {target: module.aot_cases(target) for target in PARTS}  # a kernel may be for one of them alone
            cases += [(target, case) for target in targets for case in of_target[target]]
            covered |= {case["kernel"] for found in of_target.values() for case in found}
    missing = [where for kernel, where in launched.items() if kernel not in covered]
    return cases, [f"{where} is launched but in no aot_cases" for where in missing]


HEADER = (
    "kernel",
    "target",
    "warps",
    "regs",
    "spills",
    "local B",
    "shared B",
    "programs",
    "occup.",
    "tensor cores",
    "bulk",
    "wide",
    "wasted",
)


def table(rows: list[Row]) -> str:
    """The rows as text, one a line."""
    cells = [HEADER]
    for row in rows:
        tensor_core = " ".join(f"{name} {count}" for name, count in row.tensor_core.items()) or "-"
        tensor_core += f", {row.product_waits} waits" if row.product_waits else ""
        numbers = (row.warps, row.registers, row.spills, row.local_bytes, row.shared_bytes, row.programs)
        wasted = " ".join(f"{seq}: {share:.0%}" for seq, share in row.wasted.items()) or "-"
        wide = "-" if row.wide is None else f"{row.wide:.0%}"
        last = (f"{row.occupancy:.0%}", tensor_core, str(row.bulk_copies or "-"), wide, wasted)
        cells.append((row.kernel, f"sm_{row.target}", *map(str, numbers), *last))
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    left = (0, 1, 9)
    lines = []
    for line in cells:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _targets(text: str) -> list[int]:
    targets = [int(part.removeprefix("sm_")) for part in text.split(",")]
    unknown = [t for t in targets if t not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown targets {unknown}; known are {', '.join(map(str, PARTS))}")
    return targets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=_targets, default=list(PARTS), help="compute capabilities: 80,90,100")
    parser.add_argument("--kernels", default="", help="only cases whose name contains one of these, by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--folder", type=Path, default=ROOT / "kernels", help="the folder of kernel files")
    options = parser.parse_args(arguments)

    os.environ.pop("TRITON_INTERPRET", None)  # acts when a kernel is decorated; an interpreted one cannot be compiled
    cases, uncovered = collect(options.folder.resolve(), options.targets)
    wanted = [part for part in options.kernels.split(",") if part]
    cases = [(t, case) for t, case in cases if not wanted or any(part in case["name"] for part in wanted)]
    if not cases:
        print(f"no case of {options.folder} matches --kernels {options.kernels!r}", file=sys.stderr)
        return 2

    versions = {"triton": compilers.triton_version(), "ptxas": compilers.assemblers()}
    print(f"triton {versions['triton']}, ptxas {versions['ptxas']}\n")
    own = options.folder.resolve() == ROOT / "kernels"
    stated = json.loads(OCCUPANCY.read_text(encoding="utf-8")) if own else None
    rows = []
    for number, (target, case) in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(f"\r\x1b[Kcompiling {number} of {len(cases)}: {case['name']}, sm_{target}", end="", file=sys.stderr)
        rows.append(compile_case(case, target, stated))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    rows.sort(key=lambda row: (row.kernel, row.target))
    print(table(rows))

    broken = [f"{row.kernel}, sm_{row.target}: {rule}" for row in rows for rule in row.broken] + uncovered
    known = [f"{row.kernel}, sm_{row.target}: {rule}" for row in rows for rule in row.known]
    if options.json:
        report = {"versions": versions, "rows": [asdict(row) for row in rows], "broken": broken, "known": known}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("".join(f"\nwarning: {line}" for line in compilers.warnings_for({row.target for row in rows})))
    for title, lines in (("known faults, tolerated", known), ("broken rules", broken)):
        print(f"{len(rows)} compilations, {len(lines)} {title}" + "".join(f"\n  {line}" for line in lines))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
