import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sbp_assets.training.mapped import MappedArrays


def numbers(*parts: list[int]) -> Iterator[np.ndarray]:
    return (np.array(part, np.int64) for part in parts)


@pytest.mark.parametrize("named", [True, False])
def test_an_array_is_its_pieces_changed_in_place(tmp_path: Path, named: bool):
    arrays = MappedArrays(tmp_path if named else None)
    found = arrays.array("a", np.int32, lambda: numbers([3, 1], [], [2]), np.ndarray.sort)
    assert found.dtype == np.int32 and found.tolist() == [1, 2, 3]
    assert arrays.array("none", np.int64, lambda: numbers()).tolist() == []


def test_it_is_written_once_for_all_who_give_the_folder(tmp_path: Path):
    asked: list[int] = []

    def pieces() -> Iterator[np.ndarray]:
        asked.append(1)
        return numbers([len(asked)])

    found: list[list[int]] = []
    who = [
        threading.Thread(target=lambda: found.append(MappedArrays(tmp_path).array("a", np.int32, pieces).tolist()))
        for _ in range(4)
    ]
    for thread in who:
        thread.start()
    for thread in who:
        thread.join()
    assert found == [[1]] * 4 and asked == [1]
    MappedArrays(tmp_path).remove("a", "unknown")
    assert MappedArrays(tmp_path).array("a", np.int32, pieces).tolist() == [2]


def test_what_a_killed_process_left_is_not_taken_for_an_array(tmp_path: Path):
    def broken() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MappedArrays(tmp_path).array("a", np.int32, broken)
    assert (tmp_path / "a.partial").exists()
    assert MappedArrays(tmp_path).array("a", np.int32, lambda: numbers([7])).tolist() == [7]


def test_a_number_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="2,147,483,648 is too large"):
        MappedArrays(tmp_path).array("a", np.int32, lambda: numbers([2**31]))
