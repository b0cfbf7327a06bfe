"""Measures quantized layers: packed words against a byte a code, and the three forms against a dense product.

    python scripts/bench_quantized_linear.py --out-features 1024 --in-features 1024 --json bench.json

All cases of one table run in turn, round after round, so that a slow moment of the machine hits them alike; medians and
ratios to the first case are printed. Read the ratios: times depend on the machine and on what else runs there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hlwq_jax import FORMS, QuantizedLinear, choose_form, lloyd_max, pack_planes, quantize, unpack_planes


def medians(cases: dict[str, Callable[[], jax.Array]], rounds: int) -> dict[str, float]:
    """Milliseconds per case, after one call of each that compiles."""
    for case in cases.values():
        jax.block_until_ready(case())
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(case())
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_layouts(out_features: int, in_features: int, rounds: int) -> dict[str, dict[str, float]]:
    """Unpack, look up and scale one weight to bfloat16: what precedes the product in the "rotate_input" form."""
    rng = np.random.default_rng(0)
    norms = jnp.asarray(rng.random((out_features, in_features // 128)) + 0.1, jnp.float16)
    results = {}
    for bits in (4, 5, 6, 8):  # at 8 bits also two nibble planes, which bytes in words were preferred to
        codes = rng.integers(0, 2**bits, (out_features, in_features), dtype=np.uint8)
        lo, hi = (None if plane is None else jnp.asarray(plane) for plane in pack_planes(codes, bits))
        table = jnp.asarray(lloyd_max(bits))

        def scale(codes, table, norms):
            levels = table.at[codes.reshape(*norms.shape, 128)].get(mode="promise_in_bounds")
            return (levels * norms.astype(jnp.float32)[..., None]).astype(jnp.bfloat16).reshape(out_features, -1)

        @jax.jit
        def from_planes(lo, hi, table, norms, bits=bits, scale=scale):
            return scale(unpack_planes(lo, hi, bits=bits, num_codes=in_features), table, norms)

        from_bytes = jax.jit(scale)
        codes_on_device = jnp.asarray(codes)
        cases = {
            "words": partial(from_planes, lo, hi, table, norms),
            "bytes": partial(from_bytes, codes_on_device, table, norms),
        }
        if bits == 8:
            nibbles = [jnp.asarray(pack_planes(half, 4)[0]) for half in (codes & 15, codes >> 4)]

            @jax.jit
            def from_nibbles(lo, hi, table, norms, scale=scale):
                low, high = (unpack_planes(plane, None, bits=4, num_codes=in_features) for plane in (lo, hi))
                return scale(low | high << 4, table, norms)

            cases["nibble planes"] = partial(from_nibbles, *nibbles, table, norms)
        results[f"{bits} bits"] = medians(cases, rounds)
    return results


def bench_forms(
    out_features: int, in_features: int, tokens: list[int], dtypes: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    weight = np.random.default_rng(0).standard_normal((out_features, in_features), dtype=np.float32)
    layer = QuantizedLinear.from_quantized(quantize(weight))
    results = {}
    for dtype in dtypes:
        dense = jnp.asarray(weight, dtype)
        multiply = jax.jit(lambda x, w: x @ w.T)
        for num_tokens in tokens:
            x = jnp.asarray(np.random.default_rng(1).standard_normal((num_tokens, in_features)), dtype)
            cases: dict[str, Callable[[], jax.Array]] = {"dense": partial(multiply, x, dense)}
            for form in FORMS:
                if form == "fused" and jax.default_backend() != "gpu":
                    continue  # interpreted there, a thousand times slower: scripts/bench_fused.py
                layer.form = form
                cases[form] = partial(_jitted(layer), x)
            chosen = choose_form(num_tokens=num_tokens, shared_outputs=out_features, dtype=x.dtype)
            results[f"{dtype}, {num_tokens} tokens (auto: {chosen})"] = medians(cases, rounds)
    return results


def _jitted(layer: QuantizedLinear) -> Callable[[jax.Array], jax.Array]:
    graphdef, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))  # weights are arguments, never constants
    return lambda x: run(state, x)


def show(title: str, results: dict[str, dict[str, float]]) -> None:
    print(title)
    for row, times in results.items():
        first = next(iter(times.values()))
        print(f"  {row:40}" + "  ".join(f"{name} {ms:.2f} ms (x{ms / first:.2f})" for name, ms in times.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-features", type=int, default=1024)
    parser.add_argument("--in-features", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write device, sizes and all medians here")
    args = parser.parse_args()
    if args.in_features % 128:
        parser.error(f"--in-features must be a multiple of 128, got {args.in_features}")
    layouts = bench_layouts(args.out_features, args.in_features, args.rounds)
    show(f"one weight [{args.out_features}, {args.in_features}] to bfloat16, {jax.devices()[0].device_kind}", layouts)
    forms = bench_forms(args.out_features, args.in_features, args.tokens, args.dtypes, args.rounds)
    show("one product at 5 bits", forms)
    if args.json:
        sizes = {"out_features": args.out_features, "in_features": args.in_features, "rounds": args.rounds}
        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **sizes}
        args.json.write_text(json.dumps({**report, "layouts_ms": layouts, "forms_ms": forms}, indent=2) + "\n")


if __name__ == "__main__":
    main()
