"""Commands of two processes take long to start: they begin before the first test, and run beside
the others until test_processes.py asks for them. All have one thread each: with more, they would
wait for one another."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """What test_processes.py begins, where any of its tests was asked for."""
    module = next((item.module for item in request.session.items
                   if item.module.__name__ == "test_processes"), None)
    commands = module.begin_commands(tmp_path_factory) if module else {}
    yield commands
    for _, process in commands.values():
        process.terminate()         # torchrun then stops its own
