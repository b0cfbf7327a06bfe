"""Whole releases of a model so small that converting one takes a tenth of a second, in every published layout."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.inventory import Expected, Target
from convert.mapping import flatten, source_name
from convert.tables import table_of
from ltx_jax.checkpoint import Configs
from tests.conftest import DATA

from .published import parts, write_file

BLOCK = "model.diffusion_model.transformer_blocks.0."
BLOCK_SIZE = 32
NUM_HIDDEN_STATES = 3
# Those of one width, in whole blocks; wide rows; and one that is padded.
PACKED = tuple(
    f"{BLOCK}{name}.weight"
    for name in (
        *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *("ff.net.0.proj", "ff.net.2", "audio_ff.net.2", "audio_to_video_attn.to_q", "audio_attn1.to_q"),
    )
)
LAYOUTS = (
    *(("V1", 5), ("V1", 8), ("V2", 4), ("V2", 5), ("V3", 4), ("V4", 5)),
    *(("V5", 3), ("V5", 5), ("V5", 6), ("V6", 5), ("V7", 5)),
)
MAIN, KEPT, CODES, SIDECAR = (
    "official.safetensors",
    "bf16/kept.safetensors",
    "codes/%d.safetensors",
    "polar_config.json",
)
UPSCALER, GEMMA = "upscalers/x2.safetensors", "gemma"


def config() -> dict:
    """The published configuration, of two heads and one layer everywhere."""
    found = json.loads((DATA / "ltx/config.json").read_text())
    sizes = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "in_channels": 4,
        "out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_cross_attention_dim": 16,
        "connector_num_attention_heads": 2,
        "connector_attention_head_dim": 16,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 8,
        "connector_num_layers": 1,
        "connector_num_learnable_registers": 4,
    }
    generator = {
        "upsample_initial_channel": 8,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
    }
    found["transformer"] |= sizes
    found["vae"] |= {
        "latent_channels": 4,
        "encoder_blocks": [["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}]],
        "decoder_blocks": [["res_x", {"num_layers": 1}], ["compress_all", {"multiplier": 2}]],
        "decoder_base_channels": 4,
        "patch_size": 2,
    }
    audio = found["audio_vae"]
    audio["model"]["params"]["ddconfig"] |= {"z_channels": 2, "ch": 4, "ch_mult": [1], "num_res_blocks": 1}
    audio["preprocessing"]["mel"]["n_mel_channels"] = 4
    found["vocoder"]["vocoder"] |= generator | {"upsample_rates": [2], "upsample_kernel_sizes": [4]}
    found["vocoder"]["bwe"] |= generator | {"upsample_rates": [3], "upsample_kernel_sizes": [6], "hop_length": 1}
    found["vocoder"]["bwe"] |= {"n_fft": 8, "win_size": 8, "num_mels": 4}
    return found


UPSCALER_CONFIG = {
    "_class_name": "LatentUpsampler",
    "in_channels": 4,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
}
GEMMA_CONFIG = {
    "text_config": {
        "attention_bias": False,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": NUM_HIDDEN_STATES - 1,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "vocab_size": 1024,
    }
}


@dataclass(frozen=True)
class Packed:
    """How a weight was packed."""

    layout: str
    bits: int
    block_size: int


@dataclass(frozen=True)
class Release:
    """Files by name, and what they hold."""

    name: str
    files: Mapping[str, bytes]
    packed: Mapping[str, Packed]  # by published name
    upscaler: bool = False
    gemma: bool = False

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@cache
def expected() -> Expected:
    """What such a release must hold."""
    configs = Configs.from_metadata(
        config(), GEMMA_CONFIG, {"upscaler_spatial_x2": UPSCALER_CONFIG}, num_hidden_states=NUM_HIDDEN_STATES
    )
    return Expected(configs)


@cache
def targets() -> Mapping[str, Target]:
    return expected().targets


@cache
def _weights() -> dict[str, np.ndarray]:
    """Of every published tensor, in the three precisions there are."""
    rng = np.random.default_rng(2303)
    kinds = (ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float32, np.float16)
    return {
        name: (0.02 * rng.standard_normal(target.shape)).astype(kinds[i % 4])
        for i, (name, target) in enumerate(sorted(targets().items()))
    }


@cache
def _bytes(write) -> Mapping[str, bytes]:
    """What `write(folder)` leaves in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def _metadata() -> dict[str, str]:
    return {"config": json.dumps(config()), "model_version": "2.3.0"}


@cache
def plain() -> Release:
    """The official form: one file, and a tensor that nothing reads."""

    def write(folder: Path) -> None:
        unread = {"vae.per_channel_statistics.channel": np.arange(4, dtype=np.float32)}
        write_file(folder / MAIN, _weights() | unread, _metadata())

    return Release("plain", _bytes(write), {})


@cache
def packed(layout: str, bits: int) -> Release:
    """A package: codes in two files, what is kept in a third, and a sidecar."""
    weights = _weights()
    how = {name: Packed(layout, bits, BLOCK_SIZE * (2 if layout == "V7" else 1)) for name in PACKED}

    def write(folder: Path) -> None:
        layers: dict[str, dict] = {}
        index = {}
        for half in (0, 1):
            tensors = {}
            for name in PACKED[half::2]:
                tensors |= parts(layout, name, weights[name], bits, layers, block_size=BLOCK_SIZE)
            write_file(folder / (CODES % half), tensors, {"written by": layout})
            index |= dict.fromkeys(tensors, CODES % half)
        write_file(folder / KEPT, {k: v for k, v in weights.items() if k not in how}, _metadata())
        sidecar = {"format": "polar_engine_v5", "block_size": BLOCK_SIZE, "layers": layers}
        (folder / SIDECAR).write_text(json.dumps(sidecar))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    return Release(f"{layout} at {bits} bits", _bytes(write), how)


@cache
def with_companions() -> Release:
    """The official form with an upscaler and a text encoder in folders of their own."""
    rng = np.random.default_rng(2304)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    def write(folder: Path) -> None:
        write_file(folder / MAIN, _weights(), _metadata())
        shapes = published_shapes("upscaler_spatial_x2")
        write_file(
            folder / UPSCALER,
            {name: random(shape) for name, shape in shapes.items()},
            {"config": json.dumps(UPSCALER_CONFIG)},
        )
        tensors = {f"language_model.model.{name}": random(shape) for name, shape in published_shapes("gemma").items()}
        tensors["vision_tower.x"] = random((2,))
        write_file(folder / GEMMA / "model.safetensors", tensors)
        (folder / GEMMA / "config.json").write_text(json.dumps(GEMMA_CONFIG))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (DATA / "mini-release/gemma-3-mini" / name).read_bytes()
            (folder / GEMMA / name).write_bytes(content)

    return Release("plain, with upscaler and text encoder", _bytes(write), {}, upscaler=True, gemma=True)


def published_shapes(component: str) -> dict[str, tuple[int, ...]]:
    """Of a component in a file of its own: what is published below its prefix."""
    rules = list(flatten(table_of(component, expected().configs.upscalers)[1]))
    shapes = {}
    for path, shape in expected().shapes[component].items():
        name = source_name(rules, path)
        left, right = next(r for r in rules if r.match(name) == path).pattern.split("->")
        sizes = dict(zip(right.split(), shape, strict=True))
        shapes[name] = tuple(sizes[axis] for axis in left.split())
    return shapes


def releases() -> list[Release]:
    return [plain(), with_companions(), *(packed(*pair) for pair in LAYOUTS)]
