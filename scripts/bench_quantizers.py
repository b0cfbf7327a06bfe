"""Squared error against bits a weight, of our quantizers and of others; and how many weights a second ours take.

    python scripts/bench_quantizers.py --json quantizers.json --plot docs/images/quantization.png
    python scripts/bench_quantizers.py --no-errors      the speed alone

The error is the sum of squared differences over the sum of squared weights, of random matrices of five families and of
trained ones that Python packages ship. Bits are those stored for a weight of 4096 x 4096: codes, norms or scales, and
what else a reader needs. Peers come from the packages in the `parity` extra; those not installed are named and skipped.
Tables are printed as docs/quantization.md has them. How fast weights are decoded is for scripts/bench_dequantize.py.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert.quantizing import RECIPES as COMMAND_RECIPES
from convert.quantizing import quantize_tensor
from hlwq_jax import BEST_RECIPE, PUBLISHED_RECIPE, Quantized, Recipe, TensorFile
from hlwq_jax.quantize import rows_at_once
from scripts._bench import Peers, Seconds, as_json, interleaved, machine, write_json
from scripts._quantizer_peers import Codec, Weight, peer_codecs, trained_weights

LAYER = 4096  # rows and columns of the weight that bits are stated for
PACKAGES = "polarquant", "gguf", "pywhispercpp", "bitsandbytes", "hqq", "torchao", "torch"

BEST_SCALAR = Recipe(table="converged", sign_seed=0, norm="least-squares")
TRELLIS = Recipe(history_bits=7)
RECIPES = [
    # Each option alone, then together.
    PUBLISHED_RECIPE,
    Recipe(sign_seed=0),
    Recipe(norm="least-squares"),
    Recipe(norm="fitted"),
    Recipe(table="converged"),
    Recipe(table="converged", sign_seed=0),
    Recipe(table="converged", norm="least-squares"),
    BEST_SCALAR,
    *(replace(TRELLIS, history_bits=history_bits) for history_bits in (3, 5, 7)),
    replace(TRELLIS, sign_seed=0),
    replace(TRELLIS, norm="least-squares"),
    *(replace(BEST_RECIPE, history_bits=history_bits) for history_bits in (3, 5, 7)),
    # Other blocks and other widths.
    *(replace(BEST_RECIPE, block_size=block_size) for block_size in (64, 256)),
    *(Recipe(bits=bits) for bits in (3, 4, 6, 7, 8)),
    *(replace(BEST_SCALAR, bits=bits) for bits in (3, 4, 6, 7, 8)),
    *(replace(BEST_RECIPE, bits=bits) for bits in (3, 4, 6)),
]

FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Student-t(5)": lambda rng, shape: rng.standard_t(5, size=shape),
    "low rank + noise": lambda rng, shape: (
        rng.standard_normal((shape[0], 16)) @ rng.standard_normal((16, shape[1])) / 4 + 0.5 * rng.standard_normal(shape)
    ),
    "non-zero mean": lambda rng, shape: rng.standard_normal(shape) + 1,
}


def name_of(recipe: Recipe) -> str:
    parts = [f"trellis {recipe.history_bits}" if recipe.history_bits else f"table {recipe.table}"]
    parts += ["signs"] * (recipe.sign_seed is not None) + [f"{recipe.norm} norm"] * (
        recipe.norm != PUBLISHED_RECIPE.norm
    )
    parts += [f"{recipe.bits} bit"] * (recipe.bits != PUBLISHED_RECIPE.bits)
    parts += [f"blocks of {recipe.block_size}"] * (recipe.block_size != PUBLISHED_RECIPE.block_size)
    return ", ".join(parts)


def our_codec(recipe: Recipe) -> Codec:
    def run(weight: Weight) -> tuple[Weight, float]:
        quantized = recipe.quantize(weight)
        return quantized.dequantize().astype(np.float32), stored_bits(quantized)

    return run


def stored_bits(quantized: Quantized) -> float:
    """Bits a weight of a layer of 4096 x 4096, with its norms, table and signs."""
    table, signs = 32 * len(quantized.centroids), 0 if quantized.signs is None else 8 * LAYER
    return quantized.bits + 16 / quantized.block_size + (table + signs) / LAYER**2


def relative_error(codec: Codec, weights: list[Weight]) -> tuple[float, float]:
    """Squared error against squared weights of all matrices together, and bits a weight."""
    wrong = squares = bits = 0.0
    for weight in weights:
        decoded, bits = codec(weight)
        wrong += float(np.sum(np.square(decoded - weight, dtype=np.float64)))
        squares += float(np.sum(np.square(weight, dtype=np.float64)))
    return wrong / squares, bits


def measure_errors(rows: int, peers: Peers) -> dict[str, dict[str, float]]:
    """By codec: bits, and the error by family and by package of trained weights."""
    rng = np.random.default_rng(0)
    samples = {name: [draw(rng, (rows, LAYER)).astype(np.float32)] for name, draw in FAMILIES.items()}
    samples |= dict(trained_weights(peers, most=rows * LAYER))
    codecs = {name_of(recipe): our_codec(recipe) for recipe in RECIPES} | peer_codecs(peers)
    found: dict[str, dict[str, float]] = {}
    print("\nsquared error / squared weights, times 1000\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in (["", "bits", *samples], ["---"] * (2 + len(samples)))))
    for name, codec in codecs.items():
        errors = {sample: relative_error(codec, weights) for sample, weights in samples.items()}
        found[name] = {"bits": errors["Gaussian"][1]} | {sample: error for sample, (error, _) in errors.items()}
        cells = [name, f"{found[name]['bits']:.3f}", *(f"{1000 * error:.3g}" for error, _ in errors.values())]
        print(f"| {' | '.join(cells)} |", flush=True)
    return found


def quantize_cases(folder: Path) -> dict[str, tuple[Callable[[], Any], int]]:
    """A call that packs a weight in memory, one thread a core; and one that does all that a conversion does.

    That is: bfloat16 rows from a file, packed to planes, and one row in sixteen decoded to tell the error.
    """
    plain = np.random.default_rng(0).standard_normal((LAYER, LAYER), dtype=np.float32)
    step, threads = rows_at_once(LAYER), os.cpu_count() or 1

    def run(recipe: Recipe, weight: Weight) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda start: recipe.quantize(weight[start : start + step]), range(0, len(weight), step)))

    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    for recipe in (PUBLISHED_RECIPE, BEST_SCALAR, *(replace(BEST_RECIPE, history_bits=bits) for bits in (3, 5, 7))):
        weight = plain[: LAYER // 2 ** min(recipe.history_bits, 3)]  # a trellis takes longer: a part will do
        cases[name_of(recipe)] = partial(run, recipe, weight), weight.size
    save_file({"weight": plain.astype(ml_dtypes.bfloat16)}, folder / "weight.safetensors")
    tensor = TensorFile(folder / "weight.safetensors")["weight"]
    for name in ("published", "scalar"):
        cases[f"{name}, converted from a file"] = partial(quantize_tensor, tensor, COMMAND_RECIPES[name]), plain.size
    return cases


def measure_speed(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cases = quantize_cases(Path(folder))
        seconds = interleaved({name: run for name, (run, _) in cases.items()}, rounds)
    print("\n| million weights a second | median | best |\n|---|---|---|")
    rates: dict[str, Seconds] = {}
    for name, (median, best) in seconds.items():
        num_weights = cases[name][1]
        rates[name] = Seconds(num_weights / median / 1e6, num_weights / best / 1e6)
        print(f"| {name} | {rates[name].median:.1f} | {rates[name].best:.1f} |", flush=True)
    return as_json(rates)


def plot(errors: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Gaussian weights on the left, the worst of the other four families on the right."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # optional

    figure = Figure(figsize=(13, 6), layout="constrained")
    others = [family for family in FAMILIES if family != "Gaussian"]
    panels = {
        "Gaussian weights": lambda found: found["Gaussian"],
        "worst of " + ", ".join(others): lambda found: max(found[family] for family in others),
    }
    lines = {
        "published": (PUBLISHED_RECIPE, (3, 4, 5, 6)),
        "ours, scalar": (BEST_SCALAR, (3, 4, 5, 6)),
        "ours, trellis 7": (BEST_RECIPE, (3, 4, 5, 6)),
    }
    ours = {name_of(recipe) for recipe in RECIPES}
    for axes, (title, value) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for label, (recipe, widths) in lines.items():
            found = [errors[name_of(replace(recipe, bits=bits))] for bits in widths]
            axes.plot([one["bits"] for one in found], [value(one) for one in found], "o-", label=label)
        for name, one in errors.items():
            if name not in ours and one["bits"] < 7:
                axes.plot(one["bits"], value(one), "x", color="black")
                axes.annotate(name, (one["bits"], value(one)), xytext=(5, 2), textcoords="offset points", size=7)
        bits = np.linspace(3, 7, 50)
        axes.plot(bits, 4.0**-bits, ":", color="gray", label="rate-distortion limit of Gaussian weights")
        axes.set_title(title, size=10)
        axes.set(xlabel="bits a weight", xlim=(3, 7.4), yscale="log")
        axes.grid(visible=True, which="both", alpha=0.2)
    figure.axes[0].set_ylabel("squared error / squared weights")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="of the random matrices, which have 4096 columns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-errors", dest="errors", action="store_false")
    parser.add_argument("--no-speed", dest="speed", action="store_false")
    parser.add_argument("--plot", type=Path, help="write the plot of the errors here, as PNG")
    parser.add_argument("--json", type=Path, help="write the machine and all figures here")
    args = parser.parse_args(argv)
    if args.plot is not None and not args.errors:
        parser.error("--plot draws the errors: leave --no-errors out")
    peers, report = Peers(), dict[str, Any](machine=machine(PACKAGES))
    if args.errors:
        report["errors"] = measure_errors(args.rows, peers)
    if args.speed:
        report["quantize"] = measure_speed(args.rounds)
    peers.say()
    if args.plot is not None:
        plot(report["errors"], args.plot)
    write_json(args.json, report)


if __name__ == "__main__":
    main()
