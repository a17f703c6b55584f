"""`check_run`: whether spec, config and corpus go together, before anything is made."""

from __future__ import annotations

import torch

from varprop.corpus import Corpus, n_windows
from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec
from varprop.train.budget import n_steps
from varprop.train.config import TrainConfig
from varprop.train.distributed import World, require_shardable
from varprop.train.optim import parameter_groups


def check_run(spec: ModelSpec, config: TrainConfig, corpus: Corpus, n_processes: int = 1) -> None:
    """Raise `ArgumentError` for a run that cannot be started on `n_processes` processes; nothing is computed.

    The rules: vocab_size holds the ids of the corpus; `budget.n_steps` and `optim.parameter_groups` accept the config;
    batch_size is a multiple of n_processes, and of what each gets micro_batch_size is a divisor (or more than all of
    it); compile_layers is 1 where `fsdp` splits the model; no recorded kernels with key masks; document_mask has a
    corpus that knows its documents; training and held-out text hold a sequence of n_tokens, and the latter one of
    evaluation_length.

    >>> from varprop import presets
    >>> from varprop.corpus import load_corpus
    >>> check_run(presets.tiny(), TrainConfig(), load_corpus())
    """
    fits = corpus.vocab_size <= spec.vocab_size
    expected = f"a vocab_size of at least {corpus.vocab_size}, that of the corpus {corpus.name}"
    require(fits, ArgumentError, "vocab_size", spec.vocab_size, "too small", expected)
    n_steps(config, spec)
    parameter_groups(spec, config)
    own = len(World(0, n_processes, 0, torch.device("cpu")).share(config.batch_size))
    micro = min(config.micro_batch_size or own, own)
    domain = f"a divisor of the {own} sequences of a process"
    require(own % micro == 0, ArgumentError, "micro_batch_size", config.micro_batch_size, "not a divisor", domain)
    require_shardable(config, n_processes)
    drawn = spec.attention is not None and spec.attention.key_mask_density < 1
    wrong, domain = "given with key_mask_density < 1, whose masks are drawn on the CPU", "false"
    require(not (config.cuda_graph and drawn), ArgumentError, "cuda_graph", True, wrong, domain)
    if config.document_mask:
        known = "a corpus that says what ends a document"
        require(corpus.document_end is not None, ArgumentError, "document_mask", True, "not possible", known)
    n_held_out = len(corpus.validation)
    wrong = f"too long for a held-out text of {n_held_out} tokens"
    for field in ("evaluation_length", "n_tokens"):
        length = getattr(config, field)
        require(length < n_held_out, ArgumentError, field, length, wrong, "a shorter sequence")
    n_windows(corpus.train, config.n_tokens)
