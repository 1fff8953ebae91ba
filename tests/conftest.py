"""What every room's tests share."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"

sys.path.append(str(Path(__file__).parent))  # free_ports.py is imported by name, by processes of tests too

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


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared corpora with one of them, "tiny": a vocabulary of 320 pieces, some ten thousand tokens. Not to be changed."""
    from kan_train.config import CorpusConfig, PrepareConfig, TokenizerConfig
    from kan_train.data_tools.commands import run_prepare

    texts, root = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("corpora")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        drawn = torch.randint(0, len(words), (150,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(f"{words[index]}{number % 7}" for index in drawn))
    corpus = CorpusConfig(kind="directory", name="tiny", path=str(texts))
    tokenizer = TokenizerConfig(vocab_size=320)
    run_prepare(PrepareConfig(root=str(root), corpus=corpus, tokenizer=tokenizer, heldout=0.2, workers=1))
    return root
