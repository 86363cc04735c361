"""The options that several commands share, as Typer's annotated types."""

from pathlib import Path
from typing import Annotated

import typer

from ..settings.presets import PRESETS, SMALL_KEEP
from ..settings.stages import ADAPT_TARGETS, INTERPOLATIONS

EditFile = Annotated[Path, typer.Argument(metavar="EDIT", help="an edit file")]
SampleModel = Annotated[str | None, typer.Option(help="base model [default: the one named in the edit]")]
SampleWeights = Annotated[str | None, typer.Option(help="format of the frozen UNet [default: as in training]")]
Model = Annotated[
    str | None,
    typer.Option(
        help="demo, sd14, sd15, sd21, sd21-base, a diffusers folder, a .safetensors file or a Hub id [default: demo]"
    ),
]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        help="whose configuration a .safetensors file uses: sd21, sd21-base, ..., a Hub id or a diffusers folder; "
        "one of SD 2.x needs it"
    ),
]
Revision = Annotated[str | None, typer.Option(help="commit, tag or branch of a Hub model")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu")]
BaseWeights = Annotated[str, typer.Option(help="format of the frozen UNet: int8, bnb-int8, bf16 or fp32")]
Attention = Annotated[str, typer.Option(help="auto, xformers or sdpa")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="recompute activations: less memory, more time")]
Vram = Annotated[
    str | None,
    typer.Option(
        metavar="MEMORY",
        help="stay within this much memory, such as 8GB; chooses checkpointing, rows and batches "
        "[default: what the GPU has free]",
    ),
]
Preset = Annotated[str, typer.Option(help=f"settings to start from: {', '.join(PRESETS)}")]
Seed = Annotated[int, typer.Option(help="seed of everything drawn while training")]
Etas = Annotated[str | None, typer.Option(help="comma-separated: 0 is the photo, 1 the sentence, above 1 beyond it")]
Seeds = Annotated[
    str | None,
    typer.Option(help="comma-separated seeds of the starting noise; 0 is the photo's own, which others vary"),
]
StepsSample = Annotated[int | None, typer.Option(help="denoising steps per image")]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1 switches it off")]
PhotoGuidance = Annotated[
    float | None, typer.Option(help="guidance at eta 0, from where it rises evenly to the whole at eta 1")
]
Negative = Annotated[str | None, typer.Option(help="sentence to steer away from")]
StrengthText = Annotated[
    str | None,
    typer.Option(
        "--strength",
        metavar="FLOAT|BLOCKS",
        help="factor on the adapter, 0 (the base alone) to 2; or one a block: down=0.5,mid=1,up=1.2",
    ),
]
Interpolation = Annotated[
    str | None, typer.Option(help=f"way from the photo's embedding to the sentence's: {', '.join(INTERPOLATIONS)}")
]
Start = Annotated[
    str | None,
    typer.Option(
        help="what denoising starts from: noise; photo (noise over its overall colours); or inverted (over them the "
        "photo's own noise, which the edit must have been trained with)"
    ),
]
Mask = Annotated[
    float | None,
    typer.Option(help="keep to the photo where the sentence says nothing new; up to 1, higher keeps more; 0 is off"),
]
Prompt = Annotated[
    str | None, typer.Option(help="another sentence than the one the edit was trained for; nothing is trained")
]
Scheduler = Annotated[
    str | None, typer.Option(help="diffusers scheduler: DDIM, EulerDiscrete, DPMSolverMultistep, ...")
]
BatchRows = Annotated[int | None, typer.Option(help="UNet rows in one sampling batch at most")]
Background = Annotated[str, typer.Option(help="colour under transparent parts of the photo")]
Cover = Annotated[
    bool,
    typer.Option(
        "--cover",
        help="also write the edited picture beside the edit file under its name, as galleries of LoRAs show it",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print the report as JSON")]
Force = Annotated[bool, typer.Option("--force", help="replace files that are there already")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
StepsEmbed = Annotated[int | None, typer.Option(help="steps of stage 1 (embedding)")]
StepsFinetune = Annotated[int | None, typer.Option(help="steps of stage 2 (adapter)")]
LearningRate = Annotated[float | None, typer.Option(help="learning rate of stage 2")]
Draws = Annotated[int | None, typer.Option(help="(timestep, noise) draws a step, both stages")]
Adapt = Annotated[str | None, typer.Option(help=f"layers to adapt: {', '.join(ADAPT_TARGETS)}")]
Rank = Annotated[int | None, typer.Option(help="LoRA rank, 1 to 256; alpha follows it")]
Keep = Annotated[
    float | None,
    typer.Option(
        help="share of the adapter's bytes to keep in the edit file [default: the preset's; 1 with --rank or --adapt]"
    ),
]
Small = Annotated[
    bool, typer.Option("--small", help=f"the smallest edit file: keep {SMALL_KEEP:g} of the adapter's bytes")
]
SuggestEta = Annotated[
    bool, typer.Option("--suggest-eta", help="mark the eta that the base model itself would take; advisory")
]
