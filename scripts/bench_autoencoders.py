"""The video decoder and the vocoder at the width of LTX-2.3, beside diffusers' classes.

    python scripts/bench_autoencoders.py --json autoencoders.json
    python scripts/bench_autoencoders.py --latents 3 8 8 --mel-frames 100 --only vocoder

Random weights, the same for both; that both compute the same is checked before anything is timed. Our vocoder runs in
float32 whatever its weights are (bfloat16 is audible). `pip install -e .[parity]` installs the peer; without it our own
cases run alone.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.tables.video_vae import VIDEO_VAE
from convert.tables.vocoder import VOCODER
from ltx_jax.config import VideoVAEConfig, VocoderConfig
from ltx_jax.models.video_vae import VideoDecoder
from ltx_jax.models.vocoder import Vocoder
from ltx_jax.presets import LTX_2_3
from scripts._bench import (
    Peers,
    Seconds,
    as_json,
    draw_weights,
    interleaved,
    machine,
    relative_error,
    show,
    write_json,
)
from scripts.parity_cases import fill

Weights = dict[str, np.ndarray]
Run = Callable[[], Any]
DECODER: Any = VIDEO_VAE["decoder"][1]
# In float32, over some tens of convolutions and, in the vocoder, of sines.
AGREE = 1e-4


def our_run(model: nnx.Module, dtype: str, x: np.ndarray) -> Run:
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda a: a.astype(dtype), state)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return partial(run, state, jnp.asarray(x, dtype))


def their_run(torch: Any, model: Any, dtype: str, x: np.ndarray) -> Run:
    model = model.to(getattr(torch, dtype)).eval()
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(getattr(torch, dtype))

    def run() -> Any:
        with torch.inference_mode():
            return model(tensor)

    return run


def load(
    torch: Any, model: Any, weights: Weights, rename: Callable[[str], str], *, absent: tuple[str, ...] = ()
) -> Any:
    """Fills a module; `absent` are those of its tensors that ours does not have."""
    state = {rename(name): torch.from_numpy(np.array(value)) for name, value in weights.items()}
    result = model.load_state_dict(state, strict=False)
    if result.unexpected_keys or set(result.missing_keys) - set(absent):
        raise SystemExit(f"diffusers' class has other tensors than ours: {result}")
    return model


# ---------------------------------------------------------------- diffusers' classes


def their_decoder(modules: list[Any], config: VideoVAEConfig, weights: Weights) -> Any:
    """Ours is a list of stages, residual blocks and upsamplings in turn; theirs a middle, then pairs of both."""
    torch, autoencoder = modules
    stages = config.decoder_blocks[::-1]
    if [stage.kind == "res_x" for stage in stages] != [i % 2 == 0 for i in range(len(stages))]:
        raise SystemExit("diffusers' decoder takes residual blocks and upsamplings in turn")
    upsamplings = stages[1::2]
    kinds = {(1, 2, 2): "spatial", (2, 1, 1): "temporal", (2, 2, 2): "spatiotemporal"}
    channels, widths = config.decoder_channels, []
    for stage in upsamplings:
        widths.append(channels)
        channels //= stage.multiplier
    model = autoencoder.LTX2VideoDecoder3d(
        in_channels=config.latent_channels,
        out_channels=config.pixel_channels,
        block_out_channels=tuple(widths[::-1]),
        spatio_temporal_scaling=(True,) * len(upsamplings),
        layers_per_block=tuple(stage.num_layers for stage in stages[::2])[::-1],
        upsample_type=tuple(kinds[stage.stride] for stage in upsamplings),
        patch_size=config.patch_size,
        is_causal=False,
        inject_noise=False,
        upsample_residual=False,
        upsample_factor=tuple(stage.multiplier for stage in upsamplings)[::-1],
        spatial_padding_mode="zeros",
    )

    def rename(name: str) -> str:
        found = re.fullmatch(r"up_blocks\.(\d+)\.(res_blocks|conv)\.(.*)", name)
        if found is None:
            return name
        number, what, rest = int(found[1]), found[2], found[3]
        if number == 0:
            return f"mid_block.resnets.{rest}"
        inside = f"resnets.{rest}" if what == "res_blocks" else f"upsamplers.0.conv.{rest}"
        return f"up_blocks.{(number - 1) // 2}.{inside}"

    return load(torch, model, weights, rename)


def their_vocoder(modules: list[Any], config: VocoderConfig, weights: Weights) -> Any:
    torch, vocoder = modules

    def settings(generator: Any, mel_bins: int, prefix: str = "") -> dict[str, Any]:
        named = {
            "in_channels": config.audio_channels * mel_bins,
            "hidden_channels": generator.initial_channels,
            "out_channels": config.audio_channels,
            "upsample_kernel_sizes": list(generator.upsample_kernels),
            "upsample_factors": list(generator.upsample_rates),
            "resnet_kernel_sizes": list(generator.resblock_kernels),
            "resnet_dilations": [list(d) for d in generator.resblock_dilations],
        }
        return {f"{prefix}{name}": value for name, value in named.items()}

    model = vocoder.LTX2VocoderWithBWE(
        **settings(config.base, config.mel_bins),
        final_act_fn="clamp",
        **settings(config.bwe, config.bwe_mel_bins, "bwe_"),
        filter_length=config.bwe_n_fft,
        hop_length=config.bwe_hop_length,
        window_length=config.bwe_n_fft,
        num_mel_channels=config.bwe_mel_bins,
        input_sampling_rate=config.input_sample_rate_hz,
        output_sampling_rate=config.sample_rate_hz,
    )
    renamed = {
        "conv_pre": "conv_in",
        "ups": "upsamplers",
        "resblocks": "resnets",
        "act_post": "act_out",
        "conv_post": "conv_out",
    }

    def rename(name: str) -> str:
        name = name.replace("downsample.lowpass.filter", "downsample.filter")
        return ".".join(renamed.get(part, part) for part in name.split("."))

    return load(torch, model, weights, rename, absent=("mel_stft.stft_fn.inverse_basis",))


# ---------------------------------------------------------------- the command


def bench(
    ours: Callable[[], nnx.Module],
    theirs: Callable[[], Any] | None,
    torch: Any,
    x: np.ndarray,
    dtypes: tuple[list[str], list[str]],
    rounds: int,
) -> dict[str, Seconds]:
    """Seconds of both in each of their dtypes, after a check in float32 that both compute the same."""
    cases = {f"ours, {dtype}": our_run(ours(), dtype, x) for dtype in dtypes[0]}
    if theirs is not None:
        cases |= {f"diffusers, {dtype}": their_run(torch, theirs(), dtype, x) for dtype in dtypes[1]}
    if {"ours, float32", "diffusers, float32"} <= set(cases):
        other = np.moveaxis(cases["diffusers, float32"]().float().numpy(), 1, -1)
        error = relative_error(other, np.asarray(cases["ours, float32"]()))
        if error > AGREE:
            raise SystemExit(f"diffusers' class computes something else than ours: {error:.2g} relative")
        print(f"diffusers and ours differ by {error:.1e} (relative, float32)")
    return interleaved(cases, rounds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": int, "nargs": 3, "metavar": ("FRAMES", "ROWS", "COLUMNS")}
    parser.add_argument("--latents", **size, default=[3, 8, 8], help="3 8 8 are 17 frames of 256 x 256 pixels")
    parser.add_argument("--mel-frames", type=int, default=50, help="100 are a second of sound")
    parser.add_argument("--channels", type=int, default=128, help="base channels of the decoder; 128 is LTX-2.3")
    parser.add_argument("--vocoder-channels", type=int, nargs=2, default=[1536, 512], help="of both generators")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", choices=["video", "vocoder"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the machine, sizes and all figures here")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(1)
    peers, results = Peers(), {}
    if args.only != "vocoder":
        config = VideoVAEConfig.from_metadata(LTX_2_3["vae"] | {"decoder_base_channels": args.channels})
        weights = draw_weights(lambda rngs: VideoDecoder(config, rngs=rngs), DECODER)
        modules = peers.load("torch", "diffusers.models.autoencoders.autoencoder_kl_ltx2")
        results[f"video decoder, {' x '.join(map(str, args.latents))} latents"] = bench(
            lambda: fill(lambda: VideoDecoder(config, rngs=nnx.Rngs(0)), DECODER, weights),
            None if not modules else partial(their_decoder, modules, config, weights),
            modules and modules[0],
            rng.standard_normal((1, *args.latents, config.latent_channels), dtype=np.float32),
            (args.dtypes, args.dtypes),
            args.rounds,
        )
    if args.only != "video":
        sections = {
            name: LTX_2_3["vocoder"][name] | {"upsample_initial_channel": channels}
            for name, channels in zip(("vocoder", "bwe"), args.vocoder_channels, strict=True)
        }
        vocoder_config = VocoderConfig.from_metadata(sections)
        weights = draw_weights(lambda rngs: Vocoder(vocoder_config, rngs=rngs), VOCODER)
        weights["mel_stft.mel_basis"] = np.abs(weights["mel_stft.mel_basis"])  # a logarithm is taken of it
        for name in weights:
            if name.endswith("filter"):
                weights[name][:] = 1 / weights[name].size  # low-pass
            elif name.endswith("conv_post.weight"):
                weights[name] *= np.float32(0.1)  # into [-1, 1], where waveforms are
        modules = peers.load("torch", "diffusers.pipelines.ltx2.vocoder")
        results[f"vocoder, {args.mel_frames} mel frames"] = bench(
            lambda: fill(lambda: Vocoder(vocoder_config, rngs=nnx.Rngs(0)), VOCODER, weights),
            None if not modules else partial(their_vocoder, modules, vocoder_config, weights),
            modules and modules[0],
            rng.standard_normal((1, args.mel_frames, vocoder_config.mel_bins, 2), dtype=np.float32),
            (["float32"], args.dtypes),
            args.rounds,
        )
    for title, seconds in results.items():
        show(title, seconds)
    peers.say()
    report = {"machine": machine(("diffusers", "torch")), "rounds": args.rounds, "sizes": vars(args) | {"json": None}}
    write_json(args.json, report | {"seconds": {title: as_json(seconds) for title, seconds in results.items()}})


if __name__ == "__main__":
    main()
