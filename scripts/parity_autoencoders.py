"""Cases of the autoencoders, the audio front end, the vocoder and the latent upscalers.

Reference arrays have torch's layouts: latents and pixels `b c f h w`, audio latents and mel `b c time bins`, waveforms
`b c samples`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert.tables.video_vae import VIDEO_VAE
from ltx_jax.mel import hann_window, mel_filterbank, mel_spectrogram, resample, sinc_filters
from ltx_jax.models.upscaler import upscale
from ltx_jax.models.vocoder import antialiased_snake
from ltx_jax.tiling import Tiles, decode_planned, space_spans, time_spans
from scripts.parity_cases import AUTOENCODER, EXACT, FORWARD, Reference, Report, call, call_recorded, our_path
from scripts.parity_models import Models


def channels_last(array: np.ndarray) -> jax.Array:
    """An array `b c ...` as `b ... c`."""
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def channels_first(array: jax.Array | np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, 1)


# ------------------------------------------------------------------- video VAE


def run_video_vae(models: Models, report: Report, reference: Reference) -> None:
    stages: dict[str, list[str]] = {"encode": [], "decode": []}
    for name in reference.names("mid."):
        stages[{"enc": "encode", "dec": "decode"}[name.split(".")[0]]].append(name)
    for case in reference.groups("mid", "tiled"):
        way = case.split("_")[0]
        if way not in stages or case not in (way, f"{way}_image"):
            continue
        given, result = ("pixels", "latent") if way == "encode" else ("latent", "pixels")
        with report.case(f"video_vae/{case}", reference, f"{case}."):
            middle = {name: _vae_path(name) for name in stages[way]} if case == way else {}
            x = channels_last(reference[f"{case}.in.{given}"])
            y, records = call_recorded(models.video_vae, tuple(middle.values()), x, method=way)
            report.add(f"video_vae/{case}", channels_first(y), reference[f"{case}.out.{result}"], AUTOENCODER)
            if middle:
                theirs = {name: reference[f"mid.{name}"] for name in middle}
                ours = {name: channels_first(records[path]) for name, path in middle.items()}
                report.add(f"video_vae/{case} mid", ours, theirs, AUTOENCODER)
    if reference.names("tiled."):
        with report.case("video_vae/tiled", reference, "tiled."):
            _run_tiled(models, report, reference)


def _vae_path(name: str) -> str:
    part, _, module = name.partition(".")
    published = f"{ {'enc': 'encoder', 'dec': 'decoder'}[part] }.{module}"
    path = our_path(VIDEO_VAE, published) or our_path(VIDEO_VAE, f"{published}.conv")
    if path is None:
        raise ValueError(f"no module of the video autoencoder is called {name}")
    return path


def _run_tiled(models: Models, report: Report, reference: Reference) -> None:
    info = reference.info["tiled"]
    latents = channels_last(reference["tiled.in.latent"])
    scale = models.video_config.scale
    sizes = [info[key] // s for key, s in zip(("tile_frames", "tile_h", "tile_w"), scale, strict=True)]
    overlaps = [info[key] // s for key, s in zip(("overlap_frames", "overlap_h", "overlap_w"), scale, strict=True)]
    spans = [
        make(length, size, overlap, scale=s)
        for make, length, size, overlap, s in zip(
            (time_spans, space_spans, space_spans), latents.shape[1:4], sizes, overlaps, scale, strict=True
        )
    ]
    every = [(t, r, c) for t in spans[0] for r in spans[1] for c in spans[2]]
    masks = {f"{k}.{axis}": s.pixel_mask for k, tile in enumerate(every) for axis, s in zip("tHW", tile, strict=True)}
    report.add("video_vae/tiled masks", masks, reference.under("tiled.mask."), EXACT)
    places = {
        key: [[[part.start, part.stop] for part in (getattr(span, what) for span in tile)] for tile in every]
        for key, what in (("tiles_in_tHW", "latents"), ("tiles_out_tHW", "pixels"))
        if key in info
    }
    report.add("video_vae/tiled places", places, {key: info[key] for key in places}, 0.0)

    plan = Tiles(time=spans[0], rows=spans[1], columns=spans[2])
    chunks = list(decode_planned(lambda x: call(models.video_vae, x, method="decode"), np.asarray(latents), plan))
    if "chunks" in info:  # the reference also counts empty ones
        theirs = [n for n in info["chunks"] if n > 0]
        report.add("video_vae/tiled chunks", [chunk.shape[1] for chunk in chunks], theirs, 0.0)
    pixels = channels_first(jnp.asarray(np.concatenate(chunks, axis=1)))
    for name in reference.names("tiled.out."):
        if name == "pixels":
            ours = pixels
        else:
            stored = re.search(r"rows (\d+)::(\d+) and columns (\d+)::(\d+)", info["stored"])
            if stored is None:
                raise ValueError(f"cannot tell from {info['stored']!r} which rows and columns are stored")
            row, row_step, column, column_step = map(int, stored.groups())
            ours = pixels[..., row::row_step, column::column_step]
        report.add(f"video_vae/tiled {name}", ours, reference[f"tiled.out.{name}"], AUTOENCODER)


# ----------------------------------------------------------------------- audio


def _rate_hz(name: str) -> int:
    """The sample rate in a name such as wav48k or wav44k; the rates of compact discs are no whole kilohertz."""
    found = re.fullmatch(r"wav(\d+)k", name)
    if found is None:
        raise ValueError(f"{name} does not say a sample rate as in wav48k")
    return {11: 11025, 22: 22050, 44: 44100, 88: 88200}.get(int(found[1]), 1000 * int(found[1]))


def run_audio(models: Models, report: Report, reference: Reference) -> None:
    _run_mel(models, report, reference)
    for case in reference.groups():
        way = re.fullmatch(r"(encode|decode)\d*", case)
        if way is None:
            continue
        given, result = ("mel", "latent") if way[1] == "encode" else ("latent", "mel")
        with report.case(f"audio/{case}", reference, f"{case}."):
            y = call(models.audio_vae, channels_last(reference[f"{case}.in.{given}"]), method=way[1])
            report.add(f"audio/{case}", channels_first(y), reference[f"{case}.out.{result}"], AUTOENCODER)
    if reference.names("vocoder."):
        with report.case("audio/vocoder", reference, "vocoder."):
            _run_vocoder(models, report, reference)
    if reference.names("snake."):
        with report.case("audio/snake", reference, "snake."):
            _run_snake(report, reference)


def _run_mel(models: Models, report: Report, reference: Reference) -> None:
    config = models.audio_config
    mels = {}
    for name in dict.fromkeys(name.split(".")[0] for name in reference.names("mel.") if "." in name):
        with report.case(f"audio/mel {name}", reference, f"mel.{name}."):
            waveform = resample(channels_last(reference[f"mel.{name}.in"]), _rate_hz(name), config.sample_rate_hz)
            mels[name] = mel_spectrogram(waveform, config)
            if f"mel.{name}.resampled" in reference:
                theirs = reference[f"mel.{name}.resampled"]
                report.add(f"audio/mel {name} resampled", channels_first(waveform), theirs, FORWARD)
            report.add(f"audio/mel {name}", channels_first(mels[name]), reference[f"mel.{name}.out"], AUTOENCODER)
    if "mel.filterbank" in reference:
        report.add("audio/mel filterbank", mel_filterbank(config), reference["mel.filterbank"], EXACT)
    if "mel.window" in reference:
        theirs = reference["mel.window"]
        start = (config.n_fft - len(theirs)) // 2  # ours has zeros on both sides where it is shorter than the transform
        report.add("audio/mel window", hann_window(config)[start : start + len(theirs)], theirs, EXACT)
    if "encode_waveform.out.latent" in reference:
        with report.case("audio/encode_waveform", reference, "encode_waveform."):
            theirs = reference["encode_waveform.out.latent"]
            # Of which waveform is not said: the first whose latents have the right length.
            fitting = [n for n, mel in mels.items() if -(-mel.shape[1] // config.scale) == theirs.shape[2]]
            if not fitting:
                raise ValueError(f"no waveform has {theirs.shape[2]} latent frames")
            latents = call(models.audio_vae, mels[fitting[0]], method="encode")
            note = f"of {fitting[0]}"
            report.add("audio/encode_waveform", channels_first(latents), theirs, AUTOENCODER, note=note)


def _run_vocoder(models: Models, report: Report, reference: Reference) -> None:
    config, vocoder = models.vocoder_config, models.vocoder
    rates = config.input_sample_rate_hz, config.sample_rate_hz
    base = call(vocoder, channels_last(reference["vocoder.in.mel"]), method="base_waveform")
    paths = "bwe_mel", "bwe"
    waveform, records = call_recorded(vocoder, paths, base, method="extend_bandwidth")
    for name in reference.names("vocoder.out."):
        report.add(f"audio/vocoder {name}", channels_first(waveform), reference[f"vocoder.out.{name}"], AUTOENCODER)
    theirs = reference.under("vocoder.mid.")
    if theirs:
        padded = jnp.pad(base, ((0, 0), (0, -base.shape[1] % config.bwe_hop_length), (0, 0)))
        ours = {
            "wav16k": base,
            "bwe_mel": records["bwe_mel"],
            "residual": records["bwe"],
            "skip": resample(padded, *rates, pad_mode="edge"),
        }
        ours = {name: channels_first(array) for name, array in ours.items()}
        report.add("audio/vocoder mid", ours, theirs, AUTOENCODER)
    if "vocoder.resampler.filter" in reference:
        theirs = reference["vocoder.resampler.filter"]
        up = rates[1] // rates[0]  # by which theirs is divided, and the zeros between the samples multiplied
        ours = _whole_filter(up, theirs.size).reshape(theirs.shape) / up
        report.add("audio/vocoder resampler filter", ours, theirs, EXACT)


def _whole_filter(up: int, size: int) -> np.ndarray:
    """The sinc filter of resampling by a whole number as one impulse response, `size` taps about its middle."""
    filters, reach = sinc_filters(up, 1)
    taps = {up * (tap - reach) - phase: filters[tap, phase] for tap in range(len(filters)) for phase in range(up)}
    return np.array([taps.get(i - size // 2, 0.0) for i in range(size)], np.float32)


def _run_snake(report: Report, reference: Reference) -> None:
    """The activation alone; its two filters are got from it by unit impulses in place of the other one."""
    x = channels_last(reference["snake.in"])
    taps = jnp.asarray(reference["snake.filter"].ravel())
    alpha, beta = jnp.asarray(reference["snake.alpha"]), jnp.asarray(reference["snake.beta"])

    def snake(x, up_filter, down_filter, beta):
        return antialiased_snake(x, alpha=alpha, beta=beta, up_filter=up_filter, down_filter=down_filter)

    report.add("audio/snake", channels_first(snake(x, taps, taps, beta)), reference["snake.out"], FORWARD)
    unit = jnp.eye(len(taps))
    linear = jnp.full_like(beta, jnp.inf)  # e^inf: nothing is added to the signal
    middle = len(taps) // 2 - 1
    # The second filter takes sample 2i or 2i + 1 of the doubled signal.
    up = jnp.stack([snake(x, taps, unit[middle + i], linear) for i in range(2)], axis=2)
    theirs = {name: reference[f"snake.{name}"] for name in ("up", "down") if f"snake.{name}" in reference}
    # The first filter makes a doubled signal with even samples alone, of half of `x`, or with odd samples alone.
    odd = x.shape[1] % 2
    whole = jnp.concatenate([x, x[:, -1:]], axis=1) if odd else x
    down = sum(snake(whole[:, i::2], unit[middle + i] / 2, taps, linear) for i in range(2))
    ours = {"up": rearrange(up, "b n two c -> b (n two) c"), "down": down}
    report.add("audio/snake filters", {name: channels_first(ours[name]) for name in theirs}, theirs, FORWARD)


# -------------------------------------------------------------------- upscaler


@jax.jit
def _upscale_both(upscaler, statistics, latents):
    return upscaler(latents), upscale(upscaler, statistics, latents)


def run_upscaler(models: Models, report: Report, reference: Reference) -> None:
    name = reference.name.removesuffix("_io")
    raw, normalised = _upscale_both(
        models.upscaler(name), models.video_vae.statistics, channels_last(reference["in.latent"])
    )
    ours = {"raw": raw, "normalised": normalised}
    for key in reference.names("out."):
        if key in ours:
            report.add(f"{name}/{key}", channels_first(ours[key]), reference[f"out.{key}"], FORWARD)
