"""One transformer block at the width of LTX-2.3, packed, beside diffusers' block, plain and from GGUF Q5_K.

    python scripts/bench_block.py --json block.json
    python scripts/bench_block.py --tokens 1024 --only "5 bits" "Q5_K"

Both streams with attention to themselves, to 1,024 keys of text and to each other; random weights, the same for all.
diffusers' block is checked to compute the same as ours before anything is timed. Then the error of the block's output
for weights quantized in several ways: Gaussian, as every quantizer is made for them and none is favoured by outliers.
Error is that of what the block adds to its input, relative to what it adds. `pip install -e .[parity]` installs the
peers; without them our own cases run alone.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.tables.transformer import BLOCK
from hlwq_jax import Form, TableName, quantize, quantize_linears
from ltx_jax.config import StreamConfig, TransformerConfig
from ltx_jax.models.rope import rotary_tables
from ltx_jax.models.transformer import Block, Conditioning
from scripts._bench import (
    Peers,
    Seconds,
    as_json,
    draw_weights,
    interleaved,
    machine,
    relative_error,
    show,
    write_json,
)
from scripts._q5_k import SUPER, quantize_q5_k
from scripts.parity_cases import fill

Weights = dict[str, np.ndarray]  # float32, by published name, in torch's layout
# Published names that diffusers calls otherwise.
RENAMED = {
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
}


def configure(heads: int) -> TransformerConfig:
    """A block of LTX-2.3, which has 32 heads, or a narrower one with heads as wide."""

    def stream(head_dim: int, max_pos: tuple[float, ...]) -> StreamConfig:
        dim = heads * head_dim
        return StreamConfig(
            in_channels=128, out_channels=128, num_heads=heads, head_dim=head_dim, context_dim=dim, max_pos=max_pos
        )

    return TransformerConfig(
        num_layers=1,
        video=stream(128, (20.0, 2048.0, 2048.0)),
        audio=stream(64, (20.0,)),
        eps=1e-6,
        rope_theta=10000.0,
        timestep_scale=1000.0,
        av_gate_timestep_scale=1000.0,
        gated_attention=True,
    )


# ---------------------------------------------------------------- weights and inputs, the same for all


def is_packed(name: str) -> bool:
    """Whether published packages quantize a block's tensor: matrices, but for those of the gates."""
    return name.endswith(".weight") and not name.endswith(("norm.weight", "to_gate_logits.weight"))


def draw_inputs(config: TransformerConfig, *, tokens: tuple[int, int], keys: int) -> list[Any]:
    """The arguments of `Block.__call__` in float32: tokens of both streams, and their conditioning."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    hidden, conditioning = [], []
    for stream, number in zip((config.video, config.audio), tokens, strict=True):
        tables = partial(rotary_tables, num_heads=stream.num_heads, theta=config.rope_theta, dtype=jnp.float32)
        fractions = jnp.asarray(rng.random((1, number, len(stream.max_pos)), dtype=np.float32))
        hidden.append(normal(1, number, stream.dim))
        conditioning.append(
            Conditioning(
                rows=0.5 * normal(1, 1, 9, stream.dim),
                prompt_rows=0.5 * normal(1, 1, 2, stream.dim),
                cross_rows=0.5 * normal(1, 1, 4, stream.dim),
                level=None,
                cross_gate=0.5 * normal(1, 1, 1, stream.dim),
                rotary=tables(fractions, dim=stream.dim),
                cross_rotary=tables(fractions[..., :1], dim=config.cross_dim),
                context=normal(1, keys, stream.context_dim),
                context_bias=None,
                self_bias=None,
                enabled=True,
            )
        )
    return [*hidden, *conditioning]


# ---------------------------------------------------------------- our block


def our_block(config: TransformerConfig, weights: Weights) -> Block:
    return fill(lambda: Block(config, rngs=nnx.Rngs(0)), BLOCK, weights)


def pack(block: Block, form: Form | Literal["auto"] = "auto") -> Block:
    """Packs the matrices that published packages pack, to 5 bits with table A."""
    quantize_linears(block, select=lambda path, linear: path[-1] != "to_gate_logits", form=form)
    for stream in (block.video, block.audio):
        for name in ("to_q", "to_k", "to_v"):
            layer = getattr(stream.self_attn, name)
            layer.shared_outputs = 3 * layer.out_features  # as they are loaded: one input, one rotation
    return block


def runner(block: Block, dtype: str) -> Callable[[list[Any]], Any]:
    """The compiled block on inputs of `draw_inputs`. Plain weights are held in `dtype`, packed ones as they are."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if x.dtype == jnp.float32 else x

    graphdef, params, packed = nnx.split(block, nnx.Param, ...)
    params = jax.tree.map(cast, params)

    @jax.jit
    def run(params, packed, inputs):
        x, ax, video, audio = inputs
        return nnx.merge(graphdef, params, packed)(x, ax, video, audio, None)

    return lambda inputs: run(params, packed, jax.tree.map(cast, inputs))


# ---------------------------------------------------------------- diffusers' block


def their_name(name: str) -> str:
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def their_block(modules: list[Any], config: TransformerConfig, weights: Weights, dtype: str, *, gguf: bool) -> Any:
    torch, transformer, quantizer, *_ = modules
    video, audio = config.video, config.audio
    with torch.device("meta"):
        block = transformer.LTX2VideoTransformerBlock(
            dim=video.dim,
            num_attention_heads=video.num_heads,
            attention_head_dim=video.head_dim,
            cross_attention_dim=video.context_dim,
            audio_dim=audio.dim,
            audio_num_attention_heads=audio.num_heads,
            audio_attention_head_dim=audio.head_dim,
            audio_cross_attention_dim=audio.context_dim,
            video_gated_attn=True,
            video_cross_attn_adaln=True,
            audio_gated_attn=True,
            audio_cross_attn_adaln=True,
            eps=config.eps,
            rope_type="split",
        )
    kind = getattr(torch, dtype)
    state = {their_name(name): torch.from_numpy(np.array(value)).to(kind) for name, value in weights.items()}
    if gguf:
        packed = [name for name in weights if is_packed(name)]
        for name in packed:
            parent, _, last = their_name(name).removesuffix(".weight").rpartition(".")
            linear = quantizer.GGUFLinear(*weights[name].shape[::-1], bias=True, compute_dtype=kind, device="meta")
            setattr(block.get_submodule(parent), last, linear)
        block.load_state_dict({n: v for n, v in state.items() if n not in set(map(their_name, packed))}, False, True)
        kind_of_block = modules[3].GGMLQuantizationType.Q5_K
        for name in packed:
            data = torch.from_numpy(quantize_q5_k(weights[name]))
            layer = block.get_submodule(their_name(name).removesuffix(".weight"))
            layer.weight = quantizer.GGUFParameter(data, quant_type=kind_of_block)
    else:
        block.load_state_dict(state, True, True)
    return block.eval()


def their_runner(modules: list[Any], block: Any, dtype: str) -> Callable[[list[Any]], Any]:
    torch = modules[0]

    def tensor(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x)).to(getattr(torch, dtype))

    def prepare(inputs: list[Any]) -> dict[str, Any]:
        (x, ax, video, audio), named = inputs, {}
        named |= {"hidden_states": tensor(x), "audio_hidden_states": tensor(ax)}
        for cond, mark in ((video, ""), (audio, "_audio")):
            named[f"temb{mark}"] = tensor(cond.rows).flatten(2)
            named[f"temb_prompt{mark}"] = tensor(cond.prompt_rows).flatten(2)
            named[f"temb_ca{mark}_scale_shift"] = tensor(cond.cross_rows).flatten(2)
            named[f"temb_ca{mark}_gate"] = tensor(cond.cross_gate).flatten(2)
            mark = mark[1:] or "video"
            named[f"{mark}_rotary_emb"], named[f"ca_{mark}_rotary_emb"] = (
                tuple(tensor(table).transpose(1, 2) for table in tables) for tables in (cond.rotary, cond.cross_rotary)
            )
        named["encoder_hidden_states"] = tensor(video.context)
        named["audio_encoder_hidden_states"] = tensor(audio.context)
        return named

    last: list[Any] = [None, None]  # inputs are prepared once

    def run(inputs: list[Any]) -> Any:
        if last[0] is not inputs:
            last[:] = inputs, prepare(inputs)
        with torch.inference_mode():
            return block(**last[1])

    return run


# ---------------------------------------------------------------- errors


def added(outputs: Any, inputs: list[Any]) -> np.ndarray:
    """What a block added to its inputs, of both streams."""
    pairs = zip(outputs, inputs[:2], strict=True)
    return np.concatenate([np.asarray(y, np.float32).ravel() - np.asarray(x).ravel() for y, x in pairs])


def quantizers(peers: Peers) -> dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]]:
    """Ways to quantize a weight: bits a weight at 4,096 inputs, and the round trip in float32."""

    def ours(weight: np.ndarray, table: TableName) -> np.ndarray:
        return quantize(weight, table=table).dequantize().astype(np.float32)

    found: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
        "ours, 5 bits, table A as published": (5.125, partial(ours, table="A")),
        "ours, 5 bits, converged table": (5.125, partial(ours, table="converged")),
    }
    if (modules := peers.load("gguf", "gguf.quants")) is not None:
        gguf, quants = modules
        q5_k = gguf.GGMLQuantizationType.Q5_K
        found["GGUF Q5_K"] = (5.5, lambda w: quants.dequantize(quantize_q5_k(w), q5_k))
    if (modules := peers.load("torch")) is not None:
        (torch,) = modules

        def fp8(weight: np.ndarray) -> np.ndarray:  # each row scaled to the range of the type
            w = torch.from_numpy(weight)
            scale = w.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            return ((w / scale).to(torch.float8_e4m3fn).float() * scale).numpy()

        found["fp8 (e4m3, a scale a row)"] = (8.008, fp8)
    if (modules := peers.load("torch", "torchao.quantization")) is not None:
        torch, torchao = modules

        def int8(weight: np.ndarray) -> np.ndarray:
            linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
            linear.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
            torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
            return linear.weight.dequantize().numpy()

        found["int8 (torchao, weight only)"] = (8.008, int8)
    if (modules := peers.load("torch", "bitsandbytes.functional")) is not None:
        torch, functional = modules

        def nf4(weight: np.ndarray) -> np.ndarray:
            packed, state = functional.quantize_4bit(torch.from_numpy(weight), quant_type="nf4")
            return functional.dequantize_4bit(packed, state).numpy()

        found["NF4 (bitsandbytes)"] = (4.5, nf4)
    return found


def bench_errors(config: TransformerConfig, weights: Weights, inputs: list[Any], peers: Peers) -> dict[str, Any]:
    """Of every quantizer: error of the weights, and of what the block adds, in float32."""
    graphdef, params = nnx.split(our_block(config, weights))

    @jax.jit
    def run(params, inputs):
        x, ax, video, audio = inputs
        return nnx.merge(graphdef, params)(x, ax, video, audio, None)

    reference = added(run(params, inputs), inputs)
    results = {}
    for name, (bits, round_trip) in quantizers(peers).items():
        changed, squares = dict(weights), np.zeros(2)
        for key in filter(is_packed, weights):
            changed[key] = round_trip(weights[key])
            squares += np.square(changed[key] - weights[key]).sum(), np.square(weights[key]).sum()
        _, params = nnx.split(our_block(config, changed))
        del changed
        error = relative_error(added(run(params, inputs), inputs), reference)
        results[name] = {"bits": bits, "weights": float(np.sqrt(squares[0] / squares[1])), "block": error}
    return results


# ---------------------------------------------------------------- the command


def bench_times(
    config: TransformerConfig, weights: Weights, all_inputs: dict[str, list[Any]], args: Any, peers: Peers
) -> dict[str, dict[str, Seconds]]:
    make: dict[str, Callable[[], Callable[[list[Any]], Any]]] = {}
    for dtype in args.dtypes:
        make[f"ours, 5 bits, {dtype}"] = lambda dtype=dtype: runner(pack(our_block(config, weights)), dtype)
        if dtype == "float32":  # where "auto" takes the exact form, with the decoder's own rounding of the weight
            make["ours, 5 bits, float32, rotate_input"] = lambda: runner(
                pack(our_block(config, weights), "rotate_input"), "float32"
            )
        make[f"ours, unpacked, {dtype}"] = lambda dtype=dtype: runner(our_block(config, weights), dtype)
    modules = peers.load(
        "torch", "diffusers.models.transformers.transformer_ltx2", "diffusers.quantizers.gguf.utils", "gguf"
    )
    if modules is not None:

        def theirs(dtype: str, gguf: bool) -> Callable[[list[Any]], Any]:
            return their_runner(modules, their_block(modules, config, weights, dtype, gguf=gguf), dtype)

        for dtype in args.dtypes:
            make[f"diffusers, {dtype}"] = partial(theirs, dtype, False)
            make[f"diffusers, GGUF Q5_K, {dtype}"] = partial(theirs, dtype, True)
    if args.only:
        make = {name: case for name, case in make.items() if any(part in name for part in args.only)}
    runs = {name: case() for name, case in make.items()}
    gc.collect()

    inputs = next(iter(all_inputs.values()))
    if {"ours, unpacked, float32", "diffusers, float32"} <= set(runs):
        mine, other = (added(runs[name](inputs), inputs) for name in ("ours, unpacked, float32", "diffusers, float32"))
        if (error := relative_error(other, mine)) > 1e-4:  # float32 sums in another order make 1e-6
            raise SystemExit(f"diffusers' block computes something else than ours: {error:.2g} relative")
        print(f"diffusers' block and ours differ by {error:.1e} (relative, float32)")
    return {
        title: interleaved({name: partial(run, inputs) for name, run in runs.items()}, args.rounds)
        for title, inputs in all_inputs.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32, help="32 is LTX-2.3; a multiple of 4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="of video")
    parser.add_argument("--audio-tokens", type=int, default=64)
    parser.add_argument("--keys", type=int, default=1024, help="of the text context")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="time cases that have one of these in their name")
    parser.add_argument("--no-errors", dest="errors", action="store_false", help="times alone")
    parser.add_argument("--json", type=Path, help="write the machine, sizes and all figures here")
    args = parser.parse_args(argv)
    config = configure(args.heads)
    if config.audio.dim % SUPER:
        parser.error(f"--heads must be a multiple of 4, as Q5_K blocks hold {SUPER} weights; got {args.heads}")
    weights = draw_weights(lambda rngs: Block(config, rngs=rngs), BLOCK)
    all_inputs = {
        f"{n} video and {args.audio_tokens} audio tokens, {args.keys} keys of text": draw_inputs(
            config, tokens=(n, args.audio_tokens), keys=args.keys
        )
        for n in args.tokens
    }
    peers = Peers()
    times = bench_times(config, weights, all_inputs, args, peers)
    for title, seconds in times.items():
        show(title, seconds)
    gc.collect()
    errors = {}
    if args.errors:
        errors = bench_errors(config, weights, next(iter(all_inputs.values())), peers)
        print(f"relative error\n  {'':44}{'bits':>6}{'weights':>10}{'block':>10}")
        for name, row in errors.items():
            print(f"  {name:44}{row['bits']:6.2f}{row['weights']:10.4f}{row['block']:10.4f}")
    peers.say()
    report = {
        "machine": machine(("diffusers", "gguf", "torch", "torchao", "bitsandbytes")),
        "heads": args.heads,
        "rounds": args.rounds,
        "seconds": {title: as_json(seconds) for title, seconds in times.items()},
        "relative_errors": errors,
    }
    write_json(args.json, report)


if __name__ == "__main__":
    main()
