"""The cells of a study: each is computed once, stored the moment it is done, and found again by whoever asks next.

A cell is a function of this package and its arguments, plain data both ways. Cells are worked on in processes of one thread
each, side by side on all cores, or on a Dask cluster. A study that was killed goes on where it was: its table is the one of a
study that ran through, as the same cells are computed in the same way.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from ..backend import current_device
from ..backend.parallel import cores
from .common import Options, cache_folder, say

Row = dict[str, Any]
COMPUTES = ("backend", "autograd", "nn", "lora", "rank", "training", "methods", "pretrained", "data", "tasks", "studies")


def compute(function: Callable[..., Any], cells: Sequence[Row], options: Options, what: str = "cells") -> list[Any]:
    """function(**cell) for every cell, in order: those that were computed before are read, the others computed and stored.

    function: of a module (not a lambda); the cells and the results must survive JSON. `what` names the progress bar. An
    exception of a cell is raised here; what was done until then is stored.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    keys = [cell_key(name, cell) for cell in cells]
    with _store() as store:
        found = {key: json.loads(text) for key in keys for text in store.read(key)}
        pending = {key: cell for key, cell in zip(keys, cells) if key not in found}
        quiet = None if options.progress else True
        with tqdm(total=len(keys), initial=len(keys) - len(pending), desc=what, unit="cell", leave=False, disable=quiet) as bar:
            for key, text in _run(name, pending, options.workers):
                store.write(key, text)
                found[key] = json.loads(text)
                bar.update()
    return [found[key] for key in keys]


def cell_key(name: str, cell: Row) -> str:
    """A digest of all that a cell's result depends on: the function, its arguments, this package, Python (its texts are the
    data) and NumPy."""
    facts = [name, cell, code_digest(), sys.version, np.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """A digest of the source files that results depend on."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in COMPUTES for path in (package / folder).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run_cell(name: str, key: str, cell: Row) -> tuple[str, str]:
    """What a worker does: (key, the result as JSON)."""
    module, _, function = name.partition(":")
    return key, json.dumps(getattr(importlib.import_module(module), function)(**cell), allow_nan=False)


def _run(name: str, pending: dict[str, Row], cluster: str | None) -> Iterator[tuple[str, str]]:
    """(key, result as JSON) of every cell, as they are done."""
    if not pending:
        return
    if cluster is not None:
        yield from _on_cluster(cluster, name, pending)
    elif current_device().name != "cpu":                   # one GPU: one process has it
        yield from (run_cell(name, key, cell) for key, cell in pending.items())
    else:
        with parallel_config(backend="loky", inner_max_num_threads=1):
            # At least two: joblib works on one job here, with as many threads as there are cores, and then it would round
            # otherwise than a study of several cells does.
            yield from Parallel(n_jobs=max(2, cores()), return_as="generator_unordered")(
                delayed(run_cell)(name, key, cell) for key, cell in pending.items())


def _on_cluster(address: str, name: str, pending: dict[str, Row]) -> Iterator[tuple[str, str]]:
    where = address.removeprefix("dask://")
    try:
        from dask.distributed import Client, as_completed
    except ImportError:
        raise ImportError(f'--workers {address} needs Dask: pip install "minilora[cluster]"') from None
    if where == address or not where.rpartition(":")[2].isdecimal():
        raise ValueError(f"--workers {address}: expected dask://HOST:PORT, the address of a Dask scheduler")
    try:
        client = Client(f"tcp://{where}", timeout="10s")
    except OSError as error:
        raise ValueError(f"--workers {address}: no Dask scheduler answers there ({error}); start one with `dask scheduler`"
                         ) from None
    with client:
        jobs = [client.submit(run_cell, name, key, cell, key=f"minilora-{key}", pure=True) for key, cell in pending.items()]
        for job in as_completed(jobs):
            yield job.result()


class _Store:
    """Results by their keys, in one sqlite file of the cache. Without a file it forgets."""

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self.connection = connection

    def read(self, key: str) -> list[str]:
        if self.connection is None:
            return []
        return [text for text, in self.connection.execute("SELECT result FROM cells WHERE key = ?", (key,))]

    def write(self, key: str, text: str) -> None:
        if self.connection is not None:
            with self.connection:                          # one transaction: the row is whole, or it is not there
                self.connection.execute("INSERT OR REPLACE INTO cells VALUES (?, ?)", (key, text))


@contextmanager
def _store() -> Iterator[_Store]:
    """The cache's store of cells; one that is damaged is made anew, and where none can be written, nothing is kept."""
    path, connection = cache_folder() / "cells.sqlite", None
    for attempt in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=60)
            with connection:
                connection.execute("CREATE TABLE IF NOT EXISTS cells (key TEXT PRIMARY KEY, result TEXT NOT NULL)")
                connection.execute("SELECT count(result) FROM cells")
            break
        except (OSError, sqlite3.Error) as error:
            if connection is not None:
                connection.close()
                connection = None
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError) and not attempt:
                path.unlink(missing_ok=True)               # not a database: a cache may be lost
                continue
            say(f"finished cells are not stored ({error})")
            break
    try:
        yield _Store(connection)
    finally:
        if connection is not None:
            connection.close()
