"""Streams and branches of a model's own forward pass, read by hooks on the modules of its family, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varprop.diagnose import Replay
from varprop.results import SITES

MODULES = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "phi": ("self_attn", "mlp"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "granite": ("self_attn", "mlp"),
    "olmoe": ("self_attn", "mlp"),
    "deepseek_v3": ("self_attn", "mlp"),
    "bert": ("attention.output.dense", "output.dense"),
}
"""Family -> the modules of a layer whose outputs are what attention and feed-forward add."""
SCALES = {"granite": 0.3}
"""Family -> what those outputs are multiplied by."""
Sites = dict[tuple[int, str], np.ndarray]


def observed(family: str, model: nn.Module, tokens: Tensor) -> Sites:
    """(layer, site) -> float64 (S, T, D)."""
    found: Sites = {}

    def keep(layer: int, site: str, scale: float = 1.0) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            found[layer, site] = scale * x.double().numpy().copy()

        return hook

    layers = list(Replay(model).layers)
    handles = []
    for layer, module in enumerate(layers, start=1):
        for site, path in zip(("attn_out", "mlp_out"), MODULES[family], strict=True):
            handles.append(module.get_submodule(path).register_forward_hook(keep(layer, site, SCALES.get(family, 1.0))))
        if family == "bert":
            handles.append(module.get_submodule("attention").register_forward_hook(keep(layer, "resid_mid")))
    handles.append(layers[-1].register_forward_hook(keep(len(layers), "resid_post")))
    with torch.no_grad():
        streams = model(tokens, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(len(layers)):  # the last of them is after the final norm
        found[layer, "resid_post"] = streams[layer].double().numpy()
    for layer in range(1, len(layers) + 1):
        found[layer, "resid_pre"] = found[layer - 1, "resid_post"]
        if family != "bert":
            found[layer, "resid_mid"] = found[layer, "resid_pre"] + found[layer, "attn_out"]
    return {(layer, site): found[layer, site] for layer, site in sorted(found, key=lambda k: (k[0], SITES.index(k[1])))}
