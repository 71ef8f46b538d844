"""Operation counts against hand counts and torch's counter, and the rates they are divided by."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from uml_fast.cost.flops import (
    datasheet_peak,
    linear_flops,
    measured_peak,
    training_flops,
    transformer_flops,
)


def test_hand_count_of_one_small_layer():
    # 3 rows of width 4: qkv and output 2*3*4*16, ffn 2*(2*3*4*8), attention 2 products of 2*3*3*4
    assert transformer_flops(4, 1, 8, [3]) == 384 + 384 + 144
    assert transformer_flops(4, 5, 8, [3]) == 5 * 912
    # a causal row sees 1, 2, 3 rows
    assert transformer_flops(4, 1, 8, [3], causal=True) == 384 + 384 + 4 * 6 * 4
    # gated: three maps of the ffn instead of two
    assert transformer_flops(4, 1, 8, [3], gated=True) == 384 + 3 * 192 + 144
    assert linear_flops(10, 20, 40) == 2 * 10 * 20 * 40


def test_segments_attend_within_themselves():
    whole, halves = transformer_flops(16, 2, 32, [20]), transformer_flops(16, 2, 32, [10, 10])
    assert whole - halves == 2 * 4 * 16 * (20**2 - 2 * 10**2)
    assert transformer_flops(16, 2, 32, []) == 0


class Tiny(nn.Module):
    """Stem, two layers of plain attention and feed-forward, decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.decoder = nn.Linear(12, 16), nn.Linear(16, 12)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 40), nn.Linear(40, 16)]
            )
            for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        for qkv, out, up, down in self.layers:
            q, k, v = qkv(x).chunk(3, -1)
            x = x + out((q @ k.T).softmax(-1) @ v)
            x = x + down(up(x).relu())
        return self.decoder(x)


def test_forward_and_backward_agree_with_torchs_counter():
    rows, model = 9, Tiny()
    stem, decoder = linear_flops(rows, 12, 16), linear_flops(rows, 16, 12)
    forward = stem + transformer_flops(16, 2, 40, [rows]) + decoder
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(rows, 12))
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(rows, 12)).sum().backward()
    assert counter.get_total_flops() == training_flops(forward, first_layer=stem)
    assert out.shape == (rows, 12)


def test_measured_peak_is_a_rate_of_this_machine_and_measured_once():
    import time

    cpu = torch.device("cpu")
    rate = measured_peak(cpu, torch.float32)
    a = torch.randn(512, 512)
    torch.mm(a, a)
    start = time.perf_counter()
    torch.mm(a, a)
    one = 2 * 512**3 / (time.perf_counter() - start)
    assert one / 20 < rate < 1e14
    start = time.perf_counter()
    assert measured_peak(cpu, torch.float32) == rate
    assert time.perf_counter() - start < 0.01


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, 756.0),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362.0),
        ("NVIDIA L4", torch.bfloat16, 121.0),
    ],
)
def test_datasheet_peak_knows_the_variant(name, dtype, tflops):
    assert datasheet_peak(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AMD EPYC 9654", torch.bfloat16),
        ("NVIDIA H200", torch.float64),
        ("NVIDIA GeForce 9999", torch.bfloat16),
    ],
)
def test_datasheet_peak_does_not_guess(name, dtype):
    assert datasheet_peak(name, dtype) is None
