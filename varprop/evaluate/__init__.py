"""Quick evaluation of a language model: held-out loss, BLiMP, cloze questions; BLiMP as a task of lm_eval."""

from varprop.evaluate.book_cloze import cloze
from varprop.evaluate.common import join, table
from varprop.evaluate.harness_task import write_lm_eval_task
from varprop.evaluate.minimal_pairs import Pair, blimp, load_pairs, score_pairs
from varprop.evaluate.packed import packed_loss
from varprop.evaluate.score import score

__all__ = [
    "Pair",
    "blimp",
    "cloze",
    "join",
    "load_pairs",
    "packed_loss",
    "score",
    "score_pairs",
    "table",
    "write_lm_eval_task",
]
