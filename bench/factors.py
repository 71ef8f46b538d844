"""Where the speed of a step comes from: the baseline turned into uml_fast one change at a time.

    python -m bench.factors            writes bench/results/factors_<machine>.json

Every variant but the last is stock PyTorch. In the packed ones the linear maps, norms and losses
see the rows of the samples alone; stock attention has no ragged form with a backward on the CPU, so
its inputs are padded and its output is packed again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import harness
from bench.plain import PlainStep
from bench.shapes import STEP_SHAPES, Samples, StepShape, draw_batches, valid_tokens
from bench.step import DROPOUT, UmlFastStep, check_equal_losses
from tests.plain_uml import PlainUml, adam, pad, valid_mask


@dataclass(frozen=True, slots=True)
class PackedInput:
    """Samples of one or more modalities without padding, and the place of their rows with it."""

    rows: dict[str, Tensor]
    """Per modality (R, E)."""
    place_T: Tensor
    """int64 (T,) index of each row in (N * L) of the padded array."""
    samples: int
    """N, samples over all modalities."""
    longest: int
    """L, rows of the longest sample."""
    has_next: dict[str, Tensor]
    """Per modality int64, the rows that have a next row."""


def pack_input(batch: Samples) -> PackedInput:
    """Concatenate the samples of a batch."""
    padded = {m: pad(s) for m, s in batch.items()}
    longest = max(len(x) for x, _ in padded.values())
    masks = {m: valid_mask(lengths, longest).T for m, (_, lengths) in padded.items()}
    rows = {m: x.transpose(0, 1)[masks[m][:, : len(x)]] for m, (x, _) in padded.items()}
    follows = {m: (mask.cumsum(1) < mask.sum(1, keepdim=True))[mask] for m, mask in masks.items()}
    every = torch.cat(list(masks.values()))
    return PackedInput(
        rows,
        every.flatten().nonzero()[:, 0],
        len(every),
        longest,
        {m: f.nonzero()[:, 0] for m, f in follows.items()},
    )


class PackedStep:
    """A training step of the plain model's weights on packed rows; returns the summed loss.

    Args:
        one_pass: all modalities go through the encoder together, else one after the other.
        bf16: matrix products under autocast.
        fused_adam: the one-kernel optimiser.
    """

    def __init__(
        self,
        batches: Sequence[Samples],
        width: int,
        dropout: float,
        *,
        one_pass: bool,
        bf16: bool,
        fused_adam: bool,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        sizes = {m: s[0].shape[1] for m, s in batches[0].items()}
        self.model = PlainUml(sizes, width, dropout=dropout).train()
        self.optimizer = (
            torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
            if fused_adam
            else adam(self.model)
        )
        self.bf16 = bf16
        groups = [[b] if one_pass else [{m: s} for m, s in b.items()] for b in batches]
        self._batches = itertools.cycle([[pack_input(part) for part in group] for group in groups])

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = [loss for part in next(self._batches) for loss in self.losses(part)]
        torch.stack(losses).sum().backward()
        self.optimizer.step()
        return sum(v.item() for v in losses)

    def losses(self, packed: PackedInput) -> list[Tensor]:
        """The loss of each modality of the input."""
        model = self.model
        x = torch.cat([model.stems[m](rows) for m, rows in packed.rows.items()])
        x = F.linear(x, model.conv.weight[..., 0])
        for layer in model.encoder.layers:
            x = layer.norm1(x + layer.dropout1(_attend(layer.self_attn, x, packed)))
            hidden = layer.dropout(F.relu(layer.linear1(x)))
            x = layer.norm2(x + layer.dropout2(layer.linear2(hidden)))
        out = []
        for (m, rows), part in zip(
            packed.rows.items(), x.split([len(r) for r in packed.rows.values()]), strict=True
        ):
            at = packed.has_next[m]
            out.append(F.mse_loss(model.decoders[m](part[at]).float(), rows[at + 1]))
        return out


def _attend(attention: nn.MultiheadAttention, x_TD: Tensor, packed: PackedInput) -> Tensor:
    D = x_TD.shape[1]
    qkv = F.linear(x_TD, attention.in_proj_weight, attention.in_proj_bias)
    padded = qkv.new_zeros(packed.samples * packed.longest, 3 * D).index_copy(
        0, packed.place_T, qkv
    )
    q, k, v = padded.view(packed.samples, packed.longest, 3, attention.num_heads, -1).permute(
        2, 0, 3, 1, 4
    )
    p = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    mixed = mixed.transpose(1, 2).reshape(-1, D).index_select(0, packed.place_T)
    return attention.out_proj(mixed)


def steps(shape: StepShape, batches: Sequence[Samples]) -> dict[str, Callable[[], float]]:
    """The variants from the baseline to uml_fast, one change after another."""

    def packed(one_pass: bool, bf16: bool, fused_adam: bool) -> PackedStep:
        return PackedStep(
            batches, shape.width, DROPOUT, one_pass=one_pass, bf16=bf16, fused_adam=fused_adam
        )

    return {
        "release: padded, fp32, two passes": PlainStep(batches, shape.width, DROPOUT),
        "without padding": packed(one_pass=False, bf16=False, fused_adam=False),
        "one pass for both modalities": packed(one_pass=True, bf16=False, fused_adam=False),
        "one-kernel optimiser": packed(one_pass=True, bf16=False, fused_adam=True),
        "bf16 products (autocast)": packed(one_pass=True, bf16=True, fused_adam=True),
        "uml_fast's kernels": UmlFastStep(batches, shape, DROPOUT),
    }


def main() -> None:
    """Measure every variant at every shape of the step bench and write the rows."""
    rows = []
    for shape in STEP_SHAPES:
        batches = draw_batches(shape)
        check_equal_losses(shape, batches)
        variants = steps(shape, batches)
        rounds = dict.fromkeys(variants, max(3, shape.plain_rounds // 2))
        load_before = round(os.getloadavg()[0], 2)
        seconds = harness.measure(variants, rounds=rounds, warmup_rounds=1)
        tokens = sum(valid_tokens(b) for b in batches) / len(batches)
        before = None
        for variant, times in seconds.items():
            spread = harness.quantiles(times)
            row = {
                "shape": "mosi",
                "d": shape.width,
                "batch": shape.batch,
                "variant": variant,
                "valid_tokens_per_s": round(tokens / spread["p50_ms"] * 1000, 1),
                "factor": round(before / spread["p50_ms"], 3) if before else 1.0,
                **spread,
                "rounds": len(times),
                "dropout": DROPOUT,
                "threads": torch.get_num_threads(),
                "load_before": load_before,
            }
            before = spread["p50_ms"]
            rows.append(row)
            speed = f"{row['valid_tokens_per_s']:>10,.0f} valid tokens/s"
            print(f"d={shape.width:<4} {variant:<36} {speed}  x {row['factor']:.2f}", flush=True)
    harness.write_rows(harness.RESULTS / f"factors_{harness.machine_name()}.json", rows)


if __name__ == "__main__":
    main()
