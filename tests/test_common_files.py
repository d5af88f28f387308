"""common/: plain pickles, confined names, declared sizes, intervals, confusion pictures."""

import csv
import io
import pickle
import zipfile

import h5py
import numpy as np
import pytest
from scipy import stats

from common import figures, files
from common.errors import UserError
from common.figures import draw_confusion
from common.files import hdf5_item, inside, open_npz, read_plain_pickle
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
    (tmp_path / "number.p").write_bytes(pickle.dumps([np.int64(7), np.float32(0.5)]))
    assert read_plain_pickle(tmp_path / "number.p", "references file", arrays=True) == [7, 0.5]
    with pytest.raises(UserError, match="numpy"):
        read_plain_pickle(path, "list of references")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1])[:-3], b"\x80\x05."])
def test_a_damaged_pickle_is_one_line_that_names_it(tmp_path, content):
    (tmp_path / "a.p").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.p: not a readable") as error:
        read_plain_pickle(tmp_path / "a.p", "list of references")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_files_of_windows_editors_are_read(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text('{"名": 1}', encoding=encoding)
    assert files.read_json(path, {"名": int}) == {"名": 1}


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


def test_letters_without_a_font_are_one_line(tmp_path, capsys, recwarn):
    figure, axis = figures.new_figure()
    axis.set_title("\ue000\ue001")  # private use: no font has them
    figures.save_figure(figure, tmp_path / "a.png")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "a.png") in said and (tmp_path / "a.png").is_file()
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_names_in_data_files_stay_below_their_folder_and_links_are_followed(tmp_path):
    root = tmp_path / "data"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_text("a")
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "elsewhere")
    (root / "b.png").symlink_to(tmp_path / "elsewhere/a.png")
    for name in ("images/a.png", "b.png", "./images//a.png", "images/../b.png", root / "b.png"):
        assert inside(root, name).read_text() == "a"
    for name in ("../elsewhere/a.png", "images/../../secret", "/etc/passwd", "..", "a/../..", "x\0y"):
        with pytest.raises(UserError, match="lies outside|not a readable path"):
            inside(root, name)
    # a linked folder is not left backwards: that would be its target's parent
    assert inside(root, "images/../elsewhere") == root / "elsewhere"


@pytest.fixture
def hdf5(tmp_path):
    """An open file a.h5 with an array x, and b.h5 beside it."""
    with h5py.File(tmp_path / "b.h5", "w") as other:
        other["x"] = np.ones(4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(4.0)
        file["group/deep"] = np.arange(3.0)
        yield file


def test_hdf5_names_and_links_inside_the_file_are_followed(hdf5):
    hdf5["soft"] = h5py.SoftLink("/x")
    hdf5["group/up"] = h5py.SoftLink("/soft")
    hdf5["group/near"] = h5py.SoftLink("deep")
    hdf5["dot"] = h5py.SoftLink("./x")
    make_virtual(hdf5, ".", name="own")
    for name in ("x", "/x", "./x", "soft", "group/up", "dot", "own"):
        assert hdf5_item(hdf5, name)[:].tolist() == [0, 1, 2, 3]
    assert hdf5_item(hdf5, "group/near").shape == hdf5_item(hdf5["group"], "deep").shape == (3,)
    assert isinstance(hdf5_item(hdf5, "group"), h5py.Group)
    for name in ("y", "x/y", "group/y"):
        with pytest.raises(KeyError):
            hdf5_item(hdf5, name)


def make_external_link(file):
    file["bad"] = h5py.ExternalLink("b.h5", "/x")


def make_group_in_another_file(file):
    file["far"] = h5py.ExternalLink("b.h5", "/")
    file["bad"] = h5py.SoftLink("/far/x")


def make_external_storage(file):
    file.create_dataset("bad", (4,), "i1", external=[("b.h5", 0, 4)])


def make_virtual(file, place="b.h5", source="x", name="bad"):
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(place, source, (4,))
    file.create_virtual_dataset(name, layout)


def make_virtual_of_a_link(file):
    file["far"] = h5py.ExternalLink("b.h5", "/x")
    make_virtual(file, ".", "far")


def make_virtual_of_a_virtual(file):
    make_virtual(file, "b.h5", name="near")
    make_virtual(file, ".", "near")


def make_virtual_of_external_storage(file):
    file.create_dataset("near", (4,), "f8", external=[("b.h5", 0, 32)])
    make_virtual(file, ".", "near")


def make_virtual_of_nothing(file):
    make_virtual(file, ".", "missing")


def make_virtual_circle(file):
    make_virtual(file, ".", "other")
    make_virtual(file, ".", "bad", name="other")


def make_circle(file):
    file["bad"], file["other"] = h5py.SoftLink("/other"), h5py.SoftLink("/bad")


def make_declared(file):
    file.create_dataset("bad", (6_000_000_000,), "f8")


def make_declared_in_chunks(file):
    file.create_dataset("bad", (6_000_000_000,), "f8", chunks=(1000,), compression="gzip")[:3] = 1


@pytest.mark.parametrize(
    "make",
    [
        make_external_link,
        make_group_in_another_file,
        make_external_storage,
        make_virtual,
        make_virtual_of_a_link,
        make_virtual_of_a_virtual,
        make_virtual_of_external_storage,
        make_virtual_of_nothing,
        make_virtual_circle,
        make_circle,
        make_declared,
        make_declared_in_chunks,
    ],
)
def test_hdf5_items_that_lie_elsewhere_or_only_declare_their_size_are_one_line(hdf5, make):
    make(hdf5)
    said = "lies in another file|leads to itself|bytes are stored|made of itself|not there"
    with pytest.raises(UserError, match=f"a.h5: .*({said})") as error:
        hdf5_item(hdf5, "bad")
    assert "\n" not in str(error.value)


def test_rows_that_fit_are_read_from_a_set_that_does_not(hdf5, monkeypatch):
    data = hdf5.create_dataset("many", (40, 1 << 21), "f8", chunks=(1, 1 << 18), compression="gzip")
    data[0] = np.random.default_rng(0).normal(size=1 << 21)
    monkeypatch.setattr(files, "free_memory", lambda: 100_000_000)
    assert hdf5_item(hdf5, "many", whole=False).shape == (40, 1 << 21)
    with pytest.raises(UserError, match="GB of memory are free"):
        hdf5_item(hdf5, "many")


def test_an_npz_that_declares_more_than_it_holds_is_one_line(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=np.arange(3), text=np.array("a"))
    with open_npz(tmp_path / "a.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2] and str(arrays["text"]) == "a"
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (6_000_000_000,)}
    )
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(64))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros(1 << 24))
    monkeypatch.setattr(files, "free_memory", lambda: 1 << 26)
    for name, said in (("lie.npz", "bytes are stored"), ("bomb.npz", "memory are free")):
        with pytest.raises(UserError, match=f"{name}: x.npy .*{said}"), open_npz(tmp_path / name) as arrays:
            dict(arrays)
