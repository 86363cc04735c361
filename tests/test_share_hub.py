"""Edits on the Hugging Face Hub, against a server on this machine that speaks its protocol."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic.actions import hub as actions
from lowmem_imagic.actions.console import Silent
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit
from lowmem_imagic.errors import ConfigError, EditFileError, EditTooLargeError, HubError, OutputExistsError
from lowmem_imagic.pictures.png import EDITED, encode_png
from lowmem_imagic.share.address import Address
from tests import calls, hub_server
from tests.hub_server import Hub

REPO = "someone/cube"
EDIT_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without repositories, which knows this client."""
    with hub_server.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Xet's own protocol needs its storage; without it the library uploads large files as LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(proxy, raising=False)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def edit(base: Any) -> Edit:
    """An edit with a thumbnail."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    return replace(calls.random_edit(base), thumbnail=picture.getvalue())


@pytest.fixture
def path(edit: Edit, tmp_path: Path) -> Path:
    """The edit's file."""
    edit_file.write(edit, tmp_path / "cube.safetensors")
    return tmp_path / "cube.safetensors"


def push(path: Path, repository: str = REPO, **options: Any) -> dict[str, Any]:
    """Pushes an edit that a person has agreed to share."""
    return actions.push(path, repository, **{"agreed": True, "console": Silent(), **options})


def pull(address: str, out: Path, **options: Any) -> dict[str, Any]:
    return actions.pull(address, out=out, console=Silent(), **options)


def files(hub: Hub, name: str = REPO) -> dict[str, bytes]:
    """The newest files of a repository."""
    return hub.repos[name].commits[-1][1]


def card_of(hub: Hub, name: str = REPO) -> tuple[dict[str, Any], str]:
    """Front matter and text of a repository's card."""
    _, front, text = files(hub, name)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_pushed_edit_comes_back(hub: Hub, path: Path, edit: Edit, tmp_path: Path) -> None:
    """Push and pull give the same edit; the address in push's report is pinned to its commit."""
    report = push(path)
    assert report["address"] == f"hub:{REPO}@{hub.repos[REPO].commits[-1][0]}"
    for number, address in enumerate((REPO, f"hub:{REPO}", report["address"], f"{hub.endpoint}/{REPO}")):
        pulled = pull(address, tmp_path / f"{number}.safetensors")
        assert pulled["address"] == report["address"]
        assert edit_file.read(tmp_path / f"{number}.safetensors") == replace(edit, thumbnail=None)


def test_nothing_is_uploaded_without_a_yes(hub: Hub, path: Path) -> None:
    """Without a person's yes the Hub is not asked, and the message says that an edit gives its photo back."""
    with pytest.raises(ConfigError, match=r"gives its photo back.*`yes`"):
        push(path, agreed=False)
    result = CliRunner().invoke(app, ["push", str(path), REPO])
    assert result.exit_code == 2 and "gives its photo back" in result.stderr and "--yes" in result.stderr
    assert hub.asked == []


def test_the_command_asks_at_a_terminal(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal `push` asks, says that an edit gives its photo back, and uploads only after a yes."""
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("lowmem_imagic.cli.commands.sys", terminal)
    result = CliRunner().invoke(app, ["push", str(path), REPO], input="n\n")
    assert result.exit_code == 1 and "gives its photo back" in result.stderr and hub.asked == []
    result = CliRunner().invoke(app, ["push", str(path), REPO], input="y\n")
    assert result.exit_code == 0 and hub.repos[REPO].private


def test_a_repository_is_private_unless_asked(hub: Hub, path: Path) -> None:
    """A new repository is private; `public` makes a public one."""
    assert push(path)["private"] and hub.repos[REPO].private
    assert not push(path, "someone/open", public=True)["private"] and not hub.repos["someone/open"].private


def test_a_public_repository_needs_a_word(hub: Hub, path: Path) -> None:
    """A repository that is public already gets no edit by mistake."""
    hub.add(REPO, {".gitattributes": b""})
    with pytest.raises(HubError, match=r"is public.*`public`"):
        push(path)
    assert not [line for line in hub.asked if line.startswith(("POST", "PUT"))]
    push(path, public=True)
    assert EDIT_FILE in files(hub)


def test_an_edit_on_the_hub_is_replaced_on_request_only(hub: Hub, path: Path) -> None:
    """A second push needs `force`, and then leaves no file of the first beside its own."""
    picture = path.with_name("eta.png")
    Image.new("RGB", (8, 8)).save(picture)
    push(path, pictures=[picture])
    with pytest.raises(OutputExistsError, match="`force`"):
        push(path)
    push(path, force=True)
    assert sorted(files(hub)) == [".gitattributes", "README.md", EDIT_FILE]


def test_a_forced_push_keeps_the_users_own_files(hub: Hub, path: Path) -> None:
    """`force` replaces and deletes only files that a push uploads; question and report name them, and name an edit of
    another file name, which stays."""
    own = {
        "unet/diffusion_pytorch_model.safetensors": b"weights",
        "loras/cat.safetensors": b"an edit under another name",
        "pictures/holiday.png": b"",
        "pictures/01.png": b"",
        "more/pictures/0.png": b"",
        "readme.md": b"",
    }
    pictures = {"pictures/0.png": b"", "pictures/12.png": b""}
    hub.add(REPO, own | pictures, private=True)
    hub.add("someone/pictures", pictures, private=True)
    with pytest.raises(OutputExistsError, match="`force`"):
        push(path, "someone/pictures")
    hub.add(REPO, own | pictures | {EDIT_FILE: b"", "README.md": b""})
    picture = path.with_name("eta.png")
    Image.new("RGB", (8, 8)).save(picture)
    asked = actions.question(path, REPO, pictures=[picture], force=True)
    assert f"replaces README.md, pictures/0.png, {EDIT_FILE} and deletes pictures/12.png" in asked
    with pytest.raises(ConfigError, match=r"deletes pictures/12\.png"):
        push(path, pictures=[picture], force=True, agreed=False)
    report = push(path, pictures=[picture], force=True)
    assert {name: data for name, data in files(hub).items() if name in own} == own
    assert sorted(files(hub).keys() - own.keys()) == ["README.md", "pictures/0.png", EDIT_FILE]
    assert report["replaced"] == ["README.md", "pictures/0.png", EDIT_FILE]
    assert report["removed"] == ["pictures/12.png"] and "pictures/12.png" in report["summary"][1]
    [warning] = report["warnings"]
    assert "loras/cat.safetensors, unet/diffusion_pytorch_model.safetensors" in warning


def test_no_picture_unless_asked(hub: Hub, path: Path, edit: Edit) -> None:
    """By default no picture is uploaded and the thumbnail is taken out of the file; both are there on request, without
    the metadata of the pictures' files."""
    push(path)
    assert sorted(files(hub)) == [".gitattributes", "README.md", EDIT_FILE]
    assert edit_file.decode(files(hub)[EDIT_FILE]).thumbnail is None
    front, text = card_of(hub)
    assert "widget" not in front and "<Gallery />" not in text

    picture = path.with_name("IMG_0001.jpg")
    exif = Image.Exif()
    exif[0x010F] = "a secret camera"
    Image.new("RGB", (8, 8)).save(picture, exif=exif)
    push(path, pictures=[picture], thumbnail=True, force=True)
    assert edit_file.decode(files(hub)[EDIT_FILE]) == edit
    front, text = card_of(hub)
    assert front["widget"] == [{"text": "a blue sphere", "output": {"url": "pictures/0.png"}}]
    assert "<Gallery />" in text
    assert b"secret" not in files(hub)["pictures/0.png"]
    with Image.open(io.BytesIO(files(hub)["pictures/0.png"])) as uploaded:
        assert uploaded.size == (8, 8)
        # Nothing has edited this one.
        assert not uploaded.info
    picture.with_suffix(".png").write_bytes(encode_png(Image.new("RGB", (8, 8))))
    push(path, pictures=[picture.with_suffix(".png")], force=True)
    with Image.open(io.BytesIO(files(hub)["pictures/0.png"])) as uploaded:
        assert EDITED in uploaded.info["XML:com.adobe.xmp"]


def _made_for(edit: Edit, source: str) -> Edit:
    """The edit, made for another base."""
    return replace(edit, base=replace(edit.base, source=source))


@pytest.mark.parametrize(
    ("source", "on_hub", "license"),
    [
        ("someone/own-model", "cc-by-4.0", "cc-by-4.0"),
        ("someone/own-model", "<script>", None),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", None, "creativeml-openrail-m"),
        ("demo", None, None),
    ],
)
def test_the_card(source: str, on_hub: str | None, license: str | None, hub: Hub, edit: Edit, path: Path) -> None:
    """The card has the fields that the Hub reads: base, its licence, tags, sentence."""
    if on_hub is not None:
        hub.cards[source] = on_hub
    edit_file.write(_made_for(edit, source), path, overwrite=True)
    report = push(path)
    front, text = card_of(hub)
    assert front.get("base_model") == (source if "/" in source else None)
    assert front.get("license") == license == report["license"]
    assert bool(report["warnings"]) == (license is None and "/" in source)
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-image"
    assert front["instance_prompt"] == "a blue sphere"
    assert {"imagic", "lora", "diffusers", "text-to-image"} <= set(front["tags"])
    assert f"hub:{REPO}" in text and "reproduces its photo" in text
    assert " --etas 0,0.6,0.8,1\n" in text and ' --prompt "..." --etas' not in text


def test_the_cards_command_of_an_edit_without_a_sentence_has_one(hub: Hub, edit: Edit, path: Path) -> None:
    """An edit that was trained for no sentence is asked one in its card's command, as `sample` requires it."""
    edit_file.write(replace(edit, sentences=(), start_sentence="a cube"), path, overwrite=True)
    push(path)
    assert ' --prompt "..." --etas 0,0.6,0.8,1' in card_of(hub)[1]


@pytest.mark.parametrize(
    ("revision", "named"),
    [
        ("c0ffee+beef", "DeepFloyd/IF-I-L-v1.0"),
        ("c0ffee+none", "DeepFloyd/IF-I-L-v1.0+none"),
        ("c0ffee+DeepFloyd/IF-II-M-v1.0@beef", "DeepFloyd/IF-I-L-v1.0+DeepFloyd/IF-II-M-v1.0"),
        ("c0ffee+a;rm b@beef", "BASE"),
    ],
)
def test_the_card_names_both_stages_of_a_cascade(revision: str, named: str, hub: Hub, edit: Edit, path: Path) -> None:
    """The card's command loads the second stage that the edit was made with, and no text of a file that is no name."""
    base = replace(edit.base, source="DeepFloyd/IF-I-L-v1.0", revision=revision)
    edit_file.write(replace(edit, base=base), path, overwrite=True)
    push(path)
    assert f"--model {named} --etas" in card_of(hub)[1]


def test_text_of_an_edit_is_no_markup_of_its_card(hub: Hub, edit: Edit, path: Path) -> None:
    """A sentence can add no field, link, picture or HTML to the card."""
    hostile = 'a cube"\n---\nlicense: mit\n![x](http://evil) <img src=x> **b**\u202e'
    edit_file.write(replace(edit, sentences=(hostile,), start_sentence="", title="<b>[t](u)</b>"), path, overwrite=True)
    push(path)
    front, text = card_of(hub)
    assert "license" not in front
    assert "![x](" not in text and "<img" not in text and "<b>" not in text and "\u202e" not in text
    assert front["instance_prompt"].startswith('a cube"\\n---')


def test_the_cards_example(
    hub: Hub, edit: Edit, path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python lines of the card run as they are, with a pipeline of the base."""
    from diffusers import StableDiffusionPipeline

    push(path)
    code = card_of(hub)[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(path.parent)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    exec(compile(code, "card", "exec"), {"pipeline": pipeline})
    with Image.open("edited.png") as picture:
        assert picture.size == (16, 16)


def test_sampling_an_edit_of_the_hub(hub: Hub, path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """`sample hub:USER/REPO` renders an edit of the Hub with a base that the user names."""
    push(path)
    words = ["--model", str(tiny_folder), "--etas", "0,1", "--start", "photo", "--steps-sample", "2", "-q"]
    result = CliRunner().invoke(app, ["sample", f"hub:{REPO}", *words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("eta_*.png"))) == 2


def test_a_base_is_never_downloaded_unasked(hub: Hub, edit: Edit, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of a well-known base that is not on this machine downloads nothing: the user has to name it."""
    source = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    edit_file.write(_made_for(edit, source), path, overwrite=True)
    hub.add(source, {"model_index.json": b"{}"})
    push(path)
    hub.asked.clear()
    monkeypatch.chdir(path.parent)
    for words in (["sample", f"hub:{REPO}"], ["pull", REPO, "--force"], ["sample", str(path)]):
        result = CliRunner().invoke(app, words)
        told = result.stderr
        assert source in told
        if words[0] == "sample":
            assert result.exit_code == 1 and f"--model {source}" in told and "not on this machine" in told
    assert not [line for line in hub.asked if source in line]


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"no safetensors", EditFileError), (b"", EditFileError)],
)
def test_what_is_pulled_is_read_strictly(content: bytes, error: type, hub: Hub, tmp_path: Path) -> None:
    """A file of the Hub that is no edit gives the error that it gives on disk, and is not written."""
    hub.add(REPO, {EDIT_FILE: content})
    with pytest.raises(error):
        pull(REPO, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_huge_file_is_not_downloaded(hub: Hub, path: Path, tmp_path: Path) -> None:
    """A file larger than any edit is refused by its stated size."""
    push(path)
    hub.sizes[EDIT_FILE] = 2**31
    hub.asked.clear()
    with pytest.raises(EditTooLargeError, match="expected at most"):
        pull(REPO, tmp_path / "out.safetensors")
    assert not [line for line in hub.asked if "resolve" in line]


def test_a_pull_overwrites_nothing(hub: Hub, path: Path) -> None:
    """A file that is there already stays, unless `force` is given."""
    push(path)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        pull(REPO, path)
    assert path.read_bytes() == before
    pull(REPO, path, force=True)
    assert edit_file.read(path).thumbnail is None


def test_old_commits_stay(hub: Hub, path: Path, edit: Edit, tmp_path: Path) -> None:
    """A pinned address gives the edit of its commit, whatever was pushed since."""
    first = push(path)["address"]
    edit_file.write(replace(edit, title="another"), path, overwrite=True)
    second = push(path, force=True)["address"]
    titles = []
    for number, address in enumerate((first, second, REPO)):
        pull(address, tmp_path / f"{number}.safetensors")
        titles.append(edit_file.read(tmp_path / f"{number}.safetensors").title)
    assert titles == [edit.title, "another", "another"]
    pull(REPO, tmp_path / "first.safetensors", revision=first.partition("@")[2])
    assert edit_file.read(tmp_path / "first.safetensors").title == edit.title


def test_a_pulled_edit_needs_no_network_again(
    hub: Hub, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, an edit comes from the Hub's cache."""
    address = push(path)["address"]
    pull(REPO, tmp_path / "online.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number, name in enumerate((address, REPO)):
        report = pull(name, tmp_path / f"{number}.safetensors")
        assert report["address"] == address
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull("someone/other", tmp_path / "other.safetensors")


def test_a_file_of_any_name_needs_no_network_again(
    hub: Hub, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the only .safetensors file of the cached commit is the edit, whatever its name; of several, the link to
    a file decides."""
    one, data = "someone/one", path.read_bytes()
    hub.add(one, {"in/cat.safetensors": data, "README.md": b""})
    pinned = pull(one, tmp_path / "online.safetensors")["address"]
    hub.add(REPO, {"a.safetensors": data, "b.safetensors": data})
    links = [f"{hub.endpoint}/{REPO}/blob/main/{name}.safetensors" for name in "ab"]
    for number, link in enumerate(links):
        told = pull(link, tmp_path / f"online-{number}.safetensors")["address"]
        assert re.fullmatch(f"{hub.endpoint}/{REPO}/blob/[0-9a-f]{{40}}/{'ab'[number]}.safetensors", told)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number, address in enumerate((one, f"hub:{one}", pinned)):
        assert pull(address, tmp_path / f"{number}.safetensors")["address"] == pinned
    report = pull(links[1], tmp_path / "b.safetensors")
    # Its address leads to the same file again.
    assert re.fullmatch(f"{hub.endpoint}/{REPO}/blob/[0-9a-f]{{40}}/b.safetensors", report["address"])
    assert pull(report["address"], tmp_path / "again.safetensors")["address"] == report["address"]
    with pytest.raises(HubError, match=r"2 \.safetensors files: a\.safetensors, b\.safetensors"):
        pull(REPO, tmp_path / "more.safetensors")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull(f"{hub.endpoint}/{REPO}/blob/main/c.safetensors", tmp_path / "more.safetensors")


def test_one_of_several_files(hub: Hub, path: Path, tmp_path: Path) -> None:
    """A repository with one .safetensors file of any name gives it; of several, the link to a file decides."""
    data = path.read_bytes()
    hub.add(REPO, {"a.safetensors": data})
    pull(REPO, tmp_path / "1.safetensors")
    hub.add(REPO, {"a.safetensors": data, "in/b.safetensors": data})
    with pytest.raises(HubError, match=r"2 \.safetensors files: a\.safetensors, in/b\.safetensors"):
        pull(REPO, tmp_path / "2.safetensors")
    pull(f"{hub.endpoint}/{REPO}/blob/main/in/b.safetensors", tmp_path / "3.safetensors")
    with pytest.raises(HubError, match="has no file c"):
        pull(f"{hub.endpoint}/{REPO}/resolve/main/c.safetensors", tmp_path / "4.safetensors")
    # A folder of a repository may be called as one of the cache.
    hub.add("someone/deep", {"snapshots/edit.safetensors": data})
    told = pull("someone/deep", tmp_path / "deep.safetensors")["address"]
    assert re.fullmatch("hub:someone/deep@[0-9a-f]{40}", told)
    hub.add("someone/empty", {"model.bin": b"", "../../elsewhere.safetensors": data})
    with pytest.raises(HubError, match="no edit"):
        pull("someone/empty", tmp_path / "5.safetensors")


def test_errors_of_the_hub(hub: Hub, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such repository, revision or right, and an unknown user, each give one line with advice, without the token."""
    told = []
    for act in (
        lambda: pull("someone/nothing", tmp_path / "a.safetensors"),
        lambda: push(path, "others/cube"),
    ):
        with pytest.raises(HubError) as error:
            act()
        told.append(str(error.value))
    push(path)
    with pytest.raises(HubError, match="has no revision v9"):
        pull(f"{REPO}@v9", tmp_path / "a.safetensors")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for act in (lambda: pull(REPO, tmp_path / "a.safetensors"), lambda: push(path, "someone/new")):
        with pytest.raises(HubError, match="hf auth login") as error:
            act()
        told.append(str(error.value))
    assert not [line for line in told if "\n" in line or "hf_wrong" in line or hub_server.TOKEN in line]


def test_a_refused_edit_does_not_come_from_the_cache(
    hub: Hub, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was pulled before is taken from this machine where the Hub cannot be asked, and the log says so; not where
    it answers that there is no such revision, or that this user may not read it."""
    pinned = push(path)["address"]
    pull(REPO, tmp_path / "before.safetensors")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(HubError, match="hf auth login"):
            pull(REPO, tmp_path / "a.safetensors")
    with pytest.raises(HubError, match="has no revision v9"):
        pull(f"{REPO}@v9", tmp_path / "a.safetensors")
    for status in (403, None, 429, 503):

        def broken(*_: Any, status: int | None = status, **__: Any) -> Any:
            if status is None:
                raise OSError("no route to host")
            answer = httpx.Response(status, request=httpx.Request("GET", hub.endpoint))
            raise HfHubHTTPError("out of order", response=answer)

        caplog.clear()
        monkeypatch.setattr(HfApi, "model_info", broken)
        if status == 403:
            with pytest.raises(HubError, match="this user may not do that"):
                pull(REPO, tmp_path / "a.safetensors")
            assert "is taken" not in caplog.text
            continue
        assert pull(REPO, tmp_path / f"{status}.safetensors")["address"] == pinned
        assert f"the copy of {pinned} on this machine is taken" in caplog.text


def test_a_commit_in_between(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push does not overwrite a commit that came after it looked."""
    push(path)
    real = actions.hub.publish

    def late(*arguments: Any, **options: Any) -> Address:
        hub.add(REPO, {"theirs.txt": b""})
        return real(*arguments, **options)

    monkeypatch.setattr(actions.hub, "publish", late)
    with pytest.raises(HubError, match="changed meanwhile"):
        push(path, force=True)
    assert files(hub) == {"theirs.txt": b""}


@pytest.mark.parametrize(
    "text",
    [
        "cube",
        "a/b/c",
        "../cube",
        "someone/..",
        "someone/cu--be",
        "some one/cube",
        "hub:",
        "someone/cube@../main",
        "someone/cube@",
        "https://example.com/someone/cube",
        "https://huggingface.co.evil.com/someone/cube",
        "https://huggingface.co/someone/cube/blob/main/../../x.safetensors",
        "https://huggingface.co/someone/cube/blob/main/weights.bin",
        "https://huggingface.co/datasets/someone/cube",
        "",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    """Anything that is no repository of the Hub is refused without asking it."""
    if text == "someone/cube@":
        assert Address.of(text) == Address("someone/cube")
        return
    with pytest.raises(HubError, match="expected"):
        Address.of(text)


def test_addresses() -> None:
    """Links to a repository, a revision and a file of the Hub are addresses."""
    link = "https://huggingface.co/someone/cube"
    assert Address.of(link) == Address.of("someone/cube") == Address.of("hub:someone/cube")
    assert Address.of(f"{link}/tree/v1.0") == Address.of("someone/cube@v1.0")
    assert Address.of(f"{link}/blob/main/a b.safetensors") == Address("someone/cube", "main", "a b.safetensors")
    assert str(Address.of("hub:someone/cube@v1.0")) == "hub:someone/cube@v1.0"
    assert Address.of(str(Address("someone/cube", "v1", "in/a b.safetensors"))).file == "in/a b.safetensors"


def test_the_studio_pushes_and_pulls(hub: Hub, path: Path, tmp_path: Path) -> None:
    """The studio's process uploads an edit only with a yes, and opens the same edit again from the Hub."""
    from lowmem_imagic.batch.stopping import Stop
    from lowmem_imagic.ui.told import Told
    from lowmem_imagic.ui.work import Work

    work, told = Work(), Told(lambda event: None, Stop())
    order = {"work": "push", "file": str(path), "repository": REPO, "public": False}
    with pytest.raises(ConfigError, match="gives its photo back"):
        work.do({**order, "agreed": False}, told)
    assert REPO not in hub.repos
    assert REPO in work.do({**order, "agreed": True}, told)
    assert files(hub)[EDIT_FILE] and hub.repos[REPO].private
    opened = work.do({"work": "pull", "address": REPO, "file": str(tmp_path / "pulled.safetensors")}, told)
    assert opened["start_sentence"] == edit_file.read(path).start_sentence
