"""Tiny random models of many families of transformers, for tests: three layers, width 32, 96 tokens.

`make(family)` draws the same weights every time, matrices four times larger than the family's initialisation, so that
every layer does something and no two are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varprop.nn import Transformer

from ..reference.specs import SPECS

t = pytest.importorskip("transformers")
t.logging.set_verbosity_error()
t.logging.disable_progress_bar()

VOCABULARY = 96
N_LAYERS = 3
WIDTH = 32
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=N_LAYERS, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DECODER = COMMON | dict(intermediate_size=48, num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=N_LAYERS, n_head=4, bos_token_id=1, eos_token_id=2)
BLOOM = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=N_LAYERS, n_head=4)
DEEPSEEK = DECODER | dict(
    num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
    topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    first_k_dense_replace=1,
)  # fmt: skip
FALCON = BLOOM | dict(num_hidden_layers=N_LAYERS, num_attention_heads=4)
ESM = COMMON | dict(
    intermediate_size=48, position_embedding_type="rotary", token_dropout=True, mask_token_id=3, pad_token_id=95
)

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**DECODER),
    "qwen2": lambda: t.Qwen2Config(**DECODER),
    "qwen3": lambda: t.Qwen3Config(**DECODER, head_dim=8),
    "mistral": lambda: t.MistralConfig(**DECODER, sliding_window=4),
    "olmo2": lambda: t.Olmo2Config(**DECODER),
    "gpt2": lambda: t.GPT2Config(**GPT, n_positions=64),
    "gpt_neox": lambda: t.GPTNeoXConfig(**COMMON, intermediate_size=48),
    "gpt_neox_sequential": lambda: t.GPTNeoXConfig(**COMMON, intermediate_size=48, use_parallel_residual=False),
    "phi": lambda: t.PhiConfig(**DECODER),
    "gemma2": lambda: t.Gemma2Config(**DECODER, head_dim=8, sliding_window=4),
    "gemma3": lambda: t.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4),
    "granite": lambda: t.GraniteConfig(
        **DECODER, residual_multiplier=0.3, logits_scaling=2.0, embedding_multiplier=3.0, attention_multiplier=0.2
    ),
    "olmoe": lambda: t.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: t.MixtralConfig(**DECODER, num_local_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**DECODER, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=8),
    "deepseek_v3": lambda: t.DeepseekV3Config(**DEEPSEEK),
    "gpt_oss": lambda: t.GptOssConfig(
        **DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
    "granite_moe": lambda: t.GraniteMoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "bert": lambda: t.BertConfig(**COMMON, intermediate_size=48),
    "esm": lambda: t.EsmConfig(**ESM),
    "modernbert": lambda: t.ModernBertConfig(**COMMON, intermediate_size=48, local_attention=4),
    "falcon": lambda: t.FalconConfig(**FALCON, parallel_attn=True),
    "falcon_sequential": lambda: t.FalconConfig(**FALCON, parallel_attn=False),
    "bloom": lambda: t.BloomConfig(**BLOOM),
    "cohere": lambda: t.CohereConfig(**DECODER),
    "stablelm": lambda: t.StableLmConfig(**DECODER),
    "opt": lambda: t.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=WIDTH),
    "gptj": lambda: t.GPTJConfig(**GPT, rotary_dim=4, n_positions=64),
}
MASKED = ("bert", "esm", "modernbert")
"""Encoders with a masked-language-model head."""
MIXTURES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granite_moe")
PARALLEL = ("gpt_neox", "phi", "falcon", "cohere", "gptj")
"""Attention and feed-forward read the same stream."""
POST_LN = ("bert",)
"""The norm follows the sum, so that a layer's output is not the stream plus what its branches add."""
REFUSED = ("bloom",)
"""Its layers take a bias whose first axis is sequences times heads, so that variants cannot be stacked."""
FAMILIES = tuple(name for name in CONFIGS if name not in REFUSED)
FEW = ("llama", "gpt2", "gpt_neox", "gemma3", "olmoe", "deepseek_v3", "bert")
"""One of each kind."""


def make(family: str, dtype: torch.dtype = torch.float32, n_layers: int = N_LAYERS, **changes: Any) -> Any:
    """A model of the family, in evaluation mode. changes: of its configuration."""
    config = CONFIGS[family]()
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i % len(config.layer_types)] for i in range(n_layers)]
    for name, value in changes.items():
        setattr(config, name, value)
    kind = t.AutoModelForMaskedLM if family in MASKED else t.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config)
    if dtype == torch.float64 and family in MIXTURES and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return enlarged(model).to(dtype).eval()


def enlarged(model: nn.Module, factor: float = 4.0, seed: int = 0) -> nn.Module:
    """The model with matrices drawn anew, `factor` times larger than they were; norms and biases a little off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            std = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            if parameter.ndim >= 2:
                parameter.copy_(noise * (factor * std or 0.02))
            else:
                parameter.add_(0.1 * noise)
    return model


def make_own(name: str = "base", dtype: torch.dtype = torch.float64) -> Any:
    """One of our own models, by the name of its spec in tests/reference/specs.py."""
    return enlarged(Transformer(SPECS[name], dtype=dtype), 1.5).eval()


def tokens(n_sequences: int = 3, n_tokens: int = 10, seed: int = 0) -> Tensor:
    """Random token ids (S, T), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY - 2, (n_sequences, n_tokens), generator=generator)


def each_family(*names: str) -> Any:
    """A test for each family: of those named, or all."""
    return pytest.mark.parametrize("family", names or FAMILIES)


BRANCHES = {
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "gpt_neox_sequential": ("attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "mixtral": ("self_attn", "mlp"),
    "granite_moe": ("self_attn", "block_sparse_moe"),
    "bert": ("attention.output.dense", "output.dense"),
    "esm": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "falcon_sequential": ("self_attention", "mlp"),
    "gptj": ("attn", "mlp"),
}
"""Modules of a layer whose outputs its attention and feed-forward add, where they are not `self_attn` and `mlp`."""


def layers_of(model: nn.Module) -> Any:
    """The list of the model's layers, found by its name."""
    names = ("layers", "h", "layer")
    return next(m for n, m in model.named_modules() if n.split(".")[-1] in names and isinstance(m, nn.ModuleList))


def branch_modules(family: str, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs attention and the feed-forward part add to the stream."""
    attn, mlp = BRANCHES.get(family, ("self_attn", "mlp"))
    return layer.get_submodule(attn), layer.get_submodule(mlp)


Change = Callable[[Tensor, Tensor], Tensor]
"""(input, output) of a module -> what it gives instead."""


@torch.no_grad()
def logits(model: nn.Module, rows: Tensor, changes: Mapping[nn.Module, Change] | None = None) -> Tensor:
    """Logits of one ordinary pass in which some modules give something else."""

    def hook(change: Change) -> Callable[..., Any]:
        def replaced(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (change(stream, output[0]), *output[1:])
            return change(stream, output)

        return replaced

    hooks = [m.register_forward_hook(hook(change), with_kwargs=True) for m, change in (changes or {}).items()]
    try:
        return model(input_ids=rows, use_cache=False).logits if hasattr(model, "config") else model(rows)
    finally:
        for handle in hooks:
            handle.remove()


def loss_per_sequence(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the targets of each sequence in nats, (B), written as a loop."""
    log_p = logits.double().log_softmax(dim=-1)
    return torch.stack(
        [
            sum((-p[t, y[t]] for t in range(len(y)) if y[t] >= 0), p.new_zeros(()))
            for p, y in zip(log_p, targets, strict=True)
        ]
    )
