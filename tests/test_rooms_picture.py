"""The picture of the rooms is what the imports say, and has no form where imports go round."""

from collections import Counter
from graphlib import CycleError

import pytest

pytest.importorskip("grimp")  # a GPU machine's own python may lack it
import draw_rooms


def test_the_picture_is_that_of_the_imports():
    found = draw_rooms.draw(draw_rooms.rooms(), draw_rooms.arrows())
    same = draw_rooms.PICTURE.read_text() == found
    assert same, "run `python docs/draw_rooms.py`: rooms.svg is not what is imported now"


def test_a_room_stands_above_all_that_it_imports():
    imports = Counter({("roof", "wall"): 1, ("wall", "ground"): 2, ("roof", "ground"): 1})
    assert draw_rooms.layers(imports) == [["ground"], ["wall"], ["roof"]]


def test_rooms_that_import_each_other_have_no_picture():
    with pytest.raises(CycleError, match="cycle"):
        draw_rooms.layers(Counter({("a", "b"): 3, ("b", "a"): 1}))


def test_every_import_and_its_number_are_in_the_picture():
    picture = draw_rooms.draw({"a": "First.", "b": "Second."}, Counter({("a", "b"): 17}))
    assert "a imports b 17; b imports no other room" in picture
    assert picture.count("<circle") == 1
