"""Seconds to compile the denoising step: for a named card that need not be there, and for the device at hand.

    python scripts/bench_compile.py --card rtx4090 --json compile.json
    python scripts/bench_compile.py --blocks 4 --cards rtx3060 h100

Every figure comes from a process of its own, with caches in a folder of its own. The device at hand is asked twice: the
second process finds the program in JAX's persistent cache, as any later start of the pipeline does. Programs for a card
that is not there cannot be kept, so these are always cold. Tracing is what Python does before the compiler starts, and
happens at every start.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

AT_HAND = "device at hand"


def compile_once(blocks: int, size: tuple[int, int, int], card: str | None) -> dict[str, float]:
    """Seconds of tracing and of compiling the last stage's step, in this process."""
    import jax
    import jax.numpy as jnp

    from ltx_jax.cards import find_card
    from ltx_jax.checkpoint import published_manifest
    from ltx_jax.denoise import Denoiser, Pair, estimate
    from ltx_jax.environment import prepare
    from ltx_jax.planner import Planner
    from ltx_jax.presets import LTX_2_3
    from ltx_jax.settings import Settings

    prepare(for_card=card is not None)
    target: Any = jax.devices()[0] if card is None else find_card(card)
    device = target if card is None else target.device()
    started = time.perf_counter()
    width, height, num_frames = size
    planner = Planner(
        published_manifest(metadata=LTX_2_3 | {"transformer": LTX_2_3["transformer"] | {"num_layers": blocks}}),
        Settings(width=width, height=height, num_frames=num_frames),
        target=target,
        dtype=jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16),
        offload="none",
        attention="chunked",
        limit_bytes=2**62,
        loras=(),
        told=lambda stage: None,
    )
    states = planner.states(planner.denoising[-1])
    denoiser = Denoiser(planner.model("transformer"), states, planner.prompt(), precision=planner.precision)
    arguments = denoiser.arguments(1.0, Pair(*(None if state is None else state.initial for state in states)))
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "dtype") else x, arguments
    )
    lowered = estimate.lower(*shapes, **denoiser.options)
    traced = time.perf_counter()
    if card is not None:
        jax.config.update("jax_enable_compilation_cache", False)
    lowered.compile()
    return {"tracing": traced - started, "compiling": time.perf_counter() - traced}


def in_a_process(args: argparse.Namespace, card: str | None, cache: str) -> dict[str, float]:
    """`compile_once` in a new process, and the whole of that process."""
    words = [sys.executable, __file__, "--once", "--blocks", str(args.blocks), "--size", *map(str, args.size)]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    started = time.perf_counter()
    result = subprocess.run(
        [*words, *([] if card is None else ["--cards", card])],
        env=environment | {"LTX_JAX_CACHE": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    total = time.perf_counter() - started
    if result.returncode:
        raise SystemExit(f"compiling for {card or AT_HAND} failed:\n{result.stderr}")
    return {**json.loads(result.stdout.splitlines()[-1]), "process": total}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", "--card", nargs="*", default=["rtx4090"], help="names of ltx_jax.cards; none: none")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--size", type=int, nargs=3, default=[768, 512, 121], metavar=("WIDTH", "HEIGHT", "FRAMES"))
    parser.add_argument("--no-device", dest="device", action="store_false", help="named cards alone")
    parser.add_argument("--json", type=Path, help="write the machine, sizes and all figures here")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        card = args.cards[0] if "--cards" in (argv or sys.argv) else None
        print(json.dumps(compile_once(args.blocks, tuple(args.size), card)))
        return

    from ltx_jax.environment import prepare
    from scripts._bench import machine, write_json

    prepare()
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for card in args.cards:
            rows[f"{card}, cold"] = in_a_process(args, card, cache)
        if args.device:
            rows[f"{AT_HAND}, cold"] = in_a_process(args, None, cache)
            rows[f"{AT_HAND}, from the cache"] = in_a_process(args, None, cache)
    width, height, num_frames = args.size
    print(f"one denoising step, {args.blocks} blocks, {width}x{height}, {num_frames} frames")
    print(f"  {'seconds':36}{'tracing':>10}{'compiling':>11}{'process':>10}")
    for name, row in rows.items():
        print(f"  {name:36}{row['tracing']:10.1f}{row['compiling']:11.1f}{row['process']:10.1f}")
    write_json(args.json, {"machine": machine(), "blocks": args.blocks, "size": args.size, "seconds": rows})


if __name__ == "__main__":
    main()
