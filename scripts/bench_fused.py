"""The fused kernel beside XLA's forms: first whether its bits are theirs, then milliseconds, on the card at hand.

    python scripts/bench_fused.py --json fused.json

"plain" multiplies by a bfloat16 weight that is there already: what a form takes longer is its unpacking. The second
table unpacks alone; its rate counts what has to be moved: the packed weight in, the bfloat16 weight out. Without an
NVIDIA card the kernel is interpreted on a tiny shape, which checks its arithmetic; those times say nothing.
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
import numpy as np

from hlwq_jax import FORMS, check_fused, dequantize_planes, fused_weight, lloyd_max, plane_widths, quantized_matmul
from scripts._bench import Seconds, as_json, interleaved, machine, write_json

SIZES = ((4096, 4096), (16384, 4096), (4096, 16384))
AT_FIVE_BITS: dict[str, Any] = {"bits": 5, "block_size": 128}


def random_packed(out_features: int, in_features: int) -> list[jax.Array]:
    """Planes, norms and scaled centroids of a random weight."""
    rng = np.random.default_rng(0)
    lo, hi = (rng.integers(0, 2**32, (out_features, n), dtype=np.uint32) for n in plane_widths(in_features, 5))
    norms = rng.uniform(0.1, 1, (out_features, in_features // 128)).astype(np.float16)
    return [jnp.asarray(part) for part in (lo, hi, norms, lloyd_max(5) / np.float32(128**0.5))]


def repeated(case: Callable[[], jax.Array], times: int) -> Callable[[], list[jax.Array]]:
    """Launched several times before anyone waits, so that the time of a launch hides behind the one before."""
    return lambda: [case() for _ in range(times)]


def measure(cases: dict[str, Callable[[], jax.Array]], *, rounds: int, times: int) -> dict[str, Seconds]:
    seconds = interleaved({name: repeated(case, times) for name, case in cases.items()}, rounds)
    return {name: Seconds(*(value / times for value in taken)) for name, taken in seconds.items()}


def show(title: str, seconds: dict[str, Seconds]) -> None:
    """Prints one table in milliseconds, with the ratios to its first case."""
    first = next(iter(seconds.values()))
    print(f"{title}\n  {'milliseconds':20}{'median':>10}{'best':>10}  times {next(iter(seconds))!r}")
    for name, (median, best) in seconds.items():
        print(f"  {name:20}{median * 1e3:10.3f}{best * 1e3:10.3f}{median / first.median:10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=parse_size, nargs="+", help="outputs x inputs, such as 4096x4096")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 512 2048 8192")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the device, the check and all times here")
    args = parser.parse_args()

    on_card = jax.devices()[0].platform == "gpu"
    if not on_card:
        print("no NVIDIA card here: the kernel is interpreted on a tiny shape, and the times say nothing of a card")
    sizes = args.sizes or (SIZES if on_card else ((256, 256),))
    tokens = args.tokens or ([512, 2048, 8192] if on_card else [64])
    times = 20 if on_card else 1
    check = check_fused() if on_card else check_fused(shapes=sizes, interpret=True)
    print(check)
    forms = [form for form in FORMS if form != "fused" or check.equal]

    report: dict[str, Any] = {"machine": machine(), "check": str(check), "equal": check.equal, "proved": check.proved}
    for out_features, in_features in sizes:
        packed = random_packed(out_features, in_features)
        dense = jax.jit(partial(dequantize_planes, **AT_FIVE_BITS))(*packed)
        size = f"{out_features}x{in_features}"
        for num_tokens in tokens:
            x = jnp.asarray(np.random.default_rng(1).standard_normal((num_tokens, in_features)), jnp.bfloat16)
            cases = {"plain": partial(jax.jit(lambda x, weight: x @ weight.T), x, dense)}
            for form in forms:
                cases[form] = partial(jax.jit(partial(quantized_matmul, form=form, **AT_FIVE_BITS)), x, *packed)
            seconds = measure(cases, rounds=args.rounds, times=times)
            show(f"product, {size}, {num_tokens} tokens", seconds)
            report[f"product {size} {num_tokens} tokens"] = as_json(seconds)
        unpack = {"exact": partial(jax.jit(partial(dequantize_planes, **AT_FIVE_BITS)), *packed)}
        if check.equal:
            unpack["fused"] = partial(jax.jit(partial(fused_weight, **AT_FIVE_BITS)), *packed)
        seconds = measure(unpack, rounds=args.rounds, times=times)
        show(f"unpacking alone, {size}", seconds)
        moved = sum(part.nbytes for part in packed) + dense.nbytes
        rates = {f"{name} GB/s": moved / taken.median / 1e9 for name, taken in seconds.items()}
        print(f"  of {moved / dense.size:.2f} bytes a weight: " + ", ".join(f"{n} {r:.1f}" for n, r in rates.items()))
        report[f"unpacking {size}"] = as_json(seconds) | rates
    write_json(args.json, report)


def parse_size(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    if not (out_features.isdigit() and in_features.isdigit() and int(in_features) % 128 == 0):
        raise argparse.ArgumentTypeError(f"expected outputs x inputs, inputs a multiple of 128, got {text!r}")
    return int(out_features), int(in_features)


if __name__ == "__main__":
    main()
