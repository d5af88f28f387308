"""Recipe of what real data can test: the labeler, a language model on real reports, reading CT files.

    DATA_ROOT=... python studies/dia_pangu/real.py      (after builtin_model.py, whose model it uses)

DATA_ROOT/ct holds volumes/*.nii.gz, dicom_series/ and ct_reports_{train,val}.json (CT-RATE reports with 18
labels); what needs a part that is not there is left out, and a line says so. No public volume comes with
its report, so that no report of a real volume is scored: the model has seen phantoms alone, and its reports
of real scans show that the path works, not what is in the scan.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from common.errors import UserError
from studies.dia_pangu.bases import out
from studies.recipe import REAL, recipe, size, stage


def main():
    if REAL is None or not (REAL / "ct").is_dir():
        raise UserError(f"DATA_ROOT={REAL}: it has no folder ct/; give the folder that holds ct/")
    train, val = REAL / "ct/ct_reports_train.json", REAL / "ct/ct_reports_val.json"

    # The rule-based labeler against labels set by hand; with training reports also a learned labeler beside
    # it.
    if val.is_file():
        reports = train if train.is_file() else None
        stage("studies/dia_pangu/real_reports.py", reports=val, train_reports=reports, out=out)

    # A small language model on the training reports, beside a unigram model.
    if val.is_file() and train.is_file():
        stage(
            "studies/dia_pangu/warm_llm.py",
            reports=train,
            eval_reports=val,
            make=4,
            vocab_size=1500,
            batch_size=8,
            max_steps=size(150, smoke=4),
            overwrite=True,
            out=out / "llm_real",
        )
        stage(
            "studies/dia_pangu/real_reports.py",
            reports=val,
            train_reports=train,
            language_model=out / "llm_real",
            out=out,
        )
    else:
        print(
            "the language model on real reports is left out: it needs ct_reports_train.json and "
            "ct_reports_val.json"
        )

    # Real scans through reading, preparation and the model.
    scans = sorted(p for p in (REAL / "ct/volumes").glob("*.nii.gz") if not p.name.endswith("_seg.nii.gz"))
    if (REAL / "ct/dicom_series").is_dir():
        if find_spec("pydicom"):
            scans.append(REAL / "ct/dicom_series")
        else:
            print("dicom_series is left out: reading DICOM needs pydicom (pip install pydicom)")
    if not scans:
        print(f"{REAL / 'ct/volumes'}: no scans; nothing to read")
        return
    for scan in scans:
        stage(
            "dia_pangu/test.py",
            ckpt_path=out / "ft-hidden",
            lang_encoder_path=out / "llm/model",
            volume=scan,
            max_new_tokens=60,
            out=out / f"real-{scan.name.split('.')[0]}",
        )
    stage("studies/dia_pangu/real_volumes.py", volumes=scans, segmentations=REAL / "ct/volumes", out=out)


if __name__ == "__main__":
    recipe(main)
