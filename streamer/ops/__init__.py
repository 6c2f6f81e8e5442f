"""The streamer's own operations on tensors, a folder each: `reference.py` defines one, `__init__.py` dispatches."""
