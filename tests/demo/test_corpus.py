"""The cleaning rules, on a small old book."""

import pytest

from mini_vllm.demo.corpus import read_stories

BOOK = """\
The Mauve Fairy Book Edited by Nobody

The King and the Cat The Cat and the King

ONCE upon a time there lived a king[1] who had a cat.

'Well,' said the king's cat, 'say "miaow" for me.' 'That,' said he, 'is easy!'

'I shall come again,

'and again,' it said.(1)

So he did, for 'tis the cats' way.

[From Contes du Chat.]

There was once a widow, and her cats' house fell in.

* A very small house.

"Who is it?" cried the 'widow.'
"""


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return [story.split("\n\n") for story in read_stories(path)]


def test_editors_are_silent_and_stories_apart(stories):
    assert [story[0] for story in stories] == [
        "Once upon a time there lived a king who had a cat.",
        "There was once a widow, and her cats' house fell in.",
    ]
    assert len(stories[1]) == 2, "a footnote is dropped without cutting the story"


def test_quotation_marks_are_of_one_kind(stories):
    assert stories[0][1] == '"Well," said the king\'s cat, "say \'miaow\' for me." "That," said he, "is easy!"'
    assert stories[0][2:4] == ['"I shall come again,"', '"and again," it said.'], "each paragraph closes its speech"
    assert stories[0][4] == "So he did, for 'tis the cats' way.", "an apostrophe is no quotation mark"
    assert stories[1][1] == "\"Who is it?\" cried the 'widow.'", "this edition has the right marks already"


def test_notes_in_a_run_take_what_stands_between_them(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(
        "He died.\n\nSource.--Mine.\n\nA learned remark.\n\nParallels.--None.\n\nHe lived.\n", encoding="utf-8"
    )
    assert read_stories(path) == ["He died.", "He lived."]
