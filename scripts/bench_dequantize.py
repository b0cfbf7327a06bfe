"""From packed codes to a bfloat16 weight, in weights a second: ours, the original package's and GGUF's Q5_K.

    python scripts/bench_dequantize.py --json dequantize.json

All take one Gaussian weight, packed in memory, and make a weight that a matrix product can take. Ours and the original
must decode the same codes to the same values, but for a few that float32 sums in another order round to the next
bfloat16. Beside the whole, the steps of ours are timed one by one, on a slice that stays in the caches.
`pip install -e .[parity]` installs the peers; without them our own cases run alone.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hlwq_jax import (
    BEST_RECIPE,
    Quantized,
    dequantize_in_slices,
    dequantize_planes,
    hadamard_matrix,
    lloyd_max,
    pack,
    pack_planes,
    planes_from_stream,
    quantize,
    unpack,
    unpack_planes,
)
from scripts._bench import Peers, Seconds, as_json, interleaved, machine, write_json
from scripts._q5_k import SUPER, quantize_q5_k

Cases = dict[str, Callable[[], Any]]
BLOCK_SIZE = 128
SLICE_VALUES = 2**20  # as `dequantize_in_slices` takes at a time
OURS = "ours, planes to the weight"
MAX_DIFFERENT = 1e-3  # of decoded values; the share next to a tie of bfloat16 is about 1e-4


def our_cases(weight: Quantized) -> Cases:
    out_features, in_features = weight.codes.shape
    layout: dict[str, Any] = {"bits": 5, "block_size": BLOCK_SIZE}
    lo, hi = pack_planes(weight.codes, 5)
    assert hi is not None
    stream = pack(weight.codes, bits=5, packing="M")
    trellis = BEST_RECIPE.quantize(np.ones((1, in_features), np.float32))  # whose codes do not matter to the time

    def in_slices(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
        return dequantize_in_slices(lo, hi, weight.norms, weight.scaled_centroids, **layout, in_features=in_features)

    def trellis_in_slices() -> np.ndarray:
        parts = lo, hi, weight.norms, trellis.scaled_centroids
        history_bits, signs = trellis.history_bits, trellis.signs
        return dequantize_in_slices(*parts, **layout, in_features=in_features, history_bits=history_bits, signs=signs)

    def repack() -> tuple[np.ndarray, np.ndarray]:
        return planes_from_stream(stream, out_features=out_features, row_codes=in_features)

    def from_stream_by_numpy() -> np.ndarray:
        codes = unpack(stream, num_codes=weight.codes.size, bits=5, packing="M").reshape(weight.codes.shape)
        return replace(weight, codes=codes).dequantize()

    decode = jax.jit(partial(dequantize_planes, **layout))
    planes = [jnp.asarray(part) for part in (lo, hi, weight.norms, weight.scaled_centroids)]
    return {
        OURS: lambda: in_slices(lo, hi),
        "ours, published bytes to planes to the weight": lambda: in_slices(*repack()),
        "ours, planes of a trellis with signs": trellis_in_slices,
        "ours, planes all at once (jitted)": lambda: decode(*planes),
        "ours, published bytes by numpy": from_stream_by_numpy,
        "ours, published bytes to planes, no more": repack,
    }


def our_steps(in_features: int) -> Cases:
    """The steps of decoding one slice of planes, each compiled by itself."""
    rng = np.random.default_rng(0)
    rows, num_blocks = SLICE_VALUES // in_features, in_features // BLOCK_SIZE
    codes = rng.integers(0, 32, (rows, in_features), np.uint8)
    lo, hi = (jnp.asarray(plane) for plane in pack_planes(codes, 5))
    levels, norms = jnp.asarray(lloyd_max(5)), jnp.asarray(rng.random((rows, num_blocks)), jnp.float16)
    values = jnp.asarray(rng.standard_normal((rows, num_blocks, BLOCK_SIZE), np.float32))
    layout = {"bits": 5, "num_codes": in_features}
    steps: dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]] = {
        "unpack to a byte a code": (lambda lo, hi: unpack_planes(lo, hi, **layout).astype(jnp.uint8), (lo, hi)),
        "unpack and look up": (lambda lo, hi, levels: levels[unpack_planes(lo, hi, **layout)], (lo, hi, levels)),
        "rotate by one product of 128": (lambda values: values @ hadamard_matrix(BLOCK_SIZE), (values,)),
        "norms, to bfloat16": (lambda x, norms: (x * norms[..., None]).astype(jnp.bfloat16), (values, norms)),
        "rotate, norms, to bfloat16": (
            lambda x, norms: (
                jnp.matmul(x, hadamard_matrix(x.shape[-1]), precision="highest") * norms[..., None]
            ).astype(jnp.bfloat16),
            (values, norms),
        ),
    }
    return {name: partial(jax.jit(step), *operands) for name, (step, operands) in steps.items()}


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


def show(title: str, seconds: dict[str, Seconds], num_weights: int, *, against: str) -> None:
    reference = seconds[against] if against in seconds else next(iter(seconds.values()))
    print(f"\n| {title}: million weights a second | median | best | times {against} |\n|---|---|---|---|")
    for name, (median, best) in seconds.items():
        rates = f"{num_weights / median / 1e6:.0f} | {num_weights / best / 1e6:.0f}"
        print(f"| {name} | {rates} | {reference.median / median:.2f} |", flush=True)


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
        different = compare(cases[OURS](), cases["polarquant"]())
    seconds = interleaved(cases, args.rounds)
    show(f"one weight [{shape[0]}, {shape[1]}] to bfloat16", seconds, plain.size, against="polarquant")
    steps = interleaved(our_steps(args.in_features), 20 * args.rounds)
    show("one slice", steps, SLICE_VALUES // args.in_features * args.in_features, against="unpack to a byte a code")
    peers.say()
    report = {"machine": machine(("polarquant", "gguf", "diffusers", "torch")), "shape": shape, "rounds": args.rounds}
    write_json(
        args.json, report | {"seconds": as_json(seconds), "steps": as_json(steps), "different_from_original": different}
    )


if __name__ == "__main__":
    main()
