"""LoRA adapters as peft stores them: opened by their headers and config alone, and placed on a base exactly.

Owns the choice of an adapter folder's files and the joining of its tensors to a base's. Must not read tensor data, nor
know families of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pipeline.checkpoints.adapter_config import LoraSettings, lora_settings
from pipeline.checkpoints.adapter_fit import (
    Correction,
    find_correction,
    leftover_problems,
    orientations,
    oriented,
    replacement_problems,
    update_problems,
)
from pipeline.checkpoints.adapter_names import Factors, raise_all, sort_tensors
from pipeline.checkpoints.adapter_ties import shared_embeddings, tie_problems
from pipeline.checkpoints.checkpoint import (
    INDEX_FILE,
    PICKLES,
    SAFETENSORS,
    SINGLE_FILE,
    WHERE_MODELS_ARE,
    Checkpoint,
    SourceFile,
    read_object,
)
from pipeline.checkpoints.header import TensorEntry, read_header
from pipeline.checkpoints.json_text import is_plain_text, refusal
from pipeline.errors import CheckpointError
from pipeline.storage import Store, open_store
from pipeline.storage.redaction import bare_name

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "Adapter", "Factors", "Placement", "is_adapter", "open_adapter", "place"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's tensors, where their bytes are, and what they mean.

    Attributes:
        url: What was opened, without credentials.
        store: Its folder.
        tensors: By name, ordered by offset.
        files: The one weights file.
        config: The content of adapter_config.json.
        settings: What it says of ranks and scales.
        updates: By the tensor that each adds to, in the adapter's words.
        replaced: By the tensor that each stands for, likewise.
    """

    url: str
    store: Store
    tensors: Mapping[str, TensorEntry]
    files: tuple[SourceFile, ...]
    config: Mapping[str, object]
    settings: LoraSettings
    updates: Mapping[str, Factors]
    replaced: Mapping[str, TensorEntry]

    @property
    def base_name(self) -> str | None:
        """The model that it says it was trained on."""
        name = self.config.get("base_model_name_or_path")
        return bare_name(name) if isinstance(name, str) and is_plain_text(name) and name else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What an adapter does to a base, by the base's tensor names.

    Attributes:
        updates: What it adds. A tensor may be replaced and added to.
        replaced: What it stores whole. Of a tied embedding all copies; the base may lack some of these names.
        notes: What is legal but worth saying; equal for equal adapters.
        aliases: Replaced copy of a tied embedding -> the embedding.
        correction: How the adapter's names became the base's.
    """

    updates: Mapping[str, Factors]
    replaced: Mapping[str, TensorEntry]
    notes: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    correction: Correction = field(default_factory=Correction)


def is_adapter(url: str, options: Mapping[str, object] | None = None) -> bool:
    """Return whether a folder is an adapter: it has adapter_config.json and no full model.

    A full model beside a forgotten adapter_config.json is a full model, and so is a file named directly.

    Args:
        url: A folder, or one file ending in ".safetensors".
        options: Storage options.

    Raises:
        CheckpointError: The folder has the weights of both.
        StorageError: It could not be read.
    """
    if url.partition("?")[0].endswith(SAFETENSORS):
        return False
    store = open_store(url, options)
    try:
        if not store.exists(ADAPTER_CONFIG):
            return False
        full = next((name for name in (SINGLE_FILE, INDEX_FILE) if store.exists(name)), None)
        if full is None:
            return True
        if store.exists(ADAPTER_FILE):
            what = f"is an adapter ({ADAPTER_FILE}) and a full model ({full}) in one folder"
            raise refusal(store.location(), what, "move one of them to a folder of its own")
        return False
    finally:
        store.close()


def open_adapter(url: str, options: Mapping[str, object] | None = None) -> Adapter:
    """Return an adapter, from its header and config; no tensor is read.

    Args:
        url: The folder that peft's save_pretrained wrote.
        options: Storage options.

    Raises:
        CheckpointError: There is no adapter; its files are damaged or contradict each other; or it is no plain LoRA,
            that is, its update is not scale · B · A added to tensors of an unchanged base.
        StorageError: They could not be read.
    """
    store = open_store(url, options)
    try:
        config = _read_config(store)
        settings = lora_settings(config, store.location(ADAPTER_CONFIG))
        if not store.exists(ADAPTER_FILE):
            raise _no_weights(store)
        header = read_header(store, ADAPTER_FILE)
    finally:
        store.close()
    tensors = {entry.name: entry for entry in header.tensors}
    updates, replaced = sort_tensors(tensors, settings, store.location(ADAPTER_FILE))
    return Adapter(
        url=store.location(),
        store=store,
        tensors=MappingProxyType(tensors),
        files=(
            SourceFile(
                path=ADAPTER_FILE,
                size_bytes=header.size_bytes,
                version=header.version,
                header_bytes=header.header_bytes,
            ),
        ),
        config=MappingProxyType(config),
        settings=settings,
        updates=MappingProxyType(updates),
        replaced=MappingProxyType(replaced),
    )


def place(adapter: Adapter, base: Checkpoint) -> Placement:
    """Return what an adapter does to the tensors of a base; every tensor of it must find its place.

    Args:
        adapter: An open adapter.
        base: The checkpoint that it stands on.

    Raises:
        CheckpointError: Every name that the base lacks, every shape or type that does not fit, and every change of an
            embedding that the base ties to another.
    """
    where = f"model {adapter.url} on {base.url}"
    names = list(dict.fromkeys([*adapter.updates, *adapter.replaced]))
    correction = find_correction(names, base.tensors)
    touched = {name: correction.to_base(name) for name in names}
    aliases = _aliases(adapter, touched, base)
    missing = [name for name, target in touched.items() if target not in base.tensors and target not in aliases]
    problems = list(leftover_problems(missing, base.tensors, where))
    turned = orientations(base.tensors, {touched[name]: factors for name, factors in adapter.updates.items()})
    updates = {}
    for name, factors in adapter.updates.items():
        if tensor := base.tensors.get(touched[name]):
            said = adapter.settings.fan_in_fan_out
            updates[tensor.name] = oriented(factors, tensor, turned, said=said)
            problems += update_problems(updates[tensor.name], tensor, where)
        elif touched[name] in aliases:
            updates[touched[name]] = factors
    replaced = {touched[name]: entry for name, entry in adapter.replaced.items() if name not in missing}
    for target, entry in replaced.items():
        if tensor := base.tensors.get(target):
            problems += replacement_problems(entry, tensor, where)
    problems += tie_problems(updates, replaced, base, aliases, where)
    raise_all(problems)
    return Placement(
        updates=MappingProxyType(updates),
        replaced=MappingProxyType(replaced),
        notes=tuple(_notes(updates, correction, adapter.settings)),
        aliases=MappingProxyType({alias: source for alias, source in aliases.items() if alias in replaced}),
        correction=correction,
    )


def _aliases(adapter: Adapter, touched: Mapping[str, str], base: Checkpoint) -> dict[str, str]:
    """Return the base's tied copies where the adapter touches what may be an embedding; most adapters do not."""
    outside = [
        target
        for name, target in touched.items()
        if name in adapter.replaced
        or adapter.updates[name].kind == "embedding"
        # Blocks are numbered; embeddings and heads are outside of them.
        or not any(part.isdigit() for part in target.split("."))
    ]
    return shared_embeddings(outside, base) if outside else {}


def _notes(updates: Mapping[str, Factors], correction: Correction, settings: LoraSettings) -> list[str]:
    """Return what was inferred."""
    notes = []
    if correction.removed:
        notes.append(f"adapters name their modules {correction.removed}*, which their base leaves out")
    if correction.added:
        notes.append(f"adapters name their modules without {correction.added}*, which their base has in front")
    said = settings.fan_in_fan_out
    if any(factors.kind == "linear" and factors.transposed != said for factors in updates.values()):
        text = str(said).lower()
        notes.append(f"adapters say fan_in_fan_out: {text}, which not every layer of the base is: its shapes count")
    return notes


def _read_config(store: Store) -> dict[str, object]:
    """Return the content of adapter_config.json."""
    config = read_object(store, ADAPTER_CONFIG, strict=False)
    if config is not None:
        return config
    if not store.list():
        raise refusal(store.location(), "is empty or does not exist", WHERE_MODELS_ARE[store.is_local])
    remedy = "point to the folder that peft's save_pretrained wrote"
    raise refusal(store.location(), f"is no adapter: it has no {ADAPTER_CONFIG}", remedy)


def _no_weights(store: Store) -> CheckpointError:
    """Return the error for an adapter folder without its weights file."""
    names = tuple(path for path in store.list() if "/" not in path)
    others = [name for name in names if name.endswith(SAFETENSORS)]
    # Trainers leave other pickles beside the weights: their arguments, the optimizer's state.
    pickles = [name for name in names if name.startswith("adapter_model") and name.endswith(PICKLES)]
    if others:
        what = f"has no {ADAPTER_FILE}, but {', '.join(others[:3])}"
        return refusal(store.location(), what, f"rename the adapter's weights to {ADAPTER_FILE}, as peft reads it")
    if pickles:
        return refusal(
            store.location(),
            f"has its weights as pickle only ({', '.join(pickles[:3])}); a pickle can run any code and is never loaded",
            "convert it where that is safe: peft's from_pretrained, then save_pretrained",
        )
    return refusal(store.location(), f"has no {ADAPTER_FILE}", "save or fetch the adapter again, whole")
