"""README.md: its commands run the files and options there are; its reading path leads somewhere."""

import re
import shlex
import sys

import pytest

from adapter import MODULES, ROOT, load

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""       # a test fails, below

COMMANDS = [part.strip()
            for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
            for line in block.replace("\\\n", " ").splitlines()
            for part in re.sub(r"(^|\s)#.*", "", line).split("&&") if part.strip()]
PYTHON = [command for command in COMMANDS
          if re.match(r"(\w+=\S+ )*(python|torchrun) ", command)]
READING = [row for section in re.split(r"^#+ ", TEXT, flags=re.M)
           if "reading path" in section.partition("\n")[0].lower()
           for row in section.splitlines() if row.startswith("|") and ".py`" in row]


def test_there_is_a_readme_with_commands_and_a_reading_path():
    assert README.is_file()
    assert len(PYTHON) >= 3 and len(READING) >= 5
    assert any(command.startswith("torchrun") for command in PYTHON)


@pytest.mark.parametrize("command", PYTHON)
def test_a_command_names_files_and_options_that_exist(command, monkeypatch):
    words = shlex.split(command)
    if "-m" in words:
        assert words[words.index("-m") + 1] in ("pytest", "venv", "pip")
        return
    file = next(word for word in words if word.endswith(".py"))
    argv = words[words.index(file) + 1:]
    assert (ROOT / file).is_file()
    monkeypatch.setattr(sys, "argv", [file, *argv])
    if "torchrun" in words:
        monkeypatch.setenv("RANK", "0")         # which it sets; --fsdp asks for it
    if file == "train.py":
        load("train").arguments(argv)           # an unknown option is an InputError
    elif file == "sample.py":
        load("sample").arguments()
    elif file == "docs/scaling.py":
        assert argv in (["plan"], ["measure"], ["figure"])
    else:
        assert not argv, f"{file} takes no arguments"


def test_files_that_are_installed_or_tested_exist():
    for command in COMMANDS:
        for word in shlex.split(command):
            if re.fullmatch(r"[\w./-]+\.(txt|toml|py)", word):
                assert (ROOT / word).is_file(), command


def test_an_installation_has_every_file_of_the_top_level():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    modules = re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*?)\]", project, re.S)[1])
    assert sorted(modules) == sorted(file.stem for file in ROOT.glob("*.py"))


@pytest.mark.parametrize("row", READING)
def test_a_row_of_the_reading_path_names_files_and_what_is_in_them(row):
    quoted = re.findall(r"`([^`]+)`", row)
    files = [name for name in quoted if name.endswith(".py")]
    modules = [".".join(name[:-3].split("/")) for name in files]
    assert set(modules) <= MODULES
    names = [name.removesuffix("()") for name in quoted if name not in files]
    assert names, "no function is named"
    for name in names:
        first, *rest = name.split(".")
        found = [vars(load(module))[first] for module in modules if first in vars(load(module))]
        assert found, f"no {name} in {', '.join(files)}"
        for attribute in rest:
            assert hasattr(found[0], attribute), name


def test_the_table_of_files_counts_their_lines():
    rows = re.findall(r"^\| `(\w+\.py)` \|[^|]*\|[^|]*\| (\d+) \|", TEXT, re.M)
    assert {name for name, _ in rows} == {"vqvae.py", "chameleon.py", "transfusion.py", "mot.py"}
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text(encoding="utf-8").splitlines()), name
