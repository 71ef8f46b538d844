"""Text networks of transformers: BERT, RoBERTa, GPT-2, Llama and CLIP's text tower."""

from __future__ import annotations

from typing import Any

from uml_fast.config import require
from uml_fast.modalities.text import TextConfig
from uml_fast.model.interop.images import clip_blocks
from uml_fast.model.interop.names import Entry, dense, same, transposed
from uml_fast.model.interop.network import Network, activation
from uml_fast.model.interop.stems import words
from uml_fast.model.transformer import TransformerConfig


def bert(config: Any, source: str) -> Network:
    """BERT or RoBERTa: post-norm, a norm of the embeddings, one token type, the first row pooled.

    RoBERTa counts positions from the id of its padding + 1.
    """
    is_roberta = config.model_type == "roberta"
    kind = getattr(config, "position_embedding_type", "absolute")
    require(
        kind in (None, "absolute") and not getattr(config, "add_cross_attention", False),
        f"{source}: positions of type {kind!r} or cross-attention, which the transformer has not",
    )
    first = config.pad_token_id + 1 if is_roberta else 0
    backbone = TransformerConfig(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, feed_forward=config.intermediate_size, norm="post",
        activation=activation(config.hidden_act, source), eps=config.layer_norm_eps,
        input_norm=True, pooling="first", causal=bool(config.is_decoder),
    )  # fmt: skip
    text = TextConfig(
        name="text", vocabulary=config.vocab_size,
        positions=config.max_position_embeddings - first,
    )  # fmt: skip
    ignored = r"pooler\..*|cls\..*|lm_head\..*|classifier\..*|qa_outputs\..*|.*\.position_ids"
    prefix = "roberta." if is_roberta else "bert."
    return Network(backbone, text, bert_entries(backbone, first), ignored, prefix)


def bert_entries(backbone: TransformerConfig, first: int = 0) -> list[Entry]:
    """Weights of BertModel and RobertaModel."""
    at = "embeddings"
    entries = words(
        f"{at}.word_embeddings.weight", f"{at}.position_embeddings.weight",
        f"{at}.token_type_embeddings.weight", first,
    )  # fmt: skip
    entries += dense("backbone.input_norm", f"{at}.LayerNorm")
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"encoder.layer.{i}"
        attention = f"{theirs}.attention"
        parts = [f"{attention}.self.{kind}" for kind in ("query", "key", "value")]
        entries += dense(f"{ours}.qkv", *parts) + dense(f"{ours}.out", f"{attention}.output.dense")
        entries += dense(f"{ours}.norm1", f"{attention}.output.LayerNorm")
        entries += dense(f"{ours}.up", f"{theirs}.intermediate.dense")
        entries += dense(f"{ours}.down", f"{theirs}.output.dense")
        entries += dense(f"{ours}.norm2", f"{theirs}.output.LayerNorm")
    return entries


def gpt2(config: Any, source: str) -> Network:
    """GPT-2: pre-norm, learned positions, causal, linear maps kept transposed."""
    require(
        config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.add_cross_attention,
        f"{source}: scale_attn_weights must be on, scale_attn_by_inverse_layer_idx and "
        "add_cross_attention off",
    )
    backbone = TransformerConfig(
        width=config.n_embd, layers=config.n_layer, heads=config.n_head,
        feed_forward=config.n_inner or 4 * config.n_embd,
        activation=activation(config.activation_function, source), eps=config.layer_norm_epsilon,
        causal=True,
    )  # fmt: skip
    text = TextConfig(name="text", vocabulary=config.vocab_size, positions=config.n_positions)
    entries = [same("stem.weight", "wte.weight"), same("position", "wpe.weight")]
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"h.{i}"
        entries += dense(f"{ours}.norm1", f"{theirs}.ln_1")
        entries += transposed(f"{ours}.qkv", f"{theirs}.attn.c_attn")
        entries += transposed(f"{ours}.out", f"{theirs}.attn.c_proj")
        entries += dense(f"{ours}.norm2", f"{theirs}.ln_2")
        entries += transposed(f"{ours}.up", f"{theirs}.mlp.c_fc")
        entries += transposed(f"{ours}.down", f"{theirs}.mlp.c_proj")
    entries += dense("backbone.final_norm", "ln_f")
    ignored = r"lm_head\..*|score\..*|h\.\d+\.attn\.(masked_)?bias"
    return Network(backbone, text, entries, ignored, "transformer.")


def llama(config: Any, source: str) -> Network:
    """Llama: RMS norms, rotary positions, gated feed-forward, keys and values of fewer heads."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    head_width = config.head_dim or config.hidden_size // config.num_attention_heads
    require(
        kind == "default", f"{source}: rotary positions of type {kind!r}; 'default' can be read"
    )
    require(
        head_width * config.num_attention_heads == config.hidden_size,
        f"{source}: heads of width {head_width} do not add up to {config.hidden_size}",
    )
    require(
        config.attention_bias == config.mlp_bias and config.hidden_act == "silu",
        f"{source}: attention_bias and mlp_bias differ, or hidden_act is not silu",
    )
    bias = bool(config.mlp_bias)
    backbone = TransformerConfig(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, key_heads=config.num_key_value_heads,
        feed_forward=config.intermediate_size, activation="swiglu", norm_kind="rms",
        eps=config.rms_norm_eps, bias=bias, positions="rotary",
        rotary_base=float(rope.get("rope_theta", 10000.0)), causal=True,
    )  # fmt: skip
    text = TextConfig(name="text", vocabulary=config.vocab_size, positions=0)
    entries = [same("stem.weight", "embed_tokens.weight")]
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"layers.{i}"
        parts = [f"{theirs}.self_attn.{kind}_proj" for kind in "qkv"]
        entries.append(same(f"{ours}.norm1.weight", f"{theirs}.input_layernorm.weight"))
        entries += dense(f"{ours}.qkv", *parts, bias=bias)
        entries += dense(f"{ours}.out", f"{theirs}.self_attn.o_proj", bias=bias)
        entries.append(same(f"{ours}.norm2.weight", f"{theirs}.post_attention_layernorm.weight"))
        gates = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        entries += dense(f"{ours}.up", *gates, bias=bias)
        entries += dense(f"{ours}.down", f"{theirs}.mlp.down_proj", bias=bias)
    entries.append(same("backbone.final_norm.weight", "norm.weight"))
    ignored = r"lm_head\..*|score\..*|.*\.rotary_emb\.inv_freq"
    return Network(backbone, text, entries, ignored, "model.")


def clip_text(config: Any, source: str, projection: int) -> Network:
    """CLIP's text tower, which pools the last row: the token that ends a text."""
    backbone = TransformerConfig(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, feed_forward=config.intermediate_size,
        activation=activation(config.hidden_act, source), eps=config.layer_norm_eps, causal=True,
        pooling="last", embedding=projection,
    )  # fmt: skip
    text = TextConfig(
        name="text", vocabulary=config.vocab_size, positions=config.max_position_embeddings
    )
    entries = [
        same("stem.weight", "embeddings.token_embedding.weight"),
        same("position", "embeddings.position_embedding.weight"),
        *clip_blocks(backbone),
        *dense("backbone.final_norm", "final_layer_norm"),
    ]
    if projection:
        entries.append(same("backbone.embedding.weight", "text_projection.weight"))
    ignored = r"logit_scale|vision_model\..*|visual_projection\..*|.*position_ids"
    return Network(backbone, text, entries, ignored, "text_model.")
