"""Every proof holds; and a rule with a wrong factor or sign fails its proof (mutation)."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import numpy as np
import pytest

from proofs.__main__ import main, modules
from proofs.check import CASES, NUMERICAL, PROVED, Proof, ProofError, branches_agree
from varprop.theory.closure import SecondOrder
from varprop.theory.expert_choice import ExpertChoice
from varprop.theory.softmax import SoftmaxMoments

MODULES = modules()
ALL = [proof for module in MODULES for proof in module.PROOFS]
MUTABLE = [proof for proof in ALL if "rule" in inspect.signature(proof.function).parameters]
MUTATED_FIELD = {SoftmaxMoments: "pair", SecondOrder: "together"}


@pytest.mark.parametrize("proof", ALL, ids=lambda proof: proof.function.__name__)
def test_proof_holds(proof):
    proof.function()


def _mutant(rule, change):
    if not callable(rule):  # a constant
        return change(rule)

    @functools.wraps(rule)
    def wrong(*args, **kwargs):
        value = rule(*args, **kwargs)
        if dataclasses.is_dataclass(value):
            field = MUTATED_FIELD[type(value)]
            return dataclasses.replace(value, **{field: change(getattr(value, field))})
        if isinstance(value, ExpertChoice):
            return value._replace(second_moment=change(value.second_moment), overlap=change(value.overlap))
        if isinstance(value, dict):
            return {name: change(part) for name, part in value.items()}
        return (change(value[0]), *value[1:]) if isinstance(value, tuple) else change(value)

    return wrong


@pytest.mark.parametrize("proof", MUTABLE, ids=lambda proof: proof.function.__name__)
@pytest.mark.parametrize("change", [lambda v: v * 1.001, lambda v: -v], ids=["factor", "sign"])
def test_proof_catches_a_wrong_rule(proof, change):
    if proof.function.__name__ == "prove_key_factor" and change(1) < 0:
        pytest.skip("A and -A have the same A A'")
    if proof.function.__name__ in ("prove_key_factor", "prove_two_experts") and change(1) > 0:
        change = lambda v: v * 1.05  # noqa: E731  (a sampled check, and a table's, resolve percents)
    rule = inspect.signature(proof.function).parameters["rule"].default
    with pytest.raises(ProofError):
        proof.function(rule=_mutant(rule, change))


def test_most_proofs_take_their_rule():
    fixed = {proof.function.__name__ for proof in ALL if proof not in MUTABLE}
    assert fixed == {
        *("prove_laplace", "prove_posterior", "prove_integration_by_parts", "prove_independent_experts"),
        *("prove_output_factor", "prove_own_series", "prove_reductions", "prove_independent_queries"),
        "prove_gate_bounds",
    }


def test_table(capsys, monkeypatch):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ALL)
    assert all(line.endswith((PROVED, CASES, NUMERICAL)) for line in lines)
    assert {proof.status for proof in ALL} == {None, PROVED, CASES, NUMERICAL}
    shown = {proof.function.__name__: line for proof, line in zip(ALL, lines, strict=True)}
    assert shown["prove_centred_overlap"].endswith(" " + CASES)
    assert shown["prove_jacobian_product"].endswith(" " + PROVED)
    assert shown["prove_relu"].endswith(" " + PROVED)
    assert shown["prove_steps_branches"].endswith(" " + NUMERICAL)


def test_table_takes_the_given_status(capsys, monkeypatch):
    monkeypatch.setattr("proofs.__main__.modules", lambda: [MODULES[0]])
    monkeypatch.setattr(MODULES[0], "PROOFS", [Proof("statement", "assumption", lambda: None, CASES)])
    assert main() == 0
    assert capsys.readouterr().out.rstrip().endswith(" " + CASES)


def test_branches_agree_sees_each_kind_of_difference():
    def inverse(x, xp=np):
        return 1 / x if xp is not np else np.divide(1.0, x, out=np.full(np.shape(x), np.inf), where=np.asarray(x) > 0)

    def limit(x):
        return None if x else np.inf

    branches_agree(inverse, inverse, [(2,), (0,)], limit)
    for wrong in (
        lambda x: inverse(x) if np.ndim(x) else 0.3,  # one point
        lambda x: inverse(x) * (1.001 if np.ndim(x) else 1),  # an array
        lambda x: np.minimum(inverse(x), 1e9),  # outside the closed form
    ):
        with pytest.raises(ProofError):
            branches_agree(wrong, inverse, [(2,), (0,)], limit)
    with pytest.raises(ProofError, match="no point"):
        branches_agree(inverse, inverse, [(0,)], limit)


def test_table_counts_failures(capsys, monkeypatch):
    def broken():
        raise ProofError("difference 1 is not zero")

    module = MODULES[0]
    monkeypatch.setattr(module, "PROOFS", [module.PROOFS[0]._replace(function=broken)])
    assert main() == 1
    assert "FAILED: difference 1" in capsys.readouterr().out
