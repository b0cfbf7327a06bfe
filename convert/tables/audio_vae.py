"""The audio autoencoder's tensors, named as below `audio_vae.` in the published checkpoint."""

from convert.mapping import CONV2D, Table

# Every causal convolution is wrapped, hence `.conv`.
RES_BLOCK: Table = {
    "conv1.conv": ("conv1", CONV2D),
    "conv2.conv": ("conv2", CONV2D),
    "nin_shortcut.conv": ("shortcut", CONV2D),
}
ENDS: Table = {
    "conv_in.conv": ("conv_in", CONV2D),
    "conv_out.conv": ("conv_out", CONV2D),
    "mid.block_1": ("mid.blocks.0", RES_BLOCK),
    "mid.block_2": ("mid.blocks.1", RES_BLOCK),
}
AUDIO_VAE: Table = {
    "encoder": (
        "encoder",
        {
            **ENDS,
            "down.{n}.block.{m}": ("levels.{n}.blocks.{m}", RES_BLOCK),
            "down.{n}.downsample.conv": ("levels.{n}.resample", CONV2D),
        },
    ),
    "decoder": (
        "decoder",
        {
            **ENDS,
            "up.{n}.block.{m}": ("levels.{n}.blocks.{m}", RES_BLOCK),
            "up.{n}.upsample.conv.conv": ("levels.{n}.resample", CONV2D),
        },
    ),
    "per_channel_statistics": (
        "statistics",
        {"mean-of-means": ("mean", "d -> d"), "std-of-means": ("std", "d -> d")},
    ),
}

# Other statistics of the training data, in some files (`channel`, `mean-of-stds` and others); nothing reads them.
# A shell pattern: it speaks of what no rule above takes.
SKIP = ("per_channel_statistics.*",)
