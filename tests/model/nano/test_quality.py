"""The measures of quality, on answers whose faults are known."""

import json

import pytest

from model.nano.quality import FONTS, Answered, edits, fields_right, held_out_pages, score
from model.nano.tasks import answers


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("", "", 0),
        ("page", "page", 0),
        ("page", "", 4),
        ("page", "pge", 1),
        ("kitten", "sitting", 3),
    ],
)
def test_edits_count_what_must_be_changed(truth, answer, expected):
    assert edits(truth, answer) == expected
    assert edits(answer, truth) == expected


def test_fields_are_counted_one_by_one():
    truth = json.dumps({"total": 1.5, "seller": {"name": "A"}, "lines": [{"amount": 1}] * 2})
    assert fields_right(truth, truth) == (4, 4)
    shorter = json.dumps({"total": 1.5, "seller": {"name": "B"}, "lines": [{"amount": 1}]})
    assert fields_right(truth, shorter) == (2, 4)
    assert fields_right(truth, truth[:-1]) == (0, 4)


def test_a_model_that_says_the_truth_scores_full_marks():
    pages = held_out_pages(12, FONTS["training fonts"])
    told = [
        Answered(i, task, truth.text, truth.text)
        for i, page in enumerate(pages)
        for task, truth in answers(page.content).items()
    ]
    perfect = score(told)
    assert (perfect.character_errors, perfect.fields, perfect.descriptions) == (0, 1, 1)
    assert perfect.pages == 12
    silent = score([Answered(a.page, a.task, a.truth, "") for a in told])
    assert (silent.character_errors, silent.fields, silent.descriptions) == (1, 0, 0)


def test_held_out_pages_are_the_same_every_time():
    once, again = (held_out_pages(4, FONTS["held-out font"], seed=3) for _ in range(2))
    assert [p.image.tobytes() for p in once] == [p.image.tobytes() for p in again]
    other = held_out_pages(4, FONTS["held-out font"], seed=4)
    assert once[0].content.markdown != other[0].content.markdown
