"""Replay: every family taken apart gives the model's own streams, logits and loss; others are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varprop.diagnose.limits import Limits
from varprop.diagnose.replay import IGNORED, Batch, Replay
from varprop.errors import ArgumentError

from ..reference.specs import SPECS
from . import zoo

FLOAT32_NORMS = 2e-6
"""Rounding of a float64 model: transformers computes norms and routers in float32. Of values of order one."""
KEY_MASKS = tuple(name for name in SPECS if name.startswith("key_mask"))
"""Specs whose masks are drawn anew for every shape of a batch."""


def batch(family: str = "llama", **sizes: int) -> Batch:
    """Next tokens as targets, or the same ones for a masked language model, and a few places without a target."""
    rows = zoo.tokens(**sizes)
    targets = rows.clone() if family in zoo.MASKED else Batch.causal(rows).targets
    targets[0, 2:4] = IGNORED
    return Batch(rows, targets)


def replayed(replay: Replay, x: Tensor, captured: Any) -> Tensor:
    for index in range(replay.n_layers):
        x = replay.layer(index, x, captured)
    return x


@zoo.each_family()
def test_loss_is_the_one_that_the_model_states(family: str) -> None:
    model, given = zoo.make(family), batch(family)
    labels = given.targets if family in zoo.MASKED else given.targets.roll(1, dims=1)  # the model shifts them itself
    with torch.no_grad():
        own = float(model(input_ids=given.tokens, labels=labels).loss)
    replay = Replay(model)
    captured = replay.capture(given)
    x = replayed(replay, captured.streams[0].expand(2, -1, -1, -1), captured)
    found = replay.losses(x, given).sum(dim=1) / replay.count(given).sum()
    torch.testing.assert_close(found, torch.full_like(found, own), rtol=1e-6, atol=0)
    assert replay.check(given) < 1e-6


@zoo.each_family()
def test_streams_and_logits(family: str) -> None:
    model, given = zoo.make(family, torch.float64), batch(family)
    last: list[Tensor] = []
    zoo.layers_of(model)[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        out = model(input_ids=given.tokens, output_hidden_states=True, use_cache=False)
        after_norm = model.base_model(input_ids=given.tokens).last_hidden_state
    captured = Replay(model).capture(given)
    assert len(captured.streams) == zoo.N_LAYERS + 1
    for stream, own in zip(captured.streams, [*out.hidden_states[:-1], last[0]], strict=True):
        assert torch.equal(stream, own)
    replay = Replay(model)
    x = replayed(replay, captured.streams[0][None], captured)
    torch.testing.assert_close(replay.normed(x[0]), after_norm, rtol=0, atol=FLOAT32_NORMS)
    torch.testing.assert_close(replay.logits(x[0]), out.logits, rtol=0, atol=FLOAT32_NORMS)
    torch.testing.assert_close(
        replay.losses(x, given)[0], zoo.loss_per_sequence(out.logits, given.targets), rtol=FLOAT32_NORMS, atol=0
    )


@zoo.each_family()
def test_variants_do_not_see_each_other(family: str) -> None:
    replay, given = Replay(zoo.make(family, torch.float64)), batch(family)
    captured = replay.capture(given)
    noise = torch.randn(3, *captured.streams[1].shape, generator=torch.Generator().manual_seed(1)).double()
    variants = captured.streams[1] + noise
    for index in range(replay.n_layers):
        together = replay.layer(index, variants, captured)
        for variant, found in zip(variants, together, strict=True):
            torch.testing.assert_close(
                found, replay.layer(index, variant[None], captured)[0], rtol=0, atol=FLOAT32_NORMS
            )


@pytest.mark.parametrize("name", [name for name in SPECS if name not in KEY_MASKS])
def test_our_own_models(name: str) -> None:
    model = zoo.make_own(name)
    rows = torch.randint(SPECS[name].vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    given = Batch.causal(rows)
    streams: list[Tensor] = []

    def record(layer: int, site: str, x: Tensor) -> None:
        if site == "resid_post":
            streams.append(x)

    with torch.no_grad():
        logits, after_norm = model(rows, record), model.hidden(rows)
    replay = Replay(model)
    captured = replay.capture(given)
    assert all(torch.equal(a, b) for a, b in zip(captured.streams, streams, strict=True))
    x = replayed(replay, captured.streams[0].expand(2, -1, -1, -1), captured)
    torch.testing.assert_close(replay.logits(x[1]), logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(replay.normed(x[1]), after_norm, rtol=0, atol=1e-10)
    assert replay.check(given) < 1e-12


def test_a_chunked_head_gives_the_same_losses() -> None:
    model = zoo.make("gemma2", torch.float64)
    few, given = Replay(model, Limits(16 * 2 * 12 * zoo.VOCABULARY)), batch(n_tokens=30)
    assert few.limits.head_tokens(zoo.VOCABULARY) == 16
    captured = few.capture(given)
    whole = Replay(model).losses(captured.streams[-1][None], given)
    torch.testing.assert_close(few.losses(captured.streams[-1][None], given), whole, rtol=1e-13, atol=0)
    few.limits = Limits(70 * 2 * 12 * zoo.VOCABULARY)  # two rows and a part of one
    torch.testing.assert_close(few.losses(captured.streams[-1][None], given), whole, rtol=1e-13, atol=0)


@zoo.each_family("llama", "gemma3", "deepseek_v3", "bert")
def test_gradients_are_those_of_the_models_own_pass(family: str) -> None:
    model, given = zoo.make(family, torch.float64), batch(family)
    replay = Replay(model)
    captured = replay.capture(given)
    own: list[Tensor] = []
    layer = zoo.layers_of(model)[1]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: own.append(args[0].requires_grad_())),
        layer.register_forward_hook(lambda _, __, out: own.append(out[0] if isinstance(out, tuple) else out)),
    ]
    model(input_ids=given.tokens)
    for hook in hooks:
        hook.remove()
    direction = torch.randn(2, *own[0].shape, generator=torch.Generator().manual_seed(1)).double()
    x = captured.streams[1].expand(2, -1, -1, -1).clone().requires_grad_()
    (found,) = torch.autograd.grad((replay.layer(1, x, captured) * direction).sum(), x)
    for variant in range(2):
        (expected,) = torch.autograd.grad((own[1] * direction[variant]).sum(), own[0], retain_graph=True)
        torch.testing.assert_close(found[variant], expected, rtol=0, atol=FLOAT32_NORMS)


@zoo.each_family(*zoo.FEW)
def test_bfloat16(family: str) -> None:
    """To one unit in the last place of the loss: the head's rows are in other groups, nothing else differs."""
    replay = Replay(zoo.make(family, torch.bfloat16))
    assert replay.dtype is torch.bfloat16
    assert replay.check(batch(family)) < 2**-8


def test_special_tokens_change_nothing() -> None:
    """A padding id is one more token, and a mask token rescales ESM's embedding in the pass of its own batch."""
    for family in ("llama", "bert", "esm"):
        rows = zoo.tokens()
        rows[0, -3:] = zoo.VOCABULARY - 1
        rows[1, 2] = 3
        assert Replay(zoo.make(family)).check(Batch(rows, rows)) < 1e-6


def test_arguments_of_each_sequence_go_with_their_variants() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: Tensor, shift: Tensor) -> tuple[Tensor]:
            return (hidden_states + shift.sin() * hidden_states.roll(1, 1),)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(zoo.VOCABULARY, 8)
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            shift = tokens.double().mean(dim=1)[:, None, None].float()
            for layer in self.layers:
                (x,) = layer(hidden_states=x, shift=shift)
            return x @ self.embed.weight.T

    given = batch()
    assert Replay(Model()).check(given) < 1e-6
    one = given.rows(slice(0, 1))
    assert Replay(Model()).check(one) < 1e-6


def test_arguments_with_as_many_entries_as_there_are_sequences_are_not_theirs() -> None:
    """MPT's bias (heads, 1, T) goes to every layer; with 4 heads its 4 entries are not those of 4 sequences."""
    config = zoo.t.MptConfig(vocab_size=zoo.VOCABULARY, d_model=zoo.WIDTH, n_layers=zoo.N_LAYERS, n_heads=4)
    model, rows = zoo.enlarged(zoo.t.MptForCausalLM(config)).double(), zoo.tokens(4, 10)
    replay = Replay(model)
    captured = replay.capture(Batch.causal(rows))
    x = replayed(replay, captured.start.expand(2, -1, -1, -1), captured)
    for variant in x:
        torch.testing.assert_close(replay.logits(variant), zoo.logits(model, rows), rtol=0, atol=FLOAT32_NORMS)


def one_line(error: pytest.ExceptionInfo[ArgumentError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def odd(name: str) -> nn.Module:
    t, d = zoo.t, zoo.DECODER
    small = dict(vocab_size=zoo.VOCABULARY, d_model=32, num_layers=3, num_heads=4, d_ff=48, d_kv=8)
    per_layer = dict(vocab_size_per_layer_input=96, hidden_size_per_layer_input=4, laurel_rank=4)
    shared = dict(num_kv_shared_layers=0, head_dim=8, intermediate_size=[48] * 3)
    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    models = {
        "gemma3n": lambda: t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**d | shared | per_layer)),
        "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**zoo.COMMON, intermediate_size=48, embedding_size=32)),
        "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=96, d_model=32, n_layer=3, n_head=4, d_inner=48)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**small)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**vit)),
        "linear": lambda: nn.Linear(3, 3),
    }
    return models[name]()


@pytest.mark.parametrize(
    "name,parts",
    [
        ("gemma3n", ["'Gemma3nForCausalLM' is without a list of layers, each taking as its stream (B, T, D)"]),
        ("albert", ["'AlbertForMaskedLM' is without a list of layers"]),
        ("xlnet", ["'XLNetLMHeadModel' is without a list of layers"]),
        ("t5", ["'T5ForConditionalGeneration' is without a pass on token ids alone (", "a decoder or an encoder"]),
        ("vit", ["'ViTModel' is without a pass on token ids alone ("]),
        ("linear", ["'Linear' is without a pass on token ids alone ("]),
    ],
)
def test_models_that_cannot_be_taken_apart_are_refused(name: str, parts: list[str]) -> None:
    with pytest.raises(ArgumentError) as error:
        Replay(odd(name))
    one_line(error, *parts, "expected a decoder or an encoder")


def test_models_whose_layers_cannot_be_stacked_are_refused() -> None:
    with pytest.raises(ArgumentError) as error:
        Replay(zoo.make("bloom")).check(batch())
    one_line(error, "'BloomForCausalLM' is without layers that take more sequences than the pass they are of")


@pytest.mark.parametrize("name", KEY_MASKS)
def test_random_masks_of_keys_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Replay(zoo.make_own(name)).check(Batch.causal(torch.arange(18).reshape(2, 9) % SPECS[name].vocab_size))
    one_line(error, "attention.key_mask_density=", " is a random mask, drawn anew in every pass", "expected 1")


def test_layers_that_draw_random_numbers_are_refused() -> None:
    model = zoo.make("llama")
    zoo.layers_of(model)[1].register_forward_hook(lambda _, args, output: output + 9 * torch.randn_like(output))
    with pytest.raises(ArgumentError) as error:
        Replay(model).check(batch())
    one_line(error, "is replayed with a loss of ", "expected layers that depend on nothing but their arguments")


def test_layers_that_see_the_whole_batch_are_refused() -> None:
    """Half as much capacity, twice the sequences: a mixture that drops tokens would do the same."""
    model = zoo.make("llama")
    layer = zoo.layers_of(model)[1]
    layer.register_forward_hook(lambda _, args, output: output - output.mean(dim=0, keepdim=True) * len(output))
    with pytest.raises(ArgumentError, match="is replayed with a loss of"):
        Replay(model).check(batch())


def test_an_encoder_without_a_head_has_streams_but_no_loss() -> None:
    model = zoo.t.BertModel(zoo.CONFIGS["bert"](), add_pooling_layer=False)
    replay = Replay(model)
    assert not replay.has_loss
    assert len(replay.capture(batch()).streams) == zoo.N_LAYERS + 1
    assert replay.check(batch()) < 1e-6
    with pytest.raises(ArgumentError) as error:
        replay.require_loss("causal")
    one_line(error, "'BertModel' is without logits (causal)", "expected a model with a language-model head")


@zoo.each_family("llama", "gemma3", "esm", "gpt2")
def test_models_without_a_head_are_checked(family: str) -> None:
    body = zoo.make(family).base_model
    assert Replay(body).check(batch()) < 1e-6
    zoo.layers_of(body)[1].register_forward_hook(
        lambda _, __, out: (out[0] * len(out[0]), *out[1:]) if isinstance(out, tuple) else out * len(out)
    )
    with pytest.raises(ArgumentError, match=r"is replayed with last hidden states that are .* of their size from its"):
        Replay(body).check(batch())


def test_layers_that_hand_on_more_than_the_stream_are_refused() -> None:
    """T5's first layer makes the bias of positions that all later ones add to their attention."""
    small = dict(vocab_size=zoo.VOCABULARY, d_model=32, num_layers=3, num_heads=4, d_ff=48, d_kv=8)
    with pytest.raises(ArgumentError) as error:
        Replay(zoo.enlarged(zoo.t.T5EncoderModel(zoo.t.T5Config(**small)))).check(batch())
    one_line(error, "'T5EncoderModel' is replayed with last hidden states that are ")


def test_what_is_not_finite_behind_the_layers_is_named() -> None:
    model = zoo.make("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ArgumentError) as error:
        Replay(model).check(batch())
    one_line(error, "loss=nan is what the head gives of finite streams")


def test_no_target_is_said() -> None:
    given = batch()
    given.targets[:2] = IGNORED
    with pytest.raises(ArgumentError) as error:
        Replay(zoo.make("llama")).check(given)
    one_line(error, "targets=0 is too few for a loss")


@pytest.mark.parametrize("place,where", [(None, "first after the embedding"), (1, "first after layer 2")])
def test_the_first_layer_that_is_not_finite_is_named(place: int | None, where: str) -> None:
    model = zoo.make("llama")
    with torch.no_grad():
        if place is None:
            model.get_input_embeddings().weight[50] = float("nan")
        else:
            zoo.layers_of(model)[place].mlp.down_proj.weight.fill_(float("nan"))
    rows = zoo.tokens()
    rows[1, 3] = 50
    with pytest.raises(ArgumentError) as error:
        _ = Replay(model).capture(Batch.causal(rows)).streams
    one_line(error, "activations='NaN or infinite'", where)


def test_a_model_is_left_as_it_was() -> None:
    model = zoo.make("gemma3")
    before = zoo.logits(model, zoo.tokens())
    replay = Replay(model)
    replay.check(batch())
    assert torch.equal(zoo.logits(model, zoo.tokens()), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_that_a_layer_was_given_stays() -> None:
    model = zoo.make("llama")
    layer = zoo.layers_of(model)[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    given, logits = layer.forward, zoo.logits(model, zoo.tokens())
    assert Replay(model).check(batch()) < 1e-6
    assert vars(layer)["forward"] is given
    assert torch.equal(zoo.logits(model, zoo.tokens()), logits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@zoo.each_family()
def test_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    model = zoo.make(family, dtype).cuda()
    given = batch(family)
    assert Replay(model).check(Batch(given.tokens.cuda(), given.targets.cuda())) < (
        1e-5 if dtype.itemsize == 4 else 2e-2
    )
