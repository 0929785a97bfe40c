"""The tokenizer of a small checkpoint: a byte-level BPE, trained on text or of tokens it is told.

Writes tokenizer.json and tokenizer_config.json, with a chat template that renders the released
prompt. Not for real checkpoints, which bring their own.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END, IMAGE = "<beginning_of_sentence>", "<end_of_sentence>", "<image>"
_SPECIALS = [BEGIN, END, IMAGE]

CHAT_TEMPLATE = """\
{%- set headers = {'system': 'system ai_setting=assistant', 'user': 'user name=user',
                   'assistant': 'ai name=assistant'} -%}
{%- for message in messages -%}
{{- '<beginning_of_sentence>' + headers[message['role']] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{{- '<image>' if item['type'] == 'image' else item['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_sentence>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<beginning_of_sentence>' + headers['assistant'] + '\\n' -}}
{%- endif -%}
"""

TRAINING_TEXT = """\
system ai_setting=assistant
user name=user
ai name=assistant
You are a helpful assistant. Describe this image in one or two sentences. Write down all the text
of this page, in reading order. Answer with a JSON object and nothing else.
The photograph shows a small white boat on a calm lake under a cloudy sky, with green hills behind
it and the light of the evening on the water. A woman in a red coat is walking her dog along the
street, past a row of parked cars and a shop with flowers in its window. Two children are sitting at
a wooden table with a bowl of fruit, a glass of milk and an open book. The cat is sleeping on a
chair near the window, where the morning sun comes in. An old stone bridge crosses the river, and a
train is passing over it. A man with a camera is standing in front of a large building made of glass
and steel. The rocket stands on the launch pad, the sky is dark and the lights are on. Coffee in a
white cup, seen from above, with a silver spoon on the saucer. The picture was taken at night; the
stars are bright and there are no people. A page of printed text with a heading, three paragraphs
and a table of numbers. Invoice number, date, total amount, name and address of the customer. The
first column lists the items, the second column the price of each, and the last line gives the sum.
In the background there are trees, a fence, some houses and a road. It looks quiet and warm. On the
left side a sign says open, on the right side a bicycle is leaning against the wall. The flower is
yellow, the leaf is green, the stone is grey and the brick is brown. Nothing else can be seen.
0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 50 100 200 500 1000 2024 2025 2026 . , ; : ! ? ( ) [ ] { } " '
"""


@dataclass(frozen=True)
class TokenIds:
    """`wordless` are the ids, the special tokens among them, that stand for no printable text."""

    image: int
    end: int
    wordless: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """Ids of what is more than a byte. characters: those of several bytes. phrases: are one token
    wherever they stand, the longest if several begin there."""

    characters: Mapping[str, int]
    phrases: Mapping[str, int]


def write_trained_tokenizer(folder: Path, vocab_size: int, text: str = TRAINING_TEXT) -> TokenIds:
    """Train on `text` and write the files. The special tokens come last.

    Raises ValueError when `vocab_size` does not hold the 256 bytes and the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_without_specials(vocab_size),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return _write(tokenizer, folder, vocab_size)


def write_told_tokenizer(folder: Path, vocab_size: int, tokens: Tokens) -> TokenIds:
    """Bytes, characters, and phrases as added tokens: nothing else is ever merged, so any text has
    one obvious tokenization. Ids that mean nothing are filled up; the special tokens come last.

    Raises ValueError when an id is told twice, is a byte's, or is not below `vocab_size` less the
    special tokens.
    """
    merges = [pair for character in tokens.characters for pair in _merges(character)]
    named = [*tokens.phrases.items()]
    named += [(_byte_level(character), id) for character, id in tokens.characters.items()]
    texts = dict(enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())))
    for text, id in named:
        if id in texts or id >= _without_specials(vocab_size):
            raise ValueError(f"id {id} of {text!r} is taken, or too large for {vocab_size} tokens")
        texts[id] = text
    known = set(texts.values())
    unfinished = sorted({a + b for a, b in merges} - known)
    for id in range(_without_specials(vocab_size)):
        if id not in texts:
            texts[id] = unfinished.pop() if unfinished else f"<unused_{id}>"
    tokenizer = Tokenizer(models.BPE({text: id for id, text in texts.items()}, merges))
    # Not split at words: a phrase is found anyway, and a character needs no word around it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in tokens.phrases])
    return _write(tokenizer, folder, vocab_size)


def _without_specials(vocab_size: int) -> int:
    most = vocab_size - len(_SPECIALS)
    if most < 256:
        raise ValueError(f"vocab_size {vocab_size}; expected {256 + len(_SPECIALS)} or more")
    return most


def _byte_level(character: str) -> str:
    """The bytes of a character, as the vocabulary of a byte-level BPE writes them."""
    [(text, _)] = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(character)
    return text


def _merges(character: str) -> Iterable[tuple[str, str]]:
    """Its bytes, put together from the first to the last."""
    text = _byte_level(character)
    return ((text[:i], text[i]) for i in range(1, len(text)))


def _write(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> TokenIds:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    vocabulary = tokenizer.get_vocab()
    texts = tokenizer.decode_batch([[i] for i in range(vocab_size)])
    return TokenIds(
        image=vocabulary[IMAGE],
        end=vocabulary[END],
        wordless=tuple(i for i, text in enumerate(texts) if not _is_printable(text)),
    )


def _is_printable(text: str) -> bool:
    return bool(text) and text.isprintable() and "\ufffd" not in text
