"""Why a replica ended reaches the user, also where it could not say so itself."""

from types import SimpleNamespace

from pipeline import run_book
from pipeline.run_book import Pages, SharedBook


def test_a_replica_that_was_killed_is_not_passed_over_nor_given_the_reason_of_another():
    pages = Pages({})
    pages.ends("a", "rank 1 of 2 was killed by SIGKILL")
    pages.begins_again("b")
    pages.begins_again("a")
    pages.begins_again("a")
    nobody_said = "a replica was started again: its process was killed, or its node was lost"
    _, news = pages.read()
    assert news == [
        nobody_said,
        "a replica was started again: rank 1 of 2 was killed by SIGKILL",
        nobody_said,
    ]


def test_how_far_a_replica_is_in_starting_is_told_until_it_has_started():
    pages = Pages({})
    assert pages.starting() == ""
    pages.starts("a", "rank 0 of 4 loading its layers, 43%")
    pages.starts("b", "rank 2 of 4 loading its layers, 7%")
    assert pages.starting() == "starting: rank 0 of 4 loading its layers, 43%"
    pages.starts("a", "")
    assert pages.starting() == "starting: rank 2 of 4 loading its layers, 7%"
    pages.starts("b", "")
    assert pages.starting() == ""


def test_a_model_that_is_loaded_and_checked_is_not_said_to_be_loading_still(monkeypatch):
    told = []
    here = SimpleNamespace(get_actor_id=lambda: "a")
    monkeypatch.setattr(run_book.ray, "get_runtime_context", lambda: here)
    starts = SimpleNamespace(remote=lambda replica, how_far: told.append(how_far))
    book = SharedBook(SimpleNamespace(starts=starts))
    for how_far in ("loading its layers, 2%", "loading its layers, 98%", "it is loaded, a check"):
        book.starts(how_far)
    book.starts("")
    assert told == ["loading its layers, 2%", "it is loaded, a check", ""]
