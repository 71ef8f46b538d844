"""What a run costs before it is started: memory, operations, traffic and time of a step on a rank.

Time is a sum of what cannot overlap and a maximum over what can (docs/scaling.md):
``compute = products / product rate + attention + activation traffic / bandwidth + optimiser``,
``step = max(compute + communication that backward does not hide, loading)``.

Legend: T tokens of a rank's step, D width, L layers, N tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from uml_fast.config import require
from uml_fast.cost.flops import linear_flops

GEMM_SHARE = 0.8
"""Part of the datasheet's dense rate that large bf16 products reach (H200: 790 of 989 TFLOP/s)."""
BANDWIDTH_SHARE = 0.9
"""Part of the datasheet's memory bandwidth that streaming kernels reach (H200: 4.3 of 4.8 TB/s)."""
CROSSINGS = 4
"""Times that activations cross the memory in forward and backward, with norms, activation function
and residuals fused."""
STATE_BYTES = 16
"""Bytes per parameter that training holds: weight, gradient and two moments, all fp32."""
BETWEEN = 1.1
"""Memory of a rank over that of states and activations: a tenth for what is between."""
WHOLE_PART = 0.5
"""Part of a rank's memory that weights, gradients and moments may fill before they are cut, or cut
again between forward and backward; the rest is activations."""
OPTIMIZER_TRAFFIC = 28
"""Bytes per parameter and step: weight, two moments and gradient read, three of them written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One accelerator, from its datasheet."""

    flops: float
    """Dense bf16 operations per second."""
    bytes_per_s: float
    """Bandwidth of its memory."""
    reached: float = GEMM_SHARE
    """Part of ``flops`` that large products reach."""
    reached_bandwidth: float = BANDWIDTH_SHARE
    """Part of ``bytes_per_s`` that streaming kernels reach."""
    memory_gib: float
    """Memory that a process can use."""
    link_bytes_per_s: float
    """To the other chips of its node, one direction."""
    network_bytes_per_s: float
    """To other nodes, one direction, for each chip."""


CHIPS = {
    "H200": Chip(
        flops=989e12, bytes_per_s=4.8e12, memory_gib=139, link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "H100": Chip(
        flops=989e12, bytes_per_s=3.35e12, memory_gib=79, link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "A100": Chip(
        flops=312e12, bytes_per_s=2.04e12, memory_gib=79, link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
    ),
    "B200": Chip(
        flops=2250e12, bytes_per_s=8e12, memory_gib=178, link_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
    ),
    "L40S": Chip(
        flops=362e12, bytes_per_s=0.864e12, memory_gib=44, link_bytes_per_s=32e9,
        network_bytes_per_s=12.5e9,
    ),
}  # fmt: skip
"""Known chips; networks as their makers' eight-chip servers have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One modality of the mix."""

    name: str
    share: float
    """Part of the tokens, relative to the others."""
    tokens: float
    """Tokens of a sample (N), the mean."""
    inputs: int
    """Features of a token at the stem; 0: a table look-up."""
    stored_bytes: float
    """Bytes of a sample on the disk, the mean."""
    raw_bytes: float
    """Bytes of a sample that cross to the device."""
    decode_s: float
    """Core-seconds that reading and decoding a sample take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The shared backbone and what is beside it."""

    width: int
    layers: int
    feed_forward: int
    classes: int = 1000
    causal: bool = False
    gated: bool = False

    def parameters(self, streams: tuple[Stream, ...], table_rows: int = 0) -> int:
        """Weights of backbone, stems and head; ``table_rows`` are those of embedding tables."""
        d, ffn = self.width, self.feed_forward
        layer = 4 * d * d + (2 + self.gated) * d * ffn + 9 * d + ffn
        stems = sum(s.inputs * d + d for s in streams)
        return self.layers * layer + stems + (table_rows + self.classes + 2) * d

    def products(self, tokens: int, streams: tuple[Stream, ...]) -> float:
        """Operations of forward and backward in linear maps, for ``tokens`` of the mix."""
        d = self.width
        layer = linear_flops(tokens, d, 4 * d)
        layer += (2 + self.gated) * linear_flops(tokens, d, self.feed_forward)
        total = 3.0 * self.layers * layer
        for s, part in zip(streams, shares(streams), strict=True):
            rows = tokens * part
            total += 2 * 2 * rows * s.inputs * d  # raw input takes no gradient
            total += 3 * 2 * rows / s.tokens * d * self.classes
        return total

    def moved(self, dtype_bytes: int) -> float:
        """Bytes of activations of a token: 18 per feature and 4 per hidden feature at two bytes."""
        return self.layers * (9 * self.width + 2 * self.feed_forward) * dtype_bytes

    def kept(self, dtype_bytes: int) -> float:
        """Bytes of a token that forward keeps for backward.

        Of a pre-norm layer: two residuals in fp32; queries, keys, values, what attention gives,
        two inputs of norms' branches and their outputs in the dtype; the hidden layer before and
        behind its activation. Counted over what autograd saves (tests/cost/test_scaling.py).
        """
        features = 2 * 4 + 8 * dtype_bytes
        return self.layers * (features * self.width + 2 * dtype_bytes * self.feed_forward)

    def attention(self, stream: Stream, tokens: float) -> float:
        """Operations of forward between the tokens of each sample of a modality."""
        seen = 0.5 if self.causal else 1.0
        return 4 * self.layers * self.width * tokens * stream.tokens * seen


def shares(streams: tuple[Stream, ...]) -> list[float]:
    """Part of the tokens of each stream; they sum to 1."""
    total = sum(s.share for s in streams)
    return [s.share / total for s in streams]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where it runs."""

    chip: Chip
    gpus: int
    """Ranks."""
    nodes: int = 1
    cores_per_node: int = 96
    """CPU cores for loading."""
    strategy: str = "ddp"
    """ddp: whole models on every rank; fsdp: weights, gradients and moments in parts."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, f"gpus is {self.gpus}; it must be >= 1")
        require(
            self.nodes >= 1 and self.gpus % self.nodes == 0,
            f"{self.gpus} GPUs cannot be divided over {self.nodes} nodes",
        )

    @property
    def bus_bytes_per_s(self) -> float:
        """Bandwidth of a ring over all ranks: the slowest link that it crosses."""
        if self.gpus == 1:
            return float("inf")
        if self.nodes == 1:
            return self.chip.link_bytes_per_s
        return min(
            self.chip.link_bytes_per_s, self.chip.network_bytes_per_s * self.gpus / self.nodes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A step of one rank; times in seconds, memory in bytes."""

    parameters: int
    flops: float
    """Useful operations of the step."""
    products_s: float
    attention_s: float
    traffic_s: float
    """Norms, activations and residuals."""
    optimizer_s: float
    communication_s: float
    """In all, hidden or not."""
    exposed_s: float
    """Communication that backward does not hide."""
    loading_s: float
    """Reading and decoding the step's samples on this rank's part of the cores."""
    states_bytes: float
    """Weights, gradients, moments."""
    activations_bytes: float
    samples: dict[str, float]
    """Samples of each modality in the step."""
    stored_bytes: float
    """Of the step's samples on the disk."""

    @property
    def compute_s(self) -> float:
        """Time of the device without waiting for others."""
        return self.products_s + self.attention_s + self.traffic_s + self.optimizer_s

    @property
    def step_s(self) -> float:
        """Time of the step."""
        return max(self.compute_s + self.exposed_s, self.loading_s)

    @property
    def binds(self) -> str:
        """What the step's time is made of most; what to change first."""
        if self.loading_s > self.compute_s + self.exposed_s:
            return "loading"
        parts = {
            "matrix products": self.products_s, "attention": self.attention_s,
            "memory bandwidth": self.traffic_s, "the optimiser": self.optimizer_s,
            "communication": self.exposed_s,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])

    @property
    def memory_bytes(self) -> float:
        """Memory of the rank: states, activations and what is between."""
        return BETWEEN * (self.states_bytes + self.activations_bytes)


def stays_gathered(parameters: int, parts: int, memory_bytes: float) -> bool:
    """Whether a rank of fsdp keeps all gathered weights from forward until backward.

    They then cross once a step instead of twice. ``parts`` are the ranks that hold a model
    together, ``memory_bytes`` is the memory of one.
    """
    return (STATE_BYTES / parts + 4) * parameters <= WHOLE_PART * memory_bytes


def predict(
    network: Network, streams: tuple[Stream, ...], cluster: Cluster, tokens: int,
    table_rows: int = 0, dtype_bytes: int = 2,
) -> Prediction:  # fmt: skip
    """The step of one rank of ``tokens`` tokens.

    Raises:
        ConfigError: no stream, or no token.
    """
    require(len(streams) >= 1, "the mix is empty; name a modality")
    require(tokens >= 1, f"tokens is {tokens}; it must be >= 1")
    chip = cluster.chip
    rate, bandwidth = chip.reached * chip.flops, chip.reached_bandwidth * chip.bytes_per_s
    products = network.products(tokens, streams)
    attention, attention_s = 0.0, 0.0
    for s, part in zip(streams, shares(streams), strict=True):
        forward = network.attention(s, tokens * part)
        attention += 3 * forward
        # operations per byte: 4 N N D over 8 N D forward; backward recomputes, 10 over 16
        attention_s += forward / min(rate, s.tokens / 2 * bandwidth)
        attention_s += 2.5 * forward / min(rate, s.tokens * 0.625 * bandwidth)
    parameters = network.parameters(streams, table_rows)
    parts = cluster.gpus if cluster.strategy == "fsdp" else 1
    states = STATE_BYTES * parameters / parts
    gathered = parts > 1 and stays_gathered(parameters, parts, chip.memory_gib * (1 << 30))
    communication = _communication(parameters, cluster, gathered)
    traffic_s = CROSSINGS * network.moved(dtype_bytes) * tokens / bandwidth
    backward_s = 2 / 3 * (products / rate + traffic_s)
    samples = {s.name: tokens * p / s.tokens for s, p in zip(streams, shares(streams), strict=True)}
    cores = cluster.cores_per_node * cluster.nodes / cluster.gpus
    return Prediction(
        parameters=parameters,
        flops=products + attention,
        products_s=products / rate,
        attention_s=attention_s,
        traffic_s=traffic_s,
        optimizer_s=OPTIMIZER_TRAFFIC * parameters / parts / bandwidth,
        communication_s=communication,
        exposed_s=max(0.0, communication - backward_s),
        loading_s=sum(samples[s.name] * s.decode_s for s in streams) / cores,
        states_bytes=states + dtype_bytes * parameters / parts + 4 * parameters * gathered,
        activations_bytes=network.kept(dtype_bytes) * tokens,
        samples=samples,
        stored_bytes=sum(samples[s.name] * s.stored_bytes for s in streams),
    )


def _communication(parameters: int, cluster: Cluster, gathered: bool) -> float:
    """Seconds of a ring, all fp32: gradients summed (ddp); weights gathered twice, gradients
    scattered (fsdp), or once where they stay ``gathered``."""
    if cluster.gpus == 1:
        return 0.0
    ring = (cluster.gpus - 1) / cluster.gpus / cluster.bus_bytes_per_s
    crossings = 2 if cluster.strategy == "ddp" or gathered else 3
    return crossings * 4 * parameters * ring
