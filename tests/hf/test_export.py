"""Folders: what is written and read, the tokenizer, and every bad folder in one line with nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.hf.specs import BASE, FOLDED, HELD, network, tokens
from varprop import hf
from varprop.errors import ArgumentError, SpecError
from varprop.train import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf.export(network(HELD["mixtral"]), tmp_path / "model").path


def test_a_run_directory_is_exported_and_read_back(tmp_path: Path) -> None:
    """Seed and masks are those of the run; `train.load_model` reads what `save_run` writes."""
    model = network(FOLDED["llama masked"], seed=4)
    hf.save_run(model, tmp_path / "run", seed=4)
    for again in (hf.load(tmp_path / "run"), load_model(tmp_path / "run")):
        assert again.spec == model.spec
        own, read = model.state_dict(), again.state_dict()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[name], read[name]) for name in own)
    done = hf.export(tmp_path / "run", tmp_path / "out")
    assert set(done.folded) == {f"masks.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    zeros = (load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"] == 0).float()
    assert 0.4 < zeros.mean() < 0.6
    with pytest.raises(ArgumentError, match="there already"):
        hf.save_run(model, tmp_path / "run")


def test_the_tokenizer_of_the_package(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")
    model = network(BASE.with_fields(vocab_size=8200))
    hf.export(model, tmp_path / "out", tokenizer=hf.load_tokenizer(), max_positions=256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "It is a truth universally acknowledged,\n\nthat 1,234 men's wives aren't naïve."
    ids = hf.load_tokenizer().encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.model_max_length == 256
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (0, 256)
    own = hf.load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert own.encode(text).ids == ids


@pytest.mark.parametrize("names", [{"vocab_size": 100}, {"placement": "post", "vocab_size": 9000}])
def test_nothing_is_written_for_a_bad_model(names: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((ArgumentError, SpecError), match=r"vocab_size=100 is too small|norm\.placement='post' is held"):
        hf.export(network(BASE.with_fields(names)), tmp_path / "out", tokenizer=hf.load_tokenizer())
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be(tmp_path: Path, folder: Path) -> None:
    model = network(BASE)
    with pytest.raises(ArgumentError, match=r"out=.* is there already; expected a new or an empty folder"):
        hf.export(model, folder)
    with pytest.raises(ArgumentError, match=r"output=.* cannot be written"):
        hf.export(model, tmp_path / "missing" / "out")
    with pytest.raises(ArgumentError, match="dtype='int8' is unknown"):
        hf.export(model, tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(hf.weights, "save_file", full)
    with pytest.raises(ArgumentError, match="No space left on device"):
        hf.export(network(BASE), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _change(folder: Path, change: Any) -> None:
    """Rewrite the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match="is a folder of pickled weights, which are never read"):
        hf.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ArgumentError, match=r"is a folder without model\.safetensors"):
        hf.load(folder)


def test_remote_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "model.Model"}}))
    with pytest.raises(SpecError, match=r"auto_map=.* is remote code"):
        hf.load(folder)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor='model\.norm\.weight' is missing"),
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"), r"experts\.3\.w2\.weight' is missing"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(1)}), r"tensor='model\.layers\.9\.x' is unknown to a mix"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"final_norm\.gain=\(3,\) is another shape"),
    ],
)
def test_wrong_tensors(change: Any, message: str, folder: Path) -> None:
    _change(folder, change)
    with pytest.raises(ArgumentError, match=message):
        hf.load(folder)


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ArgumentError, match="is missing or damaged"):
        hf.load(folder)
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ("{", "is damaged; expected a weight_map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', r"weight_map='\.\./other\.safetensors' is no file of the"),
        ('{"weight_map": {"a": "a.bin"}}', r"weight_map='a\.bin' is no file of the folder"),
    ):
        index.write_text(text)
        with pytest.raises(ArgumentError, match=message):
            hf.load(folder)
    index.write_text("[" * 100_000)
    with pytest.raises(ArgumentError, match="is damaged; expected a weight_map"):
        hf.load(folder)
    for text in ("[1", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(ArgumentError, match=r"config\.json' is missing or broken"):
            hf.load(folder)
    with pytest.raises(ArgumentError, match=r"is a folder without config\.json or model\.safetensors"):
        hf.load(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(whole)  # no spec in its metadata
    with pytest.raises(
        ArgumentError, match=r"is truncated or damaged, or of no varprop run and without config\.json beside it"
    ):
        hf.load(tmp_path / "run")
    with pytest.raises(ArgumentError, match=r"tokenizer=.* is missing or broken"):
        hf.load_tokenizer(folder / "config.json")


def test_a_rotary_buffer_of_old_files_is_no_fault(folder: Path) -> None:
    """Files of early versions hold inv_freq, and the table twice where it is tied."""
    _change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    model = network(HELD["mixtral"])
    ids = tokens(model.spec)
    torch.testing.assert_close(hf.load(folder)(ids), model(ids))


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with a tokenizer whose first id is no special token."""
    rules = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 4}, unk_token="?"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    rules.add_special_tokens(["<s>", "</s>"])
    rules.enable_truncation(3)
    (tmp_path / "words").mkdir()
    rules.save(str(tmp_path / "words" / "tokenizer.json"))
    return tmp_path / "words"


@pytest.mark.parametrize(
    "config,ids,first",
    [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}, (3, 4, 4), 3),
        ({"bos_token": None, "eos_token": "</s>", "pad_token": "?"}, (None, 4, 0), 4),
        ({"eos_token": "<|endoftext|>"}, (None, None, None), None),
        ({}, (None, None, None), None),
    ],
)
def test_special_tokens_of_a_model(config: dict, ids: tuple, first: int | None, words: Path) -> None:
    (words / "tokenizer_config.json").write_text(json.dumps(config))
    found = hf.tokenizer_of(words)
    assert found is not None
    assert found[1] == hf.SpecialTokens(*ids)
    assert found[1].first == first
    assert found[0].encode("a b a b a").ids == [1, 2, 1, 2, 1]  # not cut
    (words / "special_tokens_map.json").write_text('{"bos_token": "a", "eos_token": "b"}')
    mapped = hf.tokenizer_of(words)
    assert mapped is not None
    assert mapped[1].end == (ids[1] if "eos_token" in config else 2)


def test_special_tokens_of_a_run(words: Path) -> None:
    (words / "run.json").write_text('{"corpus": {"document_end": 4}}')
    found = hf.tokenizer_of(words)
    assert found is not None
    assert found[1] == hf.SpecialTokens(4, 4, 4)
    for text, message in (("{}", "is without the document_end of its corpus"), ("{", "is missing or broken")):
        (words / "run.json").write_text(text)
        with pytest.raises(ArgumentError, match=message):
            hf.tokenizer_of(words)
    (words / "tokenizer.json").unlink()
    assert hf.tokenizer_of(words) is None


def test_the_tokenizer_of_a_run_is_exported(words: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")
    (words / "run.json").write_text('{"corpus": {"document_end": 4}}')
    for source in (words, tmp_path / "out0"):  # an exported folder again, too
        found = hf.tokenizer_of(source)
        assert found is not None
        assert found[1] == hf.SpecialTokens(4, 4, 4)
        out = tmp_path / f"out{int(source != words)}"
        hf.export(network(BASE), out, tokenizer=found[0], special_tokens=found[1])
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (4, 4, 4)
        assert tokenizer("a b a b a")["input_ids"] == [1, 2, 1, 2, 1]
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == 4


def test_every_id_of_the_tokenizer_has_a_row(words: Path) -> None:
    rules = hf.load_tokenizer(words / "tokenizer.json")
    hf.require_fit(rules, 5)
    with pytest.raises(ArgumentError, match="vocab_size=4 is too small for a tokenizer of 5 entries"):
        hf.require_fit(rules, 4)
