"""The rules about machine code, on listings made by hand: each finds its fault, and nothing in the right listing."""

import re

import pytest

from bert_fast.tuning import sass


def listing(*lines: str) -> sass.Listing:
    """Of instructions, 16 bytes each from 0 on; ``NAME:`` before one, and NAME as a branch's target, is its address."""
    labels = {line.partition(":")[0]: 16 * i for i, line in enumerate(lines) if re.match(r"[A-Z]+:", line)}
    text = []
    for i, line in enumerate(lines):
        code = re.sub(r"^[A-Z]+:\s*", "", line)
        code = re.sub(r"\b(BRA|BSSY B0,) ([A-Z]+)$", lambda m: f"{m[1]} {labels[m[2]]:#x}", code)
        text.append(f"        /*{16 * i:04x}*/                   {code} ;      /* 0x00e00000141879f0 */")
    return sass.Listing.parse("\n".join(text))


ARRIVE, WAIT, WAIT_ONE = "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
PRODUCT = "HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR16].tnspB, R56, gsb0"  # reads R24-R27, adds to R56-R87
SHARED = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], RZ, !UPT, gsb0"  # A by descriptor, writes R88-R119


@pytest.mark.parametrize(
    ("instruction", "reads", "writes"),
    [
        ("FADD R1, R2.reuse, -R3", {2, 3}, {1}),
        ("@!P0 LDG.E.128 R4, desc[UR4][R6.64+0x10], P1", {6, 7}, {4, 5, 6, 7}),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", {2, 3}, {*range(4, 12)}),
        ("LDS.64 R4, [R2+UR4]", {2}, {4, 5}),
        ("STG.E.64 desc[UR4][R2.64], R8", {2, 3, 8, 9}, set()),
        ("STS.U16 [R2+0x4], R8", {2, 8}, set()),
        ("STSM.16.M88.4 [R3+UR4], R8", {3, 8, 9, 10, 11}, set()),
        ("LDSM.16.MT88.4 R8, [R3]", {3}, {8, 9, 10, 11}),
        ("LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], P2", {9, 2, 3}, set()),
        ("IMAD.WIDE.U32 R2, R4, R5, R6", {4, 5, 6, 7}, {2, 3}),
        ("IMAD.HI.U32 R2, R4, R5, RZ", {4, 5}, {2}),
        ("CS2R R24, SRZ", set(), {24, 25}),
        ("ISETP.GE.U32.AND P3, PT, R2, R3, PT", {2, 3}, set()),
        ("LOP3.LUT P0, RZ, R2, 0x1f, RZ, 0xc0, !PT", {2}, set()),
        ("IADD3 R4, P0, P1, R5, R6, R7", {5, 6, 7}, {4}),
        ("SHFL.BFLY PT, R4, R5, 0x2, 0x1f", {5}, {4}),
        ("HADD2.F32 R4, -RZ, R5.H1_H1", {5}, {4}),
        ("R2UR UR4, R5", {5}, set()),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R16", {*range(8, 14), *range(16, 20)}, {4, 5, 6, 7}),
        (PRODUCT, {*range(24, 28), *range(56, 88)}, {*range(56, 88)}),
        (SHARED, set(), {*range(88, 120)}),
        ("HGMMA.64x128x16.F16 R8, R24, gdesc[UR16], R8, gsb0", {*range(24, 28), *range(8, 40)}, {*range(8, 40)}),
        ("WARPSYNC.ALL", set(), set()),
    ],
)
def test_registers_of_an_instruction(instruction, reads, writes):
    (read,) = listing(instruction).code
    assert (read.reads, read.writes) == (reads, writes)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        # the operand
        ([ARRIVE, PRODUCT, "MOV R28, R1", WAIT, "MOV R24, R1"], None),
        ([ARRIVE, PRODUCT, "MOV R27, R1", WAIT], "MOV at 0020 writes R27, operand of HGMMA.64x64x16.F32.BF16 at 0010"),
        ([ARRIVE, PRODUCT, "@P0 MOV R24, R1", WAIT], "writes R24, operand"),
        ([ARRIVE, PRODUCT, "CS2R R26, SRZ", WAIT], "writes R26, operand"),
        ([ARRIVE, PRODUCT, "LDS.128 R20, [R2]", WAIT], None),
        ([ARRIVE, PRODUCT, "LDS.128 R21, [R2]", WAIT], "writes R24, operand"),
        ([ARRIVE, PRODUCT, "IMAD.WIDE.U32 R23, R2, R3, RZ", WAIT], "writes R24, operand"),
        ([ARRIVE, PRODUCT, "FADD R1, R24, R25", WAIT], None),  # reading it does no harm
        ([ARRIVE, PRODUCT, SHARED.replace("R88", "R20"), WAIT], "writes R24, operand"),  # another product does, too
        # groups: what waits for all but the newest one leaves that in flight
        ([ARRIVE, PRODUCT, SHARED, WAIT_ONE, "MOV R24, R1"], None),
        ([ARRIVE, SHARED, PRODUCT, WAIT_ONE, "MOV R24, R1", WAIT], "writes R24, operand"),
        ([ARRIVE, PRODUCT.replace(", gsb0", ""), SHARED, WAIT_ONE, "MOV R24, R1"], "writes R24, operand"),
        ([ARRIVE, PRODUCT.replace(", gsb0", ""), SHARED, WAIT, "MOV R24, R1"], None),
        # paths: round a loop, and past a wait that a branch leaves out
        (["HEAD: MOV R24, R1", ARRIVE, PRODUCT, "@P0 BRA HEAD", WAIT, "EXIT"], "MOV at 0000 writes R24, operand"),
        (["HEAD: MOV R24, R1", ARRIVE, PRODUCT, WAIT, "@P0 BRA HEAD", "EXIT"], None),
        ([ARRIVE, PRODUCT, "@P0 BRA PAST", WAIT, "PAST: MOV R24, R1", "EXIT"], "writes R24, operand"),
        ([ARRIVE, PRODUCT, "BRA PAST", "MOV R24, R1", f"PAST: {WAIT}", "EXIT"], None),
        (["HEAD: MOV R24, R1", ARRIVE, PRODUCT, "@P0 BRA HEAD", "BRA HEAD"], "operand"),  # never waits: comes to an end
        # accumulators
        ([ARRIVE, PRODUCT, PRODUCT, WAIT, "FADD R1, R56, R87"], None),
        ([ARRIVE, PRODUCT, "FADD R1, R2, R87", WAIT], "FADD at 0020 reads R87, accumulator"),
        ([ARRIVE, PRODUCT, "FADD R88, R2, R3", WAIT], None),
        ([ARRIVE, PRODUCT, "CS2R R86, SRZ", WAIT], "writes R86, accumulator"),
        ([ARRIVE, PRODUCT, "F2FP.BF16.F32.PACK_AB R1, R57, R56", WAIT], "reads R56, accumulator"),
        ([ARRIVE, SHARED, PRODUCT.replace("R24", "R88"), WAIT], "reads R88, accumulator"),  # its A was not waited for
        ([ARRIVE, PRODUCT, PRODUCT.replace("R56", "R58"), WAIT], "accumulator"),  # not the same registers
        ([ARRIVE, PRODUCT, "STL.64 [R1+0x8], R86", WAIT], "STL.64 at 0020 spills R86, accumulator"),
        ([ARRIVE, PRODUCT, "LDL R60, [R1]", WAIT], "LDL at 0020 spills R60, accumulator"),
        ([ARRIVE, PRODUCT, "STL.64 [R1+0x8], R90", WAIT], None),
    ],
)
def test_registers_of_a_product_in_flight(lines, found):
    findings = sass.early_registers(listing(*lines))
    assert bool(findings) == bool(found), findings
    assert not found or found in findings[0]


COPY, GROUP, READ = "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0"
READ_BUT_ONE, FENCE, BARRIER = "DEPBAR.LE SB0, 0x1", "FENCE.VIEW.ASYNC.S", "BAR.SYNC.DEFER_BLOCKING 0x0"
STORE, LOAD = "STS.128 [R2], R4", "LDS R9, [R3]"
TENSOR = "UTCHMMA gdesc[UR38], gdesc[UR40], tmem[UR17], tmem[UR26], idesc[UR27], UP2"
BULK_STORE = "UTMASTG.2D [UR8], [UR4]"


@pytest.mark.parametrize("reader", [SHARED, PRODUCT, TENSOR, BULK_STORE])
@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([STORE, FENCE, BARRIER], None),
        ([STORE, BARRIER, FENCE], None),
        ([STORE, BARRIER], "STS.128 at 0000"),
        ([FENCE, STORE, BARRIER], "STS.128 at 0010"),
        (["STSM.16.M88.4 [R2], R4", BARRIER], "STSM.16.M88.4 at 0000"),
        ([STORE, BARRIER, LOAD], None),  # the threads' own
        ([STORE, BARRIER, "@!PT LDS RZ, [RZ]"], "STS.128"),  # never runs
        ([COPY, GROUP, READ, BARRIER, FENCE], None),
        ([COPY, GROUP, READ, BARRIER], "LDGSTS.E.BYPASS.128 at 0000"),
        ([COPY, GROUP, FENCE, READ, BARRIER], "LDGSTS"),  # a fence before the copy has arrived
        ([COPY, GROUP, READ, BARRIER, LOAD], "LDGSTS"),
        ([COPY, GROUP, COPY, GROUP, READ_BUT_ONE, FENCE], None),  # the other copy is not there yet, nor read
        ([COPY, GROUP, FENCE, COPY, GROUP, READ_BUT_ONE], "LDGSTS.E.BYPASS.128 at 0000"),
        ([STORE, BARRIER, "@P0 BRA PAST", FENCE, "PAST: NOP"], "STS.128"),  # a path without a fence
        ([STORE, "BRA PAST", "NOP", f"PAST: {FENCE}", BARRIER], None),
        ([STORE, BARRIER, "FENCE.VIEW.ASYNC.T"], "STS.128"),  # of tensor memory
        ([STORE, "SYNCS.ARRIVE.TRANS64 RZ, [UR4], R3"], "STS.128"),  # other threads may wait for that, too
        ([COPY, GROUP, "DEPBAR.LE SB1, 0x0"], None),  # another scoreboard's wait: it is not there yet
        ([COPY, GROUP, "DEPBAR.LE SB1, 0x0", FENCE, READ], "LDGSTS"),
    ],
)
def test_a_fence_between_writes_and_descriptors(lines, found, reader):
    findings = sass.missing_fences(listing(*lines, reader, "EXIT"))
    assert bool(findings) == bool(found), findings
    if found:
        assert reader.split()[0] in findings[0]
        assert f"without a fence after {found}" in findings[0]


@pytest.mark.parametrize("fenced", [True, False])
def test_a_fence_in_every_round_of_a_pipelined_loop(fenced):
    """As Triton 3.7.1 emits it, and as 3.6.0 does, whose one fence stands before the loop."""
    inside = [FENCE] if fenced else ["NOP"]
    lines = [COPY, GROUP, FENCE, f"HEAD: {READ}", BARRIER, *inside, SHARED, WAIT, COPY, GROUP, "@P0 BRA HEAD", "EXIT"]
    assert bool(sass.missing_fences(listing(*lines))) != fenced


def test_where_nothing_is_asynchronous_no_rule_applies():
    """Compute capability 8.0."""
    code = listing(COPY, GROUP, READ, BARRIER, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "STL [R1], R4", "FOO R1", "EXIT")
    assert [rule(code) for rule in (sass.early_registers, sass.missing_fences, sass.unknown)] == [[], [], []]


def test_a_listing_of_several_functions_is_refused():
    with pytest.raises(ValueError, match="several functions"):
        sass.Listing.parse(2 * "\t\tFunction : kernel\n        /*0000*/                   EXIT ;\n")


def test_an_unknown_instruction_beside_products_is_reported():
    assert sass.unknown(listing(PRODUCT, "FOO.X R1, R2", WAIT)) == ["FOO is unknown to bert_fast/tuning/sass.py"]


def test_what_is_inside_a_loop():
    code = listing("NOP", "HEAD: STL [R1], R4", "@P0 BRA PAST", "@P1 BRA HEAD", "PAST: LDL R4, [R1]", "EXIT")
    assert code.looped == {1, 2, 3}


@pytest.mark.parametrize(("between", "idle"), [(10 * ["NOP"], 1), (80 * ["NOP"], 0), ([SHARED], 0)])
def test_a_wait_that_follows_another_at_once(between, idle):
    assert sass.idle_waits(listing(PRODUCT, WAIT, *between, WAIT, "EXIT")) == idle


@pytest.mark.parametrize(
    ("instruction", "size"),
    [("LDG.E.128", 16), ("LDG.E", 4), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.EF.64", 8), ("STG.E.U8", 1),
     ("LDG.E.ENL2.256", 32), ("LDGSTS.E.BYPASS.128", 16), ("LDGSTS.E.LTC128B.128", 16), ("LDG.E.LTC128B", 4)],
)  # fmt: skip
def test_bytes_of_an_access(instruction, size):
    assert sass.access_bytes(instruction) == size
