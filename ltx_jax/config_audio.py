"""What the models of sound are built from: as in `config`, which has all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ltx_jax.config_values import ConfigError, filled, need, need_object, refuse_unless

_MAX_VOCODER_LAYERS = 1024  # LTX-2.3 has 54 and 45


@dataclass(frozen=True, kw_only=True)
class AudioVAEConfig:
    """The mel-spectrogram autoencoder and its front end (section `audio_vae`)."""

    audio_channels: int  # stereo: 2
    latent_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    mel_bins: int
    sample_rate_hz: int
    n_fft: int
    hop_length: int
    win_length: int
    mel_fmin_hz: float
    mel_fmax_hz: float

    @property
    def scale(self) -> int:
        """Mel frames per latent frame, and mel bins per latent bin."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_bins(self) -> int:
        return self.mel_bins // self.scale

    @property
    def token_dim(self) -> int:
        """Channels of one audio token: latent channels times latent bins."""
        return self.latent_channels * self.latent_bins

    @property
    def latents_per_second(self) -> float:
        return self.sample_rate_hz / self.hop_length / self.scale

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "AudioVAEConfig":
        """Reads the section `audio_vae`. Raises ConfigError on what is missing or not implemented."""
        (model,) = need("audio_vae", metadata, "model")
        (params,) = need("audio_vae", model, "params")
        (dd,) = need("audio_vae", params, "ddconfig")
        refuse_unless(
            "audio_vae",
            dd,
            {
                "double_z": True,
                "attn_resolutions": [],
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
        )
        channels, base, multipliers, res_blocks = need("audio_vae", dd, "z_channels", "ch", "ch_mult", "num_res_blocks")
        preprocessing = need_object("audio_vae", metadata.get("preprocessing", {}))
        stft, mel = (need_object("audio_vae", preprocessing.get(part, {})) for part in ("stft", "mel"))
        audio_channels = dd.get("in_channels", 2)
        refuse_unless("audio_vae", dd, {"out_ch": audio_channels})
        config = filled(
            "audio_vae",
            cls,
            audio_channels=audio_channels,
            latent_channels=channels,
            base_channels=base,
            channel_multipliers=multipliers,
            num_res_blocks=res_blocks,
            mel_bins=mel.get("n_mel_channels", dd.get("mel_bins", 64)),
            sample_rate_hz=params.get("sampling_rate", 16000),
            n_fft=stft.get("filter_length", 1024),
            hop_length=stft.get("hop_length", 160),
            win_length=stft.get("win_length", stft.get("filter_length", 1024)),
            mel_fmin_hz=mel.get("mel_fmin", 0),
            mel_fmax_hz=mel.get("mel_fmax", 8000),
        )
        if config.mel_bins % config.scale:
            raise ConfigError(
                f"the audio_vae configuration has {config.mel_bins} mel bins, which {len(config.channel_multipliers)} "
                "levels cannot halve"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """One BigVGAN-v2 generator: mel to waveform."""

    initial_channels: int
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    resblock_kernels: tuple[int, ...]
    resblock_dilations: tuple[tuple[int, ...], ...]

    @property
    def hop_length(self) -> int:
        """Samples made from one mel frame."""
        return prod(self.upsample_rates)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "GeneratorConfig":
        refuse_unless(
            "vocoder",
            metadata,
            {"resblock": "AMP1", "activation": "snakebeta", "stereo": True, "use_bias_at_final": False},
        )
        initial, rates, kernels, res_kernels, dilations = need(
            "vocoder",
            metadata,
            "upsample_initial_channel",
            "upsample_rates",
            "upsample_kernel_sizes",
            "resblock_kernel_sizes",
            "resblock_dilation_sizes",
        )
        config = filled(
            "vocoder",
            cls,
            initial_channels=initial,
            upsample_rates=rates,
            upsample_kernels=kernels,
            resblock_kernels=res_kernels,
            resblock_dilations=dilations,
        )
        counts = tuple(len(values) for values in (rates, kernels, res_kernels, dilations))
        if counts[0] != counts[1] or counts[2] != counts[3] or initial % 2 ** counts[0]:
            raise ConfigError(
                f"the vocoder configuration has {counts[0]} upsample rates and {counts[1]} kernels, "
                f"{counts[2]} resblock kernels and {counts[3]} dilations (both must agree), "
                f"and {initial} channels, which every rate halves"
            )
        if counts[0] * sum(map(len, dilations)) > _MAX_VOCODER_LAYERS:
            raise ConfigError(
                f"the vocoder configuration has {sum(map(len, dilations))} layers for each of {counts[0]} rates; "
                f"expected up to {_MAX_VOCODER_LAYERS} in all"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """The vocoder with bandwidth extension (section `vocoder`)."""

    audio_channels: int
    mel_bins: int  # of the mel that the vocoder reads
    base: GeneratorConfig
    bwe: GeneratorConfig
    bwe_hop_length: int
    bwe_n_fft: int
    bwe_mel_bins: int
    input_sample_rate_hz: int  # of the base generator's waveform
    sample_rate_hz: int  # of the output

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, mel_bins: int = 64) -> "VocoderConfig":
        """Reads the section `vocoder`; `mel_bins` are those of the audio autoencoder."""
        base, bwe = need("vocoder", metadata, "vocoder", "bwe")
        refuse_unless("vocoder", base, {"use_tanh_at_final": False})
        refuse_unless("vocoder", bwe, {"apply_final_activation": False})
        hop, n_fft, num_mels = need("vocoder", bwe, "hop_length", "n_fft", "num_mels")
        if bwe.get("win_size", n_fft) != n_fft:
            told = f"win_size {bwe['win_size']!r:.80} and n_fft {n_fft!r:.80}"
            raise ConfigError(f"the vocoder configuration has {told}; must agree")
        config = filled(
            "vocoder",
            cls,
            audio_channels=2,
            mel_bins=mel_bins,
            base=GeneratorConfig.from_metadata(base),
            bwe=GeneratorConfig.from_metadata(bwe),
            bwe_hop_length=hop,
            bwe_n_fft=n_fft,
            bwe_mel_bins=num_mels,
            input_sample_rate_hz=bwe.get("input_sampling_rate", 16000),
            sample_rate_hz=bwe.get("output_sampling_rate", 48000),
        )
        if config.bwe.hop_length * config.input_sample_rate_hz != config.bwe_hop_length * config.sample_rate_hz:
            raise ConfigError(
                f"the vocoder configuration extends {config.input_sample_rate_hz} Hz to {config.sample_rate_hz} Hz, "
                f"but its bwe makes {config.bwe.hop_length} samples from {hop}"
            )
        return config
