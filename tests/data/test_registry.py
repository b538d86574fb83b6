"""Sets by name."""

import pytest

from mtljax.data import DataError, available, load


def test_unknown_name_lists_the_known():
    with pytest.raises(
        DataError, match=r"Unknown data set 'mnist'\. Choose from multidigits"
    ):
        load("mnist")


def test_unknown_option_lists_the_known():
    with pytest.raises(DataError, match=r"no option 'size'; it has seed, train_size"):
        load("multidigits", size=3)


def test_embedded_set_needs_no_folder(tmp_path):
    assert load("multidigits", data_dir=tmp_path, train_size=3).name == "multidigits"


@pytest.mark.parametrize("name", available()[1:])
def test_others_say_what_they_need(name):
    with pytest.raises(FileNotFoundError, match="pass --data-dir DIR"):
        load(name)
