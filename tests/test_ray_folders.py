"""Facts about the temporary folders of Ray actors: those of ended processes are removed, those in use stay."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowmem_imagic.batch.executors.ray_folders import new_folder, remove_abandoned
from lowmem_imagic.batch.ledger.owner import Owner

ACTOR = """
import sys
from lowmem_imagic.batch.executors.ray_folders import new_folder
from lowmem_imagic.batch.ledger.owner import Owner
folder, me = new_folder(), Owner.of_this_process()
(folder / "photo.png").write_bytes(b"photo")
print(folder, me.host, me.boot, me.pid, me.started, sep="\\t", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, of this process and of its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def actor() -> Iterator[tuple[subprocess.Popen[str], Path, Owner]]:
    """A process with a folder that has a photo."""
    words, pipe = (sys.executable, "-c", ACTOR), subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        folder, host, boot, pid, started = process.stdout.readline().rstrip("\n").split("\t")
        yield process, Path(folder), Owner(host, boot, int(pid), started)
        process.kill()


def test_the_folder_of_a_killed_process_is_removed() -> None:
    """Folders with photos of processes that were killed are removed, those of running processes stay."""
    mine = new_folder()
    with actor() as (killed, abandoned, _), actor() as (_, used, _):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        remove_abandoned()
        assert not abandoned.exists() and mine.is_dir() and (used / "photo.png").exists()


def test_a_process_that_is_about_to_end_is_waited_for() -> None:
    """The folder of a process that ends a moment later is removed too."""
    with actor() as (ending, folder, owner):
        assert ending.stdin is not None
        ending.stdin.close()
        remove_abandoned([owner])
        # As a child of this process it stays a zombie, which counts as ended.
        assert not folder.exists()


def test_other_names_are_left(place: Path) -> None:
    """Files with similar names, and folders of other machines, are not touched."""
    names = ("lowmem-imagic-ray-notes", "lowmem-imagic-ray-0123456789ab-1-2-x", "lmi-ray-x")
    for name in names:
        (place / name).mkdir()
    remove_abandoned()
    assert sorted(path.name for path in place.iterdir()) == sorted(names)
