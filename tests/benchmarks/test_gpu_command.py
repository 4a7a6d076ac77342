"""`make gpu` without a GPU: its cases on the CPU, cut off in the middle, killed, hung and lost; and what is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import device_tests, gpu, limits, operators, report, results, supervise, tables, tune
from benchmarks.results import Results
from benchmarks.supervise import Case
from bert_fast import choice, dispatch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
HOUR = 3600.0  # seconds that no case here needs, on whatever machine
FULL = {"model": "large", "seq": 512, "lengths": "full"}


def new_results(path: Path, **data) -> Results:
    environment = {"versions": {"torch": "2.11", "transformers": "5.23.0"}}
    return Results(path, {"schema": 2, "kind": "gpu", "device": "Example GPU", "smoke": False, "date": "2026-01-02",
                          "commit": "abc1234", "command": ["x"], "environment": environment, **data})  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Tiny sizes."""
    monkeypatch.setitem(operators.clock.CACHE_BYTES, "cpu", 1 << 16)
    return gpu.Run(smoke=True, until=time.time() + HOUR)


@pytest.fixture
def interpreted(monkeypatch):
    """The launchers that a GPU would run."""
    pytest.importorskip("triton")
    monkeypatch.setitem(operators.clock.CACHE_BYTES, "cpu", 1 << 16)
    with dispatch.use_backend("triton"):
        yield


# --------------------------------------------------------------------------------------------------------------
# The cases


def test_what_is_to_be_known_first_fits_a_quarter_of_an_hour():
    cases = gpu.Run(False, 0.0).cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert names[:4] == ["versions", "limits", "gate: operators and the step against float64", "attention"]
    order = ["headline, large 512 full", "hf-compile, large 512 full", "profiles", "row operators", "headline, base",
             "tests on the device", "launch grids of the two worst", "candidates, large"]  # fmt: skip
    found = [next(n for n, name in enumerate(names) if name.startswith(start)) for start in order]
    assert found == sorted(found)
    at = found[order.index("launch grids of the two worst")]
    assert 500 <= sum(case.seconds for case in cases[: at + 1]) <= 570
    assert all(case.seconds > 0 for case in cases)


def test_a_gate_limits_and_a_table(tmp_path, small):
    found = new_results(tmp_path / "r.json")
    small.versions(found)
    small.measure_limits(found)
    small.gate(found)
    small.measure_steps("micro", 512, "wikipedia", ("bert_fast", "hf-sdpa", "hf-flash"), found)
    data = json.loads((tmp_path / "r.json").read_text())
    assert {"cuda", "cudnn", "driver", "ptxas"} <= data["environment"]["versions"].keys()
    assert data["limits"]["matmul_tflops"]["bfloat16"] > 0 < data["limits"]["copy_gbs"]
    assert [x["what"] for x in data["parity"]] == [*operators.OPERATORS, "the step of micro"]
    assert all(x["passed"] and x["compared"] >= 2 for x in data["parity"])
    assert [(x["contender"], x["padding"]) for x in data["steps"][:3]] == [
        ("bert_fast", "packed"), ("hf-sdpa", "padded"), ("hf-sdpa", "longest"),
    ]  # fmt: skip
    assert [x.get("predicted_s", 0) > 0 for x in data["steps"]] == [True, False, False, False]
    assert "failed" in data["steps"][3]  # flash-attn, which is told where it is not installed
    text = report.beside({**data, "cases": []})
    for title in ("## Limits", "## Parity", "## Whole steps"):
        assert title in text


def test_operators_beside_their_contenders_and_predictions(tmp_path, small):
    found = new_results(tmp_path / "r.json", limits={"matmul_tflops": {"float32": 0.1}, "copy_gbs": 10.0})
    small.measure_operators("micro", 512, "full", ("bias_gelu", "mlm_loss"), found)
    rows = {(x["operator"], x["direction"], x["contender"]): x for x in found.data["operators"]}
    assert rows["mlm_loss", "forward", "three products"]["ms"] > 0
    assert ("mlm_loss", "backward", "three products") not in rows
    for (operator, _, contender), x in rows.items():
        assert x["ms"] > 0
        assert ("ours_is" in x) == (contender != "bert_fast")
        assert ("predicted_ms" in x) == (contender == "bert_fast" and operator != "norm")
    assert {("adamw", "update", "torch AdamW, fused"), ("lamb", "update", "LAMB in PyTorch")} <= rows.keys()
    assert {x["weights"] for x in found.data["operators"] if "weights" in x} == {"float32", "bfloat16"}
    assert tables.operators(found.data["operators"]).markdown().count("\n") >= 7


def test_the_products_of_mlm_loss_alone(monkeypatch):
    # a vocabulary that is no multiple of 128, as BERT's is not
    monkeypatch.setitem(operators.model_config.__globals__["MODELS"]["micro"], "vocab_size", 200)
    case = operators.build_case("mlm_loss", "cpu", torch.float32, model="micro", seq=24, batch=4)
    hidden, word, _ = (x.detach() for x in case.inputs)
    logits, grad_hidden, grad_word = operators.call_of(case, "forward", operators.PRODUCTS)()
    assert logits.shape == (len(hidden), 256)
    torch.testing.assert_close(logits[:, :200], hidden @ word.T)
    torch.testing.assert_close(grad_hidden, hidden @ word.T @ word)
    torch.testing.assert_close(grad_word[:200], word @ hidden.T @ hidden)


def test_products_by_another_library(monkeypatch):
    """Chosen inside the block alone, also where a product fails."""
    chosen = ["cublas"]

    def preferred(library=None):
        if library is not None:
            chosen.append(library)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    with pytest.raises(RuntimeError, match="no such product"), limits.multiplied_by("cublaslt"):
        raise RuntimeError("no such product")
    assert chosen == ["cublas", "cublaslt", "cublas"]


@pytest.mark.slow
def test_every_case_as_a_user_runs_it(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--budget", "3000", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert {x["state"] for x in data["cases"]} == {"done"}
    assert [x["case"] for x in data["cases"]] == [case.name for case in gpu.Run(True, 0.0).cases()]
    assert data["tests"]["finished"] is True
    assert data["tests"]["passed"] > 0
    for table in ("parity", "steps", "operators", "profiles", "products", "curves", "tune", "choices"):
        assert data[table], table
    assert [len(curve["losses"]) for curve in data["curves"]] == [4, 4]
    text = path.with_suffix(".md").read_text()
    assert "no figure here means anything" in text
    assert "What failed" not in text
    names = {picture.name.removeprefix(path.stem) for picture in tmp_path.glob("*.png")}
    assert names == {"-roofline.png", "-throughput.png", "-loss.png"}


def test_bad_arguments(capsys, monkeypatch):
    for arguments, message in (
        ([], "torch sees no GPU"), (["--smoke", "--case", "no such case"], "--list prints them"),
        (["--smoke", "--budget", "0"], "above 0"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="2"):
            gpu.main(arguments)
        assert message in capsys.readouterr().err
    assert gpu.main(["--list", "--budget", "100"]) == 0
    assert "candidates, large 512 wikipedia" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------
# What fails


WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import supervise
from benchmarks.results import Results
from benchmarks.supervise import Case

def second(found):
    found.add("operators", {{"row": "of the second, before"}})
    {second}

def last(found):
    found.add("operators", {{"row": "of the last"}})

cases = [Case("first", 0.1, lambda found: found.add("operators", {{"row": "of the first"}})),
         Case("second", 0.1, second), Case("dear", 1e6, last), Case("last", 0.1, last)]
sys.exit(supervise.work(cases, Results(Path(sys.argv[1])), time.time() + {HOUR}))
"""
LOST = "supervise.raise_if_device_lost = lost; raise RuntimeError('an illegal memory access')"


@pytest.mark.parametrize(
    ("second", "state", "told"),
    [
        ("raise RuntimeError('no such kernel\\nsecond line')", "failed", "RuntimeError: no such kernel"),
        ("os.kill(os.getpid(), 9)", "lost", "its process ended with status -9"),
        pytest.param(
            "time.sleep(1000)", "lost", "it wrote nothing for too long, and was ended", marks=pytest.mark.slow
        ),
        (LOST, "lost", "the device was lost: DeviceLost: gone"),
    ],
)
def test_a_case_that_fails_dies_hangs_or_loses_the_device_costs_itself(tmp_path, second, state, told):
    """Rows that it had saved stay, and the next cases run; one that there is no time for is left out."""
    code = WORKER.format(root=str(ROOT), second=second, HOUR=HOUR)
    lost = "def lost():\n    raise supervise.DeviceLost('gone')\n\ncases = ["
    command = [sys.executable, "-c", code.replace("cases = [", lost), str(tmp_path / "r.json")]
    found = new_results(tmp_path / "r.json")
    patience = 40.0 if "sleep" in second else HOUR  # its own import of torch is among what it waits for
    supervise.supervise(command, dict(os.environ), found, time.time() + HOUR, patience)
    data = json.loads((tmp_path / "r.json").read_text())
    assert [(x["case"], x["state"]) for x in data["cases"]] == [
        ("first", "done"), ("second", state), ("dear", "left out"), ("last", "done"),
    ]  # fmt: skip
    assert data["cases"][1]["error"] == told
    assert [x["row"] for x in data["operators"]] == ["of the first", "of the second, before", "of the last"]
    text = report.beside({**data, "operators": []})
    assert f"- second: {told}" in text
    assert "Left out, as there was no time for them: dear." in text


def test_a_worker_that_cannot_start_is_not_started_for_ever(tmp_path):
    found = new_results(tmp_path / "r.json")
    supervise.supervise([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), found, time.time() + HOUR)
    (row,) = found.data["cases"]
    assert row["error"] == "it ended with status 3 before its first case"


def test_a_worker_at_the_end_of_its_time_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.5)
    found = new_results(tmp_path / "r.json", cases=[{"case": "long", "price": 1e3, "state": "begun"}])
    mark = str(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(1000)", mark]
    supervise.supervise(command, dict(os.environ), found, time.time() + 0.5)
    assert children_with(mark) == []
    assert found.data["cases"][0]["error"] == "the time was up"


def test_a_case_begun_before_is_not_begun_again(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "end_with_parent", lambda: None)
    found, told = new_results(tmp_path / "r.json"), []
    cases = [Case(name, 1.0, lambda _, name=name: told.append(name)) for name in "abc"]
    found.add("cases", {"case": "b", "price": 1.0, "state": "lost"})
    assert supervise.work(cases, found, time.time() + HOUR) == 0
    assert told == ["a", "c"]
    assert supervise.work(cases, found, time.time() + HOUR) == 0
    assert told == ["a", "c"]


def test_killed_in_the_middle_it_leaves_the_finished_rows_and_no_process(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--case", "loss curve", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cases, deadline = [], time.time() + 240
    try:
        while len(cases) < 3 and time.time() < deadline and process.poll() is None:
            time.sleep(0.05)
            for path in tmp_path.glob("*.json"):
                cases = json.loads(path.read_text()).get("cases", [])  # valid whenever it is read
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(cases) >= 3
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["limits"]["copy_gbs"] > 0
    while (left := children_with(str(path))) and time.time() < deadline:
        time.sleep(0.1)
    assert left == []


def children_with(argument: str) -> list[int]:
    """Processes that have ``argument`` on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


# --------------------------------------------------------------------------------------------------------------
# The suite's tests


def test_the_tests_of_real_graphs_come_first():
    files = device_tests.files()
    names = [path.name for path in files]
    assert names[: len(device_tests.FIRST)] == list(device_tests.FIRST)
    assert {"test_optim.py", "test_model.py", "test_mlm_loss.py", "test_accelerate.py"} <= set(names)
    assert "device_tests" in (ROOT / "Makefile").read_text()  # `make gpu-test` has the same list


def run_tests(tmp_path, code: str, *, seconds: float = 120.0) -> tuple[dict, str | None]:
    """What is told of a test file, and what the case raises."""
    file = tmp_path / "test_it.py"
    file.write_text(code)
    found, raised = new_results(tmp_path / "r.json"), None
    try:
        device_tests.run(found, [file], time.time() + seconds)
    except RuntimeError as error:
        raised = str(error)
    return json.loads((tmp_path / "r.json").read_text()), raised


def test_outcomes_of_tests_are_told_also_of_what_cannot_be_imported(tmp_path):
    data, raised = run_tests(tmp_path, "def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    assert (data["tests"]["passed"], data["tests"]["finished"]) == (1, True)
    (failed,) = data["tests"]["failed"]
    assert failed["message"] == "assert 1 == 2"
    assert raised.startswith("1 tests failed, the first: ")
    assert "1 passed, 1 failed.\n- " in report.tests_text(data)
    data, _ = run_tests(tmp_path, "import no_such_package\n")
    assert "no_such_package" in data["tests"]["failed"][0]["message"]
    assert list(tmp_path.glob("r-tests.*")) == []


def test_tests_that_cannot_run_or_do_not_end_are_told_with_the_reason(tmp_path, monkeypatch):
    code = "import time\ndef test_long(): time.sleep(300)\n"
    data, _ = run_tests(tmp_path, code, seconds=4.0)
    assert "0 passed, 0 failed when the time was up." in report.tests_text(data)
    while (left := children_with(str(tmp_path / "test_it.py"))) and time.sleep(0.1) is None:
        pass
    assert left == []
    monkeypatch.setattr(device_tests, "PYTEST", [*device_tests.PYTEST, "--no-such-option"])
    data, _ = run_tests(tmp_path, code)
    assert "pytest ended with status 4" in report.tests_text(data)
    assert "--no-such-option" in data["tests"]["log_tail"]
    monkeypatch.setitem(sys.modules, "pytest", None)  # as where it is not installed
    data, _ = run_tests(tmp_path, code)
    assert report.tests_text(data) == "The suite's tests were not run, as pytest is not installed."


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent died")
def test_tests_end_with_the_worker_that_started_them(tmp_path):
    """Whatever killed it: it had no time to end them."""
    (tmp_path / "test_long.py").write_text("import time\ndef test(): open('begun', 'w').close(); time.sleep(300)\n")
    command = [*device_tests.PYTEST, str(tmp_path)]
    worker = f"import subprocess; subprocess.run({command!r}, start_new_session=True)"
    environment = os.environ | {"BERT_FAST_TEST_OUTCOMES": str(tmp_path / "o"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", worker], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "begun").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert children_with(str(tmp_path)) != []
    process.kill()
    process.wait()
    while (left := children_with(str(tmp_path))) and time.time() < deadline:
        time.sleep(0.05)
    assert left == []


# --------------------------------------------------------------------------------------------------------------
# Launch configurations


def sweep(found: Results, choices: list[dict]) -> dict:
    tune.sweep(found, "bias_gelu", "fwd", "forward", device="cpu", model="micro", seq=24, until=time.time() + HOUR,
               dtype=torch.float32, tokens=48, repeat=1, choices=choices)  # fmt: skip
    return found.data["tune"][0]


@pytest.mark.usefixtures("interpreted")
def test_a_configuration_that_cannot_run_or_computes_something_else_is_not_taken(tmp_path, monkeypatch):
    row = sweep(new_results(tmp_path / "r.json"), [{"num_warps": 2}, {"BLOCK_M": 0}])
    assert row["tried"][0]["us"] > 0
    assert "failed" in row["tried"][1]
    assert row["write"] == "leave it" or row["write"].startswith("kernels/bias_gelu.py, fwd at 24: num_warps=2 (")
    assert not choice.active()
    monkeypatch.setattr(tune, "same", lambda found, expected: False)
    row = sweep(new_results(tmp_path / "r.json"), [{"num_warps": 2}])
    assert row["tried"] == [{"changed": {"num_warps": 2}, "wrong": True}]
    assert row["write"] == "leave it"


@pytest.mark.usefixtures("interpreted")
def test_a_sweep_that_is_ended_tells_which_configuration_ended_it(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for SIGKILL: nothing may catch it."""

    real, calls = tune.same, iter([True, False])

    def same(*arguments):
        if not next(calls):
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(tune, "same", same)
    with pytest.raises(Killed):
        sweep(new_results(tmp_path / "r.json"), [{"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}])
    (row,) = json.loads((tmp_path / "r.json").read_text())["tune"]
    assert row["tried"][1] == {"changed": {"num_warps": 4}, "failed": "its process died, or hung and was ended"}
    assert "cut off after 2 configurations; the fastest: num_warps=2" in report.tune_table({"tune": [row]}).markdown()


def test_the_sweeps_begin_with_the_worst(tmp_path):
    rows = [{"contender": "bert_fast", "operator": name, "share_of_limit": share}
            for name, share in (("attention", 0.4), ("bias_gelu", None), ("mlm_loss", 0.2))]  # fmt: skip
    assert tune.furthest(rows) == ["bias_gelu", "mlm_loss", "attention"]
    assert all(
        tune.configurations(operator, launch) for operator in tune.LAUNCHES for launch, _ in tune.LAUNCHES[operator]
    )
    stages = {kind["num_stages"] for kind in tune.configurations("attention", "dq", 100)}
    assert stages == {1} < {kind["num_stages"] for kind in tune.configurations("attention", "dq", 90)}
    x = torch.randn(100)
    assert operators.same((x, x + 1e-9), (x, x))
    assert not operators.same(x + 1e-3, x)
    assert not operators.same(x * float("nan"), x)


# --------------------------------------------------------------------------------------------------------------
# What a person reads


def measured() -> dict:
    """Two steps, a candidate, one that failed, a profile, and an operator."""
    common = {**FULL, "sequences": 64, "optimizer": "adamw", "dtype": "bfloat16"}
    step = {**common, "real_tokens_per_s": 2e5, "sequences_per_s": 400.0, "executed_tflops": 400.0, "mfu": 0.5,
            "share_of_peak": 0.5, "peak_memory_mib": 30000.0}  # fmt: skip

    def ms(value: float) -> dict:
        return {"step_s": dict.fromkeys(("p20", "p50", "p80"), value / 1e3)}

    operator = {**FULL, "operator": "bias_gelu", "direction": "forward", "dropout": 0.1}
    kernels = [{"kernel": f"kernel<{n}|{n}>", "calls": 2.0, "us": 100.0 - n} for n in range(30)]
    return {
        "limits": {"matmul_tflops": {"bfloat16": 700.0}, "copy_gbs": 2900.0},
        "steps": [
            {**step, **ms(150.0), "contender": "bert_fast", "predicted_s": 0.13},
            {**step, **ms(125.0), "contender": "bert_fast-one-pass", "ours_is": 1 / 1.2,
             "differs": {"loss": 0.0, "gradient": 0.012}},
            {**step, **ms(300.0), "contender": "hf-sdpa", "attention": "cudnn", "ours_is": 2.0},
            {**common, "contender": "hf-compile", "failed": "RuntimeError: no compiler"},
        ],
        "operators": [
            {**operator, "contender": "bert_fast", "ms": 0.2, "gbs": 2600.0, "share_of_limit": 0.9,
             "predicted_ms": 0.18, "bytes": 5e8, "flops": 1e9},
            {**operator, "contender": "pytorch", "ms": 0.5, "ours_is": 2.5},
        ],
        "products": [{"model": "large", "shape": "qkv, forward: 1 x 2 x 3", "ms": 2.0, "tflops": 350.0}],
        "profiles": [{**FULL, "sequences": 64, "kernels_s": sum(x["us"] for x in kernels) / 1e6, "kernels": kernels}],
        "curves": [{"contender": "bert_fast", "losses": [10.0, 8.0]}],
    }  # fmt: skip


def test_the_text_beside_a_file_tells_everything(tmp_path):
    text = report.beside(new_results(tmp_path / "r.json", **measured()).data)
    for told in (
        "# Example GPU, 2026-01-02, commit abc1234",
        "| large 512, full, bfloat16, adamw | bert_fast | 64 | 150.0 (150.0-150.0) | 130.0 |",
        "| hf-sdpa (cudnn) |", "| 2.00x |", "RuntimeError: no compiler",
        "| large 512, full | bert_fast-one-pass | 125.0 | 1.200x | 0.0 %, 1.2 % |",
        "| bias_gelu, forward | 200 | 180 | 2600 GB/s | 90 % | pytorch 500 (2.50x) |",
        "ms of a step of 150.0 ms", "| 5 others | 10 | 365 |", "| kernel<0/0> | 2 | 100 |",
        "| large | qkv, forward: 1 x 2 x 3 | 877 | 1000 | 2000 | 2.00x |",
        "Loss of bert_fast over 2 steps: 10.000 to 9.000",
    ):  # fmt: skip
        assert told in text, told


def test_the_page_has_a_line_a_step_beside_all_others_and_how_it_was_measured(tmp_path, monkeypatch, capsys):
    page, folder = tmp_path / "performance.md", tmp_path / "results"
    page.write_text("")
    monkeypatch.setattr(report, "DOCUMENTS", {page: report.performance})
    for name, more in (("example-gpu", {}), ("trial", {"smoke": True, "device": "Trial"})):
        (folder / name).mkdir(parents=True)
        command = ["benchmarks/gpu.py", "--json", "x.json", "--budget", "9"]
        new_results(folder / name / "2026-01-02-abc1234.json", **measured(), command=command, **more)
    assert report.main(["--results", str(folder), "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert report.main(["--results", str(folder)]) == 0
    assert report.main(["--results", str(folder), "--check"]) == 0
    text = page.read_text()
    assert "Trial" not in text
    assert "Nothing has been measured on a GPU yet" not in text
    for told in (
        "| example-gpu | train large, 64 x 512, full, bfloat16, adamw | 400.00 | 200000 | 50 % | "
        "30000 (30000 to 30000) | bert_fast-one-pass 0.83x; hf-sdpa (cudnn) 2.00x; hf-compile failed |",
        "Example GPU, commit abc1234, `python benchmarks/gpu.py --budget 9`", "matrix product bfloat16 700 TFLOP/s",
    ):  # fmt: skip
        assert told in text, told


def test_encoders_of_another_precision_stand_beside_ours_each_with_its_own():
    """Of ONNX Runtime in float32 and of int8, where ours has bfloat16: none is lost, and each says what it is."""
    common = {**FULL, "sequences": 4, "optimizer": "none", "mode": "encode", "sequences_per_s": 3.0,
              "real_tokens_per_s": 9.0, "share_of_peak": 0.5}  # fmt: skip
    ours = {**common, "contender": "bert_fast", "dtype": "bfloat16", "key": "bert_fast, bfloat16"}
    others = [{**common, "contender": name, "dtype": dtype, "key": f"{name}, {dtype}", "ours_is": 1.5}
              for name, dtype in (("onnxruntime", "float32"), ("openvino-int8", "int8"))]  # fmt: skip
    (first, second) = tables.compared([("cpu", [ours, *others, {**ours, "lengths": "wikipedia"}])]).rows
    assert first[1] == "encode large, 4 x 512, full, bfloat16"
    assert first[-1] == "onnxruntime, float32 1.50x; openvino-int8, int8 1.50x"
    assert (second[1], second[-1]) == ("encode large, 4 x 512, wikipedia, bfloat16", "")


def test_the_report_takes_the_newest_of_each_work_and_of_a_gpu_with_whole_steps(tmp_path):
    for name, seq, dtype in (
        ("2026-01-01-aaa", 512, "float32"), ("2026-01-02-bbb", 512, "float32"), ("2026-01-01-aaa-128", 128, "float32"),
        ("2026-01-01-aaa-bfloat16", 512, "bfloat16"),
    ):  # fmt: skip
        (tmp_path / "cpu").mkdir(exist_ok=True)
        data = {"kind": "run", "smoke": False, "limits": {"copy_gbs": 1}, "date": name[:10],
                "work": {"mode": "train", "seq": seq, "lengths": "full", "dtype": dtype}}  # fmt: skip
        (tmp_path / "cpu" / f"{name}.json").write_text(json.dumps(data))
    operators_alone = {"kind": "run", "smoke": False, "limits": {"copy_gbs": 1}, "operators": []}
    (tmp_path / "cpu" / "2026-01-03-ccc.json").write_text(json.dumps(operators_alone))
    names = {path.stem for path, _ in report.newest("run", tmp_path)}
    assert names == {"2026-01-02-bbb", "2026-01-01-aaa-128", "2026-01-01-aaa-bfloat16"}
    (tmp_path / "gpu").mkdir()
    for name, whole, hour in (("a", True, 10), ("b", True, 11), ("c", False, 12)):
        new_results(tmp_path / "gpu" / f"{name}.json", limits={"copy_gbs": 1}, steps=[{}] * whole,
                    started=f"2026-01-02T{hour}")  # fmt: skip
    assert [path.stem for path, _ in report.newest("gpu", tmp_path)] == ["b"]


def test_readmes_table_needs_its_comments_and_changes_nothing_else(tmp_path):
    document = tmp_path / "README.md"
    pair = "<!-- how-fast: made by benchmarks/report.py -->old<!-- end of how-fast -->"
    for text in ("# bert_fast\n", pair + pair, pair.partition("old")[0]):
        document.write_text(text)
        with pytest.raises(ValueError, match="exactly one pair of comments"):
            report.readme(results.FOLDER, document)
    document.write_text(f"before {pair} after")
    made = report.readme(results.FOLDER, document)
    assert made.startswith("before <!-- how-fast")
    assert made.endswith("end of how-fast --> after")
    assert "old" not in made


def test_a_text_or_pictures_that_cannot_be_made_end_no_run(tmp_path, monkeypatch):
    found = new_results(tmp_path / "r.json", **measured())
    report.write_beside(found)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"r-roofline.png", "r-throughput.png", "r-loss.png"}
    found.put("steps", [{"contender": "bert_fast"}])  # a row without figures

    def broken(*_):
        raise ValueError("no logarithm of 0")

    monkeypatch.setattr(report, "pictures", broken)
    report.write_beside(found)
    text = (tmp_path / "r.md").read_text()
    assert "making this text failed" in text
    assert "KeyError" in text
    assert "No pictures: ValueError: no logarithm of 0." in text


def test_an_earlier_run_of_the_day_is_never_written_over(tmp_path):
    data = {"device": "Example GPU", "date": "2026-01-02", "commit": "abc1234+"}
    paths = []
    for _ in range(3):
        paths.append(results.new_path(data, "512", tmp_path))
        paths[-1].write_text("{}")
    assert [path.name for path in paths] == [f"2026-01-02-abc1234-dirty-512{n}.json" for n in ("", "-2", "-3")]


def test_what_json_does_not_have_is_null(tmp_path):
    found = new_results(tmp_path / "r.json")
    found.add("operators", {"ms": float("nan"), "us": 2.0})
    assert json.loads((tmp_path / "r.json").read_text())["operators"] == [{"ms": None, "us": 2.0}]
