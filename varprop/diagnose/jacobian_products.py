"""Products u^T (J - I) of a layer's Jacobian J and of its branches', read off one graph of many copies of its input.

Copies of the input, and not batched derivatives, let every kernel serve: none has to know of batches of products.

Shape suffixes: `V` copies, `B` sequences, `T` tokens, `D` d_model, `P` parts, `k` probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from varprop.diagnose.replay import Captured, Replay

BUSY_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens that keep a device busy; copies of a layer's input are added up to so many."""


class Graph:
    """A layer on `n_copies` copies of its input, kept for any number of products.

    parts: "layer" and, where wanted, `attn` and `mlp`.
    """

    def __init__(self, replay: Replay, captured: Captured, layer: int, parts: Sequence[str], n_copies: int) -> None:
        stream = captured.streams[layer]
        self.x = stream.expand(n_copies, *stream.shape).clone().requires_grad_()
        self.sum_type = torch.promote_types(stream.dtype, torch.float32)
        self._ends: list[tuple[Tensor, Tensor]] = []
        self._ends_in_sum = False
        with torch.enable_grad():
            if len(parts) == 1:
                self._y = replay.layer(layer, self.x, captured)
                return
            self._y, branches = replay.branches(layer, self.x, captured, unchanged)
        for name in parts[1:]:
            added, source = branches.added[name], branches.inputs[name]
            zero = torch.zeros_like(added)
            found = torch.autograd.grad(added, source, zero, retain_graph=True, allow_unused=True)[0]
            is_source = found is not None  # else a parallel layer that adds its branches one after the other
            self._ends.append((added, source if is_source else self.x))
            self._ends_in_sum = is_source and name == "mlp" and torch.equal(self._y.view_as(added), source + added)

    def products(self, cotangent: Tensor) -> Iterator[Tensor]:
        """sum_t (J_ts - I [t = s])^T u_t of u (V, B, T, D) for the layer, then without I for its branches; that shape.

        cotangent: u, or what can be expanded to it, in `sum_type`, and so are the products.
        """
        cotangent = cotangent.expand_as(self.x)
        given = cotangent.to(self.x.dtype)
        if self._ends_in_sum:  # y = z + mlp(z): on its way to x the product of the layer passes that of mlp
            attn, (_, z) = self._ends
            whole, at_z = self._pulled(self._y, (self.x, z), given)
            yield whole - cotangent
            yield self._pulled(attn[0], attn[1:], given)[0]
            yield at_z - cotangent
            return
        yield self._pulled(self._y, (self.x,), given)[0] - cotangent
        for end, source in self._ends:
            yield self._pulled(end, (source,), given)[0]

    def _pulled(self, end: Tensor, sources: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(end, sources, cotangent.reshape(end.shape), retain_graph=True)
        return [product.reshape(self.x.shape).to(self.sum_type) for product in found]


def unchanged(_: str, added: Tensor) -> Tensor:
    """The edit of a branch that leaves it as it is."""
    return added


def n_copies(replay: Replay, captured: Captured, n_products: int) -> int:
    """Copies of the input to take `n_products` with: no more than keep the device busy, and none idle."""
    tokens = captured.n_sequences * captured.n_tokens
    most = min(replay.limits.call_tokens(2 * replay.call_bytes), BUSY_TOKENS.get(replay.device.type, 1024))
    n_calls = -(-n_products // max(1, most // tokens))
    return -(-n_products // n_calls)


def mean_rows(replay: Replay, captured: Captured, layer: int, parts: Sequence[str], vectors: Tensor) -> Tensor:
    """sum_ts (J_ts - I [t = s])^T v / T of each v in `vectors` (k, D): (B, P, k, D); exact to rounding, k products.

    Checked by: tests/diagnose/test_jacobian.py, torch.autograd.functional.jacobian.
    """
    size = n_copies(replay, captured, len(vectors))
    graph = Graph(replay, captured, layer, parts, size)
    vectors = vectors.to(graph.sum_type)
    found = vectors.new_zeros(captured.n_sequences, len(parts), *vectors.shape)
    for start in range(0, len(vectors), size):
        some = vectors[start : start + size]
        for part, product in enumerate(graph.products(_filled(some[:, None, None], size))):
            found[:, part, start : start + len(some)] = product[: len(some)].mean(dim=2).transpose(0, 1)
    return found


def probe_tokens(
    replay: Replay, captured: Captured, layer: int, parts: Sequence[str], directions: Tensor, signs: Tensor
) -> dict[str, Tensor]:
    """Estimates of own_token and all_sources, (B, P, k) float64 each, one of each probe; 2 k products.

    directions (k, T, D), signs (2, k, T, 1): random signs, which give both as in `measure.probe_jacobian_deviation`.
    Unbiased. Checked by: tests/diagnose/test_jacobian.py, the mean over all signs.
    """
    n_probes = len(directions)
    size = n_copies(replay, captured, n_probes)
    graph = Graph(replay, captured, layer, parts, size)
    shape = captured.n_sequences, len(parts), n_probes
    own = torch.zeros(shape, dtype=torch.float64, device=replay.device)
    every = torch.zeros_like(own)
    for start in range(0, n_probes, size):
        part_of = slice(start, min(start + size, n_probes))
        direction = directions[part_of].to(graph.sum_type)
        pair = [_filled(s[part_of].to(graph.sum_type), size)[:, None] for s in signs]
        given = [s * _filled(direction, size)[:, None] for s in pair]
        n = len(direction)
        for part, products in enumerate(zip(*(graph.products(u) for u in given), strict=True)):
            first, second = (s[:n] * product[:n] for s, product in zip(pair, products, strict=True))
            square = (first.square() + second.square()) / 2
            every[:, part, part_of] = square.sum(dim=(-2, -1)).double().T
            own[:, part, part_of] = (first * second).sum(dim=(-2, -1)).double().T
    size_of_all = captured.n_tokens * replay.d_model
    return {"own_token": own / size_of_all, "all_sources": every / size_of_all}


def exact_tokens(replay: Replay, captured: Captured, layer: int, parts: Sequence[str]) -> dict[str, Tensor]:
    """own_token and all_sources, (B, P, 1) float64 each, exact to rounding; T D products.

    Checked by: tests/diagnose/test_jacobian.py, torch.autograd.functional.jacobian.
    """
    n_tokens, d_model = captured.n_tokens, replay.d_model
    n_products = n_tokens * d_model
    size = n_copies(replay, captured, n_products)
    graph = Graph(replay, captured, layer, parts, size)
    own = torch.zeros(captured.n_sequences, len(parts), 1, dtype=torch.float64, device=replay.device)
    every = torch.zeros_like(own)
    for start in range(0, n_products, size):
        which = torch.arange(start, min(start + size, n_products), device=replay.device)
        copies, token = torch.arange(len(which), device=replay.device), which // d_model
        unit = torch.zeros(size, 1, n_tokens, d_model, dtype=graph.sum_type, device=replay.device)
        unit[copies, 0, token, which % d_model] = 1.0
        for part, product in enumerate(graph.products(unit)):
            square = product[: len(which)].square().sum(dim=-1)  # (V, B, T)
            every[:, part, 0] += square.sum(dim=(0, 2)).double()
            own[:, part, 0] += square[copies, :, token].sum(dim=0).double()
    return {"own_token": own / n_products, "all_sources": every / n_products}


def _filled(values: Tensor, size: int) -> Tensor:
    """With zeros behind, up to `size` entries along the first axis."""
    missing = size - len(values)
    return values if missing == 0 else torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
