"""The one door through which the tests reach the code that they test.

    from adapter import load
    vqvae = load("vqvae")

This is the repository's own module, or the file that the environment names in its place:

    UNDER_TEST=mot=my/mot.py pytest tests/test_mot.py
    UNDER_TEST=mot=my/mot.py,worlds.shapes=my/shapes.py pytest

A module that is replaced is replaced for every importer: `import mot` in another file gets it too,
and so do the commands that tests start, `python tests/adapter.py train.py mot ...`.
"""

import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, __file__]            # what starts a file of the repository
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts)
           for path in (*ROOT.glob("*.py"), *ROOT.glob("worlds/[!_]*.py"))}


def load(name):
    """The module by that name: the file that UNDER_TEST names, or else the repository's."""
    _check(name)
    return importlib.import_module(name)


def _check(name):
    if name not in MODULES:
        raise ValueError(f'"{name}" is not one of the modules {", ".join(sorted(MODULES))}')


def _replacements(setting):
    """'name=path,name=path' -> {name: path}."""
    paths = {}
    for pair in filter(None, setting.split(",")):
        name, equals, path = pair.strip().partition("=")
        if not equals:
            raise ValueError(f'UNDER_TEST takes name=path pairs with commas between, not "{pair}"')
        _check(name)
        paths[name] = Path(path).expanduser().resolve()
        if not paths[name].is_file():
            raise FileNotFoundError(f"UNDER_TEST: no file {paths[name]} to test as {name}")
    return paths


class _Finder:
    """Asked before all others where a module is, so that the order of imports does not matter."""

    paths = _replacements(os.environ.get("UNDER_TEST", ""))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in cls.paths:
            return importlib.util.spec_from_file_location(name, cls.paths[name])


sys.path.insert(0, str(ROOT))
sys.meta_path.insert(0, _Finder)
if _Finder.paths:           # a command that a test starts may run in another folder
    os.environ["UNDER_TEST"] = ",".join(f"{name}={path}" for name, path in _Finder.paths.items())

if __name__ == "__main__":
    del sys.argv[0]
    sys.argv[0] = _Finder.paths.get(sys.argv[0].removesuffix(".py"), ROOT / sys.argv[0])
    runpy.run_path(str(sys.argv[0]), run_name="__main__")
