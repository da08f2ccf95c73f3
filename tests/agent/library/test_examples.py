"""The examples in the docstrings of what `import longdream` offers run as they stand."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

MODULES = ("dream_env.sb3", "library.export", "library.functions", "library.trained", "library.values")


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    source = import_module(f"longdream.agent.{module}")
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(source) if test.examples]
    assert tests
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.summarize().failed == 0
