"""Sizes of the bundled model's training by machine."""

from dataclasses import dataclass

from .pictures import CHUNK


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What fits a machine."""

    minutes: float
    decoder_share: float
    """Of the time."""
    scenes: int
    """Scenes in all."""
    uses: float
    """Training samples of a scene, before there are as many as `scenes`."""
    kept_pictures: int
    """Scenes whose pictures are kept for the decoder."""
    code_pictures: int
    """Pictures of each kind that the encoder is computed from."""
    procedural: int
    """Procedural pictures in stock."""
    together: int
    """Pictures drawn at a time."""
    decoder_batch: int
    decoder_rate: float
    unet_batch: int
    unet_rate: float
    continued: float
    """Share of these rates with ``--start-from``: weights that were trained before would get worse at first."""
    supersampling: int
    bfloat16: bool
    processes: int
    save_every: float
    """Seconds between checkpoints."""
    measured: int
    """Pictures of each kind that the autoencoder is measured on."""


PRESETS = {
    "gpu": Preset(
        minutes=8,
        decoder_share=0.3,
        scenes=64 * 1024,
        uses=8,
        kept_pictures=16 * 1024,
        code_pictures=1024,
        procedural=8192,
        together=128,
        decoder_batch=256,
        decoder_rate=0.02,
        unet_batch=1024,
        unet_rate=0.02,
        continued=1.0,
        supersampling=2,
        bfloat16=True,
        processes=6,
        save_every=60,
        measured=128,
    ),
    "cpu": Preset(
        minutes=1440,
        decoder_share=0.2,
        scenes=64 * 1024,
        uses=32,
        kept_pictures=2048,
        code_pictures=512,
        procedural=2048,
        together=8,
        decoder_batch=32,
        decoder_rate=0.01,
        unet_batch=32,
        unet_rate=0.01,
        # From the bundled model's weights, the whole rates took the loss on other scenes from 0.0386 to 0.0435 in 860
        # steps of such small batches; a quarter of them took it to 0.0376 in 3800.
        continued=0.25,
        supersampling=2,
        bfloat16=True,
        processes=1,
        save_every=300,
        measured=32,
    ),
    # Checks that everything runs, in seconds; the model is of no use.
    "tiny": Preset(
        minutes=0.2,
        decoder_share=0.4,
        scenes=CHUNK,
        uses=4,
        kept_pictures=16,
        code_pictures=8,
        procedural=8,
        together=4,
        decoder_batch=6,
        decoder_rate=0.01,
        unet_batch=4,
        unet_rate=0.01,
        continued=0.5,
        supersampling=1,
        bfloat16=False,
        processes=1,
        save_every=5,
        measured=2,
    ),
}
