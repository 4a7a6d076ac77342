"""The kernels compile for every GPU generation within its limits, and the report says so when they do not.

Ahead-of-time compilation needs no GPU, but a process in which Triton does not interpret: the report runs as a command.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dev import compile_report

ROOT = Path(__file__).resolve().parents[2]

SPILLING = """
import triton
import triton.language as tl


@triton.jit
def _kernel(x_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    x = tl.load(x_ptr + index)  # 512 elements a thread, all alive until the maximum is known
    tl.store(out_ptr + index, x - tl.max(x, axis=0))


def launch(x, out):
    _kernel[(1,)](x_ptr=x, out_ptr=out, N=16384)


def aot_cases(capability):
    return [{"kernel": _kernel, "name": "spilling", "signature": {"x_ptr": "*fp32", "out_ptr": "*fp32"},
             "constexprs": {"N": 16384}, "num_warps": 1, "num_stages": 1, "divisible_by_16": ["x_ptr", "out_ptr"],
             "dot": False}]
"""

PRODUCT = """
import triton
import triton.language as tl


@triton.jit
def _kernel(a_ptr, b_ptr, out_ptr, K, N: tl.constexpr):
    index = tl.arange(0, N)
    offset = index[:, None] * N + index[None, :]
    total = tl.zeros((N, N), tl.float32)
    for k in range(0, K):
        total = tl.dot(tl.load(a_ptr + k * N * N + offset), tl.load(b_ptr + k * N * N + offset), total)
    tl.store(out_ptr + offset, total)


def launch(a, b, out):
    _kernel[(1,)](a_ptr=a, b_ptr=b, out_ptr=out, K=8, N=128)


def aot_cases(capability):
    return [{"kernel": _kernel, "name": "product",
             "signature": {"a_ptr": "*KIND", "b_ptr": "*KIND", "out_ptr": "*fp32", "K": "i32"},
             "constexprs": {"N": 128}, "num_warps": WARPS, "num_stages": STAGES,
             "divisible_by_16": ["a_ptr", "b_ptr", "out_ptr"], "dot": True}]
"""

ROWS = """
import triton
import triton.language as tl


@triton.jit
def _kernel(x_ptr, out_ptr, edge, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=index < EDGE, other=0.0) + 1.0, mask=index < EDGE)


def launch(x, out):
    _kernel[(1,)](x_ptr=x, out_ptr=out, edge=8, N=1024)


def aot_cases(capability):
    return [{"kernel": _kernel, "name": "NAME", "signature": {"x_ptr": "*bf16", "out_ptr": "*bf16", "edge": "i32"},
             "constexprs": {"N": 1024}, "num_warps": 4, "num_stages": 1, "divisible_by_16": ["x_ptr", "out_ptr"],
             "dot": False}]
"""

# The operators' own launchers, up to where they ask Triton for machine code of compute capability 9.0
LAUNCHES = """
import torch
from triton import knobs
from triton.runtime import driver, jit

from bert_fast.kernels import attention, bias_gelu, embedding_layernorm, residual_layernorm, rows
from dev import compile_report

driver.set_active(compile_report._NoDevice(90))
rows.capability = lambda device: 90
run = jit.JITFunction.run
jit.JITFunction.run = lambda self, *given, **options: run(self, *given, **options | {"warmup": True})
knobs.compilation.listener = lambda *, src, cache_hit, **_: print(src.name, "found" if cache_hit else "compiled")

x, u, bias = torch.zeros(19, 768, dtype=torch.bfloat16), torch.zeros(19, 3072, dtype=torch.bfloat16), torch.zeros(3072)
weight, key, rng_key = torch.ones(768), torch.zeros(19, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
rows_of = (key, rng_key)
bias_gelu.bias_gelu_fwd(u, bias)
_, z, mean, rstd = residual_layernorm.residual_layernorm_fwd(x, weight, x, weight, weight, *rows_of, 1e-12, P, 3)
if P:
    residual_layernorm.residual_layernorm_bwd(x, z, mean, rstd, weight, *rows_of, P, 3, x.dtype, True)
    bias_gelu.bias_gelu_bwd(u, u, bias)
    ids, table = torch.zeros(19, dtype=torch.int64), torch.zeros(40, 768)
    embedding_layernorm.embedding_layernorm_fwd(
        ids, ids, ids, table, table, table, weight, weight, *rows_of, 1e-12, P, 3, 0, x.dtype
    )
    qkv, cu_seqlens = torch.zeros(19, 3, 12, 64, dtype=torch.bfloat16), torch.tensor([0, 19], dtype=torch.int32)
    out, lse = attention.attention_fwd(qkv, cu_seqlens, 512, *rows_of, 0.125, P, 3)
    attention.attention_bwd(out, qkv, out, lse, cu_seqlens, 512, *rows_of, 0.125, P, 3, torch.float32)
"""

UNCOVERED = SPILLING.split("def aot_cases")[0]


def _product(kind="bf16", warps=8, stages=2):
    return PRODUCT.replace("KIND", kind).replace("WARPS", str(warps)).replace("STAGES", str(stages))


def _row(**changed):
    numbers = {"kernel": "attention one_pass", "target": 90, "warps": 8, "registers": 255, "spills": 0}
    numbers |= {"local_bytes": 0, "shared_bytes": 0, "programs": 1, "occupancy": 0.1, "tensor_core": {"HGMMA": 24}}
    numbers |= {"product_waits": 3, "bulk_copies": 0, "wide": None}
    return compile_report.Row(**numbers | changed)


def _report(*arguments, timeout=590, **variables):
    environment = {**os.environ, "TRITON_INTERPRET": "1"} | variables  # the report must clear it by itself
    command = [sys.executable, str(ROOT / "dev" / "compile_report.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)


def _report_of(tmp_path, source, target):
    (tmp_path / "candidate.py").write_text(source)
    done = _report("--folder", tmp_path, "--targets", target, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text()) if (tmp_path / "report.json").exists() else None
    return done, report


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_kernel_keeps_the_rules(tmp_path, target):
    done = _report("--targets", target, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    stated = json.loads(compile_report.OCCUPANCY.read_text())
    assert {row["kernel"] for row in report["rows"]} == {name for name, on in stated.items() if str(target) in on}
    assert report["versions"].keys() == {"triton", "ptxas"}


@pytest.mark.parametrize(
    "kernel",
    [
        "attention fwd D=64 bf16",
        "attention asynchronous fwd bf16",
        "attention one_pass S=512 bf16",
        "embedding_layernorm",
        "bias_gelu",
        "mlm_loss",
    ],
)
def test_kernels_keep_the_rules_on_sm_90(kernel):
    done = _report("--targets", "90", "--kernels", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    assert kernel in done.stdout


@pytest.mark.parametrize("target", [90, 100])
def test_two_programs_of_the_feed_forward_share_a_multiprocessor(tmp_path, target):
    """One computes GELU while the other multiplies; operands and results go by the tensor memory accelerator."""
    done = _report("--targets", target, "--kernels", "H=1024 bf16", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {f"feed_forward {d} H=1024 bf16" for d in ("fwd", "bwd")}
    assert all(row["occupancy"] * 64 >= 2 * row["warps"] and row["bulk_copies"] for row in rows)


@pytest.mark.slow
def test_a_row_of_residual_layernorm_is_one_warps(tmp_path):
    """Its sums take neither shared memory nor a barrier; in float32 the backward's registers are those of two warps."""
    done = _report("--targets", "90", "--kernels", "residual_layernorm fwd,residual_layernorm bwd", "--json",
                   tmp_path / "report.json")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads((tmp_path / "report.json").read_text())["rows"]:
        alone = "bwd" not in row["kernel"] or "fp32" not in row["kernel"]
        assert row["warps"] == (1 if alone else 2), row
        assert (row["shared_bytes"] == 0) == alone, row


def test_mlm_loss_reads_and_writes_logits_by_sixteen_bytes(tmp_path):
    """A mask that ends at 30522, a multiple of 2 alone, would split accesses of 16-bit logits into such of 4 bytes."""
    done = _report("--targets", "90", "--kernels", "mlm_loss fwd V=30522 grads", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads((tmp_path / "report.json").read_text())["rows"]:
        assert row["wide"] > 0.6, row  # what is left are bias and the numbers of a row


def test_spilling_kernel_is_reported(tmp_path):
    done, report = _report_of(tmp_path, SPILLING, 90)
    assert done.returncode == 1, done.stdout + done.stderr
    assert report["rows"][0]["spills"] > 0
    assert "spill registers" in done.stdout


def test_too_much_shared_memory_is_reported(tmp_path):
    done, report = _report_of(tmp_path, _product(stages=6), 80)
    assert done.returncode == 1, done.stdout + done.stderr
    assert report["rows"][0]["shared_bytes"] > 163 * 1024
    assert "bytes of shared memory, the limit is" in done.stdout


@pytest.mark.parametrize(("target", "opcode"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_core_instructions_are_found(tmp_path, target, opcode):
    done, report = _report_of(tmp_path, _product(), target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert opcode in report["rows"][0]["tensor_core"]


def test_product_on_the_slow_path_is_reported(tmp_path):
    """With two warps Hopper's own products, which take four, are out of reach."""
    done, report = _report_of(tmp_path, _product(warps=2), 90)
    assert "HMMA" in report["rows"][0]["tensor_core"]
    assert done.returncode == 1, done.stdout + done.stderr
    assert "products without HGMMA" in done.stdout


@pytest.mark.parametrize(("name", "edge", "broken"), [
    ("bias_gelu fwd", "2048", False), ("bias_gelu fwd", "edge", True), ("mlm_loss fwd", "edge", False),
])  # fmt: skip
def test_a_row_operator_that_reads_single_elements_is_reported(tmp_path, name, edge, broken):
    """A mask whose edge is not known splits an access; other operators than the row ones are shown, not judged."""
    done, report = _report_of(tmp_path, ROWS.replace("NAME", name).replace("EDGE", edge), 90)
    assert done.returncode == int(broken), done.stdout + done.stderr
    assert report["rows"][0]["wide"] == (1.0 if edge == "2048" else 0.0)
    assert ("are read and written by 16" in done.stdout) == broken


@pytest.mark.parametrize(("waits", "asynchronous", "broken"), [(24, True, True), (3, True, False), (24, False, False)])
def test_products_made_to_wait_in_turn_are_reported(waits, asynchronous, broken):
    """By the assembler, in a kernel that issues them asynchronously itself; in others they are shown, not judged."""
    row = _row(product_waits=waits)
    assert bool(compile_report.broken_rules(row, compile_report.PARTS[90], True, 0, asynchronous)) == broken
    assert f"HGMMA 24, {waits} waits" in compile_report.table([row])


@pytest.mark.parametrize("idle", [0, 1])
def test_a_wait_that_follows_another_at_once_is_reported(idle):
    row = _row(idle_waits=idle)
    assert len(compile_report.broken_rules(row, compile_report.PARTS[90], True, 0, True)) == idle
    assert not compile_report.broken_rules(row, compile_report.PARTS[90], True, 0, False)


SPILL = "/*0000*/ HGMMA.64x64x16.F32 R56, R24, gdesc[UR16], R56, gsb0 ;\n/*0010*/ STL [R1], R9 ;"
OVERWRITTEN = "/*0000*/ HGMMA.64x64x16.F32 R56, R24, gdesc[UR16], R56, gsb0 ;\n/*0010*/ CS2R R24, SRZ ;"
UNFENCED = "/*0000*/ STS [R2], R4 ;\n/*0010*/ BAR.SYNC 0x0 ;\n/*0020*/ UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;"
UNKNOWN = "/*0000*/ HGMMA.64x64x16.F32 R56, R24, gdesc[UR16], R56, gsb0 ;\n/*0010*/ FOO R1, R2 ;"


@pytest.mark.parametrize(("code", "rule", "said"), [
    (SPILL, "spills", "1 instructions spill registers, 0 of them in a loop"),
    (OVERWRITTEN, "registers", "CS2R at 0010 writes R24, operand of HGMMA"), (UNFENCED, "fences", "without a fence"),
    (UNKNOWN, "unknown", "FOO is unknown"),
])  # fmt: skip
def test_what_the_instructions_break_is_reported(code, rule, said):
    """And is listed as known instead where that very rule is tolerated, and no other."""
    listing, fault = compile_report.sass.Listing.parse(code), compile_report.compilers.Fault
    for faults in ((), [fault(rule, "seen before")], [fault("another", "tolerated", True)]):
        row = _row()
        compile_report.judge_code(row, listing, faults)
        assert [said in line for line in row.broken] == [True]
        assert row.known == []
    row = _row()
    compile_report.judge_code(row, listing, [fault(rule, "seen before", True)])
    assert (len(row.broken), len(row.known)) == ((1, 0) if rule == "spills" else (0, 1))


@pytest.mark.parametrize(("stated", "said"), [
    ({"attention one_pass": {"90": 2}}, "1 programs fit a multiprocessor, occupancy.json states 2"),
    ({"attention one_pass": {"90": 1, "100": 2}}, None), ({"attention one_pass": {"90": 0}}, None),
    ({"attention one_pass": {"100": 1}}, "does not state how many programs fit a multiprocessor: 1"),
    ({"attention one_pass": {"90": 2, "90 by Triton 3.6": 1}}, "states 2"),
    ({"attention one_pass": {"90": 1, "90 by Triton 3.7": 2}}, "states 2"),
    ({"attention one_pass": {"90": 2, "90 by Triton 3.7": 1}}, None), ({}, "does not state"),
])  # fmt: skip
def test_a_lost_occupancy_step_is_reported(stated, said):
    row = _row()
    compile_report.judge_occupancy(row, stated, "3.7.1")
    assert [said in line for line in row.broken] == ([True] if said else [])


def _compilations(cache, p):
    """What the operators' launchers do with dropout ``p``: (kernel, whether it is found or compiled)."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", LAUNCHES.replace("P,", f"{p},").replace("if P:", f"if {p}:")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=590, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [tuple(line.split()) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("p", "kernels", "launches"), [
    (0.0, "bias_gelu fwd F=3072,residual_layernorm fwd H=768 p=0.0", 2),
    pytest.param(0.1, "attention fwd D=64 bf16 p=0.1,attention dq D=64 bf16 p=0.1,attention dkv D=64 bf16 p=0.1,"
                 "attention bias,bias_gelu,residual_layernorm fwd H=768 p=0.1,residual_layernorm bwd H=768 p=0.1,"
                 "residual_layernorm sum,embedding_layernorm fwd H=768 p=0.1", 11, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_the_report_compiles_is_found_by_the_launchers(tmp_path, p, kernels, launches):
    """Under Triton's own keys: a cache that was made where there is no GPU saves its first minutes."""
    done = _report("--targets", "90", "--kernels", kernels, TRITON_CACHE_DIR=str(tmp_path / "made"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = _compilations(tmp_path / "made", p)
    assert [state for _, state in found] == ["found"] * launches, found
    if not p:
        assert [state for _, state in _compilations(tmp_path / "empty", p)] == ["compiled"] * launches


def test_launched_kernel_without_a_case_is_reported(tmp_path):
    (tmp_path / "covered.py").write_text(_product())
    done, _ = _report_of(tmp_path, UNCOVERED, 90)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "candidate.py: _kernel is launched but in no aot_cases" in done.stdout


def test_nothing_to_compile_is_an_error(tmp_path):
    done = _report("--kernels", "no such kernel")
    assert done.returncode == 2
    assert "no case" in done.stderr


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "tensor_memory", "expected"),
    [(32, 0, 4, 0, 16), (128, 0, 4, 0, 4), (129, 0, 4, 0, 3), (255, 0, 4, 0, 2), (64, 100 * 1024, 4, 0, 2),
     (168, 0, 8, 0, 1), (16, 0, 1, 0, 32), (64, 0, 4, 256, 2), (217, 0, 1, 0, 8), (80, 0, 1, 0, 24)],
)  # fmt: skip
def test_programs_that_fit_a_multiprocessor(registers, shared, warps, tensor_memory, expected):
    """Known cases of an sm_90 (and 512 columns of tensor memory): 64 warps, 65536 registers, 228 KiB, 32 programs."""
    assert compile_report.programs(compile_report.PARTS[90], registers, shared, warps, tensor_memory) == expected
