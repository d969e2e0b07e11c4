"""FolderLock between real processes: one holder, who is named, and no lock outlives its holder."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dqt_dist.errors import UserError
from dqt_dist.folder_lock import LOCK_FILE, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from dqt_dist.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_has_the_folder_and_a_killed_holder_has_it_no_more(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    process = hold(folder)
    try:
        who = f"in use by a test (process {process.pid} on {socket.gethostname()} since "
        with pytest.raises(UserError, match=re.escape(f"{folder}: {who}")), FolderLock(folder, "another"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (folder / LOCK_FILE).exists()  # which locks nothing now
    with FolderLock(folder, "another"):
        assert f'"process": {os.getpid()}' in (folder / LOCK_FILE).read_text()
    assert list(folder.iterdir()) == []


def test_a_lock_is_not_taken_twice_in_one_process_and_is_free_after_an_error(tmp_path: Path):
    with (
        FolderLock(tmp_path, "first"),
        pytest.raises(UserError, match="in use by first"),
        FolderLock(tmp_path, "second"),
    ):
        pass
    with pytest.raises(KeyError), FolderLock(tmp_path, "third"):
        raise KeyError
    with FolderLock(tmp_path, "fourth"):
        pass


COUNT = """
import sys
from pathlib import Path
from dqt_dist.folder_lock import FolderLock
folder, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(300):
    with FolderLock(folder, "count", wait=True):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_those_who_wait_come_one_after_another(tmp_path: Path):
    """Every holder removes the file on which others wait: none of them may take the removed one for the lock."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, tmp_path / "folder", counter]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert counter.read_text() == "1200"
