"""A model folder as Hugging Face lays it out, known from its headers and its config alone.

Owns the choice of files and the agreement of index and shards. Must not read tensor data, nor know families of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.checkpoints.header import Header, TensorEntry, read_header
from pipeline.checkpoints.json_text import is_plain_text, parse_object, refusal
from pipeline.checkpoints.statistics_facts import COMPLETE_FILE, FORMAT, SUFFIX
from pipeline.errors import CheckpointError, Problem, StorageError
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage.base import checked_path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What to do about a folder that is not there, by whether it is a local one.
WHERE_MODELS_ARE = {
    True: "check the path; a model of the Hugging Face hub must be downloaded first, by `hf download`",
    False: "check the path and the credentials",
}
# Requests in flight for headers: enough to hide the latency of an object store, few for a disk.
_HEADERS_AT_ONCE = 8
# An index of a million tensors, or a config with a pattern for each; anything larger is neither.
_LARGEST_JSON_BYTES = 256 << 20
# One damaged download can make thousands of problems; the first ones tell enough.
_MOST_PROBLEMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A weights file.

    Attributes:
        path: Inside the store.
        size_bytes: Of the whole file.
        version: Changes when it is replaced.
        header_bytes: Offset of its first data byte.
    """

    path: str
    size_bytes: int
    version: str
    header_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's tensors and where their bytes are.

    Attributes:
        url: What was opened, without credentials.
        store: Its folder.
        tensors: By name, ordered by file, then offset.
        files: In the order of their names.
        config: The content of config.json; empty when there is none.
    """

    url: str
    store: Store
    tensors: Mapping[str, TensorEntry]
    files: tuple[SourceFile, ...]
    config: Mapping[str, object]

    @property
    def data_bytes(self) -> int:
        """The bytes of all tensors, headers not counted."""
        return sum(entry.size_bytes for entry in self.tensors.values())

    @property
    def parameters(self) -> int:
        """The elements of all tensors."""
        return sum(entry.elements for entry in self.tensors.values())


def open_checkpoint(url: str, options: Mapping[str, object] | None = None) -> Checkpoint:
    """Return a model, from its headers, index and config; no tensor is read.

    Args:
        url: A model folder, or one file ending in ".safetensors".
        options: Storage options.

    Raises:
        CheckpointError: There is no safetensors model, or its files are damaged or contradict each other.
        StorageError: They could not be read.
    """
    folder, single = _split_url(url)
    store = open_store(folder, options)
    try:
        return _open(store, single)
    finally:
        # A family of many shards would otherwise hold a descriptor for each header all through the merge.
        store.close()


def _open(store: Store, single: str) -> Checkpoint:
    """Return the model in a folder, or in one file of it."""
    index = None if single else _read_index(store)
    paths = tuple(sorted(set(index.values()))) if index is not None else (single or _single_file(store),)
    headers = _read_headers(store, paths)
    for path, header in zip(paths, headers, strict=True):
        if header.metadata.get("format") == FORMAT:
            raise _statistics_refusal(store.location(path))
    if index is not None:
        _check_index(store, index, dict(zip(paths, headers, strict=True)))
    return Checkpoint(
        url=store.location(single),
        store=store,
        tensors=MappingProxyType({entry.name: entry for header in headers for entry in header.tensors}),
        files=tuple(
            SourceFile(path=path, size_bytes=head.size_bytes, version=head.version, header_bytes=head.header_bytes)
            for path, head in zip(paths, headers, strict=True)
        ),
        config=MappingProxyType(read_object(store, CONFIG_FILE, strict=False) or {}),
    )


def _split_url(url: str) -> tuple[str, str]:
    """Return folder and file name, "" when the URL is a folder."""
    base, mark, query = url.partition("?")
    if not base.endswith(SAFETENSORS):
        return url, ""
    folder, slash, name = base.rpartition("/")
    if not slash:
        folder = "."
    elif not folder or folder.endswith(":/"):
        folder += "/"
    return folder + mark + query, name


def read_object(store: Store, path: str, *, strict: bool) -> dict[str, object] | None:
    """Return a JSON object of a model's or an adapter's folder; None when there is no such file.

    Raises:
        CheckpointError: It is none, or far too large.
    """
    where = store.location(path)
    try:
        size_bytes = store.stat(path).size_bytes
        if size_bytes > _LARGEST_JSON_BYTES:
            raise refusal(where, f"has {size_bytes} bytes, {_LARGEST_JSON_BYTES} at most are expected")
        raw = store.read(path, 0, size_bytes)
    except MissingObject:
        return None
    return parse_object(raw, where, strict=strict)


def _read_index(store: Store) -> dict[str, str] | None:
    """Return tensor name -> shard path; None when the folder has no index or its single file goes before it."""
    found = read_object(store, INDEX_FILE, strict=True)
    if found is None:
        return None
    where = store.location(INDEX_FILE)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refusal(where, "must have a weight_map from tensor names to file names")
    for name, shard in weight_map.items():
        if not is_plain_text(name) or not is_plain_text(shard) or not _is_shard_name(shard):
            raise refusal(
                where, f"tensor {name!r} is said to be in {shard!r}, which is no *.safetensors file of this folder"
            )
    if not store.exists(SINGLE_FILE):
        return weight_map
    others = sorted(set(weight_map.values()) - {SINGLE_FILE})
    if others:
        raise refusal(
            where,
            f"two models in one folder: {SINGLE_FILE}, and an index that refers to {others[0]}",
            f"remove {SINGLE_FILE}, or the index with its shards",
        )
    return None


def _is_shard_name(shard: str) -> bool:
    try:
        return checked_path(shard).endswith(SAFETENSORS)
    except StorageError:
        return False


def _single_file(store: Store) -> str:
    """Return the one weights file of a folder without index."""
    if store.exists(SINGLE_FILE):
        return SINGLE_FILE
    # Asked last: a listing is the slowest question to an object store, and plain web servers have none.
    names = tuple(path for path in store.list() if "/" not in path)
    candidates = tuple(name for name in names if name.endswith(SAFETENSORS))
    if len(candidates) == 1:
        return candidates[0]
    where = store.location()
    # A file of statistics named directly looks like an empty folder.
    if not candidates and (COMPLETE_FILE in names or any(name.endswith(SUFFIX) for name in names or (where,))):
        raise _statistics_refusal(where)
    if candidates:
        raise refusal(
            where,
            f"has {len(candidates)} safetensors files ({', '.join(candidates[:3])}, ...) and no {INDEX_FILE}",
            "fetch the index too, or name one file",
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise refusal(
            where,
            f"has its weights as pickle only ({', '.join(pickles[:3])}); a pickle can run any code and is never loaded",
            "convert it where that is safe: transformers' from_pretrained, then save_pretrained",
        )
    if names:
        raise refusal(where, f"has no {SINGLE_FILE} and no {INDEX_FILE}", "point to the folder that has them")
    raise refusal(where, "is empty or does not exist", WHERE_MODELS_ARE[store.is_local])


def _statistics_refusal(where: str) -> CheckpointError:
    """Return the error for second moments in the place of weights: a merge of them would run and mean nothing."""
    return refusal(where, "holds statistics, which are no weights", "name the model's folder here")


def _read_headers(store: Store, paths: tuple[str, ...]) -> tuple[Header, ...]:
    """Return the headers of all files; missing ones are reported together."""

    def read(path: str) -> Header | CheckpointError:
        try:
            return read_header(store, path)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(min(_HEADERS_AT_ONCE, len(paths))) as pool:
        results = tuple(pool.map(read, paths))
    _raise_all([problem for result in results if isinstance(result, CheckpointError) for problem in result.problems])
    return tuple(result for result in results if isinstance(result, Header))


def _check_index(store: Store, index: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Check that the index and the shards tell the same: each tensor once, where the index says."""
    _raise_all(list(_disagreements(store, index, headers)))


def _disagreements(store: Store, index: Mapping[str, str], headers: Mapping[str, Header]) -> Iterator[Problem]:
    remedy = "fetch the index and all its files again, of one revision"
    holders: dict[str, list[str]] = {}
    for path, header in headers.items():
        for entry in header.tensors:
            holders.setdefault(entry.name, []).append(path)
    for name, path in index.items():
        if path not in holders.get(name, []):
            what = f"the index lists tensor {name!r}, which the file does not have"
            yield Problem(what=what, where=store.location(path), remedy=remedy)
    for name, paths in holders.items():
        if len(paths) > 1:
            what = f"tensor {name!r} is also in {paths[0]}"
            yield Problem(what=what, where=store.location(paths[1]), remedy=remedy)
        elif name not in index:
            what = f"has tensor {name!r}, which the index does not list"
            yield Problem(what=what, where=store.location(paths[0]), remedy=remedy)


def _raise_all(problems: list[Problem]) -> None:
    if len(problems) > _MOST_PROBLEMS:
        rest = Problem(what=f"and {len(problems) - _MOST_PROBLEMS} more of this kind")
        problems = [*problems[:_MOST_PROBLEMS], rest]
    if problems:
        raise CheckpointError(*problems)
