"""Join a prediction and a measurement by label; a verdict with an error bar per layer and site, and for the whole."""

from varprop.compare.cells import Side, judge, side_of
from varprop.compare.outcome import SHOWN_ROWS, VERDICTS, Check
from varprop.compare.verdict import ABSOLUTE, REPLICATES, check

__all__ = ["ABSOLUTE", "REPLICATES", "SHOWN_ROWS", "VERDICTS", "Check", "Side", "check", "judge", "side_of"]
