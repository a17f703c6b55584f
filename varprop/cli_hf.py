"""`varprop export`, `varprop import`, `varprop evaluate`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from varprop import corpus, files, results
from varprop.cli_arguments import path
from varprop.errors import ArgumentError, require

TASKS = ("loss", "blimp", "cloze")
Command = Callable[[str, Any, str, str | None], argparse.ArgumentParser]


def add(command: Command) -> None:
    """Add the three commands; `command` takes name, action, text and the default of --out."""
    exporting = command("export", _export, "A finished run as a model folder for Hugging Face's programs.", None)
    exporting.add_argument("run", type=path, metavar="RUN_DIR", help="folder of a finished run, or a model folder")
    exporting.add_argument("--out", type=path, required=True, metavar="FOLDER", help="a new folder")
    exporting.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16 (default %(default)s)")
    exporting.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    longest = "where other programs cut texts (default: the run's n_tokens, or 2048)"
    exporting.add_argument("--max-positions", type=int, default=None, metavar="N", help=longest)

    importing = command("import", _import, "A model folder of Hugging Face's form as the weights of a run.", None)
    importing.add_argument("folder", type=path, metavar="FOLDER", help="config.json and safetensors files")
    importing.add_argument("--out", type=path, required=True, metavar="RUN_DIR", help="a new folder")

    evaluating = command("evaluate", _evaluate, "Held-out loss, BLiMP and cloze of a model.", "evaluation.nc")
    evaluating.add_argument(
        "model", nargs="?", type=path, metavar="RUN_DIR-or-FOLDER", help="a finished run or a model folder"
    )
    evaluating.add_argument("--tasks", default=",".join(TASKS), help="some of %(default)s (default all)")
    evaluating.add_argument(
        "--corpus-dir", type=path, default=None, help="folder of the corpus (default $VARPROP_CORPUS)"
    )
    texts = "held-out texts of the loss: books, docs, embedded, corpus directories (default %(default)s)"
    evaluating.add_argument("--texts", default="books,docs", help=texts)
    evaluating.add_argument("--lengths", default="128", help="window lengths of the loss, as 128,1024 (default 128)")
    evaluating.add_argument("--n-sequences", type=int, default=None, help="windows of each text (default all)")
    evaluating.add_argument("--limit", type=int, default=None, help="BLiMP pairs of each paradigm (default all)")
    evaluating.add_argument("--n-items", type=int, default=2000, help="of each cloze question (default %(default)s)")
    evaluating.add_argument("--seed", type=int, default=0, help="of windows and cloze items")
    evaluating.add_argument("--device", default="auto", help="torch device (default CUDA where there is one)")
    evaluating.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    written = "write BLiMP as a task of lm_eval into a new folder, and do nothing else"
    evaluating.add_argument("--write-lm-eval-task", type=path, default=None, metavar="FOLDER", help=written)


def _export(arguments: argparse.Namespace) -> int:
    from varprop import hf  # brings the tokenizer library in

    model = hf.load(arguments.run)
    tokenizer = special_tokens = None
    if not arguments.no_tokenizer:
        tokenizer, special_tokens = _tokenizer(arguments.run, "--no-tokenizer")
    longest = arguments.max_positions
    if longest is None:
        longest = _n_tokens_of(Path(arguments.run)) or hf.MAX_POSITIONS
    options = {"dtype": arguments.dtype, "max_positions": longest}
    done = hf.export(model, arguments.out, tokenizer=tokenizer, special_tokens=special_tokens, **options)
    if done.folded:
        print("folded into the weights: " + ", ".join(done.folded))
    print(f"wrote {done.path}, a {done.model_type}")
    return 0


def _n_tokens_of(run: Path) -> int | None:
    """The sequence length that a run was trained at, where it says so."""
    try:
        return int(json.loads((run / "run.json").read_text())["config"]["n_tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _tokenizer(folder: str, instead: str) -> tuple[Any, Any]:
    """`hf.tokenizer_of` a folder; `ArgumentError` where it has none, which says what goes `instead`."""
    from varprop import hf

    found = hf.tokenizer_of(folder)
    if found is None:
        path = str(Path(folder) / "tokenizer.json")
        raise ArgumentError(f"tokenizer={path!r} is missing; expected that of the run's corpus, or {instead}")
    return found


def _import(arguments: argparse.Namespace) -> int:
    from varprop import hf

    model = hf.load(arguments.folder)
    hf.save_run(model, arguments.out)
    hf.copy_tokenizer(arguments.folder, arguments.out)
    print(f"wrote {arguments.out}: {model.spec.parameter_counts()['total']:,} parameters, spec {model.spec.spec_id}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from varprop import evaluate, hf
    from varprop.train.distributed import resolve_device

    if arguments.write_lm_eval_task is not None:
        pairs = evaluate.load_pairs(_corpus_dir(arguments), arguments.limit)
        folder = evaluate.write_lm_eval_task(pairs, arguments.write_lm_eval_task)
        print(f"wrote {folder}: lm_eval --model hf --tasks blimp_local --include_path {folder}")
        return 0
    out = files.writable(arguments.out)
    tasks, texts = arguments.tasks.split(","), arguments.texts.split(",")
    for task in tasks:
        require(task in TASKS, ArgumentError, "tasks", task, "unknown", "some of " + ", ".join(TASKS))
    require(arguments.model is not None, ArgumentError, "model", None, "missing", "a finished run or a model folder")
    lengths, seed = _lengths(arguments.lengths), arguments.seed
    require(seed >= 0, ArgumentError, "seed", seed, "outside the domain", "an integer >= 0")
    compute_dtype = torch.bfloat16 if arguments.precision == "bfloat16" else None
    model = hf.load(arguments.model, device=resolve_device(arguments.device), compute_dtype=compute_dtype)
    names = {"loss": texts, "cloze": ["books"]}
    read = {name for task in tasks for name in names.get(task, ())}
    held_out = {name: corpus.load_corpus(name, arguments.corpus_dir) for name in sorted(read)}
    tokenizer: Any = None
    special_tokens: Any = None
    if tasks != ["loss"] or any(text.tokenizer is not None for text in held_out.values()):
        tokenizer, special_tokens = _tokenizer(arguments.model, "the loss of a plain token file alone")
        hf.require_fit(tokenizer, model.spec.vocab_size)
        for text in held_out.values():
            corpus.require_same_tokenizer(tokenizer, text)
    parts = []
    if "loss" in tasks:
        for name in texts:
            text = held_out[name]
            sized = {"bytes_of_text": text.bytes_per_token if text.token_bytes is None else text.token_bytes}
            options = {**sized, "n_sequences": arguments.n_sequences, "text": name, "seed": seed}
            parts += [evaluate.packed_loss(model, text.validation, length, **options) for length in lengths]
    if "blimp" in tasks:
        first = _first_token(arguments.model, special_tokens)
        pairs = evaluate.load_pairs(_corpus_dir(arguments), arguments.limit)
        parts.append(evaluate.blimp(model, pairs, tokenizer, first))
    if "cloze" in tasks:
        books = held_out["books"]
        options = {"document_end": books.document_end, "n_items": arguments.n_items, "seed": seed}
        parts.append(evaluate.cloze(model, books.validation, tokenizer, **options))
    dataset = evaluate.join(parts)
    results.save(dataset, out)
    print(f"{evaluate.table(dataset)}\nwrote {out}")
    return 0


def _first_token(folder: str, special_tokens: Any) -> int:
    """The id that a sentence is read behind."""
    path, wrong = str(Path(folder) / "tokenizer_config.json"), "without bos_token and eos_token"
    expected = "a token that BLiMP's sentences are read behind"
    require(special_tokens.first is not None, ArgumentError, "file", path, wrong, expected)
    return special_tokens.first


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentError(f"lengths={text!r} is no list of integers; expected them as 128,1024") from None
    require(min(lengths) >= 1, ArgumentError, "lengths", text, "outside the domain", "integers >= 1")
    return lengths


def _corpus_dir(arguments: argparse.Namespace) -> str:
    folder = arguments.corpus_dir or os.environ.get("VARPROP_CORPUS")
    require(folder is not None, ArgumentError, "corpus_dir", None, "missing", "--corpus-dir, or VARPROP_CORPUS set")
    return str(folder)
