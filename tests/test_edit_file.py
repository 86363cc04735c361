"""Facts about the edit file: what is written, what is read back, and how everything else is refused."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from lowmem_imagic.edits.edit import MAX_FACTOR, Edit, LoraFactors
from lowmem_imagic.edits.file import decode, encode, read, write
from lowmem_imagic.edits.header import contents, describe, summary
from lowmem_imagic.edits.identity import BaseIdentity, Interface, SourcePicture
from lowmem_imagic.edits.recorded import sampling_of
from lowmem_imagic.errors import (
    ConfigError,
    EditChangedError,
    EditFileError,
    EditHeaderError,
    EditLayoutError,
    EditNotFoundError,
    EditTooLargeError,
    MissingTensorError,
    NonFiniteEditError,
    NonFiniteTensorError,
    NotAnEditFileError,
    OutputExistsError,
    OutputUnwritableError,
    TensorDtypeError,
    TensorShapeError,
    TensorValueError,
    TruncatedEditError,
    UnknownTensorError,
    UnsupportedEditVersionError,
)
from lowmem_imagic.families.stable_diffusion import labels
from lowmem_imagic.pictures.formats import HEIF_BRANDS
from lowmem_imagic.settings.stages import MAX_ALPHA
from lowmem_imagic.storage import safetensors_reader as container
from lowmem_imagic.storage import safetensors_writer as safetensors_codec
from lowmem_imagic.storage import strict_json
from lowmem_imagic.storage.file_names import safe_stem

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_conv_in"


def identity(**changes: Any) -> BaseIdentity:
    """Returns the base of `small_edit`."""
    values: dict[str, Any] = {
        "source": "demo",
        "revision": None,
        "family": "demo",
        "interface": Interface(text={"embeds": 3}, denoisers={"unet": "epsilon"}),
        "files": {"unet": "a" * 64, "vae": "0" * 64},
    }
    return BaseIdentity(**(values | changes))


_ONLY = {
    "adapter": ("adapters", "unet"),
    "optimized_embedding": ("conditioning", "embeds"),
    "coarse_latents": ("coarse", "unet"),
    "inverted_noise": ("noise", "unet"),
}


def small_edit(**changes: Any) -> Edit:
    """Returns an edit of two layers whose every value is spelled out here.

    `changes` may use the names of version 1, which has one network and one tensor of text.
    """
    for name, (group, only) in _ONLY.items():
        if name in changes:
            value = changes.pop(name)
            changes[group] = {} if value is None else {only: value}
    values: dict[str, Any] = {
        "adapters": {
            "unet": {
                LINEAR: LoraFactors(torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0], [0.25]]), alpha=0.1),
                CONV: LoraFactors(torch.arange(16.0).reshape(2, 2, 2, 2) / 8, torch.ones(3, 2, 1, 1), alpha=2.0),
            },
        },
        "conditioning": {"embeds": torch.tensor([[0.0, 1.0, -2.0], [0.5, 0.25, 3.0]])},
        "coarse": {"unet": torch.tensor([[[0.5, -1.5]], [[2.0, 0.125]]])},
        "sentences": ("a blue cube, größer ☂",),
        "base": identity(),
        "settings": {
            "finetune": {"steps": 10, "learning_rate": 1e-4},
            "adapter": {"targets": ["attn"], "rank": 2},
        },
        "seed": 7,
        "etas": (0.0, 0.7, 1.25),
        "eta_default": 0.7,
        "source": SourcePicture(sha256="b" * 64, width_px=640, height_px=480, size=(64, 64), box=(0, 8, 64, 56)),
        "base_weights": "int8",
        "versions": {"torch": "2.0"},
        "measured": {"embed": {"seconds": 1.5, "peak_bytes": 123}},
        "title": "Blue cube",
    }
    return Edit(**(values | changes))


def pieces(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns header and tensor data of a file, by the format's definition."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """Returns a file of this header and tensor data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


VALID = encode(small_edit())

WIDE = SourcePicture(sha256="b" * 64, width_px=640, height_px=480, size=(64, 48), box=(0, 0, 64, 48))
"""A photo in a picture that is not square; version 1 has no such pictures."""


def two_networks() -> Edit:
    """Returns an edit of two networks under two tensors of text, with peft's keys."""
    factors = LoraFactors(torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0], [0.25]]), alpha=1.0)
    return small_edit(
        base=identity(
            interface=Interface(text={"tokens": 3, "pooled": 2}, denoisers={"unet": "epsilon", "unet_2": "flow"})
        ),
        adapters={name: {f"{name}.blocks.0.to_q": factors} for name in ("unet", "unet_2")},
        conditioning={"tokens": torch.ones(2, 3), "pooled": torch.tensor([0.5, 3e38]).bfloat16()},
        coarse={name: torch.zeros(3, 4, 4) for name in ("unet", "unet_2")},
        noise={"unet": torch.ones(3, 2, 2), "unet_2": torch.ones(3, 4, 4)},
        source=WIDE,
    )


VALID_FILES = {
    "version 1": VALID,
    "kohya": encode(small_edit(source=WIDE, inverted_noise=torch.ones(2, 3, 4))),
    "peft": encode(two_networks()),
}
"""A file of each version and layout."""


def with_header(change: Callable[[dict[str, Any]], None], file: str = "version 1") -> bytes:
    """Returns a valid file after `change` worked on its header."""
    header, data = pieces(VALID_FILES[file])
    change(header)
    return joined(header, data)


def with_meta(key: str, change: Callable[[dict[str, Any]], None], file: str = "version 1") -> bytes:
    """Returns a valid file after `change` worked on the JSON object in a header string."""

    def inner(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"][key])
        change(value)
        header["__metadata__"][key] = json.dumps(value)

    return with_header(inner, file)


def with_values(name: str, values: torch.Tensor) -> bytes:
    """Returns the valid file after the bytes of one tensor were replaced (and the hash corrected)."""
    header, data = pieces(VALID)
    begin, end = header[name]["data_offsets"]
    raw = bytes(safetensors_codec.tensor_bytes(values))
    assert len(raw) == end - begin
    data = data[:begin] + raw + data[end:]
    header["__metadata__"]["modelspec.hash_sha256"] = "0x" + hashlib.sha256(data).hexdigest()
    return joined(header, data)


# --- writing --------------------------------------------------------------------------------------


def test_the_bytes_of_an_edit_are_pinned() -> None:
    """The file of a hand-made edit has these bytes; only entries for other programs may ever change them."""
    data = VALID
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert data[8:].startswith(
        b'{"__metadata__":{"format":"pt","imagic.base":"{\\"cross_attention_dim\\":3,\\"family\\":\\"demo\\",'
        b'\\"files\\":{\\"unet\\":\\"aaaaaaaa'
    )
    assert '"modelspec.trigger_phrase":"a blue cube, größer ☂"'.encode() in data
    assert len(data) == 8 + length + 2 * 4 + 2 * (3 + 2 + 16 + 6)
    assert hashlib.sha256(data).hexdigest() == "19b105f07c0d6387364e308f1772f5282263e14337691c19d16120738cb413e0"


def test_the_bytes_of_version_2_are_pinned() -> None:
    """Version 2 is as stable as version 1: the files of two hand-made edits have these bytes."""
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in VALID_FILES.items()}
    assert digests["kohya"] == "13db6c541c678e19"
    assert digests["peft"] == "fb13e5dcbb16e94a"
    assert decode(VALID_FILES["peft"]) == two_networks()
    assert decode(VALID_FILES["peft"]).conditioning["pooled"].dtype == torch.bfloat16
    names = {name: set(pieces(data)[0]) - {"__metadata__"} for name, data in VALID_FILES.items()}
    assert all(name.startswith("lora_unet_") for name in names["kohya"])
    assert {name.removeprefix("lora_imagic.") for name in names["peft"] if not name.endswith("weight")} == {
        f"{group}.{name}"
        for group, some in {
            "text": ("tokens", "pooled"),
            "coarse": ("unet", "unet_2"),
            "noise": ("unet", "unet_2"),
        }.items()
        for name in some
    }


@pytest.mark.parametrize("file", ["kohya", "peft"])
def test_inspect_shows_version_2(file: str) -> None:
    """`inspect` shows the tensors of a file of version 2, and its base's interface."""
    data = VALID_FILES[file]
    shown = contents(data)
    edit = decode(data)
    assert shown["format"] == 2 and shown["source"]["size"] == [64, 48]
    assert shown["base"]["interface"]["denoisers"] == dict(edit.base.interface.denoisers)
    assert {name for name in shown["tensors"] if name.startswith("noise.")} == {f"noise.{name}" for name in edit.noise}
    assert shown["adapter"]["layers"] == sum(map(len, edit.adapters.values()))
    assert summary(shown)


def test_equal_edits_give_identical_bytes() -> None:
    """The order of mappings, tuple or list, fp32 or fp16 make no difference to the file."""
    edit = small_edit()
    other = dataclasses.replace(
        edit,
        adapters={"unet": dict(reversed(list(edit.adapters["unet"].items())))},
        conditioning={"embeds": edit.conditioning["embeds"].double().t().contiguous().t()},
        settings={"adapter": {"rank": 2, "targets": ("attn",)}, "finetune": edit.settings["finetune"]},
        etas=[0, 0.7, 1.25],
    )
    assert encode(edit) == encode(other) == VALID
    assert edit == other
    assert edit != small_edit(seed=8)
    assert edit != "an edit"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"settings": {"steps": 1}}, {"settings": {"steps": 1.0}}),
        ({"settings": {"steps": 1}}, {"settings": {"steps": True}}),
        ({"eta_default": 0.0}, {"eta_default": -0.0}),
        ({"optimized_embedding": torch.zeros(2, 3)}, {"optimized_embedding": -torch.zeros(2, 3)}),
        ({"coarse_latents": torch.zeros(1, 1, 1)}, {"coarse_latents": -torch.zeros(1, 1, 1)}),
        ({"inverted_noise": torch.zeros(2, 1, 1)}, {"inverted_noise": -torch.zeros(2, 1, 1)}),
        ({"inverted_noise": torch.zeros(2, 1, 1)}, {"inverted_noise": None}),
        ({"thumbnail": b"\xff\xd8\xff"}, {"thumbnail": None}),
    ],
)
def test_edits_whose_files_differ_are_unequal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equality is that of the bytes, also where Python or torch call different values equal."""
    assert encode(small_edit(**one)) != encode(small_edit(**other))
    assert small_edit(**one) != small_edit(**other)


def test_an_edit_keeps_its_own_copies() -> None:
    """An edit does not change with the tensors and mappings that it was made from."""
    embedding, steps = torch.ones(2, 3, dtype=torch.float16), {"steps": [1]}
    edit = small_edit(optimized_embedding=embedding, settings=steps)
    before = encode(edit)
    embedding.zero_()
    steps["steps"].append(2)
    assert encode(edit) == before


def test_the_library_reads_our_bytes(tmp_path: Path) -> None:
    """safetensors' own loader sees exactly the kohya tensors, and the header's strings."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID)
    tensors = load_file(path)
    assert sorted(tensors) == sorted(
        f"{layer}.{part}" for layer in (LINEAR, CONV) for part in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    assert torch.equal(tensors[f"{LINEAR}.lora_down.weight"], torch.tensor([[0.5, -1.0, 2.0]]).half())
    assert tensors[f"{CONV}.alpha"].item() == 2.0 and tensors[f"{CONV}.alpha"].shape == ()
    assert tensors[f"{LINEAR}.alpha"].item() == pytest.approx(0.1, rel=1e-7)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(pieces(VALID)[1]).hexdigest()
    assert "lora_adapter_metadata" not in metadata


def test_our_reader_reads_the_librarys_file(tmp_path: Path) -> None:
    """A file saved by safetensors with the same metadata, its header in any order, is the same edit."""
    (tmp_path / "ours").write_bytes(VALID)
    with safe_open(tmp_path / "ours", "pt") as file:
        metadata = file.metadata()
    for attempt in range(4):
        save_file(load_file(tmp_path / "ours"), tmp_path / f"{attempt}", metadata)
        assert read(tmp_path / f"{attempt}") == small_edit()


@pytest.mark.parametrize(
    ("family", "prediction", "architecture", "version", "v2"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1/lora", "sd_v1", "False"),
        ("sd2", "epsilon", "stable-diffusion-v2-512/lora", "sd_v2", "True"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
        ("demo", "epsilon", "lowmem-imagic-demo/lora", "lowmem_imagic_demo", "False"),
    ],
)
def test_other_programs_see_the_right_family(
    family: str, prediction: str, architecture: str, version: str, v2: str
) -> None:
    """modelspec and ss_* name the architecture in the words ComfyUI, Forge and kohya filter by."""
    interface = Interface(text={"embeds": 3}, denoisers={"unet": prediction})
    base = identity(family=family, interface=interface, labels=labels(family, prediction))
    metadata = pieces(encode(small_edit(base=base)))[0]["__metadata__"]
    labelled = small_edit(base=base)
    assert decode(encode(labelled)) == labelled and encode(decode(encode(labelled))) == encode(labelled)
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == v2
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")
    # "Dynamic" is sd-scripts' word for layers that differ.
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    [(key, only), _] = small_edit().adapters["unet"].items()
    metadata = pieces(encode(small_edit(base=base, adapter={key: only})))[0]["__metadata__"]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(only.rank), str(only.alpha))


def test_a_thumbnail_is_also_where_galleries_look() -> None:
    """Only files with a thumbnail have `ssmd_cover_images`, which A1111 and ComfyUI read."""
    picture = b"\xff\xd8\xff" + bytes(range(50))
    metadata = pieces(encode(small_edit(thumbnail=picture)))[0]["__metadata__"]
    assert [base64.b64decode(image) for image in json.loads(metadata["ssmd_cover_images"])] == [picture]
    assert "ssmd_cover_images" not in pieces(VALID)[0]["__metadata__"]


def test_the_rank_of_an_edit_is_its_largest() -> None:
    """Layers may differ in rank; the edit's is the maximum."""
    assert small_edit().rank == 2


# --- round trip -----------------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=30).filter(
    lambda text: not text.isspace()
)
TOKEN = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,10}", fullmatch=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def halves(draw: st.DrawFn, *shape: int, most: float = 65504.0) -> torch.Tensor:
    """Draws fp16 tensors of values up to `most`, subnormals and signed zeros included."""
    highest = int(torch.tensor(most, dtype=torch.float16).view(torch.int16))
    bits = draw(st.lists(st.integers(0, highest), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(bits, dtype=torch.int16).view(torch.float16).reshape(shape) * draw(st.sampled_from([1, -1]))


@st.composite
def layers(draw: st.DrawFn) -> LoraFactors:
    """Draws the factors of a linear layer or a convolution."""
    size = st.integers(1, 3)
    rank, wide, out = draw(size), draw(size), draw(size)
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (1, 2)]))
    alpha = draw(st.floats(2**-20, MAX_ALPHA, width=32))
    down = draw(halves(rank, wide, *kernel, most=MAX_FACTOR))
    return LoraFactors(down, draw(halves(out, rank, *[1 for _ in kernel], most=MAX_FACTOR)), alpha)


def baked(factors: LoraFactors) -> LoraFactors:
    """Returns the factors with their rank as alpha, as in peft's layout."""
    return LoraFactors(factors.down, factors.up, float(factors.rank))


KOHYA_ADAPTERS = st.dictionaries(
    st.from_regex(r"lora_unet_[a-z0-9_]{1,8}", fullmatch=True), layers(), min_size=1, max_size=3
)
PEFT_ADAPTERS = st.dictionaries(
    st.from_regex(r"unet\.[A-Za-z0-9_]{1,8}", fullmatch=True), layers().map(baked), min_size=1, max_size=3
)


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """Draws whole edits."""
    width = draw(st.integers(1, 4))
    text = {"embeds": width} | draw(st.sampled_from([{}, {"pooled": 2}]))
    interface = Interface(text=text, denoisers={"unet": draw(TOKEN)})
    channels, *cells = (draw(st.integers(1, 3)) for _ in range(3))
    picture = draw(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])) + draw(st.binary(max_size=20))
    left, top, wide, high = (draw(st.integers(1, 500)) for _ in range(4))
    return Edit(
        adapters={"unet": draw(st.sampled_from([KOHYA_ADAPTERS, PEFT_ADAPTERS]).flatmap(lambda adapters: adapters))},
        conditioning={name: draw(halves(draw(st.integers(1, 3)), side)) for name, side in text.items()},
        coarse={"unet": draw(halves(channels, *cells))},
        noise=draw(
            st.just({})
            | st.fixed_dictionaries({"unet": halves(channels, draw(st.integers(1, 5)), draw(st.integers(1, 5)))})
        ),
        sentences=(draw(TEXT),),
        base=BaseIdentity(
            source=draw(st.sampled_from(["demo", "someone/some-model", "my_models-folder", "größe"])),
            revision=draw(st.none() | TEXT),
            family=draw(TOKEN),
            interface=interface,
            files=draw(st.dictionaries(TOKEN, DIGEST, min_size=1, max_size=3)),
        ),
        settings=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        seed=draw(st.integers(0, 2**63 - 1)),
        etas=tuple(draw(st.lists(FINITE, max_size=4))),
        eta_default=draw(FINITE),
        source=SourcePicture(
            sha256=draw(DIGEST),
            width_px=wide,
            height_px=high,
            size=draw(st.sampled_from([(1000, 1000), (1100, 1000)])),
            box=(left, top, left + wide, top + high),
        ),
        base_weights=draw(TOKEN),
        versions=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        measured=draw(st.dictionaries(TEXT, JSON, max_size=2)),
        title=draw(TEXT),
        created=draw(
            st.none() | st.dates().map(str) | st.datetimes().map(lambda d: f"{d.isoformat(timespec='seconds')}Z")
        ),
        license=draw(st.none() | TEXT),
        thumbnail=draw(st.none() | st.just(picture)),
    )


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(edits())
def test_what_is_read_is_what_was_written(edit: Edit) -> None:
    """Every edit comes back equal, field by field, and gives the same bytes again."""
    data = encode(edit)
    back = decode(data)
    assert back == edit and encode(back) == data
    for field in dataclasses.fields(Edit):
        if field.name not in ("adapters", "conditioning", "coarse", "noise"):
            assert getattr(back, field.name) == getattr(edit, field.name)
    for group in ("conditioning", "coarse", "noise"):
        mine, theirs = getattr(back, group), getattr(edit, group)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert back.adapters["unet"].keys() == edit.adapters["unet"].keys()
    for layer, factors in edit.adapters["unet"].items():
        assert torch.equal(back.adapters["unet"][layer].down, factors.down)
        assert torch.equal(back.adapters["unet"][layer].up, factors.up)
        assert back.adapters["unet"][layer].alpha == factors.alpha


def test_a_file_round_trips_through_the_disk(tmp_path: Path) -> None:
    """write returns the size of a file that read turns into the same edit."""
    path = tmp_path / "a.safetensors"
    assert write(small_edit(), path) == path.stat().st_size == len(VALID)
    assert read(path) == small_edit()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_factors_in_other_float_types_are_read(tmp_path: Path) -> None:
    """A file whose tensors are fp32 or bf16 reads as the same values in fp16."""
    tensors = {
        f"{layer}.{part}": tensor.to(torch.bfloat16 if layer == CONV else torch.float32)
        for layer, factors in small_edit().adapters["unet"].items()
        for part, tensor in (("lora_down.weight", factors.down), ("lora_up.weight", factors.up))
    } | {f"{LINEAR}.alpha": torch.tensor(1.0), f"{CONV}.alpha": torch.tensor(2.0).half()}
    metadata = pieces(VALID)[0]["__metadata__"]
    edit = decode(safetensors_codec.serialize(tensors, metadata, hash_key="modelspec.hash_sha256"))
    assert torch.equal(edit.adapters["unet"][CONV].down, small_edit().adapters["unet"][CONV].down)
    assert edit.adapters["unet"][LINEAR].down.dtype == torch.float16
    assert (edit.adapters["unet"][LINEAR].alpha, edit.adapters["unet"][CONV].alpha) == (1.0, 2.0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    """An edit's file has the permissions of any new file, unlike the library's files (0600)."""
    before = os.umask(0o022)
    try:
        write(small_edit(), tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_an_existing_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    """write refuses an existing path, and replaces it with overwrite=True."""
    path = tmp_path / "a"
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError):
        write(small_edit(), path)
    assert path.read_bytes() == b"precious"
    write(small_edit(), path, overwrite=True)
    assert path.read_bytes() == VALID
    with pytest.raises(OutputUnwritableError):
        write(small_edit(), tmp_path / "missing" / "a")


# --- refusing files -------------------------------------------------------------------------------


def _offsets(name: str, begin: int, end: int) -> bytes:
    return with_header(lambda header: header[name].update(data_offsets=[begin, end]))


def _drop(name: str) -> bytes:
    """Returns the valid file without one tensor, and without a hole in its place."""
    parsed = container.parse(VALID)
    tensors = {key: safetensors_codec.container_tensor(parsed, key) for key in parsed.entries}
    del tensors[name]
    return safetensors_codec.serialize(tensors, pieces(VALID)[0]["__metadata__"], hash_key="modelspec.hash_sha256")


def _rename(old: str, new: str) -> bytes:
    return with_header(lambda header: header.update({new: header.pop(old)}))


def _metadata(**changes: Any) -> bytes:
    return with_header(
        lambda header: header["__metadata__"].update({k.replace("__", "."): v for k, v in changes.items()})
    )


def _sized(size_px: int) -> Callable[[dict[str, Any]], None]:
    """Returns a change of ``imagic.meta`` to a photo that fills a model's square of this side."""
    return lambda meta: meta["source"].update(size_px=size_px, box=[0, 0, size_px, size_px])


def _resaved(more: dict[str, str], without: str = "") -> bytes:
    """Returns the valid file after a tool has loaded it, halved its strength and saved it with its metadata."""
    parsed = container.parse(VALID)
    tensors = {name: safetensors_codec.container_tensor(parsed, name) / 2 for name in parsed.entries if name != without}
    saved: bytes = save(tensors, {**dict(reversed(parsed.metadata.items())), **more})
    return saved


def _tensors_are(text: str | None) -> Callable[[dict[str, Any]], None]:
    """Returns a change of ``imagic.tensors`` to this text, or to none."""

    def change(header: dict[str, Any]) -> None:
        del header["__metadata__"]["imagic.tensors"]
        if text is not None:
            header["__metadata__"]["imagic.tensors"] = text

    return change


DOWN, ALPHA = f"{LINEAR}.lora_down.weight", f"{LINEAR}.alpha"
HUGE = 2**60
DEEP = "[" * 100_000

HOSTILE: dict[str, tuple[type[EditFileError], str, bytes]] = {
    "empty": (TruncatedEditError, "0 bytes", b""),
    "short": (TruncatedEditError, "9 bytes", b"\x02\0\0\0\0\0\0\0{"),
    "png": (NotAnEditFileError, "a PNG picture, not an edit file", b"\x89PNG\r\n\x1a\n" + b"IHDR" * 10),
    "zip (pickle)": (NotAnEditFileError, "a zip archive, not an edit file", b"PK\x03\x04" + bytes(100)),
    "header in an array": (NotAnEditFileError, "this is not an edit file", joined(b"[]", b"")),
    "header beyond the cap": (EditTooLargeError, "header claims", (2**63).to_bytes(8, "little") + b'{"a":1}'),
    "header beyond the end": (
        TruncatedEditError,
        "header claims 1000",
        (1000).to_bytes(8, "little") + b'{"a":1}',
    ),
    "data cut off": (TruncatedEditError, "the file ends", VALID[:-1]),
    "header not UTF-8": (EditHeaderError, "UTF-8", joined(b'{"\xff":1}', b"")),
    "header not JSON": (EditHeaderError, "not valid JSON", joined(b'{"a":', b"")),
    "text after the header": (EditHeaderError, "not valid JSON", joined(b'{"a":1} x', b"")),
    "duplicate tensor": (EditHeaderError, "'a' occurs twice", joined(b'{"a":1,"b":2,"a":3}', b"")),
    "duplicate metadata": (
        EditHeaderError,
        "'format' occurs twice",
        VALID[:8] + VALID[8:].replace(b'"modelspec.implementation"', b'"format"                  ', 1),
    ),
    "duplicate deep inside": (
        EditHeaderError,
        "imagic.meta: key 'steps' occurs twice",
        _metadata(imagic__meta='{"settings":{"steps":1,"steps":2}}'),
    ),
    "deep header": (EditHeaderError, "levels deep", joined(b'{"a":' + DEEP.encode(), b"")),
    "deep meta": (EditHeaderError, "imagic.meta: nested", _metadata(imagic__meta='{"a":' + DEEP)),
    "many values": (EditHeaderError, "tokens", joined(b'{"a":[' + b"0," * 1_100_000, b"")),
    "huge integer": (EditHeaderError, "too large", joined(b'{"a":' + b"9" * 5000 + b"}", b"")),
    "huge float": (EditHeaderError, "too large", joined(b'{"a":1e999}', b"")),
    "NaN in JSON": (EditHeaderError, "NaN", joined(b'{"a":NaN}', b"")),
    "metadata not text": (
        EditHeaderError,
        "__metadata__",
        with_header(lambda h: h["__metadata__"].update(a=1)),
    ),
    "metadata a list": (EditHeaderError, "__metadata__", with_header(lambda h: h.update(__metadata__=[]))),
    "entry not an object": (EditHeaderError, "data_offsets", with_header(lambda h: h.update({DOWN: 1}))),
    "entry with more": (EditHeaderError, "data_offsets", with_header(lambda h: h[DOWN].update(extra=1))),
    "shape not integers": (EditHeaderError, "shape", with_header(lambda h: h[DOWN].update(shape=[1.0, 3]))),
    "shape of booleans": (EditHeaderError, "shape", with_header(lambda h: h[DOWN].update(shape=[True, 3]))),
    "negative shape": (EditHeaderError, "shape", with_header(lambda h: h[DOWN].update(shape=[-1, -3]))),
    "negative offset": (EditHeaderError, "data_offsets", _offsets(DOWN, -6, 0)),
    "unknown type": (TensorDtypeError, "F128", with_header(lambda h: h[DOWN].update(dtype="F128"))),
    "type not text": (TensorDtypeError, "found type", with_header(lambda h: h[DOWN].update(dtype=["F16"]))),
    "integer factors": (TensorDtypeError, "I16", with_header(lambda h: h[DOWN].update(dtype="I16"))),
    "double factors": (
        TensorDtypeError,
        "F64",
        with_header(lambda h: h[f"{CONV}.lora_down.weight"].update(dtype="F64", shape=[2, 2])),
    ),
    "shape against bytes": (TensorShapeError, "span", with_header(lambda h: h[DOWN].update(shape=[1, 4]))),
    "huge shape": (
        TensorShapeError,
        "beyond any file",
        with_header(lambda h: h[DOWN].update(shape=[HUGE, HUGE])),
    ),
    "huge empty shape": (
        TensorShapeError,
        "beyond any file",
        with_header(lambda h: h[DOWN].update(shape=[0, HUGE, HUGE], data_offsets=[0, 0])),
    ),
    "many dimensions": (
        TensorShapeError,
        "beyond",
        with_header(lambda h: h[DOWN].update(shape=[1] * 1000 + [3])),
    ),
    "huge offsets": (EditLayoutError, "hole", _offsets(DOWN, HUGE, HUGE + 6)),
    "offsets reversed": (EditLayoutError, "begin, end", _offsets(DOWN, 6, 0)),
    "overlap": (EditLayoutError, "overlaps", _offsets(DOWN, 4, 10)),
    "stray bytes": (EditLayoutError, "2 stray bytes", VALID + b"xx"),
    "hole": (
        EditLayoutError,
        "hole",
        joined(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"xx"),
    ),
    "plain LoRA": (
        NotAnEditFileError,
        "this is a LoRA but not an edit",
        joined(b'{"lora_unet_x.alpha":{"dtype":"F16","shape":[],"data_offsets":[0,2]}}', b"\0\0"),
    ),
    "PEFT LoRA": (
        NotAnEditFileError,
        "this is a LoRA but not an edit",
        joined(b'{"unet.to_q.lora_A.weight":{"dtype":"F16","shape":[1,1],"data_offsets":[0,2]}}', b"\0\0"),
    ),
    "model": (
        NotAnEditFileError,
        "this is a safetensors file but not an edit",
        joined(b'{"conv_in.weight":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
    ),
    "newer format": (UnsupportedEditVersionError, "format 4, .*upgrade", _metadata(imagic__spec="4")),
    "version 1 called 2": (
        EditHeaderError,
        "'imagic.coarse_latents': not a key of format 2",
        _metadata(imagic__spec="2"),
    ),
    "interface with more": (
        EditHeaderError,
        "interface: 'x' is not a member",
        with_meta("imagic.base", lambda m: m["interface"].update(x=1), "kohya"),
    ),
    "no denoisers": (
        EditHeaderError,
        "denoisers",
        with_meta("imagic.base", lambda m: m["interface"].update(denoisers={}), "peft"),
    ),
    "too many tensors of text": (
        EditHeaderError,
        "at most 12 tensors",
        with_meta("imagic.base", lambda m: m["interface"].update(text={f"t{n}": 1 for n in range(9)}), "peft"),
    ),
    "denoiser that is a path": (
        EditHeaderError,
        "names of lower-case letters",
        with_meta("imagic.base", lambda m: m["interface"].update(denoisers={"../x": "epsilon"}), "kohya"),
    ),
    "kohya for two networks": (
        UnknownTensorError,
        "belongs to none of the base's denoisers",
        with_meta("imagic.base", lambda m: m["interface"].update(denoisers={"a": "flow", "b": "flow"}), "kohya"),
    ),
    "layer of another network": (
        UnknownTensorError,
        "unet_2.*belongs to none",
        with_meta("imagic.base", lambda m: m["interface"].update(denoisers={"unet": "flow", "b": "flow"}), "peft"),
    ),
    "tensors no object": (EditHeaderError, "a JSON object", with_header(_tensors_are("[]"), "kohya")),
    "tensors missing": (EditHeaderError, "imagic.tensors: missing", with_header(_tensors_are(None), "kohya")),
    "tensor of text missing": (
        EditHeaderError,
        "'text.pooled' is missing",
        with_meta("imagic.tensors", lambda m: m.pop("text.pooled"), "peft"),
    ),
    "noise of one network alone": (
        EditHeaderError,
        "'noise.unet_2' is missing",
        with_meta("imagic.tensors", lambda m: m.pop("noise.unet_2"), "peft"),
    ),
    "tensor of no part": (
        EditHeaderError,
        "'text.x' is not a member",
        with_meta("imagic.tensors", lambda m: m.update({"text.x": m["text.embeds"]}), "kohya"),
    ),
    "tensor beside kohya's keys": (
        EditHeaderError,
        "text.embeds: 'data' is missing",
        with_meta("imagic.tensors", lambda m: m.update({"text.embeds": {"tensor": "lora_imagic.x"}}), "kohya"),
    ),
    "values in the header beside peft's keys": (
        EditHeaderError,
        "text.tokens: ",
        with_meta(
            "imagic.tensors",
            lambda m: m.update({"text.tokens": {"dtype": "F16", "shape": [1, 3], "data": "AAAAAAAA"}}),
            "peft",
        ),
    ),
    "tensor under another name": (
        EditHeaderError,
        "expected the tensor lora_imagic.text.tokens",
        with_meta("imagic.tensors", lambda m: m.update({"text.tokens": {"tensor": "lora_imagic.text.pooled"}}), "peft"),
    ),
    "tensor that is not there": (
        MissingTensorError,
        "lora_imagic.text.tokens is missing",
        with_header(lambda h: h.update({"lora_imagic.y": h.pop("lora_imagic.text.tokens")}), "peft"),
    ),
    "tensor that nothing names": (
        UnknownTensorError,
        "not named by imagic.tensors",
        with_meta("imagic.tensors", lambda m: [m.pop(name) for name in ("noise.unet", "noise.unet_2")], "peft"),
    ),
    "stored in eight bits": (
        TensorDtypeError,
        "text.embeds: found type 'I8'",
        with_meta("imagic.tensors", lambda m: m["text.embeds"].update(dtype="I8"), "kohya"),
    ),
    "many sides": (
        TensorShapeError,
        "1 to 4 sides",
        with_meta("imagic.tensors", lambda m: m["text.embeds"].update(shape=[1, 1, 1, 2, 3]), "kohya"),
    ),
    "text of another width": (
        TensorShapeError,
        r"text.embeds: found shape \(2, 3\), expected \(T, 4\)",
        with_meta("imagic.base", lambda m: m["interface"].update(text={"embeds": 4}), "kohya"),
    ),
    "size of three sides": (
        EditHeaderError,
        "source.size",
        with_meta("imagic.meta", lambda m: m["source"].update(size=[64, 48, 1]), "kohya"),
    ),
    "size beyond any": (
        EditHeaderError,
        "source.size",
        with_meta("imagic.meta", lambda m: m["source"].update(size=[64, 48_000]), "kohya"),
    ),
    "box beyond a wide picture": (
        EditHeaderError,
        "from 0 to 48",
        with_meta("imagic.meta", lambda m: m["source"].update(box=[0, 0, 64, 64]), "kohya"),
    ),
    "mixed layouts": (
        UnknownTensorError,
        "not part of an edit",
        with_header(lambda h: h.update({"lora_unet_x.alpha": h.pop("unet.blocks.0.to_q.lora_A.weight")}), "peft"),
    ),
    "half a layer": (
        MissingTensorError,
        "lora_A.weight is missing",
        with_header(lambda h: h.update({"lora_imagic.z": h.pop("unet.blocks.0.to_q.lora_A.weight")}), "peft"),
    ),
    "strange version": (EditHeaderError, "imagic.spec", _metadata(imagic__spec="1.0")),
    "no version": (
        EditHeaderError,
        "imagic.spec: missing",
        with_header(lambda h: h["__metadata__"].pop("imagic.spec")),
    ),
    "no base": (
        EditHeaderError,
        "imagic.base: missing",
        with_header(lambda h: h["__metadata__"].pop("imagic.base")),
    ),
    "no title": (
        EditHeaderError,
        "modelspec.title: missing",
        with_header(lambda h: h["__metadata__"].pop("modelspec.title")),
    ),
    "no hash": (
        EditHeaderError,
        "modelspec.hash_sha256: missing",
        with_header(lambda h: h["__metadata__"].pop("modelspec.hash_sha256")),
    ),
    "unknown imagic key": (EditHeaderError, "imagic.new", _metadata(imagic__new="x")),
    "meta not an object": (
        EditHeaderError,
        "imagic.meta: expected a JSON object",
        _metadata(imagic__meta="[1]"),
    ),
    "meta with more": (
        EditHeaderError,
        "'path' is not a member",
        with_meta("imagic.meta", lambda m: m.update(path="/")),
    ),
    "meta with less": (
        EditHeaderError,
        "'seed' is missing",
        with_meta("imagic.meta", lambda m: m.pop("seed")),
    ),
    "source not an object": (
        EditHeaderError,
        "source",
        with_meta("imagic.meta", lambda m: m.update(source=[])),
    ),
    "seed negative": (
        EditHeaderError,
        "imagic.meta seed: found -1",
        with_meta("imagic.meta", lambda m: m.update(seed=-1)),
    ),
    "seed too large": (EditHeaderError, "seed", with_meta("imagic.meta", lambda m: m.update(seed=2**63))),
    "seed not an integer": (EditHeaderError, "seed", with_meta("imagic.meta", lambda m: m.update(seed=True))),
    "eta not a number": (EditHeaderError, "etas", with_meta("imagic.meta", lambda m: m.update(etas=["1"]))),
    "etas not a list": (EditHeaderError, "etas", with_meta("imagic.meta", lambda m: m.update(etas=1))),
    "settings not an object": (
        EditHeaderError,
        "settings",
        with_meta("imagic.meta", lambda m: m.update(settings=3)),
    ),
    "prompt blank": (
        EditHeaderError,
        "target_prompt",
        with_meta("imagic.meta", lambda m: m.update(target_prompt=" ")),
    ),
    "prompt too long": (
        EditHeaderError,
        "4096",
        with_meta("imagic.meta", lambda m: m.update(target_prompt="a" * 5000)),
    ),
    "prompt with escapes": (
        EditHeaderError,
        "control characters",
        with_meta("imagic.meta", lambda m: m.update(target_prompt="a\x1b[2J")),
    ),
    "prompt with half a character": (
        EditHeaderError,
        "control characters",
        with_meta("imagic.meta", lambda m: m.update(target_prompt="a\ud800")),
    ),
    "title of two lines": (EditHeaderError, "one line", _metadata(modelspec__title="a\nb")),
    "base a path": (
        EditHeaderError,
        "not a path",
        with_meta("imagic.base", lambda m: m.update(source="/home/me/sd")),
    ),
    "base a parent": (
        EditHeaderError,
        "not a path",
        with_meta("imagic.base", lambda m: m.update(source="a/..")),
    ),
    "base on a drive": (
        EditHeaderError,
        "not a path",
        with_meta("imagic.base", lambda m: m.update(source="C:\\sd")),
    ),
    "base of HTML": (
        EditHeaderError,
        "letters, digits",
        with_meta("imagic.base", lambda m: m.update(source="a<img src=x onerror=alert(1)>")),
    ),
    "base of Markdown": (
        EditHeaderError,
        "letters, digits",
        with_meta("imagic.base", lambda m: m.update(source="a`b`[l](m)")),
    ),
    "base with a mark of direction": (
        EditHeaderError,
        "letters, digits",
        with_meta("imagic.base", lambda m: m.update(source="a\u202eb")),
    ),
    "hash not hex": (
        EditHeaderError,
        "64 lower-case",
        with_meta("imagic.base", lambda m: m["files"].update(unet="g" * 64)),
    ),
    "no files": (EditHeaderError, "files", with_meta("imagic.base", lambda m: m.update(files={}))),
    "box reversed": (
        EditHeaderError,
        "left < right",
        with_meta("imagic.meta", lambda m: m["source"].update(box=[5, 0, 5, 9])),
    ),
    "date impossible": (EditHeaderError, "modelspec.date", _metadata(modelspec__date="2025-02-30")),
    "thumbnail elsewhere": (
        EditHeaderError,
        "thumbnail",
        _metadata(modelspec__thumbnail="https://example.com/a.jpg"),
    ),
    "thumbnail not a picture": (
        EditHeaderError,
        "thumbnail",
        _metadata(modelspec__thumbnail="data:image/png;base64,AAAA"),
    ),
    "thumbnail mislabelled": (
        EditHeaderError,
        "thumbnail",
        _metadata(modelspec__thumbnail="data:image/png;base64," + base64.b64encode(b"\xff\xd8\xff").decode()),
    ),
    "e_opt type": (TensorDtypeError, "F32", with_meta("imagic.e_opt", lambda m: m.update(dtype="F32"))),
    "e_opt shape": (
        TensorShapeError,
        "imagic.e_opt",
        with_meta("imagic.e_opt", lambda m: m.update(shape=[6])),
    ),
    "e_opt huge": (
        TensorShapeError,
        "imagic.e_opt",
        with_meta("imagic.e_opt", lambda m: m.update(shape=[2**40, 3])),
    ),
    "e_opt width": (
        TensorShapeError,
        r"\(T, 3\)",
        with_meta("imagic.e_opt", lambda m: m.update(shape=[3, 2])),
    ),
    "e_opt short": (
        TensorShapeError,
        "imagic.e_opt",
        with_meta("imagic.e_opt", lambda m: m.update(data="AAAA")),
    ),
    "e_opt not base64": (
        EditHeaderError,
        "base64",
        with_meta("imagic.e_opt", lambda m: m.update(data="AAAA AAAAAAAAAAA")),
    ),
    "e_opt not ASCII": (
        EditHeaderError,
        "base64",
        with_meta("imagic.e_opt", lambda m: m.update(data="ÄÄÄÄ")),
    ),
    "e_opt NaN": (
        NonFiniteTensorError,
        "imagic.e_opt",
        with_meta("imagic.e_opt", lambda m: m.update(data=base64.b64encode(b"\xff\x7f" * 6).decode())),
    ),
    "coarse latents missing": (
        EditHeaderError,
        "coarse_latents: missing",
        with_header(lambda h: h["__metadata__"].pop("imagic.coarse_latents")),
    ),
    "coarse latents flat": (
        TensorShapeError,
        r"\[C, h, w\]",
        with_meta("imagic.coarse_latents", lambda m: m.update(shape=[2, 2])),
    ),
    "coarse latents too fine": (
        TensorShapeError,
        "up to 16",
        with_meta(
            "imagic.coarse_latents",
            lambda m: m.update(shape=[1, 17, 1], data=base64.b64encode(b"\0" * 34).decode()),
        ),
    ),
    "own noise of another depth": (
        TensorShapeError,
        r"\(2, H, W\)",
        with_header(
            lambda h: h["__metadata__"].update(
                {"imagic.inverted_noise": json.dumps({"dtype": "F16", "shape": [1, 1, 1], "data": "AAA="})}
            )
        ),
    ),
    "box beyond the square": (
        EditHeaderError,
        "from 0 to 64",
        with_meta("imagic.meta", lambda m: m["source"].update(box=[0, 0, 5000, 5000])),
    ),
    "photo of a million by a million": (
        EditHeaderError,
        "at most 100000000",
        with_meta("imagic.meta", lambda m: m["source"].update(width_px=10**6, height_px=10**6)),
    ),
    "etas no list": (EditHeaderError, "imagic.meta etas", with_meta("imagic.meta", lambda m: m.update(etas="abc"))),
    "too many etas": (EditHeaderError, "at most 256", with_meta("imagic.meta", lambda m: m.update(etas=[0] * 257))),
    "settings no object": (
        EditHeaderError,
        "imagic.meta settings",
        with_meta("imagic.meta", lambda m: m.update(settings=[1])),
    ),
    "terminal codes in the sentence": (
        EditHeaderError,
        "target_prompt",
        with_meta("imagic.meta", lambda m: m.update(target_prompt="\x1b[2Jhello")),
    ),
    "unknown tensor": (UnknownTensorError, "lora_te", _rename(ALPHA, "lora_te_x.alpha")),
    "tensor name with a path": (UnknownTensorError, "passwd", _rename(ALPHA, "lora_unet_../passwd.alpha")),
    "tensor name with a line": (UnknownTensorError, r"alpha\\n", _rename(ALPHA, ALPHA + "\n")),
    "down missing": (MissingTensorError, "lora_down.weight is missing", _drop(DOWN)),
    "alpha missing": (MissingTensorError, "alpha is missing", _drop(ALPHA)),
    "no layers": (
        MissingTensorError,
        "no layers",
        with_header(lambda h: [h.pop(k) for k in list(h) if k != "__metadata__"])[: -len(pieces(VALID)[1])],
    ),
    "alpha a vector": (TensorShapeError, "scalar", with_header(lambda h: h[ALPHA].update(shape=[1]))),
    "down a vector": (TensorShapeError, "expected", with_header(lambda h: h[DOWN].update(shape=[3]))),
    "ranks differ": (TensorShapeError, "same rank", with_header(lambda h: h[DOWN].update(shape=[3, 1]))),
    "up with a kernel": (
        TensorShapeError,
        "expected",
        with_header(lambda h: h[f"{CONV}.lora_up.weight"].update(shape=[1, 2, 3, 1])),
    ),
    "down NaN": (
        NonFiniteTensorError,
        "lora_down",
        with_values(DOWN, torch.tensor([[math.nan, 1, 1]]).half()),
    ),
    "down infinite": (
        NonFiniteTensorError,
        "lora_down",
        with_values(DOWN, torch.tensor([[1, -math.inf, 1]]).half()),
    ),
    "alpha NaN": (NonFiniteTensorError, "alpha", with_values(ALPHA, torch.tensor(math.nan))),
    "alpha infinite": (NonFiniteTensorError, "alpha", with_values(ALPHA, torch.tensor(math.inf))),
    "alpha zero": (EditHeaderError, "above 0", with_values(ALPHA, torch.tensor(0.0))),
    "alpha negative": (EditHeaderError, "above 0", with_values(ALPHA, torch.tensor(-1.0))),
    "alpha beyond all use": (TensorValueError, "at most 10000", with_values(ALPHA, torch.tensor(3.4e38))),
    "factors beyond all use": (
        TensorValueError,
        "at most 1024",
        with_values(DOWN, torch.tensor([0.5, -1025.0, 2.0]).half()),
    ),
    "size beyond any model": (EditHeaderError, "size_px", with_meta("imagic.meta", _sized(20_000))),
    "a flipped bit": (EditChangedError, "damaged, fetch it again", VALID[:-1] + bytes([VALID[-1] ^ 1])),
    "resized by sd-scripts": (EditChangedError, "another program", _resaved({"sshs_model_hash": "ab"})),
    "alpha dropped elsewhere": (MissingTensorError, "another program", _resaved({}, without=ALPHA)),
    "merged elsewhere": (EditChangedError, "another program", _resaved({})),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_each_way_to_be_wrong_has_its_error(case: str) -> None:
    """The file is refused by exactly this class, in one short line that names the place."""
    error, message, data = HOSTILE[case]
    with pytest.raises(EditFileError, match=message) as caught:
        decode(data)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("etas", 5), ("etas", [9]), ("negative_prompt", 5), ("scheduler", []), ("seeds", ["1"])]
)
def test_recorded_settings_that_are_none(key: str, value: Any) -> None:
    """Invalid sampling settings in a file are an error of the file, not of the command."""
    edit = small_edit(settings={"sample": {key: value}})
    with pytest.raises(EditHeaderError, match=f"imagic.meta settings sample.*{key}"):
        sampling_of(decode(encode(edit)), {})
    with pytest.raises(ConfigError, match="`etas` has 9"):
        sampling_of(small_edit(), {"etas": (9.0,)})


def test_every_error_of_the_tree_has_a_hostile_file() -> None:
    """The hostile files reach every EditFileError except 'not found' and the error of rendering."""
    others = {EditNotFoundError, NonFiniteEditError}
    assert {error for error, _, _ in HOSTILE.values()} == set(EditFileError.__subclasses__()) - others


def test_unknown_header_keys_of_others_are_tolerated() -> None:
    """Keys that other programs add to a LoRA's header do not matter."""
    assert decode(_metadata(sshs_model_hash="abc", ss_tag="{}")) == small_edit()


@pytest.mark.parametrize("case", ["zeros", "a tensor of another kind", "a layer"])
def test_a_gigabyte_that_is_no_edit_is_not_read(case: str, tmp_path: Path) -> None:
    """A sparse file of a gigabyte is refused by its first bytes or its header, for less than a megabyte."""
    path, size = tmp_path / "big.safetensors", container.MAX_FILE_BYTES - 1000
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    names = {"zeros": None, "a tensor of another kind": "weights", "a layer": DOWN}
    metadata = pieces(VALID)[0]["__metadata__"]
    head = b"" if (name := names[case]) is None else joined({"__metadata__": metadata, name: entry}, b"")
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size if head else size)
    tracemalloc.start()
    for reader in (read, describe):
        with pytest.raises(EditFileError):
            reader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("shape", [[], [1], [2, 1, 1], [1, 1, 1, 1, 1], [0, 3], [1, 0]])
def test_inspect_refuses_the_shapes_that_reading_refuses(part: str, shape: list[int], tmp_path: Path) -> None:
    """A layer whose tensors have other than two or four sides is refused by name, also if no tensor is created."""
    parsed = container.parse(VALID)
    tensors = {name: safetensors_codec.container_tensor(parsed, name) for name in parsed.entries}
    tensors[f"{LINEAR}.{part}"] = torch.ones(shape, dtype=torch.float32 if part == "alpha" else torch.float16)
    metadata = dict(parsed.metadata)
    path = tmp_path / "shape.safetensors"
    path.write_bytes(safetensors_codec.serialize(tensors, metadata, hash_key="modelspec.hash_sha256"))
    if part == "alpha" and not shape:
        assert describe(path)
        return
    for reader in (read, describe):
        with pytest.raises(TensorShapeError):
            reader(path)


@pytest.mark.parametrize(
    "case", ["alpha NaN", "alpha infinite", "alpha zero", "alpha negative", "alpha beyond all use"]
)
def test_inspect_refuses_the_alphas_that_reading_refuses(case: str) -> None:
    """A listing never shows an edit whose scale cannot be used."""
    error, message, data = HOSTILE[case]
    with pytest.raises(error, match=message):
        contents(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inspect_says_where_alphas_differ(dtype: torch.dtype) -> None:
    """`inspect` remarks on adapters that diffusers 0.33 to 0.42 misread, as of version 0.1.0, in any precision."""
    values = {f"{LINEAR}.alpha": torch.tensor(4.0), f"{CONV}.alpha": torch.tensor(2.0)}
    parsed = container.parse(VALID)
    for alphas in ([4.0, 2.0], [2.0, 2.0]):
        tensors = {name: safetensors_codec.container_tensor(parsed, name) for name in parsed.entries}
        tensors |= {name: torch.tensor(alpha, dtype=dtype) for name, alpha in zip(values, alphas, strict=True)}
        data = safetensors_codec.serialize(tensors, dict(parsed.metadata), hash_key="modelspec.hash_sha256")
        shown = contents(data)
        assert shown["adapter"]["alphas"] == sorted(set(alphas))
        assert ("diffusers 0.33" in summary(shown)) == (len(set(alphas)) > 1)


def test_huge_claims_allocate_nothing() -> None:
    """Refusing a terabyte-sized claim takes less than a megabyte."""
    data = [HOSTILE[case][2] for case in ("huge shape", "huge offsets", "header beyond the cap", "e_opt huge")]
    tracemalloc.start()
    for item in data:
        with pytest.raises(EditFileError):
            decode(item)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# --- refusing paths -------------------------------------------------------------------------------


def test_unusable_paths_are_refused_at_once(tmp_path: Path) -> None:
    """A missing file, a folder, a NUL name and a pipe nobody writes to are refused without waiting."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    started = time.monotonic()
    for name in ("missing", "", "nul\0", "pipe", "loop", "n" * 300):
        with pytest.raises(EditNotFoundError):
            read(f"{tmp_path}/{name}")
    assert time.monotonic() - started < 2


def test_a_folder_in_place_of_an_edit_file_is_called_so(tmp_path: Path) -> None:
    """The message names the folder's only safetensors file, and opens none."""
    with pytest.raises(EditNotFoundError, match=r"is a folder, .*no \.safetensors file inside"):
        read(tmp_path)
    (tmp_path / "photo.png").touch()
    (tmp_path / "a.safetensors").write_bytes(VALID)
    with pytest.raises(EditNotFoundError, match=re.escape(f"give its only .safetensors file, {tmp_path}/a.saf")):
        read(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(VALID)
    with pytest.raises(EditNotFoundError, match="give one of its 2 "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "article"), [("PNG", "a"), ("JPEG", "a"), ("WebP", "a"), ("TIFF", "a"), ("GIF", "a"), ("AVIF", "an")]
)
def test_a_picture_in_place_of_an_edit_file_is_called_so(name: str, article: str, tmp_path: Path) -> None:
    """A picture given as an edit file is told by its first bytes, and the message says what was expected."""
    Image.new("RGB", (20, 16), (200, 40, 30)).save(tmp_path / "picture", name)
    with pytest.raises(NotAnEditFileError, match=f"this is {article} {name} picture, .*that train or edit wrote"):
        read(tmp_path / "picture")


def test_a_heic_picture_in_place_of_an_edit_file_is_called_so(tmp_path: Path) -> None:
    """A phone's picture is told by the brand in its first bytes, for each brand that pictures may have."""
    for brand in sorted(HEIF_BRANDS):
        (tmp_path / "picture").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
        with pytest.raises(NotAnEditFileError, match="this is a HEIC picture"):
            read(tmp_path / "picture")


def test_refusing_a_path_leaves_no_open_file(tmp_path: Path) -> None:
    """read closes its file after every error."""
    (tmp_path / "bad").write_bytes(b"bad")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for path in (tmp_path, tmp_path / "bad"):
        with pytest.raises(EditFileError):
            read(path)
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    """A sparse file above the cap is not read."""
    with open(tmp_path / "a", "wb") as file:
        file.truncate(container.MAX_FILE_BYTES + 1)
    with pytest.raises(EditTooLargeError, match="at most"):
        read(tmp_path / "a")


def test_errors_of_read_begin_with_the_path(tmp_path: Path) -> None:
    """The message of a bad file says which file."""
    (tmp_path / "a").write_bytes(VALID[:-1])
    with pytest.raises(TruncatedEditError, match=f"^{re.escape(str(tmp_path / 'a'))}: "):
        read(tmp_path / "a")


# --- fuzz -----------------------------------------------------------------------------------------


def refuses_or_reads(data: bytes) -> None:
    """Decodes and shows; a success must be a valid edit that can be written, read again and used."""
    for use in (_decoded_and_used, lambda data: summary(json.loads(json.dumps(contents(data), allow_nan=False)))):
        try:
            use(data)
        except EditFileError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1000


def _decoded_and_used(data: bytes) -> None:
    edit = decode(data)
    assert decode(encode(edit)) == edit
    assert edit.source.letterbox.size == edit.source.size
    assert sampling_of(edit, {}).etas


POSITION = st.integers(0, min(map(len, VALID_FILES.values())) - 1)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), POSITION, st.integers(0, 7)),
    st.tuples(st.just("cut"), POSITION, st.integers(1, 50)),
    st.tuples(st.just("end"), POSITION, st.just(0)),
    st.tuples(st.just("insert"), POSITION, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("splice"), POSITION, POSITION),
    st.tuples(
        st.just("put"),
        POSITION,
        st.sampled_from([b"NaN", b"1e999", b"[[[[", b"\xff", b'"', b"\\", b"-1", b"{}"]),
    ),
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(VALID_FILES)), st.lists(MUTATION, min_size=1, max_size=3), st.booleans())
def test_mutated_bytes_are_refused_or_read(file: str, mutations: list[tuple[str, int, Any]], mend: bool) -> None:
    """Changed bytes are a valid edit or an EditFileError, with the old length of the header or the right one."""
    data = bytearray(VALID_FILES[file])
    tensors = len(pieces(VALID_FILES[file])[1])
    for kind, at, detail in mutations:
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << detail
        elif kind == "cut":
            del data[at : at + detail]
        elif kind == "end":
            del data[at:]
        elif kind == "insert":
            data[at:at] = detail
        elif kind == "splice":
            data[at : at + 16] = data[detail : detail + 16]
        elif kind == "put":
            data[at : at + len(detail)] = detail
    if mend and len(data) > 8 + tensors:
        data[:8] = (len(data) - 8 - tensors).to_bytes(8, "little")
    refuses_or_reads(bytes(data))


ODD = JSON | st.sampled_from(["", "\ud800", "\x00", -1, 2**63, 2**70, [[]], {"a": {}}, "F16", [0, 0], [2**62, 0]])


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    paths = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        paths += _paths(inner, (*path, key))
    return paths


_JSON_ENTRIES = ("imagic.meta", "imagic.base", "imagic.e_opt", "imagic.coarse_latents", "imagic.tensors")


def _opened(data: bytes) -> dict[str, Any]:
    header = pieces(data)[0]
    for key in header["__metadata__"].keys() & set(_JSON_ENTRIES):
        header["__metadata__"][key] = json.loads(header["__metadata__"][key])
    return header


PLACES = [(file, path) for file, data in VALID_FILES.items() for path in _paths(_opened(data))]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PLACES), st.sampled_from(["set", "delete", "add"]), ODD)
def test_any_header_value_changed_is_refused_or_read(at: tuple[str, tuple[Any, ...]], action: str, value: Any) -> None:
    """Replacing, deleting or adding any value of the header gives a valid edit or an EditFileError."""
    file, path = at
    header, tensors = _opened(VALID_FILES[file]), pieces(VALID_FILES[file])[1]
    place: Any = header
    for key in path[:-1]:
        place = place[key]
    if action == "delete":
        del place[path[-1]]
    elif action == "add" and isinstance(place, dict):
        place[f"{path[-1]}x"] = value
    else:
        place[path[-1]] = value
    if isinstance(header.get("__metadata__"), dict):
        for key in _JSON_ENTRIES:
            if key in header["__metadata__"]:
                header["__metadata__"][key] = json.dumps(header["__metadata__"][key])
    refuses_or_reads(joined(header, tensors))


def test_the_worst_header_takes_bounded_time() -> None:
    """16 MiB of escapes, brackets, quotes or commas are refused within seconds of computing."""
    started = time.process_time()
    for filler in (b'\\"', b"[]", b'""', b"0,", b"{},", b'"'):
        text = b'{"a":' + filler * ((2**24 - 64) // len(filler))
        with pytest.raises(EditFileError):
            decode(joined(text, b""))
    assert time.process_time() - started < 10


# --- the value ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"adapter": {}}, MissingTensorError, "no layers"),
        ({"adapter": []}, EditHeaderError, "mapping"),
        ({"adapter": {"unet x": small_edit().adapters["unet"][CONV]}}, UnknownTensorError, "lora_unet_"),
        ({"adapter": {CONV: None}}, EditHeaderError, "LoraFactors"),
        (
            {"adapter": {CONV: LoraFactors(torch.ones(257, 1), torch.ones(1, 257), 1.0)}},
            TensorShapeError,
            "at most 256",
        ),
        (
            {"adapter": {CONV: LoraFactors(torch.ones(1, 1) * 1e6, torch.ones(1, 1), 1.0)}},
            NonFiniteTensorError,
            "fp16",
        ),
        (
            {"adapter": {CONV: LoraFactors(torch.ones(1, 0), torch.ones(1, 1), 1.0)}},
            TensorShapeError,
            "empty side",
        ),
        (
            {"adapter": {CONV: LoraFactors(torch.ones(1, 1).int(), torch.ones(1, 1), 1.0)}},
            TensorDtypeError,
            "int32",
        ),
        (
            {"adapter": {CONV: LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1e300)}},
            NonFiniteTensorError,
            "alpha",
        ),
        ({"optimized_embedding": torch.ones(3)}, TensorShapeError, "e_opt"),
        ({"coarse_latents": torch.ones(4, 17, 4)}, TensorShapeError, "coarse_latents"),
        ({"coarse_latents": torch.ones(257, 4, 4)}, TensorShapeError, "coarse_latents"),
        ({"inverted_noise": torch.ones(2, 513, 8)}, TensorShapeError, "up to 512"),
        ({"inverted_noise": torch.ones(4, 8, 8)}, TensorShapeError, r"\(2, H, W\)"),
        ({"inverted_noise": torch.full((2, 8, 8), math.nan)}, NonFiniteTensorError, "inverted_noise"),
        ({"optimized_embedding": torch.ones(2**21, 3)}, TensorShapeError, "above"),
        ({"conditioning": {}}, MissingTensorError, "conditioning of 'embeds' is missing"),
        ({"coarse": {"unet": torch.ones(1, 1, 1), "x": torch.ones(1, 1, 1)}}, UnknownTensorError, "'x'"),
        ({"noise": {"x": torch.ones(1, 1, 1)}}, MissingTensorError, "noise of 'unet'"),
        (
            {"adapters": {"unet": {"unet.to_q": LoraFactors(torch.ones(2, 3), torch.ones(3, 2), 1.0)}}},
            TensorValueError,
            "alpha 1, expected its rank, 2",
        ),
        ({"adapters": {"unet": {"unet_2.to_q": small_edit().adapters["unet"][CONV]}}}, UnknownTensorError, "for unet"),
        ({"settings": {"x": math.nan}}, EditHeaderError, "settings.x"),
        ({"settings": {"x": {1: 2}}}, EditHeaderError, "settings.x"),
        ({"settings": {"x": [object()]}}, EditHeaderError, r"settings.x\[0\]: found a object"),
        ({"settings": {"x": 10**400}}, EditHeaderError, "too large"),
        ({"measured": {"x": torch.ones(1)}}, EditHeaderError, "measured.x"),
        ({"eta_default": math.inf}, EditHeaderError, "eta_default"),
        ({"seed": 1.0}, EditHeaderError, "seed"),
        ({"versions": {"torch": 2}}, EditHeaderError, "versions.torch"),
        ({"base": "demo"}, EditHeaderError, "imagic.base"),
        ({"source": None}, EditHeaderError, "source"),
        ({"thumbnail": b"\xff\xd8\xff" + bytes(20_000)}, EditHeaderError, "20000"),
        ({"created": "yesterday"}, EditHeaderError, "modelspec.date"),
        ({"license": ""}, EditHeaderError, "modelspec.license"),
    ],
)
def test_an_unusable_edit_cannot_be_made(changes: dict[str, Any], error: type, message: str) -> None:
    """The constructor has the same errors as the reader, so every edit can be written."""
    with pytest.raises(error, match=message):
        small_edit(**changes)


def test_the_deepest_settings_that_can_be_made_can_be_read() -> None:
    """The depth cap of the constructor is not above the reader's; a circular mapping is refused by it."""
    nested: Any = 1
    for _ in range(strict_json.MAX_JSON_DEPTH - 1):
        nested = {"a": nested}
    edit = small_edit(settings=nested)
    assert decode(encode(edit)) == edit
    with pytest.raises(EditHeaderError, match="levels deep"):
        small_edit(settings={"a": nested})
    circular: dict[str, Any] = {}
    circular["a"] = circular
    with pytest.raises(EditHeaderError, match="levels deep"):
        small_edit(settings=circular)


def test_bases_match_in_three_degrees() -> None:
    """The same files, the same source and revision, or only the same architecture; otherwise none.

    Equal files configured for another prediction are another base: a checkpoint does not name its prediction.
    """
    base = dataclasses.replace(small_edit().base, source="a/b", revision="1")
    other = {"unet": "c" * 64}
    assert base.match(dataclasses.replace(base, source="elsewhere", revision=None)) == "exact"
    assert base.match(dataclasses.replace(base, files=other)) == "revision"
    assert base.match(dataclasses.replace(base, files=other, revision="2")) == "architecture"
    unknown = dataclasses.replace(base, revision=None)
    assert unknown.match(dataclasses.replace(unknown, files=other)) == "architecture"
    interfaces = (
        Interface(text={"embeds": 3}, denoisers={"unet": "v_prediction"}),
        Interface(text={"embeds": 4}, denoisers={"unet": "epsilon"}),
        Interface(text={"embeds": 3, "pooled": 3}, denoisers={"unet": "epsilon"}),
    )
    for change in ({"family": "sd1"}, *({"interface": interface} for interface in interfaces)):
        assert base.match(dataclasses.replace(base, **change)) == "none"
        assert base.match(dataclasses.replace(base, files=other, revision="2", **change)) == "none"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_a_portable_stem(text: str) -> None:
    """A stem is 1 to 60 of a-z, 0-9 and inner hyphens, and no device name of Windows."""
    stem = safe_stem(text)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?", stem)
    assert not re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", stem)


def test_stems_are_readable() -> None:
    """Accents fold, separators become one hyphen, paths lose their meaning, devices get a prefix."""
    assert safe_stem("A photo of a Café!  At night") == "a-photo-of-a-cafe-at-night"
    assert safe_stem("../../etc/passwd") == "etc-passwd"
    assert safe_stem("CON") == "edit-con"
    assert safe_stem("com¹") == "edit-com1"
    assert safe_stem("東京") == safe_stem("") == safe_stem("...") == "edit"
    assert len(safe_stem("long " * 100)) <= 60
