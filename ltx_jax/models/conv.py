"""3 x 3 x 3 convolutions over (time, height, width) of video, channels last.

Source: Video VAE of LTX-Video (https://arxiv.org/abs/2501.00103); `causal_conv3d.py` in Lightricks/LTX-2.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

Video = Float[Array, "batch frames height width channels"]
# What stands before the first and behind the last frame: two copies of the first, and nothing; one copy of each;
# one frame of zeros on either side.
TimePadding = Literal["causal", "copies", "zeros"]


def pad_time(x: Video, padding: TimePadding) -> Float[Array, "batch frames+2 height width channels"]:
    """Adds the two frames that a kernel of three needs to keep the number of frames."""
    if padding == "zeros":
        return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    first, last = x[:, :1], x[:, -1:]
    return jnp.concatenate([first, first, x] if padding == "causal" else [first, x, last], axis=1)


def _conv_native(
    x: Float[Array, "batch frames height width in"], kernel: Float[Array, "time 3 3 in out"]
) -> Float[Array, "batch frames_out height width out"]:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _conv_folded(
    x: Float[Array, "batch frames height width in"], kernel: Float[Array, "time 3 3 in out"]
) -> Float[Array, "batch frames_out height width out"]:
    """The same as one 2-D convolution a frame over the channels of the three frames that the kernel sees."""
    batch, taps = len(x), len(kernel)
    frames = x.shape[1] - taps + 1
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(taps)], axis=-1)
    y = jax.lax.conv_general_dilated(
        rearrange(x, "b f h w i -> (b f) h w i"),
        rearrange(kernel, "t h w i o -> h w (t i) o"),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(y, "(b f) h w o -> b f h w o", b=batch)


def conv3d(
    x: Float[Array, "batch frames height width in"], kernel: Float[Array, "time 3 3 in out"]
) -> Float[Array, "batch frames_out height width out"]:
    """Convolution in x's dtype: no padding in time, one zero on every side in space.

    XLA's 3-D convolution on a CPU took 4.0 times as long as the folded one for 9 frames of 16 x 16 x 32, 1.8 times for
    16 frames of 32 x 32 x 128 and 11 times for 9 frames of 64 x 64 x 8 (float32; bfloat16: 4.9, 1.6 and 8.5). Three
    2-D convolutions added up took about as long as the folded one, but their partial sums must be held in float32; one
    convolution sums in float32 by itself. Folding triples its input in memory, so accelerators, whose libraries have
    3-D convolutions for channels last, run the native one.
    """
    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=_conv_folded, default=_conv_native)


class Conv3d(nnx.Module):
    """A 3 x 3 x 3 convolution that keeps frames, height and width."""

    def __init__(self, in_channels: int, out_channels: int, *, padding: TimePadding, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.padding: TimePadding = padding
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 3, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(
        self, x: Float[Array, "batch frames height width in"]
    ) -> Float[Array, "batch frames height width out"]:
        return conv3d(pad_time(x, self.padding), self.kernel[...]) + self.bias[...].astype(x.dtype)
