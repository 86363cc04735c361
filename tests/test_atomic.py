"""Facts about files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lowmem_imagic.errors import OutputExistsError, OutputUnwritableError
from lowmem_imagic.storage import atomic


def _no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def _raising(error: BaseException):
    def fail(*_: object, **__: object) -> int:
        raise error

    return fail


def test_writes_exactly_the_bytes_and_nothing_else(tmp_path: Path) -> None:
    """The folder holds the one file afterwards, with the bytes given."""
    atomic.write_bytes(tmp_path / "a.bin", b"\x00\xff" * 5, overwrite=False)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"\x00\xff" * 5)]


def test_a_write_removes_old_temporaries(tmp_path: Path) -> None:
    """A write removes temporaries that killed writers left in the folder an hour ago and more, and no other file."""
    old, new = (tmp_path / f".lowmem-imagic-{digit * 16}.tmp" for digit in "ab")
    others = [tmp_path / name for name in (".lowmem-imagic-1.tmp", ".lowmem-imagic", "c.tmp")]
    link, folder = (tmp_path / f".lowmem-imagic-{digit * 16}.tmp" for digit in "cd")
    for path in (old, new, *others):
        path.write_bytes(b"part")
    link.symlink_to(others[0])
    folder.mkdir()
    for path in (old, folder, *others):
        os.utime(path, (0, path.stat().st_mtime - 4000))
    os.utime(new, (0, new.stat().st_mtime - 3000))
    atomic.write_bytes(tmp_path / "a", b"x", overwrite=True)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", new, *others, link, folder])


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_writer_whose_temporary_is_gone_writes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, overwrite: bool
) -> None:
    """A writer that was suspended until another took its temporary for an old one still ends with the whole file."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    gone = []

    def lose_the_first(place: str) -> None:
        if place == "temporary-written" and not gone:
            gone.extend(tmp_path.glob(".lowmem-imagic-*.tmp"))
            gone[0].unlink()

    monkeypatch.setattr(atomic, "reach", lose_the_first)
    atomic.write_bytes(tmp_path / "a", b"whole", overwrite=overwrite)
    assert gone and [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"whole")]


def test_empty_content_is_written(tmp_path: Path) -> None:
    """No bytes make an empty file."""
    atomic.write_bytes(tmp_path / "a", b"", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b""


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes 3 bytes at a time still ends with the whole file."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    atomic.write_bytes(tmp_path / "a", bytes(range(100)), overwrite=False)
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


@pytest.mark.parametrize("links", [True, False])
def test_existing_file_is_kept_unless_overwriting_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """overwrite=False refuses and changes nothing; overwrite=True replaces the content."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    path = tmp_path / "a"
    atomic.write_bytes(path, b"old", overwrite=False)
    with pytest.raises(OutputExistsError, match="exists already"):
        atomic.write_bytes(path, b"new", overwrite=False)
    assert path.read_bytes() == b"old"
    atomic.write_bytes(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_during_the_write_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """overwrite=False decides when publishing, not only before the write."""
    path = tmp_path / "a"
    real = os.fsync

    def fsync_then_rival(descriptor: int) -> None:
        real(descriptor)
        path.write_bytes(b"rival")

    monkeypatch.setattr(os, "fsync", fsync_then_rival)
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(OutputExistsError):
        atomic.write_bytes(path, b"mine", overwrite=False)
    assert path.read_bytes() == b"rival"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_at_once_exactly_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Eight threads write the same new name: one returns, seven are refused, the content is the winner's."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    # The early check would settle the race too soon to test anything.
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    barrier = threading.Barrier(8)
    outcomes: list[object] = [None] * 8

    def work(index: int) -> None:
        barrier.wait()
        try:
            atomic.write_bytes(tmp_path / "a", bytes([index]) * 10_000, overwrite=False)
            outcomes[index] = "won"
        except OutputExistsError:
            outcomes[index] = "refused"

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["refused"] * 7 + ["won"]
    assert (tmp_path / "a").read_bytes() == bytes([outcomes.index("won")]) * 10_000
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, mode: int, links: bool
) -> None:
    """The file's mode is 0o666 without the bits of the umask, however it is published."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    before = os.umask(umask)
    try:
        atomic.write_bytes(tmp_path / "new", b"x", overwrite=False)
        atomic.write_bytes(tmp_path / "over", b"x", overwrite=True)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "over")} == {mode}


@pytest.mark.parametrize("function", ["write", "fsync", "open", "replace"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failing_system_call_leaves_the_old_file_and_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, message: str
) -> None:
    """A full or read-only disk is reported by path and reason; the old content stays, no temporary does."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, _raising(OSError(code, os.strerror(code))))
    with pytest.raises(OutputUnwritableError, match=message) as caught:
        atomic.write_bytes(path, b"new", overwrite=True)
    monkeypatch.undo()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("function", "links"),
    [
        ("write", True),
        ("fsync", True),
        ("close", True),
        ("link", True),
        ("close", False),
        ("replace", False),
    ],
)
def test_an_interrupt_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, links: bool
) -> None:
    """KeyboardInterrupt anywhere before publishing passes through and leaves the folder empty."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    real = getattr(os, function)

    def interrupted(*args: object) -> None:
        if function == "close":
            real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_bytes(tmp_path / "a", b"new", overwrite=False)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_after_publishing_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links, an interrupt just after the replace leaves the finished file."""
    real = os.replace

    def replace_then_interrupt(source: str, target: str) -> None:
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(os, "replace", replace_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_bytes(tmp_path / "a", b"new", overwrite=False)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_a_folder_without_fsync_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When only the folder cannot be synced, the file is there and the call succeeds."""
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    atomic.write_bytes(tmp_path / "a", b"new", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is: sync the file, publish, sync the folder."""
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source: str, target: str) -> None:
        calls.append("publish")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic.write_bytes(tmp_path / "a", b"new", overwrite=True)
    assert calls == ["file", "publish", "folder"]


def test_impossible_places_are_named(tmp_path: Path) -> None:
    """A missing folder, a file used as one, a folder in the way, an overlong and a NUL name are named."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    places = {
        "the folder does not exist": tmp_path / "missing" / "a",
        "a part of the path is not a folder": tmp_path / "file" / "a",
        "a folder of that name is in the way": tmp_path / "folder",
        "the name is too long": tmp_path / ("n" * 300),
        "null": tmp_path / "nul\0name",
    }
    for message, path in places.items():
        with pytest.raises(OutputUnwritableError, match=message):
            atomic.write_bytes(path, b"x", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    """Overwriting a link leaves what it points to alone; a dangling link counts as existing."""
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    atomic.write_bytes(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new" and not (tmp_path / "link").is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        atomic.write_bytes(tmp_path / "dangling", b"new", overwrite=False)


_CHILD = """
import os, sys, time
from lowmem_imagic.storage import atomic

def wait(*_):
    print("ready", flush=True)
    time.sleep(60)

os.replace = os.link = wait
atomic.write_bytes(sys.argv[1], b"new" * 1000, overwrite=sys.argv[2] == "True")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_kill_before_publishing_leaves_the_old_state(tmp_path: Path, overwrite: bool) -> None:
    """kill -9 between the temporary and its name: the target is as before, and the next write succeeds."""
    path = tmp_path / "a"
    if overwrite:
        path.write_bytes(b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(path), str(overwrite)],
        stdout=subprocess.PIPE,
        cwd=Path(atomic.__file__).parent.parent.parent,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    leftovers = [name for name in os.listdir(tmp_path) if name != "a"]
    assert len(leftovers) == 1 and leftovers[0].startswith(".lowmem-imagic-")  # the kill came after the write
    assert path.exists() == overwrite and (not overwrite or path.read_bytes() == b"old")
    atomic.write_bytes(path, b"newer", overwrite=overwrite)
    assert path.read_bytes() == b"newer"
