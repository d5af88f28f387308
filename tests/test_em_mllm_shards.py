"""em_mllm: signals in tar shards are the same list of signals as the rows of a .h5."""

import io
import json
import tarfile

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from em_mllm import finetune
from em_mllm.dataset import PackedSignals, QuestionDataset, SignalDataset, signal_files, task_pairs
from em_mllm.em_foundation.models import SiTMAEConfig
from em_mllm.shards import open_signals
from tests.test_em_mllm_data import tokenizer  # noqa: F401


def npy(x, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, x, **options)
    return file.getvalue()


def write_tar(path, members: dict, mode="w"):
    """A tar of {name: bytes, or anything JSON takes}."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pack(signals: SignalDataset, folder, shards=3):
    """folder/0.tar, 1.tar, ... of the signals in their order, with their rates."""
    items = [signals[i] for i in range(len(signals))]
    for n, part in enumerate(np.array_split(np.arange(len(items)), shards)):
        members = {f"{i:06d}.npy": npy(items[i]["iq"]) for i in part}
        members |= {f"{i:06d}.json": {"fs": items[i]["fs"]} for i in part}
        write_tar(folder / f"{n}.tar", dict(sorted(members.items())))


def test_labels_in_shards_train_an_encoder_as_those_of_a_h5_do(tmp_path):
    """The same signals, labels and SNR from three shards and from one .h5, a step further on each: equal
    weights and scores."""
    rng = np.random.default_rng(0)
    iq, label = rng.standard_normal((12, 128, 2)).astype("f4"), np.arange(12) % 3
    names, snr = ["AM", "FM", "OOK"], np.arange(12.0)
    for part in ("train", "test"):
        with h5py.File(tmp_path / f"{part}.h5", "w") as file:
            file["IQ_data"], file["label"], file["snr"] = iq, label[:, None].astype("f4"), snr[:, None]
            file.attrs["classes"], file.attrs["fs"] = json.dumps(names), 1e6
        for n, rows in enumerate(np.array_split(np.arange(12), 3)):
            members = {}
            for i in rows:
                members[f"{i:03d}.json"] = {"fs": 1e6, "label": names[label[i]], "snr": snr[i]}
                members[f"{i:03d}.npy"] = npy(iq[i])
            write_tar(tmp_path / part / f"{n:02d}.tar", members)
    kept = []
    for kind, train, test in (
        ("h5", "train.h5", "test.h5"),
        ("shards", "train/{00..02}.tar", "test"),  # a pattern, and a folder
    ):
        files = [
            "--train",
            str(tmp_path / train),
            "--test",
            str(tmp_path / test),
            "--roll",
            "--encoder",
            "cnn",
        ]
        steps = ["--max-steps", "2", "--batch-size", "6", "--out", str(tmp_path / kind)]
        finetune.main(finetune.parse_args([*files, *steps]))
        metrics = json.loads((tmp_path / kind / "metrics.json").read_text())
        kept.append((metrics, load_file(tmp_path / kind / "model/model.safetensors")))
    (scores, weights), (others, same) = kept
    assert scores == others and scores["count"] == 12 and "accuracy_high_snr" in scores
    assert weights.keys() == same.keys() and all(torch.equal(same[k], v) for k, v in weights.items())


def waves(count=4, points=96):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((points + 16 * k, 2)).astype("f4") for k in range(count)]


def test_signals_of_any_layout_are_read_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("em_mllm.shards.TarSignals.large", 0)
    monkeypatch.setenv("EM_MLLM_CACHE", str(tmp_path / "cache"))
    a, b, c, d = waves()
    members = {
        "./deep/0.npy": npy(a),
        "./deep/0.json": {"sample_rate": "1 MHz", "label": "FM", "snr": 7, "note": [1]},
        "./deep/1.iq.npy": npy((b[:, 0] + 1j * b[:, 1]).astype("c8")),
        "./deep/1.cls": b"AM\n",
        "./deep/2.NPY": npy(np.asfortranarray(c.T)),
        "./deep/2.txt": b"a remark",
        "./deep/2.json": {"label": "FM"},
        "readme.txt": b"no sample",
        "3.cu8": (d * 10 + 127.5).clip(0, 255).astype("u1").tobytes(),
        "3.json": {"label": "FM", "fs": 2e6, "snr": None},
    }
    path = write_tar(tmp_path / "x/a.tar", members)
    for _ in range(2):  # anew, and as it was remembered
        file = open_signals(path)
        for k, right in enumerate((a, b, c)):
            assert np.array_equal(file.read(k), right)
        assert np.abs(file.read(3) - d.clip(-12.7, 12.7) * 10).max() < 1
        assert [file.rate(k) for k in range(4)] == [1e6, 20e6, 20e6, 2e6] and not file.fs_stated
        assert file.classes == ["AM", "FM"] and file.column("label").tolist() == [1, 0, 1, 1]
        assert np.array_equal(file.column("snr"), [7, np.nan, np.nan, np.nan], equal_nan=True)
        assert file.lengths().tolist() == [96, 112, 128, 144] and file.points == 144
    assert signal_files([tmp_path / "x"]) == [str(path)]


def test_shards_are_packed_at_the_length_of_each_signal(tmp_path):
    for n, part in enumerate(np.array_split(np.arange(4), 2)):
        write_tar(tmp_path / f"{n:03d}.tar", {f"{i}.npy": npy(waves()[i]) for i in part})
    signals = SignalDataset(signal_files([tmp_path / "{000..001}.tar"]))
    config = SiTMAEConfig(patch_size=(16, 1), max_seq_len=(160, 1))
    packed = PackedSignals(signals, config, room=22)
    tokens = sum(int((packed[i]["sample_ids_seq"] >= 0).sum()) for i in range(len(packed)))
    assert tokens == sum(len(x) // 16 + config.num_special for x in waves())


def test_questions_are_asked_about_a_shard(tmp_path, tokenizer):  # noqa: F811
    write_tar(tmp_path / "x.tar", {f"{i}.npy": npy(x) for i, x in enumerate(waves())})
    (tmp_path / "x.json").write_text(json.dumps([{"question": "q", "answer": "a", "iq_index_in_h5": 2}]))
    data = QuestionDataset(task_pairs(tmp_path), tokenizer)
    x = waves()[2]
    assert np.allclose(data[0]["iq"][0], x / np.abs(x).max())


GOOD = npy(waves(1)[0])


@pytest.mark.parametrize(
    "members, said",
    [
        ({"a.json": {}}, "sample /a has 0 signals"),
        ({"a.npy": GOOD, "a.cf32": GOOD}, "sample /a has 2 signals"),
        ({"a.x.npy": GOOD, "a.y.npy": GOOD}, "two files of one kind"),
        ({"a.txt": b"x"}, "holds no signal"),
        ({"a.npy": npy(np.stack([waves(1)[0]] * 3))}, "expected one signal"),
        ({"a.npy": GOOD[:-8]}, "does not take"),
        ({"a.npy": npy(np.array([{}], object), allow_pickle=True)}, "a.npy"),
        ({"a.npy": b"no array"}, "a.npy: not a readable"),
        ({"a.cs16": b"12345"}, "no whole number of 4-byte"),
        ({"a.npy": GOOD, "a.json": b"{"}, "a.json: not a readable description"),
        ({"a.npy": GOOD, "a.json": {"fs": "fast"}}, "expected a rate"),
        ({"a.npy": GOOD, "a.json": {"snr": "high"}}, "snr is 'high', expected a number"),
        ({"a.npy": GOOD, "a.json": {"label": "FM"}, "b.npy": GOOD, "b.cls": b"3"}, "some labels are names"),
    ],
)
def test_a_shard_of_another_form_is_named_in_one_line(tmp_path, members, said):
    with pytest.raises(UserError, match=f"x.tar.*{said}"):
        open_signals(write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("cut", [100, 1024, 600 * 512])
def test_a_shard_cut_short_or_compressed_is_named(tmp_path, cut):
    path = write_tar(tmp_path / "x.tar", {f"{i}.npy": GOOD for i in range(400)})
    content = path.read_bytes()
    path.write_bytes(content[: len(content.rstrip(b"\0")) // 512 * 512 + 512][:-cut])
    with pytest.raises(UserError, match="x.tar"):
        open_signals(path)
    with pytest.raises(UserError, match="y.tar.*not a readable uncompressed tar"):
        open_signals(write_tar(tmp_path / "y.tar", {"a.npy": GOOD}, mode="w:gz"))
