"""Say what a run on a cluster will take, before it is started: ``uml-fast plan --model b``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from uml_fast.cli import options, run_main
from uml_fast.config import require
from uml_fast.cost.scaling import BETWEEN, CHIPS, Cluster, Network, Prediction, Stream, predict
from uml_fast.model.transformer import vit
from uml_fast.recipes import unknown

_TEXT_ENTRIES = 32_000
"""Rows of the embedding table of text."""
_AUDIO_RATE, _AUDIO_ROW = 16_000, 1280
"""Hz, and samples of a token: 80 ms."""
_SAFE = 0.95
"""Part of the memory that a plan may fill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Say what a run on a cluster will take, before it is started: network, mix, machines.

      uml-fast plan --model b
      uml-fast plan --model l --gpus 64 --nodes 8 --strategy fsdp --train-images 1.3e6

    docs/scaling.md explains the model and compares it with what was measured.
    """

    model: Literal["ti", "s", "b", "l"] = "b"
    """Backbone of the ViT family."""
    gpu: str = "H200"
    """Kind of accelerator."""
    gpus: int = 1
    """Accelerators in all."""
    nodes: int = 1
    """Machines that they are in."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: whole models on every rank; fsdp: in parts."""
    tokens: int = 65_536
    """Token budget of a rank's step."""
    image: float = 2.0
    """Share of images in the tokens, relative to the others; 0: none."""
    text: float = 1.0
    """Share of texts."""
    audio: float = 1.0
    """Share of sounds."""
    image_px: int = 224
    """Height and width of an image, cut into patches of 16."""
    text_tokens: int = 77
    """Mean tokens of a text."""
    audio_s: float = 10.0
    """Mean seconds of a sound."""
    image_bytes: float = 110e3
    """Mean bytes of a stored image (JPEG as in ImageNet)."""
    images_per_core_s: float = 325.0
    """Images that one core reads, decodes and crops in a second."""
    cores: int = 96
    """CPU cores of a node for loading."""
    train_images: float = 0.0
    """Images to be trained on in all, for hours; 0: not said."""

    def __post_init__(self) -> None:
        require(self.gpu in CHIPS, unknown("gpu", self.gpu, CHIPS))
        positive = ("text_tokens", "audio_s", "image_bytes", "images_per_core_s", "cores")
        for name in positive:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; must be positive")
        require(
            self.image_px >= 16 and self.image_px % 16 == 0,
            f"image_px is {self.image_px}; it must be a multiple of the patch's 16",
        )
        require(
            min(self.image, self.text, self.audio) >= 0, "a share of the mix must not be negative"
        )
        plan(self)  # what it finds wrong is then said as the rest is

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The modalities of the mix."""
        pixels, samples = self.image_px**2, self.audio_s * _AUDIO_RATE
        return tuple(
            s for s in (
                Stream(
                    name="image", share=self.image, tokens=pixels / 256, inputs=768,
                    stored_bytes=self.image_bytes, raw_bytes=3 * pixels,
                    decode_s=1 / self.images_per_core_s,
                ),
                Stream(
                    name="text", share=self.text, tokens=self.text_tokens, inputs=0,
                    stored_bytes=5 * self.text_tokens, raw_bytes=4 * self.text_tokens,
                    decode_s=5e-6,
                ),
                Stream(
                    name="audio", share=self.audio, tokens=samples / _AUDIO_ROW, inputs=8 * 80,
                    stored_bytes=samples, raw_bytes=2 * samples, decode_s=samples / 60e6,
                ),
            ) if s.share > 0
        )  # fmt: skip

    @property
    def network(self) -> Network:
        """The backbone."""
        b = vit(self.model)
        return Network(width=b.width, layers=b.layers, feed_forward=b.feed_forward)

    @property
    def cluster(self) -> Cluster:
        """The machines."""
        return Cluster(
            chip=CHIPS[self.gpu], gpus=self.gpus, nodes=self.nodes, cores_per_node=self.cores,
            strategy=self.strategy,
        )  # fmt: skip


def plan(config: PlanConfig) -> Prediction:
    """The step of one rank."""
    rows = _TEXT_ENTRIES if config.text else 0
    return predict(config.network, config.streams, config.cluster, config.tokens, rows)


def describe(config: PlanConfig) -> Iterator[str]:
    """The plan in lines."""
    p, chip = plan(config), CHIPS[config.gpu]
    gib = 1 << 30
    ranks = "" if config.gpus == 1 else f" on {config.nodes} node(s), {config.strategy}"
    name = f"ViT-{config.model.upper()}"
    yield f"{name}, {p.parameters / 1e6:.1f} M parameters, {config.gpus} {config.gpu}{ranks}"
    yield (
        f"memory per GPU   {p.memory_bytes / gib:.1f} of {chip.memory_gib:.0f} GiB: weights, "
        f"gradients and moments {p.states_bytes / gib:.1f}, activations "
        f"{p.activations_bytes / gib:.1f}"
    )
    if p.memory_bytes > _SAFE * chip.memory_gib * gib:
        yield f"                 DOES NOT FIT: {_remedy(config, p)}"
        yield "                 what follows is what it would be with enough memory"
    step = p.step_s
    mfu = p.flops / step / chip.flops
    yield (
        f"step             {1000 * step:.1f} ms: products {1000 * p.products_s:.1f}, attention "
        f"{1000 * p.attention_s:.1f}, memory {1000 * p.traffic_s:.1f}, optimiser "
        f"{1000 * p.optimizer_s:.1f}, communication {1000 * p.communication_s:.1f} (not hidden "
        f"{1000 * p.exposed_s:.1f})"
    )
    yield f"what binds       {p.binds}"
    yield (
        f"rate             {config.gpus * config.tokens / step:,.0f} tokens/s, "
        f"{config.tokens / step:,.0f} per GPU; {100 * mfu:.0f} % MFU of the datasheet"
    )
    flops = ", ".join(f"{s.name} {_per_sample(config, s) / 1e9:.1f}" for s in config.streams)
    yield f"GFLOP a sample   {flops}"
    rates = ", ".join(f"{name} {config.gpus * n / step:,.0f}" for name, n in p.samples.items())
    yield f"samples/s        {rates}"
    per_node = config.gpus / config.nodes / step
    cores = p.loading_s * config.cluster.cores_per_node / step
    yield (
        f"per node         {per_node * p.stored_bytes / 1e9:.2f} GB/s from storage, {cores:.0f} of "
        f"{config.cores} cores for decoding"
    )
    if config.train_images and "image" in p.samples:
        hours = config.train_images / (config.gpus * p.samples["image"] / step) / 3600
        yield f"time             {hours:,.1f} h for {config.train_images:,.0f} images"


def _per_sample(config: PlanConfig, stream: Stream) -> float:
    tokens = round(stream.tokens)
    alone = predict(config.network, (stream,), config.cluster, tokens)
    return alone.flops


def _remedy(config: PlanConfig, p: Prediction) -> str:
    """The token budget that fits, or that sharding is needed."""
    room = _SAFE * CHIPS[config.gpu].memory_gib * (1 << 30) / BETWEEN - p.states_bytes
    fits = int(room / p.activations_bytes * config.tokens) // 1024 * 1024
    if fits >= 1024:
        return f"--tokens {fits}"
    if config.strategy == "ddp" and config.gpus > 1:
        return "use --strategy fsdp"
    return "use more GPUs with --strategy fsdp, or a smaller --model"


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.plan``; returns the exit status."""
    config = options(PlanConfig, "plan", argv)
    for line in describe(config):
        print(line)
    print(
        "an upper bound by docs/scaling.md's model (fused kernels, no launch gaps); nothing was run"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
