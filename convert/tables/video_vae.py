"""The video autoencoder's tensors, named as below `vae.` in the published checkpoint."""

from convert.mapping import CONV3D, Table

# Every convolution is wrapped in one that pads in time, hence `.conv`.
CONVS: Table = {"conv1.conv": ("conv1", CONV3D), "conv2.conv": ("conv2", CONV3D)}
ENDS: Table = {"conv_in.conv": ("conv_in", CONV3D), "conv_out.conv": ("conv_out", CONV3D)}
# A block is either residual layers or one change of resolution, whose own convolution is wrapped.
BLOCK: Table = {"res_blocks.{m}": ("layers.{m}", CONVS), "conv.conv": ("conv", CONV3D)}
VIDEO_VAE: Table = {
    "encoder": ("encoder", {**ENDS, "down_blocks.{n}": ("blocks.{n}", BLOCK)}),
    "decoder": ("decoder", {**ENDS, "up_blocks.{n}": ("blocks.{n}", BLOCK)}),
    "per_channel_statistics": (
        "statistics",
        {"mean-of-means": ("mean", "d -> d"), "std-of-means": ("std", "d -> d")},
    ),
}

# Other statistics of the training data, in some files (`channel`, `mean-of-stds` and others); nothing reads them.
# A shell pattern: it speaks of what no rule above takes.
SKIP = ("per_channel_statistics.*",)
