"""Phase 2: is it right on the GPU? The whole model against float64, then the suite's tests that run on a device."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_results import INTERRUPTED, Results
from numerical_parity import compare
from workload import model_config, random_batch

ROOT = Path(__file__).resolve().parent.parent
# The time may be up before the last file. The first two are the only tests of real CUDA graphs, from which the training
# that is timed is replayed; on a CPU a stand-in takes their place. The operators' tests run on a CPU too, interpreted.
FIRST = ("test_captured_step.py", "test_pretrain_recorded.py", "test_attention.py", "test_mlm_loss.py",
         "test_residual_layernorm.py", "test_embedding_layernorm.py", "test_bias_gelu.py", "test_optim.py",
         "test_gradients_in_place.py")  # fmt: skip
# A file whose imports are not all there (packages that only this project's own environment has) keeps no other back.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "gpu_pytest", "-p", "no:cacheprovider",
          "--continue-on-collection-errors"]  # fmt: skip


def device_tests() -> list[Path]:
    """The test files that choose a device (``DEVICE`` of tests/parity.py), those of FIRST first."""
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
    """Fills "parity": {"passed", "failed", "finished", "models", ...}.

    No failure keeps what comes after it from running. Raises RuntimeError at the end where a whole model was not found
    right, so that the phase does not end as one that is done; tests that failed are told, no more: some may lack a
    package here.
    """
    parity = results.data.setdefault(
        "parity", {"passed": 0, "failed": [], "skipped": 0, "finished": False, "models": []}
    )
    results.save()
    sizes = [("micro", [24, 9], 24)] if options.smoke else [("base", [512, 84, 301, 512], 512)]
    for model, lengths, seq in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            check_model(results, parity, model, lengths, seq, options.device, dtype)
    if "tests" not in results.begun(2):
        results.begun(2).append("tests")
        results.save()
        run_tests(results, parity, options)
    elif not parity["finished"] and "not_run" not in parity and "stopped" not in parity:
        parity["stopped"] = "the process that had started them ended"
        take_what_is_left(results, parity)
    wrong = [f"{x['model']} {x['dtype']}" for x in parity["models"] if "failed" in x or x["passed"] != x["compared"]]
    if wrong:
        raise RuntimeError(f"whole models that were not found right, see their lines: {', '.join(wrong)}")


def check_model(
    results: Results, parity: dict, model: str, lengths: list[int], seq: int, device: str, dtype: torch.dtype
) -> None:
    """Adds the row of one whole model to those of ``parity``, also where it crashes, or did in a process before."""
    name = str(dtype).removeprefix("torch.")
    key, facts = f"{model} {name}", {"model": model, "dtype": name}
    begun = key in results.begun(2)
    try:
        results.case(2, key, "parity_rows", facts, lambda: whole_model(model, lengths, seq, device, dtype))
    finally:  # where the device is lost too
        parity["models"] += results.data.pop("parity_rows", [])
        if begun and not any(facts.items() <= row.items() for row in parity["models"]):
            parity["models"].append(facts | {"failed": INTERRUPTED})
        results.save()


def run_tests(results: Results, parity: dict, options) -> None:
    """pytest in a process of its own, over as many processes as help, until the time of this phase is up."""
    if importlib.util.find_spec("pytest") is None:
        parity["not_run"] = "pytest is not installed"
        results.save()
        return
    outcomes, log = files_of_tests(results)
    outcomes.unlink(missing_ok=True)
    files = [ROOT / "tests" / "test_packing.py"] if options.smoke else device_tests()
    command = [*PYTEST]
    if not options.smoke and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--maxschedchunk", "2"]
    environment = os.environ | {"BERT_FAST_TEST_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    start = time.time()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *map(str, files)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.time() < options.until:
                time.sleep(0.5)
                read_outcomes(parity, outcomes)
                results.save()  # also before the first outcome, which may take minutes: who supervises sees work go on
        finally:
            in_time = process.poll() is not None
            if not in_time:
                os.killpg(process.pid, 9)
            process.wait()
    parity["finished"] = process.returncode in (0, 1)
    if not parity["finished"]:
        parity["stopped"] = f"pytest ended with status {process.returncode}" if in_time else "the time was up"
    parity["seconds"] = time.time() - start
    take_what_is_left(results, parity)
    print(f"   tests: {parity['passed']} passed, {len(parity['failed'])} failed", flush=True)


def files_of_tests(results: Results) -> tuple[Path, Path]:
    """Where gpu_pytest.py writes what each test gave, and where pytest writes what it prints."""
    return tuple(results.path.with_name(f"{results.path.stem}-tests.{kind}") for kind in ("jsonl", "log"))


def take_what_is_left(results: Results, parity: dict) -> None:
    """Take the tests' outcomes into the results after the last one, and the end of the log where not all passed."""
    outcomes, log = files_of_tests(results)
    read_outcomes(parity, outcomes)
    passed = parity["finished"] and not parity["failed"]
    if log.exists():
        parity["log_tail"] = "" if passed else log.read_text(encoding="utf-8", errors="replace")[-3000:]
    results.save()
    outcomes.unlink(missing_ok=True)
    log.unlink(missing_ok=True)


def read_outcomes(parity: dict, outcomes: Path) -> None:
    """Take what is known by now into ``parity``."""
    if not outcomes.exists():
        return
    lines = outcomes.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    parity["passed"] = sum(row["outcome"] == "passed" for row in rows)
    parity["skipped"] = sum(row["outcome"] == "skipped" for row in rows)
    parity["failed"] = [row for row in rows if row["outcome"] == "failed"]
