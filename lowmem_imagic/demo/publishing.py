"""The bundled model as a folder, from the checkpoints of its training."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from . import architecture, codec, vocabulary
from .pictures import training_scene_at
from .trainer import load_averaged
from .training_scenes import tokenizer_at

log = logging.getLogger("lowmem_imagic.demo.train")

SHARD = "15MB"
"""Largest file of a finished folder."""


def new_pipeline(code: codec.LinearCode, tokenizer: Path, start: Path | None, *, seed: int) -> StableDiffusionPipeline:
    """The whole model with its encoder; all else is untrained, or taken from `start` where names and shapes agree."""
    torch.manual_seed(seed + 1)
    words = tokenizer_at(tokenizer)
    vae, unet, text_encoder = architecture.new_vae(), architecture.new_unet(), architecture.new_text_encoder(words)
    if start is not None:
        for part, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
            own = module.state_dict()
            theirs = {
                name.removeprefix("text_model."): tensor
                for path in (start / part).glob("*.safetensors")
                for name, tensor in load_file(path).items()
            }
            fitting = {name: t.float() for name, t in theirs.items() if name in own and t.shape == own[name].shape}
            if part == "vae" and len(fitting) < len(own):
                # Pieces of another autoencoder's decoder are worth nothing.
                continue
            module.load_state_dict(fitting, strict=False)
            log.info("%s: %d of %d tensors from %s", part, len(fitting), len(own), start.name)
    codec.write_linear_encoder(vae, code)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=architecture.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def learnt_tokenizer(folder: Path, seed: int) -> None:
    """Learns a tokenizer from captions and writes it into a folder, unless it is there.

    Kept, because merges of equal frequency may be learnt in another order when training resumes.
    """
    if not folder.exists():
        rng = random.Random(seed)
        captions = [training_scene_at(seed, index).caption(rng) for index in range(4000)]
        partial = folder.with_suffix(".partial")
        architecture.train_tokenizer(captions).save_pretrained(partial)
        os.replace(partial, folder)


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Writes the pipeline in fp16 into the folder `out`, its files readable by everyone and without local paths."""
    pipeline.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True, max_shard_size=SHARD)
    clean_configs(out)
    # transformers 5.6 and later leave out a prefix that earlier versions need and all take.
    text_encoder = out / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(text_encoder).items()}
    save_file(tensors, text_encoder, metadata={"format": "pt"})
    vocabulary.write(out)
    # transformers 4 reads the vocabulary from these two files, transformers 5 from tokenizer.json.
    pipeline.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    for path in out.rglob("*"):
        # safetensors makes files that only their owner may read.
        path.chmod(0o755 if path.is_dir() else 0o644)


def clean_configs(folder: Path) -> None:
    """Takes what is no setting out of the configurations in a pipeline's folder."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        # Where a part was loaded from.
        config.pop("_name_or_path", None)
        if path.parent.name == "text_encoder":
            # transformers loads in this type, or without it in that of the weights, and diffusers loads in fp32: a
            # stock pipeline with default settings would mix the two and fail at the first sentence.
            config.pop("torch_dtype", None)
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish(code: codec.LinearCode, tokenizer: Path, start: Path | None, work: Path, out: Path, *, seed: int) -> None:
    """Writes the folder `out` from the averaged weights of all checkpoints that there are."""
    pipeline = new_pipeline(code, tokenizer, start, seed=seed)
    load_averaged(work / "unet.safetensors", {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    vae = pipeline.vae
    load_averaged(work / "decoder.safetensors", {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    save(pipeline, partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
