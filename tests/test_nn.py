"""uml_fast.nn: its example as it stands, against plain PyTorch, and each module's edges."""

from __future__ import annotations

import copy
import textwrap

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from uml_fast import nn
from uml_fast.config import ConfigError


def example() -> str:
    """The code of the module's docstring."""
    _, _, rest = (nn.__doc__ or "").partition("::\n\n")
    return textwrap.dedent(rest.partition("\n\nWeights")[0])


def plain_encoder(network: torch.nn.Module) -> torch.nn.TransformerEncoder:
    """torch.nn.TransformerEncoder with the weights of ours (pre-norm, GELU)."""
    blocks = list(network.blocks)  # type: ignore[arg-type]
    layer = torch.nn.TransformerEncoderLayer(
        64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(
        layer, len(blocks), copy.deepcopy(network.final_norm), enable_nested_tensor=False
    )
    for own, block in zip(encoder.layers, blocks, strict=True):
        own.self_attn.in_proj_weight = copy.deepcopy(block.qkv.weight)
        own.self_attn.in_proj_bias = copy.deepcopy(block.qkv.bias)
        own.self_attn.out_proj = copy.deepcopy(block.out)
        own.linear1, own.linear2 = copy.deepcopy(block.up), copy.deepcopy(block.down)
        own.norm1, own.norm2 = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2)
    return encoder


def plain_means(encoder: torch.nn.Module, tokens: list[Tensor]) -> Tensor:
    """Padded samples through torch's encoder, the mean over the valid rows."""
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(x) for x in tokens])
    is_padding = torch.arange(padded.shape[1]) >= lengths[:, None]
    hidden = encoder(padded, src_key_padding_mask=is_padding)
    kept = torch.where(is_padding[..., None], 0.0, hidden)
    return kept.sum(1) / lengths[:, None]


def test_example_trains_a_step_that_equals_plain_pytorch() -> None:
    torch.manual_seed(0)
    sounds = [torch.randn(n, 40) for n in (9, 1, 4)]
    texts = [torch.randint(256, (n, 1), dtype=torch.int32) for n in (5, 12)]
    labels = {"sound_labels": torch.tensor([0, 2, 1]), "text_labels": torch.tensor([1, 2])}
    names = {"torch": torch, "nn": nn, "cross_entropy": cross_entropy,
             "sounds": sounds, "texts": texts, **labels}  # fmt: skip
    make, step = example().split("tokens = ", 1)
    exec(make, names)
    stems, encoder, head = (copy.deepcopy(names[n]) for n in ("stems", "encoder", "head"))
    exec("tokens = " + step, names)

    theirs = plain_encoder(encoder.network)
    audio, text = stems["audio"].modality, stems["text"].modality
    tokens = [torch.nn.functional.linear(x, audio.stem.weight, audio.stem.bias) for x in sounds]
    v = plain_means(theirs, tokens)
    w = plain_means(
        theirs, [text.stem.weight[x[:, 0].long()] + text.position[: len(x)] for x in texts]
    )
    loss = cross_entropy(v @ head.weight.T, labels["sound_labels"])
    loss = loss + cross_entropy(w @ head.weight.T, labels["text_labels"])
    torch.testing.assert_close(names["loss"], loss)
    loss.backward()
    plain = [p for m in (stems, theirs, head) for p in m.parameters()]
    torch.optim.AdamW([p for p in plain if p.grad is not None]).step()
    trained = names["encoder"].network
    torch.testing.assert_close(trained.blocks[0].up.weight, theirs.layers[0].linear1.weight)
    torch.testing.assert_close(names["head"].weight, head.weight)
    torch.testing.assert_close(names["stems"]["audio"].modality.stem.weight, audio.stem.weight)
    assert not torch.equal(head.weight, names["torch"].zeros(()))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_that_of_torch(is_causal: bool) -> None:
    torch.manual_seed(0)
    ours = nn.SegmentAttention(24, 3, is_causal=is_causal)
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = ours.out.weight, ours.out.bias
    samples = [torch.randn(n, 24) for n in (5, 1, 17)]
    for x, y in zip(samples, ours(nn.pack(samples)).unpack(), strict=True):
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if is_causal else None
        expected, _ = theirs(x[None], x[None], x[None], attn_mask=mask)
        torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_mode_and_the_random_state() -> None:
    config = nn.TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, dropout=0.5)
    for module in (nn.TransformerEncoder(config), nn.SegmentAttention(16, 2, dropout=0.5)):
        x = nn.pack([torch.randn(6, 16)])

        def drawn(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return module(x).rows  # noqa: B023

        assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
        module.eval()
        assert torch.equal(drawn(1), drawn(2))


def test_join_and_unpack_keep_every_sample() -> None:
    batches = [nn.pack([torch.randn(n, 3) for n in lengths]) for lengths in ((4, 1), (2,), (7, 7))]
    joined = nn.join(batches)
    assert joined.max_len == 7 and joined.offsets.tolist() == [0, 4, 5, 7, 14, 21]
    for got, expected in zip(
        joined.unpack(), [x for b in batches for x in b.unpack()], strict=True
    ):
        assert torch.equal(got, expected)
    assert joined.position().tolist() == [0, 1, 2, 3, 0, 0, 1, *range(7), *range(7)]


def test_stem_normalises_with_what_it_was_fitted_to() -> None:
    stem = nn.Stem(nn.FeaturesConfig(name="x", size=3, standardise=True), 8, torch.bfloat16)
    raw = nn.pack([5 + 2 * torch.randn(50, 3), torch.full((1, 3), 5.0)])
    stem.fit(raw)
    rows = raw.rows
    expected = (rows - rows.mean(0)) / rows.std(0, correction=0)
    linear = stem.modality.stem
    got = stem(raw).rows
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.float(), torch.nn.functional.linear(expected, linear.weight, linear.bias),
        rtol=2e-2, atol=2e-2,
    )  # fmt: skip


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"sample 1 is \[0, 3\]"):
        nn.pack([torch.zeros(1, 3), torch.zeros(0, 3)])
    with pytest.raises(ValueError, match="no samples"):
        nn.pack([])
    stem = nn.Stem(nn.TextConfig(name="text", vocabulary=10, positions=4), 8)
    with pytest.raises(ConfigError, match=r"rows of int64\[1\], the stem takes int32\[1\]"):
        stem(nn.pack([torch.zeros(2, 1, dtype=torch.long)]))
    with pytest.raises(ConfigError, match="longest sample has 5 rows"):
        stem(nn.pack([torch.zeros(5, 1, dtype=torch.int32)]))
    config = nn.TransformerConfig(width=8, layers=1, heads=2, feed_forward=8)
    with pytest.raises(ConfigError, match="a stem has no encoder"):
        nn.Stem(nn.TextConfig(name="text", vocabulary=10, encoder=config), 8)
