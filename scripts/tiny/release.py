"""The configuration of the trained miniature release: LTX-2.3's architecture with few and narrow layers.

Clips of the little world have 33 frames at 16 frames per second, 64 x 48 pixels (or upright) in the first stage and
twice that in the second. A latent stands for 16 x 16 pixels of eight frames: half the side that LTX-2.3's has.
"""

from typing import Any

from ltx_jax.checkpoint import Configs
from ltx_jax.presets import LTX_2_3

FPS = 16.0
NUM_FRAMES = 33
WIDTH, HEIGHT = 64, 48  # of the first stage
SECONDS = NUM_FRAMES / FPS
TEXT_LENGTH = 32  # tokens; the longest caption of the world has 25


def _res(num_layers: int = 1) -> list[Any]:
    return ["res_x", {"num_layers": num_layers}]


# Where pixels lie densest there are no residual blocks: a CPU would spend all of its time on them.
VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 32,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 2}],
        _res(),
        ["compress_time_res", {"multiplier": 1}],
        _res(),
        ["compress_all_res", {"multiplier": 1}],
        _res(),
        ["compress_time_res", {"multiplier": 1}],
        _res(),
    ],
    "decoder_blocks": [
        ["compress_space", {"multiplier": 1}],
        _res(),
        ["compress_time", {"multiplier": 1}],
        _res(),
        ["compress_all", {"multiplier": 2}],
        _res(),
        ["compress_time", {"multiplier": 1}],
        _res(),
    ],
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "normalize_latent_channels": False,
    "encoder_base_channels": 32,
    "decoder_base_channels": 8,
    "spatial_padding_mode": "zeros",
}

AUDIO_VAE: dict[str, Any] = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 2,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 16,
                "ch_mult": [1, 2, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "audio": {"sampling_rate": 16000, "max_wav_value": 32768.0, "stereo": True, "causal_padding": 3},
        "stft": {"filter_length": 1024, "hop_length": 320, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}

_GENERATOR: dict[str, Any] = {
    "resblock": "AMP1",
    "stereo": True,
    "activation": "snakebeta",
    "use_bias_at_final": False,
}
VOCODER: dict[str, Any] = {
    "vocoder": {
        **_GENERATOR,
        "upsample_initial_channel": 128,
        "upsample_rates": [5, 4, 4, 4],
        "upsample_kernel_sizes": [11, 8, 8, 8],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
        "use_tanh_at_final": False,
    },
    "bwe": {
        **_GENERATOR,
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 8],
        "upsample_kernel_sizes": [12, 11, 16],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 256,
        "win_size": 256,
        "num_mels": 64,
    },
}

GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": TEXT_LENGTH,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

TRANSFORMER: dict[str, Any] = {
    **LTX_2_3["transformer"],
    "positional_embedding_max_pos": [4, 512, 512],  # clips are short and small
    "audio_positional_embedding_max_pos": [4],
    "connector_positional_embedding_max_pos": [128],
    "num_layers": 4,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "cross_attention_dim": 192,
    "caption_channels": GEMMA["hidden_size"],
    "in_channels": VAE["latent_channels"],
    "out_channels": VAE["latent_channels"],
    "audio_in_channels": 32,
    "audio_num_attention_heads": 6,
    "audio_attention_head_dim": 16,
    "audio_out_channels": 32,
    "audio_cross_attention_dim": 96,
    "connector_num_layers": 1,
    "connector_num_attention_heads": 6,
    "connector_attention_head_dim": 32,
    "audio_connector_num_attention_heads": 6,
    "audio_connector_attention_head_dim": 16,
    "connector_num_learnable_registers": TEXT_LENGTH,
}

METADATA: dict[str, Any] = {
    "transformer": TRANSFORMER,
    "vae": VAE,
    "scheduler": {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "sampler": "LinearQuadratic"},
    "audio_vae": AUDIO_VAE,
    "vocoder": VOCODER,
}
UPSCALER: dict[str, Any] = {
    "_class_name": "LatentUpsampler",
    "in_channels": VAE["latent_channels"],
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": False,
}


def configs() -> Configs:
    """The configuration of every model of the release."""
    return Configs.from_metadata(
        METADATA, GEMMA, {"upscaler_spatial_x2": UPSCALER}, num_hidden_states=GEMMA["num_hidden_layers"] + 1
    )
