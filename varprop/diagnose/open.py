"""Open a checkpoint: a folder of Hugging Face's form, or a run of ours. No network, no pickle, no remote code."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from varprop import hf
from varprop.errors import ArgumentError, VarpropError, require
from varprop.hf.export import read_config
from varprop.hf.weights import Reader
from varprop.nn import Transformer

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENDINGS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "Model")
"""Of the names of classes that give logits of tokens, or only the stream."""
BESIDE = re.compile(r"(^|\.)(pooler|seq_relationship)\.|(position_ids|rotary_emb\.inv_freq)$")
"""Tensors that may be missing or superfluous: heads on the first token beside the language model, tables."""
Tokens = tuple[Tokenizer, hf.SpecialTokens]


def open_model(path: str | Path, *, device: str = "auto", dtype: Dtype = "float32") -> tuple[nn.Module, Tokens | None]:
    """The model in a folder, for `measure`, and its tokenizer with its special tokens, as `hf.tokenizer_of` gives them.

    path: a folder with config.json and safetensors, read by transformers as the class that its entry `architectures`
    names: a causal or a masked language model, or a model without a head; or the folder of a finished run of ours.
    device: a torch device; "auto" = CUDA where there is one. dtype: of weights and stream; of a run of ours, of
    the stream and the matrix products.

    Raises `ArgumentError`, one line, for code in the folder (`auto_map`), pickled and quantised weights, other classes,
    damaged files, and tensors that are missing, superfluous or of another shape: nothing is initialised at random.
    Checked by: tests/diagnose/test_open.py, models written by transformers and by us.
    """
    require(dtype in DTYPES, ArgumentError, "dtype", dtype, "unknown", "float32 or bfloat16")
    folder, target = Path(path), device_of(device)
    require(folder.is_dir(), ArgumentError, "model", str(path), "no folder", "config.json and safetensors, or a run")
    if (folder / "config.json").is_file():
        model = _of_transformers(folder, DTYPES[dtype])
    else:
        model = hf.load(folder, compute_dtype=None if dtype == "float32" else DTYPES[dtype])
    try:
        return model.to(target).eval(), hf.tokenizer_of(folder)
    except torch.OutOfMemoryError:
        wrong = "too large for the memory of the device"
        raise ArgumentError(f"model={str(path)!r} is {wrong}; expected a smaller model, or bfloat16") from None


def device_of(name: str) -> torch.device:
    """The torch device called `name`, CUDA where there is one for "auto"; `ArgumentError` where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        raise ArgumentError(f"device={name!r} is not available; expected auto, cpu or a CUDA device") from None
    return torch.device(name)


def vocab_size_of(model: nn.Module) -> int:
    """Rows of the embedding.

    >>> from varprop import presets
    >>> vocab_size_of(Transformer(presets.tiny()))
    8192
    """
    if isinstance(model, Transformer):
        return model.spec.vocab_size
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]


def require_length(model: nn.Module, length: int) -> None:
    """`ArgumentError` where sequences of `length` tokens are longer than the positions that config.json states.

    RoBERTa's count from behind the padding id, so that it has fewer than are stated.
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            most = module.num_embeddings - module.padding_idx - 1
    good = not isinstance(most, int) or length <= most
    require(good, ArgumentError, "length", length, "beyond the model's positions", f"at most {most}")


def mask_token_of(model: nn.Module, tokens: Tokens | None) -> int | None:
    """The token that stands for what a masked language model is asked; None for other models.

    Raises `ArgumentError` where neither the tokenizer nor config.json names it.
    """
    if not type(model).__name__.endswith("ForMaskedLM"):
        return None
    found = tokens[1].mask if tokens is not None and tokens[1].mask is not None else None
    if found is None:
        found = getattr(model.config, "mask_token_id", None)
    expected = "tokenizer_config.json with mask_token, or config.json with mask_token_id"
    require(found is not None, ArgumentError, "mask_token", None, "missing", expected)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of transformers, where it is installed."""
    try:
        from transformers.utils import logging as own
    except ImportError:
        yield
        return
    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity(50)
    own.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            yield
    finally:
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        package = repr(error.name or "transformers")
        expected = "an installed transformers, pip install 'varprop[hf]'"
        raise ArgumentError(
            f"package={package} is missing, without which no such model is read; expected {expected}"
        ) from None
    return transformers


def _of_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, on the CPU."""
    config = read_config(folder)
    code, wrong = config.get("auto_map"), "remote code, which is never run"
    require(not code, ArgumentError, "auto_map", code, wrong, "a model without code of its own")
    quantised = config.get("quantization_config") is not None
    require(not quantised, ArgumentError, "model", str(folder), "quantised", "float32, bfloat16 or float16 weights")
    kind = _class_of(config)
    Reader(folder)  # says what is wrong where there are no safetensors
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    with quiet():
        try:
            model, found = kind.from_pretrained(
                str(folder), output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:  # a damaged file or config has many types of exceptions
            if isinstance(error, VarpropError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            wrong = f"damaged or not as transformers {_transformers().__version__} has it"
            raise ArgumentError(f"model={str(folder)!r} is {wrong} ({reason}); expected a whole download") from None
    _require_whole(found)
    return model


def _class_of(config: dict[str, Any]) -> Any:
    """The class that `architectures` names; `ArgumentError` for one that is unknown or gives no logits of tokens."""
    transformers = _transformers()
    names = config.get("architectures")
    good = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    require(good, ArgumentError, "architectures", names, "no name of a class", "one name in config.json")
    name = names[0]  # type: ignore[index]
    expected = "a causal or masked language model, or a model without a head"
    require(name.endswith(ENDINGS), ArgumentError, "architecture", name, "without logits of tokens", expected)
    with quiet():
        kind: Any = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    own = known and getattr(kind.config_class, "model_type", None) == config.get("model_type")  # type: ignore[union-attr]
    wrong = f"unknown to transformers {transformers.__version__} as a {config.get('model_type')!r}"
    require(own, ArgumentError, "architecture", name, wrong, "a model of this version of transformers")
    chained = not config.get("is_encoder_decoder")
    wrong = "of an encoder and a decoder: without one chain of layers"
    require(chained, ArgumentError, "architecture", name, wrong, expected)
    return kind


def _require_whole(found: dict[str, Any]) -> None:
    """`ArgumentError` for the first tensor that transformers found missing, superfluous or of another shape."""
    for name, there, own in sorted(found["mismatched_keys"]):
        require(False, ArgumentError, "tensor", name, f"of shape {tuple(there)}", f"{tuple(own)}, as in config.json")
    for key, wrong, expected in (
        ("missing_keys", "missing", "a file with all tensors of its config.json"),
        ("unexpected_keys", "unknown to a model of this config.json", "its own tensors alone"),
    ):
        names = sorted(name for name in found[key] if not BESIDE.search(name))
        require(not names, ArgumentError, "tensor", next(iter(names), ""), wrong, expected)
