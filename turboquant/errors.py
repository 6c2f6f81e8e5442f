"""The errors of `turboquant`.

TurboQuantError            everything this package raises on purpose
├── OptionError            an argument has a value that cannot be honoured (also a ValueError)
├── ShapeError             a tensor has the wrong shape, dtype or device (also a ValueError)
├── UnsupportedModelError  a kind of model, or of layer, that cannot be served
└── StateError             a call out of order (also a RuntimeError)
"""


class TurboQuantError(Exception):
    """Root of all errors that `turboquant` raises on purpose."""


class OptionError(TurboQuantError, ValueError):
    """An argument has a value that cannot be honoured; the message names it and what is allowed."""


class ShapeError(TurboQuantError, ValueError):
    """A tensor does not have the shape, dtype or device that the operation needs."""


class UnsupportedModelError(TurboQuantError):
    """The model, or one of its layers, is of a kind that cannot be served; the message names the kind."""


class StateError(TurboQuantError, RuntimeError):
    """The object is not in a state in which this call makes sense."""
