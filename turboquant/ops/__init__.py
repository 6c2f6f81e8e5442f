"""The hot operations, one folder each: `reference.py` defines the operation, `__init__.py` checks and dispatches."""
