"""The tokenizer of the miniature release: one token a word, for the words that captions of the little world have."""

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from scripts.tiny import release, world

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def vocabulary() -> tuple[str, ...]:
    """All words and signs of captions, in alphabetical order, behind the special tokens."""
    said = [*world.PARAPHRASES, world.CAPTION, *world.MOTIONS.values(), *world.SOUNDS.values()]
    words = {word for values in world.GRAMMAR.values() for word in values}
    words -= {*world.MOTIONS, *world.SOUNDS}  # names of what captions say in words of their own
    for text in said:
        words |= set(re.findall(r"\w+|[,;.]", re.sub(r"\{\w+\}", "", text)))
    return *SPECIAL, *sorted(words)


def tokenizer() -> Tokenizer:
    """Lower case, split at blanks and signs; unknown words are one token."""
    words = vocabulary()
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    made.add_special_tokens(list(SPECIAL))
    return made


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as Gemma's folder has them. Raises ValueError for too many."""
    room = release.GEMMA["vocab_size"]
    if len(vocabulary()) > room:
        raise ValueError(f"captions have {len(vocabulary())} words, the text encoder room for {room}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": release.TEXT_LENGTH,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
