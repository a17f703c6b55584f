"""Run every proof and print the table; exit code 1 if one fails."""

from __future__ import annotations

import inspect
import sys

from proofs import (
    prove_activation,
    prove_attention,
    prove_backward,
    prove_coherent,
    prove_collapse,
    prove_decay,
    prove_expert_choice,
    prove_feed_forward,
    prove_gates,
    prove_gqa,
    prove_growth,
    prove_linear,
    prove_mitigation,
    prove_moe,
    prove_norm,
    prove_overlap,
    prove_residual,
    prove_scaling,
    prove_softmax,
    prove_stream,
)

MODULES = (
    prove_linear,
    prove_norm,
    prove_activation,
    prove_feed_forward,
    prove_residual,
    prove_softmax,
    prove_attention,
    prove_gqa,
    prove_gates,
    prove_overlap,
    prove_expert_choice,
    prove_moe,
    prove_stream,
    prove_coherent,
    prove_collapse,
    prove_decay,
    prove_scaling,
    prove_growth,
    prove_mitigation,
    prove_backward,
)


def main() -> int:
    """Print statement, assumption and status of every proof; the number of failures."""
    failures = 0
    for module in MODULES:
        component = module.__name__.removeprefix("proofs.prove_")
        for proof in module.PROOFS:
            try:
                proof.function()
                numerical = "close(" in inspect.getsource(proof.function)
                status = "checked numerically" if numerical else "proved"
            except Exception as error:  # a proof that cannot run is a failed proof
                status, failures = f"FAILED: {error}", failures + 1
            print(f"{component:<13} {proof.statement:<66} {proof.assumption:<42} {status}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
