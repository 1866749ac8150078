"""The one door through which the tests reach the code that they test.

    from adapter import load
    vqvae = load("vqvae")

This is the repository's own module, or the file that the environment names in its place:

    UNDER_TEST=mot=my/mot.py pytest tests/test_mot.py
    UNDER_TEST=mot=my/mot.py,worlds.shapes=my/shapes.py pytest

A module that is replaced is replaced for every importer: `import mot` in another file gets it too.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
