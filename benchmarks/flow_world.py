"""Trains a small FLUX.2 klein on the bundled world: ``python -m benchmarks.flow_world --out DIR``.

A flow transformer, on scenes whose edits are known exactly (`benchmarks.scene_edits`). Its autoencoder is the bundled
model's, whose latents (20, 16, 16) become patches (80, 8, 8). Its text encoder has random weights that are not trained:
the transformer reads the words, which are all different, from its outputs.

A sentence of FLUX.2 has 512 tokens with its padding, and the transformer attends to all of them, eight times as many as
the picture has patches. So the training sees `SHORT_TOKENS` of them until `WHOLE_FROM` of its time, in a fraction of
the work, and all of them afterwards.

The result is a diffusers folder, ``DIR/klein-world``, of at most `MOST_BYTES`. Run the same command again after a stop,
and it goes on from the checkpoint in ``DIR/work`` with the time that is left.
"""

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lowmem_imagic.demo.pictures import CHUNK, to_tensor
from lowmem_imagic.demo.trainer import Trainer, exact_attention, load_averaged
from lowmem_imagic.families.files.configuration import DEMO_FOLDER
from lowmem_imagic.families.flux2_parts import LAYERS, TOKENS, text_states, velocity

from .world_training import (
    Scenes,
    parser_of,
    size_of,
    steps_of,
    stratified,
    world_captions,
    write_pipelines,
)

log = logging.getLogger("benchmarks.flow_world")

FOLDER = "klein-world"
WIDTH = 64
"""Width of the text encoder; the text has as many numbers from each of three layers."""
SHORT_TOKENS, WHOLE_FROM = 48, 0.85
"""Tokens of a sentence until this share of the time. The longest caption has fewer, with the chat's form."""
NOISY = 2.0
"""Positions p of the training become ``NOISY / (NOISY + 1 / p - 1)``: sampling takes most of its steps in noise, where
it is settled what a picture shows."""
MOST_BYTES = 20_000_000
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The form of a chat, as Qwen3's template makes it."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What fits a machine."""

    minutes: float
    scenes: int
    uses: float
    """Training samples of a scene, before there are as many as `scenes`."""
    batch: int
    supersampling: int
    bfloat16: bool
    save_every: float
    """Seconds between checkpoints."""


PRESETS = {
    "gpu": Preset(minutes=7, scenes=64 * 1024, uses=8, batch=1024, supersampling=2, bfloat16=True, save_every=60),
    "cpu": Preset(minutes=1440, scenes=16 * 1024, uses=32, batch=32, supersampling=2, bfloat16=True, save_every=300),
    # Checks that everything runs, in seconds; the model is of no use.
    "tiny": Preset(minutes=0.05, scenes=CHUNK, uses=4, batch=2, supersampling=1, bfloat16=False, save_every=60),
}


def new_transformer() -> Flux2Transformer2DModel:
    """An untrained transformer of two double and four single blocks, whose blocks change nothing at first."""
    transformer = Flux2Transformer2DModel(
        in_channels=80,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=len(LAYERS) * WIDTH,
        timestep_guidance_channels=64,
        mlp_ratio=2.0,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    # As diffusion transformers begin (Peebles and Xie 2023, section 3.2).
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("proj_out", "norm_out")):
            torch.nn.init.zeros_(parameter)
    return transformer


def new_text_encoder(words: int) -> Qwen3ForCausalLM:
    """An encoder of Qwen3's kind with random weights, in whose outputs each word of a sentence can be recognised."""
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=words,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            # The last layer's output is normalised, and is not taken.
            num_hidden_layers=LAYERS[-1] + 1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=WIDTH // 2,
            max_position_embeddings=2 * TOKENS,
            initializer_range=0.05,
            tie_word_embeddings=True,
        )
    )
    # So that the layers add to a word, and do not replace it.
    torch.nn.init.normal_(encoder.model.embed_tokens.weight)
    return encoder.requires_grad_(False).eval()  # type: ignore[no-any-return]


def new_tokenizer(seed: int) -> Qwen2TokenizerFast:
    """A tokenizer of Qwen's kind, with the words of captions as tokens."""
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    marks = "user\nassistant\n\n\n"
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=letters, show_progress=False, min_frequency=2)
    whole.train_from_iterator([*world_captions(seed), marks, marks], trainer)
    tokenizer = Qwen2TokenizerFast(tokenizer_object=whole)
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": special, "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template, tokenizer.model_max_length = CHAT, 2 * TOKENS
    return tokenizer


def encoded(tokenizer: Qwen2TokenizerFast, captions: list[str]) -> Tensor:
    """Token ids (B, SHORT_TOKENS) of captions in the chat's form.

    Raises:
        ValueError: a caption is longer.
    """
    chats = [chat(tokenizer, caption) for caption in captions]
    ids: Tensor = tokenizer(chats, padding="max_length", max_length=SHORT_TOKENS, return_tensors="pt").input_ids
    return ids


def chat(tokenizer: Qwen2TokenizerFast, caption: str) -> str:
    """A caption in the chat's form, as `Flux2KleinPipeline` has it."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def new_vae() -> AutoencoderKLFlux2:
    """The bundled autoencoder as FLUX.2's class, frozen; the statistics of its patches are still 0 and 1."""
    bundled = AutoencoderKL.from_pretrained(DEMO_FOLDER, subfolder="vae", local_files_only=True)
    names = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    vae = AutoencoderKLFlux2(**{name: value for name, value in bundled.config.items() if name in names})
    statistics = {f"bn.{name}": tensor for name, tensor in vae.bn.state_dict().items()}
    vae.load_state_dict({**bundled.state_dict(), **statistics})
    return vae.requires_grad_(False).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def patches(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """Latents (N, 80, 8, 8) in fp16 of pictures (N, 128, 128, 3) of bytes, in patches of 2 x 2 pixels."""
    means = [vae.encode(to_tensor(part, vae.device)).latent_dist.mode() for part in pictures.split(64)]
    return F.pixel_unshuffle(torch.cat(means), 2).half()


@torch.no_grad()
def set_statistics(vae: AutoencoderKLFlux2, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (80, 1, 1) of the channels of latents (N, 80, 8, 8), which become the autoencoder's."""
    mean, variance = latents.float().mean((0, 2, 3)), latents.float().var((0, 2, 3))
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance)
    deviation = (variance + vae.config.batch_norm_eps).sqrt()
    return mean.view(-1, 1, 1), deviation.view(-1, 1, 1)


def train(
    transformer: Flux2Transformer2DModel,
    encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2TokenizerFast,
    scenes: Scenes,
    statistics: tuple[Tensor, Tensor],
    path: Path,
    preset: Preset,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    publish: Callable[[], None],
) -> None:
    """Trains the transformer; `publish` is called after every checkpoint."""
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    transformer, language = transformer.to(device, dtype).train(), encoder.model.to(device, dtype)
    language.norm = torch.nn.Identity()
    attention = exact_attention(device)
    mean, deviation = statistics
    trainer = Trainer(
        {"transformer": transformer},
        path=path,
        seconds=seconds,
        learning_rate=0.01,
        adam_rate=7e-4,
        save_every=preset.save_every,
        averaging=0.9995,
    )
    trainer.after_save = publish
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    pad = tokenizer.pad_token_id

    def loss_at(step: int) -> Tensor:
        scenes.grow((step + 1) * preset.batch)
        latents, tokens = scenes.batch(preset.batch, generator)
        if trainer.spent >= WHOLE_FROM * trainer.seconds:
            tokens = F.pad(tokens, (0, TOKENS - SHORT_TOKENS), value=pad)
        length = tokens.shape[1]
        x = (latents.float() - mean) / deviation
        even = stratified(preset.batch, generator, device)
        at = NOISY / (NOISY + 1 / even.clamp_min(1e-4) - 1)
        noise = torch.randn(x.shape, generator=generator, device=device)
        t = at.view(-1, 1, 1, 1)
        noisy = (1 - t) * x + t * noise
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        with attention:
            with torch.no_grad():
                text = text_states(language, tokens, causal & (tokens != pad)[:, None, None])
            predicted = velocity(transformer, noisy.to(dtype), at, text)
        return (predicted.float() - (noise - x)).square().mean()

    steps_of("flow", trainer, loss_at)


def publish(
    checkpoint: Path, out: Path, tokenizer: Qwen2TokenizerFast, encoder: Qwen3ForCausalLM, vae: AutoencoderKLFlux2
) -> None:
    """Writes the folder from the averaged weights of the checkpoint, if there is one."""
    transformer = new_transformer()
    load_averaged(checkpoint, {"transformer": transformer})
    encoder = copy.deepcopy(encoder)
    vae = copy.deepcopy(vae).half()
    vae.bn.float()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_image_seq_len=256),
        vae=vae,
        text_encoder=encoder.bfloat16(),
        tokenizer=tokenizer,
        transformer=transformer.bfloat16(),
    )
    write_pipelines({out / FOLDER: pipeline})


def main() -> None:
    """Command line of the training script."""
    started = time.monotonic()
    args = parser_of(__doc__, PRESETS).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    preset, device = PRESETS[args.preset], torch.device(args.device)
    work = args.out / "work"

    torch.manual_seed(args.seed + 1)
    tokenizer = new_tokenizer(args.seed)
    encoder, transformer, vae = new_text_encoder(len(tokenizer)), new_transformer(), new_vae()
    scenes = Scenes(
        work / f"scenes-{args.seed}",
        total=preset.scenes,
        uses=preset.uses,
        stored=functools.partial(patches, vae.to(device)),
        encoded=functools.partial(encoded, tokenizer),
        supersampling=preset.supersampling,
        seed=args.seed,
        device=device,
    )
    scenes.grow(0)
    # Of the first scenes, which are the same after a stop.
    statistics = set_statistics(vae, scenes.parts["pictures"][:CHUNK])
    frozen = copy.deepcopy(encoder), copy.deepcopy(vae).cpu()
    checkpoint = work / "transformer.safetensors"
    train(
        transformer,
        encoder,
        tokenizer,
        scenes,
        statistics,
        checkpoint,
        preset,
        seconds=60 * (args.minutes or preset.minutes) - (time.monotonic() - started),
        seed=args.seed,
        device=device,
        publish=functools.partial(publish, checkpoint, args.out, tokenizer, *frozen),
    )
    size = size_of(args.out / FOLDER)
    log.info("wrote %s, %.1f MB, %.0f s in all", args.out / FOLDER, size / 1e6, time.monotonic() - started)
    if size > MOST_BYTES:
        log.warning("the folder is larger than %.0f MB", MOST_BYTES / 1e6)


if __name__ == "__main__":
    main()
