"""Adapters in the hands of the libraries they are made for: transformers and peft load what was merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.merging import merge
from tests.support.adapters import Layout, linears, make_adapters, save_adapter, updates_of
from tests.support.families import Family, load_folder

transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")
peft = pytest.importorskip("peft", reason="the test extra brings peft")

# peft asks transformers by a name that transformers is giving up: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(1, 41).reshape(2, 20)
# Two orders of the same float32 products: 20 tokens through 2 layers of width 32 part by a few units in the last place
# of logits of about 1, and an update of 0.02 that were lost or doubled parts them by 1e-2.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def llama() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def gpt2() -> torch.nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def t5(layers: int = 2) -> torch.nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": layers, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """An architecture and what is adapted in it."""

    build: Callable[[], torch.nn.Module]
    ends: tuple[tuple[str, ...], ...]
    fan_in_fan_out: bool = False
    forward: dict[str, torch.Tensor]


KINDS = {
    "llama": Kind(
        build=llama,
        ends=(("q_proj", "v_proj"), ("q_proj", "o_proj", "down_proj"), ("v_proj", "gate_proj")),
        forward={"input_ids": TOKENS},
    ),
    "gpt2": Kind(
        build=gpt2,
        ends=(("attn.c_attn",), ("attn.c_attn", "attn.c_proj", "mlp.c_fc"), ("mlp.c_proj", "attn.c_attn")),
        fan_in_fan_out=True,
        forward={"input_ids": TOKENS},
    ),
    "t5": Kind(
        build=t5,
        ends=(("Attention.q", "Attention.v"), ("SelfAttention.q", "wi"), ("EncDecAttention.v", "Attention.o")),
        forward={"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(0)},
    ),
}  # fmt: skip


def save_base(folder: Path, build: Callable[[], torch.nn.Module]) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


def layouts(kind: Kind, names: dict[str, torch.Tensor]) -> list[Layout]:
    """Four adapters of different ranks, scales and modules."""
    first, second, third = (linears(names, *ends) for ends in kind.ends)
    shared = {"fan_in_fan_out": kind.fan_in_fan_out, "size": 0.02}
    some = second[0].rpartition(".")[2]
    return [
        Layout(modules=first, rank=4, alpha=8, **shared),
        Layout(modules=second, rank=3, alpha=5, rank_pattern={some: 6}, alpha_pattern={second[-1]: 9}, **shared),
        Layout(modules=third, rank=8, alpha=4, rslora=True, order="shuffled", **shared),
        Layout(modules=first, rank=2, alpha=2, order="reversed", dtype=torch.bfloat16, **shared),
    ]


@pytest.fixture(scope="module", params=KINDS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Family]:
    kind = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "base", kind.build)
    return kind, make_adapters(root, base, layouts(kind, load_folder(base)))


def load_model(folder: Path) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def logits(model: torch.nn.Module, kind: Kind) -> torch.Tensor:
    with torch.no_grad():
        return model(**kind.forward).logits


def logits_of(values: dict[str, torch.Tensor], kind: Kind, base: Path) -> torch.Tensor:
    """Logits of dense weights, by the names of the file."""
    model = load_model(base)
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in values.items()}, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "embed_tokens" in name for name in missing), "tied copies alone are not stored"
    return logits(model, kind)


def coefficients_of(report: dict) -> list[float]:
    return next(group["coefficients"] for group in report["groups"] if group["name"] == "model")


def combined(family: Family, coefficients: list[float], names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Σ c·(base + ΔW) in float64."""
    return {
        name: sum(c * values[name] for c, values in zip(coefficients, family.values, strict=True))
        for name in names or family.values[0]
    }


def touched(family: Family) -> list[str]:
    """The tensors that any adapter changes."""
    base = family.base_values
    return [name for name in base if any(not torch.equal(v[name], base[name].double()) for v in family.values)]


def test_peft_understands_our_adapters_as_we_do(adapted: tuple[Kind, Family]) -> None:
    """The oracle itself: peft merges every folder into what the dense values say."""
    kind, family = adapted
    for folder, values in zip(family.models, family.values, strict=True):
        model = peft.PeftModel.from_pretrained(load_model(family.base), folder).merge_and_unload()
        state = model.state_dict()
        for name, value in values.items():
            torch.testing.assert_close(state[name], value.float(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(logits(model, kind), logits_of(values, kind, family.base), **CLOSE)
        changed = (logits(model, kind) - logits(load_model(family.base), kind)).abs().max()
        assert changed > 1e-3, "an adapter that does nothing proves nothing"


def test_transformers_loads_the_merged_model(adapted: tuple[Kind, Family], tmp_path: Path) -> None:
    kind, family = adapted
    report = merge(str(family.recipe()), str(tmp_path / "out"))
    wanted = combined(family, coefficients_of(report))
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out"), kind), logits_of(wanted, kind, family.base), **CLOSE
    )
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_peft_loads_the_merged_adapter(adapted: tuple[Kind, Family], tmp_path: Path) -> None:
    kind, family = adapted
    out = tmp_path / "out"
    report = merge(str(family.recipe(pipeline={"output": "adapter"}, name="adapter.yaml")), str(out))
    wanted = combined(family, coefficients_of(report))
    model = peft.PeftModel.from_pretrained(load_model(family.base), out)
    torch.testing.assert_close(logits(model, kind), logits_of(wanted, kind, family.base), **CLOSE)
    assert not list(out.glob("model*.safetensors"))
    assert set(updates_of(out)) == {name.removesuffix(".weight") for name in touched(family)}
    # Once more after peft has written it: nothing of it is known only to us.
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(load_model(family.base), tmp_path / "again")
    torch.testing.assert_close(logits(again, kind), logits(model, kind), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 5])
def test_a_rank_is_the_svd_truncation(adapted: tuple[Kind, Family], tmp_path: Path, rank: int) -> None:
    kind, family = adapted
    out = tmp_path / "out"
    recipe = family.recipe(pipeline={"output": "adapter", "rank": rank}, out_dtype="float32", name="rank.yaml")
    report = merge(str(recipe), str(out))
    wanted = combined(family, coefficients_of(report))
    stated = {entry["tensor"]: entry for entry in report["modules"]}
    found = updates_of(out)
    assert set(stated) == {f"{module}.weight" for module in found}
    for name in touched(family):
        module = name.removesuffix(".weight")
        update = (wanted[name] - family.base_values[name].double()).numpy()
        update = update.T if kind.fan_in_fan_out else update
        left, values, right = np.linalg.svd(update, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        # Both factors are rounded to float32 once: 2^-24 of each, some ranks of them.
        np.testing.assert_allclose(found[module], best, rtol=0, atol=4e-7 * values[0])
        energy = (values[rank:] ** 2).sum() / (values**2).sum()
        # No more than there is: an update of three columns has rank 3.
        assert stated[name]["rank"] == min(rank, int((values > 1e-9 * values[0]).sum()))
        assert stated[name]["discarded_energy"] == pytest.approx(energy, rel=1e-8, abs=1e-14)
        wanted[name] = family.base_values[name].double() + torch.from_numpy(best.T if kind.fan_in_fan_out else best)
    model = peft.PeftModel.from_pretrained(load_model(family.base), out)
    torch.testing.assert_close(logits(model, kind), logits_of(wanted, kind, family.base), **CLOSE)


def test_the_full_rank_discards_nothing(adapted: tuple[Kind, Family], tmp_path: Path) -> None:
    kind, family = adapted
    report = merge(
        str(family.recipe(pipeline={"output": "adapter", "rank": 400}, name="full.yaml")), str(tmp_path / "out")
    )
    assert all(entry["discarded_energy"] < 1e-14 for entry in report["modules"])
    wanted = combined(family, coefficients_of(report))
    model = peft.PeftModel.from_pretrained(load_model(family.base), tmp_path / "out")
    torch.testing.assert_close(logits(model, kind), logits_of(wanted, kind, family.base), **CLOSE)


# --- the layout of the paper: 24 encoder and 24 decoder blocks, q and v of every attention ------------------------

EXPERTS, STEP = 5, 1 / 64


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("t5") / "base", lambda: t5(24))


def numbered_family(root: Path, base: Path, order: str) -> tuple[Family, list[str]]:
    """Adapters whose every update is near (the module's index + 1)·STEP in each element."""
    values = load_folder(base)
    names = sorted(values, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])
    modules = linears(names, "Attention.q", "Attention.v")
    family = Family(root=root, base=base, base_values=values)
    for expert in range(EXPERTS):
        layout = Layout(modules=modules, rank=2, alpha=4, order=order)
        generator = torch.Generator().manual_seed(expert)
        factors = {}
        for index, module in enumerate(modules):
            right = torch.cat([torch.ones(1, 32), 0.1 * torch.randn(1, 32, generator=generator)])
            left = torch.cat([torch.ones(32, 1), 0.1 * torch.randn(32, 1, generator=generator)], dim=1)
            factors[module] = {"A": right, "B": left * (index + 1) * STEP / layout.scale_of(module)}
        folder = root / f"numbered{expert}"
        family.values.append(save_adapter(folder, values, layout, factors, base_path=base, seed=expert))
        family.models.append(folder)
    return family, list(modules)


@pytest.mark.parametrize("order", ["stored", "sorted"])
@pytest.mark.parametrize("output", ["model", "adapter"])
def test_144_of_144_updates_land_on_their_module(large: Path, tmp_path: Path, output: str, order: str) -> None:
    family, modules = numbered_family(tmp_path, large, order)
    assert len(modules) == 144
    recipe = family.recipe(pipeline={"scope": "tensor", "output": output}, out_dtype="float32")
    report = merge(str(recipe), str(tmp_path / "out"))
    if output == "adapter":
        updates = updates_of(tmp_path / "out")
        assert set(updates) == set(modules)
    else:
        merged = load_folder(tmp_path / "out")
        updates = {m: (merged[f"{m}.weight"] - family.base_values[f"{m}.weight"]).numpy() for m in modules}
        others = set(family.base_values) - {f"{module}.weight" for module in modules}
        assert all(torch.equal(merged[name], family.base_values[name]) for name in others)
    found = [round(float(updates[module].mean()) / STEP) - 1 for module in modules]
    assert found == list(range(144)), "an update landed on another module"
    coefficients = {group["name"]: group["coefficients"] for group in report["groups"]}
    for module in modules:
        name = f"{module}.weight"
        wanted = combined(family, coefficients[name], [name])[name] - family.base_values[name].double()
        # Merged weights are float32 numbers below 4, or products of such factors.
        np.testing.assert_allclose(updates[module], wanted.numpy(), rtol=1e-6, atol=1e-6)
