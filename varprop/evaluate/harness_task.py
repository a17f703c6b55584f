"""BLiMP as a task of lm-evaluation-harness that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from varprop.errors import ArgumentError, require
from varprop.evaluate.minimal_pairs import Pair
from varprop.files import replacing_folder

GROUP = "blimp_local"
_TASK = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_GROUP = """\
group: {group}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""


def write_lm_eval_task(pairs: Sequence[Pair], out: str | Path) -> Path:
    """Write the task `blimp_local`, one sub-task for each paradigm, and its data into the new folder `out`.

    Then, without a network, `lm_eval --model hf --model_args pretrained=MODEL --tasks blimp_local --include_path OUT`.
    A sentence stands right behind the token that ends a document (lm_eval's own BLiMP puts a space between), as in
    `varprop.evaluate.blimp`. Raises `ArgumentError` where `out` is there and not empty, or cannot be written.
    """
    require(len(pairs) > 0, ArgumentError, "pairs", len(pairs), "empty", "at least one pair")
    target = Path(out)
    new = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(new, ArgumentError, "out", str(out), "there already", "a new or an empty folder")
    paradigms = sorted({pair.paradigm for pair in pairs})
    with replacing_folder(target) as folder:
        folder.mkdir()
        for paradigm in paradigms:
            task, own = f"{GROUP}_{paradigm}", [pair for pair in pairs if pair.paradigm == paradigm]
            lines = (json.dumps({"sentence_good": pair.good, "sentence_bad": pair.bad}) for pair in own)
            (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            data = json.dumps(str(target.absolute() / f"{task}.jsonl"))  # a quoted string of YAML, too
            (folder / f"{task}.yaml").write_text(_TASK.format(task=task, data=data))
        tasks = "\n".join(f"  - {GROUP}_{paradigm}" for paradigm in paradigms)
        (folder / f"{GROUP}.yaml").write_text(_GROUP.format(group=GROUP, tasks=tasks))
    return target
