"""The making of statistics: a model is run over data, and second moments of what it sees are kept.

Owns all that needs transformers. Must not know recipes, merge methods or the engine; what it writes is read by the
room `checkpoints`, as any other statistics are.
"""
