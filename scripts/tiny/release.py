"""The configuration of the trained miniature release: LTX-2.3's architecture with few and narrow layers.

Clips of the little world have 33 frames at 16 frames per second, 128 x 96 pixels (or upright) in the first stage.
"""

from typing import Any

FPS = 16.0
NUM_FRAMES = 33
WIDTH, HEIGHT = 128, 96


def _res(num_layers: int = 1) -> list[Any]:
    return ["res_x", {"num_layers": num_layers}]


# Where pixels lie densest there are no residual blocks: a CPU would spend all of its time on them.
VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 48,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 1}],
        _res(),
        ["compress_time_res", {"multiplier": 1}],
        _res(),
        ["compress_all_res", {"multiplier": 1}],
        _res(),
        ["compress_all_res", {"multiplier": 1}],
        _res(2),
    ],
    "decoder_blocks": [
        ["compress_space", {"multiplier": 1}],
        _res(),
        ["compress_time", {"multiplier": 1}],
        _res(),
        ["compress_all", {"multiplier": 2}],
        _res(),
        ["compress_all", {"multiplier": 1}],
        _res(2),
    ],
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "normalize_latent_channels": False,
    "encoder_base_channels": 48,
    "decoder_base_channels": 8,
    "spatial_padding_mode": "zeros",
}
