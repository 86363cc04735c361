"""Facts about how threads wait: asleep, so that a busy machine is no reason to be slow."""

import os
import subprocess
import sys

import pytest

from lowmem_imagic.cli.threads import SETTINGS, wait_passively


@pytest.mark.parametrize("chosen", [None, *SETTINGS])
def test_threads_sleep_unless_the_user_chose(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's own setting is made where none of its settings is there."""
    monkeypatch.setattr(os, "environ", {} if chosen is None else {chosen: "7"})
    wait_passively()
    assert os.environ == ({"OMP_WAIT_POLICY": "PASSIVE"} if chosen is None else {chosen: "7"})


def test_the_command_line_chooses_before_torch_is_loaded() -> None:
    """The setting is there when torch is imported, and is inherited by processes of a batch."""
    script = (
        "import builtins, os, sys\nbefore = builtins.__import__\n"
        "def load(name, *rest):\n"
        "    if name == 'torch':\n        print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n        os._exit(0)\n"
        "    return before(name, *rest)\n"
        "builtins.__import__ = load\nsys.argv = ['lowmem-imagic', 'doctor']\n"
        "from lowmem_imagic.__main__ import main\nmain()\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, check=True)
    assert done.stdout.split() == [b"PASSIVE"]
