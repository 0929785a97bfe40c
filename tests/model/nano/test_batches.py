"""Batches for training: what they say of a page holds of its pixels and its tokens."""

from collections import Counter
from itertools import islice, product

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from model.config import load_config
from model.inputs.tiling import choose_layout
from model.nano.batches import (
    ALPHABET,
    LANDSCAPE,
    PORTRAIT,
    RECEIPT,
    SLIP,
    Batch,
    Batches,
    Plan,
    Sheetform,
    tokens_of_page,
)
from model.nano.network import CHUNK
from model.nano.sizes import write_nano_configuration
from model.nano.tasks import prompts
from model.nano.tokenizer import END
from model.tokenizer import Tokenizer as CheckpointTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("configuration")
    write_nano_configuration(path)
    return path


@pytest.fixture(scope="module")
def templates(folder):
    tokenizer = CheckpointTokenizer.from_checkpoint(folder)
    return {task: tokenizer.prompt_template(text) for task, text in prompts().items()}


@pytest.fixture(scope="module")
def batches(folder, templates) -> list[Batch]:
    plan = Plan(tokens=5000, easy=0)
    pinpoints = load_config(folder).pinpoints
    made = Batches(plan, folder / "tokenizer.json", templates, pinpoints)
    return list(islice(made, 4))


def test_every_character_is_a_token_of_its_own(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for character in ALPHABET + " \n":
        ids = tokenizer.encode(character).ids
        assert len(ids) == 1, character
        assert tokenizer.decode(ids) == character


def test_answers_come_back_as_text(folder, batches):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut = []
    for asked in (batch.asked for batch in batches if batch.asked):
        for ids, is_answer in zip(asked.ids, asked.is_answer, strict=True):
            learnt = ids[1:][is_answer[:-1]]
            text = tokenizer.decode(learnt.tolist(), skip_special_tokens=True)
            assert text.strip()
            assert set(text) <= set(ALPHABET + " \n")
            is_cut = is_answer[-2]  # the row has no room for the end
            assert is_cut or learnt[-1] == tokenizer.token_to_id(END)
            cut.append(bool(is_cut))
    assert sum(cut) < 0.2 * len(cut)


def test_a_character_is_sought_in_the_patch_that_shows_it(folder, templates, batches):
    """The token that a place names is a patch, and the patch's classes hold the character."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix = len(templates["read"].prefix_ids)
    found = missed = 0
    for batch in batches:
        read, layout = batch.asked, batch.layout
        assert read
        for row in range(len(batch.tiles)):
            for token, place in zip(read.ids[row].tolist(), read.places[row].tolist(), strict=True):
                character = tokenizer.decode([token])
                if place < 0 or character == " ":
                    continue
                y, x = divmod(place - prefix - 576, layout.patch_columns + 1)
                assert x < layout.patch_columns
                shown = batch.patches[row, y * layout.patch_columns + x].tolist()
                is_there = ALPHABET.index(character) + 1 in shown
                found, missed = found + is_there, missed + (not is_there)
    assert found > 500
    assert missed < 0.01 * found  # four narrow letters in one patch, of which three are kept


def test_the_image_is_as_long_as_its_layout_says(batches):
    for batch in batches:
        layout = batch.layout
        assert batch.tiles.shape[1:] == (layout.tiles, layout.tile, layout.tile)
        assert batch.tiles.dtype == torch.uint8
        assert batch.patches.shape[1] == layout.patch_rows * layout.patch_columns
        assert layout.tokens * len(batch.tiles) <= 5000


def test_workers_make_different_batches_and_a_sitting_goes_on(folder, templates, batches):
    plan, pinpoints = Plan(tokens=5000, easy=0), load_config(folder).pinpoints
    later = Batches(plan, folder / "tokenizer.json", templates, pinpoints, start=2)
    third = next(iter(later))
    assert third.asked
    assert np.array_equal(third.tiles, batches[2].tiles)
    assert torch.equal(third.asked.ids, batches[2].asked.ids)
    texts = {bytes(batch.asked.ids[0].numpy()) for batch in batches if batch.asked}
    assert len(texts) == len(batches)


def test_batches_of_all_layouts_have_few_sizes(folder, templates):
    """What is compiled is compiled for each number of tokens and of tiles."""
    pinpoints = load_config(folder).pinpoints
    plan, sizes, layouts = Plan(easy=0), set(), set()
    zoomed_slip = Sheetform((360, 740), (360, 740), SLIP.kinds)
    for form in (SLIP, RECEIPT, PORTRAIT, LANDSCAPE, zoomed_slip):
        for size in product(form.width, form.height):
            layout = choose_layout(*size, pinpoints)
            layouts.add(layout)
            assert layout.tokens + len(templates["read"].prefix_ids) <= tokens_of_page(layout)
            sizes.add(plan.pages(layout) * tokens_of_page(layout))
    assert len(layouts) > 8
    assert sizes == {plan.tokens}


def test_slips_are_seen_small_and_large_and_fields_are_asked_for(folder, templates):
    """Small pages of a PDF are drawn at twice the size; an answer of fields goes wrong most."""
    plan, pinpoints = Plan(tokens=3900, easy=0), load_config(folder).pinpoints
    slips, tasks = set(), Counter()
    for batch in islice(Batches(plan, folder / "tokenizer.json", templates, pinpoints), 40):
        assert batch.asked
        tasks.update(batch.asked.tasks)
        layout = batch.layout
        if layout.tiles == 2 or tokens_of_page(layout) == 60 * CHUNK:
            slips.add(layout.tiles)
            assert len(batch.asked.ids[0]) == (18 if layout.tiles == 5 else 6) * CHUNK
    assert slips == {2, 5}
    assert tasks["extract receipt"] + tasks["extract invoice"] > 0.3 * tasks["read"]


def test_the_tower_alone_gets_tiles_without_thumbnails(folder, templates):
    pinpoints = load_config(folder).pinpoints
    made = Batches(Plan(easy=0, vision=4), folder / "tokenizer.json", templates, pinpoints)
    for batch in islice(made, 3):
        assert batch.asked is None
        assert batch.tiles.shape[:2].numel() == 4
        assert batch.patches.shape[:2].numel() == len(batch.tiles) * (
            batch.layout.patch_rows * batch.layout.patch_columns
        )
        assert batch.patches.any()
