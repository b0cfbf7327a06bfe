"""The models of a directory of reference files, and the cases of those that read and write tokens."""

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
from convert.tables import component_of
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
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.connector import TextConnectors
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.transformer import Keep, Stream, StreamInput, Transformer
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.models.vocoder import Vocoder
from ltx_jax.stack import stack_layers
from scripts.parity_cases import FORWARD, Reference, Report, call_recorded, fill, our_path, read_prefix

LAYOUTS = ("list", "scan")  # blocks one by one, and stacked under scan
DIFFUSION = "model.diffusion_model."
# The text model of Gemma in published files, by age of the format.
GEMMA_PREFIXES = ("language_model.model.", "model.language_model.", "model.")


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
        return fill(
            lambda: VideoVAE(self.video_config, rngs=nnx.Rngs(0)),
            video_vae_table.VIDEO_VAE,
            tensors,
            video_vae_table.SKIP,
        )

    @cached_property
    def audio_vae(self) -> AudioVAE:
        tensors = read_prefix(self.checkpoint, "audio_vae.")
        return fill(
            lambda: AudioVAE(self.audio_config, rngs=nnx.Rngs(0)),
            audio_vae_table.AUDIO_VAE,
            tensors,
            audio_vae_table.SKIP,
        )

    @cached_property
    def vocoder(self) -> Vocoder:
        tensors = read_prefix(self.checkpoint, "vocoder.")
        return fill(
            lambda: Vocoder(self.vocoder_config, rngs=nnx.Rngs(0)), vocoder_table.VOCODER, tensors, vocoder_table.SKIP
        )

    def upscaler(self, name: str) -> LatentUpscaler:
        path = self.directory / f"{name}.safetensors"
        with safe_open(path, "np") as file:
            config = UpscalerConfig.from_metadata(json.loads(file.metadata()["config"]))
        return fill(lambda: LatentUpscaler(config, rngs=nnx.Rngs(0)), UPSCALERS[config.kind], read_prefix(path, ""))

    def check_checkpoint(self, report: Report) -> None:
        """A row for the checkpoint's own metadata, and failing rows for tensors that belong to no model."""
        with safe_open(self.checkpoint, "np") as file:
            stray = [name for name in list(file.keys()) if component_of(name) is None]
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
    keep_masks = given("keep_masks")

    def mask_of(modality: str, kind: str) -> jax.Array | None:
        mask = given(f"{modality}.{kind}")
        if mask is None and modality == "video":  # one that names no modality is the video's
            mask = given(kind)
        return None if mask is None else jnp.asarray(mask, jnp.float32)

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
        return StreamInput(
            tokens=jnp.asarray(tokens),
            timesteps=jnp.asarray(own_sigma[:, None] if timesteps is None else timesteps[..., 0]),
            sigma=jnp.asarray(own_sigma),
            positions=jnp.asarray(rearrange(positions, "b axes t ends -> b t axes ends")),
            context=jnp.asarray(context),
            context_mask=mask_of(modality, "context_mask"),
            self_mask=mask_of(modality, "self_mask"),
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
        if not set(case.split("_")) <= CASE_WORDS or not reference.names(f"{case}.out."):
            continue  # not known, or only lends its inputs
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
