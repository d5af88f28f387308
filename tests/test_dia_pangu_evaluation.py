"""dia_pangu: labeler, scores and text metrics."""

import csv
import json

import numpy as np
import pytest
from pycocoevalcap.rouge.rouge import Rouge
from rouge_score import rouge_scorer
from sklearn.metrics import precision_recall_fscore_support

from dia_pangu.evaluate import nlg_eval
from dia_pangu.evaluate.findings import calibrate, crg_score, finding_scores, micro_f1
from studies.dia_pangu.locations import location_scores, reported
from studies.dia_pangu.real_reports import labeler_study
from studies.dia_pangu.real_volumes import landmarks
from studies.recipe import options
from tests.tiny_dia import call


def write_csv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_scores_agree_with_scikit_learn():
    """Precision, recall and F1, per finding and in the three means, where precision and recall differ."""
    rng = np.random.default_rng(3)
    truth, predicted = rng.random((50, 14)) < 0.3, rng.random((50, 14)) < 0.6
    scores = finding_scores(truth, predicted)
    for ours, theirs in (("macro", "macro"), ("micro", "micro"), ("example", "samples")):
        expected = precision_recall_fscore_support(truth, predicted, average=theirs, zero_division=0)
        assert [scores[ours][key] for key in ("P", "R", "F1")] == pytest.approx(expected[:3], abs=1e-5), ours
    single = precision_recall_fscore_support(truth, predicted, zero_division=0)
    for key, values in zip(("P", "R", "F1"), single):
        found = [row[key] for row in scores["per_finding"].values()]
        assert found == pytest.approx(list(values), abs=1e-5)
    assert micro_f1(truth, predicted) == pytest.approx(scores["micro"]["F1"])


@pytest.mark.parametrize("side, place", [("", ""), ("right", "lower")])
def test_a_place_that_is_wrong_or_not_stated_counts_as_wrong(side, place):
    true = {"7": {"lung lesion": {"side": "right", "place": "upper"}}, "8": {"fracture": {"side": "left"}}}
    found = {"7": {"lung lesion": {"side": "right", "place": place}}, "8": {"fracture": {"side": side}}}
    scores = location_scores(true, found)
    assert scores == {"side": {"accuracy": 0.5, "count": 2}, "place": {"accuracy": 0.0, "count": 1}}


def test_calibration_gains_on_its_own_data_or_keeps_one_half():
    rng = np.random.default_rng(0)
    truth = rng.random((200, 14)) < 0.3
    probability = np.clip(truth * 0.2 + rng.random((200, 14)) * 0.3, 0, 1)
    thresholds = calibrate(probability, truth)
    assert micro_f1(truth, probability >= thresholds) > micro_f1(truth, probability >= 0.5) + 0.3
    assert calibrate(np.full((50, 14), 0.2), np.zeros((50, 14), bool)) == [0.5] * 14
    clear = truth * 0.9
    clear[np.flatnonzero(truth[:, 0])[0], 0] = (
        0.45  # a lower threshold would gain one case: too little to hold on other volumes
    )
    assert calibrate(clear, truth) == [0.5] * 14


def test_side_and_place_are_read_from_a_report():
    text = "A small nodule is found in the right upper lung. There is fluid in the left pleural space."
    assert reported(text, "lung lesion") == {"side": "right", "place": "upper"}
    assert reported(text, "pleural effusion") == {"side": "left", "place": ""}
    assert reported("左肺下野见少量结节。", "lung lesion") == {"side": "left", "place": "lower"}
    # An accuracy of none is no number, and NaN is no JSON.
    true = {"7": {"lung lesion": {"side": "right", "place": "upper"}}}
    assert location_scores(true, {})["side"] == {"accuracy": None, "count": 0}


@pytest.mark.slow
def test_odd_predictions_are_scored(tmp_path):
    """Also by METEOR's jar, which waits for ever on an empty line, here without its English tables."""
    truths = ["A small nodule.", "No effusion.", "The heart is enlarged.", "Both lungs are clear.", "Edema."]
    predictions = ["", "line one\nline two", "nul\0inside", "word " * 500, "Edema."]
    write_csv(tmp_path / "r.csv", ("ID", "Ground Truth", "Pred"), *zip("abcde", truths, predictions))
    arguments = ["--csv", tmp_path / "r.csv", "--out", tmp_path / "s.json", "--draws", 20, "--language", "cn"]
    done = call(nlg_eval, *arguments, log=tmp_path / "log.txt")
    assert done.returncode == 0, done.text
    scores = json.loads((tmp_path / "s.json").read_text())
    assert {f"BLEU_{n}" for n in range(1, 5)} | {"METEOR", "ROUGE_L", "CIDEr"} <= set(scores)
    assert scores["empty_predictions"] == 1 and scores["rows"] == 5
    assert scores["METEOR"] is None or 0 < scores["METEOR"] < 1
    assert len(list(inner_intervals(scores))) > 40


def inner_intervals(scores: dict):
    """Yield (name, interval) of every score of a file of scores, and assert that each score has one."""
    names = {"BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr"}
    assert set(scores["intervals"]) == names | ({"METEOR"} if scores["METEOR"] is not None else set())
    yield from scores["intervals"].items()
    assert set(scores["standard"]) - {"intervals"} == set(scores["standard"]["intervals"])
    yield from scores["standard"]["intervals"].items()
    for part in ("findings", "findings_18"):
        yield f"{part} CRG", scores[part]["CRG"]["interval"]
        for name in ("micro", "macro", "macro_occurring", "example"):
            yield f"{part} {name}", scores[part][name]["F1_interval"]
        for name, row in scores[part]["per_finding"].items():
            yield f"{part} {name}", row["F1_interval"]
    for name in ("other_patient", "survives"):
        yield name, scores["sameness"][f"{name}_interval"]


def test_the_interval_of_every_score_holds_its_value():
    """Each score, computed anew from draws of its counts, spreads around what it is on all reports."""
    truths = [*TEXTS] * 6
    predictions = [text if i % 3 else TEXTS[(i + 1) % 6] for i, text in enumerate(truths)]
    rows = [{"Ground Truth": t, "Pred": p} for t, p in zip(truths, predictions)]
    scores = nlg_eval.score_rows(rows, with_meteor=False, draws=40)
    values = {name: scores[name] for name in scores["intervals"]} | scores["standard"] | scores["sameness"]
    for part in ("findings", "findings_18"):
        found = scores[part]
        values |= {f"{part} {name}": row["F1"] for name, row in found["per_finding"].items()}
        means = ("micro", "macro", "macro_occurring", "example")
        values |= {f"{part} {name}": found[name]["F1"] for name in means}
        values[f"{part} CRG"] = found["CRG"]["value"]
    for name, (low, high) in inner_intervals(scores):
        assert low - 1e-6 <= values[name] <= high + 1e-6, name
        if name in scores["intervals"] or name in scores["standard"]["intervals"]:
            assert low < high, f"{name}: the draws do not differ"


def test_meteor_of_any_draw_comes_from_the_counts_of_its_pairs():
    """What the jar prints with -ssOut, and the final score that it gives to the same six and four pairs."""
    rows = {
        "en": (
            "5 7 3 4 1 1 3 3 0 0 0 0 0 0 0 0 0 0 0 0 2 4 4, 4 4 1 1 3 3 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 4 4, "
            "8 9 5 3 3 3 3 3 0 0 0 0 0 0 0 0 0 0 0 0 4 6 6, 1 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0, "
            "5 5 2 2 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 2 2, 6 3 3 1 1 1 0 0 0 0 0 0 0 0 0 0 1 1 0 0 2 2 2",
            0.28699173163137265,
        ),
        "cn": (
            "4 3 0 0 3 3 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 3 3, 2 2 0 0 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1, "
            "3 3 0 0 3 3 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 3 3, 5 3 0 0 3 3 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 3 3",
            0.6253188092431322,
        ),
    }
    for language, (text, final) in rows.items():
        counts = np.array([line.split() for line in text.split(",")], float)
        assert nlg_eval.meteor_score(counts, language) == pytest.approx(final, abs=1e-12)
    assert nlg_eval.meteor_score(counts[2:3], "cn") == 1 and nlg_eval.meteor_score(0 * counts, "en") == 0


@pytest.mark.slow
def test_missing_java_is_said(tmp_path, monkeypatch):
    rows = ("右侧胸腔积液。", "右侧胸腔少量积液。"), ("心影增大。", "心影不大。")
    write_csv(tmp_path / "r.csv", ("Ground Truth", "Pred"), *rows)
    monkeypatch.setenv("PATH", "/nowhere")
    arguments = ["--csv", tmp_path / "r.csv", "--out", tmp_path / "s.json", "--draws", 20]
    done = call(nlg_eval, *arguments, log=tmp_path / "log.txt")
    assert done.returncode == 0, done.text
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["METEOR"] is None and "absent" in scores["METEOR_note"] and "METEOR absent" in done.text
    assert scores["language"] == "cn" and scores["BLEU_1"] > 0.3


def test_a_csv_without_predictions_or_without_truths_is_refused(tmp_path):
    for content in ("a,b\n1,2\n", "Ground Truth,Pred\n ,A nodule.\n,\n"):
        (tmp_path / "r.csv").write_text(content)
        done = call(nlg_eval, "--csv", tmp_path / "r.csv", log=tmp_path / "log.txt")
        assert done.returncode == 2 and done.text.count("\n") == 1 and "Ground Truth" in done.text


@pytest.mark.slow
def test_real_reports_are_scored_with_and_without_a_training_part(data_root, tmp_path):
    train, held = (data_root / "ct" / f"ct_reports_{part}.json" for part in ("train", "val"))
    for given, controls in (
        (None, {"all positive"}),
        (train, {"all positive", "TF-IDF + logistic on the 800"}),
    ):
        labeler_study(tmp_path, held, given)
        row = json.loads((tmp_path / "results/labeler-on-real-reports.json").read_text())
        assert set(row["controls"]) == controls and row["controls"]["all positive"] < 0.5 < 0.8 < row["value"]
        assert row["value"] > max(row["controls"].values())


def test_organs_lie_on_their_side_after_reading(data_root, tmp_path):
    sides = landmarks(data_root / "ct/volumes")
    assert len(sides) > 20 and all(sides.values())
    assert landmarks(tmp_path) == {}


def test_a_row_ends_where_the_csv_ends_it(tmp_path):
    """Form feeds and line separators, which editors and slides leave in reports, need no quotes in a CSV."""
    report = "Clear\x0blungs.\x0cNo\u2028effusion.\x85"
    write_csv(tmp_path / "a.csv", ["ID", "Ground Truth", "Pred"], ["1", report, "x\ny"], ["2", "b", report])
    rows = nlg_eval.read_csv(tmp_path / "a.csv")
    assert [(row["ID"], row["Ground Truth"], row["Pred"]) for row in rows] == [
        ("1", report, "x\ny"),
        ("2", "b", report),
    ]


def test_rouge_l_equals_upstreams_and_keeps_runs_of_spaces():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 30, rng.integers(1, 60))) for _ in range(40)]
    truths = [*texts[:20], "a  b c", "a b", "", "a  a"]
    predictions = [*texts[20:], "a b   c", "", "a b", "a   a"]
    upstream = [float(Rouge().calc_score([p], [t])) for t, p in zip(truths, predictions)]
    assert nlg_eval.rouge_l(truths, predictions)[1] == pytest.approx(upstream, abs=1e-12)
    spaced = nlg_eval.published_scores(["a  b c"] * 2, ["a b   c"] * 2, with_meteor=False)[0]
    assert spaced["ROUGE_L"] == pytest.approx(upstream[20]) and spaced["BLEU_1"] == pytest.approx(1)


def test_the_standard_rouge_is_that_of_rouge_score():
    rng = np.random.default_rng(1)
    words = ["Heart", "heart", "size", "normal,", "5-mm", "nodule.", "no"]
    texts = [" ".join(rng.choice(words, rng.integers(0, 12))) for _ in range(40)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for truth, prediction in zip(texts[:20], texts[20:]):
        expected = scorer.score(truth, prediction)
        ours = nlg_eval.standard_rouge(*(nlg_eval.default_words(text) for text in (truth, prediction)))
        assert ours == pytest.approx({name: value.fmeasure for name, value in expected.items()})


def test_the_crg_score_follows_its_formula():
    truth = np.zeros((10, 6), bool)
    truth[:3, 0] = truth[5, 2] = True
    assert crg_score(truth, truth) == pytest.approx(1)
    assert crg_score(truth, np.zeros_like(truth)) == pytest.approx(1 / 3)
    told = truth.copy()
    told[0, 0], told[9, 5], told[8, 5] = False, True, True  # 3 hits, 1 miss, 2 false alarms
    weight, most = (60 - 4) / 8, (60 - 4) / 2
    assert crg_score(truth, told) == pytest.approx(most / (2 * most - (3 * weight - weight - 2)))
    assert np.isnan(crg_score(np.zeros((3, 2)), np.zeros((3, 2))))


def test_a_perfect_model_has_a_macro_of_one_over_the_findings_that_occur():
    truth = np.random.default_rng(0).random((60, 14)) < 0.3
    truth[:, 3] = truth[:, 8] = False
    scores = finding_scores(truth, truth)
    assert scores["macro"]["F1"] == pytest.approx(12 / 14, abs=1e-4)
    assert scores["macro_occurring"]["F1"] == pytest.approx(1, abs=1e-4)


TEXTS = (
    "A nodule is seen in the right lung.",
    "There is a left pleural effusion.",
    "The heart is enlarged.",
    "No abnormality is seen.",
    "Fracture of a rib.",
    "Pneumothorax on the right.",
)


def test_a_report_that_is_the_same_for_all_survives_another_patient():
    truths = [*TEXTS] * 5
    own = nlg_eval.sameness(truths, truths)
    assert own["distinct"] == pytest.approx(6 / 30) and own["survives"] < 0.2 and own["micro_F1"] > 0.99
    alike = nlg_eval.sameness(truths, [TEXTS[0]] * 30)
    assert alike["distinct"] == pytest.approx(1 / 30) and alike["commonest"] == 1
    assert alike["survives"] == pytest.approx(1)


def test_two_models_on_the_same_patients_are_compared_in_pairs(tmp_path):
    truths = [TEXTS[i % 6] for i in range(36)]
    worse = [truth if i % 3 else TEXTS[(i + 1) % 6] for i, truth in enumerate(truths)]
    for name, texts, order in (("a", truths, 1), ("b", worse, -1)):
        rows = list(zip(range(36), truths, texts))[::order]
        write_csv(tmp_path / f"{name}.csv", ("ID", "Ground Truth", "Pred"), *rows)
    named = {"csv": "a.csv", "against": "b.csv", "radeval": "r.csv", "out": "s.json"}
    arguments = options({name: tmp_path / file for name, file in named.items()})
    arguments += ["--no-meteor", "--draws", 60]
    done = call(nlg_eval, *arguments, log=tmp_path / "log.txt")
    assert done.returncode == 0, done.text
    scores = json.loads((tmp_path / "s.json").read_text())
    test = scores["against"]["micro_F1"]
    assert test["difference"] > 0.2 and test["interval"][0] > 0 and test["p"] < 0.05
    low, high = scores["intervals"]["BLEU_4"]
    assert low - 1e-6 <= scores["BLEU_4"] <= high + 1e-6
    assert (tmp_path / "r.csv").read_text().splitlines()[:2] == ["refs,hyps", f"{TEXTS[0]},{TEXTS[0]}"]
    rows = [{"ID": str(i), "Ground Truth": t, "Pred": t} for i, t in enumerate(truths)]
    equal = nlg_eval.paired_test(rows, rows, "en", draws=30)["micro_F1"]
    assert equal["difference"] == 0 and equal["p"] == 1
    (tmp_path / "b.csv").write_text("ID,Ground Truth,Pred\n77,a,b\n")
    done = call(nlg_eval, *arguments, log=tmp_path / "log.txt")
    assert done.returncode == 2 and "other patients" in done.text
