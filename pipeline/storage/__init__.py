"""Bytes at a URL prefix: the one room that talks to disks and object stores.

Owns ranged reads, atomic writes, listing, retries, and the translation of every backend's errors into `StorageError`.
Knows nothing of tensors, models or plans. Only `backend` needs fsspec, and loads it when a remote URL is opened.
"""

from pipeline.storage.base import Leftover, MissingObject, ObjectStat, ObjectWriter, Store, is_path
from pipeline.storage.counting import Counters, counters
from pipeline.storage.opening import join_url, open_store, split_url
from pipeline.storage.options import NO_OPTIONS, StorageOptions, check_storage_options
from pipeline.storage.redaction import redacted, shown_url
from pipeline.storage.urls import UrlError, checked_url, is_writable, place_of

__all__ = [
    "NO_OPTIONS",
    "Counters",
    "Leftover",
    "MissingObject",
    "ObjectStat",
    "ObjectWriter",
    "StorageOptions",
    "Store",
    "UrlError",
    "check_storage_options",
    "checked_url",
    "counters",
    "is_path",
    "is_writable",
    "join_url",
    "open_store",
    "place_of",
    "redacted",
    "shown_url",
    "split_url",
]
