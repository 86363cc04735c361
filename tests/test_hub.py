"""Facts about Hub models: downloaded files, files that are never downloaded, recorded revisions, and errors."""

import fnmatch
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import TEXT_WIDTH
from huggingface_hub.errors import LocalEntryNotFoundError
from ldm_layout import write_checkpoint
from safetensors.torch import load_file, save_file

from lowmem_imagic.actions.doctor import plans
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import IncompleteModelError, UnknownModelError, WrongFamilyError
from lowmem_imagic.families import SHORT_NAMES, cached_commit
from lowmem_imagic.families.files import checkpoint as checkpoint_module
from lowmem_imagic.families.files.checkpoint import SingleFile
from lowmem_imagic.families.files.components import WEIGHTS_STEM
from lowmem_imagic.families.files.locate import locate
from lowmem_imagic.settings.presets import preset
from tests import calls

STEMS = {component: WEIGHTS_STEM[component] for component in ("unet", "vae", "text_encoder")}
"""Stems of the weight files of Stable Diffusion 1 and 2."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-sd"
BESIDE = (
    "README.md",
    ".gitattributes",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "vae/diffusion_flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "tokenizer/vocabulary.pkl",
    "scheduler/state.pt",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "feature_extractor/preprocessor_config.json",
)
"""Files in Stable Diffusion's repositories that this package does not read."""


class Hub:
    """A stand-in for the Hub: `snapshot_download` copies the files that match from a folder into a cache."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.asked: list[dict[str, Any]] = []
        self.online = True

    @property
    def downloaded(self) -> set[str]:
        """The files in the cache, relative to the model's folder."""
        folder = self.cache / COMMIT
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The remote files that match."""
        names = sorted(p.relative_to(self.remote).as_posix() for p in self.remote.rglob("*") if p.is_file())
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        """As the real one, which returns a cached folder offline only if it is known to be complete."""
        self.asked.append({"repository": repository, "revision": revision, "patterns": allow_patterns})
        for name in self.matching(allow_patterns):
            path = self.cache / COMMIT / name
            if self.online and not local_files_only:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.remote / name, path)
            elif not path.exists():
                raise LocalEntryNotFoundError("the cached snapshot is missing some of the files\nand more to say")
        return str(self.cache / COMMIT)


@pytest.fixture
def hub(folder_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with one repository that looks as Stable Diffusion's do."""
    for name in BESIDE:
        path = folder_copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not to be downloaded")
    hub = Hub(folder_copy, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def load(name: str = NAME, **options: Any) -> BaseModel:
    """A base on the CPU."""
    return BaseModel.load(name, device="cpu", **options)


def use(base: BaseModel) -> torch.Tensor:
    """Loads every part of a base; returns its UNet's prediction."""
    base.encode_images(torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        return calls.predict(base, torch.ones(1, 4, 8, 8), torch.tensor([500]), calls.encode_text(base, ["a cube"]))


def halve(folder: Path, *components: str, keep: bool = False) -> None:
    """Gives components an fp16 variant, instead of their weights or (keep) beside them."""
    for component in components:
        path = folder / component / f"{STEMS[component]}.safetensors"
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not keep:
            path.unlink()


# Downloads


def test_a_hub_model_gives_what_its_folder_gives(hub: Hub, tiny_folder: Path) -> None:
    """The downloaded files suffice for every part, and predict like the same model in a folder."""
    assert torch.equal(use(load()), use(load(str(tiny_folder))))


def test_only_what_is_needed_is_downloaded(hub: Hub) -> None:
    """Safetensors of UNet, autoencoder and text encoder, and JSON and text; no pickle, no checkpoint at the root."""
    halve(hub.remote, *STEMS, keep=True)
    load()
    weights = {f"{component}/{stem}.safetensors" for component, stem in STEMS.items()}
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == weights
    assert {Path(name).suffix for name in hub.downloaded - weights} <= {".json", ".txt"}
    assert not hub.downloaded & set(BESIDE)
    assert "model_index.json" in hub.downloaded
    assert len(hub.asked) == 2


def test_no_pattern_takes_a_pickle(hub: Hub) -> None:
    """Every pattern ends in .safetensors, or is of a configuration or a vocabulary, so nothing else can ever match."""
    halve(hub.remote, *STEMS)
    load()
    patterns = [pattern for call in hub.asked for pattern in call["patterns"]]
    assert len(hub.asked) == 3
    endings = (".safetensors", ".json", ".txt", ".jinja", "/spiece.model")
    assert all(pattern.endswith(endings) for pattern in patterns)
    assert not [pattern for pattern in patterns if pattern.startswith("*.") or "**" in pattern]


def test_sharded_weights_are_downloaded(hub: Hub, tiny_folder: Path) -> None:
    """Weights in several files come with their index and predict the same."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(hub.remote / "unet")
    (hub.remote / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(hub.remote / "unet", max_shard_size="400KB")
    assert torch.equal(use(load()), use(load(str(tiny_folder))))
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.downloaded


@pytest.mark.parametrize("halved", [tuple(STEMS), ("unet",), ("vae", "text_encoder")], ids=",".join)
def test_fp16_where_there_is_no_other(
    halved: tuple[str, ...], hub: Hub, tiny_folder: Path, relative: Callable[..., float]
) -> None:
    """Components that exist as fp16 variant only are downloaded so, of the same commit; the others as they are."""
    halve(hub.remote, *halved)
    assert relative(use(load()), use(load(str(tiny_folder)))) < 0.01
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == {
        f"{component}/{stem}{'.fp16' if component in halved else ''}.safetensors" for component, stem in STEMS.items()
    }
    assert [call["revision"] for call in hub.asked] == [None, COMMIT, COMMIT]


def test_no_weights_of_an_unsupported_pipeline_are_downloaded(hub: Hub) -> None:
    """A repository of another kind of model is refused by its name, after a few kB of configurations."""
    index = hub.remote / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("StableDiffusionPipeline", "FluxPipeline"), "utf-8")
    with pytest.raises(WrongFamilyError, match=r"someone/tiny-sd is FLUX\.1 .*not supported yet; take FLUX\.2 klein"):
        load()
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


def test_a_plan_downloads_no_weights(hub: Hub, tiny_folder: Path) -> None:
    """A plan for a Hub model takes its configurations alone, and is the one for the same model in a folder."""
    there, here = (plans(name, ["8GB"], preset("fast"), photos=(1,)) for name in (NAME, str(tiny_folder)))
    assert there == here and there[0]["plan"] is not None
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


def test_pickles_only(hub: Hub) -> None:
    """A repository whose weights are pickles is refused in one line with the missing file; nothing of it is read."""
    (hub.remote / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(IncompleteModelError, match=r"someone/tiny-sd lacks unet/diffusion_pytorch_model\.safetensors"):
        use(load())
    assert not [name for name in hub.downloaded if name.endswith((".bin", ".ckpt", ".pkl", ".pt"))]


# The cache


def test_cached_models_need_no_network(hub: Hub) -> None:
    """A model that was downloaded once loads without the Hub."""
    before = use(load())
    hub.online = False
    assert torch.equal(use(load()), before)


def test_cached_fp16_models_need_no_network(hub: Hub, tiny_folder: Path, relative: Callable[..., float]) -> None:
    """Where another tool has cached the fp16 variant alone, it serves while the Hub cannot be reached."""
    halve(hub.remote, *STEMS, keep=True)
    for name in hub.matching(["*.json", "*.txt", "*.fp16.safetensors"]):
        path = hub.cache / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub.remote / name, path)
    hub.online = False
    assert relative(use(load()), use(load(str(tiny_folder)))) < 0.01


def test_interrupted_downloads(hub: Hub) -> None:
    """Half a download is refused in one line with the model's name while the Hub cannot be reached."""
    load()
    (hub.cache / COMMIT / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    hub.online = False
    with pytest.raises((UnknownModelError, IncompleteModelError), match=NAME) as error:
        use(load())
    assert "\n" not in str(error.value)


# Records


@pytest.mark.parametrize(("short", "repository"), SHORT_NAMES.items())
def test_short_names(short: str, repository: str, hub: Hub) -> None:
    """A short name is a Hub id, and the edit file records the id."""
    base = load(short)
    assert hub.asked[0]["repository"] == repository == base.name == base.identity.source


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_revisions(revision: str | None, hub: Hub) -> None:
    """The revision asked for is passed on, and the commit that came of it is recorded."""
    assert load(revision=revision).identity.revision == COMMIT
    assert hub.asked[0]["revision"] == revision


def as_cache(folder: Path, cache: Path, digest: Callable[[bytes], str]) -> Path:
    """Lays a folder out as the Hub's cache does, files as links to blobs; `digest` names those of weights."""
    snapshot = cache / "models--someone--tiny-sd" / "snapshots" / COMMIT
    blobs = cache / "models--someone--tiny-sd" / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            name = digest(content) if path.suffix == ".safetensors" else hashlib.sha1(content).hexdigest()
            (blobs / name).write_bytes(content)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blobs / name)
    return snapshot


def test_hashes_of_a_cached_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the Hub's cache has the hashes of the same model in a folder: it is the same base, exactly."""
    snapshot = as_cache(tiny_folder, tmp_path, lambda content: hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    ours, theirs = load().identity, load(str(tiny_folder)).identity
    assert ours.files == theirs.files
    assert ours.match(theirs) == "exact"
    assert (ours.source, ours.revision) == (NAME, COMMIT)


def test_hashes_of_large_files_are_free(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache names large files by their SHA-256, which is taken from there: weights are not read to be hashed."""
    snapshot = as_cache(tiny_folder, tmp_path, lambda content: f"{len(content):064x}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    files = load().identity.files
    for component, stem in STEMS.items():
        assert files[component] == f"{(snapshot / component / f'{stem}.safetensors').stat().st_size:064x}"
    vocabulary = tiny_folder / "tokenizer" / "tokenizer.json"
    if vocabulary.exists():
        assert files["tokenizer"] == hashlib.sha256(vocabulary.read_bytes()).hexdigest()


def test_a_folder_of_links_is_hashed(tiny_folder: Path, tmp_path: Path) -> None:
    """Links elsewhere than into a cache's blobs are read to be hashed, even if their files' names look like hashes."""
    content = (tiny_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "linked"))
    target = tmp_path / "elsewhere" / ("0" * 64)
    target.parent.mkdir()
    target.write_bytes(content)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(target)
    assert load(str(folder)).identity.files["unet"] == hashlib.sha256(content).hexdigest()


# Errors


class _HttpLibraryError(Exception):
    """An error of an HTTP library: neither one of the Hub's errors nor an OSError."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("outgoing traffic has been disabled.\nTo enable it, ..."), "HF_HUB_OFFLINE is set"),
        (_HttpLibraryError("connection reset\nby peer"), "_HttpLibraryError"),
        (ConnectionError("no route"), "ConnectionError"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("bad repository name"), "ValueError"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("revision", [None, "v9"])
def test_failed_downloads(error: Exception, reason: str, revision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error of the Hub's library becomes one line with the model's name, the revision and advice."""

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UnknownModelError) as caught:
        load(revision=revision)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"model {NAME}{f' at revision {revision}' if revision else ''} is not in the local cache")
    assert reason in message and "give a local folder" in message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", [NAME, "sd15"])
def test_offline_and_not_cached(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, offline and with an empty cache, one line names the model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownModelError) as error:
        load(name)
    assert str(error.value).startswith(f"model {SHORT_NAMES.get(name, name)} is not in the local cache")
    assert "\n" not in str(error.value)


def test_offline_and_cached(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, offline, a model in its cache is found by name, and its commit with it."""
    as_cache(tiny_folder, tmp_path, lambda content: hashlib.sha256(content).hexdigest())
    reference = tmp_path / "models--someone--tiny-sd" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = load()
    assert base.identity.revision == COMMIT
    assert torch.equal(use(base), use(load(str(tiny_folder))))


def test_what_the_cache_has_whole(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model counts as being on this machine only if all its files are in the cache, at the revision asked for."""
    snapshot = as_cache(tiny_folder, tmp_path, lambda content: hashlib.sha256(content).hexdigest())
    reference = tmp_path / "models--someone--tiny-sd" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_commit(NAME, None) == cached_commit(NAME, COMMIT) == COMMIT
    assert cached_commit(NAME, "f" * 40) is None and cached_commit("someone/other", None) is None
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert cached_commit(NAME, None) is None
    weights.with_suffix(".fp16.safetensors").unlink()
    assert cached_commit(NAME, None) is None


# Names and settings


def test_the_configuration_of_a_checkpoint_by_hub_id(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint takes its configuration from a Hub id, and no weights are downloaded."""
    path = write_checkpoint(tiny_folder, tmp_path / "one.safetensors")
    base = load(str(path), config_folder=NAME)
    assert torch.equal(use(base), use(load(str(tiny_folder))))
    assert [asked["repository"] for asked in hub.asked] == [NAME]
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21", "sd21-base"])
def test_the_configuration_of_a_short_name(name: str, hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    """The configurations of the short names come with the package: the Hub is not asked."""
    source = locate(str(write_checkpoint(tiny_folder, tmp_path / "one.safetensors")), config_folder=name)
    assert isinstance(source, SingleFile)
    assert source.configuration.label == SHORT_NAMES[name]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("prediction", "name"), [("v", "sd21"), ("epsilon", "sd21-base")], ids=lambda value: str(value)
)
def test_marked_checkpoints_need_no_configuration(
    prediction: str, name: str, hub: Hub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the width leaves two models, the checkpoint's own mark decides between their configurations."""
    kinds = {(TEXT_WIDTH, "v_prediction"): "sd21", (TEXT_WIDTH, "epsilon"): "sd21-base"}
    monkeypatch.setattr(checkpoint_module, "BY_PREDICTION", kinds)
    path = write_checkpoint(tiny_folder, tmp_path / "one.safetensors")
    save_file(load_file(path), path, metadata={"modelspec.prediction_type": prediction})
    source = locate(str(path))
    assert isinstance(source, SingleFile)
    assert source.configuration.label == SHORT_NAMES[name]
    assert hub.asked == []


@pytest.mark.parametrize("name", ["sd99", "no/such/thing", "", "./sd15"])
def test_configurations_that_are_not_there(name: str, hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    """A name without a configuration is refused, with a list of valid names."""
    path = write_checkpoint(tiny_folder, tmp_path / "one.safetensors")
    with pytest.raises((UnknownModelError, IncompleteModelError)) as error:
        load(str(path), config_folder=name)
    assert "sd21" in str(error.value) or "width" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_does_not_hide_a_short_name(
    hub: Hub, folder_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that happens to be called sd15 is not the model sd15; one line says how to name it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder_copy, tmp_path / "sd15")
    assert load("sd15").name == SHORT_NAMES["sd15"]
    assert "./sd15" in caplog.text
    assert load("./sd15").name == "sd15"


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("HTTPS_PROXY", "foo://user:secret@host:1", "HTTPS_PROXY cannot be used: its scheme is 'foo'"),
        ("https_proxy", "ftp://user:secret@host:1", "https_proxy cannot be used: its scheme is 'ftp'"),
        ("HTTP_PROXY", "http://user:secret@:8080", "HTTP_PROXY cannot be used: it names no host"),
        ("ALL_PROXY", "http://user:secret@host:99999", "ALL_PROXY cannot be used: no address"),
        ("HF_ENDPOINT", "htp://secret", "HF_ENDPOINT cannot be used: its scheme is 'htp'"),
        ("HF_ENDPOINT", "secret", "HF_ENDPOINT cannot be used: its scheme is ''"),
        ("HF_ENDPOINT", "https://", "HF_ENDPOINT cannot be used: it names no host"),
    ],
)
def test_settings_that_cannot_be_used(
    variable: str, value: str, problem: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy or endpoint that cannot be used is named, without its password, and a cached model is used."""

    def fail(*arguments: Any, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            raise ValueError("what an HTTP library says of it")
        return hub.snapshot_download(*arguments, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UnknownModelError) as error:
        load()
    assert problem in str(error.value) and "secret" not in str(error.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    expected = use(load())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert torch.equal(use(load()), expected)
    assert problem in caplog.text and "secret" not in caplog.text
