"""Pages made for training: the same every time, and their truth is what is printed on them."""

import datetime
import json
from random import Random

import numpy as np
import pytest

from model.nano.pages.content import amount, iso
from model.nano.pages.fonts import HELD_OUT, families, family
from model.nano.pages.marked import NOWHERE, Marked, join, marked
from model.nano.pages.page import KINDS, Page, Wear, make_page
from model.nano.pages.words import Money, Words
from model.nano.tasks import answers

CLEAN = Wear(0, 0, 0)


def page(kind: str, seed: str = "a", wear: Wear = CLEAN) -> Page:
    size = (320, 620) if kind == "receipt" else (475, 672)
    return make_page(seed, *size, kinds=[kind], families=families(), wear=wear)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_follows_from_its_seed(kind):
    once, again, other = page(kind, "a", Wear()), page(kind, "a", Wear()), page(kind, "b", Wear())
    assert once.image.tobytes() == again.image.tobytes()
    assert once.content == again.content
    assert once.content.markdown != other.content.markdown


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_of_an_answer_stands_where_it_says(kind):
    """Its glyph is the same character, but for what JSON writes in another way."""
    for seed in range(5):
        made = page(kind, str(seed))
        for task, answer in answers(made.content).items():
            for character, glyph in zip(answer.text, answer.glyphs, strict=True):
                if glyph != NOWHERE and task == "read":
                    assert made.glyphs[glyph] == character
                elif glyph != NOWHERE:
                    assert made.glyphs[glyph] == character or _is_rewritten(character)


def _is_rewritten(character: str) -> bool:
    return character.isdigit() or character.isalpha() or character == "."


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_ink_where_a_character_is_said_to_be(kind):
    made = page(kind, "ink", Wear(tilt=3, noise=0, jpeg=0))
    pixels = np.asarray(made.image, np.int64)
    paper = np.bincount(pixels.ravel()).argmax()
    reach = made.style.size // 2
    for character, (x, y) in zip(made.glyphs, made.centres.round().astype(int), strict=True):
        if character != " ":
            around = pixels[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach]
            assert (abs(around - paper) > 40).any(), (character, x, y)


@pytest.mark.parametrize("kind", ["receipt", "invoice"])
def test_the_total_of_the_description_is_that_of_the_fields(kind):
    for seed in range(5):
        told = answers(page(kind, str(seed)).content)
        fields = json.loads(told[f"extract {kind}"].text)
        assert f" for {fields['total']:.2f} {fields['currency']}." in told["describe"].text
        items = fields["items" if kind == "receipt" else "lines"]
        net = fields["subtotal"] if kind == "invoice" and fields["subtotal"] else fields["total"]
        assert sum(item["amount"] for item in items) == pytest.approx(net)


def test_dates_are_understood_in_every_form():
    words = Words(Random(0))
    for _ in range(200):
        date = words.date()
        shown = Marked(date.shown, tuple(range(len(date.shown))))
        assert iso(shown, date).text == str(datetime.date(date.year, date.month, date.day))


@pytest.mark.parametrize(("comma", "shown"), [(False, "$1,234.50"), (True, "1.234,50 €")])
def test_amounts_lose_their_separators_and_keep_their_places(comma, shown):
    money = Money("USD", "$", True, comma)
    number = amount(Marked(shown, tuple(range(len(shown)))), money)
    assert number.text == "1234.50"
    assert shown[number.glyphs[0]] == "1"
    assert [shown[g] for g in number.glyphs][-2:] == ["5", "0"]


def test_text_keeps_its_places_through_joining_and_cutting():
    shown = Marked("abc", (4, 5, 6))
    assert ("<" + shown[1:] + ">").glyphs == (NOWHERE, 5, 6, NOWHERE)
    assert join(", ", [shown, "x"]) == Marked("abc, x", (4, 5, 6, -1, -1, -1))
    assert join(", ", []) == marked("")
    with pytest.raises(ValueError, match="3 characters, 1 glyphs"):
        Marked("abc", (1,))


def test_the_held_out_font_is_no_font_of_training():
    assert HELD_OUT not in {each.name for each in families()}
    assert family(HELD_OUT).at(16).getname()[0] == HELD_OUT
