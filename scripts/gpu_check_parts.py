"""What `gpu_check.py` measures: one small function for each group of rows.

A part yields rows; it raises Skip where it cannot be measured, and keeps in the `Bench` what later parts compare with.
They run in the order of `parts`, by rising memory, as a device tells its peak since the start alone.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx

from hlwq_jax import FORMS, Form, QuantizedLinear, check_fused, set_form
from ltx_jax.denoise import estimate
from ltx_jax.memory import Memory, free_bytes, measure, nbytes
from ltx_jax.models.attention import has_cudnn_attention, set_attention_form
from ltx_jax.offload import HostLayers, Streamed
from ltx_jax.stack import run_layers
from scripts._gpu_bench import DTYPE, ROOM, Bench, GiB, Row, Skip, blocks, fill, memory_stats, on_card, with_depth

Part = Callable[[Bench], Iterator[Row]]

PAIR_BLOCKS = 4  # that are run with plain weights too, 0.8 GiB each at real size
FEW_TOKENS = 64  # with which products take next to no time beside reading their weights


def ceilings(bench: Bench) -> Iterator[Row]:
    """The best that this device does: one large product, one large copy."""
    n = bench.sizes.gemm
    a, b = (jax.random.normal(key, (n, n), DTYPE) for key in jax.random.split(jax.random.key(0)))
    multiply = jax.jit(lambda a, b: a @ b)
    seconds, _ = bench.timed(lambda: multiply(a, b))
    bench.ceilings["gemm"] = 2 * n**3 / seconds
    figures = {"seconds": seconds, "tflops": bench.ceilings["gemm"] / 1e12}
    yield Row(
        part="ceiling", what=f"bf16 product, {n}x{n}x{n}", result=f"{figures['tflops']:.4g} TFLOP/s", figures=figures
    )
    x = jnp.zeros(bench.sizes.copy_bytes // 4, jnp.uint32)
    copy = jax.jit(lambda x: x + 1)
    seconds, _ = bench.timed(lambda: copy(x))
    bench.ceilings["copy"] = 2 * x.nbytes / seconds
    figures = {"seconds": seconds, "gb_per_second": bench.ceilings["copy"] / 1e9}
    what = f"copy of {x.nbytes / 2**20:g} MiB, read and written"
    yield Row(part="ceiling", what=what, result=f"{figures['gb_per_second']:.4g} GB/s", figures=figures)


def choose_attention(bench: Bench) -> Iterator[Row]:
    """cuDNN's attention is the default of the other parts where it works, as in a run."""
    available = has_cudnn_attention(bench.device)
    bench.attention = "cudnn" if available else "chunked"
    for model in (bench.packed, bench.plain):
        set_attention_form(model, bench.attention)
    why = "works and agrees with XLA's" if available else "does not work on this device"
    yield Row(part="attention", what="probe", result=f"cuDNN's {why}: {bench.attention} in the other rows")


def stream(bench: Bench) -> Iterator[Row]:
    """Blocks from host memory, before any lie on the device; the comparison comes with the resident steps."""
    depth = bench.depth
    need = depth * nbytes(bench.packed.blocks) + 2 * GiB * on_card(bench.device)
    free = psutil.virtual_memory().available
    if free < need:
        raise Skip(f"{free / GiB:.1f} GiB of host memory are free, {need / GiB:.1f} are needed")
    bench.clock.need(3 * bench.compiling + 0.5 * depth)
    started = time.monotonic()
    host = HostLayers(blocks(bench.packed, depth), device=bench.device)
    building = time.monotonic() - started

    def transfer() -> None:
        for buffer in host.buffers:
            jax.block_until_ready(jax.device_put(buffer, host.sharding))

    bench.transfer, _ = bench.timed(transfer)
    rate = host.nbytes / bench.transfer / 1e9
    kind = "pinned" if isinstance(host.buffers[0], jax.Array) else "not pinned"
    yield Row(
        part="streamed",
        what="transfer alone",
        result=f"{bench.transfer:.4g} s for {depth} blocks, {rate:.4g} GB/s, {kind}; put there in {building:.1f} s",
        figures={"seconds": bench.transfer, "gb_per_second": rate, "bytes": host.nbytes, "blocks": depth},
    )
    model = Streamed(fill(bench.packed, 0), {"blocks": host})
    for clip in bench.clips:
        bench.streamed[clip] = bench.step(model, clip, depth)


def packing(bench: Bench, clip: str) -> Iterator[Row]:
    """What packed weights cost within a step: the same step with plain bf16 weights is all that differs.

    It counts what unpacking alone does not: the rotation of activations, and memory that products have to share.
    """
    weights = nbytes(bench.plain.blocks)
    room = free_bytes(bench.device) - nbytes(with_depth(bench.plain, 0)) - ROOM * on_card(bench.device)
    depth = min(PAIR_BLOCKS, bench.num_blocks, int(room / weights))
    if depth < 1:
        raise Skip(f"no memory for a block of plain weights, {weights / GiB:.1f} GiB")
    seconds = {}
    for name, abstract in (("packed", bench.packed), ("plain", bench.plain)):
        model = fill(abstract, depth)
        seconds[name] = bench.step(model, clip, depth).seconds
        del model
    share = 100 * (1 - seconds["plain"] / seconds["packed"])
    yield Row(
        part="unpacking",
        what="share of a step",
        clip=clip,
        result=f"{share:.1f} %: {depth} blocks {seconds['packed']:.4g} s packed, {seconds['plain']:.4g} s with plain "
        "bf16 weights",
        figures={"percent": share, "blocks": depth, **{f"{name}_seconds": s for name, s in seconds.items()}},
    )


def resident(bench: Bench, clip: str) -> Iterator[Row]:
    """The step as it runs by default, and its memory."""
    depth = bench.depth
    model = bench.hold(depth)
    denoiser, tokens = bench.denoiser(model, clip)
    bench.clock.need(bench.compiling + 2 * bench.guess(clip, depth))
    memory = measure(bench.device, estimate, *denoiser.arguments(0.9, tokens), **denoiser.options)
    before = memory_stats(bench.device)
    if before and memory.added_bytes > free_bytes(bench.device):
        raise Skip(f"needs {memory.added_bytes / GiB:.1f} GiB, {free_bytes(bench.device) / GiB:.1f} are free")
    result = bench.resident[clip] = bench.step(model, clip, depth)
    speed, figures = bench.speed(bench.flops(clip, depth), result.seconds)
    finite = all(np.isfinite(x.astype(np.float32)).all() for x in result.outputs)
    yield Row(
        part="step",
        what=f"auto, {bench.attention} attention",
        clip=clip,
        status="ok" if finite else "failed",
        result=f"{bench.scaled(result.seconds, depth)}, {speed}" + ("" if finite else "; results are not finite"),
        figures=figures | {"blocks": depth},
    )
    after = memory_stats(bench.device)
    yield peak_row(clip, before, after, memory, depth)


def peak_row(clip: str, before: dict[str, int], after: dict[str, int], memory: Memory, depth: int) -> Row:
    """The device's peak beside the plan's, what else lies on the device counted in both."""
    row = Row(part="memory", what="measured peak against planned", clip=clip, status="skipped")
    if "peak_bytes_in_use" not in after:
        return replace(row, result=f"this device tells no peak; planned are {memory.peak_bytes / GiB:.4g} GiB")
    planned, peak = before["bytes_in_use"] + memory.added_bytes, after["peak_bytes_in_use"]
    if peak <= before["peak_bytes_in_use"]:
        return replace(row, result=f"an earlier program needed more; planned are {planned / GiB:.2f} GiB")
    percent = 100 * peak / planned
    return replace(
        row,
        status="ok",
        result=f"{peak / GiB:.2f} of {planned / GiB:.2f} GiB, {percent:.1f} % ({depth} blocks)",
        figures={"peak_bytes": peak, "planned_bytes": planned, "percent": percent, "blocks": depth},
    )


def compare_streamed(bench: Bench, clip: str) -> Iterator[Row]:
    """Streamed against resident. Overlap: the share of the transfer's time alone that is hidden behind computing."""
    if clip not in bench.streamed or clip not in bench.resident:
        raise Skip("needs both the streamed and the resident step")
    streamed, kept = bench.streamed[clip], bench.resident[clip]
    overlap = 100 * (1 - (streamed.seconds - kept.seconds) / bench.transfer)
    possible = 100 * min(kept.seconds / bench.transfer, 1)
    total = sum(x.size for x in kept.outputs)
    different = sum(count_different(a, b) for a, b in zip(streamed.outputs, kept.outputs, strict=True))
    bits = "equal bit for bit" if not different else f"{different} of {total} values differ"
    yield Row(
        part="streamed",
        what="against resident",
        clip=clip,
        status="failed" if different else "ok",
        result=f"{bench.scaled(streamed.seconds, bench.depth)}, {streamed.seconds / kept.seconds:.3f} times resident; "
        f"overlap {overlap:.0f} % (at most {possible:.0f} %); {bits}",
        figures={
            "seconds": streamed.seconds,
            "resident_seconds": kept.seconds,
            "transfer_seconds": bench.transfer,
            "overlap_percent": overlap,
            "different": different,
            "blocks": bench.depth,
        },
    )


def count_different(a: np.ndarray, b: np.ndarray) -> int:
    """Values whose bits differ."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return int(np.count_nonzero(a.view(bits) != b.view(bits)))


def default_seconds(bench: Bench, clip: str) -> float:
    """What another form is compared with: the default ones, with as many blocks."""
    depth = bench.short_depth
    if clip not in bench.compared:
        same = depth == bench.depth and clip in bench.resident
        result = bench.resident[clip] if same else bench.step(bench.hold(depth), clip, depth)
        bench.compared[clip] = result.seconds
    return bench.compared[clip]


def form_row(bench: Bench, what: str, clip: str, change: Callable[[Any], Any]) -> Row:
    """A step with one form changed."""
    default, depth = default_seconds(bench, clip), bench.short_depth
    model = bench.hold(depth)
    change(model)
    seconds = bench.step(model, clip, depth).seconds
    speed, figures = bench.speed(bench.flops(clip, depth), seconds)
    return Row(
        part="step",
        what=what,
        clip=clip,
        result=f"{bench.scaled(seconds, depth)}, {seconds / default:.3f} times the default's, {speed}",
        figures=figures | {"blocks": depth, "default_seconds": default},
    )


def hadamard(bench: Bench, form: Form, clip: str) -> Iterator[Row]:
    if form == "exact":
        raise Skip("unpacks in float32: the yardstick of tests, never chosen for bf16")
    if form == "fused" and not (bench.fused and bench.fused.equal):
        raise Skip("the kernel's bits were not proved equal on this device")
    yield form_row(bench, f"{form}, {bench.attention} attention", clip, lambda model: set_form(model, form))


def chunked(bench: Bench, clip: str) -> Iterator[Row]:
    if bench.attention == "chunked":
        raise Skip("cuDNN's attention does not work here, so chunked is in all rows")
    yield form_row(bench, "auto, chunked attention", clip, lambda model: set_attention_form(model, "chunked"))


@jax.jit
def read_all(stacks: Any, noise: jax.Array) -> jax.Array:
    """Every packed linear of all blocks on a few tokens, one after the other: each waits for the one before."""

    def step(block: Any, before: jax.Array, given: None) -> tuple[jax.Array, None]:
        for _, linear in nnx.iter_modules(block):
            if isinstance(linear, QuantizedLinear):
                before = jnp.mean(linear(noise[:, : linear.in_features] + before))
        return before, None

    return run_layers(stacks, step, jnp.zeros((), noise.dtype))[0]


def count_weights(model: Any) -> int:
    """Packed weights of a model, padding included."""
    linears = [linear for _, linear in nnx.iter_modules(model) if isinstance(linear, QuantizedLinear)]
    return sum(prod(linear.norms.get_value().shape) * linear.block_size for linear in linears)


def unpacking(bench: Bench, form: Form) -> Iterator[Row]:
    """All weights unpacked and read once, for products with next to no tokens: what a step takes at the least.

    Bytes: packed weights read, bf16 weights written and read; "rotate_weight" does the latter twice.
    """
    if form == "fused" and not (bench.fused and bench.fused.equal):
        raise Skip("the kernel's bits were not proved equal on this device")
    depth = bench.short_depth
    model = bench.hold(depth)
    set_form(model, form)
    width = max(linear.in_features for _, linear in nnx.iter_modules(model) if isinstance(linear, QuantizedLinear))
    noise = jax.random.normal(jax.random.key(0), (FEW_TOKENS, width), DTYPE)
    seconds, _ = bench.timed(lambda: read_all(model.blocks, noise))
    moved = nbytes(model.blocks) + count_weights(model) * (8 if form == "rotate_weight" else 4)
    rate = moved / seconds
    against = f", {100 * rate / bench.ceilings['copy']:.0f} % of a copy" if "copy" in bench.ceilings else ""
    shares = {clip: 100 * seconds / whole for clip, whole in bench.compared.items()}
    steps = "".join(f", {share:.1f} % of a step at {clip}" for clip, share in shares.items())
    yield Row(
        part="unpacking",
        what=f"all weights once, {form}",
        result=f"{bench.scaled(seconds, depth)}, {rate / 1e9:.4g} GB/s{against}{steps}",
        figures={"seconds": seconds, "gb_per_second": rate / 1e9, "blocks": depth},
    )


def check_kernel(bench: Bench) -> Iterator[Row]:
    """The kernel's bits. It comes last, as a kernel that fails on a card may take the whole process with it."""
    bench.fused = check_fused(bench.device, shapes=bench.sizes.fused_shapes, interpret=not on_card(bench.device))
    status: Any = "ok" if bench.fused.equal else "skipped" if bench.fused.unavailable else "failed"
    yield Row(part="fused", what="bits against rotate_weight", status=status, result=str(bench.fused))


def parts(bench: Bench) -> list[tuple[str, str, Part]]:
    """All parts in order: name, clip, and what yields the rows."""

    def each(name: str, part: Callable[..., Iterator[Row]], **given: Any) -> list[tuple[str, str, Part]]:
        return [(name, clip, partial(part, **given, clip=clip)) for clip in bench.clips]

    xla: list[Form] = [form for form in FORMS if form != "fused"]
    return [
        ("ceiling", "", ceilings),
        ("attention", "", choose_attention),
        ("streamed", "", stream),
        *each("share of unpacking", packing),
        *each("step, auto", resident),
        *each("streamed against resident", compare_streamed),
        *(entry for form in xla for entry in each(f"step, {form}", hadamard, form=form)),
        *each("step, chunked attention", chunked),
        *((f"unpacking, {form}", "", partial(unpacking, form=form)) for form in xla if form != "exact"),
        ("fused kernel", "", check_kernel),
        *each("step, fused", hadamard, form="fused"),
        ("unpacking, fused", "", partial(unpacking, form="fused")),
    ]
