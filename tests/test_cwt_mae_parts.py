"""cwt_mae: scores, intervals, losses, schedules and sizes against closed forms or a library."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from sklearn import metrics as library

from common.errors import UserError
from cwt_mae import finetune, make_data, metrics, train
from cwt_mae.config import SHAPE, parse_changes, read_config
from cwt_mae.dataset import Preprocess
from cwt_mae.model import CWT_Encoder, CWT_MAE_RoPE
from cwt_mae.model_finetune import TF_MAE_Classifier
from cwt_mae.validation import line_predictions, probe_features, trivial_losses
from studies.cwt_mae import forest, mitbih, ucr
from tests import tiny_cwt
from tests.tiny_cwt import run

SIZES = tiny_cwt.SIZES | tiny_cwt.DECODER | {"patch_size_freq": 4, "depth": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records with rhythms, their options, and a pre-trained model."""
    folder = tmp_path_factory.mktemp("parts")
    words = ["--out", folder / "data", "--subjects", 9, "--seconds", 60, "--ppg", 0]
    run(make_data, *words)
    labelled = folder / "data" / "labelled"
    options = ["--data", labelled, "--split", labelled / "split.json", "--cache", folder / "cache"]
    found = {"folder": folder, "options": list(map(str, options))}
    pretrain(found, "base", "--max-steps", "1")
    return found


def pretrain(world, name, *options):
    sizes = [f"{key}={value}" for key, value in SIZES.items()]
    tiny = ["--model-fs", "50", "--set", *sizes, "--batch-size", "8", "--out", str(world["folder"] / name)]
    run(train, *world["options"], *tiny, *options)


def tune(world, name, *options):
    model = str(world["folder"] / "base" / "model.safetensors")
    words = ["--pretrained", model, "--task", "rhythm", "--folds", "3", "--batch-size", "8"]
    words += ["--out", str(world["folder"] / name), *options]
    run(finetune, *world["options"], *words)


def log_of(world, name, key):
    lines = (world["folder"] / name / "log.jsonl").read_text().splitlines()
    return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}


# ---- scores


def predictions(windows=300, classes=4, seed=0):
    """Labels (windows,) and probabilities that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=windows)
    logits = rng.standard_normal((windows, classes)) + 1.5 * np.eye(classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_scores_are_those_of_scikit_learn():
    labels, found = predictions()
    labels[labels == 3] = 0  # a class that is predicted but never occurs
    result = metrics.scores(found, labels, list("abcd"))
    predicted = found.argmax(1)
    assert result["confusion"] == library.confusion_matrix(labels, predicted).tolist()
    assert result["accuracy"] == pytest.approx(library.accuracy_score(labels, predicted))
    assert result["macro_f1"] == pytest.approx(library.f1_score(labels, predicted, average="macro"))
    precision, recall, f1, count = library.precision_recall_fscore_support(labels, predicted, zero_division=0)
    for i, row in enumerate(result["per_class"].values()):
        wanted = (precision[i], recall[i], f1[i], count[i])
        assert (row["precision"], row["recall"], row["f1"], row["windows"]) == pytest.approx(wanted)
    present = [library.roc_auc_score(labels == c, found[:, c]) for c in range(3)]
    assert result["auroc"] == pytest.approx(np.mean(present))


def test_a_class_that_neither_occurs_nor_is_predicted_does_not_count():
    labels, found = predictions(classes=3)
    padded = np.c_[found, np.zeros(len(found))]
    assert metrics.scores(padded, labels, list("abcd"))["macro_f1"] == pytest.approx(
        library.f1_score(labels, found.argmax(1), average="macro")
    )


def test_auroc_of_two_classes_is_that_of_the_second():
    labels, found = predictions(classes=2)
    assert metrics.auroc(found, labels) == pytest.approx(library.roc_auc_score(labels, found[:, 1]))
    assert math.isnan(metrics.auroc(found, np.zeros_like(labels)))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_of_the_accuracy_is_that_of_the_normal_approximation(grouped):
    """Of 100 windows, or of 100 records of 20 equal windows, which say no more."""
    records = np.repeat(np.arange(100), 20 if grouped else 1)
    found = np.eye(2)[(records % 5 == 0).astype(int)]  # 80 % right
    labels, groups = np.zeros(len(records), int), records if grouped else None
    low, high = metrics.scores(found, labels, ["a", "b"], groups, 2000)["accuracy_95"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - half, abs=0.01) and high == pytest.approx(0.8 + half, abs=0.01)


def test_always_the_first_class_scores_as_scikit_learn_says():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    result = {"confusion": library.confusion_matrix(labels, np.zeros_like(labels)).tolist()}
    wanted = library.f1_score(labels, np.zeros_like(labels), average="macro")
    assert mitbih.always_first(result) == pytest.approx(wanted)


# ---- loss, prior and learning rates of fine-tuning


def test_the_loss_is_the_smoothed_blended_and_weighed_cross_entropy():
    torch.manual_seed(0)
    logits, a, b = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 0, 2, 2, 0])
    log_p, blend, weights = logits.log_softmax(1), torch.rand(6), torch.tensor([0.5, 1.0, 2.0])

    def by_hand(labels):
        target = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
        return -(target * log_p).sum(1)

    plain = finetune.loss_of(logits, {"label": a}, 0.1, None)
    assert torch.allclose(plain, by_hand(a).mean())
    weighed = finetune.loss_of(logits, {"label": a}, 0.1, weights)
    assert torch.allclose(weighed, (by_hand(a) * weights[a]).mean())
    mixed = finetune.loss_of(logits, {"label": a, "label2": b, "blend": blend}, 0.1, None)
    assert torch.allclose(mixed, (blend * by_hand(a) + (1 - blend) * by_hand(b)).mean())


def test_class_weights_are_inverse_frequencies_of_mean_one_over_the_windows():
    counts = np.array([80, 15, 0, 5])
    weights = finetune.class_weights(counts).numpy()
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1) and weights[2] == 0
    assert weights[3] / weights[0] == pytest.approx(16)


def test_the_correction_gives_back_the_true_class_frequencies():
    """Probabilities learned from classes drawn equally often, corrected in full, are those of Bayes' rule."""
    counts, drawn = np.array([90, 10]), np.array([0.5, 0.5])
    likelihood = np.array([[0.2, 0.8], [0.7, 0.3]])
    learned = np.log(likelihood * drawn)
    shift = finetune.prior_shift(drawn, counts)
    wanted = likelihood * counts
    assert np.allclose(finetune.corrected(learned, shift, 1.0), wanted / wanted.sum(1, keepdims=True))
    assert np.allclose(finetune.corrected(learned, shift, 0.0), likelihood / likelihood.sum(1, keepdims=True))


def test_learning_rates_fall_from_the_head_to_the_input():
    encoder = {name: value for name, value in SIZES.items() if "decoder" not in name}
    model = TF_MAE_Classifier(None, 3, use_cot=False, **encoder)
    groups = finetune.layer_groups(model, 1.0, 0.5, 0.1)
    found = {id(p): group for group in groups for p in group["params"]}
    rate = {name: found[id(p)]["peak"] for name, p in model.named_parameters()}
    decay = {name: found[id(p)]["weight_decay"] for name, p in model.named_parameters()}
    assert rate["head.1.weight"] == rate["encoder_model.norm.weight"] == 1.0
    assert rate["encoder_model.blocks.1.attn.qkv.weight"] == 0.5
    assert rate["encoder_model.blocks.0.attn.qkv.weight"] == 0.25
    assert rate["encoder_model.patch_embed.proj.weight"] == rate["encoder_model.pos_embed"] == 0.125
    assert decay["encoder_model.blocks.0.attn.qkv.weight"] == decay["head.1.weight"] == 0.1
    assert decay["head.1.bias"] == 0
    for name in ("norm.weight", "pos_embed", "cls_token"):
        assert decay[f"encoder_model.{name}"] == 0, name


@pytest.mark.slow
def test_pre_training_starts_at_rate_zero_rises_and_ends_at_the_floor(world):
    steps, warmup, peak, floor = 8, 3, 1e-3, 1e-4
    options = f"--max-steps {steps} --warmup {warmup} --lr {peak} --min-lr {floor} --log-every 1".split()
    pretrain(world, "schedule", *options)
    for step, rate in log_of(world, "schedule", "lr").items():
        k = step - 1
        cosine = 0.5 * (1 + math.cos(math.pi * (k - warmup) / (steps - warmup)))
        wanted = peak * k / warmup if k < warmup else floor + (peak - floor) * cosine
        assert rate == pytest.approx(wanted), step
    assert log_of(world, "schedule", "lr").keys() == set(range(1, steps + 1))


@pytest.mark.parametrize(
    "schedule, last", [("cosine", 0.5 + 0.5 * math.cos(math.pi * 5 / 6)), ("constant", 1)]
)
def test_fine_tuning_starts_at_rate_zero_and_follows_its_schedule(world, schedule, last):
    options = "--max-steps 8 --warmup 2 --lr 1e-3 --log-every 1 --layer-decay 1 --schedule".split()
    tune(world, f"schedule_{schedule}", *options, schedule)
    rates = log_of(world, f"schedule_{schedule}", "lr")
    assert [rates[1], rates[2], rates[3]] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[8] == pytest.approx(1e-3 * last)


@pytest.mark.parametrize("select, kept", [("best", 2), ("last", 3)])
def test_the_best_or_the_last_weights_are_kept(world, monkeypatch, select, kept):
    plain, values = finetune.validate, iter([0.5, 0.9, 0.3])

    def validate(*arguments):
        tau, result, _ = plain(*arguments)
        return tau, result, next(values)

    monkeypatch.setattr(finetune, "validate", validate)
    tune(world, f"kept_{select}", "--max-steps", "3", "--eval-every", "1", "--select", select)
    assert json.loads((world["folder"] / f"kept_{select}" / "metrics.json").read_text())["step"] == kept


# ---- what pre-training is compared with


def test_trivial_losses_are_those_of_the_mean_and_of_lines_between_the_visible_columns():
    model = CWT_MAE_RoPE(**SIZES, column_masking=True, masked_time_loss=True, mask_ratio=0.5).eval()
    noise = torch.tensor([0.1, 0.9] * 5).repeat(2)[None]  # every second of the ten columns is hidden
    x = torch.sin(torch.arange(200) / 17)[None]
    with torch.no_grad():
        out = model(x, noise, details=True)
        found = trivial_losses(model, out, None)
    time, signal, image = np.arange(200), out["signal"][0].numpy(), out["imgs"][0, 0, 3].numpy()
    hidden = time // 20 % 2 == 1
    lines = line_predictions(model, out["imgs"], out["mask"])[0][0, 0, 3].numpy()
    assert np.allclose(lines[hidden], np.interp(time[hidden], time[~hidden], image[~hidden]), atol=1e-5)
    assert found["time_mean"] == pytest.approx(np.square(signal[hidden]).mean(), rel=1e-4)
    assert found["spec_mean"] == pytest.approx(float(out["imgs"][..., hidden].square().mean()), rel=1e-3)


@pytest.mark.parametrize("columns", [False, True])
def test_the_line_baseline_reads_what_the_model_may_read_and_no_more(columns):
    model = CWT_MAE_RoPE(**SIZES, column_masking=columns).eval()
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).cumsum(1)
    with torch.no_grad():
        out = model(x, torch.rand(3, 20, generator=torch.Generator().manual_seed(1)), details=True)
        visible = model.unpatchify((1 - out["mask"])[..., None].expand(-1, -1, model.patch_pixels)) > 0
        spoiled = torch.where(visible, out["imgs"], 1e3)
        for plain, other in zip(*(line_predictions(model, i, out["mask"]) for i in (out["imgs"], spoiled))):
            assert torch.equal(plain, other)
        lines, straight = line_predictions(model, out["imgs"], torch.zeros_like(out["mask"]))
    # Where everything is visible the signal comes back, so the guess is not a weak one.
    assert torch.equal(lines, out["imgs"]) and (straight - out["signal"]).square().mean() < 0.05


# ---- memory


@pytest.mark.parametrize("limit", [1, 3])
def test_encoding_in_pieces_gives_what_encoding_at_once_gives(limit, monkeypatch):
    model = TF_MAE_Classifier(None, 2, preprocess={"fs": 50.0}, **SIZES).eval()
    signal = np.random.default_rng(0).standard_normal(100 * 47)
    tokens, pooled = model.encode(signal, 100)
    monkeypatch.setattr(CWT_Encoder, "windows_at_once", lambda self: limit)
    pieces = list(model.encode_windows(signal, 100))
    assert max(len(found) for _, found, _ in pieces) == limit and len(tokens) == 12
    assert [s for seconds, _, _ in pieces for s in seconds] == [4.0 * i for i in range(12)]
    again, mean = model.encode(signal, 100)
    assert (again - tokens).abs().max() < 1e-5 and (mean - pooled).abs().max() < 1e-6
    assert model.encode(signal, 100, tokens=False)[0] is None


def test_a_record_with_a_gap_is_encoded_run_by_run():
    model = TF_MAE_Classifier(None, 2, preprocess={"fs": 50.0, "low_hz": 0.0}, **SIZES).eval()
    signal = np.random.default_rng(0).standard_normal(4000)
    signal[1000:1600] = np.nan
    tokens, pooled = model.encode(signal, 50)
    runs = [model.encode(part, 50)[0] for part in (signal[:1000], signal[1600:])]
    assert (tokens - torch.cat(runs)).abs().max() < 1e-5 and torch.isfinite(pooled).all()
    seconds = [s for found, _, _ in model.encode_windows(signal, 50) for s in found]
    assert seconds == [4.0 * i for i in range(5)] + [32.0 + 4.0 * i for i in range(12)]
    signal[1100:1500] = 0.0  # an electrode that is off between two gaps
    assert torch.equal(model.encode(signal[None], 50)[0], tokens)


@pytest.mark.parametrize(
    "shape, fs, value, wanted",
    [
        ((2, 400), 50, 1.0, "expected \\(L,\\)"),
        ((400,), 0, 1.0, "field fs is 0 Hz"),
        ((400,), 50, 0.0, "flat line"),
        ((400,), 50, np.nan, "8 samples in a row"),
    ],
)
def test_a_signal_that_cannot_be_encoded_is_said(shape, fs, value, wanted):
    model = TF_MAE_Classifier(None, 2, preprocess={"fs": 50.0}, **SIZES)
    with pytest.raises(UserError, match=wanted):
        model.encode(value * np.random.default_rng(0).standard_normal(shape), fs)


@pytest.mark.parametrize("fs", [100, 250, 360, 249.89])
def test_a_signal_prepared_in_pieces_is_the_signal_prepared_at_once(fs):
    prepare = Preprocess(100.0, 0.5, 40.0)
    x = np.random.default_rng(0).standard_normal(int(900 * fs)).cumsum() / 10
    x = x + 5 * np.sin(np.arange(len(x)) / fs)
    whole, pieces = prepare.signal(x, fs, ""), list(prepare.pieces(x, fs, "", seconds=200.0))
    joined = np.concatenate(pieces)
    assert len(joined) == len(whole) and np.abs(joined - whole).max() < 1e-4 * np.abs(whole).max()
    assert len(pieces) == (1 if fs == 249.89 else 5)  # a rate that fits no piece comes as a whole
    assert len(list(Preprocess(100.0, 0.0).pieces(x, fs, "", seconds=200.0))) == 1


def test_batches_are_as_large_as_the_memory_allows():
    published = CWT_Encoder.windows_at_once
    with torch.device("meta"):
        large, small = CWT_Encoder(), CWT_Encoder(signal_len=200, embed_dim=16, num_heads=2, depth=1)
    assert 1 <= published(large) < 20 < 200 < published(small) and published(large, 1.0) == 1
    models = [SimpleNamespace(encoder_model=encoder) for encoder in (large, small)]
    assert 20 < finetune.batch_of(models[0]) < 50 and finetune.batch_of(models[1]) == 512
    large.leads = 12
    assert finetune.batch_of(models[0]) == 3 and finetune.batch_of(None) == 512


def test_padding_is_not_in_the_features_of_the_probe():
    model = CWT_MAE_RoPE(**SIZES).eval()
    x, real = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)), torch.ones(2, 200) > 0
    real[1, 100:] = False
    windows = [{"x": a, "real": b} for a, b in zip(x, real)]
    found = probe_features(model, windows, "cpu")
    with torch.no_grad():
        tokens = model.patch_tokens(x, real)[0].unflatten(1, (2, 10))
    for row, part in zip(found, (tokens[0], tokens[1, :, :5])):
        part = part.flatten(0, 1)
        assert np.allclose(row, torch.cat([part.mean(0), part.std(0)]), atol=1e-5)


# ---- sizes


@pytest.mark.slow
def test_the_published_configuration_is_the_models_default(capsys):
    sizes = read_config(train.HERE / "config.yaml")
    model = CWT_MAE_RoPE.__init__.__kwdefaults__ or {}
    assert {**SHAPE, **dict.fromkeys(sizes)}.keys() == SHAPE.keys() and not model
    assert CWT_MAE_RoPE(**sizes, preprocess=None).config == CWT_MAE_RoPE().config
    assert not capsys.readouterr().err


def test_upstreams_sections_are_read_and_what_is_not_read_is_named(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    sections = {"train": {"epochs": 3}, "data": {"signal_len": 400, "index_path": "x"}, "model": {"depth": 3}}
    path.write_text(yaml.safe_dump(sections))
    assert read_config(path) == {"signal_len": 400, "depth": 3}
    assert "data.index_path, train.epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("model: {depht: 3}", "unknown name 'depht'"),
        ("model: {depth: three}", "depth is text"),
        ("model: {log_scales: 1}", "log_scales"),
        ("data: {}", "no field 'model'"),
        ("model: [", "not a readable YAML"),
    ],
)
def test_a_bad_configuration_names_file_and_field(text, wanted, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match="bad.yaml") as error:
        read_config(tmp_path / "bad.yaml")
    assert wanted in str(error.value)


def test_single_sizes_are_read_by_their_type():
    changes = ["depth=3", "log_scales=true", "mask_ratio=1", "padding=zero", "channel_weights=[1, 0.5, 0]"]
    wanted = dict(depth=3, log_scales=True, mask_ratio=1, padding="zero", channel_weights=[1, 0.5, 0])
    assert parse_changes(changes, SHAPE) == wanted
    refused = {"depth": "NAME=VALUE", "depth=x": "depth is text", "width=3": "unknown name"}
    for change, message in refused.items():
        with pytest.raises(UserError, match=message):
            parse_changes([change], SHAPE)


# ---- the study


def test_intervals_of_the_forest_are_those_of_its_description():
    seconds = np.array([0.0, 1.0, 2.0, 2.5, 4.0])
    found = forest.rr_features(seconds)
    assert found[3].tolist() == pytest.approx([0.5, 1.5, 0.5, 0.5 / 0.875, 3.0])


def test_patches_of_a_series_divide_its_length_where_they_can():
    assert 96 % ucr.patch_size(96) == 0 and 140 % ucr.patch_size(140) == 0
    assert ucr.patch_size(97) == 5  # a prime length is padded
