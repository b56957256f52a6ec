"""Bytes at a URL prefix: the one room that talks to disks and object stores.

Owns ranged reads, atomic writes, listing, retries, and the translation of every backend's errors into `StorageError`.
Knows nothing of tensors, models or plans. Only `remote` needs fsspec, and loads it when a remote URL is opened.
"""

from pipeline.storage.base import MissingObject, ObjectStat, ObjectWriter, Store
from pipeline.storage.opening import open_store

__all__ = ["MissingObject", "ObjectStat", "ObjectWriter", "Store", "open_store"]
