"""What each model of LTX-2.3 is built from: one frozen dataclass a model, read from the checkpoint's own metadata.

The released file carries its configuration as JSON in the safetensors metadata (`config`), with the sections
`transformer`, `vae`, `audio_vae` and `vocoder`; a latent upscaler carries its own; Gemma has `config.json`. The
`from_metadata` functions take those dictionaries, refuse what this library does not implement, and drop the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ltx_jax.config_audio import AudioVAEConfig, GeneratorConfig, VocoderConfig
from ltx_jax.config_values import ConfigError, filled, need, need_object, refuse_unless

__all__ = [
    "AudioVAEConfig",
    "ConfigError",
    "ConnectorConfig",
    "GemmaConfig",
    "GeneratorConfig",
    "StreamConfig",
    "TextConnectorsConfig",
    "TransformerConfig",
    "UpscalerConfig",
    "VAEBlock",
    "VideoVAEConfig",
    "VocoderConfig",
]

_MAX_VAE_LAYERS = 512  # LTX-2.3 has 46

# Switches that change the network. Only the LTX-2.3 side of each is implemented.
_TRANSFORMER_SUPPORTED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "frequencies_precision": "float64",
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
    "causal_temporal_positioning": True,
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
    "cross_attention_adaln": True,
    "use_prompt_adaln_single": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "text_encoder_norm_type": "per_token_rms",
    "use_embeddings_connector": True,
    "connector_norm_output": True,
    "norm_elementwise_affine": False,
    "double_self_attention": False,
    "only_cross_attention": False,
    "share_ff": False,
    "ff_bias": True,
    "audio_ff_bias": True,
    "standardization_norm": "rms_norm",
}


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One modality's path through the transformer."""

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    context_dim: int  # channels of the text context
    max_pos: tuple[float, ...]  # position that maps to the end of the rotary range: seconds, then pixels

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The audio-video diffusion transformer (section `transformer`)."""

    num_layers: int
    video: StreamConfig
    audio: StreamConfig
    eps: float
    rope_theta: float
    timestep_scale: float
    av_gate_timestep_scale: float
    gated_attention: bool

    @property
    def cross_dim(self) -> int:
        """Inner width of audio-video cross-attention: that of audio."""
        return self.audio.dim

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "TransformerConfig":
        """Reads the section `transformer`. Raises ConfigError on what is missing or not implemented."""
        refuse_unless("transformer", metadata, _TRANSFORMER_SUPPORTED)
        layers, heads, head_dim, channels, context_dim = need(
            "transformer",
            metadata,
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "cross_attention_dim",
        )
        audio_heads, audio_head_dim, audio_out, audio_context_dim = need(
            "transformer",
            metadata,
            "audio_num_attention_heads",
            "audio_attention_head_dim",
            "audio_out_channels",
            "audio_cross_attention_dim",
        )
        return filled(
            "transformer",
            cls,
            num_layers=layers,
            video=filled(
                "transformer",
                StreamConfig,
                in_channels=channels,
                out_channels=metadata.get("out_channels", channels),
                num_heads=heads,
                head_dim=head_dim,
                context_dim=context_dim,
                max_pos=metadata.get("positional_embedding_max_pos", (20, 2048, 2048)),
            ),
            audio=filled(
                "transformer",
                StreamConfig,
                in_channels=metadata.get("audio_in_channels", audio_out),
                out_channels=audio_out,
                num_heads=audio_heads,
                head_dim=audio_head_dim,
                context_dim=audio_context_dim,
                max_pos=metadata.get("audio_positional_embedding_max_pos", (20,)),
            ),
            eps=metadata.get("norm_eps", 1e-6),
            rope_theta=metadata.get("positional_embedding_theta", 10000.0),
            timestep_scale=metadata.get("timestep_scale_multiplier", 1000),
            av_gate_timestep_scale=metadata.get("av_ca_timestep_scale_multiplier", 1000),
            gated_attention=metadata.get("apply_gated_attention", False),
        )


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """One modality's connector: from the projected Gemma features to the context that cross-attention reads."""

    num_layers: int
    num_heads: int
    head_dim: int
    num_registers: int
    max_pos: int
    rope_theta: float
    eps: float
    gated_attention: bool

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class TextConnectorsConfig:
    """Feature extractor and both connectors (section `transformer`, keys `connector_*` and `caption_channels`)."""

    hidden_dim: int  # of the text encoder
    num_hidden_states: int  # embeddings and every layer of the text encoder
    video: ConnectorConfig
    audio: ConnectorConfig

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, num_hidden_states: int) -> "TextConnectorsConfig":
        """Reads the section `transformer`; the number of hidden states is a fact of the text encoder (layers + 1)."""
        refuse_unless("transformer", metadata, _TRANSFORMER_SUPPORTED)
        layers, heads, head_dim, audio_heads, audio_head_dim, hidden_dim = need(
            "transformer",
            metadata,
            "connector_num_layers",
            "connector_num_attention_heads",
            "connector_attention_head_dim",
            "audio_connector_num_attention_heads",
            "audio_connector_attention_head_dim",
            "caption_channels",
        )
        max_pos = metadata.get("connector_positional_embedding_max_pos", [4096])
        if not isinstance(max_pos, list | tuple) or not max_pos:
            raise ConfigError(
                "the transformer configuration has connector_positional_embedding_max_pos = "
                f"{max_pos!r:.80}; expected a list of one length"
            )

        def connector(num_heads: int, dim: int) -> ConnectorConfig:
            return filled(
                "connectors",
                ConnectorConfig,
                num_layers=layers,
                num_heads=num_heads,
                head_dim=dim,
                num_registers=metadata.get("connector_num_learnable_registers", 128),
                max_pos=max_pos[0],
                rope_theta=metadata.get("positional_embedding_theta", 10000.0),
                eps=metadata.get("norm_eps", 1e-6),
                gated_attention=metadata.get("connector_apply_gated_attention", False),
            )

        return filled(
            "connectors",
            cls,
            hidden_dim=hidden_dim,
            num_hidden_states=num_hidden_states,
            video=connector(heads, head_dim),
            audio=connector(audio_heads, audio_head_dim),
        )


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Gemma 3 as a text encoder (`text_config` of the Hugging Face `config.json`)."""

    vocab_size: int
    hidden_dim: int
    intermediate_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scalar: float  # queries are scaled by query_scalar ** -0.5
    sliding_window: int
    sliding_layers: tuple[bool, ...]  # per layer: True sliding window, False global
    rope_theta: float  # global layers
    rope_local_theta: float  # sliding layers
    rope_scale: float  # positions of global layers are divided by this
    eps: float
    tied_head: bool = True  # the language model's head is the embedding; no other is read

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "GemmaConfig":
        """Reads `config.json` (of the multimodal model, or its `text_config` alone)."""
        text = metadata.get("text_config", metadata)
        refuse_unless(
            "Gemma",
            text,
            {
                "hidden_activation": "gelu_pytorch_tanh",
                "attention_bias": False,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
        )
        hidden, intermediate, layers = need("Gemma", text, "hidden_size", "intermediate_size", "num_hidden_layers")
        # The published config of the 12 B model leaves out what equals the defaults of the library it was written by.
        pattern, types = text.get("sliding_window_pattern", 6), text.get("layer_types")
        # Newer files nest the rotary settings per layer type.
        nested = need_object("Gemma rope_parameters", text.get("rope_parameters") or {})
        full, local = (
            need_object("Gemma rope_parameters", nested.get(kind, {}))
            for kind in ("full_attention", "sliding_attention")
        )
        scaling = need_object("Gemma rope_scaling", text.get("rope_scaling") or full)
        kind = scaling.get("rope_type", "linear")
        if kind not in ("linear", "default"):
            raise ConfigError(f"the Gemma configuration has rope_type {kind!r:.80}; implemented: 'linear'")
        config = filled(
            "Gemma",
            cls,
            vocab_size=text.get("vocab_size", 262208),
            hidden_dim=hidden,
            intermediate_dim=intermediate,
            num_layers=layers,
            num_heads=text.get("num_attention_heads", 8),
            num_kv_heads=text.get("num_key_value_heads", 4),
            head_dim=text.get("head_dim", 256),
            query_scalar=text.get("query_pre_attn_scalar", 256),
            sliding_window=text.get("sliding_window", 4096),
            sliding_layers=(True,),
            rope_theta=text.get("rope_theta", full.get("rope_theta", 1_000_000.0)),
            rope_local_theta=text.get("rope_local_base_freq", local.get("rope_theta", 10_000.0)),
            rope_scale=scaling.get("factor", 1.0),
            eps=text.get("rms_norm_eps", 1e-6),
            tied_head=text.get("tie_word_embeddings", metadata.get("tie_word_embeddings", True)),
        )
        if types:
            if not isinstance(types, list | tuple):
                raise ConfigError(f"the Gemma configuration has layer_types {types!r:.80}; expected a list")
            if len(types) != config.num_layers:
                raise ConfigError(f"the Gemma configuration names {len(types)} layer types for {layers} layers")
            sliding = tuple(kind == "sliding_attention" for kind in types)
        else:
            if type(pattern) is not int or pattern < 1:
                raise ConfigError(
                    f"the Gemma configuration has sliding_window_pattern {pattern!r:.80}; expected 1 or more"
                )
            sliding = tuple((i + 1) % pattern != 0 for i in range(config.num_layers))
        return replace(config, sliding_layers=sliding)


@dataclass(frozen=True, kw_only=True)
class VAEBlock:
    """One entry of a block list: `kind` as in the metadata, `num_layers` of a res_x, `multiplier` of the others."""

    kind: str
    num_layers: int = 0
    multiplier: int = 1

    @property
    def stride(self) -> tuple[int, int, int]:
        """Down- or upsampling in (time, height, width)."""
        kind = self.kind.removesuffix("_res")
        return {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}.get(kind, (1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """The causal video autoencoder (section `vae`)."""

    pixel_channels: int
    latent_channels: int
    patch_size: int
    encoder_blocks: tuple[VAEBlock, ...]  # in the order of the encoder
    decoder_blocks: tuple[VAEBlock, ...]  # in the order of the metadata: output first; the decoder is built reversed
    encoder_base_channels: int  # width of the encoder's first layers
    decoder_base_channels: int  # an eighth of the width of the decoder's first layers

    @property
    def scale(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width): (8, 32, 32) in LTX-2.3."""
        return self._scale(self.encoder_blocks)

    def _scale(self, blocks: tuple[VAEBlock, ...]) -> tuple[int, int, int]:
        time, height, width = (prod(block.stride[axis] for block in blocks) for axis in range(3))
        return time, height * self.patch_size, width * self.patch_size

    @property
    def decoder_channels(self) -> int:
        """Width of the decoder's first layers: the published block lists halve it three times on the way to the end."""
        return 8 * self.decoder_base_channels

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "VideoVAEConfig":
        """Reads the section `vae`. Raises ConfigError on what is missing or not implemented."""
        refuse_unless(
            "vae",
            metadata,
            {
                "dims": 3,
                "norm_layer": "pixel_norm",
                "latent_log_var": "uniform",
                "use_quant_conv": False,
                "causal_decoder": False,
                "timestep_conditioning": False,
                "normalize_latent_channels": False,
                "spatial_padding_mode": "zeros",
            },
        )
        channels, encoder, decoder = need("vae", metadata, "latent_channels", "encoder_blocks", "decoder_blocks")

        def block(entry: Any, kinds: set[str]) -> VAEBlock:
            if not isinstance(entry, list | tuple) or len(entry) != 2:
                raise ConfigError(
                    f"the vae configuration has a block {entry!r:.80}; expected its kind and its settings"
                )
            kind, args = entry
            if kind not in sorted(kinds):
                raise ConfigError(f"the vae configuration has a block {kind!r:.80}; implemented: {sorted(kinds)}")
            args = args if isinstance(args, Mapping) else {"num_layers": args}
            refuse_unless(f"vae (block {kind})", args, {"residual": False, "inject_noise": False})
            return filled(
                f"vae (block {kind})",
                VAEBlock,
                kind=kind,
                num_layers=args.get("num_layers", 0),
                multiplier=args.get("multiplier", 2 if kind.endswith("_res") else 1),
            )

        def blocks(entries: Any, kinds: set[str]) -> tuple[VAEBlock, ...]:
            if not isinstance(entries, list | tuple):
                raise ConfigError(f"the vae configuration has blocks {entries!r:.80}; expected a list")
            return tuple(block(entry, kinds) for entry in entries)

        config = filled(
            "vae",
            cls,
            pixel_channels=metadata.get("in_channels", 3),
            latent_channels=channels,
            patch_size=metadata.get("patch_size", 4),
            encoder_blocks=blocks(encoder, {"res_x", "compress_space_res", "compress_time_res", "compress_all_res"}),
            decoder_blocks=blocks(decoder, {"res_x", "compress_space", "compress_time", "compress_all"}),
            # The reference makes the encoder's first layers as wide as the latents, whatever the metadata says; in the
            # released file both are 128.
            encoder_base_channels=channels,
            decoder_base_channels=metadata.get("decoder_base_channels", 128),
        )
        num_layers = sum(block.num_layers for block in config.encoder_blocks + config.decoder_blocks)
        if num_layers > _MAX_VAE_LAYERS:
            raise ConfigError(f"the vae configuration has {num_layers} layers; expected up to {_MAX_VAE_LAYERS}")
        if config.scale != config._scale(config.decoder_blocks):
            raise ConfigError(
                f"the vae configuration has an encoder that shrinks (time, height, width) by {config.scale} and a "
                f"decoder that grows them by {config._scale(config.decoder_blocks)}; they must agree"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """A latent upscaler (the metadata `config` of its own file)."""

    in_channels: int
    mid_channels: int
    num_blocks_per_stage: int
    spatial_scale: float  # 2.0 or 1.5, rational also 0.75 and 4.0; 1.0 for a temporal upscaler
    temporal_scale: int  # 2, or 1 for a spatial upscaler
    rational: bool  # resampler of x1.5: up by 3, blur, down by 2

    @property
    def kind(self) -> str:
        """`spatial`, `rational` or `temporal`: which of three upsamplers, and so which tensors there are."""
        return "temporal" if self.temporal_scale > 1 else "rational" if self.rational else "spatial"

    @property
    def ratio(self) -> tuple[int, int]:
        """The spatial scale as up by the first, down by the second number: (3, 2) for 1.5."""
        return self.spatial_scale.as_integer_ratio()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "UpscalerConfig":
        """Reads an upscaler's `config`. Raises ConfigError on what is missing or not implemented."""
        refuse_unless("upscaler", metadata, {"_class_name": "LatentUpsampler", "dims": 3})
        channels, mid, blocks = need("upscaler", metadata, "in_channels", "mid_channels", "num_blocks_per_stage")
        spatial, temporal = metadata.get("spatial_upsample", True), metadata.get("temporal_upsample", False)
        if type(spatial) is not bool or type(temporal) is not bool or spatial == temporal:
            raise ConfigError("an upscaler must be either spatial or temporal; the configuration says both or neither")
        rational = bool(metadata.get("rational_resampler", False)) and spatial
        config = filled(
            "upscaler",
            cls,
            in_channels=channels,
            mid_channels=mid,
            num_blocks_per_stage=blocks,
            spatial_scale=metadata.get("spatial_scale", 2.0) if spatial else 1.0,
            temporal_scale=2 if temporal else 1,
            rational=rational,
        )
        implemented = (0.75, 1.5, 2.0, 4.0) if rational else (2.0,)
        if spatial and config.spatial_scale not in implemented:
            raise ConfigError(
                f"the upscaler configuration has spatial_scale {config.spatial_scale} and rational_resampler "
                f"{rational}; implemented with that: {', '.join(map(str, implemented))}"
            )
        if config.mid_channels % 32:
            raise ConfigError(
                f"the upscaler configuration has mid_channels {config.mid_channels}; must be a multiple of 32"
            )
        return config
