"""common/: plain pickles, intervals, confusion pictures."""

import csv
import pickle

import numpy as np
import pytest
from scipy import stats

from common import figures
from common.errors import UserError
from common.figures import draw_confusion
from common.files import read_plain_pickle
from common.intervals import bootstrap


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


def test_plain_pickles_are_read_and_code_is_not_run(tmp_path, capsys):
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps([{"a": (1, "b", None)}], protocol=2))
    assert read_plain_pickle(path, "list of references") == [{"a": (1, "b", None)}]
    for content in ([Harmful()], {"a": Harmful()}, np.float64):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"a\.p: it names .*only plain data"):
            read_plain_pickle(path, "list of references", arrays=True)
    assert "code ran" not in capsys.readouterr().out


def test_arrays_are_read_only_where_they_are_asked_for(tmp_path):
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps({("BPSK", 10): np.arange(6.0).reshape(1, 2, 3)}))
    assert read_plain_pickle(path, "RadioML file", arrays=True)["BPSK", 10].shape == (1, 2, 3)
    with pytest.raises(UserError, match="numpy"):
        read_plain_pickle(path, "list of references")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1])[:-3], b"\x80\x05."])
def test_a_damaged_pickle_is_one_line_that_names_it(tmp_path, content):
    (tmp_path / "a.p").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.p: not a readable") as error:
        read_plain_pickle(tmp_path / "a.p", "list of references")
    assert "\n" not in str(error.value)


def test_the_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap(np.mean, values, draws=4000)
    expected = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    assert low == pytest.approx(expected[0], abs=0.02) and high == pytest.approx(expected[1], abs=0.02)


def test_rows_of_a_group_are_drawn_together():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 25)
    values = rng.normal(size=40)[groups]  # nothing new in the 25 rows of a group
    low, high = bootstrap(np.mean, values, groups=[f"patient {g}" for g in groups], draws=2000)
    expected = 2 * 1.96 * values[::25].std() / np.sqrt(40)
    assert high - low == pytest.approx(expected, rel=0.1)
    alone = bootstrap(np.mean, values, draws=2000)
    assert alone[1] - alone[0] < 0.3 * (high - low)


def test_arrays_stay_aligned_and_seeds_repeat():
    x = np.arange(100.0)
    agree = lambda a, b: float((a == b).mean())
    assert bootstrap(agree, x, x) == (1.0, 1.0)
    assert bootstrap(np.mean, x, seed=3) == bootstrap(np.mean, x, seed=3) != bootstrap(np.mean, x, seed=4)


def test_confusion_writes_counts_with_the_true_class_by_row(tmp_path):
    draw_confusion([[5, 1], [0, 4]], ["N", "V"], tmp_path / "confusion.png")
    with open(tmp_path / "confusion.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"true": "N", "N": "5", "V": "1"},
            {"true": "V", "N": "0", "V": "4"},
        ]
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_the_colours_of_a_confusion_picture_are_fractions_of_the_true_class(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    figures.draw_confusion([[6, 2], [0, 4]], ["N", "V"], tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    figures.plt.close(drawn[0])
