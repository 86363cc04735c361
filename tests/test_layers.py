"""The architecture: modules import downwards only, and heavy libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_imagic

PACKAGE = Path(lowmem_imagic.__file__).parent

FLOORS: tuple[set[str], ...] = (
    {"errors"},
    {"amounts", "children", "geometry", "plain_text", "unexpected"},
    {"settings", "storage"},
    {"pictures", "diffusion", "layers", "edits"},
    {"families"},
    {"engine", "share"},
    {"training", "sampling"},
    {"planning"},
    {"pipeline"},
    {"actions"},
    {"batch"},
    {"ui"},
    {"cli"},
    {"__main__"},
)
"""Folders and single modules from the ground up; `demo` stands apart: it imports errors alone."""
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
"""Every module by its dotted name; a folder's own is ``folder.__init__``."""


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, by dotted name."""
    inside, imported = path.relative_to(PACKAGE).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").split(".")
        if node.level:
            start = [*inside[: len(inside) - node.level + 1], *module]
        elif module[0] == "lowmem_imagic":
            start = module[1:]
        else:
            continue
        for alias in node.names:
            names = (".".join(filter(None, [*start, *more])) for more in ([alias.name], ["__init__"], []))
            imported.add(next((name for name in names if name in MODULES), ".".join(start)))
    return imported


def test_every_folder_has_a_floor() -> None:
    """The floors name every folder and module of the package, and none that is not there."""
    there = {name.split(".")[0] for name in MODULES}
    assert there - {"__init__", "demo"} == set(FLOOR_OF)


@pytest.mark.parametrize("folder", sorted(FLOOR_OF))
def test_imports_go_downwards(folder: str) -> None:
    """A folder imports only from lower floors; folders of one floor do not import each other."""
    upwards = sorted(
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if module.split(".")[0] == folder
        for imported in _imports(path)
        if (other := imported.split(".")[0]) not in (folder, "demo", "") and FLOOR_OF[other] >= FLOOR_OF[folder]
    )
    assert not upwards


def test_no_module_imports_itself_by_way_of_others() -> None:
    """There are no circles of imports, not even by imports inside of functions."""
    arrows = {module: _imports(path) for module, path in MODULES.items()}
    while leaves := {module for module, imported in arrows.items() if not imported & arrows.keys()}:
        arrows = {module: imported for module, imported in arrows.items() if module not in leaves}
    assert not arrows


MODELS_WORDS = {
    "latent_dist",
    "encoder_hidden_states",
    "alphas_cumprod",
    "init_noise_sigma",
    "scale_model_input",
    "hidden_states",
    "enable_gradient_checkpointing",
}
"""Attributes and arguments of diffusers' and transformers' classes."""
MODELS_STRINGS = {"unet", "transformer", "sd1", "sd2", "sdxl", "flux2", "deepfloyd"}
"""Parts and families of models."""


def _models_words(path: Path) -> set[str]:
    """Words in a file that only a family may use."""
    words = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in MODELS_WORDS:
            words.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in MODELS_WORDS:
            words.add(node.arg)
        elif isinstance(node, ast.Constant) and node.value in MODELS_STRINGS:
            words.add(str(node.value))
    return words


def test_only_families_speak_of_models() -> None:
    """Outside of `families` no code uses a model's own words: a new family touches no other folder."""
    speaking = {
        module: words
        for module, path in MODULES.items()
        if module.split(".")[0] not in ("families", "demo") and (words := _models_words(path))
    }
    # Version 1 of the edit format has one denoiser, and this is its name. The nodes for ComfyUI import nothing of this
    # package, and have to tell an XL from its smaller descendants.
    assert speaking == {"edits.versions": {"unet"}, "share.comfyui_nodes.nodes": {"sdxl"}}


def test_demo_imports_only_errors():
    """The renderer and the training script depend on nothing of the engine."""
    for path in (PACKAGE / "demo").glob("*.py"):
        assert {name for name in _imports(path) if not name.startswith("demo")} <= {"errors"}


def test_only_families_know_model_classes():
    """diffusers' and transformers' classes are imported by the families (and the demo's training) alone."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("families", "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"diffusers", "transformers"}, path.name


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help"], ["inspect", "--help"], ["ui", "--help"]])
def test_help_does_not_import_torch(words):
    """--help answers without importing torch or any other heavy library."""
    script = (
        "import sys, runpy\n"
        f"sys.argv = ['lowmem-imagic', *{words!r}]\n"
        "try:\n    runpy.run_module('lowmem_imagic', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'bitsandbytes', 'PIL', 'numpy', 'gradio'} & set(sys.modules)\n"
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


@pytest.mark.process
def test_the_python_interface_prints_nothing() -> None:
    """A script that imports the package and loads a base sees no line of a library, and its logging is left alone."""
    script = (
        "import logging\nfrom lowmem_imagic import BaseModel\nbase = BaseModel.load('demo', device='cpu')\n"
        "assert logging.getLogger('bitsandbytes').level == logging.NOTSET\n_ = base.encode_text(['a red cube'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
