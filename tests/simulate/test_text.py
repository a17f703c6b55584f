"""Real text and several sequences as inputs: which sequence a network reads, and what repeated words do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as distributions

from varprop import presets, results
from varprop.compare import check
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError
from varprop.nn.init import make_generator
from varprop.simulate import repetition, same_token, sample, text_tokens
from varprop.simulate.block import MAX_NETWORKS
from varprop.simulate.inputs import read_inputs
from varprop.theory import predict
from varprop.train import batch

SMALL = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
WIDE = presets.tiny().with_fields(n_layers=4, d_model=256, d_ff=512)


def at_start(dataset):
    return dataset.sel(layer=0, site="resid_post")


def test_windows_are_those_of_training() -> None:
    ids = text_tokens(16, n_sequences=5, seed=3)
    np.testing.assert_array_equal(ids, batch(load_corpus(), 3, 0, 5, 16)[:, :-1])
    np.testing.assert_array_equal(ids[:2], text_tokens(16, n_sequences=2, seed=3))
    assert not np.array_equal(ids, text_tokens(16, n_sequences=5, seed=4))


def test_a_network_reads_its_sequence_however_many_there_are() -> None:
    ids = text_tokens(6, n_sequences=3)
    size = MAX_NETWORKS["cpu"]
    many = sample(SMALL, n_networks=2 * size + 3, inputs=ids)
    for first, n_networks in ((0, 1), (5, size), (size, 3), (2 * size + 2, 1)):
        few = sample(SMALL, n_networks=n_networks, first_network=first, inputs=ids)
        assert few.equals(many.isel(network=slice(first, first + n_networks)))
    assert many.attrs["n_sequences"] == 3
    assert many.attrs["n_tokens"] == 6


def test_vectors_go_round_the_networks() -> None:
    x = np.arange(2 * 3 * 32.0).reshape(2, 3, 32)
    found = at_start(sample(SMALL, n_networks=11, inputs=x)).second_moment.values  # over two blocks of networks
    np.testing.assert_array_equal(found, (x**2).mean(axis=(1, 2))[np.arange(11) % 2])


def test_one_sequence_is_the_same_with_and_without_its_dimension() -> None:
    ids = text_tokens(6, n_sequences=1)
    for given in (ids, np.eye(3, 32)[None]):
        pair = [sample(SMALL, n_networks=3, inputs=array) for array in (given, given[0])]
        assert results.identical(*pair)


def test_equal_tokens_have_equal_embeddings_in_each_sequence() -> None:
    """Sequences with different numbers of distinct tokens: 1 of 3, 3 of 3, 2 of 3."""
    start = at_start(sample(SMALL, n_networks=300, inputs=[[7, 7, 7], [7, 8, 9], [9, 9, 8]]))
    pair = (start.token_correlation * start.second_moment).values.reshape(100, 3)
    power = start.second_moment.values.reshape(100, 3)
    np.testing.assert_allclose(pair[:, 0], power[:, 0], rtol=1e-6)
    for column, expected in ((1, 0.0), (2, 1 / 3)):
        values = pair[:, column]
        assert abs(values.mean() - expected) < 5 * values.std(ddof=1) / 10  # false-fail rate 2.5e-6 each


def test_repetition_of_a_text_is_its_sum_of_squared_frequencies() -> None:
    """By pairs of positions, and against the frequencies of the whole text (t interval, false-fail rate 1e-4).

    Windows of one text are not quite independent, and a rare word clusters in its window, which raises the mean:
    the window's mean is above that of the whole text, by less than 20 %.
    """
    ids = text_tokens(128, n_sequences=200)
    pairs = same_token(ids) * (1 - np.eye(128))
    np.testing.assert_allclose(repetition(ids), pairs.sum(axis=(1, 2)) / (128 * 127), rtol=1e-12)
    tokens = load_corpus().train
    whole = ((np.bincount(tokens) / len(tokens)) ** 2).sum()
    mean, stderr = repetition(ids).mean(), repetition(ids).std(ddof=1) / 200**0.5
    limit = distributions.t.isf(5e-5, 199) * stderr
    assert whole - limit < mean < 1.2 * whole + limit


def test_layer_zero_of_a_text_correlates_as_its_words_repeat() -> None:
    """E x_s.x_t / (d q_0) is the repetition, exactly. 20 sequences, each read by 10 networks, q_0 = 1.

    The statistic per network is the difference from its own sequence: false-fail rate 5.7e-7 (5 standard errors).
    """
    ids = text_tokens(64, n_sequences=20, seed=1)
    start = at_start(sample(SMALL, n_networks=200, inputs=ids))
    expected = repetition(ids)[np.arange(200) % 20]
    difference = (start.token_correlation * start.second_moment).values - expected
    stderr = difference.std(ddof=1) / 200**0.5
    assert abs(difference.mean()) < 5 * stderr
    assert stderr < 0.05 * expected.mean()  # an error of a third of the repetition would be seen
    assert np.corrcoef(difference + expected, expected)[0, 1] > 0.3  # each network follows its own text


@pytest.mark.parametrize("variable, resolution", [("second_moment", 0.05), ("token_correlation", 0.04)])
def test_prediction_agrees_with_networks_that_read_the_same_text(text_pair, variable: str, resolution: float) -> None:
    """False-fail rate 0.01 for each variable; `agrees` says that an error of `resolution` would have been seen."""
    assert check(*text_pair, variable=variable, resolution=resolution).verdict == "agrees"


def test_the_check_sees_that_words_repeat(text_pair) -> None:
    """The same networks against a prediction for distinct words."""
    _, measured = text_pair
    distinct = predict(WIDE, n_tokens=32)
    with pytest.raises(
        ArgumentError, match="is not what was predicted for; expected a prediction with the correlation"
    ):
        check(distinct, measured)
    outcome = check(distinct, measured, variable="token_correlation", allow_other_spec=True)
    assert outcome.verdict == "disagrees"


@pytest.fixture(scope="module")
def text_pair():
    """Of 20 windows the one that repeats itself most: 3.6 % of its pairs; among random ids 0.01 %."""
    windows = text_tokens(32, n_sequences=20, seed=5)
    ids = windows[repetition(windows).argmax()]
    return predict(WIDE, n_tokens=32, token_correlation=same_token(ids)), sample(WIDE, n_networks=192, inputs=ids)


def test_gaussian_tokens_of_a_correlation_matrix() -> None:
    """Every pair of positions: 10 products, five standard errors each, false-fail rate 6e-6 in all."""
    matrix = np.array([[1, 0.8, 0.3, 0], [0.8, 1, 0, -0.5], [0.3, 0, 1, 0.2], [0, -0.5, 0.2, 1]])
    x = read_inputs(SMALL, 4, matrix, None).draw(400, make_generator((0,), 0)).numpy()
    products = np.einsum("btd,bsd->bts", x, x) / SMALL.d_model
    error = products.std(axis=0, ddof=1) / 400**0.5
    assert (np.abs(products.mean(axis=0) - matrix) < 5 * error).all()


def test_a_correlation_matrix_of_one_number_and_of_repeated_tokens_agree_with_their_other_forms() -> None:
    """Same law, other random numbers: 5.5 standard errors of the difference of two means, over all layers and sites."""
    ids = np.array([3, 5, 3, 3, 9, 5])
    constant = 0.4 + 0.6 * np.eye(6)
    pairs = [
        ({"n_tokens": 6, "token_correlation": constant}, {"n_tokens": 6, "token_correlation": 0.4, "seed": 1}),
        ({"n_tokens": 6, "token_correlation": same_token(ids)}, {"inputs": ids, "seed": 1}),
    ]
    for first, second in pairs:
        a, b = (sample(SMALL, n_networks=200, **arguments) for arguments in (first, second))
        assert a.attrs["token_correlation"].startswith("sha256:")
        for name in ("second_moment", "token_correlation"):
            means = [d[name].mean("network") for d in (a, b)]
            error = np.sqrt(sum(d[name].var("network", ddof=1) / 200 for d in (a, b)))
            assert not bool((np.abs(means[0] - means[1]) > 5.5 * error).any())


@pytest.mark.parametrize(
    "value, message",
    [
        (np.eye(3), r"token_correlation='array of shape \(3, 3\)' is outside the domain"),
        (np.array([[1, 2], [2, 1]]), "not positive semidefinite"),
        (np.array([[1, 0.5], [0, 1]]), "not symmetric"),
        ([[1], [0, 1]], "ragged"),
    ],
)
def test_matrices_that_are_no_correlation_raise_one_line(value, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        sample(SMALL, n_networks=1, n_tokens=2, token_correlation=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: text_tokens(0, n_sequences=1), "n_tokens=0 is outside"),
        (lambda: text_tokens(8, n_sequences=0), "n_sequences=0 is outside"),
        (lambda: text_tokens(10**6, n_sequences=2), "n_sequences=2 is more than the 1 windows"),
        (lambda: text_tokens(10**7, n_sequences=1), "n_tokens=10000000 is too long for a text"),
        (lambda: repetition([1]), "n_tokens=1 is too few"),
        (lambda: sample(SMALL, n_networks=1, inputs=np.zeros((1, 2, 3, 32))), r"shape \(1, 2, 3, 32\)"),
        (lambda: sample(SMALL, n_networks=1, inputs=np.zeros((1, 2, 3), int)), r"int64 with shape \(1, 2, 3\)"),
        (lambda: sample(SMALL, n_networks=1, inputs=[1], token_correlation=np.eye(1)), "given with inputs"),
    ],
)
def test_bad_texts_raise_one_line(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
