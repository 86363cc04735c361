"""The architecture: modules import downwards only, and heavy libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_imagic

PACKAGE = Path(lowmem_imagic.__file__).parent

LAYERS = {
    0: ("errors", "failpoints", "plain_text"),
    1: ("config", "atomic", "names", "regular_files", "streams", "strict_json", "threads", "unexpected", "writable"),
    2: (
        "images",
        "letterbox",
        "png",
        "diffusion",
        "quantize",
        "frugal",
        "adapter_layers",
        "optimizer",
        "replay",
        "runs",
        "memory",
        "accounting",
        "container",
        "checks",
        "fit",
        "presets",
    ),
    3: ("identity", "safetensors_codec", "adapters", "cli_options"),
    4: ("facts", "families", "training_state", "portable"),
    5: ("edit_header", "edit", "base_model", "truncation"),
    6: ("edit_file", "training", "inversion", "masking", "suggest", "costs"),
    7: ("embed", "finetune", "packing", "sample", "planning"),
    8: ("preparation",),
    9: ("pipeline",),
    10: ("result_folder", "doctor", "console", "cli_frame"),
    11: ("rendering",),
    12: ("commands", "sheet"),
    13: ("batch",),
    14: ("cli",),
    15: ("__main__",),
}
"""Layer to modules; a module imports modules of lower layers only. `demo` stands apart: it imports errors alone."""

LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, by first name."""
    found = set()
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            where = [*inside[: len(inside) - node.level + 1], *(node.module or "").split(".")]
            first = [part for part in where if part][:1]
            found |= set(first) if first else {alias.name for alias in node.names}
        elif node.module and node.module.split(".")[0] == "lowmem_imagic":
            found |= set(node.module.split(".")[1:2])
    return found


def test_every_module_has_a_layer():
    """The table names every module and package there is, and none that is not."""
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there - {"__init__", "demo"} == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_imports_go_downwards(module):
    """A module imports only modules of lower layers; siblings do not import each other."""
    files = [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else (PACKAGE / module).glob("*.py")
    for path in files:
        for imported in _imports(path) - {module, "demo"}:
            assert LAYER_OF[imported] < LAYER_OF[module], f"{path.name} imports {imported}"


def test_demo_imports_only_errors():
    """The renderer and the training script depend on nothing of the engine."""
    for path in (PACKAGE / "demo").glob("*.py"):
        assert _imports(path) - {"demo"} <= {"errors"}


def test_only_families_know_model_classes():
    """diffusers' and transformers' classes are imported by the families (and the demo's training) alone."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name in ("families", "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"diffusers", "transformers"}, path.name


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help"], ["inspect", "--help"]])
def test_help_does_not_import_torch(words):
    """--help answers without importing torch or any other heavy library."""
    script = (
        "import sys, runpy\n"
        f"sys.argv = ['lowmem-imagic', *{words!r}]\n"
        "try:\n    runpy.run_module('lowmem_imagic', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'bitsandbytes', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    """Everything in __all__ can be imported, and the lazy table matches it."""
    for name in lowmem_imagic.__all__:
        assert getattr(lowmem_imagic, name) is not None
    assert sorted(lowmem_imagic.__all__) == sorted(lowmem_imagic._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lowmem_imagic.nothing


def test_no_module_is_long():
    """No module exceeds 500 lines."""
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert long == {}


def test_no_pickle():
    """Nothing in the package loads pickles: no torch.load, no pickle, numpy only with allow_pickle=False."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in names}, path.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                assert (owner, node.func.attr) not in {("torch", "load"), ("torch", "save")}, path.name
                if (owner, node.func.attr) == ("np", "load"):
                    assert any(k.arg == "allow_pickle" and k.value.value is False for k in node.keywords), path.name
