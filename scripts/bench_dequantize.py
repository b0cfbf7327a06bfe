"""From packed codes to a bfloat16 weight, in weights a second: ours, the original package's and GGUF's Q5_K.

    python scripts/bench_dequantize.py --json dequantize.json

All take one Gaussian weight, packed in memory, and make a weight that a matrix product can take. Ours and the original
must decode the same codes to the same values, but for a few that float32 sums in another order round to the next
bfloat16. `pip install -e .[parity]` installs the peers; without them our own cases run alone.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hlwq_jax import Quantized, dequantize_planes, pack, pack_planes, planes_from_stream, quantize, unpack
from scripts._bench import Peers, Seconds, as_json, interleaved, machine, write_json
from scripts._q5_k import SUPER, quantize_q5_k

Cases = dict[str, Callable[[], Any]]
BLOCK_SIZE = 128
MAX_DIFFERENT = 1e-3  # of decoded values; the share next to a tie of bfloat16 is about 1e-4


def our_cases(weight: Quantized) -> Cases:
    out_features, in_features = weight.codes.shape
    decode = jax.jit(partial(dequantize_planes, bits=5, block_size=BLOCK_SIZE))
    lo, hi = pack_planes(weight.codes, 5)
    assert hi is not None
    planes = [jnp.asarray(part) for part in (lo, hi, weight.norms, weight.scaled_centroids)]
    stream = pack(weight.codes, bits=5, packing="M")

    def from_stream_by_numpy() -> np.ndarray:
        codes = unpack(stream, num_codes=weight.codes.size, bits=5, packing="M").reshape(weight.codes.shape)
        parts = {"codes": codes, "norms": weight.norms, "centroids": weight.centroids}
        return Quantized(**parts, bits=5, block_size=BLOCK_SIZE, in_features=in_features).dequantize()

    def repack() -> tuple[np.ndarray, np.ndarray]:
        return planes_from_stream(stream, out_features=out_features, row_codes=in_features)

    return {
        "ours, planes on the device (jitted)": lambda: decode(*planes),
        "ours, published bytes by numpy": from_stream_by_numpy,
        "ours, published bytes to planes, no more": repack,
    }


def original_cases(modules: list[Any], weight: Quantized) -> Cases:
    torch, packing, converter = modules
    stream = packing.pack_codes_q5(torch.from_numpy(weight.codes.astype(np.int8)))
    norms, centroids = (torch.from_numpy(np.array(part)) for part in (weight.norms, weight.centroids))

    def decode() -> Any:
        return converter._dequant_weight(packing.unpack_codes_q5(stream), norms, centroids)

    return {"polarquant": decode}


def gguf_cases(modules: list[Any], blocks: np.ndarray) -> Cases:
    gguf, quants = modules
    q5_k = gguf.GGMLQuantizationType.Q5_K
    return {"GGUF Q5_K, gguf (numpy)": lambda: quants.dequantize(blocks, q5_k).astype(ml_dtypes.bfloat16)}


def diffusers_cases(modules: list[Any], blocks: np.ndarray) -> Cases:
    torch, quantizer, gguf = modules
    parameter = quantizer.GGUFParameter(torch.from_numpy(blocks), quant_type=gguf.GGMLQuantizationType.Q5_K)

    def decode() -> Any:
        with torch.inference_mode():
            return quantizer.dequantize_gguf_tensor(parameter).to(torch.bfloat16)

    return {"GGUF Q5_K, diffusers (torch)": decode}


def compare(ours: Any, original: Any) -> float:
    """The share of values that the original decodes otherwise; exits where it is not that of roundings."""
    different = float(np.mean(np.asarray(ours).astype(np.float32) != original.float().numpy()))
    if different > MAX_DIFFERENT:
        raise SystemExit(f"{different:.2%} of the values differ from the original's")
    print(f"{different:.1e} of the values round to another bfloat16 than the original's")
    return different


def show(title: str, seconds: dict[str, Seconds], num_weights: int) -> None:
    first = next(iter(seconds.values()))
    print(f"{title}\n  {'million weights a second':44}{'median':>10}{'best':>10}  times {next(iter(seconds))!r}")
    for name, (median, best) in seconds.items():
        rates = f"{num_weights / median / 1e6:10.1f}{num_weights / best / 1e6:10.1f}"
        print(f"  {name:44}{rates}{first.median / median:10.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=4096, help=f"a multiple of {SUPER}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the machine, sizes and all figures here")
    args = parser.parse_args(argv)
    if args.in_features % SUPER:
        parser.error(f"--in-features must be a multiple of {SUPER}, got {args.in_features}")
    shape = args.out_features, args.in_features
    plain = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    weight, blocks = quantize(plain), quantize_q5_k(plain)
    cases, peers = our_cases(weight), Peers()
    if (modules := peers.load("torch", "polarengine_vllm.packing", "polarengine_vllm.weight_converter")) is not None:
        cases |= original_cases(modules, weight)
    if (modules := peers.load("gguf", "gguf.quants")) is not None:
        cases |= gguf_cases(modules, blocks)
    if (modules := peers.load("torch", "diffusers.quantizers.gguf.utils", "gguf")) is not None:
        cases |= diffusers_cases(modules, blocks)
    different = None
    if "polarquant" in cases:
        different = compare(cases["ours, planes on the device (jitted)"](), cases["polarquant"]())
    seconds = interleaved(cases, args.rounds)
    show(f"one weight [{shape[0]}, {shape[1]}] to bfloat16", seconds, plain.size)
    peers.say()
    report = {"machine": machine(("polarquant", "gguf", "diffusers", "torch")), "shape": shape, "rounds": args.rounds}
    write_json(args.json, report | {"seconds": as_json(seconds), "different_from_original": different})


if __name__ == "__main__":
    main()
