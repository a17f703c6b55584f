"""Logits against transformers' own classes, in both directions, float32 to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.specs import FOLDED, HELD, network, tokens
from varprop import hf
from varprop.nn import Transformer
from varprop.spec import ModelSpec

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")
ROUNDING = 2e-5
"""Of logits of size 1 to 7 in float32, over three layers."""


@torch.no_grad()
def largest_difference(ours: Transformer, theirs: Any) -> float:
    """Between the logits, over their standard deviation."""
    ids = tokens(ours.spec)
    logits = ours(ids)
    return ((logits - theirs(ids).logits).abs().max() / logits.std()).item()


def loaded(folder: Path) -> Any:
    """The model as transformers reads it, every tensor of it found in the folder and every one there used."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", [*HELD, *FOLDED])
def test_an_exported_model_has_our_logits(name: str, tmp_path: Path) -> None:
    model = network({**HELD, **FOLDED}[name])
    done = hf.export(model, tmp_path / "out")
    assert done.model_type == name.split()[0]
    assert bool(done.folded) == (name in FOLDED)
    assert largest_difference(model, loaded(tmp_path / "out")) < ROUNDING
    again = hf.load(tmp_path / "out")
    assert again.spec == hf.plain_spec(model.spec).with_fields(init=again.spec.init)
    ids = tokens(model.spec)
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=ROUNDING * 10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_a_model_of_theirs_has_its_logits_here(name: str, fused: bool, tmp_path: Path) -> None:
    """fused: experts as transformers holds them in memory, not in the layout on disk of every version."""
    spec: ModelSpec = HELD[name]
    if fused and spec.moe is None:
        pytest.skip("no experts")
    if fused and transformers.__version__ < "5":
        pytest.skip("transformers 4 holds experts one by one")
    if name == "qwen2_moe unshared":
        pytest.skip("transformers makes no such model by itself")
    config = transformers.AutoConfig.for_model(**hf.config_of(spec))
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # at initialisation logits are small, gains one and biases zero
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    theirs.save_pretrained(tmp_path, save_original_format=not fused)
    names = json.dumps(list(hf.weights.Reader(tmp_path).where))
    assert ("gate_up_proj" in names) == fused
    ours = hf.load(tmp_path)
    assert ours.spec == spec.with_fields(init=ours.spec.init)
    assert largest_difference(ours, theirs) < ROUNDING


def test_lower_precision_on_disk(tmp_path: Path) -> None:
    model = network(HELD["mixtral"])
    hf.export(model, tmp_path / "out", dtype="bfloat16")
    ids = tokens(model.spec)
    exact, rounded = model(ids), hf.load(tmp_path / "out")(ids)
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.1  # weights of eight bits; a different expert now and then


def test_shards_hold_the_same(tmp_path: Path) -> None:
    model = network(HELD["qwen2_moe pattern"])
    hf.export(model, tmp_path / "whole")
    hf.export(model, tmp_path / "parts", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    first, second = (hf.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert largest_difference(model, loaded(tmp_path / "parts")) < ROUNDING
