"""Write thorax phantoms with reports in the CTRG-Chest-548K format: the built-in data set of dia_pangu.

    python dia_pangu/make_data.py --out data/dia_pangu

    volumes/<id>.nii.gz          HU, int16, 6 x 6 x 20 mm, RAS affine
    masks/<id>.nii.gz            uint16, bit c set where finding c (order of FINDINGS) changed the voxel
    annotation.json              {"train": [...], "val": [...], "test": [...]}, Chinese
    annotation_en.json           the same in English
    CTRG_finding_labels.csv      id and 14 findings; 0 not mentioned, 1 present, 2 absent
    attributes.json              id -> finding -> side, place, size: what the evidence map is measured against

A phantom has a body with a layer of fat, lungs with texture and vessels, heart, mediastinum, aorta, trachea,
spine, ribs and a liver dome; its own size, rotation, shift and noise; and any of thirteen conditions. It is
no simulation of disease: it has the contrasts and the places that the words of a report name. Equal seeds
give equal data.
"""

import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter

from common.arguments import Parser, number
from common.checkpoint import atomic_csv, atomic_json, atomic_write
from common.errors import run
from common.run import progress
from dia_pangu.src.Dataset.prompt import COLUMNS, FINDINGS, LATERAL, PLACES, PLACES_CN, SIDES

SIZE, SPACING_MM = (64, 64, 16), (6.0, 6.0, 20.0)  # H front to back, W right to left, D feet to head
PREVALENCE = {
    "enlarged cardiomediastinum": 0.12,
    "cardiomegaly": 0.16,
    "lung opacity": 0.26,
    "lung lesion": 0.20,
    "edema": 0.09,
    "consolidation": 0.17,
    "pneumonia": 0.13,
    "atelectasis": 0.13,
    "pneumothorax": 0.09,
    "pleural effusion": 0.20,
    "pleural other": 0.13,
    "fracture": 0.06,
    "support devices": 0.13,
}
NORMAL_FRACTION = 0.06  # of the volumes are made without any condition, beside those that get none by chance
SIZES = ("small", "moderate", "large")
PLACED = {"lung opacity", "lung lesion", "consolidation", "pneumonia"}  # these lie in one zone of one lung
GRADED = PLACED | {"enlarged cardiomediastinum", "cardiomegaly", "edema", "pneumothorax", "pleural effusion"}
MM = [((np.arange(n) + 0.5) * s - n * s / 2) for n, s in zip(SIZE, SPACING_MM)]
Y, X, Z = np.meshgrid(*MM, indexing="ij")
ZONE_MM = {"upper": 75.0, "middle": 5.0, "lower": -60.0}


def draw_findings(rng) -> dict:
    """Draw {finding: {side, place, size}} of one phantom; an empty dictionary is a normal chest."""
    found = {}
    if rng.random() < NORMAL_FRACTION:
        return found
    for name, prevalence in PREVALENCE.items():
        if rng.random() < prevalence:
            found[name] = {
                "side": str(rng.choice(SIDES)) if name in LATERAL else "",
                "place": str(rng.choice(PLACES)) if name in PLACED else "",
                "size": str(rng.choice(SIZES)) if name in GRADED else "",
            }
    return found


class Chest:
    """One chest in the making; its methods paint in the order of `phantom`, later ones over earlier ones.

    x, y, z: mm in the patient's own rotated, shifted and scaled axes, from right to left, front to back, feet
    to head. hu: the volume in HU. bits: bit c is set where finding c changed a voxel. All are (H, W, D).
    """

    def __init__(self, rng, findings: dict):
        self.rng, self.findings = rng, findings
        angle, scale = np.deg2rad(rng.uniform(-6, 6)), rng.uniform(0.92, 1.08)
        dx, dy, dz = rng.uniform(-12, 12, 3)
        self.x = ((X - dx) * np.cos(angle) + (Y - dy) * np.sin(angle)) / scale
        self.y = (-(X - dx) * np.sin(angle) + (Y - dy) * np.cos(angle)) / scale
        self.z = (Z - dz) / scale
        self.side = np.where(self.x < 0, -1, 1)
        self.grade = {name: SIZES.index(f["size"]) if f["size"] else 1 for name, f in findings.items()}
        self.sign = {name: -1 if f["side"] == "right" else 1 for name, f in findings.items()}
        self.bits = np.zeros(SIZE, np.uint16)

    def mark(self, name: str, where):
        """Set the bit of a finding in the voxels `where`."""
        self.bits[where] |= np.uint16(1 << FINDINGS.index(name))

    def ball(self, cx, cy, cz, rx, ry, rz):
        """Return the squared distance from a centre in units of the radii."""
        return ((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2 + ((self.z - cz) / rz) ** 2

    def body_and_lungs(self):
        """Paint the body, its fat, the lungs and their vessels."""
        x, y, z, rng = self.x, self.y, self.z, self.rng
        self.rim = (x / 165) ** 2 + (y / 118) ** 2
        self.taper = np.sqrt(np.clip(1 - ((z + 25) / 160) ** 2, 0.05, 1))
        self.dome = -95 - 35 * ((np.abs(x) - 75) / 60) ** 2
        self.dome += np.where(x < 0, 18, 0)  # the liver lifts the right side
        self.edge = ((np.abs(x) - 74) / (58 * self.taper)) ** 2 + (y / (90 * self.taper)) ** 2
        self.cavity = (self.edge <= 1) & (z > self.dome) & (z < 132)
        self.texture = gaussian_filter(rng.normal(size=SIZE), (1.5, 1.5, 0.6))
        lung = -840 + 45 * self.texture / self.texture.std()
        for _ in range(14):  # vessels: short brighter rods that leave the hilum
            s = rng.choice((-1, 1))
            out = rng.uniform(25, 80)
            rod = (
                self.ball(
                    s * (30 + out), rng.uniform(-55, 55), rng.uniform(-90, 90), rng.uniform(7, 22), 5, 12
                )
                < 1
            )
            lung = np.where(rod, rng.uniform(-620, -380), lung)
        self.hu = np.where(self.rim <= 1, np.where(self.rim > 0.86, -95.0, 45.0), -1000.0)
        self.hu = np.where(self.cavity, lung, self.hu)

    def mediastinum_heart_and_bones(self):
        """Paint them with their two findings, which are larger forms of what is always there."""
        x, y, z, rng = self.x, self.y, self.z, self.rng
        core = ((x / 26) ** 2 + (y / 68) ** 2 <= 1) & (z > -120)
        if "enlarged cardiomediastinum" in self.findings:
            wide = 1.55 + 0.3 * self.grade["enlarged cardiomediastinum"] + rng.uniform(0, 0.1)
            broad = ((x / (26 * wide)) ** 2 + ((y + 5) / 60) ** 2 <= 1) & (z > 0) & (z < 105)
            self.mark("enlarged cardiomediastinum", broad & ~core)
            core |= broad
        hu = np.where(core, 42.0, self.hu)
        big = 1.0
        if "cardiomegaly" in self.findings:
            big = 1.28 + 0.13 * self.grade["cardiomegaly"] + rng.uniform(0, 0.04)
        self.heart = self.ball(20 * big, -32, -45, 52 * big, 44 * big, 52) <= 1
        if big > 1:
            self.mark("cardiomegaly", self.heart & ~(self.ball(20, -32, -45, 52, 44, 52) <= 0.7))
        hu = np.where(self.heart & (z > -115), 50.0, hu)
        hu = np.where((x - 18) ** 2 + (y - 42) ** 2 <= 14**2, 65.0, hu)  # aorta
        hu = np.where((x**2 + (y - 12) ** 2 <= 9**2) & (z > 15), -1000.0, hu)  # trachea
        hu = np.where(x**2 + (y - 88) ** 2 <= 21**2, 260.0, hu)  # spine
        ribs = (
            (self.rim > 0.70)
            & (self.rim < 0.84)
            & (np.mod(z + 0.25 * np.abs(x), 40) < 21)
            & (np.abs(x) > 35)
            & (z > -110)
        )
        self.hu = np.where(ribs, 420.0, hu)
        self.soft = (
            self.cavity & ~self.heart & (self.hu < -100)
        )  # lung with air, where conditions are painted

    def lung_findings(self):
        """Paint what fills the lung: opacity, consolidation, pneumonia, lesion, edema, atelectasis."""
        x, y, z, rng, soft, hu = self.x, self.y, self.z, self.rng, self.soft, self.hu
        for name in ("lung opacity", "consolidation", "pneumonia", "lung lesion"):
            if name not in self.findings:
                continue
            r = (36, 46, 56)[self.grade[name]] + rng.uniform(-3, 3)
            centre = (
                self.sign[name] * rng.uniform(62, 92),
                rng.uniform(-45, 45),
                ZONE_MM[self.findings[name]["place"]] + rng.uniform(-12, 12),
            )
            if name == "lung opacity":  # ground glass: the lung stays visible
                where = soft & (self.ball(*centre, r, r, r * 0.9) + 0.25 * self.texture < 1)
                hu = np.where(where, hu + 380, hu)
            elif name == "consolidation":  # dense, with air in some bronchi
                where = soft & (self.ball(*centre, r, 0.95 * r, 0.9 * r) < 1)
                hu = np.where(where, np.where(self.texture > 1.2 * self.texture.std(), -500.0, 35.0), hu)
            elif name == "pneumonia":  # several dense patches, each with a halo
                where = np.zeros(SIZE, bool)
                for _ in range(8):
                    dist = self.ball(*(c + rng.uniform(-0.9, 0.9) * r for c in centre), 17, 17, 20)
                    hu = np.where(soft & (dist < 2), np.maximum(hu, np.where(dist < 1, -60.0, -480.0)), hu)
                    where |= soft & (dist < 2)
            else:
                r = (16, 20, 24)[self.grade[name]]
                where = soft & (self.ball(*centre, r, r, r) < 1)
                hu = np.where(where, 140.0, hu)
            self.mark(name, where)
        if "edema" in self.findings:  # haze around both hila, thicker septa at the base
            haze = np.exp(-(((np.abs(x) - 42) / 42) ** 2 + (y / 55) ** 2 + ((z + 5) / 75) ** 2))
            hu = np.where(soft, hu + (230 + 70 * self.grade["edema"]) * haze, hu)
            self.mark("edema", soft & (haze > 0.4))
        if "atelectasis" in self.findings:  # a thin dense plate above the diaphragm
            plate = np.abs(z - self.dome - 28 - 0.12 * y - rng.uniform(-5, 5)) < 11
            where = soft & plate & (self.side == self.sign["atelectasis"]) & (np.abs(y) < 62)
            hu = np.where(where, 10.0, hu)
            self.mark("atelectasis", where)
        self.hu = hu

    def pleural_findings(self):
        """Paint effusion, pneumothorax and thickened pleura."""
        x, z, hu = self.x, self.z, self.hu
        depth = self.y / (90 * self.taper)
        if "pleural effusion" in self.findings:  # fluid lies at the back and rises with its amount
            level = (0.52, 0.32, 0.10)[self.grade["pleural effusion"]] + 0.0035 * (z + 100)
            where = self.cavity & (self.side == self.sign["pleural effusion"]) & (depth > level) & (z < 95)
            hu = np.where(where, 12.0, hu)
            self.mark("pleural effusion", where)
        if "pneumothorax" in self.findings:  # air without lung texture at the front
            level = (-0.45, -0.30, -0.15)[self.grade["pneumothorax"]]
            half = self.cavity & (self.side == self.sign["pneumothorax"]) & ~self.heart
            where, rind = half & (depth < level), half & (np.abs(depth - level) < 0.07)
            hu = np.where(where, -1000.0, np.where(rind, -350.0, hu))
            self.mark("pneumothorax", where)
        if "pleural other" in self.findings:  # thick, partly calcified pleura along the outer wall
            s, low = self.sign["pleural other"], self.rng.uniform(-75, 0)
            where = (
                self.cavity
                & (self.edge > 0.74)
                & (self.side == s)
                & (np.abs(x) > 92)
                & (z > low)
                & (z < low + 80)
            )
            hu = np.where(where, np.where(self.texture > 0, 90.0, 330.0), hu)
            self.mark("pleural other", where)
        self.hu = hu

    def fracture_and_devices(self):
        """Paint a broken rib, a catheter and a pacemaker."""
        x, y, z, rng, hu = self.x, self.y, self.z, self.rng, self.hu
        if "fracture" in self.findings:  # a gap in a rib with a lump of callus
            height, turn = rng.uniform(-70, 70), rng.uniform(-0.6, 0.6)
            cx, cy = self.sign["fracture"] * 148 * np.cos(turn), 104 * np.sin(turn)
            where = self.ball(cx, cy, height, 20, 20, 22) < 1
            hu = np.where(where, np.where(self.ball(cx, cy, height, 8, 8, 22) < 1, -40.0, 950.0), hu)
            self.mark("fracture", where)
        if (
            "support devices" in self.findings
        ):  # a catheter in the upper vein, sometimes a pacemaker under the skin
            tube = ((x + 24) ** 2 + (y + 18) ** 2 <= 7**2) & (z > -20)
            if rng.random() < 0.4:
                tube |= (np.abs(x - 85) < 16) & (np.abs(y + 98) < 9) & (np.abs(z - 80) < 22)
            hu = np.where(tube, 2400.0, hu)
            self.mark("support devices", tube)
        self.hu = hu


def phantom(rng, findings: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the HU (int16) and the bits of the findings (uint16) of a chest, both (H, W, D)."""
    chest = Chest(rng, findings)
    chest.body_and_lungs()
    chest.mediastinum_heart_and_bones()
    chest.lung_findings()
    chest.pleural_findings()
    chest.fracture_and_devices()
    hu = chest.hu + rng.normal(size=SIZE) * rng.uniform(17, 33)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), chest.bits


# Two sentences for each condition in each language; {side}, {place} and {size} are filled in.
SENTENCES = {
    "en": {
        "enlarged cardiomediastinum": (
            "{Size} widening of the mediastinum is seen.",
            "The mediastinal outline shows {size} enlargement.",
        ),
        "cardiomegaly": ("The heart is enlarged to a {size} degree.", "There is {size} cardiomegaly."),
        "lung opacity": (
            "A {size} ground-glass opacity lies in the {side} {place} lung.",
            "The {side} {place} lung shows {size} hazy density.",
        ),
        "lung lesion": (
            "A {size} nodule is found in the {side} {place} lung.",
            "The {side} {place} lung holds a {size} round lesion.",
        ),
        "edema": (
            "There is {size} pulmonary edema around both hila.",
            "Both lungs show {size} edema near the hila.",
        ),
        "consolidation": (
            "A {size} consolidation is present in the {side} {place} lung.",
            "The {side} {place} lung is consolidated, {size} in extent.",
        ),
        "pneumonia": (
            "Patchy shadows of {size} extent in the {side} {place} lung suggest pneumonia.",
            "{Size} pneumonia is seen in the {side} {place} lung.",
        ),
        "atelectasis": (
            "Plate atelectasis is seen at the {side} base.",
            "The {side} lung base shows a band of atelectasis.",
        ),
        "pneumothorax": (
            "A {size} {side} pneumothorax is present.",
            "There is a {size} pneumothorax on the {side}.",
        ),
        "pleural effusion": (
            "A {size} {side} pleural effusion is present.",
            "There is {size} fluid in the {side} pleural space.",
        ),
        "pleural other": (
            "The {side} pleura is thickened with calcified plaques.",
            "Pleural thickening is noted on the {side}.",
        ),
        "fracture": ("A {side} rib fracture is seen.", "There is a broken rib on the {side} with callus."),
        "support devices": (
            "A central venous catheter is in place.",
            "A catheter tip lies in the upper vein.",
        ),
    },
    "cn": {
        "enlarged cardiomediastinum": ("纵隔{size}增宽。", "纵隔影{size}增大。"),
        "cardiomegaly": ("心脏{size}增大。", "心影{size}扩大。"),
        "lung opacity": ("{side}肺{place}野见{size}磨玻璃影。", "{side}肺{place}部可见{size}模糊阴影。"),
        "lung lesion": ("{side}肺{place}野见{size}结节。", "{side}肺{place}部可见{size}类圆形病灶。"),
        "edema": ("双肺门周围{size}肺水肿。", "双肺{size}水肿改变。"),
        "consolidation": ("{side}肺{place}野{size}实变。", "{side}肺{place}部见{size}实变影。"),
        "pneumonia": ("{side}肺{place}野{size}斑片影，考虑肺炎。", "{side}肺{place}部{size}肺炎。"),
        "atelectasis": ("{side}肺底盘状肺不张。", "{side}肺基底部见条状不张。"),
        "pneumothorax": ("{side}侧{size}气胸。", "{side}侧胸腔见{size}气胸。"),
        "pleural effusion": ("{side}侧胸腔{size}积液。", "{side}侧胸膜腔见{size}液体。"),
        "pleural other": ("{side}侧胸膜增厚伴钙化。", "{side}侧胸膜肥厚。"),
        "fracture": ("{side}侧肋骨骨折。", "{side}侧肋骨骨折伴骨痂。"),
        "support devices": ("见中心静脉导管。", "上腔静脉内见导管影。"),
    },
}
NORMAL = {
    "en": {
        "lung": ("Both lungs are clear.", "No focal lesion is seen in the lungs."),
        "pleura": ("There is no pleural effusion or pneumothorax.", "The pleural spaces are free."),
        "heart": ("The heart is of normal size.", "Heart size is normal and the mediastinum is not widened."),
        "bone": ("No fracture is seen.", "The ribs are intact."),
    },
    "cn": {
        "lung": ("双肺野清晰。", "双肺未见实变或结节。"),
        "pleura": ("未见胸腔积液及气胸。", "胸膜腔未见异常。"),
        "heart": ("心脏大小正常。", "心影及纵隔不大。"),
        "bone": ("未见骨折。", "肋骨完整。"),
    },
}
REGIONS = {
    "lung": ("lung opacity", "lung lesion", "edema", "consolidation", "pneumonia", "atelectasis"),
    "pleura": ("pneumothorax", "pleural effusion", "pleural other"),
    "heart": ("enlarged cardiomediastinum", "cardiomegaly"),
    "bone": ("fracture",),
    "device": ("support devices",),
}
WORDS_CN = {**PLACES_CN, "small": "少量", "moderate": "中等", "large": "大量", "": ""}


def report(rng, findings: dict, language: str) -> str:
    """Write a sentence for each finding and for most regions without one, from the lungs to the devices."""
    sentences = []
    for region, names in REGIONS.items():
        present = [name for name in names if name in findings]
        for name in present:
            fill = dict(findings[name])
            if language == "cn":
                fill = {key: WORDS_CN[value] for key, value in fill.items()}
            fill["Size"] = fill["size"].capitalize()
            sentences.append(SENTENCES[language][name][rng.integers(2)].format(**fill))
        if not present and region in NORMAL[language] and rng.random() < 0.75:
            sentences.append(NORMAL[language][region][rng.integers(2)])
    if not findings and not sentences:
        sentences.append(NORMAL[language]["lung"][0])
    return (" " if language == "en" else "").join(sentences)


def label_row(findings: dict) -> list[int]:
    """Return the 14 codes of a labeler: 1 present, 2 absent in a region without findings, 0 otherwise."""
    row = [int(name in findings) for name in FINDINGS]
    row[-1] = int(not findings)
    for region in ("pleura", "heart", "bone"):
        if not any(name in findings for name in REGIONS[region]):
            for name in REGIONS[region]:
                row[FINDINGS.index(name)] = 2
    return row


def save_nifti(path, array):
    """Write an (H, W, D) array as a NIfTI file with an affine to RAS mm and the phantom's spacing."""
    affine = np.diag([-SPACING_MM[1], -SPACING_MM[0], SPACING_MM[2], 1.0])
    affine[:3, 3] = [MM[1].max(), MM[0].max(), -MM[2].max()]
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(1, 0, 2)), affine)
    # Noise does not compress; level 9 would take four times as long.
    path.write_bytes(gzip.compress(image.to_bytes(), 1))


def write_split(out: Path, split: str, code: int, count: int, seed: int, number: int) -> list[dict]:
    """Write the volumes and masks of one partition; return one record per phantom.

    code: the partition's index. Every phantom is a function of (seed, code, its index). number: of the
    volumes before these; a volume's name is its number over all partitions.
    """
    records = []
    for i in progress(range(count), desc=f"phantoms, {split}"):
        name, rng = str(number + i + 1), np.random.default_rng([seed, code, i])
        findings = draw_findings(rng)
        hu, bits = phantom(rng, findings)
        save_nifti(out / "volumes" / f"{name}.nii.gz", hu)
        save_nifti(out / "masks" / f"{name}.nii.gz", bits)
        texts = {language: report(rng, findings, language) for language in ("en", "cn")}
        records.append({"name": name, "findings": findings, "texts": texts})
    return records


def main(args):
    counts = {"train": args.train, "val": args.val, "test": args.test}
    out = Path(args.out)
    for folder in ("volumes", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "annotation_en.json").unlink(missing_ok=True)  # it is written last: a folder with it is complete

    partitions, number = {}, 0
    for code, (split, count) in enumerate(counts.items()):
        partitions[split] = write_split(out, split, code, count, args.seed, number)
        number += count
    phantoms = [record for records in partitions.values() for record in records]

    labels = [{"id": p["name"], **dict(zip(COLUMNS, label_row(p["findings"])))} for p in phantoms]
    atomic_csv(out / "CTRG_finding_labels.csv", labels)
    atomic_write(out / "attributes.json", json.dumps({p["name"]: p["findings"] for p in phantoms}))
    for language, file in (("cn", "annotation.json"), ("en", "annotation_en.json")):
        annotation = {
            split: [
                {"id": r["name"], "split": split, "impression": "", "finding": r["texts"][language]}
                for r in records
            ]
            for split, records in partitions.items()
        }
        atomic_json(out / file, annotation)
    words = np.mean([len(p["texts"]["en"].split()) for p in partitions["train"]])
    normal = np.mean([not p["findings"] for p in phantoms])
    print(
        f"{out}: {number} volumes {SIZE} at {SPACING_MM} mm, {words:.0f} English words a report, "
        f"{normal:.0%} without finding"
    )


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder to write; files of the same name are replaced")
    count = number(int, 1)
    add("--train", type=count, default=2000, help="training volumes")
    add("--val", type=count, default=200, help="validation volumes")
    add("--test", type=count, default=300, help="test volumes")
    seed = "a volume is a function of the seed, its partition and its index there"
    add("--seed", type=number(int, 0), default=0, help=seed)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
