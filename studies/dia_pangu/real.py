"""Recipe of the real study: a real language model, real reports, real CT files.

    DATA_ROOT=... bash run_all.sh --real dia_pangu

SmolLM2-135M-Instruct writes the reports of phantoms (no public volume comes with its report), with controls,
and learns 800 real reports. DATA_ROOT/ct holds volumes/*.nii.gz, dicom_series/ and
ct_reports_{train,val}.json (CT-RATE reports with 18 labels); what needs a part that is not there is left out,
and a line says so. The reports of the real scans show that the path works, not what is in the scan.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from common.errors import UserError
from studies.dia_pangu.bases import out, vision_part
from studies.dia_pangu.builtin import measured
from studies.dia_pangu.builtin_model import diagnosis, lora
from studies.real_models import smollm2
from studies.recipe import REAL, recipe, size, stage

data = out / "phantoms"
run = {"overwrite": True, "seed": 42, "log_every": size(10, smoke=2)}


def report_model(llm):
    """Phantoms, a vision part for them, and LoRA on the language model; then the test volumes, once, with
    controls."""
    parts = {"train": size(800, smoke=24), "val": size(60, smoke=8), "test": size(60, smoke=8)}
    stage("dia_pangu/make_data.py", out=data, seed=11, **parts)
    vision = {"data": data, "size": "tiny", "cache": data / "cache", **run}
    vision_part(vision, size(900, smoke=4), size(300, smoke=2))

    # Prompts name what is present alone, so that most of a sample is the report. Many small updates, and more
    # weight on the words that are copied from the prompt: with few updates the report leaves findings out.
    stage(
        "dia_pangu/train.py",
        **vision,
        stage="ft",
        prompt="positives",
        lang_encoder_path=llm,
        start=out / "contrast",
        places=out / "contrast/places.json",
        freeze=diagnosis,
        **{**lora, "lora_r": 16, "lora_alpha": 32},
        key_weight=4,
        lr=1.5e-3,
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        warmup=20,
        batch_size=2,
        accum=1,
        max_steps=size(400, smoke=2),
        out=out / "ft",
    )
    test = {"ckpt_path": out / "ft", "lang_encoder_path": llm, "data": data, "cache": data / "cache"}
    # A small language model leaves findings out; of a few reports the one that states the diagnosis is kept.
    test |= {"candidates": 4, "temperature": 1.0, "top_k": 0}
    words = {"max_new_tokens": size(110, smoke=8), "batch_size": size(20, smoke=4)}
    measured({**test, **words}, evidence=2)


def real_reports(llm, train, val):
    """The labeler against labels set by hand; LoRA on the training reports, and what it writes."""
    reports = "studies/dia_pangu/real_reports.py"
    stage(reports, reports=val, train_reports=train, out=out)
    texts = {"reports": train, "eval_reports": val, **run}
    small = {"make": 4, "vocab_size": 1500, "batch_size": 8, "max_steps": size(150, smoke=2)}
    stage("studies/dia_pangu/warm_llm.py", **texts, **small, out=out / "llm-small")
    lora = {"lang_encoder_path": llm, "batch_size": 2, "max_steps": size(75, smoke=2), "max_length": 384}
    stage("studies/dia_pangu/warm_llm.py", **texts, **lora, warmup=5, out=out / "llm-lora")
    stage(
        reports,
        reports=val,
        train_reports=train,
        language_models=[
            f"SmolLM2 with LoRA={out / 'llm-lora/model'}",
            f"SmolLM2 as it is={llm}",
            f"small model from these reports={out / 'llm-small/model'}",
        ],
        out=out,
    )
    limit = size(0, smoke=4)
    stage("studies/dia_pangu/impressions.py", reports=val, model=out / "llm-lora/model", limit=limit, out=out)


def real_scans(llm):
    """Real scans through reading, preparation and the model."""
    scans = sorted(p for p in (REAL / "ct/volumes").glob("*.nii.gz") if not p.name.endswith("_seg.nii.gz"))
    if (REAL / "ct/dicom_series").is_dir():
        if find_spec("pydicom"):
            scans.append(REAL / "ct/dicom_series")
        else:
            print("dicom_series is left out: reading DICOM needs pydicom (pip install pydicom)")
    if not scans:
        print(f"{REAL / 'ct/volumes'}: no scans; nothing to read")
        return
    model = {"ckpt_path": out / "ft", "lang_encoder_path": llm, "max_new_tokens": 60}
    for scan in scans:
        stage("dia_pangu/test.py", **model, volume=scan, out=out / f"real-{scan.name.split('.')[0]}")
    stage("studies/dia_pangu/real_volumes.py", volumes=scans, segmentations=REAL / "ct/volumes", out=out)


def main():
    if REAL is None or not (REAL / "ct").is_dir():
        raise UserError(f"DATA_ROOT={REAL}: it has no folder ct/; give the folder that holds ct/")
    llm = smollm2()
    report_model(llm)
    train, val = (REAL / f"ct/ct_reports_{part}.json" for part in ("train", "val"))
    if train.is_file() and val.is_file():
        real_reports(llm, train, val)
    else:
        print("real reports are left out: they need ct_reports_train.json and ct_reports_val.json")
    real_scans(llm)


if __name__ == "__main__":
    recipe(main)
