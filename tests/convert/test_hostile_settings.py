"""Indexes, sidecars, parts of packed weights and configurations that say what cannot be: one clear error each."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from . import decoder, tiny
from .fuzz import cheaply
from .hostile import (
    CODES_0,
    INDEX,
    Case,
    check_case,
    content,
    document,
    header,
    put,
    replaced,
    setting,
    text,
    v1,
    v5,
    values,
)
from .published import write_file
from .tiny import BLOCK, GEMMA, KEPT, SIDECAR, UPSCALER

DEEP = "[" * 200 + "]" * 200
CASES = [
    # Indexes
    Case(
        "an index to the folder above",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="../secret.safetensors")),
        r"'x' is said to be in '\.\./secret",
        INDEX,
    ),
    Case(
        "an index to the root",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="/etc/passwd")),
        "'x' is said to be in '/etc/passwd'",
        INDEX,
    ),
    Case(
        "an index with backslashes",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="..\\x")),
        "'x' is said to be in",
        INDEX,
    ),
    Case(
        "an index with a NUL",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="a\0b")),
        "'x' is said to be in",
        INDEX,
    ),
    Case(
        "an index of very long names",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="x" * 5000)),
        "'x' is said to be in",
        INDEX,
    ),
    Case(
        "an index of numbers",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x=3)),
        "'x' is said to be in 3",
        INDEX,
    ),
    Case(
        "an index to no file",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="")),
        "'x' is said to be in ''",
        INDEX,
    ),
    Case(
        "an index to what is not there",
        v5,
        document(INDEX, lambda d: d["weight_map"].update(x="a.safetensors")),
        "lists a.safetensors, which is not there",
        INDEX,
    ),
    Case("an index that is a list", v5, content(INDEX, "[]"), "expected a JSON object", INDEX),
    Case("an index that maps nothing", v5, content(INDEX, '{"weight_map": []}'), "expected a weight_map", INDEX),
    Case(
        "an index with a name twice",
        v5,
        content(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'),
        "names 'a' twice",
        INDEX,
    ),
    Case("an index of 200 levels", v5, content(INDEX, f'{{"a": {DEEP}}}'), "expected JSON of up to", INDEX),
    Case("an index that is a pipe", v5, replaced(INDEX, os.mkfifo), "is not a file", INDEX),
    Case("an index that is a page", v5, content(INDEX, "<html></html>"), "HTML", INDEX),
    # Sidecars
    Case(
        "a sidecar of no bits",
        v5,
        document(SIDECAR, lambda d: d.update(bits=0)),
        "bits must be a positive whole number, got 0",
        SIDECAR,
    ),
    Case(
        "a sidecar of 99 bits",
        v5,
        document(SIDECAR, lambda d: d.update(bits=99)),
        "bits must be 1 to 8, got 99",
        SIDECAR,
    ),
    Case(
        "a sidecar of bits as text",
        v5,
        document(SIDECAR, lambda d: d.update(bits="5")),
        "bits must be a positive",
        SIDECAR,
    ),
    Case(
        "a sidecar of blocks of 0",
        v5,
        document(SIDECAR, lambda d: d.update(block_size=0)),
        "block_size must be",
        SIDECAR,
    ),
    Case(
        "a sidecar of blocks of 2^40",
        v5,
        document(SIDECAR, lambda d: d.update(block_size=2**40)),
        "block size must be",
        SIDECAR,
    ),
    Case(
        "a layer of blocks of 48",
        v5,
        document(SIDECAR, lambda d: d["layers"][f"{BLOCK}attn1.to_q"].update(block_size=48)),
        f"{BLOCK}attn1.to_q: the block size must be",
        SIDECAR,
    ),
    Case(
        "a layer of bits true",
        v5,
        document(SIDECAR, lambda d: d["layers"][f"{BLOCK}attn1.to_q"].update(bits=True)),
        f"{BLOCK}attn1.to_q: bits must be",
        SIDECAR,
    ),
    Case(
        "a layer of negative inputs",
        v5,
        document(SIDECAR, lambda d: d["layers"][f"{BLOCK}attn1.to_q"].update(in_features=-32)),
        f"{BLOCK}attn1.to_q: in_features must be",
        SIDECAR,
    ),
    Case(
        "a layer in two spellings",
        v5,
        document(SIDECAR, lambda d: d["layers"].update({f"{BLOCK}attn1.to_q.weight": {"bits": 4}})),
        "two spellings of one name",
        SIDECAR,
    ),
    Case("layers as a list", v5, document(SIDECAR, lambda d: d.update(layers=[])), "layers must map", SIDECAR),
    Case(
        "a table that is none", v5, document(SIDECAR, lambda d: d.update(table=["A"])), "table must be one of", SIDECAR
    ),
    Case("a sidecar that is not UTF-8", v5, content(SIDECAR, b'{"a": "\xff"}'), "not valid JSON", SIDECAR),
    Case("an empty sidecar", v5, content(SIDECAR, b""), "not valid JSON", SIDECAR),
    Case("a sidecar that is a folder", v5, replaced(SIDECAR, Path.mkdir), "is not a file", SIDECAR),
    Case(
        "a layer of other inputs",
        v5,
        document(SIDECAR, lambda d: d["layers"][f"{BLOCK}attn1.to_q"].update(in_features=31)),
        f"{BLOCK}attn1.to_q.weight: inputs disagree",
        CODES_0,
    ),
    # Packed weights
    Case("a norm that is no number", v5, values("__norms", put(np.nan)), "norm 3 of 32 is nan", CODES_0),
    Case("an infinite norm", v5, values("__norms", put(np.inf)), "norm 3 of 32 is inf", CODES_0),
    Case("a negative norm", v5, values("__norms", put(-0.5)), "norm 3 of 32 is -0.5", CODES_0),
    Case(
        "norms of float32",
        v5,
        values("__norms", lambda x: x.astype(np.float32)),
        "__norms .*expected float16, got float32",
        CODES_0,
    ),
    Case("norms on three axes", v5, values("__norms", lambda x: x[None]), "expected norms", CODES_0),
    Case("no norms", v5, values("__norms", lambda x: None), "__norms is missing", CODES_0),
    Case("no codes", v5, values("__packed", lambda x: None), "its codes are missing", CODES_0),
    Case("no meta", v5, values("__meta", lambda x: None), "__meta is missing", CODES_0),
    Case(
        "codes of float32",
        v5,
        values("__packed", lambda x: x.astype(np.float32)),
        "__packed .*expected uint8 or int8",
        CODES_0,
    ),
    Case("codes of no bytes", v5, values("__packed", lambda x: x[:0]), "codes of shape .* fit no packing", CODES_0),
    Case(
        "one byte too few",
        v5,
        values("__packed", lambda x: x[:-1]),
        "codes of shape .* fit no packing",
        CODES_0,
    ),
    Case(
        "codes of noise",
        v5,
        values("__packed", lambda x: np.random.default_rng(0).integers(0, 256, x.shape, np.uint8)),
        "energy",
        CODES_0,
    ),
    Case("codes of zeros", v5, values("__packed", lambda x: x * 0), "energy", CODES_0),
    Case("meta of three", v5, values("__meta", lambda x: x[:3]), "__meta .*expected 2, 4 or 5 entries", CODES_0),
    Case("meta below zero", v5, values("__meta", put(-1, 0)), "__meta .*expected positive sizes", CODES_0),
    Case("meta of 2^62 rows", v5, values("__meta", put(2**62, 0)), f"meta promises {2**62} rows", CODES_0),
    Case("meta of blocks of 2^40", v5, values("__meta", put(2**40, 2)), "block size must be a power of two", CODES_0),
    Case("meta of another total", v5, values("__meta", put(7, 3)), "meta promises 7 codes", CODES_0),
    Case("codes above the table", v1, values(".codes", put(33)), "largest code is 33, expected below 32", CODES_0),
    Case("negative codes", v1, values(".codes", put(-1)), "largest code is 255, expected below 32", CODES_0),
    Case(
        "levels that are no numbers",
        v1,
        values(".ct_scaled", put(np.nan)),
        "ct_scaled .*finite levels in ascending order",
        CODES_0,
    ),
    Case(
        "levels backwards",
        v1,
        values(".ct_scaled", lambda x: x[::-1].copy()),
        "ct_scaled .*ascending order",
        CODES_0,
    ),
    Case("levels of 1e30", v1, values(".ct_scaled", put(1e30, 31)), "ct_scaled .*expected levels up to", CODES_0),
    Case("no levels", v1, values(".ct_scaled", lambda x: None), "its levels .* are missing", CODES_0),
    Case("thirty levels", v1, values(".ct_scaled", lambda x: x[:30]), "ct_scaled .*a power of two", CODES_0),
    # Configurations
    Case(
        "a billion layers",
        v5,
        setting("transformer/num_layers", 10**9),
        "num_layers = 1000000000; expected a whole number from 0 to 256",
        KEPT,
    ),
    Case("fewer than no layers", v5, setting("transformer/num_layers", -1), "num_layers = -1", KEPT),
    Case("one and a half layers", v5, setting("transformer/num_layers", 1.5), "num_layers = 1.5", KEPT),
    Case("layers as text", v5, setting("transformer/num_layers", "1"), "num_layers = '1'", KEPT),
    Case("layers true", v5, setting("transformer/num_layers", True), "num_layers = True", KEPT),
    Case("heads of 2^60", v5, setting("transformer/attention_head_dim", 2**60), "head_dim = 1152921504606846976", KEPT),
    Case("no heads", v5, setting("transformer/num_attention_heads", 0), "num_heads = 0", KEPT),
    Case("captions of no channels", v5, setting("transformer/caption_channels", 0), "hidden_dim = 0", KEPT),
    Case("captions of text", v5, setting("transformer/caption_channels", "16"), "hidden_dim = '16'", KEPT),
    Case(
        "an infinite eps",
        v5,
        text(KEPT, lambda h: h.replace(rb"\"norm_eps\": 1e-06", rb"\"norm_eps\": 1e999")),
        "eps = inf",
        KEPT,
    ),
    Case("a section of null", v5, setting("vae", None), "is not a JSON object of sections", KEPT),
    Case(
        "a part of null",
        v5,
        setting("audio_vae/model/params", None),
        "audio_vae configuration must be a JSON object",
        KEPT,
    ),
    Case("blocks of no shape", v5, setting("vae/encoder_blocks", [["res_x"]]), r"a block \['res_x'\]", KEPT),
    Case("blocks as text", v5, setting("vae/encoder_blocks", "res_x"), "blocks 'res_x'", KEPT),
    Case(
        "ten thousand layers of blocks",
        v5,
        setting("vae/encoder_blocks", [["res_x", {"num_layers": 256}]] * 40),
        "10241 layers",
        KEPT,
    ),
    Case(
        "a multiplier of 0",
        v5,
        setting("vae/decoder_blocks", [["compress_all", {"multiplier": 0}]]),
        "multiplier = 0",
        KEPT,
    ),
    Case(
        "a multiplier that does not divide",
        v5,
        setting("vae/decoder_blocks", [["res_x", 1], ["compress_all", {"multiplier": 7}]]),
        "video_vae configuration makes no model|wrong shape",
        "",
    ),
    Case(
        "a hundred thousand rates",
        v5,
        setting("vocoder/vocoder/upsample_rates", [2] * 100_000),
        "upsample_rates = .*expected a list of 1 to 256",
        KEPT,
    ),
    Case(
        "no dilations", v5, setting("vocoder/vocoder/resblock_dilation_sizes", [[]]), r"resblock_dilations = \[\]", KEPT
    ),
    Case(
        "a million layers of sound",
        v5,
        lambda f: [
            setting(f"vocoder/vocoder/{key}", value)(f)
            for key, value in (("resblock_dilation_sizes", [[1] * 200] * 200), ("resblock_kernel_sizes", [3] * 200))
        ],
        "40000 layers for each",
        KEPT,
    ),
    Case("a configuration of 200 levels", v5, setting("junk", json.loads(DEEP)), "expected JSON of up to", KEPT),
    Case(
        "a configuration with a name twice",
        v5,
        text(KEPT, lambda h: h.replace(rb"\"norm_eps\":", rb"\"norm_eps\": 1, \"norm_eps\":", 1)),
        "'norm_eps' twice",
        KEPT,
    ),
    Case(
        "a configuration that is no JSON",
        v5,
        header(KEPT, lambda h: h["__metadata__"].update(config="{")),
        "the config in its metadata: not valid JSON",
        KEPT,
    ),
    Case(
        "a version that moves the cursor",
        v5,
        header(KEPT, lambda h: h["__metadata__"].update(model_version="\x1b[2J")),
        "model_version",
        KEPT,
    ),
    # Upscalers
    Case(
        "an upscaler of a billion blocks",
        tiny.with_companions,
        setting("num_blocks_per_stage", 10**9, UPSCALER),
        "num_blocks_per_stage = 1000000000",
        UPSCALER,
    ),
    Case(
        "an upscaler of odd width",
        tiny.with_companions,
        setting("mid_channels", 31, UPSCALER),
        "mid_channels 31",
        UPSCALER,
    ),
    Case(
        "an upscaler of no kind",
        tiny.with_companions,
        setting("spatial_upsample", None, UPSCALER),
        "either spatial or temporal",
        UPSCALER,
    ),
    Case(
        "an upscaler without metadata or blocks",
        tiny.with_companions,
        lambda f: write_file(
            f / UPSCALER, {n: x for n, x in decoder.tensors(f / UPSCALER).items() if "blocks" not in n}
        ),
        "has lost its metadata",
        UPSCALER,
    ),
    Case(
        "an upscaler with a block of text",
        tiny.with_companions,
        lambda f: write_file(
            f / UPSCALER, {n.replace("blocks.0", "blocks.x"): x for n, x in decoder.tensors(f / UPSCALER).items()}
        ),
        "has lost its metadata",
        UPSCALER,
    ),
    # Text encoders
    Case(
        "a text encoder of a billion layers",
        tiny.with_companions,
        document(f"{GEMMA}/config.json", lambda d: d["text_config"].update(num_hidden_layers=10**9)),
        "num_layers = 1000000000",
        f"{GEMMA}/config.json",
    ),
    Case(
        "a text encoder that is a list",
        tiny.with_companions,
        document(f"{GEMMA}/config.json", lambda d: d.update(text_config=[])),
        "must be a JSON object",
        f"{GEMMA}/config.json",
    ),
    Case(
        "a window pattern of 0",
        tiny.with_companions,
        document(f"{GEMMA}/config.json", lambda d: d["text_config"].update(sliding_window_pattern=0)),
        "sliding_window_pattern 0",
        f"{GEMMA}/config.json",
    ),
    Case(
        "a text encoder that is not UTF-8",
        tiny.with_companions,
        content(f"{GEMMA}/config.json", b"\xff\xfe{}"),
        "not valid JSON",
        f"{GEMMA}/config.json",
    ),
    Case(
        "a text encoder as pickles",
        tiny.with_companions,
        lambda f: (f / GEMMA / "model.safetensors").rename(f / GEMMA / "pytorch_model.bin"),
        "pickles are never opened: pytorch_model.bin",
        GEMMA,
    ),
    Case(
        "a tokenizer that is a page",
        tiny.with_companions,
        content(f"{GEMMA}/tokenizer.json", "<html>"),
        "not a tokenizer",
        f"{GEMMA}/tokenizer.json",
    ),
    Case(
        "tokenizer settings as a list",
        tiny.with_companions,
        content(f"{GEMMA}/tokenizer_config.json", "[]"),
        "not a JSON object",
        f"{GEMMA}/tokenizer_config.json",
    ),
    Case(
        "a text length of text",
        tiny.with_companions,
        document(f"{GEMMA}/tokenizer_config.json", lambda d: d.update(model_max_length="64")),
        "model_max_length '64'",
        f"{GEMMA}/tokenizer_config.json",
    ),
    Case(
        "a negative text length",
        tiny.with_companions,
        document(f"{GEMMA}/tokenizer_config.json", lambda d: d.update(model_max_length=-64)),
        "model_max_length -64",
        f"{GEMMA}/tokenizer_config.json",
    ),
    Case(
        "settings of nested lists",
        tiny.with_companions,
        content(f"{GEMMA}/tokenizer_config.json", "[" * 100_000),
        "is not JSON",
        f"{GEMMA}/tokenizer_config.json",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def built_in():
    """Where a file loses its configuration, the small one is built in: that of LTX-2.3 takes seconds to look at."""
    with cheaply():
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_file_says_and_cannot_be_is_refused(case, tmp_path, capsys):
    check_case(case, tmp_path, capsys)
