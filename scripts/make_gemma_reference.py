"""Writes what transformers generates with the miniature Gemma models, for tests/ltx_jax/test_enhance.py.

    pip install -e .[parity]
    python scripts/make_gemma_reference.py tests/data tests/data/gemma/generation.safetensors

In float32, one text at a time: the tokens of `Gemma3ForCausalLM.generate`, greedy, and, as models of random weights
repeat themselves, the logits after given tokens, read one by one with the model's own cache. Of the larger vocabulary
every 16th logit is kept. It prints by how much the greedy tokens won, which says what tolerance tells two apart.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

# Name -> folder or file of weights, its configuration, every how many logits are kept, and the runs: tokens of the
# prompt, and new tokens. Odd lengths; shorter than the window and crossing it, and longer than it from the start.
MODELS = {
    "release": ("mini-release/gemma-3-mini", "mini-release/gemma-3-mini/config.json", 16, ((7, 27), (43, 13))),
    "ltx": ("ltx/gemma.safetensors", "ltx/gemma_config.json", 1, ((5, 19), (31, 9))),
}
TOP_K, TOP_P, TEMPERATURE = 20, 0.8, 0.7


def load(torch: Any, transformers: Any, weights: Path, config: Path) -> Any:
    """The text model with its head, in float32."""
    text = json.loads(config.read_text())["text_config"]
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text)).float().eval()
    state = {}
    for shard in sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]:
        with safe_open(shard, "pt") as file:
            names = [name for name in list(file.keys()) if name.startswith("language_model.model.")]
            state |= {name.removeprefix("language_model."): file.get_tensor(name).float() for name in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or missing != ["lm_head.weight"] or model.lm_head.weight is not model.model.embed_tokens.weight:
        raise SystemExit(f"{weights} does not fit the model: missing {missing}, unexpected {unexpected}")
    model.generation_config.eos_token_id = None  # the number of tokens is given
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder tests/data")
    parser.add_argument("output", type=Path, help="the file to write")
    args = parser.parse_args()
    torch, transformers = import_module("torch"), import_module("transformers")
    processors = import_module("transformers.generation.logits_process")

    arrays: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(7)
    for name, (weights, config, stride, runs) in MODELS.items():
        model = load(torch, transformers, args.data / weights, args.data / config)
        for number, (prompt_length, new_length) in enumerate(runs):
            prompt = torch.tensor(generator.integers(10, model.config.vocab_size, (1, prompt_length)))
            given = torch.tensor(generator.integers(10, model.config.vocab_size, (1, new_length)))
            with torch.no_grad():
                found = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=new_length,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                step = model(prompt, use_cache=True)
                logits = [step.logits[:, -1]]
                for token in given.T:
                    step = model(token[None], past_key_values=step.past_key_values, use_cache=True)
                    logits.append(step.logits[:, -1])
            best = torch.cat(found.logits).sort(dim=1).values
            tokens = found.sequences[0, prompt_length:].numpy()
            print(f"{name} {number}: {len(set(tokens.tolist()))} different of {len(tokens)} tokens, ", end="")
            print(f"smallest lead {(best[:, -1] - best[:, -2]).min():.3g}")
            arrays[f"{name}.{number}.in.prompt"] = prompt[0].numpy().astype(np.int32)
            arrays[f"{name}.{number}.in.given"] = given[0].numpy().astype(np.int32)
            arrays[f"{name}.{number}.out.tokens"] = tokens.astype(np.int32)
            arrays[f"{name}.{number}.out.logits"] = np.ascontiguousarray(torch.cat(logits).numpy()[:, ::stride])

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.data / "mini-release/gemma-3-mini")
    chat = [{"role": "user", "content": 'Write a prompt.\n\nA heron lands; "Häh?" says the wind.'}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    arrays["chat.out.tokens"] = np.asarray(ids, np.int32)

    logits = torch.tensor(1.5 * generator.standard_normal((3, 96)), dtype=torch.float32)
    warped = logits
    for process in (
        processors.TemperatureLogitsWarper(TEMPERATURE),
        processors.TopKLogitsWarper(TOP_K),
        processors.TopPLogitsWarper(TOP_P),
    ):
        warped = process(None, warped)
    print(f"sampling: {(warped > -np.inf).sum(1).tolist()} candidates of {TOP_K}")
    arrays |= {"sampling.in.logits": logits.numpy(), "sampling.out.probabilities": warped.softmax(-1).numpy()}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    settings = {"top_k": str(TOP_K), "top_p": str(TOP_P), "temperature": str(TEMPERATURE)}
    save_file(arrays, args.output, metadata=versions | settings)
    print(f"{args.output}: {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
