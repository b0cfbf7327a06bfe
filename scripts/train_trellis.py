"""Trains the tables of `hlwq_jax.trellis` and writes them to hlwq_jax/trellis.npz: six minutes on two cores.

    python scripts/train_trellis.py [--bits 5] [--history-bits 7] [--out FILE]

Lloyd's iteration on fresh Gaussian blocks of 128 values, of unit mean square as the quantizer makes them: encode by the
Viterbi algorithm, then move each level to the mean of the values it stands for. It ends in the optimum nearest to its
start, so the start matters: an Ungerboeck code, whose windows choose one of four interleaved sets of levels. From sets
shifted by window in order the error stays some 8 % higher. The seed is fixed; another machine may round otherwise, and
the last digits differ.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from scipy.special import ndtri

from hlwq_jax.trellis import HISTORY_BITS, TRELLIS_BITS, trellis_encode, trellis_indices

BLOCK_SIZE = 128
ITERATIONS = 40
LAST = 10  # of them, on four times as many values
SPREAD = 1.15  # of the first levels against those of equal probability

# Parity checks (h1, h0), in octal as published. Source: Ungerboeck, "Trellis-coded modulation with redundant signal
# sets", part II, IEEE Communications Magazine 25 (1987), table I: amplitude modulation.
UNGERBOECK = {3: (0o04, 0o13), 5: (0o10, 0o45), 7: (0o126, 0o235)}


def start(bits: int, history_bits: int) -> Float32[np.ndarray, "windows levels"]:
    """The levels of an Ungerboeck code: every fourth of one ladder, from the step that the window's parities say."""
    h1, h0 = UNGERBOECK[history_bits]
    per_window = 2 ** (bits - 1)
    ladder = SPREAD * ndtri((np.arange(4 * per_window) + 0.5) / (4 * per_window))
    steps = [2 * ((w & h0).bit_count() % 2) + (w & h1).bit_count() % 2 for w in range(2 ** (history_bits + 1))]
    return np.stack([ladder[step::4] for step in steps]).astype(np.float32)


def draw(rng: np.random.Generator, num_blocks: int) -> Float32[np.ndarray, "blocks block"]:
    values = rng.standard_normal((num_blocks, BLOCK_SIZE), dtype=np.float32)
    return values / np.sqrt(np.mean(values**2, axis=1, keepdims=True))


def train(bits: int, history_bits: int) -> Float32[np.ndarray, " levels"]:
    rng = np.random.default_rng([bits, history_bits])
    table = start(bits, history_bits).ravel()
    for iteration in range(ITERATIONS):
        last = iteration >= ITERATIONS - LAST
        # Enough that a level stands for some 250 values, then 1,000.
        values = draw(rng, max(2048, 2 * table.size) * (4 if last else 1))
        codes = trellis_encode(values, table, bits=bits)
        indices = trellis_indices(codes, bits=bits, history_bits=history_bits).ravel()
        error = np.mean((table[indices] - values.ravel()) ** 2)
        sums = np.bincount(indices, values.ravel(), table.size)
        counts = np.bincount(indices, minlength=table.size)
        # A level that nothing chose stays where it was.
        table = ((sums + table) / (counts + 1)).astype(np.float32)
        table = np.sort(table.reshape(-1, 2 ** (bits - 1)), axis=1).ravel()
        print(f"bits {bits} history {history_bits} iteration {iteration}: squared error {error:.6f}", flush=True)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=TRELLIS_BITS)
    parser.add_argument("--history-bits", type=int, nargs="*", default=HISTORY_BITS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "hlwq_jax" / "trellis.npz")
    args = parser.parse_args(argv)
    tables = {f"bits{bits}_history{h}": train(bits, h) for bits in args.bits for h in args.history_bits}
    save: Any = np.savez  # whose stub takes every keyword for an option
    save(args.out, **tables)


if __name__ == "__main__":
    main()
