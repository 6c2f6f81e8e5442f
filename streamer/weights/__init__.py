"""Weights on their way: host memory, the ring on the device, and who may read which bytes when."""

from streamer.weights.device import DeviceWeights
from streamer.weights.host import MappedWeights, PinnedSource, StagedSource, UnitReader, UnitSource

__all__ = ["DeviceWeights", "MappedWeights", "PinnedSource", "StagedSource", "UnitReader", "UnitSource"]
