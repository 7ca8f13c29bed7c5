"""The planted bugs of ``make mutants`` still have their places in the source."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
mutants = importlib.util.module_from_spec(SPEC)


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    import sys

    sys.modules["mutants"] = mutants  # dataclasses look their module up
    SPEC.loader.exec_module(mutants)
    yield
    del sys.modules["mutants"]


def test_each_bug_applies():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 27
    for mutant in mutants.MUTANTS:
        assert compile(mutant.planted(), mutant.file, "exec")
        assert all(Path(__file__).with_name(name).exists() for name in mutant.tests)
