"""The latent upscalers' tensors, named as in their own published files: one table a kind of upsampler."""

from convert.mapping import CONV2D, CONV3D, GROUP_NORM, Table

RES_BLOCK: Table = {
    "conv1": ("conv1", CONV3D),
    "norm1": ("norm1", GROUP_NORM),
    "conv2": ("conv2", CONV3D),
    "norm2": ("norm2", GROUP_NORM),
}
COMMON: Table = {
    "initial_conv": ("conv_in", CONV3D),
    "initial_norm": ("norm_in", GROUP_NORM),
    "res_blocks.{n}": ("blocks.{n}", RES_BLOCK),
    "post_upsample_res_blocks.{n}": ("blocks_out.{n}", RES_BLOCK),
    "final_conv": ("conv_out", CONV3D),
}
SPATIAL: Table = {**COMMON, "upsampler.0": ("upsample.conv", CONV2D)}
RATIONAL: Table = {
    **COMMON,
    "upsampler.conv": ("upsample.conv", CONV2D),
    "upsampler.blur_down.kernel": ("upsample.blur", "one single h w -> h w one single"),
}
TEMPORAL: Table = {**COMMON, "upsampler.0": ("upsample.conv", CONV3D)}

# The key is `UpscalerConfig.kind`.
UPSCALERS: dict[str, Table] = {"spatial": SPATIAL, "rational": RATIONAL, "temporal": TEMPORAL}

SKIP: tuple[str, ...] = ()
