"""Why a replica ended reaches the user, also where it could not say so itself."""

from pipeline.run_book import Pages


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
