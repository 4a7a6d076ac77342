"""What the GPU proves: limits, parity, operators, whole training steps. A run that is cut off loses nothing.

    python benchmarks/gpu.py [--budget 540] [--phase N ...] [--tune] [--smoke] [--out DIR]

    1  environment, matrix-product rates, copy bandwidth, what a launch costs
    2  parity on the GPU: the whole model against float64, and the suite's tests
    3  every operator against its limit, PyTorch's, torch.compile's, flash-attn's and apex's
    4  whole training steps, eager and captured, against transformers' variants; loss curves
    5  launch configurations (--tune): prints what to write into the kernels' constants

Needs no network, no installation and no C++ compiler for itself. Each phase runs in a process of its own, within its
share of the budget; what it leaves over goes to the next. The results are benchmarks/results/<gpu>/<date>-<commit>.json
(whole and valid after every row), .md and pictures. The exit status is 0 where every phase ran to its end or to the end
of its time, 1 where one failed, 2 for bad arguments.
"""

import argparse
import contextlib
import ctypes
import datetime
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import torch
from gpu_results import DeviceLost, Results, markdown, pictures, reason

PHASES = {1: "limits", 2: "parity", 3: "operators", 4: "whole steps", 5: "launch configurations"}
ORDER = (1, 2, 4, 3, 5)  # the most telling first
SHARES = {1: 2, 2: 4, 4: 9, 3: 5, 5: 5}  # of the time that is left; what a phase does not take goes to the next
# Seconds in which a phase at work writes something: a kernel that hangs leaves its case behind, as one that dies does.
PATIENCE = {1: 60, 2: 150, 3: 60, 4: 200, 5: 150}
CONTINUE = 75  # exit status of a phase whose device was lost: a new process goes on after the case that lost it
GRACE_SECONDS = 10


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for everything (default 540)")
    parser.add_argument("--phase", type=int, nargs="+", choices=PHASES, help="these, after the first (default 1 to 4)")
    parser.add_argument("--tune", action="store_true", help="phase 5 too")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: does every phase run?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default benchmarks/results/<gpu>")
    parser.add_argument("--commit", help="what the results are called after where the checkout has no history")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.budget <= 0:
        parser.error("--budget is a number of seconds above 0")
    options.device = "cpu" if options.smoke else "cuda"
    if not options.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here (python benchmarks/gpu.py --smoke tries every phase on the CPU)")
    chosen = set(options.phase or (1, 2, 3, 4)) | ({5} if options.tune else set())
    options.phases = [phase for phase in ORDER if phase in chosen | {1}]  # the others are held against its limits
    return options


def commit() -> str:
    """The short hash of the checkout, with + where tracked files have changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=7", "HEAD") or "unknown"
        return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def new_results(options) -> Results:
    """The results file of this run, in a folder named after the device unless --out names one; an earlier run's is
    never written over."""
    name = "smoke" if options.smoke else torch.cuda.get_device_name(0)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = options.out or ROOT / "benchmarks" / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    now, version = datetime.datetime.now(datetime.UTC), options.commit or commit()
    today = now.date().isoformat()
    data = {
        "kind": "gpu", "gpu": name, "smoke": options.smoke, "date": today, "commit": version,
        "started": now.isoformat(timespec="seconds"),
        "command": ["benchmarks/gpu.py", *sys.argv[1:]], "budget": options.budget, "phases": [],
    }  # fmt: skip
    stem = f"{today}-{version.rstrip('+')}{'-dirty' if version.endswith('+') else ''}"
    paths = (folder / f"{stem}{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))
    return Results(next(path for path in paths if not path.exists()), data)


def run_phase(phase: int, results: Results, options) -> None:
    """One phase in this process, until options.until (seconds of time.time)."""
    import importlib

    import operators

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.smoke:
        operators.CACHE_BYTES["cpu"] = 1 << 16
    module = {1: "gpu_limits", 2: "gpu_parity", 3: "gpu_operators", 4: "gpu_steps", 5: "gpu_tune"}[phase]
    importlib.import_module(module).run(results, options)


def child(options) -> int:
    """What runs in a phase's own process: exit status 0, 1 (the phase raised; recorded) or CONTINUE."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no phase outlives the command
    results = Results(options.file)
    try:
        run_phase(options.child, results, options)
    except DeviceLost as error:
        print(f"   the device is lost, a new process goes on: {reason(error)}", flush=True)
        return CONTINUE
    except Exception:
        results.put("error_of_phase", traceback.format_exc())
        return 1
    return 0


def watch(process: subprocess.Popen, file: Path, patience: float, until: float) -> int | None:
    """The exit status of a phase's process; that of a killed one where it wrote nothing to ``file`` for ``patience``
    seconds; None where it still runs when the time is up."""
    begun = time.time()
    while time.time() < until + GRACE_SECONDS:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5)
        if time.time() - max(begun, file.stat().st_mtime) > patience:
            process.kill()
            return process.wait()
    return None


def supervise(phase: int, results: Results, options) -> dict:
    """Run a phase in processes of its own; a case that kills or hangs one is left behind, the rest goes on in the
    next."""
    start = time.time()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(phase), "--file", str(results.path)]
    command += ["--until", str(options.until), *(["--smoke"] if options.smoke else [])]
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)  # the interpreter is for trials; it must not be timed
    if options.smoke:
        environment["TRITON_INTERPRET"] = "1"
    environment.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; without a network nobody waits to learn that
    if not os.access(Path.home(), os.W_OK):  # where compiled kernels would be kept
        environment.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "bert_fast-triton"))
    state, error = "done", None
    while True:
        begun = len(results.begun(phase))
        process = subprocess.Popen(command, env=environment)
        try:
            code = watch(process, results.path, PATIENCE[phase], options.until)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        results.reload()
        if code is None:
            state = "cut off"
        if not code:
            break
        if code == 1 and "error_of_phase" in results.data:
            state, error = "failed", (error or "") + results.data.pop("error_of_phase")
            break
        died = results.begun(phase)[-1] if len(results.begun(phase)) > begun else "before its first case"
        ended = "the device was lost" if code == CONTINUE else f"a process ended with status {code}"
        error = f"{error or ''}{ended} at: {died}\n"
        state = "with losses"
        if len(results.begun(phase)) == begun or time.time() > options.until:
            state = "failed"
            break
    outcome = {"phase": phase, "name": PHASES[phase], "state": state, "seconds": time.time() - start}
    return outcome | ({"error": error.strip()} if error else {})


def write_report(results: Results) -> None:
    """The readable form beside the JSON, and the pictures where matplotlib is there. Neither is worth a phase: what
    goes wrong here is told in the text, and the run goes on."""
    stem = results.path.with_suffix("")
    try:
        text = markdown(results.data)
    except Exception:
        text = f"The results are in {results.path.name}; making this text failed:\n\n```\n{traceback.format_exc()}```\n"
    try:
        found = pictures(results.data, stem)
        text += "".join(f"\n![{path.stem}]({path.name})\n" for path in found)
    except Exception as error:
        text += f"\nNo pictures: {reason(error)}.\n"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.child:
        code = child(options)
        if code:  # Python's end gives all memory back; on a lost device torch aborts there, with a status of its own
            sys.stdout.flush()
            os._exit(code)
        return code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = new_results(options)
    end = time.time() + options.budget
    print(f"{results.data['gpu']}, commit {results.data['commit']}: {results.path}", flush=True)
    try:
        for number, phase in enumerate(options.phases):
            left = options.phases[number:]
            options.until = time.time() + max(0.0, end - time.time()) * SHARES[phase] / sum(SHARES[p] for p in left)
            print(f"== phase {phase}, {PHASES[phase]}: {options.until - time.time():.0f} s", flush=True)
            outcome = supervise(phase, results, options)
            results.add("phases", outcome)
            write_report(results)
            print(f"   {outcome['state']} after {outcome['seconds']:.0f} s", flush=True)
    finally:
        write_report(results)
    print(results.path.with_suffix(".md").read_text(encoding="utf-8"))
    return 1 if any(phase["state"] == "failed" for phase in results.data["phases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
