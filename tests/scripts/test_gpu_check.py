"""The GPU check: what it counts and draws, that no part can spoil the others, and (slow) its programs for a card."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hlwq_jax import QuantizedLinear, set_form
from ltx_jax.config import StreamConfig, TransformerConfig
from ltx_jax.denoise import estimate
from ltx_jax.memory import Memory, nbytes
from ltx_jax.models.attention import set_attention_form
from scripts import _gpu_bench as gpu_bench
from scripts import gpu_check, gpu_check_parts
from scripts._gpu_bench import REAL, TINY, Bench, Clock, GiB, Recipe, Row, Skip, blocks, fill, step_flops, with_depth
from tests.hlwq_jax.hlo import buffers, compile_for, needs_card_compiler


def make(sizes: Any) -> Bench:
    return Bench(sizes, jax.devices("cpu")[0], Clock(1000.0, time.monotonic()))


@pytest.fixture(scope="module")
def tiny() -> Iterator[Bench]:
    """The tiny model's bench, with as little optimisation as the script has without a card."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, True)
    yield make(TINY)
    jax.config.update(flag, before)


@pytest.fixture(scope="module")
def model(tiny):
    """Two packed blocks with random weights."""
    return fill(tiny.packed, 2)


# ------------------------------------------------------------------- FLOPs


def test_flops_are_those_counted_by_hand():
    def stream(head_dim: int, context_dim: int, channels: tuple[int, int]) -> StreamConfig:
        return StreamConfig(
            in_channels=channels[0],
            out_channels=channels[1],
            num_heads=2,
            head_dim=head_dim,
            context_dim=context_dim,
            max_pos=(20.0,),
        )

    config = TransformerConfig(
        num_layers=9,
        video=stream(8, 12, (4, 6)),
        audio=stream(4, 10, (5, 7)),
        eps=1e-6,
        rope_theta=1.0,
        timestep_scale=1.0,
        av_gate_timestep_scale=1.0,
        gated_attention=True,
    )
    # Ten tokens of width 16, three of width 8, five keys of widths 12 and 10.
    video_self = 4 * 2 * 10 * 16 * 16 + 2 * (2 * 10 * 10 * 16)
    video_text = 2 * (2 * 10 * 16 * 16) + 2 * (2 * 5 * 12 * 16) + 2 * (2 * 10 * 5 * 16)
    video_rest = 2 * (2 * 10 * 16 * 64) + 2 * (2 * 10 * 16 * 2)  # feed-forward, two gates
    audio_to_video = 2 * (2 * 10 * 16 * 8) + 2 * (2 * 3 * 8 * 8) + 2 * (2 * 10 * 3 * 8) + 2 * 10 * 16 * 2
    audio_self = 4 * 2 * 3 * 8 * 8 + 2 * (2 * 3 * 3 * 8)
    audio_text = 2 * (2 * 3 * 8 * 8) + 2 * (2 * 5 * 10 * 8) + 2 * (2 * 3 * 5 * 8)
    audio_rest = 2 * (2 * 3 * 8 * 32) + 2 * (2 * 3 * 8 * 2)
    video_to_audio = 2 * (2 * 3 * 8 * 8) + 2 * (2 * 10 * 16 * 8) + 2 * (2 * 3 * 10 * 8) + 2 * 3 * 8 * 2
    block = video_self + video_text + video_rest + audio_to_video
    block += audio_self + audio_text + audio_rest + video_to_audio
    ends = 2 * 10 * 16 * (4 + 6) + 2 * 3 * 8 * (5 + 7)
    assert step_flops(config, video=10, audio=3, keys=5, num_blocks=3) == 3 * block + ends


def count_products(jaxpr: Any, times: int = 1) -> int:
    """Multiplications and additions of all matrix products of a program, but for those of a single row."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), (batch, _) = equation.params["dimension_numbers"]
            lhs, rhs = (v.aval for v in equation.invars)
            depth = int(np.prod([lhs.shape[i] for i in contracting]))
            shared = int(np.prod([lhs.shape[i] for i in batch]))
            if lhs.size > depth * shared:
                total += times * 2 * lhs.size * rhs.size // (depth * shared)
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            if hasattr(value, "eqns"):
                total += count_products(value, inner)
            elif hasattr(value, "jaxpr"):
                total += count_products(value.jaxpr, inner)
    return total


def test_flops_are_those_of_the_program(tiny):
    (clip,) = tiny.clips
    denoiser, tokens = tiny.denoiser(with_depth(tiny.plain, 2), clip)
    arguments = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, denoiser.arguments(0.9, tokens)))
    jaxpr = jax.make_jaxpr(partial(estimate, **denoiser.options))(*arguments)
    assert count_products(jaxpr.jaxpr) == tiny.flops(clip, 2)


# ---------------------------------------------------------- random weights


def test_blocks_drawn_one_by_one_are_those_of_the_filled_model(tiny, model):
    (stack,) = model.blocks
    for number, block in enumerate(blocks(tiny.packed, 2)):
        expected = jax.tree.leaves(jax.tree.map(lambda x, n=number: x[n], nnx.state(stack.layer)))
        drawn = jax.tree.leaves(nnx.state(block))
        assert [(x.shape, x.dtype) for x in drawn] == [(x.shape, x.dtype) for x in expected]
        assert all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(drawn, expected, strict=True))


def test_blocks_differ_from_each_other(tiny):
    first, second = (block.video.ff.proj_in.lo[...] for block in blocks(tiny.packed, 2))
    assert (np.asarray(first) != np.asarray(second)).mean() > 0.9


def test_the_filled_model_has_the_shapes_of_the_abstract_one(tiny, model):
    expected = jax.tree.leaves(nnx.state(with_depth(tiny.packed, 2)))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(nnx.state(model))] == [(x.shape, x.dtype) for x in expected]
    assert len(with_depth(tiny.packed, 0).blocks) == 0
    assert len(tiny.packed.blocks) == 1  # the original stays


def test_random_weights_keep_activations_at_their_size(tiny, model):
    (block,) = [stack.layer for stack in model.blocks]
    for linear in (block.video.ff.proj_in, block.audio.ff.proj_in):  # whole blocks of inputs, and half of one
        assert isinstance(linear, QuantizedLinear)
        weight = np.asarray(jax.jit(QuantizedLinear.dequantize)(linear).astype(jnp.float32))
        # Tens of thousands of weights with hundreds of norms: their deviation is known to a few percent.
        assert weight.std() == pytest.approx(linear.in_features**-0.5, rel=0.1)
    kernel = np.asarray(model.video.patchify.kernel[...].astype(jnp.float32))
    assert kernel.std() == pytest.approx(kernel.shape[0] ** -0.5, rel=0.05)
    scale = np.asarray(block.video.self_attn.q_norm.scale[...].astype(jnp.float32))
    assert scale.min() > 0
    assert scale.mean() == pytest.approx(1, abs=0.1)


# ------------------------------------------------------ memory and time


def test_blocks_are_as_many_as_memory_and_time_allow(monkeypatch):
    bench = make(REAL)
    blocks_48 = with_depth(bench.packed, 48)
    assert nbytes(blocks_48) / GiB == pytest.approx(11.9, abs=0.1)

    def depth(gib: float, tflops: float) -> int:
        monkeypatch.setattr(gpu_bench, "memory_stats", lambda device: {"bytes_in_use": 0})
        monkeypatch.setattr(gpu_bench, "free_bytes", lambda device: int(gib * GiB))
        bench.ceilings = {"gemm": tflops * 1e12}
        bench.__dict__.pop("depth", None)
        return bench.depth

    assert depth(22.7, 165) == 48
    few = depth(11.2, 165)
    assert 0 < few < 48
    assert nbytes(with_depth(bench.packed, few)) + gpu_bench.ROOM < 11.2 * GiB
    slow = depth(22.7, 25)
    assert 0 < slow < 48
    assert bench.guess("1280x704x121", slow) <= gpu_bench.FULL_SECONDS
    assert 0 < bench.short_depth < slow
    assert bench.scaled(2.0, 24) == "4 s (scaled from 24 of 48 blocks)"
    assert bench.scaled(2.0, 48) == "2 s"
    with pytest.raises(Skip, match="too little for one block"):
        depth(3.0, 165)


def test_what_the_time_left_does_not_hold_is_skipped():
    clock = Clock(10.0, time.monotonic() - 4)
    clock.need(1)
    with pytest.raises(Skip, match=r"needs about 7 s, and [56] s of the time are left"):
        clock.need(7)


def test_the_peak_is_that_of_the_program_or_not_told():
    memory = Memory(argument_bytes=4 * GiB, output_bytes=GiB, temp_bytes=GiB, alias_bytes=0, compile_seconds=1.0)
    before = {"bytes_in_use": 5 * GiB, "peak_bytes_in_use": 6 * GiB}
    row = gpu_check_parts.peak_row("clip", before, before | {"peak_bytes_in_use": 8 * GiB}, memory, 3)
    assert row.status == "ok"
    assert row.figures["percent"] == pytest.approx(100 * 8 / 7)
    assert gpu_check_parts.peak_row("clip", before, before, memory, 3).status == "skipped"
    assert gpu_check_parts.peak_row("clip", {}, {}, memory, 3).status == "skipped"


def test_different_bits_are_counted_though_values_may_be_equal():
    a = np.array([0.0, 1.0, np.nan], jnp.bfloat16)
    b = np.array([-0.0, 1.0, np.nan], jnp.bfloat16)
    assert gpu_check_parts.count_different(a, a) == 0
    assert gpu_check_parts.count_different(a, b) == 1


# ------------------------------------------------------------ rows and runs


def test_a_part_that_fails_or_is_skipped_becomes_a_row():
    bench: Any = SimpleNamespace(clock=Clock(100.0, time.monotonic()))

    def broken(bench):
        yield Row(part="one", result="fine")
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

    def missing(bench):
        raise Skip("no such thing")
        yield

    rows = list(gpu_check.rows_of(bench, "broken", "clip", broken))
    assert [(row.part, row.status) for row in rows] == [("one", "ok"), ("broken", "failed")]
    assert rows[1].result == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    (row,) = gpu_check.rows_of(bench, "missing", "clip", missing)
    assert (row.part, row.clip, row.status, row.result) == ("missing", "clip", "skipped", "no such thing")


def run(monkeypatch, capsys, bench: Bench, parts: list, json_file: Path) -> tuple[int, dict, str]:
    monkeypatch.setattr(gpu_check, "prepare", lambda: None)
    monkeypatch.setattr(gpu_check, "Bench", lambda sizes, device, clock: bench)
    monkeypatch.setattr(gpu_check, "parts", lambda bench: parts)
    code = gpu_check.main(json_file=json_file, limit=10000.0)
    return code, json.loads(json_file.read_text()), capsys.readouterr().out


def test_without_a_card_it_says_so_and_every_part_has_its_rows(tiny, monkeypatch, capsys, tmp_path):
    def fine(bench):
        assert bench is tiny
        yield Row(part="x", result="[1.5] s", figures={"seconds": 1.5})

    code, report, out = run(monkeypatch, capsys, tiny, [("x", "", fine)], tmp_path / "out.json")
    assert code == 0
    assert out.startswith("No NVIDIA GPU that JAX can use")
    assert "[1.5] s" in out
    assert report["sizes"] == "a tiny model"
    assert [row["figures"] for row in report["rows"]] == [{"seconds": 1.5}]


def test_a_failed_row_is_in_the_table_and_in_the_exit_code(tiny, monkeypatch, capsys, tmp_path):
    def broken(bench):
        yield Row(part="x")
        raise ValueError("broken")

    parts = [("x", "", broken), ("x", "", broken)]
    code, report, out = run(monkeypatch, capsys, tiny, parts, tmp_path / "out.json")
    assert code == 1
    assert report["failed"]
    assert [row["status"] for row in report["rows"]] == ["ok", "failed", "ok", "failed"]
    assert out.count("ValueError: broken") == 2


def test_rows_are_in_the_file_as_soon_as_they_are_measured(tmp_path):
    report = gpu_check.Report("sizes", tmp_path / "out.json")
    report.add(Row(part="x"))
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1


def test_forms_that_were_not_proved_are_not_timed(tiny):
    (clip,) = tiny.clips
    for form, reason in (("fused", "not proved"), ("exact", "float32")):
        with pytest.raises(Skip, match=reason):
            next(gpu_check_parts.hadamard(tiny, form, clip))
    with pytest.raises(Skip, match="needs both"):
        next(gpu_check_parts.compare_streamed(tiny, clip))


@pytest.mark.slow
def test_it_checks_itself_without_a_card(tmp_path):
    script = Path(gpu_check.__file__)
    command = [sys.executable, script, "--json", tmp_path / "out.json", "--limit", "3000"]
    environment = {"JAX_PLATFORMS": "cpu", "LTX_JAX_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    done_rows = {(row["part"], row["what"]) for row in rows if row["status"] == "ok"}
    assert {
        ("streamed", "against resident"),
        ("unpacking", "share of a step"),
        *(("step", f"{form}, chunked attention") for form in ("auto", "rotate_input", "rotate_weight", "fused")),
        *(("unpacking", f"all weights once, {form}") for form in ("rotate_input", "rotate_weight", "fused")),
        ("fused", "bits against rotate_weight"),
    } <= done_rows
    # What a CPU cannot show: cuDNN, the device's peak; and the form that is never timed.
    skipped = {row["part"] for row in rows if row["status"] == "skipped"}
    assert skipped == {"memory", "step, exact", "step, chunked attention"}
    (streamed,) = [row for row in rows if row["what"] == "against resident"]
    assert streamed["figures"]["different"] == 0


# --------------------------------------------------------- compiled for a card


@pytest.fixture(scope="module")
def real() -> Bench:
    return make(REAL)


@pytest.mark.slow
@needs_card_compiler
@pytest.mark.parametrize("clip", ["768x512x121", "1280x704x121"])
def test_the_step_at_real_size_compiles_and_leaves_room(real, clip):
    model = with_depth(real.packed, 48)
    set_attention_form(model, "chunked")
    denoiser, tokens = real.denoiser(model, clip)
    analysis = compile_for(
        "rtx4090", partial(estimate, **denoiser.options), *denoiser.arguments(0.9, tokens)
    ).memory_analysis()
    assert analysis.argument_size_in_bytes / GiB == pytest.approx(11.9, abs=0.1)
    assert analysis.temp_size_in_bytes < gpu_bench.ROOM / 2


@pytest.mark.slow
@needs_card_compiler
@pytest.mark.parametrize("form", ["rotate_input", "rotate_weight", "fused"])
def test_reading_all_weights_writes_each_of_them_to_memory_as_counted(real, form):
    model = with_depth(real.packed, 48)
    set_form(model, form)
    noise = jax.ShapeDtypeStruct((gpu_check_parts.FEW_TOKENS, 16384), jnp.bfloat16)
    text = compile_for("rtx4090", gpu_check_parts.read_all, model.blocks, noise).as_text()
    # The loop's body is there once: what it writes are the weights of one block, twice where they are rotated. Nothing
    # else is as large as the smallest of them.
    written = sum(buffer.size for buffer in buffers(text) if buffer.dtype == "bf16" and buffer.size >= 2048 * 2048)
    times = 2 if form == "rotate_weight" else 1
    assert written == times * gpu_check_parts.count_weights(model) // 48


@pytest.mark.slow
@needs_card_compiler
@pytest.mark.parametrize("packed", [True, False])
def test_a_block_of_random_weights_compiles_and_leaves_room(real, packed, monkeypatch):
    recipes: list[tuple[Recipe, ...]] = []

    def note(key, of):
        recipes.append(of)
        return [jax.ShapeDtypeStruct(recipe.shape, recipe.dtype) for recipe in of]

    monkeypatch.setattr(gpu_bench, "draw", note)
    block = next(blocks(real.packed if packed else real.plain, 1))
    monkeypatch.undo()
    key = jax.eval_shape(lambda: jax.random.key(0))
    analysis = compile_for("rtx4090", partial(gpu_bench.draw, recipes=recipes[0]), key).memory_analysis()
    # All but the centroids is drawn; beside it, the random words: a byte a plain weight, packed bits as they are.
    assert analysis.output_size_in_bytes == pytest.approx(nbytes(block), rel=0.001)
    assert analysis.temp_size_in_bytes < 1.01 * nbytes(block)
