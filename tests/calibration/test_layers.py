"""A model run layer by layer gives the bits of the model held whole, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.calibration.command import calibrate
from pipeline.calibration.opening import open_model
from pipeline.calibration.settings import Settings, Statistic
from pipeline.calibration.spill import Spill
from pipeline.calibration.stacks import find_stacks
from pipeline.checkpoints.statistics import Statistics, open_statistics
from pipeline.errors import BudgetError, CalibrationError, StorageError
from pipeline.events import Event, StageEnded
from pipeline.storage import open_store
from tests.calibration import models
from tests.calibration.runs import collect, raw_values
from tests.support.sparse import save_sparse

ROWS: dict[str, list[dict[str, Any]]] = {
    "bert": models.token_rows(7),
    "llama": models.token_rows(7),
    "t5": models.token_rows(7, target=models.tokens),
}
# More than the files' buffers and the largest Gram of a tiny model, less than all its weights.
LITTLE_BYTES = 33_641_000


class Stages:
    """Which stages ended; stops the run before a given one."""

    def __init__(self, stop_behind: int | None = None) -> None:
        self.names: list[str] = []
        self._stop_behind = stop_behind

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageEnded):
            self.names.append(event.stage)
            if len(self.names) == self._stop_behind:
                raise StorageError


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_layer_by_layer_gives_the_same_bits(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    whole = collect(folder, ROWS[name], tmp_path / "whole", statistics="gram")
    stages = Stages()
    layered = collect(
        folder, ROWS[name], tmp_path / "layered", statistics="gram", memory_bytes=LITTLE_BYTES, listener=stages
    )
    assert len(stages.names) == {"bert": 4, "llama": 4, "t5": 7}[name]
    assert raw_values(layered) == raw_values(whole)
    assert layered.shared == whole.shared
    assert layered.reasons == whole.reasons
    # Nothing of what was spilled is left.
    assert not list((tmp_path / "layered").glob("scratch/**/*.*"))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("lost", ["nothing", "scratch", "statistics"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(
    name: str, lost: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    whole = collect(folder, ROWS[name], tmp_path / "whole", statistics="gram")
    output = tmp_path / "out"
    with pytest.raises(StorageError):
        collect(
            folder, ROWS[name], output, statistics="gram", memory_bytes=LITTLE_BYTES, listener=Stages(stop_behind=2)
        )
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.statistics")}
    assert before
    if lost == "scratch":
        shutil.rmtree(output / "scratch")
    elif lost == "statistics":
        for path in before:
            path.unlink()
    stages = Stages()
    found = collect_again(folder, output, stages)
    assert raw_values(found) == raw_values(whole)
    assert found.shared == whole.shared
    all_stages = {"llama": 4, "t5": 7}[name]
    assert len(stages.names) == (all_stages - 2 if lost == "nothing" else all_stages)
    if lost == "scratch":
        # Layers are run again, their Grams are kept.
        assert all(path.stat().st_mtime_ns == written for path, written in before.items())


def collect_again(
    folder: Path,
    output: Path,
    listener: Stages,
    statistics: Statistic = "gram",
    examples: int = 7,
    memory_bytes: int = LITTLE_BYTES,
) -> Statistics:
    """The same command once more: the data is not touched."""
    calibrate(
        str(folder),
        str(output.with_name(f"{output.name}.jsonl")),
        str(output),
        Settings(statistics=statistics, examples=examples, batch=3),
        memory_bytes=memory_bytes,
        process_bytes=0,
        listener=listener,
    )
    return open_statistics(str(output))


def test_grams_of_gradients_in_several_passes_are_those_of_one(bert: Path, tmp_path: Path) -> None:
    rows = models.token_rows(3, label=models.label)
    document: dict[str, Any] = {}
    once = collect(bert, rows, tmp_path / "once", statistics="kfac", document=document)
    terms = document["memory"]
    little_bytes = sum(terms.values()) - terms["statistics"] * 2 // 3
    stages = Stages()
    passes = collect(bert, rows, tmp_path / "passes", statistics="kfac", memory_bytes=little_bytes, listener=stages)
    assert len(stages.names) >= 3
    assert raw_values(passes) == raw_values(once)
    # Stopped behind its first pass, it takes one less the second time.
    stopper = Stages(stop_behind=1)
    with pytest.raises(StorageError):
        collect(bert, rows, tmp_path / "cut", statistics="kfac", memory_bytes=little_bytes, listener=stopper)
    rest = Stages()
    found = collect_again(bert, tmp_path / "cut", rest, "kfac", len(rows), little_bytes)
    assert rest.names == stages.names[1:]
    assert raw_values(found) == raw_values(once)


def test_too_little_memory_is_refused_with_the_number_that_does(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"largest statistic .*--memory 34MB") as caught:
        collect(llama, ROWS["llama"], tmp_path / "out", statistics="gram", memory_bytes=1_000_000)
    assert "weights" in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))
    # What needs gradients needs all weights.
    with pytest.raises(BudgetError, match="--memory"):
        collect(llama, ROWS["llama"], tmp_path / "out", statistics="kfac", memory_bytes=33_600_000)


def test_a_model_that_goes_through_its_layers_again_is_not_cut(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=models.VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=models.CLASSES,
    )
    torch.manual_seed(1)
    transformers.AlbertForSequenceClassification(config).save_pretrained(tmp_path / "albert")
    assert find_stacks(open_model(str(tmp_path / "albert"), None, "cpu")) is None
    found = collect(tmp_path / "albert", ROWS["bert"], tmp_path / "out", statistics="gram")
    # Its one layer was seen three times; what comes before the layers is a linear layer of its own.
    assert found.find("input_gram", "albert.encoder.embedding_hidden_mapping_in.weight") is not None
    with pytest.raises(BudgetError):
        collect(tmp_path / "albert", ROWS["bert"], tmp_path / "little", statistics="gram", memory_bytes=33_500_000)


SMALL: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # Relative positions from outside of the layers, as one table for all.
        ("MPNetForSequenceClassification", {}),
        # The same, looked at without a call; linear layers that get positions instead of tokens.
        ("DebertaV2ForSequenceClassification", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        # A linear layer between embeddings and layers.
        ("ElectraForSequenceClassification", {"embedding_size": 8}),
        # Two kinds of masks, and scores that are tied.
        ("Gemma2ForCausalLM", {"num_key_value_heads": 1, "head_dim": 8}),
        # Two sides, positions learned on each.
        ("BartForConditionalGeneration", {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
         "decoder_start_token_id": 2}),
    ],
)  # fmt: skip
def test_other_architectures_give_the_same_bits(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    maker = getattr(transformers, kind)
    torch.manual_seed(2)
    maker(maker.config_class(**{**SMALL, **changes})).save_pretrained(tmp_path / "model")
    document: dict[str, Any] = {}
    whole = collect(tmp_path / "model", ROWS["t5"], tmp_path / "whole", statistics="gram", document=document)
    terms = document["memory"]
    little_bytes = sum(terms.values()) - terms["statistics"] // 2
    layered = collect(
        tmp_path / "model",
        ROWS["t5"],
        tmp_path / "layered",
        statistics="gram",
        memory_bytes=little_bytes,
        document=document,
    )
    assert document["mode"] == "layers"
    assert raw_values(layered) == raw_values(whole)
    assert (layered.shared, layered.reasons) == (whole.shared, whole.reasons)


def test_layers_that_get_more_of_the_tokens_than_hidden_states_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    original = rotary.forward

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = original(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(rotary, "forward", forward)
    with pytest.raises(CalibrationError, match="more than hidden states"):
        collect(llama, ROWS["llama"], tmp_path / "out", statistics="gram", memory_bytes=LITTLE_BYTES)


def test_spilled_outputs_come_back_as_they_were(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "spill"))
    spill = Spill(store, "me")
    value = (torch.randn(2, 3), None, (torch.tensor([True, False]), torch.arange(4)), torch.zeros(0, 3))
    spill.save(3, 1, value)
    spill.finish(3, {"anchor": None})
    found = Spill(store, "me").load(3, 1, "cpu")
    assert isinstance(found, tuple)
    assert found[1] is None
    for one, other in ((found[0], value[0]), (found[2][0], value[2][0]), (found[2][1], value[2][1])):
        assert torch.equal(one, other)
    assert found[3].shape == (0, 3)
    assert spill.finished() == (3, {"anchor": None})
    # Those of another calibration are of no use.
    assert Spill(store, "another").finished() is None
    with pytest.raises(CalibrationError, match="gone or damaged"):
        spill.load(3, 1, "cpu")
    with pytest.raises(CalibrationError, match="give more --memory"):
        spill.save(0, 0, {"a": 1})


PROGRAM = """
import json, sys
from pipeline.calibration.command import calibrate
from pipeline.calibration.settings import Settings
from pipeline.engine.process import peak_memory_bytes
import torch, transformers
torch.set_num_threads(1)
model, data, output, more, small = sys.argv[1:]
from pipeline.calibration.residence import resident_bytes
# What is imported and set up at first use is no part of what a model takes.
settings = Settings(statistics="gram", examples=8, batch=4)
calibrate(small, data, output + "-small", settings, memory_bytes=4_000_000_000)
held = resident_bytes()
done = calibrate(model, data, output, settings, memory_bytes=held + int(more))
print(json.dumps({**done, "held": held, "peak": peak_memory_bytes()}))
"""


def test_memory_stays_within_what_was_given(tmp_path: Path) -> None:
    """A model of 150 MB in fp32, run with 75 MB beside what the process had before."""
    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in transformers.LlamaForCausalLM(config).named_parameters()}
    model = save_sparse(tmp_path / "model", shapes, dtype="F32", config=config.to_dict())
    data = models.save_rows(tmp_path / "data.jsonl", models.token_rows(8))
    weights_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    more = 75_000_000
    assert weights_bytes > 1.9 * more
    small = models.llama(tmp_path / "small")
    command = [sys.executable, "-c", PROGRAM, str(model), str(data), str(tmp_path / "out"), str(more), str(small)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    done = json.loads(ran.stdout.splitlines()[-1])
    assert done["mode"] == "layers"
    assert done["peak"] - done["held"] < more
