"""The bar of a drop-in: transformers' own model tests on bert_fast's eight classes, as many as on its own.

A minute and a half on two idle cores, after a download of 11 MB on the first run; see compare.py.
"""

import pytest

from tests.hf_suite.compare import Outcome, defects, run
from tests.hf_suite.hf_distribution import OfflineError, unpacked_tests


def test_comparison_finds_defects():
    theirs = {"a": Outcome(), "b": Outcome(skips=["x"]), "c": Outcome(failures=["f"]), "d": Outcome(), "e": Outcome()}
    ours = {"a": Outcome(failures=["f"]), "b": Outcome(skips=["y"]), "c": Outcome(failures=["f"])}
    ours["d"] = Outcome(skips=["z"])
    assert {name: what.split()[0].strip(":") for name, what in defects(theirs, ours).items()} == {
        "a": "failed",
        "d": "skipped",
        "e": "did",
    }


@pytest.mark.slow
def test_passes_what_transformers_passes():
    try:
        unpacked_tests()
    except OfflineError as error:
        pytest.skip(str(error))
    theirs, _ = run("transformers")
    passed = sum(not outcome.failures and not outcome.skips for outcome in theirs.values())
    assert passed >= 90, f"only {passed} of transformers' tests pass on its own classes: the harness itself is broken"
    found = defects(theirs, run("bert_fast")[0])
    assert not found, "\n\n".join(f"{name}: {what}" for name, what in found.items())
