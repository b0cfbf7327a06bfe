"""The configuration of LTX-2.3 as its files carry it: for packages that have lost their metadata, and for planning.

Source: the `config` entry of the metadata of ltx-2.3-22b-*.safetensors and of the upscalers' files, and `config.json`
of google/gemma-3-12b-it; keys and values as published.
"""

from typing import Any


def _res(layers: int) -> list[Any]:
    return ["res_x", {"num_layers": layers}]


def _resample(kind: str, multiplier: int) -> list[Any]:
    return [kind, {"multiplier": multiplier}]


def _generator(channels: int, rates: list[int], kernels: list[int]) -> dict[str, Any]:
    return {
        "upsample_initial_channel": channels,
        "upsample_rates": rates,
        "upsample_kernel_sizes": kernels,
        "resblock": "AMP1",
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "stereo": True,
        "use_tanh_at_final": False,
        "activation": "snakebeta",
        "use_bias_at_final": False,
    }


LTX_2_3: dict[str, Any] = {
    "transformer": {
        "_class_name": "AVTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_eps": 1e-6,
        "qk_norm": "rms_norm",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20],
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "causal_temporal_positioning": True,
        "use_audio_video_cross_attention": True,
        "av_cross_ada_norm": True,
        "use_embeddings_connector": True,
        "connector_positional_embedding_max_pos": [4096],
        "connector_norm_output": True,
        "use_middle_indices_grid": True,
        "apply_gated_attention": True,
        "connector_apply_gated_attention": True,
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
        "caption_proj_input_norm": False,
        "caption_proj_before_connector": True,
        "cross_attention_adaln": True,
        "text_encoder_norm_type": "per_token_rms",
        "rope_type": "split",
        "frequencies_precision": "float64",
        "num_layers": 48,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "in_channels": 128,
        "out_channels": 128,
        "cross_attention_dim": 4096,
        "caption_channels": 3840,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_out_channels": 128,
        "audio_cross_attention_dim": 2048,
        "connector_num_layers": 8,
        "connector_num_attention_heads": 32,
        "connector_attention_head_dim": 128,
        "audio_connector_num_attention_heads": 32,
        "audio_connector_attention_head_dim": 64,
        "connector_num_learnable_registers": 128,
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "encoder_blocks": [
            _res(4),
            _resample("compress_space_res", 2),
            _res(6),
            _resample("compress_time_res", 2),
            _res(4),
            _resample("compress_all_res", 2),
            _res(2),
            _resample("compress_all_res", 1),
            _res(2),
        ],
        "decoder_blocks": [
            _res(4),
            _resample("compress_space", 2),
            _res(6),
            _resample("compress_time", 2),
            _res(4),
            _resample("compress_all", 1),
            _res(2),
            _resample("compress_all", 2),
            _res(2),
        ],
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "encoder_base_channels": 128,
        "decoder_base_channels": 128,
        "spatial_padding_mode": "zeros",
    },
    "audio_vae": {
        "model": {
            "params": {
                "ddconfig": {
                    "double_z": True,
                    "mel_bins": 64,
                    "z_channels": 8,
                    "in_channels": 2,
                    "out_ch": 2,
                    "ch": 128,
                    "ch_mult": [1, 2, 4],
                    "num_res_blocks": 2,
                    "attn_resolutions": [],
                    "mid_block_add_attention": False,
                    "norm_type": "pixel",
                    "causality_axis": "height",
                },
                "sampling_rate": 16000,
            }
        },
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        },
    },
    "vocoder": {
        "vocoder": _generator(1536, [5, 2, 2, 2, 2, 2], [11, 4, 4, 4, 4, 4]),
        "bwe": {
            **_generator(512, [6, 5, 2, 2, 2], [12, 11, 4, 4, 4]),
            "apply_final_activation": False,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "hop_length": 80,
            "n_fft": 512,
            "win_size": 512,
            "num_mels": 64,
        },
    },
}

NUM_HIDDEN_STATES = 49  # of Gemma 3 12B: embeddings and 48 layers

GEMMA_3_12B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
}


def _upscaler(mid_channels: int, *, temporal: bool) -> dict[str, Any]:
    return {
        "_class_name": "LatentUpsampler",
        "in_channels": 128,
        "mid_channels": mid_channels,
        "num_blocks_per_stage": 4,
        "dims": 3,
        "spatial_upsample": not temporal,
        "temporal_upsample": temporal,
    }


UPSCALERS: dict[str, dict[str, Any]] = {
    "upscaler_spatial_x2": _upscaler(1024, temporal=False) | {"spatial_scale": 2.0, "rational_resampler": False},
    "upscaler_temporal_x2": _upscaler(512, temporal=True),
}
