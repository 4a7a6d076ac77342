"""Phase 2: is it right on the GPU? The whole model against float64, then the suite's tests that run on a device."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_results import Results
from numerical_parity import compare
from workload import model_config, random_batch

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("test_attention.py", "test_mlm_loss.py", "test_residual_layernorm.py", "test_embedding_layernorm.py",
         "test_bias_gelu.py", "test_optim.py", "test_captured_step.py", "test_gradients_in_place.py")  # fmt: skip
# A file whose imports are not all there (packages that only this project's own environment has) keeps no other back.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "gpu_pytest", "-p", "no:cacheprovider",
          "--continue-on-collection-errors"]  # fmt: skip


def device_tests() -> list[Path]:
    """The test files that choose a device (``DEVICE`` of tests/parity.py), operators first."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "import DEVICE" in path.read_text("utf-8")]
    return sorted(files, key=lambda path: FIRST.index(path.name) if path.name in FIRST else len(FIRST))


def whole_model(model: str, lengths: list[int], seq: int, device: str, dtype: torch.dtype) -> dict:
    """Loss and every gradient, ours and the reference's, each against the reference in float64."""
    config = model_config(model, dropout=0.0)
    batch = random_batch(lengths, max(2, sum(lengths) * 15 // 100), seq, device, nsp=True, vocabulary=config.vocab_size)
    rows = compare(config, batch, device, dtype, nsp=True, progress=lambda text: None)
    worst = max(rows, key=lambda row: row["error"] / row["bound"])
    return {
        "passed": sum(row["passed"] for row in rows),
        "compared": len(rows),
        "worst": f"{worst['what']} {worst['error']:.2e}, bound {worst['bound']:.2e}",
        "failures": [row for row in rows if not row["passed"]],
    }


def run(results: Results, options) -> None:
    """Fills "parity": {"passed", "failed", "finished", "models", ...}. A failure is told; nothing ends by it."""
    parity = results.data.setdefault(
        "parity", {"passed": 0, "failed": [], "skipped": 0, "finished": False, "models": []}
    )
    results.save()
    sizes = [("micro", [24, 9], 24)] if options.smoke else [("base", [512, 84, 301, 512], 512)]
    for model, lengths, seq in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            results.case(
                2, f"{model} {name}", "parity_rows", {"model": model, "dtype": name},
                lambda m=model, n=lengths, s=seq, d=dtype: whole_model(m, n, s, options.device, d),
            )  # fmt: skip
    parity["models"] = [row for row in results.data.pop("parity_rows", []) if "failed" not in row]
    results.save()
    if "tests" not in results.begun(2):
        results.begun(2).append("tests")
        run_tests(results, parity, options)


def run_tests(results: Results, parity: dict, options) -> None:
    """pytest in a process of its own, over as many processes as help, until the time of this phase is up."""
    if importlib.util.find_spec("pytest") is None:
        parity["not_run"] = "pytest is not installed"
        results.save()
        return
    outcomes = results.path.with_name(results.path.stem + "-tests.jsonl")
    outcomes.unlink(missing_ok=True)
    files = [ROOT / "tests" / "test_packing.py"] if options.smoke else device_tests()
    command = [*PYTEST]
    if not options.smoke and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--maxschedchunk", "2"]
    environment = os.environ | {"BERT_FAST_TEST_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    log = results.path.with_name(results.path.stem + "-tests.log")
    start = time.time()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *map(str, files)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.time() < options.until:
                time.sleep(0.5)
                read_outcomes(results, parity, outcomes)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait()
    parity["finished"] = process.returncode in (0, 1)
    parity["seconds"] = time.time() - start
    parity["log_tail"] = "" if process.returncode == 0 else log.read_text(encoding="utf-8", errors="replace")[-3000:]
    log.unlink()
    read_outcomes(results, parity, outcomes)
    outcomes.unlink(missing_ok=True)
    print(f"   tests: {parity['passed']} passed, {len(parity['failed'])} failed", flush=True)


def read_outcomes(results: Results, parity: dict, outcomes: Path) -> None:
    """Take what is known by now into the results."""
    if not outcomes.exists():
        return
    lines = outcomes.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    parity["passed"] = sum(row["outcome"] == "passed" for row in rows)
    parity["skipped"] = sum(row["outcome"] == "skipped" for row in rows)
    parity["failed"] = [row for row in rows if row["outcome"] == "failed"]
    results.save()
