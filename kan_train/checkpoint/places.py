"""Where checkpoints may lie: a folder of this machine or of a shared file system, or a prefix of an object store.

An object store has no folders, no rename and no fsync: a file appears whole when its upload ends, or not at all. Paths in one are `UPath`s, which
answer as a Path does; what differs between the two is asked of `is_local`, here and in files.py.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kan_train.config import ConfigError

if TYPE_CHECKING:
    from upath import UPath

OBJECT_STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "memory": ""}
"""Scheme of a URL -> the package that speaks to that store; "memory" is this process's own, for tests."""


def place(location: str | Path, setting: str = "checkpoint.location") -> Path:
    """`location` as a path: a Path where it is a folder or a file:// URL, else a UPath (typed as a Path: it has the methods that are used).

    ConfigError names `setting`, and a value that works, where the URL is of no object store or the package for it is not installed.
    """
    if not isinstance(location, str):
        return location
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location)
    if scheme in ("file", "local"):
        return Path(rest)
    if scheme not in OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in OBJECT_STORES if name != "memory")
        raise ConfigError(
            f"{setting}={location}: {scheme}:// is no object store that checkpoints can lie in; use one of {known} "
            f"(such as {setting}=s3://bucket/run), or a folder ({setting}=/mnt/run)"
        )
    driver = OBJECT_STORES[scheme]
    if driver and importlib.util.find_spec(driver) is None:
        raise ConfigError(
            f"{setting}={location} needs the package {driver}, which is not installed; `pip install {driver}`, or use a folder ({setting}=/mnt/run)"
        )
    from upath import UPath

    # Listings are never cached: other ranks write, and a listing from before their upload would say that the file is missing.
    return cast(Path, UPath(location, use_listings_cache=False))


def is_local(path: Path) -> bool:
    """Whether `path` is of a file system, where files are written beside their place, forced to disk and renamed."""
    return isinstance(path, Path)


def store_of(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a path in an object store, and the path as that file system names it."""
    remote = cast("UPath", path)
    return remote.fs, remote.path


def children(folder: Path) -> list[Path]:
    """What lies directly in `folder`, [] where it does not exist. Raises what the system raises: no failure passes for an empty folder."""
    if is_local(folder):
        return list(folder.iterdir()) if folder.exists() else []
    store, path = store_of(folder)
    try:
        names = {str(name).rstrip("/").rpartition("/")[2] for name in store.ls(path, detail=False) if str(name).strip("/") != path.strip("/")}
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names)]


def present(path: Path) -> bool:
    """Whether there is a file `path`. Raises what the system raises: a store that cannot be reached does not pass for an empty one."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
