"""Opening checkpoints: what comes out is the model that was written, and everything else is one line."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varprop import hf, presets
from varprop.diagnose import mask_token_of, measure, open_model, require_length, vocab_size_of
from varprop.diagnose.open import quiet
from varprop.diagnose.text import masked
from varprop.errors import ArgumentError
from varprop.nn import Transformer

from . import zoo
from .checkpoints import SPECIAL, change_config, save_model

IDS = torch.arange(12).reshape(2, 6) * 7


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@zoo.each_family(*zoo.FAMILIES, "headless")
def test_a_folder_gives_the_model_that_was_written(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = save_model(tmp_path, family)
    capfd.readouterr()
    model, tokens = open_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert type(model) is type(written)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], written(IDS)[0])
    found = model.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert vocab_size_of(model) == 260
    assert tokens is not None
    assert tokens[1] == hf.SpecialTokens(*SPECIAL.values())
    assert mask_token_of(model, tokens) == (SPECIAL["mask"] if family in zoo.MASKED else None)


def test_weights_in_several_files_and_another_type(tmp_path: Path) -> None:
    written = save_model(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = open_model(tmp_path, device="cpu", dtype="bfloat16")
    found = dict(model.named_parameters())
    for name, parameter in written.named_parameters():
        assert torch.equal(found[name], parameter.to(torch.bfloat16)), name


def test_a_run_of_ours(tmp_path: Path) -> None:
    own = Transformer(presets.tiny(), seed=3)
    hf.save_run(own, tmp_path / "run")
    model, tokens = open_model(tmp_path / "run", device="cpu")
    assert tokens is None
    assert torch.equal(model(IDS), own(IDS))
    assert open_model(tmp_path / "run", device="cpu", dtype="bfloat16")[0].compute_dtype == torch.bfloat16
    assert vocab_size_of(model) == own.spec.vocab_size
    require_length(model, 10**6)


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        change_tensors(folder, lambda tensors: tensors.pop(name))

    return change


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def one_shard_gone(folder: Path) -> None:
    save_model(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("*.safetensors"))[1].unlink()


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (without(UP), f"tensor='{UP}' is missing; expected a file with all tensors"),
        (without("lm_head.weight"), "tensor='lm_head.weight' is missing"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({"extra": torch.ones(2)})),
            "tensor='extra' is unknown to a model of this config.json; expected its own",
        ),
        (lambda folder: change_config(folder, num_hidden_layers=2), "tensor='model.layers.2.* is unknown"),
        (lambda folder: change_config(folder, num_hidden_layers=4), "tensor='model.layers.3.* is missing"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({UP: torch.ones(2)})),
            rf"tensor='{UP}' is of shape \(2,\); expected \(48, 32\)",
        ),
        (pickled, "a folder of pickled weights, which are never read; expected safetensors files"),
        (lambda folder: (folder / "model.safetensors").unlink(), "a folder without model.safetensors"),
        (cut, "model.safetensors' is missing or damaged"),
        (one_shard_gone, "is damaged or not as transformers"),
        (
            lambda folder: change_config(folder, auto_map={"AutoModel": "modeling.Mine"}),
            "auto_map=.* is remote code, which is never run",
        ),
        (lambda folder: change_config(folder, quantization_config={"bits": 4}), "is quantised"),
        (
            lambda folder: change_config(folder, architectures=["NewForCausalLM"]),
            "architecture='NewForCausalLM' is unknown to transformers",
        ),
        (
            lambda folder: change_config(folder, architectures=["MistralForCausalLM"]),
            "architecture='MistralForCausalLM' is unknown to transformers .* as a 'llama'",
        ),
        (
            lambda folder: change_config(folder, architectures=["LlamaForSequenceClassification"]),
            "is without logits of tokens; expected a causal or masked language model",
        ),
        (lambda folder: change_config(folder, architectures=None), "architectures=None is no name of a class"),
        (
            lambda folder: change_config(folder, is_encoder_decoder=True),
            "is of an encoder and a decoder: without one chain of layers",
        ),
        (lambda folder: change_config(folder, hidden_size="wide"), "is damaged or not as transformers"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' is missing or broken"),
        (lambda folder: (folder / "config.json").unlink(), "of no varprop run and without config.json beside it"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer=.* is missing or broken"),
    ],
)
def test_bad_folders_are_one_line(
    change: Callable[[Path], None], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path)
    change(tmp_path)
    capfd.readouterr()
    with pytest.raises(ArgumentError, match=message) as caught:
        open_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Mine", "AutoConfig": "modeling.Config"})
    with pytest.raises(ArgumentError, match="remote code"):
        open_model(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_pooler_may_be_missing_or_superfluous(tmp_path: Path) -> None:
    """It reads the first token after the last layer: no score sees it."""
    save_model(tmp_path, "headless")
    assert not any("pooler" in name for name in load_file(tmp_path / "model.safetensors"))
    open_model(tmp_path, device="cpu")
    save_model(tmp_path, "bert")
    change_tensors(tmp_path, lambda t: t.update({"cls.seq_relationship.weight": torch.ones(2, 32)}))
    open_model(tmp_path, device="cpu")
    without("bert.encoder.layer.1.output.dense.weight")(tmp_path)
    with pytest.raises(ArgumentError, match=r"tensor='bert.encoder.layer.1.output.dense.weight' is missing"):
        open_model(tmp_path, device="cpu")


def test_other_arguments(tmp_path: Path) -> None:
    for arguments, message in (
        ({"path": tmp_path / "none"}, "none' is no folder; expected config.json"),
        ({"path": tmp_path, "dtype": "int8"}, "dtype='int8' is unknown"),
        ({"path": tmp_path, "device": "abacus"}, "device='abacus' is not available"),
        ({"path": tmp_path, "device": "cpu"}, "without config.json or model.safetensors"),
    ):
        with pytest.raises(ArgumentError, match=message):
            open_model(**arguments)  # type: ignore[arg-type]


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    hf.save_run(Transformer(presets.tiny()), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"package='transformers' is missing.*pip install 'varprop\[hf\]'"):
        open_model(tmp_path, device="cpu")
    open_model(tmp_path / "run", device="cpu")
    with quiet():
        pass


def test_lengths_and_mask_tokens_that_are_not_there(tmp_path: Path) -> None:
    save_model(tmp_path, "bert")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    model, tokens = open_model(tmp_path, device="cpu")
    require_length(model, 64)
    with pytest.raises(ArgumentError, match="length=65 is beyond the model's positions; expected at most 64"):
        require_length(model, 65)
    with pytest.raises(ArgumentError, match="mask_token=None is missing"):
        mask_token_of(model, tokens)
    model.config.mask_token_id = 7
    assert mask_token_of(model, None) == 7


def test_ids_alone_are_no_sequences_for_a_masked_language_model() -> None:
    model, tokens = zoo.make("bert"), zoo.tokens(2, 8)
    line = "sequences='token ids' is without targets of a masked language model; expected a Batch, as .*mask_token_of"
    with pytest.raises(ArgumentError, match=line):
        measure(model, tokens, scores="influence")
    batch = masked(tokens, 7, slice(0, 8), 0)
    assert measure(model, batch, scores="influence").sizes["layer"] == 4
    assert measure(zoo.make("llama"), tokens, scores="influence").sizes["layer"] == 4
