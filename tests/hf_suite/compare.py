"""transformers' model tests on its own BERT classes and on bert_fast's, and where the two differ.

    python tests/hf_suite/compare.py [-n WORKERS]

prints one line per difference and the totals; exit code 1 where a test that transformers' classes pass is failed or
skipped by bert_fast's. A minute and a half on two idle cores.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass
class Outcome:
    """One test: what failed and what was skipped, in its own words. A test skips as a whole or in some subtests."""

    failures: list[str] = dataclasses.field(default_factory=list)
    skips: list[str] = dataclasses.field(default_factory=list)


def run(library: str, workers: int = 2) -> tuple[dict[str, Outcome], str]:
    """Every test on the classes of `library` ("transformers" or "bert_fast"), in processes of its own.

    Returns the outcome by test, and pytest's own summary; pytest counts a test that skips only in subtests as passed,
    and the skips of subtests beside it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        # --noconftest: the conditions of a user's program, not those of this project's tests.
        command = [sys.executable, "-m", "pytest", str(HERE / "hf_models.py"), "--noconftest", "-p", "no:cacheprovider"]
        command += ["-q", "-W", "ignore", f"--junitxml={report}"] + (["-n", str(workers)] if workers > 1 else [])
        environment = {**os.environ, "HF_SUITE_LIBRARY": library}
        environment.pop("TRITON_INTERPRET", None)  # tests/conftest.py sets it for the operators' tests
        done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():  # 1: tests ran and some failed
            raise RuntimeError(f"transformers' tests on {library} did not run:\n{done.stdout[-5000:]}{done.stderr}")
        outcomes = collections.defaultdict(Outcome)
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = outcomes[case.attrib["name"]]
            for element in case:
                words = f"{element.get('message', '')}\n{element.text or ''}"
                if element.tag in ("failure", "error"):
                    outcome.failures.append(words)
                elif element.tag == "skipped":
                    outcome.skips.append(element.get("message", ""))
        return dict(outcomes), done.stdout.strip().splitlines()[-1]


def defects(reference: dict[str, Outcome], ours: dict[str, Outcome]) -> dict[str, str]:
    """Tests of which bert_fast does less than transformers: name -> what happened.

    A defect is a test (or a subtest) that transformers' classes pass and ours fail, skip or do not have.
    """
    found = {}
    for name, theirs in reference.items():
        if theirs.failures:
            continue
        mine = ours.get(name)
        if mine is None:
            found[name] = "did not run"
        elif mine.failures:
            found[name] = f"failed {len(mine.failures)} times, first: {mine.failures[0]}"
        elif len(mine.skips) > len(theirs.skips):
            found[name] = "skipped: " + "; ".join(sorted(set(mine.skips)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-n", "--workers", type=int, default=2, help="processes (default 2)")
    workers = parser.parse_args().workers
    theirs, their_summary = run("transformers", workers)
    ours, our_summary = run("bert_fast", workers)
    found = defects(theirs, ours)
    for name, what in found.items():
        print(f"{name}: {what}\n")
    print(f"transformers  {their_summary}\nbert_fast     {our_summary}")
    print(f"{len(found)} tests that transformers' classes pass and bert_fast's do not")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
