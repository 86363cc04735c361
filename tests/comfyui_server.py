"""ComfyUI's own server from a checkout; a program for `tests.test_share_comfyui`.

``python comfyui_server.py CHECKOUT FOLDER PORT``: the folder, which is ComfyUI's own, has the files of `export`.
"""

import os
import runpy
import sys
from pathlib import Path

from comfyui_checkout import prepare

checkout, folder, port = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
prepare(
    checkout,
    folder,
    "--listen",
    "127.0.0.1",
    "--port",
    port,
    "--disable-api-nodes",
    "--database-url",
    "sqlite:///:memory:",
)
os.chdir(checkout)
runpy.run_path(str(Path(checkout) / "main.py"), run_name="__main__")
