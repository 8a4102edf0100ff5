"""Ranks are started once for each layout; every test of the layout reads what they drew and met."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.parallel_cases import CASES, Drawn, draw, make_pipeline
from tests.support.parallel_layouts import Met, start


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a layout's ranks write."""
    folders: dict[str, Path] = {}

    def find(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout.replace(" ", "_"))
        return folders[layout]

    return find


@pytest.fixture(scope="session")
def ranks_of(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[[str], Path]) -> Callable[[str], list[Met]]:
    """What the ranks of a layout met; started on demand. One that fails fails every test of its layout, at once."""
    met: dict[str, list[Met] | BaseException] = {}

    def find(layout: str) -> list[Met]:
        if layout not in met:
            _claim(layout, tmp_path_factory)
            try:
                met[layout] = start(layout, folder_of(layout))
            except Exception as error:
                met[layout] = error
        found = met[layout]
        if isinstance(found, BaseException):
            raise found
        return found

    return find


def _claim(layout: str, folders: pytest.TempPathFactory) -> None:
    """Fail where another process of this run has started the layout: its tests are marked to share one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        (folders.getbasetemp().parent / f"{layout} is started").touch(exist_ok=False)


@pytest.fixture(scope="session")
def alone() -> Callable[[str], Drawn]:
    """What one process draws of a case, eagerly; on demand."""
    drawn: dict[str, Drawn] = {}

    def find(name: str) -> Drawn:
        if name not in drawn:
            case = CASES[name]._replace(backend=None)
            drawn[name] = draw(make_pipeline(case.steered_by, case.blocks), case)
        return drawn[name]

    return find
