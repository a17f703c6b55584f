"""Small models on disk, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from varprop.diagnose.open import quiet

SIZES = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**DECODER)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(vocab_size=260, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    ),
    "mixtral": (transformers.MixtralForCausalLM, lambda: transformers.MixtralConfig(**DECODER, num_local_experts=4)),
    "bert": (transformers.BertForMaskedLM, lambda: transformers.BertConfig(**ENCODER)),
    "headless": (transformers.BertModel, lambda: transformers.BertConfig(**ENCODER)),
}
SPECIAL = {"begin": 256, "end": 257, "pad": 258, "mask": 259}


def save_tokenizer(folder: Path, *, begins: bool) -> Tokenizer:
    """Byte by byte, and four special tokens; begins: a text is put between the first two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([f"<{name}>" for name in SPECIAL])
    if begins:
        added = [("<begin>", SPECIAL["begin"]), ("<end>", SPECIAL["end"])]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<begin> $A <end>", special_tokens=added
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer


def save_model(folder: Path, family: str = "llama", *, begins: bool = False, **options: object) -> torch.nn.Module:
    """A random model of a family in a new folder, with a tokenizer; options: of `save_pretrained`."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    with quiet():
        model = kind(config()).eval()
        model.save_pretrained(folder, **options)
    save_tokenizer(folder, begins=begins)
    return model


def change_config(folder: Path, **fields: object) -> None:
    """Set entries of the config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
