"""attend: queries over keys and values stored in segments (sinks, planes, recent window)."""

from turboquant.ops.attend.reference import Segment, attend

__all__ = ["Segment", "attend"]
