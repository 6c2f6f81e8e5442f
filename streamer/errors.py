"""The errors that package streamer raises on purpose.

    StreamerError
    ├── OptionError (also ValueError)          a size, name or option that cannot be honoured
    ├── ModelNotFoundError                     no checkpoint under that name in any place looked in
    ├── CheckpointError                        a file of the checkpoint is wrong; carries its path
    │   ├── MissingShardError                  the index names a file that is not there
    │   ├── TruncatedShardError                a file ends before its tensors do
    │   ├── HeaderError                        a header or index that cannot be read or contradicts itself
    │   ├── MissingTensorError                 a tensor that the index or the model asks for is in no shard
    │   └── TensorMismatchError                a tensor is there, with another size, shape or owner than stated
    ├── DoesNotFitError                        the plan needs more memory than there is
    ├── UnsupportedModelError                  a kind of model or file that cannot be served
    └── ContextLengthError (also ValueError)   more tokens than the model or the plan has room for

Each message says what was asked, what was found, and what to type or do next.
"""

from pathlib import Path


class StreamerError(Exception):
    """Root of all errors of this package."""


class OptionError(StreamerError, ValueError):
    """A size, name or option that cannot be honoured as given."""


class ModelNotFoundError(StreamerError):
    """No checkpoint under the given name; the message names every place looked in."""


class CheckpointError(StreamerError):
    """A file of the checkpoint is wrong.

    Args:
        message: what is wrong, and what to do.
        path: the file (or the folder, when no single file is to blame); kept as the attribute `path`.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class MissingShardError(CheckpointError):
    """A safetensors file that the index names, or any at all, is not in the folder."""


class TruncatedShardError(CheckpointError):
    """A safetensors file is shorter than its header says."""


class HeaderError(CheckpointError):
    """A safetensors header or an index cannot be read, or contradicts itself."""


class MissingTensorError(CheckpointError):
    """A tensor that was asked for is in no shard."""


class TensorMismatchError(CheckpointError):
    """A tensor is there, but its size, shape or place is not the one stated."""


class DoesNotFitError(StreamerError):
    """The run needs more memory than the budget or the machine has; the message holds every number.

    Args:
        message: what is needed, and what to do.
        largest_context: tokens for which there would be memory, all else as asked; None where no number would do. Kept
            as the attribute `largest_context`.
    """

    def __init__(self, message: str, *, largest_context: int | None = None) -> None:
        super().__init__(message)
        self.largest_context = largest_context


class UnsupportedModelError(StreamerError):
    """A kind of model, layer or weight file that cannot be served."""


class ContextLengthError(StreamerError, ValueError):
    """More tokens were asked for than the model or the plan has room for.

    Args:
        message: what was asked, and what to do.
        largest_context: tokens that there is room for; kept as the attribute `largest_context`.
    """

    def __init__(self, message: str, *, largest_context: int) -> None:
        super().__init__(message)
        self.largest_context = largest_context
