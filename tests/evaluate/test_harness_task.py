"""BLiMP as a task of lm-evaluation-harness: its own command gives our accuracy, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus.conftest import save_tokenizer
from varprop import evaluate, hf, presets
from varprop.errors import ArgumentError
from varprop.evaluate import Pair
from varprop.nn import Transformer

WORDS = ("cat", "house", "river", "book", "woman", "table", "window", "letter", "garden", "sister")
PAIRS = [
    Pair(f"{name}_agreement", "agreement", good.format(word), bad.format(word))
    for name, good, bad in (("verb", 'The "{}" is here.', 'The "{}" are here.'), ("order", "A {} it is", "A is {} it"))
    for word in WORDS
]


def test_what_is_written(tmp_path: Path) -> None:
    folder = evaluate.write_lm_eval_task(PAIRS, tmp_path / "task")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        *("blimp_local.yaml", "blimp_local_order_agreement.jsonl", "blimp_local_order_agreement.yaml"),
        *("blimp_local_verb_agreement.jsonl", "blimp_local_verb_agreement.yaml"),
    ]
    lines = (folder / "blimp_local_verb_agreement.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"sentence_good": 'The "cat" is here.', "sentence_bad": 'The "cat" are here.'}
    assert len(lines) == len(WORDS)
    with pytest.raises(ArgumentError, match="is there already"):
        evaluate.write_lm_eval_task(PAIRS, folder)
    with pytest.raises(ArgumentError, match="pairs=0 is empty"):
        evaluate.write_lm_eval_task([], tmp_path / "other")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval (the extra eval)")
@pytest.mark.parametrize("special", [None, hf.SpecialTokens(256, 256, 256), hf.SpecialTokens(10, 256, 256)])
def test_the_ordinary_command_gives_our_accuracy(tmp_path: Path, special: hf.SpecialTokens | None) -> None:
    model = Transformer(presets.tiny().with_fields(d_model=32, n_layers=2, d_ff=48), seed=3)
    tokenizer = hf.load_tokenizer() if special is None else save_tokenizer(tmp_path / "bytes.json")
    hf.export(model, tmp_path / "model", tokenizer=tokenizer, special_tokens=special)
    evaluate.write_lm_eval_task(PAIRS, tmp_path / "task")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "blimp_local", "--device", "cpu"]
    options = {
        "--model_args": f"pretrained={tmp_path / 'model'},dtype=float32",
        "--include_path": str(tmp_path / "task"),
        "--output_path": str(tmp_path / "out"),
    }
    words = [word for pair in options.items() for word in pair]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, *words], env=os.environ | offline, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    first = 0 if special is None else special.first
    assert first is not None
    ours = evaluate.blimp(model, PAIRS, tokenizer, first)
    assert written["results"]["blimp_local"]["acc,none"] == pytest.approx(ours.blimp_accuracy.item(), abs=1e-9)
    for paradigm in ours.paradigm.values:
        theirs = written["results"][f"blimp_local_{paradigm}"]["acc,none"]
        assert theirs == pytest.approx(ours.blimp_paradigm_accuracy.sel(paradigm=paradigm).item(), abs=1e-9)
