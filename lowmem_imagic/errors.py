"""Every error this package raises on purpose.

::

    LowmemImagicError
    ├── ConfigError                  settings out of range, all of them at once
    ├── PromptError                  empty sentence, or one with nothing to encode
    ├── ImageError                   the picture cannot be used
    │   ├── ImageNotFoundError       no such file, or it may not be read
    │   ├── NotAnImageError          the bytes are no picture of a supported kind
    │   ├── TruncatedImageError      the picture ends early or its data are damaged
    │   └── ImageTooLargeError       more pixels, bytes or parts than the caps (checked before decoding)
    ├── ModelError                   the base model cannot be used
    │   ├── UnknownModelError        no model of that name, folder or file
    │   ├── IncompleteModelError     a folder with parts missing (half a download)
    │   ├── WrongFamilyError         a model of a kind this version does not edit
    │   ├── BackendUnavailableError  an option was asked for by name and is missing here
    │   ├── BaseInUseError           another thread is using it
    │   └── NonFiniteModelError      a part of the base gives NaN or infinity
    ├── EditFileError                the edit file cannot be used
    │   ├── EditNotFoundError        no such file, or it may not be read
    │   ├── NotAnEditFileError       not safetensors, or without this package's header
    │   ├── EditTooLargeError        file or header above the caps (checked before parsing)
    │   ├── TruncatedEditError       the file ends before its tensors do
    │   ├── EditHeaderError          malformed, duplicated or mistyped header entries
    │   ├── UnsupportedEditVersionError  written by a newer format
    │   ├── EditLayoutError          tensors overlap, leave holes or trail bytes
    │   ├── UnknownTensorError       a tensor name outside the format
    │   ├── MissingTensorError       one of down / up / alpha of a layer is absent
    │   ├── TensorDtypeError         a tensor in a type the format does not allow
    │   ├── TensorShapeError         shapes that contradict each other or the rank
    │   ├── NonFiniteTensorError     NaN or infinity
    │   ├── NonFiniteEditError       finite numbers that make NaN or infinity when they are rendered
    │   ├── TensorValueError         numbers far beyond those of any training
    │   └── EditChangedError         tensors changed since the file was written
    ├── BaseMismatchError            a good edit file, made for another base
    ├── HubError                     a repository of the Hugging Face Hub cannot be read or written
    ├── OutputError                  the result cannot be written
    │   ├── OutputExistsError        the target exists already; it is overwritten only on request
    │   └── OutputUnwritableError    no space left, read-only, not a folder
    ├── DivergenceError              a training stage blew up
    ├── MemoryLimitError             does not fit; names the stage and the next cheaper setting
    └── UnexpectedError              an error of a library or of this package's own code, caught at a boundary

Catch the base class to catch them all::

    try:
        make_edits(base, [Job(photo, "a blue cube")], preset("balanced"))
    except LowmemImagicError as error:
        print(error)

A message is one line: what was found, what was expected, what to do. It names a setting in backticks, as in
`batch_rows`, `adapt=attn` or `embed.steps`; the command line shows the flag of that setting in its place.
"""

import re

SETTING = re.compile("`(?P<name>[a-z_]+(?:[.][a-z_]+)?)(?:=(?P<value>[^`]+))?`")
"""A setting in a message, with a value or without one."""


class LowmemImagicError(Exception):
    """Base of every error raised on purpose; its text is fit to be shown to a user as it is."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of the settings that the message speaks of, each once."""
        return tuple(dict.fromkeys(match["name"] for match in SETTING.finditer(str(self))))


class ConfigError(LowmemImagicError):
    """One or more settings are out of range; the text lists them all."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class PromptError(LowmemImagicError):
    """The sentence is empty or holds nothing the tokenizer can encode."""


class ImageError(LowmemImagicError):
    """The picture cannot be used."""


class ImageNotFoundError(ImageError):
    """There is no such file, it is not a regular file, or it may not be read."""


class NotAnImageError(ImageError):
    """The bytes are not a picture of a supported kind."""


class TruncatedImageError(ImageError):
    """The picture ends early or its data are damaged."""


class ImageTooLargeError(ImageError):
    """The picture has more pixels, bytes or parts than the caps, which are checked before decoding."""


class ModelError(LowmemImagicError):
    """The base model cannot be used."""


class UnknownModelError(ModelError):
    """There is no model of that name, folder or file."""


class IncompleteModelError(ModelError):
    """A model folder lacks parts, as after an interrupted download."""


class WrongFamilyError(ModelError):
    """The model is of a kind this version does not edit."""


class BackendUnavailableError(ModelError):
    """A device, attention or weight format was asked for by name and is missing here."""


class BaseInUseError(ModelError):
    """A loaded base was used from a second thread while another was using it."""


class NonFiniteModelError(ModelError):
    """A part of the base gives NaN or infinity by itself: the model is damaged, or unsuitable for these settings."""


class EditFileError(LowmemImagicError):
    """The edit file cannot be used."""


class EditNotFoundError(EditFileError):
    """There is no such file, it is not a regular file, or it may not be read."""


class NotAnEditFileError(EditFileError):
    """The file is not safetensors, or does not carry this package's header entries."""


class EditTooLargeError(EditFileError):
    """The file or its header is above the caps, which are checked before parsing."""


class TruncatedEditError(EditFileError):
    """The file ends before its header or its tensors do."""


class EditHeaderError(EditFileError):
    """The header is malformed: not JSON, duplicated keys, wrong types, values out of range."""


class UnsupportedEditVersionError(EditFileError):
    """The file was written by a newer version of the format."""


class EditLayoutError(EditFileError):
    """The tensors overlap, leave holes, or are followed by stray bytes."""


class UnknownTensorError(EditFileError):
    """The file holds a tensor name outside the format."""


class MissingTensorError(EditFileError):
    """One of the three tensors of a layer (down, up, alpha) is absent, or there are no layers."""


class TensorDtypeError(EditFileError):
    """A tensor has a type the format does not allow."""


class TensorShapeError(EditFileError):
    """Shapes contradict each other, the rank, or the base."""


class NonFiniteTensorError(EditFileError):
    """A tensor holds NaN or infinity."""


class TensorValueError(EditFileError):
    """A factor or its alpha is far larger than training makes it; its use would overflow."""


class EditChangedError(EditFileError):
    """The tensors have changed since the file was written: by another program, or by damage."""


class NonFiniteEditError(EditFileError):
    """The edit's numbers are finite, but rendering it gives NaN or infinity; the base alone does not."""


class BaseMismatchError(LowmemImagicError):
    """The edit file is fine but was made for another base model."""


class HubError(LowmemImagicError):
    """A repository of the Hugging Face Hub cannot be read or written."""


class OutputError(LowmemImagicError):
    """The result cannot be written."""


class OutputExistsError(OutputError):
    """The target exists already; it is overwritten only on request."""


class OutputUnwritableError(OutputError):
    """No space left, a read-only place, or not a folder."""


class DivergenceError(LowmemImagicError):
    """A training stage's loss is no longer finite, where a lower learning rate helps; or all its steps overflowed."""


class MemoryLimitError(LowmemImagicError):
    """The work does not fit into memory; names the stage and the next cheaper setting."""


class UnexpectedError(LowmemImagicError):
    """Reported in place of an error that is not this package's own; see `unexpected`."""

    details = ""
    """Its traceback."""
