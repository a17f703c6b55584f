"""Run every proof and print the table; exit code 1 if one fails."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

from proofs.check import NUMERICAL, PROVED, Proof

PREFIX = "prove_"


def modules() -> list[ModuleType]:
    """Every module proofs/prove_<component>.py, by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob(f"{PREFIX}*.py"))
    return [importlib.import_module(f"proofs.{name}") for name in names]


def _guess(proof: Proof) -> str:
    return NUMERICAL if "close(" in inspect.getsource(proof.function) else PROVED


def main() -> int:
    """Print statement, assumption and status of every proof; the number of failures."""
    failures = 0
    for module in modules():
        component = module.__name__.rsplit(PREFIX, 1)[-1]
        for proof in module.PROOFS:
            try:
                proof.function()
                status = proof.status or _guess(proof)
            except Exception as error:  # a proof that cannot run is a failed proof
                status, failures = f"FAILED: {error}", failures + 1
            print(f"{component:<13} {proof.statement:<66} {proof.assumption:<42} {status}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
