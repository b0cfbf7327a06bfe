"""The text encoder's tensors, named as below `language_model.model.` (or `model.language_model.`, or `model.`)."""

from convert.mapping import Table

LINEAR: Table = {"weight": ("kernel", "o i -> i o")}
NORM: Table = {"weight": ("weight", "d -> d")}
ATTENTION: Table = {
    "q_proj": ("to_q", LINEAR),
    "k_proj": ("to_k", LINEAR),
    "v_proj": ("to_v", LINEAR),
    "o_proj": ("to_out", LINEAR),
    "q_norm": ("q_norm", NORM),
    "k_norm": ("k_norm", NORM),
}
FEED_FORWARD: Table = {
    "gate_proj": ("gate", LINEAR),
    "up_proj": ("proj_in", LINEAR),
    "down_proj": ("proj_out", LINEAR),
}
LAYER: Table = {
    "self_attn": ("attn", ATTENTION),
    "mlp": ("ff", FEED_FORWARD),
    "input_layernorm": ("pre_attn_norm", NORM),
    "post_attention_layernorm": ("post_attn_norm", NORM),
    "pre_feedforward_layernorm": ("pre_ff_norm", NORM),
    "post_feedforward_layernorm": ("post_ff_norm", NORM),
}
GEMMA: Table = {
    "embed_tokens.weight": ("embed.embedding", "v d -> v d"),
    "layers.{n}": ("layers.{n}", LAYER),
    "norm": ("norm", NORM),
}

# Whole names in the published files, beside the text model: images are not read.
SKIP = (
    "vision_tower.*",
    "model.vision_tower.*",
    "multi_modal_projector.*",
    "model.multi_modal_projector.*",
    "lm_head.weight",  # where stored, it repeats the embedding
    "language_model.lm_head.weight",
)
