"""Files that are whole or not there: written into a hidden folder, then moved to their place.

An error, an interrupt or a full disk may come at any byte. So nothing old is touched before everything new is whole. Some files
mark a folder as a model or an adapter: these are removed before the others are replaced, and come last, so that a folder with
its mark is of one piece.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(folder: Path, what: str, *, marks: Sequence[str] = (), stale: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder, whose files get their place in `folder` when the block ends well, and are removed when it does not.

    what: the files, for messages. marks: names that come last. stale: names of older files that go before the new ones come.
    Raises OSError, of the kind that came, for a folder that cannot be written to and for a full disk, in the block too.
    """
    home = folder if folder.exists() else folder.parent
    part = home / f".{folder.resolve().name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        yield part
        if not folder.exists():
            os.replace(part, folder)
            return
        for name in (*marks, *stale):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(part.iterdir(), key=lambda path: (path.name in marks, path.name)):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    except OSError as error:
        if error.filename and not part.is_relative_to(error.filename) and part.name not in str(error.filename):
            raise                                          # about another file, which the block reads
        raise type(error)(f"cannot write {what} to {folder} ({error.strerror or error}): give a folder that you can write to, "
                          "with room for it") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
