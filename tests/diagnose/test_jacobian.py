"""The Jacobian score against whole Jacobians of the model's own layers, in loops, and probes against all signs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varprop.diagnose import Replay, Session, measure
from varprop.diagnose import jacobian_products as products_module
from varprop.diagnose.jacobian import jacobian
from varprop.diagnose.jacobian_products import probe_tokens
from varprop.diagnose.jacobian_spectrum import largest_singular_value, mean_jacobian, spectral_norms
from varprop.diagnose.limits import Limits
from varprop.diagnose.measure import as_batch
from varprop.errors import ArgumentError, LeftOutWarning
from varprop.measure import jacobian_deviation
from varprop.measure.jacobian import DEFINITIONS

from . import zoo

KINDS = ("llama", "gpt_neox", "cohere", "gemma3", "olmoe", "bert")
"""Sequential, parallel in one sum and in two, norms after the branches, a mixture, and norms after the sums."""
Numbers = dict[str, np.ndarray]


def session(model: nn.Module, tokens: Tensor, seed: int = 0, **options: Any) -> Session:
    return Session(Replay(model), as_batch(tokens), seed, options=options)


def values(of: Session) -> Numbers:
    return {name: np.asarray(array) for name, (_, array) in jacobian(of).items()}


def layer_maps(model: nn.Module, tokens: Tensor) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each layer of a pass of one sequence (1, T), as a function of its input (T, D), and that input."""
    found = []

    def watch(layer: nn.Module, args: Any, kwargs: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        given = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        def run(x: Tensor) -> Tensor:
            out = layer(x[None], *args[1:], **given)
            return (out[0] if isinstance(out, tuple) else out)[0]

        found.append((run, stream[0].detach()))

    hooks = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in Replay(model).layers]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def whole(function: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    """J_ts, (T, T, D, D)."""
    found = torch.autograd.functional.jacobian(function, x)
    return found.permute(0, 2, 1, 3).double().numpy()  # type: ignore[union-attr]


def by_definition(pieces: list[np.ndarray]) -> list[float]:
    """Of J_ts - I [t = s] of all sequences, as the docstring writes them."""
    n_tokens, d_model = pieces[0].shape[1:3]
    total = dict.fromkeys(DEFINITIONS, 0.0)
    mean = np.zeros((d_model, d_model))
    for piece in pieces:
        for t, s in itertools.product(range(n_tokens), repeat=2):
            total["all_sources"] += (piece[t, s] ** 2).sum() / n_tokens / len(pieces)
            if t == s:
                total["own_token"] += (piece[t, t] ** 2).sum() / n_tokens / len(pieces)
            mean += piece[t, s] / n_tokens / len(pieces)
    total["token_mean"] = (mean**2).sum()
    return [total[name] / d_model for name in DEFINITIONS]


def less_identity(pieces: np.ndarray) -> np.ndarray:
    n_tokens, d_model = pieces.shape[1:3]
    return pieces - np.eye(n_tokens)[:, :, None, None] * np.eye(d_model)


@zoo.each_family(*KINDS)
def test_exact_scores_equal_the_whole_jacobian(family: str) -> None:
    model, tokens = zoo.make(family, torch.float64), zoo.tokens(2, 4)
    found = values(session(model, tokens, n_probes=0))
    maps = [layer_maps(model, row[None]) for row in tokens]
    for layer in range(zoo.N_LAYERS):
        pieces = [less_identity(whole(*of_sequence[layer])) for of_sequence in maps]
        np.testing.assert_allclose(found["jacobian_deviation"][layer + 1], by_definition(pieces), rtol=2e-5)
        means = [piece.sum(axis=(0, 1)) / piece.shape[0] for piece in pieces]
        split = (means[0] * means[1]).sum() / zoo.WIDTH
        np.testing.assert_allclose(found["jacobian_deviation_split_half"][layer + 1], split, rtol=2e-5, atol=1e-7)
        check_statistics({name: array[layer + 1] for name, array in found.items() if array.ndim == 1}, sum(means) / 2)


def check_statistics(found: dict[str, Any], mean: Any) -> None:
    """Of J - I."""
    matrix = mean + np.eye(len(mean))
    diagonal, off = np.diag(matrix), matrix - np.diag(np.diag(matrix))
    expected = {
        "jacobian_norm": np.linalg.norm(mean) / len(mean),
        "jacobian_diagonal_mean": diagonal.mean(),
        "jacobian_diagonal_std": diagonal.std(),
        "jacobian_off_diagonal_norm": np.sqrt((off**2).sum() / (len(mean) ** 2 - len(mean))),
        "jacobian_frobenius_norm": np.linalg.norm(matrix),
        "jacobian_spectral_norm": np.linalg.norm(matrix, 2),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def llama_branches(layer: Any, run: Any, x: Tensor, rotary: Any) -> dict[str, tuple[Any, Tensor]]:
    attn = lambda x: layer.self_attn(layer.input_layernorm(x[None]), **rotary)[0][0]  # noqa: E731
    mlp = lambda x: layer.mlp(layer.post_attention_layernorm(x[None]))[0]  # noqa: E731
    return {"attn": (attn, x), "mlp": (mlp, x + attn(x))}


def cohere_branches(layer: Any, run: Any, x: Tensor, rotary: Any) -> dict[str, tuple[Any, Tensor]]:
    attn = lambda x: layer.self_attn(layer.input_layernorm(x[None]), **rotary)[0][0]  # noqa: E731
    return {"attn": (attn, x), "mlp": (lambda x: layer.mlp(layer.input_layernorm(x[None]))[0], x)}


def bert_branches(layer: Any, run: Any, x: Tensor, rotary: Any) -> dict[str, tuple[Any, Tensor]]:
    attention = layer.attention
    attn = lambda x: attention.output.dense(attention.self(x[None])[0])[0]  # noqa: E731
    mlp = lambda x: layer.output.dense(layer.intermediate(x[None]))[0]  # noqa: E731
    return {"attn": (attn, x), "mlp": (mlp, attention.output.LayerNorm(x + attn(x)))}


@pytest.mark.parametrize(
    "family, written", [("llama", llama_branches), ("cohere", cohere_branches), ("bert", bert_branches)]
)
def test_branches_equal_their_whole_jacobian(family: str, written: Any) -> None:
    model, tokens = zoo.make(family, torch.float64), zoo.tokens(2, 4)
    found = values(session(model, tokens, n_probes=0))["branch_jacobian_deviation"]
    layers = Replay(model).layers
    pieces: dict[tuple[int, str], list[np.ndarray]] = {}
    for row in tokens:
        for index, (run, x) in enumerate(layer_maps(model, row[None])):
            calls: Any = run.__closure__
            given = next(c.cell_contents for c in calls if isinstance(c.cell_contents, dict))
            rotary = {name: given.get(name) for name in ("position_embeddings", "attention_mask")}
            for name, (function, source) in written(layers[index], run, x, rotary).items():
                pieces.setdefault((index, name), []).append(whole(function, source.detach()))
    for index, branch in itertools.product(range(zoo.N_LAYERS), range(2)):
        expected = by_definition(pieces[index, ("attn", "mlp")[branch]])
        np.testing.assert_allclose(found[index + 1, branch], expected, rtol=2e-5)


class Toy(nn.Module):
    """Layers x + tanh(x) A + m B for the mean m of tanh over the tokens so far; no branch is attention."""

    def __init__(self, d_model: int = 6, n_layers: int = 2, scale: float = 0.3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(20, d_model, dtype=torch.float64)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(20, d_model, generator=generator))
        self.layers = nn.ModuleList(ToyLayer(d_model, scale, generator) for _ in range(n_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x @ self.embedding.weight.T


class ToyLayer(nn.Module):
    def __init__(self, d_model: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        shape = (2, d_model, d_model)
        self.matrices = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]
        y = x.tanh()
        return x + y @ self.matrices[0] + y.cumsum(dim=-2) / counts @ self.matrices[1]


def toy_tokens(n_sequences: int, n_tokens: int) -> Tensor:
    return torch.randint(20, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(1))


def test_one_sequence_equals_the_measure_of_a_block() -> None:
    model, tokens = Toy(), toy_tokens(1, 4)
    found = jacobian(session(model, tokens, n_probes=0))
    assert not any(name.startswith("branch_") or "split_half" in name for name in found)
    for layer, (run, x) in enumerate(layer_maps(model, tokens)):
        x = x.clone().requires_grad_()
        expected = jacobian_deviation(run(x), x)
        np.testing.assert_allclose(found["jacobian_deviation"][1][layer + 1], expected, rtol=1e-11)


def test_token_probes_are_unbiased() -> None:
    """The mean over all 2^8 equally likely signs is the exact value, to rounding."""
    replay, tokens = Replay(Toy(d_model=2)), toy_tokens(2, 2)
    table = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)))
    directions, signs = table[:, :4].view(-1, 2, 2), table[:, 4:].view(-1, 2, 2, 1).transpose(0, 1)
    captured = replay.capture(as_batch(tokens))
    found = probe_tokens(replay, captured, 1, ["layer"], directions, signs)
    for b, row in enumerate(tokens):
        exact = jacobian(session(replay.model, row[None], n_probes=0))["jacobian_deviation"][1][2]
        for name, values in found.items():
            assert float(values[b, 0].std()) > 1e-3
            np.testing.assert_allclose(float(values[b, 0].mean()), exact[DEFINITIONS.index(name)], rtol=1e-11)


@zoo.each_family("llama", "olmoe", "bert")
def test_estimates_are_near_the_exact_values(family: str) -> None:
    """Within 6 standard errors of 24 probes, all layers, parts and definitions."""
    model, tokens = zoo.make(family, torch.float64), zoo.tokens(3, 12)
    exact, found = (values(session(model, tokens, n_probes=n)) for n in (0, 24))
    assert (exact["jacobian_n_probes"][1:] == 0).all()
    assert (found["jacobian_n_probes"][1:] == 24).all()
    for name in ("jacobian_deviation", "branch_jacobian_deviation", "jacobian_deviation_split_half"):
        gap, error = (found[name] - exact[name])[1:], found[f"{name}_stderr"][1:]
        assert (np.abs(gap) < 6 * error + 1e-12).all(), name
        assert (error < 0.5 * np.abs(exact[name][1:]) + 0.01).all(), name


def test_probes_are_added_until_the_error_is_as_asked() -> None:
    model, tokens = Toy(d_model=40), toy_tokens(2, 5)
    found = values(session(model, tokens, n_probes=4, jacobian_stderr=0.05))
    used = found["jacobian_n_probes"][1:]
    relative = (found["jacobian_deviation_stderr"] / found["jacobian_deviation"])[1:, 2]
    assert ((relative <= 0.05) | (used == 40)).all()
    assert used.max() > 4
    layer = int(used.argmax())
    once = values(session(model, tokens, n_probes=int(used[layer])))
    for name in ("jacobian_norm", "jacobian_diagonal_std", "jacobian_deviation_split_half"):
        np.testing.assert_allclose(found[name][layer + 1], once[name][layer + 1], rtol=1e-12)


def test_values_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copies of the input, batches of sequences, groups of layers; and parts that are kept are read."""
    model, tokens = zoo.make("llama", torch.float64, n_layers=2), zoo.tokens(3, 4)
    for n_probes in (0, 6):
        expected = values(session(model, tokens, n_probes=n_probes))
        small = session(model, tokens, n_probes=n_probes)
        small.replay.limits = Limits(200_000)
        small.parts = tmp_path
        monkeypatch.setattr(products_module, "BUSY_TOKENS", {"cpu": 7})
        found = values(small)
        monkeypatch.undo()
        assert len(list(tmp_path.iterdir())) > 3
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-8, atol=1e-10, err_msg=name)
        other = session(model, tokens, n_probes=n_probes)
        other.parts = tmp_path
        np.testing.assert_allclose(values(other)["jacobian_norm"], expected["jacobian_norm"], rtol=1e-8)
        monkeypatch.setattr(Replay, "branches", None)  # nothing is computed again
        monkeypatch.setattr("varprop.diagnose.jacobian._parts", lambda _: ("layer", "attn", "mlp"))
        assert all(np.array_equal(found[name], array, equal_nan=True) for name, array in values(small).items())
        monkeypatch.undo()
        for file in tmp_path.iterdir():
            file.unlink()


@zoo.each_family(*KINDS)
def test_products_of_both_sides_equal_the_mean_jacobian(family: str) -> None:
    model, tokens = zoo.make(family, torch.float64), zoo.tokens(2, 4)
    replay = Replay(model)
    captured = replay.capture(as_batch(tokens))
    pieces = [whole(*layer_maps(model, row[None])[1]) for row in tokens]
    mean = torch.as_tensor(sum(piece.sum(axis=(0, 1)) for piece in pieces) / 8)
    forward, transposed = mean_jacobian(replay, captured, 1)
    vector = torch.randn(zoo.WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(forward(vector), mean @ vector, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(transposed(vector), mean.T @ vector, rtol=2e-5, atol=1e-6)


def test_lanczos() -> None:
    """As many steps as neurons: the largest singular value to rounding; before that never above it."""
    matrix = torch.eye(30) + 0.2 * torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    matrix = matrix.double()
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    start = torch.ones(30, dtype=torch.float64)
    found = [largest_singular_value(lambda v: matrix @ v, lambda u: matrix.T @ u, start, n) for n in (2, 4, 8, 30, 50)]
    sizes = [float(value) for value, _ in found]
    assert sizes == sorted(sizes)
    assert sizes[2] < largest < 1.05 * sizes[2]
    np.testing.assert_allclose(sizes[3:], largest, rtol=1e-12)
    singular = torch.linalg.svdvals(matrix)
    for value, residual in found:
        assert float((singular - value).abs().min()) <= float(residual) + 1e-12


def test_lanczos_of_the_identity_ends_at_once() -> None:
    value, residual = largest_singular_value(lambda v: v, lambda u: u, torch.ones(4, dtype=torch.float64), 3)
    assert float(value) == pytest.approx(1.0, abs=1e-12)
    assert float(residual) < 1e-12


def test_spectral_norm_with_enough_steps_is_exact() -> None:
    model, tokens = zoo.make("llama", torch.float64), zoo.tokens(2, 4)
    exact = values(session(model, tokens, n_probes=0))["jacobian_spectral_norm"]
    found = values(session(model, tokens, n_probes=4, jacobian_spectral_steps=zoo.WIDTH))
    np.testing.assert_allclose(found["jacobian_spectral_norm"], exact, rtol=1e-6)
    assert "jacobian_spectral_norm" not in jacobian(session(model, tokens, n_probes=4, jacobian_spectral_steps=0))


def test_spectral_norms_are_left_out_where_the_memory_is_short() -> None:
    """Five T x T maps of four heads in each of two sequences of 20 tokens, and a byte less."""
    given = session(zoo.make("llama"), zoo.tokens(2, 20), jacobian_spectral_steps=2)
    given.replay.limits = Limits(5 * 4 * 4 * 2 * 20**2)
    assert spectral_norms(given, None)
    given.replay.limits.memory -= 1
    with pytest.warns(LeftOutWarning, match="jacobian_spectral_norm is left out: it needs about .* GiB, more than"):
        assert spectral_norms(given, None) == {}


def test_bfloat16_is_near_float32() -> None:
    """Of the deviation 5 %: its products are rounded to 8 bits, and it is the gap between two of them."""
    tokens = zoo.tokens(2, 16)
    exact, found = (
        values(session(zoo.make("llama", kind), tokens, n_probes=8)) for kind in (torch.float32, torch.bfloat16)
    )
    for name in (
        "jacobian_deviation",
        "branch_jacobian_deviation",
        "jacobian_frobenius_norm",
        "jacobian_spectral_norm",
    ):
        np.testing.assert_allclose(found[name], exact[name], rtol=0.05, err_msg=name)


def test_a_layer_that_is_the_identity() -> None:
    found = values(session(Toy(scale=0.0), toy_tokens(3, 4), n_probes=4, jacobian_stderr=0.01))
    for name, array in found.items():
        ones = ("jacobian_diagonal_mean", "jacobian_identity_share", "jacobian_spectral_norm")
        known = {"jacobian_n_probes": 4.0, "jacobian_sequences": 3, "jacobian_frobenius_norm": 6**0.5} | dict.fromkeys(
            ones, 1.0
        )
        np.testing.assert_allclose(array[1:] if array.ndim else array, known.get(name, 0.0), atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "options", [{"n_probes": 3}, {"n_probes": -1}, {"jacobian_stderr": -0.1}, {"jacobian_stderr": 2}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="^" + next(iter(options))):
        jacobian(session(Toy(), toy_tokens(1, 4), **options))


def test_the_result_names_definitions_and_branches() -> None:
    found = measure(zoo.make("llama"), zoo.tokens(2, 6), scores=["jacobian"], options={"n_probes": 4})
    assert found.definition.values.tolist() == list(DEFINITIONS)
    assert found.branch_jacobian_deviation.dims == ("layer", "branch", "definition")
    assert found.jacobian_deviation.sel(definition="token_mean").sizes == {"layer": 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu() -> None:
    tokens = zoo.tokens(2, 32)
    expected = values(session(zoo.make("olmoe"), tokens, n_probes=8))
    for kind, error in ((torch.float32, 1e-3), (torch.bfloat16, 0.3)):
        found = values(session(zoo.make("olmoe", kind).cuda(), tokens, n_probes=8))
        for name in ("jacobian_frobenius_norm", "jacobian_spectral_norm", "jacobian_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=error, err_msg=name)
