"""`export` a network as a folder that Hugging Face's programs read; `load` such a folder, or a run of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from varprop.errors import ArgumentError, require
from varprop.files import replacing, replacing_folder
from varprop.hf import tokenizer as tokenizers_
from varprop.hf import weights
from varprop.hf.config import MAX_POSITIONS, config_of, family_of, spec_of
from varprop.hf.families import FAMILIES
from varprop.hf.fold import folded_fields, plain_spec, plain_weights
from varprop.hf.tokenizer import SpecialTokens
from varprop.nn import Transformer
from varprop.spec import ModelSpec

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUN_FORMAT = 1
"""Of the metadata of the final weights of a run."""


@dataclass(frozen=True)
class Exported:
    """An exported folder: its family and the fields of the spec that were folded into the weights."""

    path: Path
    model_type: str
    folded: tuple[str, ...]


def export(
    model: Transformer | str | Path,
    out: str | Path,
    *,
    dtype: Dtype = "float32",
    tokenizer: Tokenizer | None = None,
    special_tokens: SpecialTokens | None = None,
    max_positions: int = MAX_POSITIONS,
    shard_bytes: int = weights.SHARD_BYTES,
) -> Exported:
    """Write config.json, the weights and, where given, the tokenizer into the new folder `out`.

    model: a network or the folder of a finished run. dtype: of the weights on disk; float32 has the logits of the
    network to rounding. tokenizer, special_tokens: those of a run are `tokenizer_of(run)`; a tokenizer alone is taken
    to name them as the package's own does, `<|endoftext|>` and `<|pad|>`. max_positions: where evaluation programs cut
    texts. shard_bytes: the largest file; more are written with an index. Fields that no family has are folded into the
    weights where that is exact (`varprop.hf.fold`), and named in the outcome.
    Raises `SpecError`, naming the field, where no family holds the network, `ArgumentError` where `out` is there and
    not empty, cannot be written, or the tokenizer has more entries than the network; nothing is written then.
    """
    require(dtype in DTYPES, ArgumentError, "dtype", dtype, "unknown", "one of " + ", ".join(DTYPES))
    domain = "an integer >= 1"
    require(max_positions >= 1, ArgumentError, "max_positions", max_positions, "too small", domain)
    network = model if isinstance(model, Transformer) else load_run(model)
    spec = network.spec
    family = family_of(spec)
    config = config_of(spec, max_positions=max_positions) | {"torch_dtype": dtype}
    if tokenizer is not None:
        tokenizers_.require_fit(tokenizer, spec.vocab_size)
    target = Path(out)
    new = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(new, ArgumentError, "out", str(out), "there already", "a new or an empty folder")
    with replacing_folder(target) as folder:
        folder.mkdir()
        if tokenizer is not None:
            config |= tokenizers_.write(folder, tokenizer, special_tokens, max_positions)
        else:
            config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        weights.write(folder, plain_spec(spec), plain_weights(network), family, DTYPES[dtype], shard_bytes)
    return Exported(target, family.model_type, folded_fields(spec))


def load(
    directory: str | Path, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype | None = None
) -> Transformer:
    """The network in a folder of Hugging Face's form (config.json and safetensors), or of a finished run of ours.

    The spec of the former is `spec_of` its config.json. Weights are float32; compute_dtype: of the stream and the
    matrix products, None = float32. Raises `SpecError` for a model that our networks cannot be, `ArgumentError` for a
    folder that is neither, pickled weights, and missing, misshapen or superfluous tensors.
    No code of the folder is run.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        return load_run(folder, device=device, compute_dtype=compute_dtype)
    config = read_config(folder)
    spec = spec_of(config)
    family = next(family for family in FAMILIES if family.model_type == config["model_type"])
    model = Transformer(spec, device=device, compute_dtype=compute_dtype)
    _fill(model, dict(weights.read(folder, spec, family)))
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; `ArgumentError` if it is broken."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        path = str(folder / "config.json")
        raise ArgumentError(f"file={path!r} is missing or broken; expected a JSON object") from None


def load_run(
    run_dir: str | Path, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype | None = None
) -> Transformer:
    """The network of a finished run, or of `save_run`; `ArgumentError` if there is none or it is damaged."""
    path = Path(run_dir) / weights.SINGLE
    wrong, expected = f"a folder without config.json or {weights.SINGLE}", "an exported model or a finished run"
    require(path.is_file(), ArgumentError, "directory", str(run_dir), wrong, expected)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})["varprop"])
            spec, seed = ModelSpec.from_dict(metadata["spec"]), int(metadata["seed"])
            require(seed >= 0, ArgumentError, "seed", seed, "negative", "an integer >= 0")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        wrong = "truncated or damaged, or of no varprop run and without config.json beside it"
        raise ArgumentError(f"file={str(path)!r} is {wrong}; expected {expected}") from None
    model = Transformer(spec, seed=seed, device=device, compute_dtype=compute_dtype)
    _fill(model, tensors)
    return model


def save_run(model: Transformer, run_dir: str | Path, *, seed: int = 0) -> Path:
    """Write a network into a new folder as the final weights of a run, which `load` and `varprop.train` read."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.SINGLE
    require(not path.exists(), ArgumentError, "out", str(path), "there already", "a new folder")
    metadata = {"format": RUN_FORMAT, "spec": model.spec.to_dict(), "seed": seed}
    with replacing(path) as temporary:
        weights.save(temporary, model.state_dict(), {"varprop": json.dumps(metadata, sort_keys=True)})
    return path


def _fill(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Put tensors into a network; `ArgumentError` unless they are those of its spec."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 2)[1:2]).strip()
        raise ArgumentError(f"weights are not those of the spec ({reason}); expected a whole model") from None
