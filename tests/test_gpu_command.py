"""`make gpu` without a GPU: every phase on the CPU, cut off in the middle, with phases and cases that fail; and the
tables of docs/performance.md."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bert_fast import dispatch, ops
from tests.gpu_phases import new_results, script, smoke_phase

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmark_scripts")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# --------------------------------------------------------------------------------------------------------------
# Phases


def test_limits_then_whole_steps(tmp_path, monkeypatch):
    results = new_results(tmp_path / "r.json", smoke=True)
    limits = smoke_phase(1, results)["limits"]
    assert limits["matmul_tflops"]["bfloat16"] > 0 < limits["copy_gbs"]
    assert "failed" not in limits
    assert len(results.data["products"]) == 12
    monkeypatch.setattr(script("gpu_steps"), "curves", lambda *_: None)
    smoke_phase(4, results)
    found = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert [row for row in found if "failed" in row] == []
    assert [row["variant"] for row in found][:4] == [
        "bert_fast captured", "bert_fast eager", "bert_fast captured, autocast", "hf-sdpa",
    ]  # fmt: skip
    for row in found:
        assert row["sequences_per_s"] > 0 < row["real_tokens_per_s"]
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["mfu"] > 0
        assert ("predicted_ms" in row) == row["variant"].startswith("bert_fast")
    assert [(row["lengths"], row["sequences"]) for row in found][-1] == ("8 full", 8)
    losses = {row["loss"] for row in found if row["variant"].startswith("bert_fast") and row["lengths"] == "full"}
    assert max(losses) - min(losses) < 0.05  # the same weights and batch; LAMB's and AdamW's first steps differ
    # a phase that is begun again does not measure its cases again
    count = len(found)
    smoke_phase(4, results)
    assert len(results.data["steps"]) == count


class Queue:
    """In place of torch.cuda: tells in order what is queued and waited for."""

    def __init__(self, monkeypatch):
        self.told: list = []
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Mark(self.told))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.told.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.told.append(cycles), raising=False)


class Mark:
    def __init__(self, told: list):
        self.told = told

    def record(self) -> None:
        self.told.append(self)

    def synchronize(self) -> None:
        self.told.append(("wait", self))

    def elapsed_time(self, other: "Mark") -> float:
        return 1.0


def test_a_gpu_waits_for_the_host_to_launch_what_is_timed(monkeypatch):
    operators = script("operators")
    monkeypatch.setitem(operators.CACHE_BYTES, "cpu", 1 << 16)
    queue, stopwatch = Queue(monkeypatch), operators.Stopwatch("cpu")
    stopwatch.device = "cuda"
    for seconds in (0.01, 0.5, 0.0):
        stopwatch(lambda seconds=seconds: (queue.told.append("call"), time.sleep(seconds)))
    cycles = queue.told[::5]
    assert [queue.told[i::5] for i in (2, 4)] == [["call"] * 3, ["synchronize"] * 3]
    assert cycles[0] == 0
    assert cycles[1] >= 0.01 * operators.GPU_CYCLES
    assert cycles[2] == operators.MOST_WAITING * operators.GPU_CYCLES  # it compiled


def test_a_gpu_has_its_next_step_when_it_is_done_with_one(monkeypatch):
    queue, steps = Queue(monkeypatch), script("gpu_steps")
    times = steps.timed_steps(lambda: queue.told.append("step"), "cuda", smoke=False)
    assert times == [1e-3] * steps.MOST_STEPS
    queued = 0  # marks after the one that was waited for
    for told in queue.told:
        queued += isinstance(told, Mark)
        if isinstance(told, tuple):
            marks = [x for x in queue.told if isinstance(x, Mark)]
            assert marks.index(told[1]) == queued - 2
    assert sum(isinstance(told, tuple) for told in queue.told) == steps.MOST_STEPS


def test_peak_memory_is_that_of_a_step_with_the_optimizer_s_state(tmp_path, monkeypatch):
    steps, within = script("gpu_steps"), []
    began = []

    class Peak(steps.PeakMemory):
        def __exit__(self, *error):
            super().__exit__(*error)
            within.append(len(began))

    def their_step(*arguments):
        run = real(*arguments)
        return lambda: began.append(1) or run()

    real = steps.their_step
    monkeypatch.setattr(steps, "PeakMemory", Peak)
    monkeypatch.setattr(steps, "their_step", their_step)
    options = SimpleNamespace(device="cpu", smoke=True, until=time.time() + 60)
    results = new_results(tmp_path / "r.json", smoke=True)
    row = steps.measure(steps.THEIRS[0], "micro", 24, "full", options, results)
    assert row["peak_memory_mib"] >= 0
    assert within == [2]


@needs_triton
def test_a_sweep_of_launch_configurations(tmp_path):
    from bert_fast.kernels import bias_gelu

    before = bias_gelu._launch_config
    rows = smoke_phase(5, new_results(tmp_path / "r.json", smoke=True))["tune"]
    operators = ("bias_gelu", "feed_forward")
    assert [row["what"] for row in rows] == [f"{name} {d}, micro 24" for name in operators for d in ("fwd", "bwd")]
    for row in rows:
        assert len(row["tried"]) == 2
        assert all("us" in tried for tried in row["tried"])
        where = (
            "kernels/bias_gelu.py, "
            if row["what"].startswith("bias_gelu")
            else "FEED_FORWARD_EPILOGUE in bert_fast/dispatch.py and kernels/feed_forward.py, "
        )
        assert row["write"] == "leave it" or row["write"].startswith(where)
    assert bias_gelu._launch_config is before


@needs_triton
def test_a_configuration_that_computes_something_else_is_not_taken(tmp_path, monkeypatch):
    tune, operators = script("gpu_tune"), script("operators")
    x = torch.randn(100)
    assert tune.same((x, x + 1e-9), (x, x))
    assert not tune.same(x + 1e-3, x)
    assert not tune.same(x * float("nan"), x)
    before = ops.MLM_CHUNK
    with tune.applied("mlm_loss", "chunk", {"MLM_CHUNK": {"cuda": 7}}):
        assert ops.MLM_CHUNK == {"cuda": 7}
    assert ops.MLM_CHUNK is before
    monkeypatch.setattr(tune, "same", lambda found, expected: False)
    monkeypatch.setitem(operators.CACHE_BYTES, "cpu", 1 << 16)
    dispatch.set_backend("triton")
    options = SimpleNamespace(device="cpu", smoke=True, until=time.time() + 60)
    results = new_results(tmp_path / "r.json")
    assert tune.sweep("bias_gelu", "fwd", "forward", "micro", 24, options, results) == []
    (row,) = results.data["tune"]
    assert [tried.get("wrong") for tried in row["tried"]] == [True, True]
    assert row["write"] == "leave it"


@needs_triton
def test_gelu_in_the_epilogue_is_timed_where_it_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(script("gpu_operators"), "OPERATORS", ("bias_gelu",))
    operators = smoke_phase(3, new_results(tmp_path / "r.json", smoke=True))["operators"]
    rows = {(x["direction"], x["contender"]): x for x in operators if x["operator"] == "feed_forward"}
    contenders = script("gpu_feed_forward").CONTENDERS
    assert set(rows) == {(direction, c) for direction in ("forward", "backward") for c in contenders}
    assert all(x["ms"] > 0 < x["tflops"] for x in rows.values())
    assert [x.get("predicted_ms", 0) > 0 for x in rows.values()] == [c == "bert_fast" for _, c in rows]
    for direction in ("forward", "backward"):
        assert rows[direction, "epilogue"]["bytes"] < rows[direction, "bert_fast"]["bytes"]

    from bert_fast.kernels import feed_forward

    right = feed_forward.product_gelu
    monkeypatch.setattr(feed_forward, "product_gelu", lambda *a: [1.001 * x for x in right(*a)])
    found = smoke_phase(3, new_results(tmp_path / "wrong.json", smoke=True))["operators"]
    (told,) = (x["failed"] for x in found if "failed" in x)
    assert "does not give what a product and bias_gelu give" in told


@pytest.mark.slow
def test_every_phase_as_a_user_runs_it(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--smoke",
        "--tune",
        "--budget",
        "400",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert [(p["phase"], p["state"]) for p in data["phases"]] == [(n, "done") for n in (1, 2, 4, 3, 5)]
    assert data["parity"]["finished"] is True
    assert data["parity"]["passed"] > 0
    assert data["parity"]["failed"] == []
    assert all(model["passed"] == model["compared"] for model in data["parity"]["models"])
    for table in ("products", "steps", "profiles", "operators", "curves", "tune"):
        assert data[table], table
        assert [row for row in data[table] if "failed" in row] == [], table
    found = {(row["operator"], row["direction"]) for row in data["operators"] if row["contender"] == "bert_fast"}
    for operator in script("operators").OPERATORS:
        assert {(operator, "forward"), (operator, "backward")} <= found
    assert {("lamb", "update"), ("adamw", "update")} <= found
    assert {row["backend"] for row in data["operators"] if row["operator"] == "attention"} >= {"triton", "pytorch"}
    assert [len(curve["losses"]) for curve in data["curves"]] == [4, 4]
    text = path.with_suffix(".md").read_text()
    assert "no figure here means anything" in text
    assert "What failed" not in text
    names = {picture.name.removeprefix(path.stem) for picture in tmp_path.glob("*.png")}
    assert names == {"-roofline.png", "-throughput.png", "-loss.png"}


def test_killed_in_the_middle_it_leaves_the_finished_rows_and_no_process(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--phase", "4", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    rows, deadline = [], time.time() + 120
    try:
        while len(rows) < 2 and time.time() < deadline and process.poll() is None:
            time.sleep(0.05)
            for path in tmp_path.glob("*.json"):
                rows = json.loads(path.read_text()).get("steps", [])  # valid whenever it is read
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(rows) >= 2
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert len(data["steps"]) >= 2
    assert all("sequences_per_s" in row for row in data["steps"])
    assert [(p["phase"], p["state"]) for p in data["phases"]] == [(1, "done")]
    while (left := children_with(str(path))) and time.time() < deadline:
        time.sleep(0.1)
    assert left == []
    assert path.with_suffix(".md").exists()  # of the phase that had ended


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


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit, match="2"):
        script("gpu").main([])
    assert "torch sees no GPU" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------
# What fails


def test_a_case_that_raises_is_told_and_the_next_runs(tmp_path):
    results = new_results(tmp_path / "r.json")

    def broken():
        raise RuntimeError("no such kernel\nsecond line")

    results.case(3, "a", "operators", {"operator": "a"}, broken)
    results.case(3, "b", "operators", {"operator": "b"}, lambda: {"ms": float("nan"), "us": 2.0})
    results.case(3, "a", "operators", {"operator": "a"}, lambda: {"ms": 1.0})
    first, second = json.loads((tmp_path / "r.json").read_text())["operators"]
    assert first["failed"] == "RuntimeError: no such kernel"
    assert "in broken" in first["traceback"]
    assert second == {"operator": "b", "ms": None, "us": 2.0}


FAKE_CHILD = """
import json, os, sys
path = sys.argv[sys.argv.index("--file") + 1]
data = json.load(open(path))
begun = data.setdefault("begun", {}).setdefault("3", [])
case = ["first", "second", "third"][len(begun)]
begun.append(case)
json.dump(data, open(path, "w"))
"""


def supervised(tmp_path, monkeypatch, code: str, seconds: float = 30.0) -> tuple[dict, dict]:
    """Phase 3 in processes that run ``code``, and the results then."""
    gpu = script("gpu")
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE_CHILD + code)
    monkeypatch.setattr(gpu, "__file__", str(fake))
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    results = new_results(tmp_path / "r.json")
    outcome = gpu.supervise(3, results, SimpleNamespace(until=time.time() + seconds, smoke=True))
    return outcome, results.data


def test_a_case_that_kills_its_process_is_left_behind(tmp_path, monkeypatch):
    code = "sys.exit(75) if case == 'second' else os.kill(os.getpid(), 9 * (case == 'first'))"
    outcome, data = supervised(tmp_path, monkeypatch, code)
    assert outcome["state"] == "with losses"
    assert outcome["error"].splitlines() == [
        "a process ended with status -9 at: first",
        "the device was lost at: second",
    ]
    assert data["begun"]["3"] == ["first", "second", "third"]


def test_a_phase_that_dies_before_its_first_case_is_not_tried_for_ever(tmp_path, monkeypatch):
    code = "data['begun']['3'] = []; json.dump(data, open(path, 'w')); sys.exit(3)"
    outcome, _ = supervised(tmp_path, monkeypatch, code)
    assert outcome["state"] == "failed"
    assert "before its first case" in outcome["error"]


def test_a_phase_that_hangs_is_cut_off(tmp_path, monkeypatch):
    outcome, data = supervised(tmp_path, monkeypatch, "import time; time.sleep(60)", seconds=0.5)
    assert outcome["state"] == "cut off"
    assert outcome["seconds"] < 30
    assert data["begun"]["3"] == ["first"]


def test_a_case_that_hangs_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(script("gpu").PATIENCE, 3, 3.0)
    code = "import time; time.sleep(60 if case == 'second' else 0); os.kill(os.getpid(), 9 * (case == 'first'))"
    outcome, data = supervised(tmp_path, monkeypatch, code)
    assert outcome["state"] == "with losses"
    assert outcome["error"].splitlines() == [
        f"a process ended with status -9 at: {case}" for case in ("first", "second")
    ]
    assert outcome["seconds"] < 30
    assert data["begun"]["3"] == ["first", "second", "third"]


def test_a_phase_that_raises_is_recorded_with_its_traceback(tmp_path, monkeypatch):
    gpu = script("gpu")
    new_results(tmp_path / "r.json")

    def run_phase(*_):
        raise ValueError("a silly reason")

    monkeypatch.setattr(gpu, "run_phase", run_phase)
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: None))
    options = SimpleNamespace(child=3, file=tmp_path / "r.json", until=0.0, smoke=True)
    assert gpu.child(options) == 1
    assert "ValueError: a silly reason" in json.loads((tmp_path / "r.json").read_text())["error_of_phase"]


LOST = """
import atexit, os, sys
sys.path.insert(0, {benchmarks!r})
import gpu
from gpu_results import DeviceLost

def run_phase(*_):
    raise {error}("an illegal memory access")

gpu.run_phase = run_phase
atexit.register(os.abort)  # as torch does when memory of a lost device is given back
sys.exit(gpu.main(["--smoke", "--child", "3", "--file", {file!r}, "--until", "0"]))
"""


@pytest.mark.parametrize(("error", "status"), [("DeviceLost", 75), ("RuntimeError", 1)])
def test_a_process_whose_device_is_lost_ends_with_its_own_status(tmp_path, error, status):
    """Not with an abort's: then the error of a phase would not be taken."""
    file = tmp_path / "r.json"
    new_results(file)
    code = LOST.format(benchmarks=str(BENCHMARKS), error=error, file=str(file))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    if status == 1:
        assert "RuntimeError: an illegal memory access" in json.loads(file.read_text())["error_of_phase"]
    else:
        assert "the device is lost, a new process goes on" in done.stdout


# --------------------------------------------------------------------------------------------------------------
# The document


def test_the_documents_tables_are_those_of_the_results():
    assert script("report").main(["--check"]) == 0


def gpu_file(folder: Path, **more) -> dict:
    """A results file of two steps and an operator."""
    common = {"model": "large", "seq": 512, "lengths": "full"}
    step = {**common, "sequences": 64, "real_tokens_per_s": 2e5, "mfu": 0.5, "peak_memory_mib": 30000.0}
    operator = {**common, "operator": "bias_gelu", "direction": "forward", "dropout": 0.1}
    data = {
        "kind": "gpu", "gpu": "Example GPU", "date": "2026-01-02", "commit": "abc1234", "command": [], "phases": [],
        "limits": {"matmul_tflops": {"bfloat16": 700.0}, "copy_gbs": 2900.0},
        "steps": [
            {**step, "variant": "bert_fast captured", "ms": {"p50": 150.0}, "sequences_per_s": 400.0,
             "predicted_ms": 130.0},
            {**step, "variant": "hf-sdpa", "ms": {"p50": 300.0}, "sequences_per_s": 200.0},
            {**common, "variant": "hf-compile", "failed": "RuntimeError: no compiler"},
        ],
        "operators": [
            {**operator, "contender": "bert_fast", "ms": 0.2, "gbs": 2600.0, "share_of_limit": 0.9,
             "predicted_ms": 0.18},
            {**operator, "contender": "pytorch", "ms": 0.5},
        ],
        **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "2026-01-02-abc1234.json").write_text(json.dumps(data))
    return data


def test_report_sets_measurements_beside_predictions_and_changes_nothing_twice(tmp_path):
    report = script("report")
    results, document = tmp_path / "results", tmp_path / "performance.md"
    gpu_file(results / "example-gpu")
    gpu_file(results / "trial", smoke=True, gpu="Trial")
    document.write_text((ROOT / "docs" / "performance.md").read_text())
    arguments = ["--document", str(document), "--results", str(results)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    once = document.read_text()
    assert report.main(arguments) == 0
    assert document.read_text() == once
    assert report.main([*arguments, "--check"]) == 0
    assert "Example GPU" in once
    assert "Trial" not in once
    assert "| 150.0 | 130.0 |" in once
    assert "2.00x hf-sdpa" in once
    assert "no compiler" in once
    line = next(x for x in once.splitlines() if x.startswith("| large 512, full | bias_gelu, forward |") and "x |" in x)
    assert line.split("|")[5].strip() == "200"
    assert "Nothing has been measured on a GPU yet" not in once


def test_report_takes_the_newest_run_that_has_whole_steps(tmp_path):
    report = script("report")
    data = gpu_file(tmp_path / "example-gpu", started="2026-01-02T10:00:00+00:00")
    limits_alone = {**data, "steps": [], "started": "2026-01-03T10:00:00+00:00"}
    newer = {**data, "started": "2026-01-02T11:00:00+00:00"}
    for name, file in (("2026-01-03-aaa", limits_alone), ("2026-01-02-0000000", newer)):
        (tmp_path / "example-gpu" / f"{name}.json").write_text(json.dumps(file))
    assert [path.stem for path, _ in report.newest("gpu", tmp_path)] == ["2026-01-02-0000000"]


def test_report_takes_the_newest_run_of_each_work_on_a_cpu(tmp_path):
    report = script("report")
    (tmp_path / "example-cpu").mkdir()
    for name, seq, dtype in (
        ("2026-01-01-aaa", 512, "float32"),
        ("2026-01-02-bbb", 512, "float32"),
        ("2026-01-01-aaa-128", 128, "float32"),
        ("2026-01-01-aaa-bfloat16", 512, "bfloat16"),
    ):
        work = {"mode": "train", "seq": seq, "dtype": dtype}
        (tmp_path / "example-cpu" / f"{name}.json").write_text(json.dumps({"work": work}))
    names = {path.stem for path, _ in report.newest("cpu", tmp_path)}
    assert names == {"2026-01-02-bbb", "2026-01-01-aaa-128", "2026-01-01-aaa-bfloat16"}


def test_products_by_another_library(monkeypatch):
    """Chosen inside the block alone, also where a product fails; shown beside PyTorch's own choice."""
    chosen = ["cublas"]

    def preferred(library=None):
        if library is not None:
            chosen.append(library)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    with pytest.raises(RuntimeError, match="no such product"), script("gpu_limits").multiplied_by("cublaslt"):
        raise RuntimeError("no such product")
    assert chosen == ["cublas", "cublaslt", "cublas"]
    row = {"model": "large", "shape": "a shape", "ms": 2.0, "tflops": 600.0}
    data = {"limits": {"matmul_tflops": {"bfloat16": 800.0}}, "products": [row | {"cublaslt_tflops": 640.0}, row]}
    lines = script("gpu_results").products_table(data).splitlines()[2:]
    assert lines == ["| a shape | 600 | 2 | 75.0 % | 640 |", "| a shape | 600 | 2 | 75.0 % |  |"]


def test_the_step_model_line_by_line():
    """Products and optimisers too: at the run's own rate a product that took twice its time is off by two."""
    rate = 700e12
    product = {"model": "large", "shape": "large qkv, forward: 1 x 2 x 3", "ms": 2.0, "tflops": rate / 2 / 1e12}
    update = {"model": "base", "seq": 0, "lengths": "", "operator": "lamb", "direction": "update", "dropout": 0.0,
              "contender": "bert_fast", "ms": 2.0}  # fmt: skip
    peer = {**update, "operator": "torch AdamW, fused", "contender": "torch AdamW, fused"}
    data = {"limits": {"matmul_tflops": {"bfloat16": rate / 1e12}}, "products": [product], "operators": [update, peer]}
    lines = script("report").against_the_model(data).splitlines()[2:]
    assert lines[0] == "| large | qkv, forward: 1 x 2 x 3 | 877 | 1000 | 2000 | 2.00x |"
    assert lines[1].startswith("| base | lamb, update | ")
    assert len(lines) == 2


def test_an_earlier_run_of_the_day_is_never_written_over(tmp_path):
    options = SimpleNamespace(smoke=True, out=tmp_path, commit="abc", budget=1.0)
    first, second, third = (script("gpu").new_results(options).path for _ in range(3))
    assert len({first, second, third}) == 3
    assert (second.stem, third.stem) == (f"{first.stem}-2", f"{first.stem}-3")


def test_report_needs_its_comments(tmp_path, capsys):
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n")
    assert script("report").main(["--document", str(document)]) == 2
    assert "exactly one pair of comments" in capsys.readouterr().err
    assert document.read_text() == "# Performance\n"


def test_the_readable_results_tell_what_failed(tmp_path):
    data = gpu_file(tmp_path, environment={"versions": {"torch": "2.11"}})
    data["phases"] = [{"phase": 3, "name": "operators", "state": "failed", "seconds": 3.0, "error": "Traceback: gone"}]
    data["parity"] = {"passed": 3, "failed": [{"test": "t::x", "message": "off by one"}], "finished": False}
    text = script("gpu_results").markdown(data)
    assert "| 3 operators | failed | 3 |" in text
    assert "Traceback: gone" in text
    assert "3 tests passed, 1 failed when the time was up." in text
    assert "Left out" not in text
    late = {**data, "steps_left_out": ["base 128 full hf-eager", "loss curve of transformers"], "operators_left_out": 7}
    told = (
        "of the whole steps base 128 full hf-eager; loss curve of transformers, and the last 7 cases of the operators"
    )
    assert f"Left out, as the time was up: {told}." in script("gpu_results").markdown(late)
    assert "t::x: off by one" in text


def test_the_order_of_work_and_who_is_left_out():
    gpu_steps = script("gpu_steps")
    order = gpu_steps.cases(SimpleNamespace(smoke=False, device="cuda"))
    # and ours at 8 x 128, profiled, and with candidates
    assert len(set(order)) == len(order) == 8 * 7 + 2 + 2 + 2 * 4
    assert (order[0][0].name, *order[0][1:]) == ("bert_fast captured", "large", 512, "wikipedia")


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_pytest_outcomes_are_on_disk_at_once(tmp_path, workers):
    """Also that of a file that cannot be imported, and the others run all the same."""
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    (tmp_path / "test_alone.py").write_text("import no_such_package\n")
    outcomes = tmp_path / "outcomes.jsonl"
    environment = os.environ | {"BERT_FAST_TEST_OUTCOMES": str(outcomes), "PYTHONPATH": str(BENCHMARKS)}
    command = [*script("gpu_parity").PYTEST, *workers, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["failed", "passed", "failed"]
    assert "no_such_package" in rows[0]["detail"]
    assert "assert 1 == 2" in rows[2]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent died")
def test_tests_end_with_the_phase_that_started_them(tmp_path):
    """Whatever killed it: it had no time to end them."""
    (tmp_path / "test_long.py").write_text("import time\ndef test(): open('begun', 'w').close(); time.sleep(300)\n")
    command = [*script("gpu_parity").PYTEST, str(tmp_path)]
    phase = f"import subprocess; subprocess.run({command!r}, start_new_session=True)"
    environment = os.environ | {"BERT_FAST_TEST_OUTCOMES": str(tmp_path / "o"), "PYTHONPATH": str(BENCHMARKS)}
    process = subprocess.Popen([sys.executable, "-c", phase], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "begun").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert children_with(str(tmp_path)) != []
    process.kill()
    process.wait()
    while (left := children_with(str(tmp_path))) and time.time() < deadline:
        time.sleep(0.05)
    assert left == []


def test_a_report_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch):
    gpu = script("gpu")
    results = new_results(tmp_path / "r.json", steps=[{"variant": "bert_fast captured"}])  # a row without figures
    gpu.write_report(results)
    text = (tmp_path / "r.md").read_text()
    assert "making this text failed" in text
    assert "KeyError" in text
    results.put("steps", [])

    def broken(*_):
        raise ValueError("no logarithm of 0")

    monkeypatch.setattr(gpu, "pictures", broken)
    gpu.write_report(results)
    text = (tmp_path / "r.md").read_text()
    assert "No pictures: ValueError: no logarithm of 0." in text
    assert "Parity on the GPU: not run." in text


def test_the_throughput_picture_has_room_for_every_name(tmp_path):
    """Twelve variants of one size and two of another: no name of a bar lies on the next one."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = script("gpu_results")
    steps = [
        {"model": model, "seq": 512, "lengths": "full", "variant": f"{name} {number}", "real_tokens_per_s": 1e5}
        for model, count in (("large", 12), ("base", 2)) for number, name in enumerate(["hf-compile"] * count)
    ]  # fmt: skip
    figures = []
    close, pyplot.close = pyplot.close, figures.append
    try:
        (path,) = results.pictures({"steps": steps}, tmp_path / "r")
    finally:
        pyplot.close = close
    (figure,) = figures
    figure.canvas.draw()
    for axis in figure.axes:
        boxes = sorted((label.get_window_extent() for label in axis.get_yticklabels()), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    close(figure)
    assert path.name == "r-throughput.png"


def test_what_limits_could_not_be_measured_leaves_the_sweeps_an_order(tmp_path):
    rows = [{"contender": "bert_fast", "operator": name, "share_of_limit": share}
            for name, share in (("attention", 0.4), ("bias_gelu", None), ("mlm_loss", 0.2))]  # fmt: skip
    found = script("gpu_tune").furthest(new_results(tmp_path / "r.json", operators=rows))
    assert found.index("bias_gelu") < found.index("mlm_loss") < found.index("attention")
