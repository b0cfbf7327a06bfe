"""The models of a directory of reference files, and the cases of each model by itself.

Shapes, widths, rates and block lists come from the directory's configuration and arrays. Reference arrays have torch's
layouts: latents and pixels `b c f h w`, audio latents and mel `b c time bins`, waveforms `b c samples`.
"""

import json
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from safetensors import safe_open

from convert.tables import audio_vae as audio_vae_table
from convert.tables import gemma as gemma_table
from convert.tables import video_vae as video_vae_table
from convert.tables import vocoder as vocoder_table
from convert.tables.connectors import CONNECTORS, PREFIXES
from convert.tables.transformer import TRANSFORMER
from convert.tables.upscaler import UPSCALERS
from ltx_jax.config import (
    AudioVAEConfig,
    GemmaConfig,
    TextConnectorsConfig,
    TransformerConfig,
    UpscalerConfig,
    VideoVAEConfig,
    VocoderConfig,
)
from ltx_jax.mel import hann_window, mel_filterbank, mel_spectrogram, resample, sinc_filters
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.connector import TextConnectors
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.transformer import Keep, Stream, StreamInput, Transformer
from ltx_jax.models.upscaler import LatentUpscaler, upscale
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.models.vocoder import Vocoder, antialiased_snake
from ltx_jax.stack import stack_layers
from ltx_jax.tiling import Tiles, _decode, space_spans, time_spans
from scripts.parity_cases import (
    AUTOENCODER,
    EXACT,
    FORWARD,
    Reference,
    Report,
    call,
    call_recorded,
    fill,
    our_path,
    read_prefix,
    relative,
)

LAYOUTS = ("list", "scan")  # blocks one by one, and stacked under scan
DIFFUSION = "model.diffusion_model."
# The text model of Gemma in published files, by age of the format.
GEMMA_PREFIXES = ("language_model.model.", "model.language_model.", "model.")


def channels_last(array: np.ndarray) -> jax.Array:
    """An array `b c ...` as `b ... c`."""
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def channels_first(array: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, 1)


class Models:
    """The models of a directory, filled when first used."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoint = directory / "checkpoint.safetensors"
        self.metadata: dict[str, Any] = json.loads((directory / "config.json").read_text())

    @property
    def inputs(self) -> set[str]:
        """Files that hold weights."""
        upscalers = {path.stem for path in self.directory.glob("upscaler_*.safetensors") if path.stem[-3:] != "_io"}
        return {"checkpoint", "gemma", *upscalers}

    @cached_property
    def audio_config(self) -> AudioVAEConfig:
        return AudioVAEConfig.from_metadata(self.metadata["audio_vae"])

    @cached_property
    def video_config(self) -> VideoVAEConfig:
        return VideoVAEConfig.from_metadata(self.metadata["vae"])

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        return TransformerConfig.from_metadata(self.metadata["transformer"])

    @cached_property
    def vocoder_config(self) -> VocoderConfig:
        return VocoderConfig.from_metadata(self.metadata["vocoder"], mel_bins=self.audio_config.mel_bins)

    @cached_property
    def connectors_config(self) -> TextConnectorsConfig:
        section = self.metadata["transformer"]
        with safe_open(self.checkpoint, "np") as file:
            shape = file.get_slice("text_embedding_projection.video_aggregate_embed.weight").get_shape()
        return TextConnectorsConfig.from_metadata(section, num_hidden_states=shape[1] // section["caption_channels"])

    @cached_property
    def transformer(self) -> dict[str, Transformer]:
        """By layout of its blocks."""
        tensors = read_prefix(self.checkpoint, DIFFUSION, without=PREFIXES)
        models = {
            layout: fill(lambda: Transformer(self.transformer_config, rngs=nnx.Rngs(0)), TRANSFORMER, tensors)
            for layout in LAYOUTS
        }
        models["scan"].blocks = stack_layers(models["scan"].blocks)
        return models

    @cached_property
    def gemma(self) -> dict[str, Gemma]:
        """By layout of its layers."""
        config = GemmaConfig.from_metadata(json.loads((self.directory / "gemma_config.json").read_text()))
        path = self.directory / "gemma.safetensors"
        prefix = next(p for p in GEMMA_PREFIXES if read_prefix(path, p))
        tensors = read_prefix(path, prefix)
        models = {
            layout: fill(lambda: Gemma(config, rngs=nnx.Rngs(0)), gemma_table.GEMMA, tensors) for layout in LAYOUTS
        }
        models["scan"].layers = stack_layers(models["scan"].layers)
        return models

    @cached_property
    def connectors(self) -> dict[str, TextConnectors]:
        """By layout of their blocks."""
        tensors = read_prefix(self.checkpoint, *PREFIXES)
        models = {
            layout: fill(lambda: TextConnectors(self.connectors_config, rngs=nnx.Rngs(0)), CONNECTORS, tensors)
            for layout in LAYOUTS
        }
        for connector in (models["scan"].video, models["scan"].audio):
            connector.blocks = stack_layers(connector.blocks)
        return models

    @cached_property
    def video_vae(self) -> VideoVAE:
        tensors = read_prefix(self.checkpoint, "vae.")
        make = lambda: VideoVAE(self.video_config, rngs=nnx.Rngs(0))  # noqa: E731
        return fill(make, video_vae_table.VIDEO_VAE, tensors, video_vae_table.SKIP)

    @cached_property
    def audio_vae(self) -> AudioVAE:
        tensors = read_prefix(self.checkpoint, "audio_vae.")
        make = lambda: AudioVAE(self.audio_config, rngs=nnx.Rngs(0))  # noqa: E731
        return fill(make, audio_vae_table.AUDIO_VAE, tensors, audio_vae_table.SKIP)

    @cached_property
    def vocoder(self) -> Vocoder:
        tensors = read_prefix(self.checkpoint, "vocoder.")
        make = lambda: Vocoder(self.vocoder_config, rngs=nnx.Rngs(0))  # noqa: E731
        return fill(make, vocoder_table.VOCODER, tensors, vocoder_table.SKIP)

    def upscaler(self, name: str) -> LatentUpscaler:
        path = self.directory / f"{name}.safetensors"
        with safe_open(path, "np") as file:
            config = UpscalerConfig.from_metadata(json.loads(file.metadata()["config"]))
        return fill(lambda: LatentUpscaler(config, rngs=nnx.Rngs(0)), UPSCALERS[config.kind], read_prefix(path, ""))

    def check_checkpoint(self, report: Report) -> None:
        """A row for the checkpoint's own metadata, and failing rows for tensors that belong to no model."""
        known = (DIFFUSION, *PREFIXES, "vae.", "audio_vae.", "vocoder.")
        with safe_open(self.checkpoint, "np") as file:
            stray = [name for name in list(file.keys()) if not name.startswith(known)]
            inside = (file.metadata() or {}).get("config")
        note = ""
        if inside is None:
            note = "the checkpoint has no configuration of its own; config.json is used"
        elif json.loads(inside) != self.metadata:
            note = "the checkpoint's own configuration differs from config.json, which is used"
        report.add("checkpoint/tensors of no model", len(stray), 0, 0.0, note="; ".join(filter(None, (note, *stray))))


# ----------------------------------------------------------------- transformer

CASE_WORDS = {"uniform", "pertoken", "perturbed", "masked", "frozen", "only", "disabled", "audio", "video"}


def _case_inputs(reference: Reference, case: str) -> tuple[StreamInput | None, StreamInput | None, Keep | None]:
    """What a case of the transformer is given: its own arrays, the shared ones, and what its name says."""

    def given(name: str) -> np.ndarray | None:
        own = reference.get(f"{case}.in.{name}")
        return reference.get(f"in.{name}") if own is None else own

    shared_sigma = next((n for n in ("uniform.in.sigma", *reference.arrays) if n.endswith(".in.sigma")), "in.sigma")
    sigma = given("sigma")
    if sigma is None:
        sigma = reference[shared_sigma]
    keep_masks, context_mask = given("keep_masks"), given("context_mask")

    def stream(modality: str, other: str) -> StreamInput | None:
        if f"{other}_only" in case:
            return None
        own_sigma = given(f"{modality}_sigma")
        own_sigma = sigma if own_sigma is None else own_sigma
        timesteps = given(f"{modality}.timesteps")
        if f"frozen_{modality}" in case:
            own_sigma, timesteps = np.zeros_like(own_sigma), None
        arrays = [given(f"{modality}.{name}") for name in ("latent", "positions", "context")]
        if keep_masks is not None:  # every sample is the first one, perturbed in another way
            arrays = [np.repeat(a[:1], keep_masks.shape[-1], axis=0) for a in arrays if a is not None]
        tokens, positions, context = arrays
        self_mask = given(f"{modality}.self_mask" if f"{case}.in.{modality}.self_mask" in reference else "self_mask")
        if self_mask is not None and (modality == "audio" and f"{case}.in.self_mask" in reference):
            self_mask = None  # the unnamed one is the video's
        return StreamInput(
            tokens=jnp.asarray(tokens),
            timesteps=jnp.asarray(own_sigma[:, None] if timesteps is None else timesteps[..., 0]),
            sigma=jnp.asarray(own_sigma),
            positions=jnp.asarray(rearrange(positions, "b axes t ends -> b t axes ends")),
            context=jnp.asarray(context),
            context_mask=None if context_mask is None else jnp.asarray(context_mask, jnp.float32),
            self_mask=None if self_mask is None else jnp.asarray(self_mask),
            enabled=f"{modality}_disabled" not in case,
        )

    keep = None if keep_masks is None else Keep(*map(jnp.asarray, keep_masks))
    return stream("video", "audio"), stream("audio", "video"), keep


def _outputs(streams: tuple[StreamInput | None, StreamInput | None], velocities: tuple) -> dict[str, jax.Array]:
    """Velocities, and the denoised tokens that follow from them, as the reference names them."""
    outputs = {}
    for modality, x, velocity in zip(("video", "audio"), streams, velocities, strict=True):
        if x is not None:
            outputs[modality] = velocity
            outputs[f"x0_{modality}"] = x.tokens - x.timesteps[..., None] * velocity
    return outputs


def _intermediate_path(name: str) -> tuple[str, str]:
    """Where the published module of an intermediate lies in our model, and which part of its result is meant."""
    block = re.fullmatch(r"block(\d+)\.(video|audio)", name)
    if block:
        return f"blocks.{block[1]}", block[2]
    published = re.sub(r"^block(\d+)\.", r"transformer_blocks.\1.", name)
    module, _, part = published.rpartition(".") if published.endswith((".mod", ".emb")) else (published, "", "")
    path = our_path(TRANSFORMER, module)
    if path is None:
        raise ValueError(f"no module of the transformer is called {name}")
    return path, part


def _intermediate(result: Any, part: str, like: np.ndarray) -> jax.Array:
    """The meant part of a module's result, in the reference's shape."""
    if part in ("video", "audio"):
        return result[("video", "audio").index(part)]
    if part in ("mod", "emb"):
        array = result[("mod", "emb").index(part)]
        array = array.reshape(*array.shape[:2], -1)
        # One row where all tokens share a timestep; the reference has a row for each token.
        batch = len(array)
        return jnp.broadcast_to(array, (batch, len(like) // batch, array.shape[-1])).reshape(like.shape)
    return result


def run_transformer(models: Models, report: Report, reference: Reference) -> None:
    for case in reference.groups("in"):
        if not set(case.split("_")) <= CASE_WORDS:
            continue
        with report.case(f"transformer/{case}", reference, f"{case}."):
            *streams, keep = _case_inputs(reference, case)
            theirs = reference.under(f"{case}.out.")
            middle = {name: _intermediate_path(name) for name in reference.names(f"{case}.mid.")}
            paths = tuple(path for path, _ in middle.values())
            for layout in LAYOUTS:
                model = models.transformer[layout]
                recorded = paths if layout == "list" else ()
                velocities, records = call_recorded(model, recorded, *streams, keep=keep)
                ours = _outputs((streams[0], streams[1]), velocities)
                report.add(f"transformer/{case} ({layout})", ours, theirs, FORWARD)
                if recorded:
                    wanted = {name: reference[f"{case}.mid.{name}"] for name in middle}
                    found = {k: _intermediate(records[p], part, wanted[k]) for k, (p, part) in middle.items()}
                    report.add(f"transformer/{case} mid", found, wanted, FORWARD)


def run_cross_timestep(models: Models, report: Report, reference: Reference) -> None:
    """The transformer under the rule of ltx-core 1.0.0, which the library does not offer: nothing else differs."""
    condition = Stream.condition

    def older(self, x: StreamInput, other: StreamInput | None, **kwargs):
        conditioning, embedding = condition(self, x, other, **kwargs)
        if other is not None:
            rows, _ = self.cross_adaln(other.sigma[:, None] * self.model.timestep_scale, x.tokens.dtype)
            conditioning = replace(conditioning, cross_rows=rows)
        return conditioning, embedding

    inputs = Reference(models.directory / "transformer.safetensors", {})
    for case in reference.groups():
        if not set(case.split("_")) <= CASE_WORDS:
            continue
        with report.case(f"transformer_cross_timestep/{case}", reference, f"{case}."):
            video, audio, keep = _case_inputs(inputs, case)
            with mock.patch.object(Stream, "condition", older):
                # A function of its own, so that no program of the newer rule is taken.
                velocities = jax.jit(lambda m, *a: m(*a[:2], keep=a[2]))(models.transformer["scan"], video, audio, keep)
            theirs = reference.under(f"{case}.out.")
            ours = {name: array for name, array in _outputs((video, audio), velocities).items() if name in theirs}
            note = "older rule: scale and shift from the other modality's sigma; not offered by the library"
            report.add(f"transformer_cross_timestep/{case}", ours, theirs, FORWARD, note=note)


# ------------------------------------------------------------------------ text


@jax.jit
def _hidden_states(gemma: Gemma, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
    return gemma(token_ids, mask, dtype=jnp.float32)


def run_gemma(models: Models, report: Report, reference: Reference) -> None:
    token_ids, mask = reference["in.input_ids"], reference["in.attention_mask"].astype(bool)
    theirs = reference.under("out.hidden.")
    for layout in LAYOUTS:
        states = _hidden_states(models.gemma[layout], jnp.asarray(token_ids, jnp.int32), jnp.asarray(mask))
        ours = {str(i): state for i, state in enumerate(states)}
        report.add(f"gemma_text/hidden ({layout})", ours, theirs, FORWARD, mask)  # padded rows mean nothing


def run_connectors(models: Models, report: Report, reference: Reference) -> None:
    # A case has its own hidden states, but for the unnamed one, which takes Gemma's.
    prefixes = [n.removesuffix("in.attention_mask") for n in reference.names() if n.endswith("in.attention_mask")]
    for prefix in prefixes:
        case = f"text_connectors/{prefix.removesuffix('.') or 'gemma'}"
        with report.case(case, reference, prefix):
            mask = jnp.asarray(reference[f"{prefix}in.attention_mask"].astype(bool))
            if f"{prefix}in.hidden" in reference:
                hidden = reference[f"{prefix}in.hidden"]
            else:
                states = Reference(models.directory / "gemma_text.safetensors", {}).under("out.hidden.")
                hidden = np.stack([states[str(i)] for i in range(len(states))])
            theirs = {k: v for kind in ("mid", "out") for k, v in reference.under(f"{prefix}{kind}.").items()}
            for layout in LAYOUTS:
                model = models.connectors[layout]
                contexts, records = call_recorded(model, ("projection",), jnp.asarray(hidden), mask)
                features = records["projection"]
                ours = {
                    "video_features": features.video,
                    "audio_features": features.audio,
                    "video_encoding": contexts.video,
                    "audio_encoding": contexts.audio,
                }
                if "mask" in theirs:  # registers stand for padding, so every token counts and none is returned
                    ours["mask"] = np.ones_like(mask)
                report.add(f"{case} ({layout})", ours, theirs, FORWARD)


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
    path = our_path(video_vae_table.VIDEO_VAE, published) or our_path(video_vae_table.VIDEO_VAE, f"{published}.conv")
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
    chunks = list(_decode(lambda x: call(models.video_vae, x, method="decode"), latents, plan))
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
        ours = _whole_filter(rates[1] // rates[0], theirs.size).reshape(theirs.shape)
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
