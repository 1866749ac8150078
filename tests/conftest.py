"""Modules whose fixtures take long say in BEGIN how each is begun; their tests come last."""

import os

import pytest

from background import Background

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported: with more threads,
                                                    # what runs side by side would wait for others


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: hasattr(item.module, "BEGIN"))


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """What runs beside the tests: whatever the fixtures of those that were asked for wait for."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    background = Background()
    for module in dict.fromkeys(item.module for item in request.session.items):
        for fixture, begin in getattr(module, "BEGIN", {}).items():
            if fixture in wanted:
                begin(background, tmp_path_factory.mktemp(fixture))
    yield background
    background.stop()
