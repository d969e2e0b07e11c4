"""One user of a folder at a time, over processes and machines.

    with FolderLock(folder, "training"):
        ...                                  whoever else asks for it meanwhile gets a UserError that names this process

The lock is flock(2) on the file `.lock` in the folder, which holds who has it: purpose, process, host and time. The
kernel releases it when its process ends, however it ends; a file left by a killed process locks nothing. The lock
travels over NFS. A file system without flock (some Lustre mounts) is told of on standard error, and the work goes on
without a lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from dqt_dist.errors import UserError
from dqt_dist.json_files import parse_json

LOCK_FILE = ".lock"
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class FolderLock:
    """Holds `folder` for `purpose` within a `with` block; makes the folder when it is missing.

    wait: stand in line instead of raising. Entering raises UserError when another process, or another lock of this
    process, holds the folder, and OSError when the folder cannot be made or written.
    """

    def __init__(self, folder: Path, purpose: str, *, wait: bool = False) -> None:
        self.folder, self.purpose, self.wait = folder, purpose, wait
        self._file = folder / LOCK_FILE
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        while not self._taken():
            pass
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        holder = {"purpose": self.purpose, "process": os.getpid(), "host": socket.gethostname(), "since": since}
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps(holder).encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink()
        os.close(self._descriptor)

    def _taken(self) -> bool:
        """Takes the lock; False when its file was removed on the way, by the holder before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder is gone again
            return False
        try:
            self._lock()
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._file)):
                    return True
        except BaseException:
            os.close(self._descriptor)
            raise
        os.close(self._descriptor)
        return False

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: in use by {_holder(self._descriptor)}; wait for its end or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            print(f"{self.folder}: not locked, its file system has no locks ({error})", file=sys.stderr)


def _holder(descriptor: int) -> str:
    try:
        holder = parse_json(os.pread(descriptor, 2**16, 0).decode())
        return f"{holder['purpose']} (process {holder['process']} on {holder['host']} since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # taken in this moment, or changed
        return "another process"
