"""The exported workflow in ComfyUI's own page, in a real browser, where a checkout of ComfyUI is given.

Its Python needs ``comfyui-frontend-package`` in the version of the checkout's ``requirements.txt``.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_share_comfyui import COMFYUI, edit, folder, fp32, needs_comfyui, workflow

playwright_api = pytest.importorskip("playwright.sync_api")

__all__ = ["edit", "folder", "fp32"]
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    needs_comfyui,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
_PATIENCE_MS = 400_000
"""Only a hang fails."""
_NODES = """() => app.graph._nodes.map(node => ({
  id: node.id,
  type: node.type,
  red: Boolean(node.has_errors) || node.flags.missing === true,
  links: (node.inputs || []).filter(one => one.link !== null).map(one => {
    const link = app.graph.getLink(one.link);
    return [one.name, one.type, link.origin_id, link.origin_slot];
  }),
  values: (node.widgets || []).map(one => one.value),
}))"""
"""What the page has of every node: type, links to its inputs, values, and whether it is marked."""


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The address of ComfyUI's server over the exported folder, with a checkpoint of the workflow's name."""
    names = {node["type"]: node["widgets_values"] for node in workflow(folder)["nodes"]}
    checkpoint = folder / "models" / "checkpoints" / names["CheckpointLoaderSimple"][0]
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    python = os.environ.get(f"{COMFYUI}_PYTHON", sys.executable)
    command = [python, Path(__file__).parent / "comfyui_server.py", os.environ[COMFYUI], folder, str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            lines: list[str] = []
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if "To see the GUI go to" in line:
                    break
            else:
                pytest.fail("".join(lines)[-3000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """ComfyUI's page, once it knows the exported nodes."""
    with playwright_api.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(_PATIENCE_MS)
        page.goto(address)
        page.wait_for_function("Boolean(window.app?.vueAppReady && LiteGraph.registered_node_types.LoadImagicEdit)")
        # At the first visit the page offers its templates.
        page.get_by_role("dialog").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("dialog").wait_for(state="hidden")
        yield page
        browser.close()


def expected(parts: dict[str, Any]) -> dict[str, Any]:
    """Types, links and values of a workflow's nodes, by their numbers."""
    links = {link[0]: link for link in parts["links"]}
    return {
        str(node["id"]): (
            node["type"],
            sorted((one["name"], one["type"], *links[one["link"]][1:3]) for one in node["inputs"]),
            node["widgets_values"],
        )
        for node in parts["nodes"]
    }


def shown(page: Any) -> dict[str, Any]:
    """The same of the page's nodes, none of which is marked as missing or wrong."""
    nodes = page.evaluate(_NODES)
    assert not [node for node in nodes if node["red"]]
    return {str(node["id"]): (node["type"], sorted(map(tuple, node["links"])), node["values"]) for node in nodes}


def opened(page: Any, name: str, content: Any) -> None:
    """Opens a file in the page, as if it were dropped there."""
    page.evaluate(
        "([name, text]) => app.handleFile(new File([text], name, {type: 'application/json'}))",
        [name, json.dumps(content)],
    )


def test_the_workflow_opens_in_comfyuis_page(page: Any, address: str, folder: Path) -> None:
    """The workflow is in ComfyUI's list, opens with all nodes, links and values, and the server would run it.

    The page's own API shape of it opens with the same nodes, too.
    """
    parts = workflow(folder)
    page.get_by_role("button", name="Workflows").click()
    page.locator(".p-tree-node-label, .node-label", has_text="edit").first.click()
    page.wait_for_function(f"app.graph._nodes.length === {len(parts['nodes'])}")
    assert shown(page) == expected(parts)
    assert page.locator("[role=dialog]").count() == 0

    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert {name: one["class_type"] for name, one in prompt.items()} == {
        str(node["id"]): node["type"] for node in parts["nodes"]
    }
    answer = page.request.post(f"{address}/prompt", data={"prompt": prompt})
    assert answer.status == 200 and answer.json()["node_errors"] == {}

    page.evaluate("app.graph.clear()")
    opened(page, "api.json", prompt)
    page.wait_for_function(f"app.graph._nodes.length === {len(parts['nodes'])}")
    # It has no value for a linked input, and not what happens to a seed.
    assert {name: one[:2] for name, one in shown(page).items()} == {n: one[:2] for n, one in expected(parts).items()}
