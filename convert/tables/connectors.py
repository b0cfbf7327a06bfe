"""The tensors between text encoder and transformer, by their whole names: they stand under three prefixes."""

from convert.mapping import LINEAR, Table
from convert.tables.transformer import ATTENTION, FEED_FORWARD

CONNECTOR: Table = {
    "learnable_registers": ("registers", "n d -> n d"),
    "transformer_1d_blocks.{n}.attn1": ("blocks.{n}.attn", ATTENTION),
    "transformer_1d_blocks.{n}.ff": ("blocks.{n}.ff", FEED_FORWARD),
}
CONNECTORS: Table = {
    "text_embedding_projection.video_aggregate_embed": ("projection.video", LINEAR),
    "text_embedding_projection.audio_aggregate_embed": ("projection.audio", LINEAR),
    "model.diffusion_model.video_embeddings_connector": ("video", CONNECTOR),
    "model.diffusion_model.audio_embeddings_connector": ("audio", CONNECTOR),
}

# What a published name of this model starts with; those below `model.diffusion_model.` are not the transformer's.
PREFIXES = (
    "text_embedding_projection.",
    "model.diffusion_model.video_embeddings_connector.",
    "model.diffusion_model.audio_embeddings_connector.",
)
