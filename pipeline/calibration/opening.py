"""From a model folder to a model that can be run: class, parameters' names, tokenizer, none of the weights.

Owns the dealings with transformers, which is imported when a model is opened. Must not know what is measured.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.calibration.batches import Special
from pipeline.calibration.examples import Vocabulary
from pipeline.calibration.model import Model, Parameter, read_values
from pipeline.calibration.settings import TASKS, Task
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.header import TensorEntry
from pipeline.checkpoints.sidecars import has_tokenizer, side_files
from pipeline.errors import CalibrationError, CheckpointError, Problem
from pipeline.storage import Store, open_store, shown_url

ADAPTER = "adapter_config.json"
_CLASSES: dict[Task, str] = {
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
}
# How the names of the classes end that configs give.
_ENDINGS: dict[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
# Characters of what transformers says.
_MOST_TOLD = 400
# A damaged model lacks thousands; the first ones tell enough.
_MOST_PROBLEMS = 5
# Embeddings of a gigabyte are compared without holding them.
_PIECE_BYTES = 16 << 20


def open_model(url: str, task: Task | None, device: str) -> Model:
    """Return a model without any value in memory.

    Args:
        url: A model folder.
        task: What it does; None to go by its config.
        device: Where values will be loaded to.

    Raises:
        CheckpointError: There is no such model, or its weights are not those of its class.
        CalibrationError: transformers is not installed, or cannot make a model for the task of it.
    """
    where = f"model {shown_url(url)}"
    transformers = _transformers()
    _refuse_adapter(url, where)
    checkpoint = open_checkpoint(url)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy_side_files(checkpoint.store, folder)
        config = _asked(lambda: transformers.AutoConfig.from_pretrained(folder), where, "config.json")
        tokenizer = None
        if has_tokenizer(checkpoint.store):
            tokenizer = _asked(lambda: transformers.AutoTokenizer.from_pretrained(folder), where, "tokenizer")
    task = task or _task_of(config, where)
    module = _build(transformers, config, task, where)
    model = Model(
        module=module,
        task=task,
        checkpoint=checkpoint,
        parameters=_parameters(module, checkpoint, where),
        tokenizer=tokenizer,
        vocabulary=_vocabulary(config, tokenizer),
        special=_special(config, tokenizer, task, where),
        device=device,
    )
    _load_buffers(model)
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        remedy = "pip install 'geomerge[calibrate]'"
        raise CalibrationError(Problem(what="a calibration needs transformers", remedy=remedy)) from error
    return transformers


def _refuse_adapter(url: str, where: str) -> None:
    store = open_store(url)
    try:
        if store.exists(ADAPTER):
            remedy = "merge it into its base first, by PEFT's merge_and_unload: statistics are of whole weights"
            raise CalibrationError(Problem(what="is an adapter", where=where, remedy=remedy))
    finally:
        store.close()


def _copy_side_files(store: Store, folder: Path) -> None:
    """Copy what a config and a tokenizer are read from; code in a model's folder is never run."""
    for path in side_files(store):
        if not path.endswith(".py"):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(store.read(path))


def _asked(question: Callable[[], Any], where: str, what: str) -> Any:
    """Return what transformers makes of a model's files; what it cannot read is an error of ours."""
    try:
        return question()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        # Of a class that does not fit, transformers lists all that would.
        told = textwrap.shorten(str(error), _MOST_TOLD, placeholder=" …")
        problem = Problem(what=f"transformers cannot use its {what}: {told}", where=where)
        raise CalibrationError(problem) from error


def _task_of(config: Any, where: str) -> Task:
    for name in config.architectures or ():
        for ending, task in _ENDINGS.items():
            if name.endswith(ending):
                return task
    names = ", ".join(config.architectures or ()) or "no class"
    remedy = f"say it by --task: {', '.join(TASKS)}"
    raise CalibrationError(Problem(what=f"its config names {names}, which tells no task", where=where, remedy=remedy))


def _build(transformers: Any, config: Any, task: Task, where: str) -> Any:
    """Return the model with its parameters on the device "meta", its computed buffers in memory."""
    if getattr(config, "quantization_config", None) is not None:
        raise CalibrationError(
            Problem(what="is quantised", where=where, remedy="calibrate the model that it was quantised from")
        )
    if task == "classification" and config.is_encoder_decoder:
        raise CalibrationError(Problem(what="classification by an encoder-decoder is not supported", where=where))
    # Nothing is generated, and a cache would hold what layers return.
    config.use_cache = False
    config.dtype = torch.float32
    maker = getattr(transformers, _CLASSES[task])
    with _parameters_on_meta():
        module = _asked(lambda: maker.from_config(config, dtype=torch.float32), where, f"class for the task {task}")
    return module.eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While it is entered, parameters of new modules take no memory; buffers, which no checkpoint has, are computed."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _parameters(module: nn.Module, checkpoint: Checkpoint, where: str) -> dict[str, Parameter]:
    """Return all parameters by their names in the checkpoint, those that are tied once."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
        shapes[id(value)] = tuple(value.shape)
    found, problems = {}, []
    for key, aliases in names.items():
        for tied in _untied(aliases, checkpoint):
            entry = next((checkpoint.tensors[name] for name in tied if name in checkpoint.tensors), None)
            if entry is None:
                problems.append(Problem(what=f"has no tensor {tied[0]}, which {type(module).__name__} has"))
            elif entry.shape != shapes[key]:
                what = f"its {entry.name} has the shape {list(entry.shape)}, its config says {list(shapes[key])}"
                problems.append(Problem(what=what))
            else:
                owners = ((module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tied)
                found[entry.name] = Parameter(entry=entry, owners=tuple(owners))
    if problems:
        remedy = "give the task's own model, its head included; tensors that transformers renames are not supported"
        raise CheckpointError(
            *(Problem(what=problem.what, where=where, remedy=remedy) for problem in problems[:_MOST_PROBLEMS])
        )
    return found


def _untied(aliases: list[str], checkpoint: Checkpoint) -> list[list[str]]:
    """Return the names of a tied parameter, those apart whose values in the checkpoint are others.

    Configs say that weights are tied which are not: T5's of version 1.1 do.
    """
    stored = [checkpoint.tensors[name] for name in aliases if name in checkpoint.tensors]
    apart = [entry.name for entry in stored[1:] if not _is_same(checkpoint.store, stored[0], entry)]
    return [[name for name in aliases if name not in apart], *([name] for name in apart)]


def _is_same(store: Store, first: TensorEntry, second: TensorEntry) -> bool:
    """Return whether two tensors have the same bytes, read a piece at a time."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for start in range(0, first.size_bytes, _PIECE_BYTES):
        stop = min(first.size_bytes, start + _PIECE_BYTES)
        one, other = (store.read(entry.file, entry.start + start, entry.start + stop) for entry in (first, second))
        if one != other:
            return False
    return True


def _load_buffers(model: Model) -> None:
    """Load the buffers that the checkpoint has, and move all to the device."""
    for name, buffer in list(model.module.named_buffers()):
        entry = model.checkpoint.tensors.get(name)
        owner = model.module.get_submodule(name.rpartition(".")[0])
        if entry is not None and entry.shape == tuple(buffer.shape) and buffer.is_floating_point():
            buffer = read_values(model.checkpoint.store, entry)
        setattr(owner, name.rpartition(".")[2], buffer.to(model.device))


def _vocabulary(config: Any, tokenizer: Any) -> Vocabulary:
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    # Some count positions that no text can use; their tokenizers know.
    told = getattr(tokenizer, "model_max_length", None)
    classes = getattr(config, "num_labels", 0) or 0
    return Vocabulary(
        size=text.vocab_size,
        classes=classes,
        class_numbers={str(name): number for name, number in (getattr(config, "label2id", None) or {}).items()},
        most_tokens=min(most, told or most) if isinstance(most, int) else None,
    )


def _special(config: Any, tokenizer: Any, task: Task, where: str) -> Special:
    begin = getattr(config, "decoder_start_token_id", None)
    if task == "seq2seq" and begin is None:
        raise CalibrationError(Problem(what="its config has no decoder_start_token_id", where=where))
    padding = getattr(config, "pad_token_id", None)
    if padding is None:
        padding = getattr(tokenizer, "pad_token_id", None)
    return Special(padding=padding or 0, begin=begin)
