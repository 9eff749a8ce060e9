"""Weights of the smallest model, in memory: no two axes alike."""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_qwen3vlmoe import ModelArgs

E, H, I, L = 3, 6, 5, 2  # noqa: E741 - experts, hidden, expert width, layers: no two axes alike
ATTENTION = {
    "self_attn.q_proj.weight": (8, H),
    "self_attn.k_proj.weight": (4, H),
    "self_attn.v_proj.weight": (4, H),
    "self_attn.o_proj.weight": (H, 8),
    "self_attn.q_norm.weight": (4,),
    "self_attn.k_norm.weight": (4,),
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
    "mlp.gate.weight": (E, H),
}


def config(**changes) -> dict:
    text = {
        "hidden_size": H,
        "num_hidden_layers": L,
        "intermediate_size": 7,
        "moe_intermediate_size": I,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_experts": E,
        "num_experts_per_tok": 2,
        "vocab_size": 11,
        "rope_theta": 5000000,
    }
    return {"model_type": "qwen3_vl_moe", "tie_word_embeddings": False, "text_config": text | changes}


def args(**changes) -> ModelArgs:
    return ModelArgs.from_dict(config(**changes))


def experts(layer: int) -> tuple[mx.array, mx.array]:
    """A layer's experts as the official release stores them."""
    mx.random.seed(layer)
    return mx.random.normal((E, H, 2 * I)), mx.random.normal((E, I, H))


def official(prefix: str = "model.language_model.") -> dict[str, mx.array]:
    weights = {
        "model.visual.patch_embed.proj.weight": mx.ones((2, 2)),
        f"{prefix}embed_tokens.weight": mx.ones((11, H)),
        f"{prefix}norm.weight": mx.ones((H,)),
        "lm_head.weight": mx.ones((11, H)),
    }
    for layer in range(L):
        for name, shape in ATTENTION.items():
            weights[f"{prefix}layers.{layer}.{name}"] = mx.ones(shape)
        gate_up, down = experts(layer)
        weights[f"{prefix}layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        weights[f"{prefix}layers.{layer}.mlp.experts.down_proj"] = down
    return weights
