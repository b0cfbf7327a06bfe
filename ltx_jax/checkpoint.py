"""The checkpoint folder that `python -m convert` writes and `load.py` reads: components, parts and the manifest.

    DEST/manifest.json             written last: a folder without it is not a checkpoint
    DEST/inventory.json            SHA-256 of every array and file, and what became of every published tensor
    DEST/tokenizer/                tokenizer.json and tokenizer_config.json as published
    DEST/kept/                     published tensors that no model reads, for `python -m convert export` alone
    DEST/<component>/<part>/       one Orbax checkpoint: a flat dictionary, parameter path -> array

A component is one model; a part is one of its layers (`blocks.007`), or `shared` for what belongs to none. So neither
side ever holds more than one layer of a large model twice. A quantized linear stores its packed planes (`lo`, `hi`,
`norms`, `scaled_centroids`, and `signs` where it has them) where a plain one stores `kernel`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from flax import nnx

from ltx_jax.abstract import abstract
from ltx_jax.config import (
    AudioVAEConfig,
    ConfigError,
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
from ltx_jax.models.transformer import Transformer
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.models.vocoder import Vocoder
from ltx_jax.presets import GEMMA_3_12B, LTX_2_3, NUM_HIDDEN_STATES, UPSCALERS
from ltx_jax.stack import layer_lists

FORMAT = "ltx-jax checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
KEPT_FOLDER = "kept"
LAYERED = ("transformer", "connectors", "gemma")  # stored, restored and stacked layer by layer
MODELS: dict[str, Any] = {
    "transformer": Transformer,
    "connectors": TextConnectors,
    "gemma": Gemma,
    "video_vae": VideoVAE,
    "audio_vae": AudioVAE,
    "vocoder": Vocoder,
}  # every other component is a latent upscaler


class CheckpointError(ValueError):
    """A folder is not a checkpoint of this library, or lacks what was asked of it."""


@dataclass(frozen=True, kw_only=True)
class QuantizedShape:
    """What the packed planes of one linear do not say by themselves."""

    in_features: int
    out_features: int
    bits: int
    block_size: int
    history_bits: int = 0  # of a trellis; 0: each code has its own level
    signs: bool = False  # whether columns were multiplied by signs before they were packed


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a checkpoint folder says of itself."""

    metadata: dict[str, Any]  # the published `config`: transformer, vae, audio_vae, vocoder
    gemma_metadata: dict[str, Any] | None  # config.json of the text encoder; None if the folder has none
    upscaler_metadata: dict[str, dict[str, Any]]  # component name -> its published `config`
    num_hidden_states: int  # that the connectors read: the text encoder's layers + 1
    text_length: int | None  # tokens a prompt is padded to; None where there is no text encoder
    model_version: str | None
    parts: dict[str, list[str]]  # component -> its parts
    quantized: dict[str, dict[str, QuantizedShape]]  # component -> path of a linear -> shape
    # Published name of every linear -> `component/path`: what a LoRA or a report names.
    linear_names: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # sources, digests, layout, options, versions

    def linears_below(self, prefix: str, component: str) -> dict[str, str]:
        """Published names below a prefix -> paths in a component."""
        return {
            name.removeprefix(prefix): path.removeprefix(f"{component}/")
            for name, path in self.linear_names.items()
            if name.startswith(prefix) and path.startswith(f"{component}/")
        }

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads `folder/manifest.json`. Raises CheckpointError for a missing, foreign or newer folder."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {folder}; `python -m convert SOURCE {folder}` makes one")
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {MANIFEST}: it is not a converted checkpoint, or its conversion did not finish; "
                f"run `python -m convert SOURCE DEST` with the published files as SOURCE"
            )
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON ({error}); convert again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not the manifest of an {FORMAT}; convert the published files first")
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has version {content.get('version')}, this program reads {VERSION}; convert again"
            )
        values: dict[str, Any] = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        try:
            values["quantized"] = {
                component: {name: QuantizedShape(**shape) for name, shape in layers.items()}
                for component, layers in content["quantized"].items()
            }
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); convert again") from error


@dataclass(frozen=True, kw_only=True)
class Configs:
    """The configuration of every model of a checkpoint."""

    transformer: TransformerConfig
    connectors: TextConnectorsConfig
    gemma: GemmaConfig | None  # None where there is no text encoder
    video_vae: VideoVAEConfig
    audio_vae: AudioVAEConfig
    vocoder: VocoderConfig
    upscalers: dict[str, UpscalerConfig]

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        gemma_metadata: Mapping[str, Any] | None = None,
        upscaler_metadata: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        num_hidden_states: int,
    ) -> "Configs":
        """Parses the published configuration. Raises ConfigError for what is missing or not implemented.

        `num_hidden_states` is what the connectors read; a text encoder must have one layer less.
        """
        missing = [section for section in ("transformer", "vae", "audio_vae", "vocoder") if section not in metadata]
        if missing:
            raise ConfigError(f"the checkpoint's configuration lacks the sections {', '.join(missing)}")
        gemma = None if gemma_metadata is None else GemmaConfig.from_metadata(gemma_metadata)
        transformer = metadata["transformer"]
        audio = AudioVAEConfig.from_metadata(metadata["audio_vae"])
        return cls(
            transformer=TransformerConfig.from_metadata(transformer),
            connectors=TextConnectorsConfig.from_metadata(transformer, num_hidden_states=num_hidden_states),
            gemma=gemma,
            video_vae=VideoVAEConfig.from_metadata(metadata["vae"]),
            audio_vae=audio,
            vocoder=VocoderConfig.from_metadata(metadata["vocoder"], mel_bins=audio.mel_bins),
            upscalers={k: UpscalerConfig.from_metadata(v) for k, v in (upscaler_metadata or {}).items()},
        )

    def abstract(self, component: str) -> nnx.Module:
        """The model of a component with shapes in place of arrays, its layers in a plain list."""
        return _abstract(MODELS.get(component, LatentUpscaler), self.of(component))

    def one_layer(self, component: str) -> tuple[nnx.Module, dict[str, int]]:
        """As `abstract`, but of each list of layers only the first, and how many layers each list has.

        Tracing all 48 blocks takes seconds, and they are all alike.
        """
        config = self.of(component)
        deep = {"video": config.video, "audio": config.audio} if component == "connectors" else {"": config}
        flat = {part: replace(layered, num_layers=1) for part, layered in deep.items()}
        shallow = replace(config, **flat) if component == "connectors" else flat[""]
        model = _abstract(MODELS[component], shallow)
        depths = {}
        owners: dict[str, Any] = {path: owner for path, (owner, _) in layer_lists(model).items()}
        for path, owner in owners.items():
            owner.config = deep[path.rpartition(".")[0]]
            depths[path] = owner.config.num_layers
        return model, depths

    def of(self, component: str) -> Any:
        """The configuration of one component. Raises CheckpointError for one that is not there."""
        if component not in self.components:
            raise CheckpointError(f"there is no component {component!r} here; there are {', '.join(self.components)}")
        return self.upscalers[component] if component in self.upscalers else getattr(self, component)

    @property
    def components(self) -> tuple[str, ...]:
        text = ("connectors",) if self.gemma is None else ("connectors", "gemma")
        return ("transformer", *text, "video_vae", "audio_vae", "vocoder", *self.upscalers)


def _abstract(make: Any, config: Any) -> nnx.Module:
    """A model with shapes in place of arrays, the caller's own."""
    return nnx.merge(*_traced(make, config), copy=True)


@cache
def _traced(make: Any, config: Any) -> Any:
    """An abstract model, split: tracing one takes seconds, and a plan and a load both need it."""
    return nnx.split(abstract(lambda rngs: make(config, rngs=rngs)))


def published_manifest(*, gemma_bits: int | None = 5, metadata: dict[str, Any] = LTX_2_3) -> Manifest:
    """What the folder of the published 5-bit LTX-2.3 will say of itself: for planning before anything is downloaded.

    `gemma_bits` None is an unpacked text encoder; other `metadata` is a model of other sizes, packed the same way.
    """
    configs = Configs.from_metadata(metadata, GEMMA_3_12B, UPSCALERS, num_hidden_states=NUM_HIDDEN_STATES)
    quantized: dict[str, dict[str, QuantizedShape]] = {}
    parts: dict[str, list[str]] = {}
    for component in configs.components:
        if component not in LAYERED:
            parts[component] = ["shared"]
            continue
        model, depths = configs.one_layer(component)
        names = {part_of(component, path) for path in parameter_shapes(model)}
        parts[component] = sorted(names | {f"{path}.{i:03d}" for path, depth in depths.items() for i in range(depth)})
        bits = {"transformer": 5, "gemma": gemma_bits}.get(component)
        if bits is None:
            continue
        layer = {
            path: QuantizedShape(
                in_features=linear.in_features, out_features=linear.out_features, bits=bits, block_size=128
            )
            for path, linear in nnx.iter_modules(model)
            if isinstance(linear, nnx.Linear) and path[0] in depths and path[-1] != "to_gate_logits"
        }
        quantized[component] = {
            ".".join(map(str, (path[0], i, *path[2:]))): shape
            for path, shape in layer.items()
            for i in range(depths[str(path[0])])
        }
    return Manifest(
        metadata=metadata,
        gemma_metadata=GEMMA_3_12B,
        upscaler_metadata=UPSCALERS,
        num_hidden_states=NUM_HIDDEN_STATES,
        text_length=1024,
        model_version="2.3",
        parts=parts,
        quantized=quantized,
    )


def upscaler_component(config: UpscalerConfig) -> str:
    """The component name of an upscaler."""
    if config.temporal_scale != 1:
        return f"upscaler_temporal_x{config.temporal_scale}"
    return f"upscaler_spatial_x{config.spatial_scale:g}".replace(".", "_")


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Every variable of a model (abstract or not) by its dotted path."""
    return {
        ".".join(map(str, path)): tuple(variable.get_value().shape)
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def part_of(component: str, path: str) -> str:
    """The part a parameter is stored in: its layer (`blocks.007`, `video.blocks.001`), or `shared`.

    Only the large models with many equal layers are cut; the others are one part each.
    """
    found = re.match(r"((?:\w+\.)?(?:blocks|layers))\.(\d+)\.", path) if component in LAYERED else None
    return f"{found[1]}.{int(found[2]):03d}" if found else "shared"
