"""cwt_mae: several leads, missing leads, several labels for a record, beats without annotations."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.checkpoint import atomic_json
from common.errors import UserError
from cwt_mae import finetune, test, train
from cwt_mae.dataset import PhysioSignalDataset, Preprocess, build_store
from cwt_mae.dataset_finetune import detected_beats, load_task
from cwt_mae.metrics import best_f1, describe_label_scores, label_scores
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import TF_MAE_Classifier, save_model
from cwt_mae.validation import trivial_losses
from tests import tiny_cwt
from tests.tiny_cwt import CHANGES, DECODER, run

FS = 50
SIZES = tiny_cwt.SIZES | {"depth": 2}
LEADS = ["I", "II", "V1"]


def trained_leads(model):
    """Give the attention between leads weights as after some training."""
    generator = torch.Generator().manual_seed(3)
    for block in getattr(model, "encoder_model", model).lead_blocks:
        block.attn.proj.weight.data = 0.5 * torch.randn(block.attn.proj.weight.shape, generator=generator)
    return model


def leads(batch=2, length=200, seed=0):
    return torch.randn(batch, 3, length, generator=torch.Generator().manual_seed(seed))


def test_one_signal_gives_the_same_bits_with_and_without_the_code_for_leads():
    torch.manual_seed(0)
    model = TF_MAE_Classifier(None, 3, **SIZES).eval()
    assert not any("lead" in key for key in model.state_dict()) and model.encoder_model.leads == 1
    x = leads()[:, 0]
    with torch.no_grad():
        assert torch.equal(model(x), model(x[:, None]))
        assert torch.equal(model(x), model(x, torch.ones_like(x) > 0))


def test_weights_of_one_lead_begin_as_what_they_were_on_every_lead(tmp_path, capsys):
    torch.manual_seed(0)
    single = CWT_MAE_RoPE(**SIZES, **DECODER).eval()
    save_model(tmp_path / "m.safetensors", single)
    several = TF_MAE_Classifier(str(tmp_path / "m.safetensors"), 3, leads=LEADS).eval()
    several.encoder_model.lead_embed.data.zero_()
    x = leads()
    with torch.no_grad():
        tokens = several.forward_features(x)[0].unflatten(1, (3, -1))
        for i in range(3):
            wanted = single.forward_encoder(*single.images(x[:, i])[:2])[:, 1:]
            assert (tokens[:, i] - wanted).abs().max() < 1e-5
    assert "trained on one lead" in capsys.readouterr().out


@pytest.mark.parametrize("use_cot", [False, True])
@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
def test_a_missing_lead_reaches_nothing_and_a_present_one_does(use_cot, garbage):
    torch.manual_seed(0)
    model = trained_leads(TF_MAE_Classifier(None, 3, use_cot=use_cot, leads=LEADS, **SIZES)).eval()
    x, real = leads(), torch.ones(2, 3, 200, dtype=torch.bool)
    real[0, 1], real[1, 2, 150:] = False, False
    with torch.no_grad():
        wanted = model(torch.where(real, x, 0.0), real)
        assert torch.equal(model(torch.where(real, x, garbage), real), wanted)
        assert torch.isfinite(wanted).all()
        other = x.clone()
        other[0, 2] = leads(seed=1)[0, 2]
        assert (model(torch.where(real, other, 0.0), real) - wanted)[0].abs().max() > 1e-4


def test_leads_see_each_other_and_their_order_counts():
    torch.manual_seed(0)
    model = trained_leads(TF_MAE_Classifier(None, 3, leads=LEADS, **SIZES)).eval()
    x = leads()
    with torch.no_grad():
        tokens = model.forward_features(x)[0].unflatten(1, (3, -1))
        other = x.clone()
        other[:, 2] = leads(seed=1)[:, 2]
        found = model.forward_features(other)[0].unflatten(1, (3, -1))
        assert (found - tokens)[:, 0].abs().max() > 1e-3
        assert (model(x.flip(1)) - model(x)).abs().max() > 1e-4


def test_all_leads_hide_the_same_patches_and_missing_leads_count_in_no_loss():
    torch.manual_seed(0)
    model = trained_leads(CWT_MAE_RoPE(**SIZES, **DECODER, leads=LEADS)).eval()
    x, noise = leads(), torch.rand(2, 10)
    with torch.no_grad():
        out = model(x, noise, details=True)
        assert torch.equal(*out["mask"].unflatten(0, (2, 3))[:, :2].unbind(1))
        real = torch.ones(2, 3, 200, dtype=torch.bool)
        real[:, 1] = False
        masked = model(x, noise, real, details=True)
        rows = [model(x[i : i + 1], noise[i : i + 1], real[i : i + 1], details=True) for i in (0, 1)]
        assert all(np.isfinite(float(v)) for v in trivial_losses(model, masked, real).values())
    for name in ("loss_spec", "loss_time"):
        assert torch.isfinite(masked[name]) and masked[name] > 0.1
        assert masked[name] == pytest.approx(float(sum(row[name] for row in rows)) / 2, rel=1e-4)
    model.train()
    model(x, noise, real)[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_wrong_number_of_leads_is_said():
    model = TF_MAE_Classifier(None, 3, leads=LEADS, **SIZES)
    with pytest.raises(ValueError, match="3 leads, samples"):
        model(leads()[:, :2])


def write_leads(folder, count=8, missing=()):
    """Records of leads I, II (at another rate) and V1; two labels that follow frequencies, in a manifest."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), ["path,subject,fold,label_slow,label_fast"]
    for i in range(count):
        slow, fast = i % 2, i // 2 % 2
        fields = {}
        for name, fs in (("I", FS), ("II", 2 * FS), ("V1", FS)):
            t = np.arange(20 * fs) / fs
            x = slow * np.sin(2 * np.pi * 2 * t) + fast * np.sin(2 * np.pi * 8 * t)
            x = x + 0.3 * rng.standard_normal(len(t))
            if name not in missing or i % 3:
                fields |= {name: x, f"fs_{name}": fs}
        np.savez(folder / f"r{i}.npz", **fields)
        part = "train" if i < count - 4 else "val" if i < count - 2 else "test"
        rows.append(f"r{i},p{i},{part},{slow},{fast}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_windows_of_several_leads_lie_on_one_clock(tmp_path):
    folder = write_leads(tmp_path / "data", missing=("II",))
    with np.load(folder / "r1.npz") as file:
        fields = dict(file)
    fields["V1"][200:300] = np.nan
    np.savez(folder / "r1.npz", **fields)
    prepare = Preprocess(FS, 0.0, channel="I,II,V1")
    store = build_store([folder], prepare, tmp_path / "cache", manifest=folder / "list.csv")
    assert len(store.anchors) == 8 and len(store.records) == 8 * 3 - 3 + 1
    dataset = PhysioSignalDataset(store, 400, "test")
    names = [dataset[i]["name"] for i in range(len(dataset))]
    first = dataset[names.index("r0@0")]
    assert first["x"].shape == (3, 400) and not first["real"][1].any() and not first["x"][1].any()
    gap = dataset[names.index("r1@0")]
    assert gap["real"].sum(1).tolist() == [400, 400, 300] and not gap["real"][2, 200:300].any()
    wanted = fields["I"][:400]
    assert np.allclose(gap["x"][0], (wanted - wanted.mean()) / wanted.std(), atol=1e-4)
    after, cut = gap["x"][2, 300:], fields["V1"][300:400]
    assert np.corrcoef(after, cut)[0, 1] > 0.999


def test_a_flat_lead_is_an_error_or_left_out_alone(tmp_path, capsys):
    folder = write_leads(tmp_path / "data")
    with np.load(folder / "r1.npz") as file:
        np.savez(folder / "r1.npz", **dict(file) | {"II": np.zeros(2000)})
    make = lambda **options: build_store(
        [folder],
        Preprocess(FS, 0.0, channel="I,II,V1"),
        tmp_path / "cache",
        manifest=folder / "list.csv",
        **options,
    )
    with pytest.raises(UserError, match="r1 channel II: flat line"):
        make()
    store = make(skip_bad=True)
    assert len(store.anchors) == 8 and len(store.records) == 8 * 3 - 1
    assert "r1 channel II: flat line" in capsys.readouterr().err


@pytest.mark.slow
def test_several_leads_and_labels_from_pre_training_to_scores(tmp_path):
    folder = write_leads(tmp_path / "data", 12)
    data = ["--data", folder, "--cache", tmp_path / "cache", "--manifest", folder / "list.csv"]
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    fixed = ["--model-fs", FS, "--low-hz", 0, "--channel", "I,II,V1", "--set", *CHANGES, "--lr", "1e-3"]
    run(train, *data, *fixed, "--out", base, "--max-steps", 2, "--batch-size", 4)
    given = ["--pretrained", base / "model.safetensors", "--task", "labels", "--head", "mlp", "--lr", "3e-3"]
    run(finetune, *data, *given, "--out", tuned, "--max-steps", 40, "--batch-size", 16, "--layer-decay", 1)
    kept = json.loads((tuned / "metrics.json").read_text())["validation"]
    assert kept["records"] == 2 and set(kept["per_class"]) == {"slow", "fast"}
    out = tmp_path / "scores"
    words = ["--model", tuned / "model.safetensors", "--out", out, "--part", "train", "--resamples", 20]
    run(test, *data, *words)
    found = json.loads((out / "metrics.json").read_text())
    assert found["records"] == 8 and found["macro_auroc"] > 0.9 and len(found["macro_auroc_95"]) == 2
    rows = {row["record"]: row["true"] for row in csv.DictReader((out / "per_record.csv").open())}
    assert rows["r3"] == "fast;slow" and rows["r0"] == ""
    with pytest.raises(UserError, match="--level has no effect"):
        run(finetune, *data, *given[:2], "--task", "series", "--level", "x", "--out", tmp_path / "no")
    model = TF_MAE_Classifier(str(base / "model.safetensors"), 2)
    signal = np.random.default_rng(0).standard_normal((3, 1000))
    signal[2] = np.nan
    tokens, pooled = model.encode(signal, FS)
    assert tokens.shape == (5, 3 * 10, 16) and not tokens[:, 20:].any() and torch.isfinite(pooled).all()


def test_scores_of_several_labels_are_scikit_learns_with_intervals_over_subjects():
    rng = np.random.default_rng(0)
    targets = rng.random((200, 3)) < (0.5, 0.2, 0.0)
    probabilities = np.clip(0.4 * targets + 0.6 * rng.random((200, 3)), 0, 1)
    found = label_scores(probabilities, targets, list("abc"), np.arange(200) // 4, 200)
    areas = [roc_auc_score(targets[:, c], probabilities[:, c]) for c in (0, 1)]
    assert found["macro_auroc"] == pytest.approx(np.mean(areas)) and found["per_class"]["c"]["auroc"] is None
    low, high = found["per_class"]["a"]["auroc_95"]
    assert low < areas[0] < high and 0.01 < high - low < 0.2
    assert best_f1(targets * 0.9, targets) == 1.0 and best_f1(rng.random((200, 3)), targets) < 0.7


def test_detected_beats_lie_on_the_peaks(tmp_path):
    pytest.importorskip("wfdb")
    fs, peaks = 100, np.arange(1, 59, 0.8)
    t = np.arange(60 * fs) / fs
    x = sum(np.exp(-0.5 * ((t - p) / 0.015) ** 2) for p in peaks)
    x = x + 0.01 * np.random.default_rng(0).standard_normal(len(t))
    np.savez(tmp_path / "a.npz", ecg=x, fs=fs)
    store = build_store([tmp_path / "a.npz"], Preprocess(fs), tmp_path / "cache")
    task = detected_beats(store, list("NSVF"), 100)
    found = (task.items["start"] + 50) / fs
    near = np.abs(found[:, None] - peaks).min(1)
    assert len(found) >= len(peaks) - 3 and near.max() < 0.02 and task.features.shape == (len(found), 11)
    assert set(task.items["label"].tolist()) == {-1}


def test_labels_of_an_unknown_level_are_named(tmp_path):
    folder = write_leads(tmp_path / "data", 8)
    store = build_store([folder], Preprocess(FS, 0.0), tmp_path / "cache", manifest=folder / "list.csv")
    with pytest.raises(UserError, match="no labels of level 'rhythm'"):
        load_task(store, "labels", 200, level="rhythm")
    assert load_task(store, "labels", 500).targets.shape == (16, 2)


def test_a_window_in_which_one_sample_was_measured_is_left_out():
    model = TF_MAE_Classifier(
        None, 3, leads=LEADS, preprocess=dict(fs=FS, low_hz=0.0, channel=",".join(LEADS)), **SIZES
    )
    signal = leads()[0].repeat(1, 5).numpy()
    length = model.encoder_model.signal_len
    signal[:, length + 1 : 2 * length] = np.nan
    seconds = [s for found, *_ in model.encode_windows(signal, FS) for s in found]
    assert 0 in seconds and length / FS not in seconds
    x = np.full((3, 4000), np.nan)
    x[:, 2000:2008] = np.arange(8)  # one sample at the model's rate
    with pytest.raises(UserError, match="holds no 8 samples"):
        model.encode(x, 10 * FS)
    x[:, 2000:2030] = np.arange(30)
    assert torch.isfinite(model.encode(x, 10 * FS)[1]).all()


def test_scores_that_are_not_defined_can_be_told(tmp_path):
    found = label_scores(np.full((4, 2), 0.5), np.ones((4, 2), bool), ["a", "b"])
    atomic_json(tmp_path / "metrics.json", found)
    assert "macro-AUROC nan" in describe_label_scores(json.loads((tmp_path / "metrics.json").read_text()))


def test_no_beats_are_looked_for_in_a_moment(tmp_path):
    pytest.importorskip("wfdb")
    x = np.sin(2 * np.pi * 1.2 * np.arange(20 * FS) / FS) ** 31
    x[10] = np.nan
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "a.npz", sig=x, fs=FS)
    store = build_store([tmp_path / "data"], Preprocess(FS, 0.0), tmp_path / "cache")
    assert len(store.records) == 2 and set(detected_beats(store, list("NSVF"), 100).items["record"]) == {1}


# ---- export


@pytest.mark.slow
@pytest.mark.parametrize("kind, what", [("onnx", "leads"), ("torch", "encoder")])
def test_an_exported_model_gives_the_same_numbers(kind, what, tmp_path):
    from cwt_mae import export

    if kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)
    torch.manual_seed(0)
    if what == "encoder":
        model = CWT_MAE_RoPE(**tiny_cwt.SIZES, **DECODER, raw_patches=True)
    else:
        model = trained_leads(TF_MAE_Classifier(None, 3, leads=LEADS, **tiny_cwt.SIZES))
    save_model(tmp_path / "m.safetensors", model)
    out = tmp_path / ("m.onnx" if kind == "onnx" else "m.pt2")
    run(export, "--model", tmp_path / "m.safetensors", "--export", kind, "--out", out, "--batch-size", 2)
    x = leads(seed=5) if what == "leads" else leads(seed=5)[:, 0]
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        assert "signal_len" in session.get_modelmeta().custom_metadata_map["config"]
    else:
        files = {"config": ""}
        found = torch.export.load(out, extra_files=files).module()(x)
        assert "signal_len" in str(files["config"])
    with torch.no_grad():
        wanted = model.eval().patch_tokens(x)[0] if what == "encoder" else model.eval()(x)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_what_cannot_be_exported_is_said(tmp_path):
    from cwt_mae import export

    save_model(tmp_path / "m.safetensors", TF_MAE_Classifier(None, 3, num_features=4, **SIZES))
    words = ["--model", tmp_path / "m.safetensors", "--export", "torch", "--out"]
    with pytest.raises(UserError, match="ends with .pt2"):
        run(export, *words, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="--no-features"):
        run(export, *words, tmp_path / "m.pt2")
