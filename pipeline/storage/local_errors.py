"""What the operating system's refusals mean to a user.

Owns the translation of OSError from folders of this machine, with the remedy for each. Must not know stores.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import Problem, StorageError
from pipeline.storage.base import MissingObject

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free space or choose another folder",
    errno.EFBIG: "the limit on file sizes is reached: raise it (ulimit -f) or set a smaller pipeline: {file_size: ...}",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "the filesystem is read-only: choose another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or network mount failed: check it and run again",
}
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def translated(where: str, verb: str) -> Iterator[None]:
    """Turn OSError into StorageError: MissingObject when a read finds nothing.

    Args:
        where: The absolute path, for the text.
        verb: What is tried: "read", "write", "delete" or "measure".
    """
    try:
        yield
    except OSError as error:
        if verb == "read" and error.errno in _ABSENT:
            raise MissingObject(Problem(what="does not exist", where=where, remedy="check the path")) from error
        reason = error.strerror or type(error).__name__
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise StorageError(Problem(what=f"cannot {verb}: {reason}", where=where, remedy=remedy)) from error
