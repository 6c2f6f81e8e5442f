"""Weights on their way: host memory, the ring on the device, and who may read which bytes when."""

from streamer.weights.device import DeviceWeights, UnitSource
from streamer.weights.host import HostWeights, MappedWeights
from streamer.weights.memory import current_device
from streamer.weights.packed import PackedWeights
from streamer.weights.pieces import PieceReader

__all__ = [
    "DeviceWeights",
    "HostWeights",
    "MappedWeights",
    "PackedWeights",
    "PieceReader",
    "UnitSource",
    "current_device",
]
