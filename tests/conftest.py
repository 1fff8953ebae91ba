"""What every room's tests share."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"

# Triton decides at its import whether kernels are interpreted, and other packages import it: without a GPU its interpreter is asked for before any test is.
if not torch.cuda.is_available():
    os.environ[INTERPRET] = "1"
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one group belong on one worker, or each worker starts the group's processes again: unseen, that doubles the time of the suite."""
    if getattr(config.option, "loadgroup", False):  # set in workers alone
        for item in items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.rpartition("]")[2]:
                raise pytest.UsageError(f"this pytest-xdist does not group tests under pytest {pytest.__version__}; install pytest>=8.3,<9.2")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The tests of kernels alone ask for the interpreter: processes that others start are as users start them."""
    if torch.cuda.is_available():
        return
    if "kernels" in item.path.parts:
        os.environ[INTERPRET] = "1"
    else:
        os.environ.pop(INTERPRET, None)


@pytest.fixture(scope="session", autouse=True)
def folders_that_other_users_may_enter(tmp_path_factory: pytest.TempPathFactory) -> None:
    """pytest makes its folders for their owner alone; the tests of what an ordinary user may not read would then fail at the door."""
    folder, top = tmp_path_factory.getbasetemp(), Path(tempfile.gettempdir())
    while folder != top and top in folder.parents:
        folder.chmod(folder.stat().st_mode | 0o011)
        folder = folder.parent
