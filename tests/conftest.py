"""What all tests share: settled random state, and the count of statistical checks."""

import os
import random
import zlib

import pytest
import torch

from statistical import FALSE_ALARM, FAMILY, MISSED, Checks

_PROPERTY = "statistical checks"


def pytest_addoption(parser):
    parser.addoption(
        "--fresh-seeds", action="store_true", help="statistical tests draw new seeds instead of the committed ones"
    )


@pytest.fixture(autouse=True)
def _settled():
    """Every test begins with the same random state and ends with the settings it began with."""
    random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def checks(request):
    """Statistical checks at a stated false-alarm rate, and seeds for what they look at."""
    fresh = request.config.getoption("--fresh-seeds")
    base = (
        int.from_bytes(os.urandom(6), "big") if fresh else zlib.crc32(request.node.nodeid.rpartition("::")[2].encode())
    )
    checks = Checks(base)
    yield checks
    request.node.user_properties.append((_PROPERTY, (checks.done, checks.failed)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # On the report, which reaches the process that prints the summary also from another one.
    report.statistical = dict(item.user_properties).get(_PROPERTY, (0, 0)) if call.when == "teardown" else (0, 0)
    return report


def pytest_terminal_summary(terminalreporter, config):
    reports = [r for kind in terminalreporter.stats.values() for r in kind if isinstance(r, pytest.TestReport)]
    pairs = [getattr(r, "statistical", (0, 0)) for r in reports]
    done, failed = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    if not done:
        return
    seeds = "fresh" if config.getoption("--fresh-seeds") else "committed"
    terminalreporter.write_line(
        f"statistical checks on {seeds} seeds: {done} done, {failed} failed (false-alarm rate {FALSE_ALARM:g} "
        f"over a family of {FAMILY}, missed-error rate {MISSED:g} each)"
    )
    if done > FAMILY:
        terminalreporter.write_line(
            f"more statistical checks than the family of {FAMILY} in statistical.py allows", red=True
        )
