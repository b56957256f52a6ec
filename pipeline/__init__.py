"""geomerge: merge families of fine-tuned models into one checkpoint, out of core and certified.

The import package of the ``geomerge`` command. Rooms, lowest first, and what each may import are described in
``docs/architecture.md``; ``tests/test_layers.py`` enforces it.
"""

__version__ = "0.1.0"
