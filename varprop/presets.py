"""Named specs as functions: the paper's models at their true shapes, and the small ladder of our own runs.

`get(name)` takes the name of a function here, with dashes or underscores; `names()` lists them. Shapes of the paper's
models: the released configurations of arXiv 2603.15389 (its feed-forward widths are the real hidden widths, half of the
fused one), embeddings of 50,304 rows, every matrix N(0, 0.02^2), no tying, RoPE base 10,000.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from varprop.errors import ArgumentError
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, ModelSpec, MoESpec, NormSpec

_PRESETS: dict[str, Callable[[], ModelSpec]] = {}


def _preset(function: Callable[[], ModelSpec]) -> Callable[[], ModelSpec]:
    _PRESETS[function.__name__] = function
    return function


def names() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(_PRESETS)


def summary(name: str) -> str:
    """The first line of a preset's docstring."""
    return (_PRESETS[name].__doc__ or "").splitlines()[0]


def get(name: str) -> ModelSpec:
    """The preset called `name` (dashes or underscores); an unknown name raises `ArgumentError` with the nearest one.

    >>> get("paper-dense-1b").parameter_counts()["total"]
    1279854592
    """
    key = name.lower().replace("-", "_")
    if key not in _PRESETS:
        close = difflib.get_close_matches(key, _PRESETS, n=1)
        hint = f"{close[0]!r}?" if close else "one of " + ", ".join(_PRESETS)
        raise ArgumentError(f"preset={name!r} is unknown; expected {hint}")
    return _PRESETS[key]()


def load(text: str) -> ModelSpec:
    """The preset of that name, or the spec in that JSON file; `ArgumentError` or `SpecError`, one line, otherwise."""
    path = Path(text)
    if path.suffix != ".json" and (text.replace("-", "_").lower() in _PRESETS or not os.path.isfile(path)):
        return get(text)  # or says which preset comes nearest
    try:
        return ModelSpec.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ArgumentError(f"spec={text!r} cannot be read ({reason}); expected a JSON file") from None


# The small ladder -----------------------------------------------------------------------------------------------------


def _small(d_model: int, n_layers: int, n_heads: int, d_ff: int, **changes: Any) -> ModelSpec:
    """A Llama-shaped model with fan-in initialisation: stream, blocks and logits start at order one at any width.

    Untied: a tied table of std 1 would start the logits at standard deviation sqrt(d_model).
    """
    spec = ModelSpec(
        d_model=d_model,
        n_layers=n_layers,
        tied_embeddings=False,
        attention=AttentionSpec(n_heads=n_heads),
        feed_forward=FeedForwardSpec(d_ff=d_ff),
    )
    return spec.with_fields(changes)


def _experts(n_experts: int, top_k: int, d_expert: int) -> dict[str, Any]:
    moe = MoESpec(n_experts=n_experts, top_k=top_k, d_expert=d_expert, normalize_gates=True)
    return {"feed_forward": None, "moe": moe}


@_preset
def tiny() -> ModelSpec:
    """d_model 128, 8 layers, 4 heads: trains in a minute on a CPU; the model of the demo."""
    return _small(128, 8, 4, 384)


@_preset
def tiny_masked() -> ModelSpec:
    """`tiny` with a Bernoulli mask of density 1/4 on every matrix of a block."""
    return tiny().with_fields(density=0.25)


@_preset
def tiny_gqa() -> ModelSpec:
    """`tiny` with one key/value head for its 4 query heads."""
    return tiny().with_fields(n_kv_heads=1)


@_preset
def tiny_moe() -> ModelSpec:
    """`tiny` with 8 experts of half the width, 2 active, gates normalised."""
    return tiny().with_fields(_experts(8, 2, 192))


@_preset
def d256() -> ModelSpec:
    """d_model 256, 12 layers, 2 heads of 128."""
    return _small(256, 12, 2, 768)


@_preset
def d256_deep() -> ModelSpec:
    """d_model 256, 32 layers, 2 heads of 128."""
    return _small(256, 32, 2, 768)


@_preset
def d256_moe() -> ModelSpec:
    """`d256` with 8 experts of half the width, 2 active, gates normalised."""
    return d256().with_fields(_experts(8, 2, 384))


@_preset
def d512() -> ModelSpec:
    """d_model 512, 12 layers, 4 heads of 128."""
    return _small(512, 12, 4, 1536)


@_preset
def d512_deep() -> ModelSpec:
    """d_model 512, 32 layers, 4 heads of 128."""
    return _small(512, 32, 4, 1536)


@_preset
def d512_moe() -> ModelSpec:
    """`d512` with 8 experts of half the width, 2 active, gates normalised."""
    return d512().with_fields(_experts(8, 2, 768))


@_preset
def d512_mha() -> ModelSpec:
    """d_model 512, 12 layers, 16 heads of 32, each with its own keys and values: group size 1."""
    return _small(512, 12, 16, 1536)


@_preset
def d512_gqa4() -> ModelSpec:
    """`d512_mha` with 4 key/value heads: group size 4."""
    return d512_mha().with_fields(n_kv_heads=4)


@_preset
def d512_gqa16() -> ModelSpec:
    """`d512_mha` with 1 key/value head: group size 16."""
    return d512_mha().with_fields(n_kv_heads=1)


# The paper's models ---------------------------------------------------------------------------------------------------


def _paper(d_model: int, n_heads: int, n_layers: int = 16, *, eps: float = 1e-5, **parts: Any) -> ModelSpec:
    return ModelSpec(
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=50_304,
        tied_embeddings=False,
        attention=AttentionSpec(n_heads=n_heads),
        norm=NormSpec(eps=eps),
        init=InitSpec(rule="fixed", std=0.02),
        **parts,
    )


@_preset
def paper_dense_1b() -> ModelSpec:
    """The paper's dense 1B model: d_model 2048, 16 layers, 16 heads, d_ff 8192."""
    return _paper(2048, 16, eps=1e-6, feed_forward=FeedForwardSpec(d_ff=8192))


@_preset
def paper_dense_1b_l12() -> ModelSpec:
    """The dense 1B model with 12 layers."""
    return paper_dense_1b().with_fields(n_layers=12)


@_preset
def paper_dense_1b_l24() -> ModelSpec:
    """The dense 1B model with 24 layers."""
    return paper_dense_1b().with_fields(n_layers=24)


@_preset
def paper_dense_1b_l32() -> ModelSpec:
    """The dense 1B model with 32 layers."""
    return paper_dense_1b().with_fields(n_layers=32)


@_preset
def paper_dense_1b_g4() -> ModelSpec:
    """The dense 1B model with 4 key/value heads: group size 4."""
    return paper_dense_1b().with_fields(n_kv_heads=4)


@_preset
def paper_dense_1b_g16() -> ModelSpec:
    """The dense 1B model with 1 key/value head: group size 16."""
    return paper_dense_1b().with_fields(n_kv_heads=1)


@_preset
def paper_dense_400m() -> ModelSpec:
    """The paper's dense 400M model: d_model 1536, 16 layers, 12 heads, d_ff 2304."""
    return _paper(1536, 12, feed_forward=FeedForwardSpec(d_ff=2304))


@_preset
def paper_moe_7b_1b() -> ModelSpec:
    """The paper's "7B/1B" mixture as released (13.4 B in all, 2.1 B active): 64 experts of 2048, 8 active."""
    return _paper(2048, 16, moe=MoESpec(n_experts=64, top_k=8, d_expert=2048))


@_preset
def paper_moe_2b_400m() -> ModelSpec:
    """The paper's "2B/400M" mixture: d_model 768, 32 experts of 1536, 4 active, one shared expert in the mean."""
    moe = MoESpec(n_experts=32, top_k=4, d_expert=1536, n_shared_experts=1, shared_mixing="mean")
    return _paper(768, 12, moe=moe)


@_preset
def paper_moe_l32() -> ModelSpec:
    """The paper's 32-layer ablation mixture: d_model 1120, 16 heads of 70, 64 experts of 1120, 8 active."""
    return _paper(1120, 16, n_layers=32, moe=MoESpec(n_experts=64, top_k=8, d_expert=1120))


@_preset
def paper_dense_l32() -> ModelSpec:
    """The dense counterpart of `paper_moe_l32`, inferred from "1.2B": its shape, d_ff 8960 as of 8 active experts."""
    return _paper(1120, 16, n_layers=32, feed_forward=FeedForwardSpec(d_ff=8 * 1120))
