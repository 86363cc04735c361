"""The pages for Python users are true: their blocks and the notebook run, and every public name is explained."""

import ast
import inspect
import json
import re
import shlex
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lowmem_imagic
from lowmem_imagic.cli.commands import app
from lowmem_imagic.settings import presets
from tests.processes import Process

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((DOCS / "lowmem_imagic.ipynb").read_text(encoding="utf-8"))
SHORT = {"embed": {"steps": 2}, "finetune": {"steps": 2}, "sample": {"num_inference_steps": 2}}
"""A schedule of seconds, for code that works without regard to the picture."""


def source(cell: dict[str, Any]) -> str:
    """The text of a notebook's cell."""
    return "".join(cell["source"])


@pytest.mark.process
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Every block of docs/python.md runs in its order, in one session, and leaves the files that it names."""
    monkeypatch.chdir(tmp_path)
    # The blocks take their usual presets, which are short here; commands read the same table.
    short = {stage: {**values, **SHORT.get(stage, {})} for stage, values in presets._VALUES["fast"].items()}
    monkeypatch.setitem(presets._VALUES, "fast", short)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```(\w+)\n(.+?)```", PAGE, re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "sh"}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "docs/python.md", "exec"), names)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            assert program == "lowmem-imagic"
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
    assert names["warning"] == "" and names["size_bytes"] == Path("grass.safetensors").stat().st_size
    assert names["changed"].finetune.lora_rank == 8 and names["changed"].seed == 7
    assert {picture.size for picture in names["pictures"]} == {names["photo"].image.size}
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        *(f"color-{number}.safetensors" for number in range(3)),
        "grass.safetensors",
    ]
    assert len(list(tmp_path.glob("colors/*/report.json"))) == 2
    assert [picture.size for picture in names["in_diffusers"]] == [names["photo"].image.size] * 2


@pytest.mark.process
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """The code cells of the notebook run in their order in a fresh process, on the bundled model."""
    cells = [source(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    [place] = [number for number, text in enumerate(cells) if "CHANGES = {}" in text]
    cells.insert(place + 1, f"CHANGES = {SHORT!r}")
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(cells), encoding="utf-8")
    process = Process(str(script), folder=tmp_path)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    assert {path.suffix for path in tmp_path.iterdir()} >= {".png", ".safetensors"}


def test_the_notebook_is_valid_and_has_no_results():
    """The notebook has Jupyter's format 4.5, cells with distinct names, and no outputs or counts of one machine."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    cells = NOTEBOOK["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse(source(cell))
        assert set(cell) == keys and all(isinstance(line, str) for line in cell["source"])


@pytest.mark.parametrize("name", lowmem_imagic.__all__)
def test_every_public_name_is_explained(name):
    """A public name has a docstring, as have its public methods, and stands in docs/python.md."""
    thing = getattr(lowmem_imagic, name)
    assert inspect.getdoc(thing) and not str(inspect.getdoc(thing)).startswith(f"{name}("), "no docstring of its own"
    assert f"`{name}`" in PAGE
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for member, value in members:
        if not member.startswith("_") and isinstance(value, types.FunctionType | property | staticmethod | classmethod):
            assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("name", [n for n in lowmem_imagic.__all__ if inspect.isfunction(getattr(lowmem_imagic, n))])
def test_every_parameter_of_a_public_function_is_explained(name):
    """The docstring of a public function names each of its parameters, or refers to the function that does."""
    function = getattr(lowmem_imagic, name)
    text = str(inspect.getdoc(function))
    for other in re.findall(r"[Ss]ee `(\w+)`", text):
        text += str(inspect.getdoc(getattr(lowmem_imagic, other, None)))
    missing = [one for one in inspect.signature(function).parameters if not re.search(f"`{one}`|\\b{one}:", text)]
    assert not missing
