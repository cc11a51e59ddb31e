"""Libraries that a module imports and seldom uses: they are imported when something of them is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from sana_lab.commands import deferred_imports
from sana_lab.commands.deferred_imports import deferring

USER = """
import functools
import heavy_library
import heavy_library.inner as inner
from heavy_library import Base, context, number
from heavy_library.inner import double

Kind = Base | None

@context(1)
def decorated(x):
    return x

def uses():
    return double(2), inner.double(3), heavy_library.number + 1, isinstance(Base(), Base), decorated(5)
"""
LIBRARY = """
import functools
number = 6
class Base: pass
def context(n):
    return lambda function: functools.wraps(function)(lambda x: function(x) + n)
"""


@pytest.fixture
def library(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "heavy_library").mkdir()
    (here / "heavy_library/__init__.py").write_text(LIBRARY)
    (here / "heavy_library/inner.py").write_text("def double(x):\n    return 2 * x\n")
    (here / "light_user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(here))
    for name in ("heavy_library", "heavy_library.inner", "light_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return here


def test_the_library_is_imported_when_it_is_used(library: Path):
    with deferring(["heavy_library"]):
        import light_user
    assert "heavy_library" not in sys.modules
    assert not isinstance(1, light_user.Base)
    assert "heavy_library" not in sys.modules  # nothing can be an instance of a class that does not exist yet
    assert light_user.uses() == (4, 6, 7, True, 6)
    import heavy_library

    assert heavy_library.number == 6
    assert isinstance(heavy_library.Base(), light_user.Base)


def test_a_subclass_imports_its_base_at_once(library: Path):
    (library / "light_user.py").write_text("from heavy_library import Base\nclass Own(Base): pass\n")
    with deferring(["heavy_library"]):
        import light_user
    import heavy_library

    assert issubclass(light_user.Own, heavy_library.Base)


def test_a_library_that_is_imported_already_is_left_alone(library: Path):
    import heavy_library

    with deferring(["heavy_library"]):
        import light_user
    assert light_user.Base is heavy_library.Base


def test_installing_twice_is_once():
    before = list(sys.meta_path)
    try:
        deferred_imports.install()
        deferred_imports.install()
        finders = [f for f in sys.meta_path if isinstance(f, deferred_imports.Deferring)]
        assert len(finders) == 1
    finally:
        sys.meta_path[:] = before


@pytest.mark.slow
def test_a_dry_run_imports_none_of_them(here: Path):
    """And the package itself, imported without the command line, defers nothing."""
    code = (
        "import sys; from sana_lab.__main__ import main; main(['ablate', 'attention', '--dry-run']); "
        "print([m for m in ('torchao', 'torch._dynamo', 'matplotlib.pyplot', 'scipy.stats', 'mlflow')"
        " if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
