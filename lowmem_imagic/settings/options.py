"""The table of options: one row for each option of each command.

The command line builds its commands from it, a batch its `Request`, and `settings.text` turns the values of its rows
into settings. A new option is a new row here and, if it is a new setting, a new field in `settings.stages`.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from .presets import PRESETS, SMALL_KEEP
from .stages import ADAPT_TARGETS, INTERPOLATIONS


class Kind(Enum):
    """Kinds of values, as a command line or a form reads them."""

    TEXT = "text"
    WHOLE = "a whole number"
    NUMBER = "a number"
    SWITCH = "on or off"
    PATH = "a path"
    NUMBERS = "numbers with commas between them"
    WHOLE_NUMBERS = "whole numbers with commas between them"
    STRENGTH = "one number, or one for each block"


REQUIRED = ...
"""The default of a required option."""

FIRST = "Most used"
TRAINING = "Training"
PICTURES = "Pictures"
BASE = "Base model"
WORK = "Sharing the work"
RESULTS = "Files and messages"
PANELS = (FIRST, TRAINING, PICTURES, BASE, WORK, RESULTS)
"""Groups of options, in the order in which help shows them."""


@dataclass(frozen=True)
class Option:
    """One option of one or several commands."""

    name: str
    """Its name in Python, in forms and in messages; the command line's flag is made from it."""
    commands: tuple[str, ...]
    """Commands that have it, such as ``edit`` and ``batch run``."""
    kind: Kind
    panel: str
    """One of `PANELS`."""
    help: str
    default: Any = None
    """None leaves a setting as the preset or the edit has it."""
    fills: tuple[str, ...] = ()
    """Settings that take its value, as ``stage.field``; none for an option of the run. A stage is one of
    `EditConfig`'s, ``base`` for `settings.text.BaseOptions`, or ``axes`` for a sheet's rows and columns. A name
    without a stage is a field of `EditConfig` itself."""
    least: int | None = None
    most: int | None = None
    metavar: str | None = None
    short: str | None = None
    """A second flag of one letter."""
    positional: bool = False
    """Whether the command line takes it as a positional argument."""
    many: bool = False
    """Whether it may be given several times; its value is then a list."""

    @property
    def flag(self) -> str:
        """The command line's spelling, such as ``--steps-embed``."""
        return f"--{self.name.replace('_', '-')}"


_EDIT = ("edit",)
_TRAIN = ("train",)
_SAMPLE = ("sample",)
_SHEET = ("sheet",)
_BATCH = ("batch run",)
_SCENE = ("scene",)
_DOCTOR = ("doctor",)
_EXPORT, _PUSH, _PULL = ("export",), ("push",), ("pull",)
_UI = ("ui",)
_TRAINING = _EDIT + _TRAIN + _BATCH
_OPENING = _SAMPLE + _SHEET
_RENDERING = _EDIT + _SAMPLE + _BATCH
_FOLDER = ("batch retry", "batch status", "batch sheet")
_ALL = _TRAINING + _OPENING

_MODEL = ("base.model",)
_WEIGHTS = ("base.weights",)

_SEEDS_HELP = "comma-separated seeds of the starting noise; 0 is the photo's own, which others vary"
_ETAS_HELP = "comma-separated: 0 is the photo, 1 the sentence, above 1 beyond it"
_MODEL_HELP = (
    "demo, sd14, sd15, sd21, sdxl, klein, if-m, if-l, if-xl, ..., a diffusers folder, a .safetensors file or a Hub id "
    "[default: demo]"
)
_VRAM_HELP = (
    "stay within this much memory, such as 8GB; chooses checkpointing, rows and batches "
    "[default: the GPU's free memory]"
)
_MANIFEST_HELP = "a folder of photos, or a .jsonl, .csv or .json list of photo, sentence, ..."
_SENTENCES_HELP = "description of the edited picture, unchanged parts included; several train once, with a row each"
_LATER_HELP = "description of the edited picture; none or several train an edit to be asked any sentence later"
_PROMPT_HELP = "another sentence than the one the edit was trained for; nothing is trained"
_PROMPTS_HELP = f"{_PROMPT_HELP}; several times for a row each"
_FAILED_HELP = "also items that failed for a lasting reason, such as a bad photo"
_ADAPT_HELP = (
    f"layers to adapt: {', '.join(ADAPT_TARGETS)}, or a value of peft's target_modules: endings of names "
    "(to_q,to_v), a regular expression for whole names, or all-linear"
)
_KEEP_HELP = "share of the adapter's bytes to keep in the edit file [default: the preset's; 1 with --rank or --adapt]"
_STRENGTH_HELP = "factor on the adapter, 0 (the base alone) to 2; or one a block: down=0.5,mid=1,up=1.2"
_MASK_HELP = "keep to the photo where the sentence says nothing new; up to 1, higher keeps more; 0 is off"
_START_HELP = (
    "start of denoising: noise; photo (noise over the photo's overall colours; klein has noise alone); or inverted "
    "(the photo's own noise over them; the edit must have been trained with it)"
)
_SOURCE_HELP = (
    "what the photo shows now, in words as the sentence's: only what the two say differently changes, and the photo's "
    "own details stay more often"
)
_SCHEDULER_HELP = "diffusers scheduler: DDIM, EulerDiscrete, DPMSolverMultistep, ...; for klein FireFlow or Euler"
_WEIGHTS_HELP = "format of the frozen base: int8, nf4, bnb-int8 (one edit at a time), bf16 or fp32"
_COMPUTE_HELP = (
    "type of the arithmetic: bf16, fp16 or fp32; auto takes bf16 on GPUs, fp16 on those before RTX 30xx, fp32 on CPUs; "
    "a base in bf16 or fp32 computes in that type"
)
_CONFIG_HELP = (
    "model whose configuration a .safetensors file uses: sd21, sd21-base, ..., a Hub id or a diffusers folder; "
    "needed for files of SD 2.x and of another shape"
)
_VAE_HELP = "folder whose autoencoder is taken, such as for a file with only a UNet or transformer"
_TEXT_FROM_HELP = "folder whose text encoders are taken, such as for a file with only a UNet or transformer"
_ADDRESS_HELP = "address of the Ray cluster; auto for this machine's [default: RAY_ADDRESS, or a new cluster]"
_EDIT_HELP = "an edit file, or the address of one on the Hugging Face Hub (hub:USER/REPO)"
_ADDRESS_OF_EDIT_HELP = "USER/REPO, hub:USER/REPO@REVISION, or a link to the Hub"
_TO_HELP = "program: peft, diffusers, a1111 (Forge, SD.Next, InvokeAI too) or comfyui"
_PICTURE_HELP = "a picture for the page on the Hub; several times for several [default: none]"
_OFFERED_HELP = "base model to offer beside the bundled one; may be given several times"
_LISTEN_HELP = "serve other machines, too; asks for a password, or takes that of LOWMEM_IMAGIC_PASSWORD"
_COVER_HELP = "also write the edited picture beside the edit file under its name, as galleries of LoRAs show it"

# fmt: off
OPTIONS: tuple[Option, ...] = (
    # The files and sentences that a command works on.
    Option("photo", _EDIT + _TRAIN, Kind.PATH, FIRST, "the picture to edit", REQUIRED, positional=True),
    Option("sentence", _EDIT, Kind.TEXT, FIRST, _SENTENCES_HELP, REQUIRED, positional=True, many=True),
    Option("sentence", _TRAIN, Kind.TEXT, FIRST, _LATER_HELP, positional=True, many=True),
    Option("edit_file", (*_OPENING, "inspect", *_EXPORT), Kind.PATH, FIRST, _EDIT_HELP, REQUIRED, metavar="EDIT",
           positional=True),
    Option("edit_file", _PUSH, Kind.PATH, FIRST, "an edit file", REQUIRED, metavar="EDIT", positional=True),
    Option("repository", _PUSH, Kind.TEXT, FIRST, "USER/REPO; created if it is not there", REQUIRED, positional=True),
    Option("repository", _PULL, Kind.TEXT, FIRST, _ADDRESS_OF_EDIT_HELP, REQUIRED, positional=True),
    Option("folder", _EXPORT, Kind.PATH, FIRST, "folder for the files", REQUIRED, metavar="DIR", positional=True),
    Option("manifest", _BATCH, Kind.PATH, FIRST, _MANIFEST_HELP, REQUIRED, positional=True),
    Option("folder", _FOLDER, Kind.PATH, FIRST, "the --out of a batch run", REQUIRED, metavar="DIR", positional=True),
    Option("sentence", _SCENE, Kind.TEXT, FIRST, "one or two of sphere, cube, cylinder, cone on a floor", REQUIRED,
           positional=True),
    Option("out", _SCENE, Kind.PATH, FIRST, "PNG file to write", REQUIRED, positional=True),

    # The most used options.
    Option("model", _TRAINING, Kind.TEXT, FIRST, _MODEL_HELP, fills=_MODEL),
    Option("model", _OPENING, Kind.TEXT, FIRST, "base model [default: the edit's own, if it is on this machine]",
           fills=_MODEL),
    Option("out", _EDIT, Kind.PATH, FIRST, "folder for the results [default: named after photo and sentence]"),
    Option("out", _TRAIN, Kind.PATH, FIRST, "edit file to write [default: named after photo and sentence]"),
    Option("out", _SAMPLE, Kind.PATH, FIRST, "folder for the pictures [default: named after the edit]"),
    Option("out", _SHEET, Kind.PATH, FIRST, "PNG to write [default: named after the edit]"),
    Option("out", _BATCH, Kind.PATH, FIRST, "folder that gets a folder for each item", REQUIRED),
    Option("prompt", _BATCH, Kind.TEXT, FIRST, "sentence for items that have none of their own; a folder needs it"),
    Option("prompt", _SAMPLE, Kind.TEXT, FIRST, _PROMPTS_HELP, many=True),
    Option("preset", (*_TRAINING, "doctor"), Kind.TEXT, FIRST, f"settings to start from: {', '.join(PRESETS)}",
           "balanced"),
    Option("rows", _SHEET, Kind.TEXT, FIRST, "setting that varies by row: eta, strength, seed or guidance", "seed"),
    Option("columns", _SHEET, Kind.TEXT, FIRST, "setting that varies by column", "eta"),
    Option("etas", _RENDERING, Kind.NUMBERS, FIRST, _ETAS_HELP, fills=("sample.etas",)),
    Option("etas", _SHEET, Kind.NUMBERS, FIRST, _ETAS_HELP, fills=("axes.eta",)),
    Option("seeds", _EDIT + _SAMPLE, Kind.WHOLE_NUMBERS, FIRST, _SEEDS_HELP, fills=("sample.seeds",)),
    Option("seeds", _SHEET, Kind.WHOLE_NUMBERS, FIRST, _SEEDS_HELP, fills=("axes.seed",)),
    Option("vram", _TRAINING, Kind.TEXT, FIRST, _VRAM_HELP, metavar="MEMORY"),
    Option("to", _EXPORT, Kind.TEXT, FIRST, _TO_HELP, REQUIRED),
    Option("public", _PUSH, Kind.SWITCH, FIRST, "let anyone see it [default: a private repository]", False),
    Option("picture", _PUSH, Kind.PATH, FIRST, _PICTURE_HELP, metavar="<path>", many=True),
    Option("yes", _PUSH, Kind.SWITCH, FIRST, "upload without a question: an edit gives its photo back", False),
    Option("out", _PULL, Kind.PATH, FIRST, "edit file to write [default: named after the repository]"),
    Option("revision", _PULL, Kind.TEXT, FIRST, "commit, tag or branch [default: the newest commit]"),
    Option("failed", ("batch retry",), Kind.SWITCH, FIRST, _FAILED_HELP, False),
    Option("plan", _DOCTOR, Kind.SWITCH, FIRST, "show instead which edits fit on a graphics card", False),
    Option("model", _DOCTOR, Kind.TEXT, FIRST, "with --plan: the base model; short names need no download", "sd15"),
    Option("base_weights", _DOCTOR, Kind.TEXT, FIRST, "with --plan: format of the frozen base", "int8", fills=_WEIGHTS),
    Option("size", _DOCTOR, Kind.WHOLE, FIRST, "with --plan: side of the pictures [default: the model's]"),
    Option("vram", _DOCTOR, Kind.TEXT, FIRST, "with --plan: memory of cards", "6GB,8GB,12GB", metavar="MEMORY"),
    Option("seed", _SCENE, Kind.WHOLE, FIRST, "seed of the details that the sentence leaves open", 0, least=0),
    Option("size", _SCENE, Kind.WHOLE, FIRST, "side of the picture in pixels", 128, least=16, most=2048),
    Option("model", _UI, Kind.TEXT, FIRST, _OFFERED_HELP, many=True),
    Option("out", _UI, Kind.PATH, FIRST, "folder for batches and their results", "studio"),
    Option("port", _UI, Kind.WHOLE, FIRST, "port of the page; 0 for any free one", 7860, least=0, most=65535),
    Option("listen", _UI, Kind.SWITCH, FIRST, _LISTEN_HELP, False),

    # Training.
    Option("seed", _TRAINING, Kind.WHOLE, TRAINING, "seed of all random draws in training", 0, fills=("seed",)),
    Option("steps_embed", _TRAINING, Kind.WHOLE, TRAINING, "steps of stage 1 (embedding)", fills=("embed.steps",)),
    Option("steps_finetune", _TRAINING, Kind.WHOLE, TRAINING, "steps of stage 2 (adapter)", fills=("finetune.steps",)),
    Option("learning_rate", _TRAINING, Kind.NUMBER, TRAINING, "learning rate of stage 2",
           fills=("finetune.learning_rate",)),
    Option("draws", _TRAINING, Kind.WHOLE, TRAINING, "(timestep, noise) draws a step, both stages",
           fills=("embed.draws", "finetune.draws")),
    Option("adapt", _TRAINING, Kind.TEXT, TRAINING, _ADAPT_HELP, fills=("finetune.adapt",)),
    Option("rank", _TRAINING, Kind.WHOLE, TRAINING, "LoRA rank, 1 to 256; alpha follows it",
           fills=("finetune.lora_rank",)),
    Option("keep", _TRAINING, Kind.NUMBER, TRAINING, _KEEP_HELP, fills=("finetune.keep",)),
    Option("small", _TRAINING, Kind.SWITCH, TRAINING,
           f"the smallest edit file: keep {SMALL_KEEP:g} of the adapter's bytes", False),

    # Pictures.
    Option("seeds", _BATCH, Kind.WHOLE_NUMBERS, PICTURES, _SEEDS_HELP, fills=("sample.seeds",)),
    Option("strength", _RENDERING, Kind.STRENGTH, PICTURES, _STRENGTH_HELP, fills=("sample.strength",),
           metavar="FLOAT|BLOCKS"),
    Option("strengths", _SHEET, Kind.NUMBERS, PICTURES, "comma-separated factors on the adapter",
           fills=("axes.strength",)),
    Option("mask", _RENDERING + _SHEET, Kind.NUMBER, PICTURES, _MASK_HELP, fills=("sample.mask",)),
    Option("guidance", _RENDERING, Kind.NUMBER, PICTURES, "classifier-free guidance scale; 1 switches it off",
           fills=("sample.guidance_scale",)),
    Option("guidances", _SHEET, Kind.NUMBERS, PICTURES, "comma-separated guidance scales", fills=("axes.guidance",)),
    Option("photo_guidance", _RENDERING + _SHEET, Kind.NUMBER, PICTURES,
           "guidance at eta 0; rises evenly to the full scale at eta 1", fills=("sample.photo_guidance",)),
    Option("negative", _RENDERING + _SHEET, Kind.TEXT, PICTURES, "sentence to steer away from",
           fills=("sample.negative_prompt",)),
    Option("source", _RENDERING + _SHEET, Kind.TEXT, PICTURES, _SOURCE_HELP, fills=("sample.source_prompt",)),
    Option("edit_guidance", _RENDERING + _SHEET, Kind.NUMBER, PICTURES,
           "scale of the difference between sentence and source, at eta 1", fills=("sample.edit_guidance_scale",)),
    Option("start", _RENDERING + _SHEET, Kind.TEXT, PICTURES, _START_HELP, fills=("sample.start",)),
    Option("interpolation", _RENDERING + _SHEET, Kind.TEXT, PICTURES,
           f"path from the photo's embedding to the sentence's: {', '.join(INTERPOLATIONS)}",
           fills=("sample.interpolation",)),
    Option("steps_sample", _RENDERING + _SHEET, Kind.WHOLE, PICTURES, "denoising steps per image",
           fills=("sample.num_inference_steps",)),
    Option("scheduler", _RENDERING + _SHEET, Kind.TEXT, PICTURES,
           _SCHEDULER_HELP, fills=("sample.scheduler",)),
    Option("batch_rows", _RENDERING + _SHEET, Kind.WHOLE, PICTURES,
           "rows in one sampling batch at most; a picture takes two with guidance, and a source prompt adds two",
           fills=("sample.batch_rows",)),
    Option("prompt", _SHEET, Kind.TEXT, PICTURES, _PROMPT_HELP),
    Option("photo", _SHEET, Kind.PATH, PICTURES, "the edit's photo, shown beside (edit files do not contain it)"),

    # The base model.
    Option("device", _ALL + _UI, Kind.TEXT, BASE, "auto, cuda, cuda:N or cpu", "auto", fills=("base.device",)),
    Option("base_weights", _TRAINING, Kind.TEXT, BASE, _WEIGHTS_HELP, "int8", fills=_WEIGHTS),
    Option("base_weights", _OPENING, Kind.TEXT, BASE, "format of the frozen base [default: as in training]",
           fills=_WEIGHTS),
    Option("attention", _ALL, Kind.TEXT, BASE, "auto, xformers or sdpa", "auto", fills=("base.attention",)),
    Option("compute", _ALL, Kind.TEXT, BASE, _COMPUTE_HELP, "auto", fills=("base.compute",)),
    Option("checkpointing", _TRAINING, Kind.SWITCH, BASE, "recompute activations: less memory, more time", False,
           fills=("base.checkpointing",)),
    Option("model_config", _ALL, Kind.TEXT, BASE, _CONFIG_HELP, fills=("base.config_folder",)),
    Option("vae", _ALL, Kind.TEXT, BASE, _VAE_HELP, fills=("base.vae",)),
    Option("text_from", _ALL, Kind.TEXT, BASE, _TEXT_FROM_HELP, fills=("base.text_from",)),
    Option("revision", _ALL, Kind.TEXT, BASE, "commit, tag or branch of a Hub model", fills=("base.revision",)),

    # How a batch shares its work.
    Option("slots", _BATCH, Kind.WHOLE, WORK, "most edits in training at once [default: as fit]", least=1, most=64),
    Option("workers", _BATCH, Kind.WHOLE, WORK,
           "processes, or Ray actors, to share the work [default: one a GPU]", least=1, most=64),
    Option("shard", _BATCH, Kind.TEXT, WORK, "only the Ith of N parts of the manifest, for array jobs", metavar="I/N"),
    Option("executor", _BATCH, Kind.TEXT, WORK,
           "executor of the items: local (this machine), or ray (a Ray cluster)", "local"),
    Option("address", _BATCH, Kind.TEXT, WORK, _ADDRESS_HELP),
    Option("save_every", _BATCH, Kind.WHOLE, WORK,
           "training steps between two saved states of an edit; 0 saves only when stopped", 25, least=0),

    # Files and messages.
    Option("background", _TRAINING, Kind.TEXT, RESULTS, "colour under transparent parts of the photo", "white"),
    Option("cover", _EDIT, Kind.SWITCH, RESULTS, _COVER_HELP, False),
    Option("thumbnail", _PUSH, Kind.SWITCH, RESULTS, "leave the file's thumbnail in it, if it has one", False),
    Option("json", (*_ALL, "inspect", "doctor", *_FOLDER, *_EXPORT, *_PUSH, *_PULL), Kind.SWITCH, RESULTS,
           "print the report as JSON", False),
    Option("force", (*_ALL, "scene", "batch sheet", *_EXPORT, *_PULL), Kind.SWITCH, RESULTS,
           "replace files that are there already", False),
    Option("force", _PUSH, Kind.SWITCH, RESULTS, "replace edit, card and pictures of an earlier push", False),
    Option("quiet", (*_ALL, "batch retry"), Kind.SWITCH, RESULTS, "no progress bars and no remarks but warnings", False,
           short="-q"),
)
# fmt: on
"""All rows; help shows a panel's rows in this order."""


def options_of(command: str) -> list[Option]:
    """The options of a command, panel by panel."""
    return sorted((row for row in OPTIONS if command in row.commands), key=lambda row: PANELS.index(row.panel))
