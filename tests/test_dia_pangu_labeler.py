"""dia_pangu: the labeler on 1,658 sentences labelled by hand, on the templates of the phantoms, and its
scopes."""

import numpy as np
import pytest

from dia_pangu.evaluate.labeler import LABELS_18, label_report, positives, positives_18
from dia_pangu.make_data import draw_findings, report
from dia_pangu.src.Dataset.prompt import FINDINGS
from tests.golden import ROOT


def labelled(language: str) -> list[tuple[str, set]]:
    """(sentence, findings that a reader takes from it as present) of one language."""
    lines = (ROOT / f"tests/sentences/{language}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.rpartition("|") for line in lines if line and not line.startswith("#")]
    return [(text.strip(), {name.strip() for name in names.split(",")} - {""}) for text, _, names in pairs]


def stated(text: str) -> set:
    return {name for name, code in zip(FINDINGS[:-1], label_report(text)) if code == 1}


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_every_finding_of_the_labelled_sentences_is_read(language):
    """Precision and recall of every finding, over at least 600 sentences of a language."""
    pairs = labelled(language)
    assert len(pairs) >= 600
    wrong = [(text, stated(text), names) for text, names in pairs if stated(text) != names]
    assert not wrong, wrong
    for name in FINDINGS[:-1]:
        assert sum(name in names for _, names in pairs) >= 3, f"{name} hardly occurs"


def test_the_labeler_reads_every_template_sentence():
    for i in range(60):
        rng = np.random.default_rng([9, i])
        findings = draw_findings(rng)
        expected = [int(name in findings) for name in FINDINGS[:-1]] + [int(not findings)]
        for language in ("en", "cn"):
            text = report(np.random.default_rng([10, i]), findings, language)
            assert positives([text])[0] == expected, text


@pytest.mark.parametrize(
    "text, finding, code",
    [
        ("No pleural effusion or pneumothorax was detected.", "pleural effusion", 2),
        ("Pericardial effusion is present.", "pleural effusion", 0),
        ("Consolidation cannot be excluded.", "consolidation", 3),
        ("There is no fracture, but a large nodule is seen.", "lung lesion", 1),
        ("未见胸腔积液。", "pleural effusion", 2),
        ("右侧胸腔少量积液", "pleural effusion", 1),
        ("考虑肺炎可能", "pneumonia", 3),
        ("", "edema", 0),
    ],
)
def test_the_labeler_reads_negation_and_doubt(text, finding, code):
    assert label_report(text)[FINDINGS.index(finding)] == code


@pytest.mark.parametrize(
    "text, expected",
    [
        ("There is atherosclerotic calcification of the aorta and the coronary arteries.", (1, 4)),
        ("Emphysema and bronchiectasis in both lungs.", (7, 16)),
        ("No lymphadenopathy; sliding type hiatal hernia is observed.", (5,)),
        ("Pericardial effusion was not detected, bilateral pleural effusion is present.", (12,)),
        ("Mosaic attenuation and peribronchial thickening in the lower lobes.", (13, 14)),
        ("冠状动脉钙化，心包少量积液。", (3, 4)),
    ],
)
def test_the_18_labels_are_read(text, expected):
    found = [i for i, label in enumerate(positives_18([text])[0]) if label]
    named = {LABELS_18[i] for i in found} - {"Arterial wall calcification"}
    assert named == {LABELS_18[i] for i in expected} - {"Arterial wall calcification"}


def test_no_finding_is_what_a_normal_report_says():
    for text, expected in (
        ("Both lungs are clear. The heart is of normal size.", True),
        ("Both lungs are clear. A pacemaker is in place.", False),
        ("A nodule is seen.", False),
        ("", False),
    ):
        assert (positives([text])[0][-1] == 1) == expected, text
