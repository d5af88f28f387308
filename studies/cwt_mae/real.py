"""cwt_mae on the real recordings below DATA_ROOT/ecg: heart beats of MIT-BIH, UCR sets, records of several
leads.

    DATA_ROOT=/data python studies/cwt_mae/real.py
    DATA_ROOT=/data SEEDS="0 1 2" python studies/cwt_mae/real.py     # repeats MIT-BIH

One seed takes about 12 minutes of one core, the UCR sets 8, the leads 3. With three cores or more the parts
run beside each other and MIT-BIH takes three seeds.
"""

import os
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.errors import UserError
from studies.cwt_mae.respiration import FILES
from studies.recipe import CORES, REAL, RUNS, SMOKE, recipe, side_by_side, stage

OUT = RUNS / "cwt_mae"
SEEDS = os.environ.get("SEEDS", "0 1 2" if CORES >= 3 and not SMOKE else "0").split()


def main():
    ecg = REAL / "ecg" if REAL else None
    if ecg is None or not ecg.is_dir():
        raise UserError(f"DATA_ROOT={REAL or ''}: holds no folder ecg; set it to the folder of the real data")
    parts, mitbih = [], None
    if (ecg / "mitbih").is_dir():
        mitbih = dict(data=ecg / "mitbih", out=OUT / "mitbih")

    # Every part is a process of its own, so that the cores are shared out among them
    if mitbih:
        for seed in SEEDS:
            parts.append(lambda seed=seed: stage("studies/cwt_mae/mitbih.py", "train", **mitbih, seed=seed))
        parts.append(lambda: stage("studies/cwt_mae/mitbih.py", "forest", **mitbih))
    for file in sorted(ecg.glob("*.npz")):
        parts.append(lambda file=file: stage("studies/cwt_mae/ucr.py", data=file, out=OUT / file.stem))
    if all((ecg / name).is_file() for name in FILES):
        parts.append(lambda: stage("studies/cwt_mae/respiration.py", data=ecg, out=OUT / "leads"))
    if not parts:
        raise UserError(f"{ecg}: holds none of mitbih, UCR sets (*.npz), raw_wfdb with ppg")
    side_by_side(*parts, cores=CORES)

    # The test records of MIT-BIH come last, when all that is scored on them is trained
    if mitbih:
        stage("studies/cwt_mae/mitbih.py", "score", **mitbih, seeds=SEEDS)


if __name__ == "__main__":
    recipe(main)
