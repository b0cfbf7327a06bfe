"""A release of LTX-2.3 in the published layout, of any depth, with random weights, streamed to disk.

The names and shapes are those of the models' own tables; nothing of it is downloaded. Packed weights are codes of
Gaussian weights, so that every check of a package holds for them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from convert.inventory import PREFIX, Expected
from convert.tables.gemma import GEMMA
from convert.tables.upscaler import UPSCALERS as UPSCALER_TABLES
from hlwq_jax import mangle, pack, packed_length, quantize
from ltx_jax.cache import written_whole
from ltx_jax.checkpoint import Configs
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.presets import GEMMA_3_12B, LTX_2_3, NUM_HIDDEN_STATES, UPSCALERS
from ltx_jax.text import TEXT_LENGTH
from scripts._bench import published_shapes

BITS, BLOCK_SIZE = 5, 128
# Beside the 28 linears of a block the package packs three; which ones it does not say. These were packed in the
# miniature release that the tests read.
OTHERS_PACKED = ("proj_out", "audio_proj_out", "av_ca_v2a_gate_adaln_single.linear")
NOT_READ = "vocoder.mel_stft.stft_fn.inverse_basis"  # in the published file, but of no model; as its forward basis
PACKAGE, TEXT_ENCODER = "LTX-2.3-22B-PolarQuant-Q5", "gemma-3-12b-it"
UPSCALER_FILES = {
    "upscaler_spatial_x2": "ltx-2.3-spatial-upscaler-x2-1.1",
    "upscaler_temporal_x2": "ltx-2.3-temporal-upscaler-x2-1.0",
}
CODES_FILE_BYTES, TEXT_FILE_BYTES = 1_500_000_000, 4_900_000_000  # as the published files
KIND_BYTES = {"BF16": 2, "F16": 2, "U8": 1, "I64": 8}


# -------------------------------------------------------------------- release


@dataclass(frozen=True, kw_only=True)
class Release:
    """The configurations of everything that is published, as published."""

    metadata: dict[str, Any]  # `config` of the main checkpoint
    upscalers: dict[str, dict[str, Any]]
    gemma: dict[str, Any] | None = None  # config.json of the text encoder
    text_length: int = TEXT_LENGTH

    @classmethod
    def ltx_2_3(cls, *, blocks: int, upscalers: bool = True, gemma_blocks: int = 0) -> "Release":
        """LTX-2.3 with so many of its 48 blocks, and so many of the 48 of its text encoder (0: without one)."""
        text = GEMMA_3_12B["text_config"] | {"num_hidden_layers": gemma_blocks}
        return cls(
            metadata=LTX_2_3 | {"transformer": LTX_2_3["transformer"] | {"num_layers": blocks}},
            upscalers=UPSCALERS if upscalers else {},
            gemma=GEMMA_3_12B | {"text_config": text} if gemma_blocks else None,
        )

    @cached_property
    def configs(self) -> Configs:
        states = NUM_HIDDEN_STATES
        if self.gemma is not None:
            states = 1 + self.gemma.get("text_config", self.gemma)["num_hidden_layers"]
        return Configs.from_metadata(self.metadata, self.gemma, self.upscalers, num_hidden_states=states)

    @cached_property
    def expected(self) -> Expected:
        return Expected(self.configs)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint that was packed: 5,947 of LTX-2.3."""
        shapes = {name: target.shape for name, target in self.expected.targets.items()}
        return shapes | {NOT_READ: shapes[NOT_READ.replace("inverse", "forward")]}

    @property
    def packed(self) -> dict[str, tuple[int, int]]:
        """Those that the package has as codes: 1,347 of LTX-2.3."""
        others = {f"{PREFIX}{name}.weight" for name in OTHERS_PACKED}
        return {
            name: self.expected.matrices[name]
            for name, target in self.expected.targets.items()
            if name in others
            or (target.linear and name.startswith(f"{PREFIX}transformer_blocks.") and "to_gate_logits" not in name)
        }


# --------------------------------------------------------------------- values


def cycle(pool: np.ndarray, start: int, count: int) -> Iterator[np.ndarray]:
    """`count` rows of a pool from row `start` on, round and round, in pieces."""
    start %= len(pool)
    while count:
        piece = pool[start : start + count]
        yield piece
        start, count = 0, count - len(piece)


# Random weights as fast as a disk takes them: slices of a few megabytes that are drawn once. Such a pool has a prime
# length, so that equally long rows begin at other places of it: no two rows of a weight are equal.
_BLOCKS, _NORMALS = 65_521, 1_048_573


@cache
def coded_blocks() -> tuple[np.ndarray, np.ndarray]:
    """Packed bytes `[blocks, 80]` and norms `[blocks]` of Gaussian weights of deviation 1, coded with table B."""
    weight = np.random.default_rng(0).standard_normal((_BLOCKS, BLOCK_SIZE), np.float32)
    coded = quantize(weight, bits=BITS, block_size=BLOCK_SIZE, table="B")
    stream = pack(coded.codes, bits=BITS, packing="M").view(np.uint8)
    return stream.reshape(_BLOCKS, -1), coded.norms[:, 0].astype(np.float32)


@cache
def normals(mean: float, deviation: float) -> np.ndarray:
    drawn = np.random.default_rng(1).standard_normal(_NORMALS, np.float32)
    return (mean + np.float32(deviation) * drawn).astype(ml_dtypes.bfloat16)


def plain_values(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A kept tensor: matrices keep the size of what they multiply, norms are near 1, the rest is small."""
    if name.endswith(("norm.weight", "std-of-means")):
        pool = normals(1.0, 0.1)
    elif len(shape) > 1 and not name.endswith("table"):
        pool = normals(0.0, prod(shape[1:]) ** -0.5)
    else:
        pool = normals(0.0, 0.02)
    yield from cycle(pool, crc32(name.encode()), prod(shape))


def packed_values(name: str, num_blocks: int) -> Iterator[np.ndarray]:
    yield from cycle(coded_blocks()[0], crc32(name.encode()), num_blocks)


def norm_values(name: str, num_blocks: int, in_features: int) -> Iterator[np.ndarray]:
    """Norms of the same blocks, for weights of deviation 1 / sqrt(in_features)."""
    for piece in cycle(coded_blocks()[1], crc32(name.encode()), num_blocks):
        yield (piece / np.float32(in_features**0.5)).astype(np.float16)


# ---------------------------------------------------------------------- files


class Tensor(NamedTuple):
    """A tensor to be written: nothing of it exists before its pieces are asked for, once."""

    kind: str  # as safetensors names it
    shape: tuple[int, ...]
    pieces: Iterator[np.ndarray]

    @property
    def nbytes(self) -> int:
        return KIND_BYTES[self.kind] * prod(self.shape)


class File(NamedTuple):
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def release_files(release: Release, *, codes_file_bytes: int = CODES_FILE_BYTES) -> dict[str, File]:
    """The files of a release by path."""

    def plain(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: Tensor("BF16", shape, plain_values(name, shape)) for name, shape in shapes.items()}

    packed = release.packed
    weights = [_packed_weight(name, *packed[name]) for name in sorted(packed)]
    files = {
        f"{PACKAGE}/polarquant/codes/chunk_{i:02d}_codes.safetensors": File(tensors, {})
        for i, tensors in enumerate(_cut(weights, codes_file_bytes))
    }
    kept = {name: shape for name, shape in release.shapes.items() if name not in packed}
    metadata = {"model_version": "2.3.0", "config": json.dumps(release.metadata)}
    files[f"{PACKAGE}/polarquant/bf16/ltx23_bf16.safetensors"] = File(plain(kept), metadata)
    for component, config in release.configs.upscalers.items():
        table = UPSCALER_TABLES[config.kind]
        shapes = published_shapes(lambda rngs, config=config: LatentUpscaler(config, rngs=rngs), table)
        metadata = {"config": json.dumps(release.upscalers[component])}
        files[f"{PACKAGE}/upscalers/{UPSCALER_FILES[component]}.safetensors"] = File(plain(shapes), metadata)
    if (gemma := release.configs.gemma) is not None:
        shapes = published_shapes(lambda rngs: Gemma(gemma, rngs=rngs), GEMMA)
        named = plain({f"language_model.model.{name}": shape for name, shape in shapes.items()})
        shards = _cut(({name: tensor} for name, tensor in sorted(named.items())), TEXT_FILE_BYTES)
        for i, tensors in enumerate(shards):
            path = f"{TEXT_ENCODER}/model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            files[path] = File(tensors, {"format": "pt"})
    return files


def _packed_weight(name: str, out_features: int, in_features: int) -> dict[str, Tensor]:
    """The three tensors of a packed weight: layout V5, four entries of meta."""
    blocks_a_row = -(-in_features // BLOCK_SIZE)
    num_blocks = out_features * blocks_a_row
    length = packed_length(num_blocks * BLOCK_SIZE, bits=BITS, packing="M")
    meta = np.asarray([out_features, blocks_a_row, BLOCK_SIZE, num_blocks * BLOCK_SIZE], np.int64)
    return {
        f"{mangle(name)}__meta": Tensor("I64", meta.shape, iter([meta])),
        f"{mangle(name)}__norms": Tensor(
            "F16", (out_features, blocks_a_row), norm_values(name, num_blocks, in_features)
        ),
        f"{mangle(name)}__packed": Tensor("U8", (length,), packed_values(name, num_blocks)),
    }


def _cut(groups: Iterable[dict[str, Tensor]], limit: int) -> list[dict[str, Tensor]]:
    """Groups of tensors in order, as many to a file as fit the limit; none is cut."""
    files: list[dict[str, Tensor]] = []
    size = limit
    for group in groups:
        added = sum(tensor.nbytes for tensor in group.values())
        if not files or size + added > limit:
            files.append({})
            size = 0
        files[-1] |= group
        size += added
    return files


def write_file(path: Path, file: File, advance: Callable[[int], None]) -> None:
    """Streams a safetensors file; it has its name only when it is whole."""
    # Wider types first, as the safetensors library orders them: every tensor is aligned.
    ordered = sorted(file.tensors.items(), key=lambda item: (-KIND_BYTES[item[1].kind], item[0]))
    header: dict[str, Any] = {"__metadata__": dict(file.metadata)} if file.metadata else {}
    end = 0
    for name, tensor in ordered:
        header[name] = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, open(temporary, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for piece in tensor.pieces:
                out.write(np.ascontiguousarray(piece).view(np.uint8).data)
                advance(piece.nbytes)


def write_files(folder: Path, release: Release, files: Mapping[str, File], advance: Callable[[int], None]) -> None:
    """Writes the files of a release below a folder; `advance(bytes)` is called as they grow."""
    for path, file in files.items():
        write_file(folder / path, file, advance)
    if release.gemma is None:
        return
    shards = {Path(path).name: file for path, file in files.items() if path.startswith(TEXT_ENCODER)}
    index = {name: shard for shard, file in shards.items() for name in file.tensors}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.save(str(folder / TEXT_ENCODER / "tokenizer.json"))  # special tokens alone
    for name, content in (
        ("model.safetensors.index.json", {"weight_map": index}),
        ("tokenizer_config.json", {"model_max_length": release.text_length}),
        ("config.json", release.gemma),
    ):
        (folder / TEXT_ENCODER / name).write_text(json.dumps(content))
