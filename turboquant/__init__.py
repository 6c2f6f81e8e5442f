"""TurboQuant: KV caches of 2 to 4 bits that are as small as they say.

    from turboquant import TurboQuantCache, wrap

    model.generate(**inputs, past_key_values=TurboQuantCache(model, bits=3))
    wrap(model, bits=3)  # every generate of this model uses one, read in place

The names that need transformers (TurboQuantCache, wrap, LayerReport) load it when they are first used.
"""

from typing import TYPE_CHECKING, Any

from turboquant.errors import OptionError, ShapeError, StateError, TurboQuantError, UnsupportedModelError
from turboquant.index import TurboQuantIndex
from turboquant.key_bias import KeyBias
from turboquant.policy import Precision
from turboquant.quantizer import TurboQuantIP, TurboQuantMSE
from turboquant.store import CompressedKV, StoreOptions

if TYPE_CHECKING:
    from turboquant.hf import LayerReport, TurboQuantCache, wrap

__all__ = [
    "CompressedKV",
    "KeyBias",
    "LayerReport",
    "OptionError",
    "Precision",
    "ShapeError",
    "StateError",
    "StoreOptions",
    "TurboQuantCache",
    "TurboQuantError",
    "TurboQuantIP",
    "TurboQuantIndex",
    "TurboQuantMSE",
    "UnsupportedModelError",
    "wrap",
]

_NEED_TRANSFORMERS = ("LayerReport", "TurboQuantCache", "wrap")


def __getattr__(name: str) -> Any:
    if name in _NEED_TRANSFORMERS:
        import turboquant.hf

        return getattr(turboquant.hf, name)
    raise AttributeError(f"module 'turboquant' has no attribute {name!r}")
