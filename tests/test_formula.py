"""varprop.formula: every closed form that takes symbols is registered, and its LaTeX is that of the function."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import sympy

from varprop import formula, theory
from varprop.errors import ArgumentError
from varprop.theory.activation import relu_kernel

NOT_FORMULAS = {
    "activation.identity_derivative_kernel": "1",
    "activation.identity_mean": "0",
    "branch_noise.pair_products": "a bookkeeping step of mean_covariance",
    "namespace": "functions that numpy lacks, and the check of arguments",
}


def public_functions():
    for module in pkgutil.iter_modules(theory.__path__):
        loaded = importlib.import_module(f"varprop.theory.{module.name}")
        for name, function in vars(loaded).items():
            own = inspect.isfunction(function) and function.__module__ == loaded.__name__
            if own and not name.startswith("_"):
                yield module.name, name, function


def takes_symbols(function) -> bool:
    """Whether symbols for all its required arguments give an expression."""
    parameters = inspect.signature(function).parameters.values()
    annotations = {str(p.annotation) for p in parameters if p.default is p.empty}
    if annotations - {"Any", str(inspect.Parameter.empty)}:  # numbers, strings, arrays or parts of a spec
        return False
    arguments = {p.name: sympy.Symbol(p.name, positive=True) for p in parameters if p.default is p.empty}
    if "xp" in inspect.signature(function).parameters:
        arguments["xp"] = sympy
    try:
        value = function(**arguments)
    except (TypeError, ValueError, AttributeError):
        return False
    return any(isinstance(x, sympy.Basic) for x in np.ravel(np.array(value, dtype=object)))


def test_every_closed_form_is_registered():
    missing = [
        f"{module}.{name}"
        for module, name, function in public_functions()
        if module not in NOT_FORMULAS and f"{module}.{name}" not in NOT_FORMULAS
        if name not in formula.FORMULAS and takes_symbols(function)
    ]
    assert not missing


def test_the_exceptions_exist():
    found = {f"{module}.{name}" for module, name, _ in public_functions()} | {"namespace"}
    assert set(NOT_FORMULAS) <= found


def test_names_are_unique():
    assert len(formula._ALL) == len(formula.FORMULAS)


@pytest.mark.parametrize("name", formula.names())
def test_latex(name):
    entry = formula.get(name)
    text = formula.latex(name)
    assert text.startswith(entry.left + " = ")
    assert text.count("{") == text.count("}")
    assert "Piecewise" not in text
    assert entry.statement.endswith((".", ":"))
    assert entry.source


@pytest.mark.parametrize("name", [n for n in formula.names() if not formula.get(n).right])
def test_right_side_uses_every_symbol(name):
    """A symbol that the right side lacks would be a wrong argument order or a stale line."""
    entry = formula.get(name)
    expressions = np.ravel(np.array(formula.right_side(entry), dtype=object))
    used = set().union(*(sympy.sympify(x).free_symbols for x in expressions))
    wanted = set().union(*(sympy.sympify(s).free_symbols for t in entry.symbols.split() for s in _flat(t)))
    ignored = {"relu_derivative_kernel": {"q_t", "q_s"}, "block_concentration": set()}.get(name, set())
    assert wanted - used == {sympy.Symbol(s, positive=True) for s in ignored}


def _flat(text):
    symbol = formula._symbol(text)
    return symbol if isinstance(symbol, tuple) else (symbol,)


def test_latex_is_that_of_the_function():
    q, c = sympy.symbols("q c", positive=True)
    entry = formula.Formula(
        lambda variance, correlation, xp=np: relu_kernel(variance, variance, correlation, xp), "K", "q c"
    )
    assert sympy.simplify(formula.right_side(entry) - relu_kernel(q, q, c, sympy)) == 0
    assert formula.latex("relu_mean") == r"\mathbb{E}\,\mathrm{relu}(h) = \frac{\sqrt{2} \sqrt{q}}{2 \sqrt{\pi}}"


def test_unknown_name():
    with pytest.raises(ArgumentError, match=r"formula='relu_kernal' is unknown; expected 'relu_kernel'\?"):
        formula.latex("relu_kernal")
    with pytest.raises(ArgumentError, match="formula='xyz' is unknown; expected one of linear_second_moment"):
        formula.get("xyz")
