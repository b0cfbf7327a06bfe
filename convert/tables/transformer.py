"""The transformer's tensors, named as below `model.diffusion_model.` in the published checkpoint."""

from convert.mapping import LINEAR, NORM, Table

ATTENTION: Table = {
    **{name: (name, LINEAR) for name in ("to_q", "to_k", "to_v", "to_gate_logits")},
    **{name: (name, NORM) for name in ("q_norm", "k_norm")},
    "to_out.0": ("to_out", LINEAR),
}
FEED_FORWARD: Table = {"net.0.proj": ("proj_in", LINEAR), "net.2": ("proj_out", LINEAR)}
ADALN: Table = {
    "emb.timestep_embedder.linear_1": ("linear_1", LINEAR),
    "emb.timestep_embedder.linear_2": ("linear_2", LINEAR),
    "linear": ("linear", LINEAR),
}
TABLE = "rows d -> rows d"
BLOCK: Table = {
    "attn1": ("video.self_attn", ATTENTION),
    "attn2": ("video.text_attn", ATTENTION),
    "ff": ("video.ff", FEED_FORWARD),
    "scale_shift_table": ("video.scale_shift_table", TABLE),
    "prompt_scale_shift_table": ("video.prompt_scale_shift_table", TABLE),
    "scale_shift_table_a2v_ca_video": ("video.cross_scale_shift_table", TABLE),
    "audio_attn1": ("audio.self_attn", ATTENTION),
    "audio_attn2": ("audio.text_attn", ATTENTION),
    "audio_ff": ("audio.ff", FEED_FORWARD),
    "audio_scale_shift_table": ("audio.scale_shift_table", TABLE),
    "audio_prompt_scale_shift_table": ("audio.prompt_scale_shift_table", TABLE),
    "scale_shift_table_a2v_ca_audio": ("audio.cross_scale_shift_table", TABLE),
    "audio_to_video_attn": ("audio_to_video", ATTENTION),
    "video_to_audio_attn": ("video_to_audio", ATTENTION),
}
TRANSFORMER: Table = {
    "patchify_proj": ("video.patchify", LINEAR),
    "adaln_single": ("video.adaln", ADALN),
    "prompt_adaln_single": ("video.prompt_adaln", ADALN),
    "av_ca_video_scale_shift_adaln_single": ("video.cross_adaln", ADALN),
    "av_ca_a2v_gate_adaln_single": ("video.cross_gate_adaln", ADALN),
    "scale_shift_table": ("video.scale_shift_table", TABLE),
    "proj_out": ("video.proj_out", LINEAR),
    "audio_patchify_proj": ("audio.patchify", LINEAR),
    "audio_adaln_single": ("audio.adaln", ADALN),
    "audio_prompt_adaln_single": ("audio.prompt_adaln", ADALN),
    "av_ca_audio_scale_shift_adaln_single": ("audio.cross_adaln", ADALN),
    "av_ca_v2a_gate_adaln_single": ("audio.cross_gate_adaln", ADALN),
    "audio_scale_shift_table": ("audio.scale_shift_table", TABLE),
    "audio_proj_out": ("audio.proj_out", LINEAR),
    "transformer_blocks.{n}": ("blocks.{n}", BLOCK),
}
