"""What every room's tests share."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def folders_that_other_users_may_enter(tmp_path_factory: pytest.TempPathFactory) -> None:
    """pytest makes its folders for their owner alone; the tests of what an ordinary user may not read would then fail at the door."""
    folder, top = tmp_path_factory.getbasetemp(), Path(tempfile.gettempdir())
    while folder != top and top in folder.parents:
        folder.chmod(folder.stat().st_mode | 0o011)
        folder = folder.parent
