"""The vocoder's tensors, named as below `vocoder.` in the published checkpoint."""

from convert.mapping import CONV1D, Table

CONV1D_TRANSPOSED: Table = {"weight": ("kernel", "i o t -> t o i"), "bias": ("bias", "o -> o")}
FILTER = "one single t -> t one single"
ACTIVATION: Table = {
    "act.alpha": ("alpha", "d -> d"),
    "act.beta": ("beta", "d -> d"),
    "upsample.filter": ("up_filter", FILTER),
    "downsample.lowpass.filter": ("down_filter", FILTER),
}
RES_BLOCK: Table = {
    "convs1.{m}": ("convs1.{m}", CONV1D),
    "convs2.{m}": ("convs2.{m}", CONV1D),
    "acts1.{m}": ("acts1.{m}", ACTIVATION),
    "acts2.{m}": ("acts2.{m}", ACTIVATION),
}
GENERATOR: Table = {
    "conv_pre": ("conv_pre", CONV1D),
    "ups.{n}": ("upsamples.{n}", CONV1D_TRANSPOSED),
    "resblocks.{n}": ("blocks.{n}", RES_BLOCK),
    "act_post": ("act_post", ACTIVATION),
    "conv_post": ("conv_post", CONV1D),
}
VOCODER: Table = {
    "vocoder": ("base", GENERATOR),
    "bwe_generator": ("bwe", GENERATOR),
    "mel_stft": (
        "bwe_mel",
        {
            "stft_fn.forward_basis": ("forward_basis", "o i t -> t i o"),
            "mel_basis": ("mel_basis", "bins frequencies -> frequencies bins"),
        },
    ),
}

# The inverse transform of a library that came along; nothing reads it.
SKIP = ("mel_stft.stft_fn.inverse_basis",)
