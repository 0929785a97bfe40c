"""The small checkpoint's tokenizer: what is learnt is what a grammar would have it write."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from jobs.bench.quality import json_schemas
from model.engine.constraint import Constraints
from model.nano.pages.marked import NOWHERE
from model.nano.quality import FONTS, held_out_pages
from model.nano.sizes import NANO, write_nano_configuration
from model.nano.tasks import Answers, answers, prompts, schemas, tokens
from model.nano.tokenizer import END, Tokens, write_told_tokenizer
from model.tokenizer import Tokenizer as CheckpointTokenizer

KEY_OF_JSON = re.compile(r'[{},\[]*"[a-z_]+":')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("configuration")
    write_nano_configuration(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def known():
    pages = held_out_pages(12, FONTS["training fonts"])
    return [told for page in pages for told in answers(page.content).items()]


def pieces(text: str) -> list[str]:
    """A character each, but for the keys of JSON."""
    if not text.startswith("{"):
        return list(text)
    found, at = [], 0
    for key in KEY_OF_JSON.finditer(text):
        found += [*text[at : key.start()], key.group()]
        at = key.end()
    return [*found, *text[at:]]


def test_a_character_is_a_token_that_knows_its_place_and_a_key_is_one_without(tokenizer, known):
    answer = Answers(tokenizer)
    for _, truth in known:
        learnt = answer.encode(truth)
        expected, glyphs, at = [], [], 0
        for piece in pieces(truth.text):
            ids = tokenizer.encode(piece, add_special_tokens=False).ids
            expected += ids
            glyphs += [truth.glyphs[at] if len(piece) == 1 else NOWHERE] * len(ids)
            at += len(piece)
        assert learnt.token_ids.tolist() == [*expected, tokenizer.token_to_id(END)]
        assert learnt.glyphs.tolist() == [*glyphs, NOWHERE]
        assert tokenizer.decode(learnt.token_ids) == truth.text


def test_a_grammar_allows_every_token_that_is_learnt(folder, tokenizer, known):
    """Where it forces a key, it allows one token alone: another than the learnt one would leave the
    model guessing on."""
    checkpoint = CheckpointTokenizer.from_checkpoint(folder)
    end = tokenizer.token_to_id(END)
    constraints = Constraints(checkpoint.serialize(), NANO.vocab_size, [end], threads=1)
    answer, grammars, asked, forced = Answers(tokenizer), json_schemas(), set(), 0
    for task, truth in known:
        if task not in schemas():
            continue
        asked.add(task)
        constraint = constraints.start(grammars[task])
        for token in answer.encode(truth).token_ids.tolist():
            bits = np.unpackbits(
                constraints.masks([constraint])[0].view(np.uint8), bitorder="little"
            )
            assert bits[token], (task, tokenizer.decode([token], skip_special_tokens=False))
            forced += bits.sum() == 1
            assert constraints.advance([constraint], [token]) == [True]
    assert asked == set(schemas())
    assert forced > 100


def test_a_line_of_a_prompt_is_a_token(folder):
    checkpoint = CheckpointTokenizer.from_checkpoint(folder)
    for text in prompts().values():
        template = checkpoint.prompt_template(text)
        around = 5  # the end of the turn, the header of the answer, and three line breaks, less one
        assert len(template.suffix_ids) == 2 * len(text.split("\n")) - 1 + around
        assert len(template.prefix_ids) == 3


def test_any_text_survives(folder, tokenizer):
    text = "A boat, naïve 日本語 🚀\n\tand  two €uros • ß <unused_300> user name=user"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    checkpoint = CheckpointTokenizer.from_checkpoint(folder)
    assert checkpoint.prompt_template(text).suffix_ids[:-5] == tuple(tokenizer.encode(text).ids)


def test_ids_that_a_trained_checkpoint_knows_stay(tokenizer):
    """Of bytes, characters, phrases and special tokens, one each."""
    ids = {" ": 220, "a": 64, "€": 286, "ä": 272, ',"total":': 498, "<end_of_sentence>": 1022}
    for text, id in ids.items():
        assert tokenizer.encode(text).ids == [id]


@pytest.mark.parametrize(("id", "said"), [(64, "taken"), (1021, "too large"), (272, "taken")])
def test_an_id_is_told_once(tmp_path, id, said):
    told = Tokens(tokens().characters, {"a phrase": id})
    with pytest.raises(ValueError, match=said):
        write_told_tokenizer(tmp_path, 1024, told)
