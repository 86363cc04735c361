"""Facts about FLUX.2 klein: it computes what diffusers' pipeline does, its adapters load there, and what it takes.

The facts that it shares with every family are in `test_families`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import Qwen3ForCausalLM
from typer.testing import CliRunner

from lowmem_imagic import load_into, read_edit, write_edit
from lowmem_imagic.actions.console import Console
from lowmem_imagic.actions.render import footer_of, open_edit, parameters_of
from lowmem_imagic.actions.result_folder import generation_parameters
from lowmem_imagic.cli.commands import app
from lowmem_imagic.diffusion.flow import Flow
from lowmem_imagic.engine import base as engine_base
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import (
    ConfigError,
    IncompleteModelError,
    PromptError,
    TensorShapeError,
    WrongFamilyError,
)
from lowmem_imagic.families import load_architecture, load_family
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.flux2 import shift
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.apply import apply_edits, check_base
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.counting import peak_of
from lowmem_imagic.planning.plan import CUDA_CONTEXT_BYTES, plan
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.text import BaseOptions
from lowmem_imagic.share.export import files_for
from lowmem_imagic.share.programs import inspected, told
from tests.tiny_klein import SIDE, original_layout, tiny_tokenizer, write_tiny

SENTENCE = "a photo of a red cube on the grass"
LATENTS = (16, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny klein."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-klein")


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the folder with other values in a configuration."""

    def change(file: str, **values: Any) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "changed"))
        own = json.loads((copy / file).read_text(encoding="utf-8"))
        (copy / file).write_text(json.dumps({**own, **values}), encoding="utf-8")
        return copy

    return change


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """diffusers' pipeline of it in fp32, its text encoder in bfloat16, as this package has it."""
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    pipe = Flux2KleinPipeline.from_pretrained(folder, text_encoder=encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(folder: Path) -> BaseModel:
    """The base with its weights as they are."""
    return BaseModel.load(str(folder), device="cpu", weights="fp32")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    """The base in 8 bit."""
    return BaseModel.load(str(folder), device="cpu")


def photo() -> Photo:
    """A photo with a gradient."""
    image = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    return Photo(image=image, sha256="1" * 64, name="photo", notes=(), icc_profile=None)


def quick(**sampling: Any) -> Any:
    """Settings of a short edit."""
    values = {"etas": (0.0, 1.0), "num_inference_steps": 4, **sampling}
    embed = {"steps": 2, "learning_rate": 1e-2}
    finetune = {"steps": 3, "learning_rate": 1e-2, "lora_rank": 2, "lora_alpha": 3.0, "keep": 1.0}
    return preset("balanced", {"embed": embed, "finetune": finetune, "sample": values}).for_group("flow")


@pytest.fixture(scope="module")
def edit(base: BaseModel) -> Any:
    """An edit of a photo."""
    [trained] = make_edits(base, [Job(photo(), SENTENCE)], quick())
    return trained


def sampled(base: BaseModel, text: Conditioning, noise: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Latents that the base samples with Euler's method."""
    [denoiser] = base.denoisers
    sampler = denoiser.schedule.sampler("Euler", steps, LATENTS)
    x = sampler.start(noise, None)
    with torch.no_grad():
        for step, at in enumerate(sampler.at):
            own, none = base.predict(denoiser, x.repeat(2, 1, 1, 1), at.expand(2), text).chunk(2)
            x = sampler.stepped(none + guidance * (own - none), step, x)
    return x


# The same as diffusers


def test_sentences_are_encoded_as_the_pipeline_does(plain: BaseModel, pipeline: Any) -> None:
    """The text is that of ``encode_prompt``, padding included, bit for bit; so is the empty sentence's."""
    text = plain.encode_text([SENTENCE, ""])
    with torch.no_grad():
        theirs = [pipeline.encode_prompt(sentence)[0][0] for sentence in (SENTENCE, "")]
    assert torch.equal(text["embeds"], torch.stack(theirs).float())
    ids = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": SENTENCE}], add_generation_prompt=True, enable_thinking=False
    )
    assert text["own"].sum(1)[0] == len(getattr(ids, "input_ids", ids))


def test_the_text_encoder_is_in_8_bit_beside_a_base_in_8_bit(base: BaseModel, plain: BaseModel, relative: Any) -> None:
    """Its text is near the one in bfloat16 (5 % in this random network of 27 layers), in a fraction of the bytes."""
    assert relative(base.encode_text([SENTENCE])["embeds"], plain.encode_text([SENTENCE])["embeds"]) < 0.05
    cpu = torch.device("cpu")
    kinds = {
        weights: base.family.load_text_encoder("text_encoder", weights=weights, device=cpu, dtype=torch.float32)
        for weights in ("int8", "fp32")
    }
    types = {w: {p.dtype for p in encoder.parameters() if p.dim() == 2} for w, encoder in kinds.items()}
    assert types == {"int8": {torch.int8, torch.bfloat16}, "fp32": {torch.bfloat16}}
    assert len(kinds["int8"].layers) == 27


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_pictures_are_the_pipelines(plain: BaseModel, pipeline: Any, relative: Any, guidance: float) -> None:
    """At equal noise, Euler's method gives the pipeline's picture, with guidance and without."""
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(1))
    text = plain.encode_text([SENTENCE, ""])
    ours = plain.decode(sampled(plain, text, noise, 6, guidance))
    theirs = pipeline(
        prompt_embeds=text["embeds"][:1],
        negative_prompt_embeds=text["embeds"][1:],
        height=SIDE,
        width=SIDE,
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
    ).images
    assert relative(ours / 2 + 0.5, theirs) < 1e-5


def test_the_lean_transformer_keeps_less(folder: Path, relative: Any) -> None:
    """The layers that keep less are in place, with the gradients of diffusers' own to rounding (bfloat16)."""
    family = load_family(str(folder))
    [denoiser] = family.denoisers
    ours = denoiser.load(weights="fp32", device=torch.device("cpu"), dtype=torch.float32)
    theirs = Flux2Transformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    found = []
    for network in (ours, theirs):
        network.bfloat16()
        x = torch.ones(1, *LATENTS).bfloat16().requires_grad_()
        text = {"embeds": torch.ones(1, 512, 48).bfloat16(), "own": torch.ones(1, 512, dtype=torch.bool)}

        def step(network: Any = network, x: Any = x, text: Any = text) -> None:
            denoiser.predict(network, x, torch.tensor([0.5]), text).square().sum().backward()

        found.append((peak_of(step), x.grad.float()))
    assert found[0][0] < 0.9 * found[1][0] and relative(found[0][1], found[1][1]) < 0.03


def test_photos_are_encoded_as_the_pipeline_does(plain: BaseModel, pipeline: Any) -> None:
    """Latents are patches with the statistics of the autoencoder's batch norm, as the pipeline makes them."""
    picture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(picture, None)
    assert torch.equal(plain.encode(picture)["transformer"], theirs)


def test_adapters_load_in_diffusers(plain: BaseModel, edit: Any, folder: Path, tmp_path: Path, relative: Any) -> None:
    """``load_lora_weights`` takes the edit file as it is, and the pipeline's transformer then predicts as the base."""
    write_edit(edit, tmp_path / "edit.safetensors")
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    [denoiser] = plain.denoisers
    x, at = torch.randn(1, *LATENTS), torch.tensor([0.6])
    text = plain.encode_text([SENTENCE])
    with torch.no_grad():
        before = denoiser.predict(pipe.transformer, x, at, text)
        pipe.load_lora_weights(str(tmp_path), weight_name="edit.safetensors", adapter_name="edit")
        after = denoiser.predict(pipe.transformer, x, at, text)
        pack = AdapterPack.load(plain.network(denoiser), denoiser.names, [edit.adapters["transformer"]])
        with pack.attached(plain.network(denoiser)):
            ours = plain.predict(denoiser, x, at, text)
    assert relative(after, ours) < 1e-5 < relative(after, before)


def test_inspect_says_what_other_programs_do(edit: Any, tmp_path: Path) -> None:
    """ComfyUI and diffusers load all of the adapter; nothing is said of programs that were not tried, and InvokeAI's
    source refuses the tensors beside it."""
    write_edit(edit, tmp_path / "edit.safetensors")
    uses = {use["program"]: use for use in inspected(tmp_path / "edit.safetensors")["programs"]}
    assert {name: use["loads"] for name, use in uses.items()} == {
        "diffusers": "all",
        "peft": "all",
        "ComfyUI": "all",
        "A1111, Forge, SD.Next": "unknown",
        "InvokeAI": "no",
        "stable-diffusion.cpp": "part",
    }
    assert "load_lora_weights" in uses["diffusers"]["does"] and uses["ComfyUI"]["does"] == "the LoRA alone"
    assert "export to peft" in uses["InvokeAI"]["lacks"]
    assert "A1111, Forge, SD.Next: unknown: not tried" in told(inspected(tmp_path / "edit.safetensors"))


def test_inspect_of_an_edit_of_some_layers(edit: Any, tmp_path: Path) -> None:
    """An edit of the single blocks loads in ComfyUI and not in stable-diffusion.cpp, which has no names for them."""
    own = {key: one for key, one in edit.adapters["transformer"].items() if ".single_transformer_blocks." in key}
    assert 0 < len(own) < len(edit.adapters["transformer"])
    write_edit(replace(edit, adapters={"transformer": own}), tmp_path / "edit.safetensors")
    loads = {use["program"]: use["loads"] for use in inspected(tmp_path / "edit.safetensors")["programs"]}
    assert (loads["ComfyUI"], loads["stable-diffusion.cpp"]) == ("all", "no")


def test_exports_load_by_the_lines_of_their_notes(
    plain: BaseModel, edit: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: Any
) -> None:
    """The Python lines beside the exports to peft and diffusers give the transformer the edit's adapter."""
    [denoiser] = plain.denoisers
    x, at, text = torch.randn(1, *LATENTS), torch.tensor([0.6]), plain.encode_text([SENTENCE])
    pack = AdapterPack.load(plain.network(denoiser), denoiser.names, [edit.adapters["transformer"]])
    with torch.no_grad(), pack.attached(plain.network(denoiser)):
        ours = plain.predict(denoiser, x, at, text)
    for program in ("peft", "diffusers"):
        (tmp_path / program).mkdir()
        monkeypatch.chdir(tmp_path / program)
        files = files_for(program, edit, "edit")
        for name, data in files.items():
            Path(name).write_bytes(data)
        pipe = Flux2KleinPipeline.from_pretrained(folder)
        code = files["README.md"].decode().split("```python\n")[1].split("```")[0]
        exec(compile(code, program, "exec"), {"pipeline": pipe, "network": pipe.transformer})
        with torch.no_grad():
            theirs = denoiser.predict(pipe.transformer, x, at, text)
        assert relative(theirs, ours) < 1e-5


def test_an_exported_embedding_keeps_numbers_beyond_fp16(edit: Any) -> None:
    """e_opt stays in bfloat16 in ``imagic.safetensors``, where 1e5 would be infinite in fp16; the noise is in fp16."""
    embeds = edit.conditioning["embeds"].clone()
    assert embeds.dtype == torch.bfloat16
    embeds[0, 0] = 1e5
    large = replace(edit, conditioning={"embeds": embeds})
    for program in ("peft", "diffusers"):
        tensors = load(files_for(program, large, "edit")["imagic.safetensors"])
        assert torch.equal(tensors["text.embeds"], embeds) and tensors["text.embeds"].dtype == torch.bfloat16
        assert tensors["noise.transformer"].dtype == edit.noise["transformer"].dtype == torch.float16


def test_pipelines_of_klein_are_refused_by_name(edit: Any, pipeline: Any) -> None:
    """`load_into` says that it does not take such pipelines, and what does."""
    with pytest.raises(WrongFamilyError, match=r"Flux2KleinPipeline samples a flow.*`load_lora_weights`"):
        load_into(pipeline, edit)


def test_few_sentences_are_kept_where_each_is_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of many sentences do not fill the memory: as many are kept as a limit in bytes has room for."""
    other = BaseModel.load(str(folder), device="cpu")
    monkeypatch.setattr(engine_base, "MAX_SENTENCES_BYTES", 2 * 512 * (48 * 4 + 1))
    loads, load = list[str](), other.family.load_text_encoder
    monkeypatch.setattr(
        other.family, "load_text_encoder", lambda name, **more: loads.append(name) or load(name, **more)
    )
    first = other.encode_text(["one"])
    other.encode_text(["two"])
    assert torch.equal(other.encode_text(["one"])["embeds"], first["embeds"]) and len(loads) == 2
    other.encode_text(["two", "three", "four"])
    other.encode_text(["one"])
    assert len(loads) == 4


# The edit file


def test_an_edit_file_holds_the_sentences_own_rows(base: BaseModel, edit: Any, tmp_path: Path) -> None:
    """e_opt is stored without padding, in bfloat16, beside peft's keys and two other tensors; rendering pads it."""
    own = int(base.encode_text([SENTENCE])["own"].sum())
    assert edit.conditioning["embeds"].shape == (own, 48) and edit.conditioning["embeds"].dtype == torch.bfloat16
    write_edit(edit, tmp_path / "edit.safetensors")
    tensors = load_file(tmp_path / "edit.safetensors")
    beside = {name for name in tensors if name.startswith("lora_imagic.")}
    assert beside == {f"lora_imagic.{name}.transformer" for name in ("coarse", "noise")} | {"lora_imagic.text.embeds"}
    layers = {name.rsplit(".lora_", 1)[0] for name in tensors.keys() - beside}
    assert {layer.split(".")[0] for layer in layers} == {"transformer"}
    assert {layer.split(".", 3)[-1] for layer in layers} == {
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")),
        *("attn.to_add_out", "attn.to_qkv_mlp_proj", "attn.to_out"),
        *(f"{part}.linear_{way}" for part in ("ff", "ff_context") for way in ("in", "out")),
    }
    assert read_edit(tmp_path / "edit.safetensors") == edit


def test_stage_1_leaves_the_padding_alone(base: BaseModel) -> None:
    """The gradient of the text is zero in the rows of the padding, though the transformer attends to them."""
    [denoiser] = base.denoisers
    text = base.encode_text([SENTENCE])
    embeds, own = text["embeds"].requires_grad_(), text["own"][0]
    network = base.network(denoiser)
    denoiser.predict(network, torch.ones(1, *LATENTS), torch.tensor([0.5]), {**text, "embeds": embeds}).sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[0, own].abs().amax(1).min() > 0 == embeds.grad[0, ~own].abs().max()
    other = {**text, "embeds": embeds.detach().where(own[:, None], 0.0)}
    with torch.no_grad():
        seen = [denoiser.predict(network, torch.ones(1, *LATENTS), torch.tensor([0.5]), one) for one in (text, other)]
    assert not torch.allclose(*seen, atol=1e-3)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_recomputing_changes_no_gradient(folder: Path, weights: str, relative: Any) -> None:
    """With checkpointing, a training pass over frozen weights of few bits gives the same gradients."""
    other = BaseModel.load(str(folder), device="cpu", weights=weights)
    [denoiser] = other.denoisers
    pack = AdapterPack(other.network(denoiser), denoiser.names, count=2, adapt="attn+ff", rank=2, alpha=2.0)
    pack.weights.normal_(generator=torch.Generator().manual_seed(4)).mul_(0.05)
    grads, text = pack.enable_gradients(), other.encode_text([SENTENCE, "a blue sphere"])
    x = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(5))
    computed = []
    for on in (False, True):
        other.recompute(on)
        grads.zero_()
        with pack.attached(other.network(denoiser)):
            other.predict(denoiser, x, torch.tensor([0.2, 0.8]), text).square().mean().backward()
        computed.append(grads.clone())
    assert relative(computed[1], computed[0]) < 1e-6 and computed[0].abs().amax(1).min() > 0


def test_a_pack_in_4_bits_gives_what_each_edit_gets_alone(folder: Path, relative: Any) -> None:
    """On a base in nf4 with checkpointing, edits trained side by side equal those trained alone."""
    other = BaseModel.load(str(folder), device="cpu", weights="nf4", checkpointing=True)
    jobs = [Job(photo(), SENTENCE), Job(photo(), "a blue sphere")]
    together = make_edits(other, jobs, quick(), slots=2)
    for job, one in zip(jobs, together, strict=True):
        [alone] = make_edits(other, [job], quick())
        assert relative(one.conditioning["embeds"], alone.conditioning["embeds"]) < 5e-3
        assert one.base_weights == "nf4"
        for key, factors in alone.adapters["transformer"].items():
            mine, theirs = (f.up.float() @ f.down.float() for f in (one.adapters["transformer"][key], factors))
            assert torch.allclose(mine, theirs, atol=4e-3)


# Distilled models


def test_distilled_models_render_and_do_not_train(edit: Any, base: BaseModel, changed: Callable[..., Path]) -> None:
    """The sibling of few steps is refused for training by its mark, with the base to train on; it renders its edits."""
    distilled = BaseModel.load(str(changed("model_index.json", is_distilled=True)), device="cpu")
    with pytest.raises(WrongFamilyError, match=r"is_distilled.*train on its base \(`model=klein`\)"):
        make_edits(distilled, [Job(photo(), SENTENCE)], quick())
    assert check_base(edit, distilled) == ""
    settings = replace(quick().sample, guidance_scale=1.0, photo_guidance=None, scheduler="Euler")
    [picture] = apply_edits(distilled, [edit], [Cell(0, 1.0, 0)], settings)
    assert picture.size == (40, 30)
    # It has no guidance: the edit's own is for the base, where it changes the picture.
    guided = replace(settings, guidance_scale=4.0)
    assert apply_edits(distilled, [edit], [Cell(0, 1.0, 0)], guided)[0].tobytes() == picture.tobytes()
    one, four = (apply_edits(base, [edit], [Cell(0, 1.0, 0)], way)[0] for way in (settings, guided))
    assert one.tobytes() == picture.tobytes() != four.tobytes()
    # A picture tells of the base that made it, and of the guidance that it had.
    for there, scale in ((distilled, "1.0"), (base, "4.0")):
        text = generation_parameters(Cell(0, 1.0, 0), parameters_of(there, edit, [SENTENCE], guided))
        assert f"CFG scale: {scale}, " in text and f"Model: {there.name}, " in text
        footer = footer_of(there, edit, guided)
        assert footer.startswith(f"{there.name} | ") and f"guidance {float(scale):g} | " in footer
    assert distilled.name != base.name == edit.base.source


@pytest.mark.parametrize("name", ["klein-distilled", "black-forest-labs/FLUX.2-klein-4B"])
def test_a_distilled_model_is_refused_before_its_download(name: str, tmp_path: Path) -> None:
    """Training on the published sibling of few steps is refused by its name alone, and so is a plan for it."""
    photo().image.save(tmp_path / "photo.png")
    words = ["edit", str(tmp_path / "photo.png"), SENTENCE, "--model", name, "--out", str(tmp_path / "out")]
    for command in (words, ["doctor", "--plan", "--model", "klein-distilled", "--vram", "8GB"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1 and "train on its base (--model klein)" in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_a_configuration_tells_that_a_file_is_distilled(
    folder: Path, alone: Callable[..., Path], changed: Callable[..., Path]
) -> None:
    """A file whose name says nothing is not trained with the configuration of the sibling of few steps."""
    given = changed("model_index.json", is_distilled=True)
    family = load_family(str(alone("tiny")), config_folder=given, vae=folder, text_from=folder)
    with pytest.raises(WrongFamilyError, match="is_distilled in the configuration given for it"):
        family.check_trainable()


def test_rows_of_another_tokenizer_are_refused(base: BaseModel, edit: Any) -> None:
    """An embedding of fewer or more rows than its first sentence has with the base's tokenizer is an error, no mix."""
    start = base.encode_text([edit.start_sentence])
    rows = edit.conditioning["embeds"]
    for other in (rows[:-1], torch.cat([rows, rows[-1:]])):
        with pytest.raises(TensorShapeError, match=f"has {len(other)} rows of its first sentence"):
            start.completed({"embeds": other}, base.family.text)
    assert torch.equal(start.completed({"embeds": rows}, base.family.text)["embeds"][0, : len(rows)], rows.float())


def test_the_edits_own_settings_are_named_where_a_distilled_model_has_none(
    edit: Any, changed: Callable[..., Path]
) -> None:
    """Rendering on the sibling of few steps warns of guidance, many steps and a mask; without them, of nothing."""
    path = str(changed("model_index.json", is_distilled=True))
    own = replace(quick().sample, guidance_scale=4.0, num_inference_steps=30, mask=0.6)
    few = replace(own, guidance_scale=1.0, num_inference_steps=4, mask=0.0)
    for settings, parts in ((own, ["guidance 4, 30 steps, mask 0.6"]), (few, [])):
        told = Console(quiet=True)
        open_edit(edit, BaseOptions(model=path, device="cpu"), settings, [], told)
        found = [warning for warning in told.warnings if "distilled" in warning]
        assert len(found) == len(parts) and all(part in warning for part, warning in zip(parts, found, strict=True))


# The transformer in one file


@pytest.fixture
def alone(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a file of the transformer alone."""

    def write(name: str = "tiny-klein-base", prefix: str = "", layout: str = "original", **more: torch.Tensor) -> Path:
        state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        tensors = {**(original_layout(state) if layout == "original" else state), **more}
        path = tmp_path / f"{name}.safetensors"
        save_file({prefix + key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
        return path

    return write


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_alone(
    plain: BaseModel, alone: Callable[..., Path], folder: Path, prefix: str, layout: str
) -> None:
    """A file of the transformer in either layout, with the rest from a folder, is the same base bit for bit, and its
    original layout is the one that diffusers reads."""
    path = alone(prefix=prefix, layout=layout)
    options = {"config_folder": folder, "vae": folder, "text_from": folder}
    other = BaseModel.load(str(path), device="cpu", weights="fp32", **options)
    states = [one.network(one.denoisers[0]).state_dict() for one in (plain, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(plain.encode_text([SENTENCE])["embeds"], other.encode_text([SENTENCE])["embeds"])
    assert other.identity.match(plain.identity) == "architecture" and "checkpoint" in other.identity.files
    if not prefix and layout == "original":
        theirs = Flux2Transformer2DModel.from_single_file(
            str(path), config=str(folder), subfolder="transformer", local_files_only=True
        ).state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in states[1].items())


@pytest.mark.parametrize("per_row", [False, True])
def test_a_transformer_in_8_bits_with_scales(alone: Callable[..., Path], folder: Path, per_row: bool) -> None:
    """A file in fp8 is the base of the numbers that its weights and scales stand for, joined matrices included."""
    options = {"config_folder": folder, "vae": folder, "text_from": folder}
    path = alone()
    stored, meant = dict(tensors := load_file(path)), dict(tensors)
    for name in (name for name, tensor in tensors.items() if "blocks" in name and tensor.ndim == 2):
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        scale = scale if per_row else scale.max()
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + "weight_scale"] = scale
        meant[name] = stored[name].float() * scale
    assert any(name.endswith("qkv.weight") and stored[name].itemsize == 1 for name in stored)
    states = []
    for number, file in enumerate((stored, meant)):
        copy = path.with_name(f"{number}-klein-base.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in file.items()}, copy)
        base = BaseModel.load(str(copy), device="cpu", weights="fp32", **options)
        states.append(base.network(base.denoisers[0]).state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_a_transformer_alone_needs_folders(alone: Callable[..., Path], folder: Path) -> None:
    """Without text encoder, autoencoder or a known configuration, one line names the setting; the name tells the
    distilled model."""
    path = alone()
    for options, message in (
        ({}, r"transformer alone; give a diffusers folder with its text_encoder \(`text_from`\)"),
        ({"text_from": folder}, r"its vae \(`vae`\)"),
        ({"text_from": folder, "vae": folder}, r"text width 48\).*`model_config`"),
        ({"text_from": folder, "vae": folder, "config_folder": "sd15"}, "is that of a StableDiffusionPipeline"),
    ):
        with pytest.raises((IncompleteModelError, WrongFamilyError), match=message):
            load_family(str(path), **options)
    whole = {"text_from": folder, "vae": folder, "config_folder": folder}
    distilled = load_family(str(alone("flux-2-klein-4b")), **whole)
    with pytest.raises(WrongFamilyError, match="its name says klein without base"):
        distilled.check_trainable()
    with pytest.raises(IncompleteModelError, match=r"no part of a FLUX\.2 klein, such as extra"):
        other = load_family(str(alone(extra=torch.zeros(1))), **whole)
        other.denoisers[0].load(weights="fp32", device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("guidance_in.in_layer.weight", "FLUX.2 dev"),
        ("vector_in.in_layer.weight", "FLUX.1"),
        ("cap_embedder.0.weight", "Z-Image"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_look_alikes_in_one_file(tmp_path: Path, name: str, title: str, prefix: str) -> None:
    """A transformer of another model is refused by its name, with models that work instead."""
    save_file({prefix + name: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WrongFamilyError, match=rf"is {title}.*not supported yet; take FLUX"):
        load_family(str(tmp_path / "other.safetensors"))


FLUX_1 = partial(FluxTransformer2DModel, attention_head_dim=16, axes_dims_rope=(4, 4, 8))


@pytest.mark.parametrize(
    ("model", "title"),
    [
        (FLUX_1, "FLUX.1"),
        (
            partial(FLUX_1, guidance_embeds=True),
            "FLUX",
        ),
        (partial(SD3Transformer2DModel, sample_size=8, attention_head_dim=16), "Stable Diffusion 3"),
        (partial(QwenImageTransformer2DModel, attention_head_dim=16, axes_dims_rope=(4, 4, 8)), "Qwen-Image"),
    ],
)
def test_look_alikes_in_diffusers_layout(tmp_path: Path, model: Callable[..., Any], title: str) -> None:
    """A transformer that diffusers' own class of another model has written is refused by its name."""
    small = model(num_layers=1, num_attention_heads=2, joint_attention_dim=8)
    save_file({name: torch.zeros(1) for name in small.state_dict()}, tmp_path / "other.safetensors")
    with pytest.raises(WrongFamilyError, match=rf"{title}.*not supported yet; take FLUX"):
        load_family(str(tmp_path / "other.safetensors"))


# Schedule


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("FireFlow", 2)])
def test_samplers_of_a_flow(name: str, order: int) -> None:
    """Twice as many steps give half of Euler's error, a quarter of FireFlow's; both predict as often as they are told
    to."""
    # The velocity of x(t) = sin(4 t), which is no straight line.
    ends, errors = torch.full((1, 1, 1, 1), torch.tensor(4.0).sin().item()), []
    for steps in (40, 80):
        sampler = Flow(lambda *_: 0.0).sampler(name, steps, (1, 1, 1))
        assert len(sampler.at) == steps
        x = ends
        for step, at in enumerate(sampler.at):
            assert sampler.scaled(x, step).shape == x.shape
            x = sampler.stepped((4 * (4 * at).cos()).expand(1, 1, 1, 1), step, x)
        errors.append(abs(float(x)))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


def test_fireflow_inverts_a_photo(base: BaseModel) -> None:
    """A photo's own noise leads back to the photo, with a fraction of Euler's error in as many predictions."""
    [denoiser] = base.denoisers
    text = base.encode_text([""])
    photo_latents, errors = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(5)), []
    for name in ("Euler", "FireFlow"):
        down = denoiser.schedule.sampler(name, 30, LATENTS)
        up = denoiser.schedule.sampler(name, 30, LATENTS)
        up.times = up.times.flip(0)
        x = photo_latents
        with torch.no_grad():
            for way in (up, down):
                for step, at in enumerate(way.at):
                    x = way.stepped(base.predict(denoiser, way.scaled(x, step), at.view(1), text), step, x)
        errors.append(float((x - photo_latents).norm() / photo_latents.norm()))
    assert errors[1] < errors[0] / 10


def test_other_samplers_are_refused_by_name(base: BaseModel) -> None:
    """A sampler of discrete schedules is an error that names the flow's."""
    with pytest.raises(ConfigError, match=r"`scheduler` is 'DDIM', expected Euler or FireFlow"):
        base.check_steps("DDIM", 20)


@pytest.mark.parametrize("places", [64, 1024, 4096, 5000])
@pytest.mark.parametrize("steps", [4, 50, 200])
def test_positions_are_shifted_as_in_the_pipeline(places: int, steps: int) -> None:
    """The shift by size and steps is that of the pipeline."""
    assert shift(places, steps) == pytest.approx(compute_empirical_mu(places, steps), rel=1e-9)


# Plans


def test_the_plan_for_8_gb_needs_no_download() -> None:
    """klein at 512 px in int8 with checkpointing takes 4.9 GB with one row; the text encoder takes 3.5 GB before."""
    family = load_architecture("klein")
    assert family.sizes.own == (512, 512) and family.denoisers[0].shape((512, 512)) == (128, 32, 32)
    types = {name: torch.bfloat16 for name in ("dtype", "part_dtype", "codec_dtype")}
    settings = preset("balanced")
    costs = Costs(family, settings, weights="int8", **types)
    assert costs.networks == pytest.approx(3.88e9, rel=0.01)
    assert costs.text_encoder == pytest.approx(3.51e9, rel=0.01)
    least = costs.networks + costs.adapters(1) + costs.train(1, 1, checkpointing=True)
    assert least == pytest.approx(4.88e9, rel=0.01)


@pytest.mark.process
def test_plans_for_6_and_8_gb() -> None:
    """On 8 GB klein trains two rows at once in int8; in nf4 it takes half the bytes, and trains on 6 GB."""
    family, settings = load_architecture("klein"), preset("balanced")
    types = {name: torch.bfloat16 for name in ("dtype", "part_dtype", "codec_dtype")}
    costs = Costs(family, settings, weights="int8", **types)
    fit = plan(costs, settings, budget_bytes=8 * 10**9, context_bytes=CUDA_CONTEXT_BYTES)
    assert fit.checkpointing and fit.rows == 2 and not fit.text_on_cpu
    fewer = Costs(family, settings, weights="nf4", **types)
    assert fewer.networks == pytest.approx(2.0e9, rel=0.02)
    assert plan(fewer, settings, budget_bytes=6 * 10**9, context_bytes=CUDA_CONTEXT_BYTES).checkpointing


# Commands


@pytest.mark.process
def test_commands_edit_and_ask_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`edit`, `sample` with another sentence, and `sheet` work on a klein like on any base."""
    monkeypatch.chdir(tmp_path)
    photo().image.save("photo.png")
    short = ["--steps-sample", "3", "--quiet", "--device", "cpu", "--model", str(folder)]
    training = ["--steps-embed", "2", "--steps-finetune", "2", "--draws", "2"]
    made = CliRunner().invoke(app, ["edit", "photo.png", SENTENCE, "--out", "out", *training, *short])
    assert made.exit_code == 0, made.output
    [edited] = map(str, Path("out").glob("*.safetensors"))
    assert read_edit(edited).settings["sample"]["scheduler"] == "FireFlow"
    for words in (
        ["sample", edited, "--prompt", "a blue sphere", "--out", "again", *short],
        ["sheet", edited, "--out", "sheet.png", *short],
        ["inspect", edited],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


# Other and damaged models


def test_sentences_that_do_not_fit(base: BaseModel) -> None:
    """An empty sentence is an error; of one that is too long the words beyond are told."""
    with pytest.raises(PromptError, match="the sentence is empty"):
        base.family.check_prompt(" ")
    assert base.family.check_prompt(SENTENCE) == ""
    assert base.family.check_prompt("a" * base.family.sentence_tokens + "beyond") == "beyond"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, r"guidance_embeds.*FLUX\.2 dev.*`model=klein`"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "class FluxTransformer2DModel"),
        ("transformer/config.json", {"joint_attention_dim": 96}, "for text of width 96"),
        ("transformer/config.json", {"num_layers": 10**6}, "num_layers 1000000, expected integers from 0 to 64"),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4, 6]}, "axes_dims_rope"),
        ("transformer/config.json", {"mlp_ratio": "large"}, "transformer"),
        ("vae/config.json", {"patch_size": [1, 1]}, "patch_size"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "class AutoencoderKL"),
        ("text_encoder/config.json", {"model_type": "t5"}, "kind t5; expected qwen3"),
        ("text_encoder/config.json", {"num_hidden_layers": 12}, "12 layers, expected 27"),
        ("text_encoder/config.json", {"use_sliding_window": True}, "sliding window"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "noise schedule.*DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas True"),
        ("model_index.json", {"text_encoder": ["transformers", "Mistral3"]}, "text_encoder of the class Mistral3"),
        (
            "model_index.json",
            {"_class_name": "Flux2Pipeline"},
            r"is FLUX\.2 dev.*not supported yet; take FLUX",
        ),
        ("model_index.json", {"_class_name": "ZImagePipeline"}, "is Z-Image .*not supported yet; take"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is Stable Diffusion 3 .*not supported yet"),
        ("model_index.json", {"_class_name": "QwenImagePipeline"}, "is Qwen-Image .*not supported yet"),
        ("model_index.json", {"_class_name": "Flux2KleinInpaintPipeline"}, "made for another task"),
        ("model_index.json", {"_class_name": "Flux2KleinKVPipeline"}, r"is FLUX\.2 klein with another pipeline"),
        ("model_index.json", {"_class_name": "Flux3KleinPipeline"}, "is another FLUX "),
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, r"is FLUX\.1 "),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "tokenizer"),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "names a file elsewhere"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else None,
)
def test_other_models_are_refused(changed: Callable[..., Path], file: str, values: Any, message: str) -> None:
    """A model of another kind, or a damaged one, is one line that names the fault."""
    with pytest.raises((WrongFamilyError, IncompleteModelError), match=message) as error:
        other = BaseModel.load(str(changed(file, **values)), device="cpu")
        other.family.check_prompt("a cube")
        other.network(other.denoisers[0])
    assert "\n" not in str(error.value)


def test_a_chat_form_without_the_sentence_is_refused(folder: Path, tmp_path: Path) -> None:
    """A template that drops the sentence would make every sentence the same: it is an error."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "hello"
    tokenizer.save_pretrained(copy / "tokenizer")
    with pytest.raises(IncompleteModelError, match="leaves the sentence out"):
        load_family(str(copy)).check_prompt("a cube")
