"""tq-stream: language models larger than the GPU, layer by layer, with a compressed KV cache.

from streamer import StreamingEngine

engine = StreamingEngine("Qwen/Qwen2.5-14B-Instruct", bits=3, vram="8GiB")
print(engine.generate("Explain the tides", max_new_tokens=200))
"""

from typing import TYPE_CHECKING, Any

from streamer.errors import (
    CheckpointError,
    ContextLengthError,
    DoesNotFitError,
    ModelNotFoundError,
    OptionError,
    StreamerError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from streamer.engine import StreamingEngine
    from streamer.report import MemoryReport

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "DoesNotFitError",
    "MemoryReport",
    "ModelNotFoundError",
    "OptionError",
    "StreamerError",
    "StreamingEngine",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only for those who use the engine
    if name == "StreamingEngine":
        from streamer.engine import StreamingEngine

        return StreamingEngine
    if name == "MemoryReport":
        from streamer.report import MemoryReport

        return MemoryReport
    raise AttributeError(f"module 'streamer' has no attribute {name!r}")
