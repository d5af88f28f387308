"""em_mllm: a model folder carries its whole contract. One preparation of signals from training to a single
recording, every kind of continued training read back as it was left, and options that contradict the folder
refused."""

import itertools
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import em_mllm.finetune
import em_mllm.make_data
import em_mllm.pretrain
import em_mllm.test
import em_mllm.train
import studies.em_mllm.fewshot
from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from em_mllm.convert import view as convert_view
from em_mllm.dataset import Augmentation, QuestionCollator, QuestionDataset, SignalDataset, task_pairs
from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEModelWithoutMask
from em_mllm.em_foundation.models.modeling_cnn import cnn_config, make_encoder
from em_mllm.em_foundation.utils.utils import signal_of
from em_mllm.model import load_model, read_notes, save_model, set_trainable
from em_mllm.prepare import AS_RECORDED, SignalSpec, check_rate, points_read, prepare
from em_mllm.recordings import CANNOT_TELL, cut, show, together
from em_mllm.signal_file import SignalFile
from tests.em_world import tiny_sizes, write_h5, write_questions

QUESTION = "选出最符合的调制类型。(A) CW (B) 2ASK (C) BPSK"
NAMES = ["CW", "2ASK", "BPSK"]
SIZES = tiny_sizes(points=272)


def run(module, *arguments):
    args = module.parse_args([str(a) for a in arguments])
    module.main(args)
    return args


def write_task(folder, points=128, count=9, offset=2.0, questions=2, **attributes):
    """Signals with a large mean, so that a preparation that takes it off in one place only is seen."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    iq = (rng.standard_normal((count, points, 2)) + [offset, 0]).astype("f4")
    write_h5(folder / "x.h5", iq, label=np.arange(count, dtype="f4")[:, None] % 3, **attributes)
    answers = [f"正确答案是：({'ABC'[i % 3]}) {NAMES[i % 3]}" for i in range(count)]
    about = {"question": QUESTION, "h5_path": "x.h5"}
    rows = [{**about, "id": i, "answer": text, "iq_index_in_h5": i} for i, text in enumerate(answers)]
    write_questions(folder / "x.json", rows * questions)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    make_llm(
        folder / "llm",
        make_tokenizer([QUESTION, *NAMES, "正确答案是："] * 3, 400),
        hidden_size=16,
        intermediate_size=16,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    SiTMAEModelWithoutMask(SiTMAEConfig(**SIZES)).save_pretrained(folder / "encoder")
    write_task(folder / "train")
    write_task(folder / "polar", view="polar", view_factor=8, fs=31250.0)
    write_task(folder / "test", questions=1)
    (folder / "test/y").mkdir()
    return folder


def train(world, out, *more, data="train", parts=True, max_steps=1):
    paths = ("--signal-encoder-path", world / "encoder", "--llm-model-path", world / "llm")
    command = ("--task-dir", world / data, "--signal-tokens", 2, "--batch-size", 3, "--lr", 1e-2)
    if not parts:
        paths, command = (), command[:2] + command[4:]
    return run(em_mllm.train, *command, *paths, "--max-steps", max_steps, "--out", out, *more)


@pytest.fixture(scope="module")
def folders(world):
    """Model folders of the three kinds, of a model that takes the mean off, and of one that reads a view."""
    kinds = {"frozen": ["--freeze-llm"], "full": [], "adapter": ["--use-lora"]}
    for name, options in kinds.items():
        train(world, world / name, *options, max_steps=2)
    train(world, world / "dc", "--freeze-llm", "--remove-dc", "--resample")
    train(world, world / "seen", "--freeze-llm", data="polar")
    return world


# ---- one preparation


@pytest.mark.slow
@pytest.mark.parametrize("name, data", [("frozen", "test"), ("dc", "test"), ("seen", "polar")])
def test_a_recording_is_asked_as_the_test_set_is_to_the_bit(folders, tmp_path, capsys, name, data):
    """Row i of a .h5 through --iq and through --task-dir: the same tensors, and so the same scores."""
    model = folders / name / "model"
    task = ("--model", model, "--task-dir", folders / data, "--batch-size", 1, "--out", tmp_path / "out")
    run(em_mllm.test, *task, "--max-new-tokens", 2)
    rows = [json.loads(line) for line in open(tmp_path / "out/predictions.jsonl", encoding="utf-8")]
    notes = read_notes(model)
    spec = SignalSpec.from_json(notes["signal"])
    loaded, tokenizer = load_model(model)
    dataset = QuestionDataset(task_pairs(folders / data), tokenizer, with_answers=False, signal=spec)
    for i in (0, 4):
        command = ("--model", model, "--iq", folders / data / "x.h5", "--index", i, "--question", QUESTION)
        args = em_mllm.test.parse_args([str(a) for a in (*command, "--max-new-tokens", 2)])
        _, fs, ((start, window),) = cut(args, args.iq[0], notes, spec, loaded.signal_encoder.config)
        iq, rate = prepare(window, fs, spec, dataset.files[0].done)
        assert start == 0 and np.array_equal(iq, dataset[i]["iq"][0]) and rate == dataset[i]["fs"][0]
        em_mllm.test.main(em_mllm.test.parse_args([*map(str, command), "--out", str(tmp_path / f"iq-{i}")]))
        window, capture = (json.loads(t) for t in open(tmp_path / f"iq-{i}/answers.jsonl", encoding="utf-8"))
        probability = torch.tensor(rows[i]["scores"]).softmax(0)
        assert list(window["probabilities"].values()) == [round(float(p), 5) for p in probability]
        assert capture["answer"] == rows[i]["likeliest"] and capture["agreement"] == 1.0
        assert f"answer: ({capture['answer']})" in capsys.readouterr().out


@pytest.mark.parametrize("resample", [False, True])
def test_every_built_in_task_is_read_alike_in_a_test_set_and_as_a_recording(tmp_path, resample):
    """Rows of every task of the generator, at rates below, at and above that of training."""
    few = ("--train", 1, "--val", 1, "--test", 1, "--points", 128, "--fs", 5e6, 20e6, 40e6)
    run(em_mllm.make_data, "--out", tmp_path / "data", *few)
    spec = SignalSpec(points=128, remove_dc=True, rates=(20e6,), resample=resample)
    tokenizer = make_tokenizer(["modulation type of this signal"] * 3, 300)
    data = QuestionDataset(task_pairs(tmp_path / "data/test"), tokenizer, with_answers=False, signal=spec)
    assert sorted(file.path.stem for file in data.files) == ["bandwidth", "modulation", "radar_jamming"]
    seen = set()
    for row in range(len(data)):
        path, index = data.files[data.file_of[row]].path, data.records[row]["iq_index_in_h5"]
        args = SimpleNamespace(index=index, iq_format=None, fs=None, window=None, windows=4)
        recording, fs, ((start, window),) = cut(args, path, {}, spec, SiTMAEConfig(**SIZES))
        iq, rate = prepare(window, fs, spec, recording.done)
        assert start == 0 and np.array_equal(iq, data[row]["iq"][0]) and rate == data[row]["fs"][0]
        seen.add((fs, len(iq), rate))

    # at four times the rate, so long that the encoder takes no more than what is left of it
    write_task(tmp_path / "long", points=1500, count=2, fs=80e6)
    if resample:
        args = SimpleNamespace(index=1, iq_format=None, fs=None, window=None, windows=4)
        path = tmp_path / "long/x.h5"
        recording, fs, ((_, window),) = cut(args, path, {}, spec, SiTMAEConfig(**SIZES))
        whole = prepare(SignalFile(path).read(1), 80e6, spec)[0]
        assert np.array_equal(prepare(window, fs, spec, recording.done)[0], whole) and len(whole) == 128
        assert points_read(spec, 1500, 80e6) == 128

    assert {length for _, length, _ in seen} == ({64, 128} if resample else {128}) and len(seen) == 3


def test_an_encoder_carries_the_view_that_it_learned(world, tmp_path):
    """Pre-trained on magnitude and frequency, it reads recorded samples so, in every script, and no other
    view."""
    z = np.random.default_rng(0).standard_normal((9, 1024, 2)).astype("f4") @ np.array([1, 1j], "c8")
    write_task(tmp_path / "raw", points=1024, fs=250e3)
    write_task(tmp_path / "polar", view="polar", view_factor=8, fs=31250.0)
    for name, rows in (("raw", np.stack([z.real, z.imag], 2)), ("polar", [convert_view(x) for x in z])):
        with h5py.File(tmp_path / name / "x.h5", "r+") as file:
            file["IQ_data"][:] = rows
    raw, polar = (tmp_path / name / "x.h5" for name in ("raw", "polar"))
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    once = ("--max-steps", 1, "--batch-size", 2)
    run(
        em_mllm.pretrain, "--data", polar, "--config", tmp_path / "sizes.json", *once, "--out", tmp_path / "a"
    )
    learned = signal_of(tmp_path / "a/encoder")
    assert (learned["view"], learned["factor"], learned["rates"]) == ("polar", 8, [31250.0])
    one, two = (SignalDataset([path], ("label",), learned=learned) for path in (raw, polar))
    assert one.signal == two.signal and len(one) == 9
    for i in range(9):
        assert np.array_equal(one[i]["iq"], two[i]["iq"]) and one[i]["fs"] == two[i]["fs"] == 31250.0

    files = ("--train", raw, "--test", polar, "--signal-encoder-path", tmp_path / "a/encoder")
    run(em_mllm.finetune, *files, *once, "--out", tmp_path / "b")
    assert signal_of(tmp_path / "b/model") == learned
    train(world, tmp_path / "c", "--signal-encoder-path", tmp_path / "b/model", "--task-dir", raw.parent)
    assert read_notes(tmp_path / "c/model")["signal"]["view"] == "polar"
    vectors = []
    for path in (raw, polar):
        where = ("--signal-encoder-path", tmp_path / "b/model", "--embed", tmp_path / "e.h5")
        run(studies.em_mllm.fewshot, *where, "--test", path)
        with h5py.File(tmp_path / "e.h5") as file:
            vectors.append(file["embedding"][:])
    assert np.array_equal(*vectors)
    with pytest.raises(UserError, match="of view polar x 8, the encoder learned iq x 1"):
        SignalDataset([polar], learned=SignalSpec().to_json())
    for fields in ({"factor": 0}, {"view": "waterfall"}, {"scale": "rms"}, {"colour": 1}):
        with pytest.raises(UserError, match="not known"):
            SignalDataset([raw], learned={**learned, **fields})


def test_signals_longer_than_the_encoder_are_one_line(folders, tmp_path):
    write_task(tmp_path / "long", points=400, questions=1)
    ask = ("--model", folders / "frozen/model", "--out", tmp_path / "out", "--task-dir")
    with pytest.raises(
        UserError, match="long/x.h5: IQ_data has signals of 400 points, the encoder takes 256"
    ):
        run(em_mllm.test, *ask, tmp_path / "long")
    files = ("--train", tmp_path / "long/x.h5", "--test", folders / "test/x.h5")
    with pytest.raises(UserError, match="signals of 400 points"):
        run(
            em_mllm.finetune, *files, "--signal-encoder-path", folders / "encoder", "--out", tmp_path / "fine"
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "fine").exists()


def test_a_raw_capture_goes_through_the_view_of_training(folders, tmp_path, capsys):
    """An rtl_433 capture as recorded, asked of a model that learned magnitude and frequency, 8 to a point."""
    notes = read_notes(folders / "seen/model")
    spec = SignalSpec.from_json(notes["signal"])
    assert (spec.view, spec.factor, spec.points, spec.rates) == ("polar", 8, 128, (31250.0,))
    raw = np.random.default_rng(0).integers(0, 255, (1024, 2)).astype("u1")
    raw.tofile(tmp_path / "g001_433.92M_250k.cu8")
    args = SimpleNamespace(index=0, iq_format=None, fs=None, window=None, windows=4)
    config = SiTMAEConfig(**SIZES)
    recording, fs, ((_, window),) = cut(args, tmp_path / "g001_433.92M_250k.cu8", notes, spec, config)
    iq, rate = prepare(window, fs, spec, recording.done)
    z = (raw.astype("f4") - 127.5) @ np.array([1, 1j])
    expected = convert_view(z.astype(np.complex64))
    assert rate == 31250.0 and iq.shape == (128, 2)
    np.testing.assert_allclose(iq, expected / np.abs(expected).max(), atol=1e-5)
    args.fs = 1e6
    cut(args, tmp_path / "g001_433.92M_250k.cu8", notes, spec, config)
    assert "states 250000 Hz; --fs 1e+06 is taken instead" in capsys.readouterr().out


def test_preparation_takes_the_mean_off_resamples_and_refuses_another_view():
    iq = np.ones((64, 2), "f4") + np.linspace(-1, 1, 64)[:, None]
    plain, _ = prepare(iq, 1e6, SignalSpec())
    centred, _ = prepare(iq, 1e6, SignalSpec(remove_dc=True))
    assert plain.min() >= 0 and centred.mean() == pytest.approx(0, abs=1e-6)
    z = np.exp(2j * np.pi * 0.05 * np.arange(512))
    tone = np.stack([z.real, z.imag], 1)
    slow, fs = prepare(tone, 2e6, SignalSpec(points=512, rates=(1e6,), resample=True))
    turned = np.angle((slow[1:] @ [1, 1j]) * (slow[:-1] @ [1, -1j]))[50:-50]
    assert fs == 1e6 and len(slow) == 256
    np.testing.assert_allclose(turned / 2 / np.pi, 0.1, atol=1e-3)  # the same Hz, at half the rate
    assert prepare(tone, 1.02e6, SignalSpec(points=512, rates=(1e6,), resample=True))[1] == 1.02e6
    # far below: 90 kHz at 20 MHz is 90 kHz at 30, 250 kHz, too
    for fs, target in ((20e6, 250e3), (20e6, 1.1e6), (1e9, 250e3)):
        z = np.exp(2j * np.pi * 0.36 * 250e3 / fs * np.arange(int(200 * fs / target)))
        slow, rate = prepare(np.stack([z.real, z.imag], 1), fs, SignalSpec(rates=(target,), resample=True))
        turned = np.angle((slow[1:] @ [1, 1j]) * (slow[:-1] @ [1, -1j]))[50:-50] / 2 / np.pi * rate
        np.testing.assert_allclose(turned, 90e3, rtol=2e-3)
    with pytest.raises(UserError, match="polar x 8, the model reads iq x 1"):
        prepare(iq, 1e6, SignalSpec(), ("polar", 8))
    polar = dict(view="polar", factor=8)
    specs = [SignalSpec(points=300, rates=(1e6,), resample=True), SignalSpec(**polar)]
    specs += [SignalSpec(points=30, rates=(1.3e5,), resample=True, **polar)]
    for points, fs in ((100, 1e6), (101, 3e6), (100, 0.7e6), (1000, 2e6), (999, 1.234567e6)):
        for spec in specs:
            assert points_read(spec, points, fs) == len(prepare(np.ones((points, 2)), fs, spec)[0])


def test_the_mean_of_rows_that_are_no_samples_is_refused(world, tmp_path):
    """They keep what their conversion left; a raw capture asked of the model would not."""
    with pytest.raises(UserError, match="polar/x.h5: --remove-dc has no effect on rows of view polar x 8"):
        train(world, tmp_path / "run", "--remove-dc", data="polar")
    assert not (tmp_path / "run").exists()


def test_a_rate_unlike_training_is_told_in_one_line(world, capsys):
    spec = SignalSpec(rates=(1e6, 2e6))
    SignalDataset([world / "train/x.h5"], learned=spec.to_json())
    assert "x.h5: 2e+07 Hz is far from the rates of training" in capsys.readouterr().err
    for fs in (1e6, 1.03e6, 2e6):
        check_rate(spec, fs, "a")
    assert capsys.readouterr().err == ""
    check_rate(spec, 48e3, "a")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "do not trust" in said and "make_data.py --fs 48000" in said


def test_waves_of_a_view_are_not_augmented(world):
    file = world / "polar/x.h5"
    for flags in ({"noise_db": (0, 5)}, {"shift_hz": 10.0}, {"phase": True}, {"conjugate": True}):
        with pytest.raises(UserError, match="leave out the others"):
            SignalDataset([file], augmentation=Augmentation(**flags))
    SignalDataset([file], augmentation=Augmentation(roll=True))[0]


def test_phase_and_mirror_are_what_they_say():
    rng = np.random.default_rng(0)
    iq = rng.standard_normal((64, 2)).astype("f4")
    z, seen = iq @ [1, 1j], set()
    for _ in range(20):
        turned = Augmentation(phase=True)(iq, 1e6, rng) @ [1, 1j]
        assert np.ptp(np.angle(turned / z)) < 1e-4 or np.ptp(np.angle(-turned / z)) < 1e-4
        mirrored = Augmentation(conjugate=True)(iq, 1e6, rng) @ [1, 1j]
        seen.add("same" if np.allclose(mirrored, z) else "mirrored")
        assert np.allclose(mirrored, z) or np.allclose(mirrored, z.conj())
    assert seen == {"same", "mirrored"}


# ---- continued training


def loss_of(model, tokenizer, world):
    dataset = QuestionDataset(task_pairs(world / "test"), tokenizer)
    batch = QuestionCollator(16, tokenizer.pad_token_id)([dataset[i] for i in range(9)])
    batch.pop("rows")
    with torch.no_grad():
        return float(model.eval()(**batch)["loss"])


KINDS = ("frozen", "full", "adapter")
FLAGS = {"frozen": ["--freeze-llm"], "full": [], "adapter": ["--use-lora"]}


@pytest.mark.slow
@pytest.mark.parametrize("first, second", itertools.product(KINDS, KINDS))
def test_continued_training_is_read_back_as_it_was_left(folders, tmp_path, first, second):
    """The loss before saving is the loss after loading, whatever was trained before and now."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:

        def save(out, model, tokenizer, *rest, **notes):
            kept.append(loss_of(model, tokenizer, folders))
            return save_model(out, model, tokenizer, *rest, **notes)

        patch.setattr(em_mllm.train, "save_model", save)
        before = folders / first / "model"
        train(folders, tmp_path / "run", "--trained-dir", before, *FLAGS[second], parts=False, max_steps=2)
    model, tokenizer = load_model(tmp_path / "run/model")
    assert loss_of(model, tokenizer, folders) == pytest.approx(kept[0], abs=1e-6)
    assert kept[0] != pytest.approx(loss_of(*load_model(before), folders), abs=1e-4)
    notes = read_notes(tmp_path / "run/model")
    assert [step["language_model"] for step in notes["lineage"]] == [first, second]


def test_a_language_model_in_4_bits_is_read_back_as_it_was_left(world, tmp_path):
    pytest.importorskip("bitsandbytes")
    words = make_tokenizer([QUESTION, *NAMES, "正确答案是："] * 3, 400)
    make_llm(tmp_path / "llm", words, hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    options = ("--load-in-4bit", "--use-lora", "--dtype", "bfloat16", "--llm-model-path", tmp_path / "llm")
    train(world, tmp_path / "run", *options, max_steps=2)
    model, tokenizer = load_model(tmp_path / "run/model")
    assert read_notes(tmp_path / "run/model")["load_in_4bit"]
    assert model.llm.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    loss = loss_of(model, tokenizer, world)
    train(world, tmp_path / "on", "--trained-dir", tmp_path / "run/model", "--use-lora", parts=False)
    assert loss_of(*load_model(tmp_path / "on/model"), world) != pytest.approx(loss, abs=1e-4)
    with pytest.raises(UserError, match="cannot be trained"):
        train(world, tmp_path / "whole", "--trained-dir", tmp_path / "run/model", parts=False)


@pytest.mark.parametrize("options, word", [([], "cannot be trained"), (["--use-lora"], "bitsandbytes")])
def test_4_bits_are_refused_in_one_line(world, tmp_path, monkeypatch, options, word):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(UserError, match=f"--load-in-4bit.*{word}"):
        train(world, tmp_path / "run", "--load-in-4bit", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", KINDS)
def test_nothing_of_a_frozen_language_model_moves_its_adapters_included(folders, first):
    model, _ = load_model(folders / first / "model")
    set_trainable(model, freeze_llm=True, freeze_signal_encoder=True, use_lora=False)
    assert not any(p.requires_grad for p in model.llm.parameters())


def test_another_language_model_under_an_adapter_is_refused(folders, tmp_path):
    shutil.copytree(folders / "llm", tmp_path / "llm")
    load_model(folders / "adapter/model", tmp_path / "llm")  # the same one, moved
    make_llm(
        tmp_path / "other",
        make_tokenizer([QUESTION, *NAMES, "正确答案是："] * 3, 400),
        seed=5,
        hidden_size=16,
        intermediate_size=16,
    )
    with pytest.raises(UserError, match="another language model"):
        load_model(folders / "adapter/model", tmp_path / "other")
    with pytest.raises(UserError, match="--llm-model-path has no effect"):
        load_model(folders / "full/model", tmp_path / "other")


@pytest.mark.parametrize(
    "kind, options, word",
    [
        ("frozen", ["--signal-encoder-path", "/does/not/exist"], "--signal-encoder-path"),
        ("frozen", ["--projector", "mlp"], "--projector"),
        ("frozen", ["--signal-tokens", "0"], "--signal-tokens"),
        ("frozen", ["--dtype", "bfloat16"], "--dtype"),
        ("frozen", ["--attention-type", "eager"], "--attention-type"),
        ("frozen", ["--legacy"], "--legacy"),
        ("frozen", ["--chat-template"], "--chat-template"),
        ("frozen", ["--remove-dc"], "--remove-dc"),
        ("frozen", ["--resample"], "--resample"),
        ("frozen", ["--lora-r", "4"], "--lora-r"),
        ("full", ["--llm-model-path", "/does/not/exist"], "--llm-model-path"),
        ("adapter", ["--use-lora", "--lora-r", "64"], "--lora-r"),
        ("adapter", ["--use-lora", "--lora-alpha", "64"], "--lora-alpha"),
        ("adapter", ["--use-lora", "--lora-dropout", "0.5"], "--lora-dropout"),
        ("adapter", ["--use-lora", "--lora-targets", "nonsense"], "--lora-targets"),
    ],
)
def test_an_option_that_contradicts_the_model_is_refused(folders, kind, options, word):
    command = ["--task-dir", str(folders / "train"), "--trained-dir", str(folders / kind / "model"), *options]
    with pytest.raises(UserError, match=word) as error:
        em_mllm.train.make_model(em_mllm.train.parse_args(command), [])
    assert "\n" not in str(error.value)


def test_what_the_model_holds_is_inherited_and_may_be_said_again(folders):
    command = ["--task-dir", folders / "train", "--trained-dir", folders / "dc/model", "--freeze-llm"]
    command += ["--signal-encoder-path", folders / "encoder", "--llm-model-path", folders / "llm"]
    command += ["--signal-tokens", 2, "--remove-dc", "--projector", "linear"]
    args = em_mllm.train.parse_args(list(map(str, command)))
    em_mllm.train.check_options(args)
    assert (args.signal_tokens, args.remove_dc, args.resample, args.dtype) == (2, True, True, "float32")


def test_sizes_of_earlier_adapters_are_taken_over(folders, tmp_path):
    """The run's config.json is to show what is trained."""
    shutil.copytree(folders / "adapter/model", tmp_path / "model")
    path = tmp_path / "model/llm/adapter_config.json"
    sizes = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.3, "target_modules": ["v_proj", "k_proj"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    command = ["--task-dir", "x", "--trained-dir", str(tmp_path / "model"), "--use-lora"]
    args = em_mllm.train.parse_args(command)
    for _ in range(2):  # checked before the data and before the model
        em_mllm.train.check_options(args)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (4, 32, 0.3)
    assert args.lora_targets == ["k_proj", "v_proj"]
    with pytest.raises(UserError, match="--lora-r 8 has no effect beside --trained-dir, whose model has 4"):
        em_mllm.train.check_options(em_mllm.train.parse_args([*command, "--lora-r", "8"]))


def test_rates_of_new_recordings_join_those_of_a_view(tmp_path):
    seen = SignalSpec(points=128, view="polar", factor=8, rates=(31250.0,))
    notes = {"llm": "full", "signal": seen.to_json()}
    (tmp_path / "multimodal.json").write_text(json.dumps(notes))
    args = SimpleNamespace(trained_dir=tmp_path)
    # behind the view 200 points at 31250 and 125000 Hz
    recorded = SignalSpec(points=1600, rates=(250e3, 1e6))
    joined = em_mllm.train.trained_signal(args, recorded)
    assert (joined.points, joined.rates, joined.view) == (200, (31250.0, 125e3), "polar")
    viewed = SignalSpec(points=100, view="polar", factor=8, rates=(1e5,))
    assert em_mllm.train.trained_signal(args, viewed).rates == (31250.0, 1e5)
    other = SignalSpec(points=100, view="iq", factor=4, rates=(1e5,))
    assert em_mllm.train.trained_signal(args, other) == seen


# ---- the folder is only read


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_testing_twice_is_testing_the_same_model_also_from_a_read_only_folder(folders, tmp_path):
    model = folders / "frozen/model"
    before = snapshot(model)
    os.chmod(model, 0o555)
    try:
        results = []
        for name in ("one", "two"):
            out = tmp_path / name
            held = ("--calibrate-dir", folders / "train", "--target-accuracy", 0.5)
            run(em_mllm.test, "--model", model, "--task-dir", folders / "test", *held, "--out", out)
            results.append((out / "metrics.json").read_text())
        assert results[0] == results[1] and snapshot(model) == before
    finally:
        os.chmod(model, 0o755)
    calibration = json.loads((tmp_path / "one/calibration.json").read_text())
    assert calibration["temperature"] == json.loads(results[0])["temperature"]
    ask = ("--model", model, "--iq", folders / "test/x.h5", "--question", QUESTION, "--out", tmp_path / "iq")
    (tmp_path / "sure.json").write_text(json.dumps({"temperature": 1.0, "threshold": 1.1}))
    run(em_mllm.test, *ask, "--calibration", tmp_path / "sure.json")
    *_, capture = (json.loads(line) for line in open(tmp_path / "iq/answers.jsonl", encoding="utf-8"))
    assert capture["answer"] == CANNOT_TELL and capture["likeliest"] in "ABC"


def test_calibration_is_of_answered_questions_about_other_signals_and_of_all_of_them(folders, tmp_path):
    ask = ("--model", folders / "frozen/model", "--task-dir", folders / "test", "--out", tmp_path / "out")
    held = ("--calibrate-dir", folders / "train", "--limit", 2, "--max-new-tokens", 2)
    run(em_mllm.test, *ask, *held)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    calibration = json.loads((tmp_path / "out/calibration.json").read_text())
    assert metrics["questions"] == 2 and calibration["questions"] == 18
    with pytest.raises(UserError, match="--calibrate-dir: .*x.h5 is among the test files, too"):
        run(em_mllm.test, *ask, "--calibrate-dir", folders / "test")
    shutil.copytree(folders / "train", tmp_path / "open")
    rows = json.loads((tmp_path / "open/x.json").read_text())
    for kept in ({"answer": ""}, {"question": "这是什么信号？"}, {"answer": "不知道"}):
        (tmp_path / "open/x.json").write_text(json.dumps([{**row, **kept} for row in rows]))
        with pytest.raises(UserError, match="no question has options and an answer among them"):
            run(em_mllm.test, *ask, "--calibrate-dir", tmp_path / "open")


def test_confidence_without_options_is_one_line(folders, tmp_path):
    write_task(tmp_path / "open", questions=1)
    rows = json.loads((tmp_path / "open/x.json").read_text(encoding="utf-8"))
    rows = [{**row, "question": "是什么调制？", "answer": "CW"} for row in rows]
    (tmp_path / "open/x.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"temperature": 1.0, "threshold": 0.5}))
    model, few = ("--model", folders / "frozen/model"), ("--out", tmp_path / "out", "--max-new-tokens", 1)
    asked = ("--iq", folders / "test/x.h5", "--question", "What is it?", "--calibration", tmp_path / "c.json")
    for options, words in (
        (("--task-dir", tmp_path / "open", "--wrong-signal"), "--wrong-signal has no effect"),
        (("--task-dir", folders / "test", "--wrong-signal", "--limit", 1), "--wrong-signal has no effect"),
        (asked, "--calibration has no effect on a question without options"),
    ):
        with pytest.raises(UserError, match=words):
            run(em_mllm.test, *model, *options, *few)
        assert not (tmp_path / "out").exists()


def test_windows_speak_together_by_their_mean_log_likelihood(capsys):
    answers = [
        {
            "options": {"A": "x", "B": "y"},
            "scores": s,
            "likeliest": "AB"[s[1] > s[0]],
            "pred": "A",
            "text": "",
        }
        for s in ([2.0, 0.0], [0.0, 1.0], [0.5, 0.0])
    ]
    whole = together(answers, {"temperature": 1.0})
    assert whole["answer"] == "A" and whole["agreement"] == pytest.approx(2 / 3)
    unsure = together(answers, {"temperature": 1.0, "threshold": 0.99})
    assert unsure["answer"] == CANNOT_TELL and unsure["probabilities"] == whole["probabilities"]
    lines = [{"seconds": 0.0, "text": "A"}]
    for found in (whole, unsure):
        show("a.cu8", "What?", SimpleNamespace(length=100), 1e6, lines, found)
    plain, doubted = (line for line in capsys.readouterr().out.splitlines() if line.startswith("answer: "))
    assert re.fullmatch(r"answer: \(A\) x, confidence 0\.\d\d, not calibrated", plain)
    assert re.fullmatch(r"answer: cannot tell; likeliest \(A\) x, confidence 0\.\d\d", doubted)


def test_true_answers_that_name_no_option_are_counted(folders, tmp_path, capsys):
    path = write_task(tmp_path / "t", count=3, questions=1) / "x.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([{**records[0], "answer": "正确答案是：(E) LFM"}, *records[1:]]))
    task = ("--model", folders / "frozen/model", "--task-dir", path.parent, "--out", tmp_path / "out")
    run(em_mllm.test, *task, "--max-new-tokens", 1)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["keys_unread"], metrics["four_choice"], metrics["questions"]) == (1, 2, 3)
    assert "true answers not read in 1 questions" in capsys.readouterr().out


def test_folders_of_recordings_are_asked_and_a_bad_one_is_named(folders, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.CF32", "sub/b.cf32"):
        (tmp_path / "rec" / name).parent.mkdir(exist_ok=True, parents=True)
        rng.standard_normal((600, 2)).astype("f4").tofile(tmp_path / "rec" / name)
    (tmp_path / "rec/c.cf32").write_bytes(b"12345")
    command = ("--model", folders / "frozen/model", "--iq", tmp_path / "rec", "--fs", 20e6, "--windows", 3)
    with pytest.raises(UserError, match="1 of 3 recordings could not be read: c.cf32; see above"):
        run(em_mllm.test, *command, "--question", QUESTION, "--out", tmp_path / "out")
    lines = [json.loads(line) for line in open(tmp_path / "out/answers.jsonl", encoding="utf-8")]
    assert sorted(line["kind"] for line in lines) == ["capture"] * 2 + ["error"] + ["window"] * 6
    assert all(line["start"] % 128 == 0 for line in lines if line["kind"] == "window")
    assert "c.cf32" in capsys.readouterr().err


def test_recorded_rows_are_as_recorded(world):
    dataset = SignalDataset([world / "train/x.h5"])
    assert dataset.files[0].done == AS_RECORDED and dataset.signal == SignalSpec(points=128, rates=(20e6,))


# ---- the best model, and what a checkpoint holds


@pytest.mark.parametrize("first", [3.0, float("nan"), float("-inf")])
def test_the_best_weights_are_kept_and_waiting_ends_the_run(folders, tmp_path, monkeypatch, first):
    losses = iter([first, 1.0, 2.0, 2.5, 9.0, 9.0])
    monkeypatch.setattr(em_mllm.train, "validation_loss", lambda *_: next(losses))
    saved = []

    def save(out, model, *rest, **notes):
        saved.append(model.iq_tokens.detach().clone())
        return save_model(out, model, *rest, **notes)

    monkeypatch.setattr(em_mllm.train, "save_model", save)
    options = ("--eval-every", 1, "--patience", 2, "--save-every", 1, "--freeze-llm")
    train(folders, tmp_path / "run", *options, max_steps=20)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["step"], metrics["best_step"], metrics["validation_loss"]) == (4, 2, 1.0)
    assert next(losses) == 9.0  # the fifth: each of the four steps was validated once
    model, _ = load_model(tmp_path / "run/model")
    assert len(saved) == 1 + np.isfinite(first) and torch.equal(model.iq_tokens, saved[-1])
    # gone on with, it stays ended
    train(folders, tmp_path / "run", *options, "--resume", max_steps=20)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["step"] == 4


def test_without_a_finite_validation_loss_no_model_is_the_best(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(em_mllm.train, "validation_loss", lambda *_: float("nan"))
    with pytest.raises(UserError, match="no validation loss is finite.*take --select last"):
        train(folders, tmp_path / "run", "--eval-every", 1, "--freeze-llm", max_steps=2)
    assert not (tmp_path / "run/model").exists()


def test_waiting_counts_from_the_lowest_loss_also_where_the_last_weights_are_kept(
    folders, tmp_path, monkeypatch
):
    """And the weights that ended the run are not validated twice."""
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(em_mllm.train, "validation_loss", lambda *_: next(losses))
    options = ("--eval-every", 1, "--patience", 2, "--save-every", 1, "--freeze-llm", "--select", "last")
    for again in ((), ("--resume",)):
        train(folders, tmp_path / "run", *options, *again, max_steps=20)
        metrics = json.loads((tmp_path / "run/metrics.json").read_text())
        assert (metrics["step"], metrics["best_step"], metrics["validation_loss"]) == (3, 3, 2.0)
        model, _ = load_model(tmp_path / "run/model")
        last = load_file(tmp_path / "run/last/model.safetensors")
        assert torch.equal(model.iq_tokens, last["iq_tokens"])
        shutil.rmtree(tmp_path / "run/model")
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [line["val_loss"] for line in lines if "val_loss" in line] == [1.0, 3.0, 2.0]


def test_checkpoints_hold_what_is_trained_alone(folders):
    for kind, all_trained in (("full", True), ("adapter", False), ("frozen", False)):
        tensors = load_file(folders / kind / "last/model.safetensors")
        llm = {k for k in tensors if k.startswith("llm.")}
        assert bool(llm) == (kind != "frozen")
        assert all("lora_" in k for k in llm) != all_trained or kind == "frozen"
        assert any(k.startswith("signal_encoder.") for k in tensors) and "iq_tokens" in tensors


def test_aligning_leaves_the_statistics_of_a_frozen_convolutional_encoder(folders, tmp_path):
    encoder = make_encoder(cnn_config(128, hidden_size=16))
    for name, value in encoder.named_buffers():
        value.copy_(torch.full_like(value, 3.0 if "running" in name else 7))
    encoder.save_pretrained(tmp_path / "encoder")
    options = ("--signal-encoder-path", tmp_path / "encoder", "--align-projector", "--freeze-llm")
    train(folders, tmp_path / "run", *options, "--freeze-signal-encoder")
    before = load_file(tmp_path / "encoder/model.safetensors")
    after = load_file(tmp_path / "run/model/signal_encoder/model.safetensors")
    assert any("running_var" in key for key in before) and before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_aligned_projector_says_the_names(folders, tmp_path, capsys):
    """Signals near the words of their answers from the first step on: least squares of features that tell the
    classes apart."""
    args = ("--align-projector", "--freeze-signal-encoder", "--freeze-llm", "--lr", 0)
    # of 18 questions about 9 signals, those about one held out for validation stay out
    for more, count in (((), 16), (("--val-dir", folders / "test"), 18)):
        train(folders, tmp_path / "run", *args, *more, "--overwrite")
        assert f"aligned with the answers to {count} training questions" in capsys.readouterr().out
    model, tokenizer = load_model(tmp_path / "run/model")
    data = QuestionDataset(task_pairs(folders / "train"), tokenizer)
    table, hits = model.llm.get_input_embeddings(), 0
    words = torch.stack([table(torch.tensor(tokenizer(n)["input_ids"])).mean(0) for n in NAMES])
    with torch.no_grad():
        for row in range(9):
            iq, fs = data.signal_at(row)
            features, _ = model.signal_features(torch.tensor(iq)[None], None, torch.tensor([fs]))
            vector = model.signal_to_hidden(features).mean((0, 1))
            near = torch.cosine_similarity(vector - words.mean(0), words - words.mean(0), dim=1)
            hits += int(near.argmax()) == row % 3
    assert hits >= 7
    with pytest.raises(UserError, match="--align-projector"):
        train(folders, tmp_path / "again", "--trained-dir", tmp_path / "run/model", *args[:1], parts=False)


def test_a_silent_model_is_told_of_and_not_printed_as_nothing(capsys):
    lines = [{"seconds": 0.0, "text": ""}]
    show("a.cu8", "What?", SimpleNamespace(length=100), 1e6, lines, {"answer": "", "agreement": 1.0})
    assert capsys.readouterr().out.count("wrote nothing") == 2
