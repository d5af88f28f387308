"""flmm: every option of the two train scripts has its effect; no split leaks into another."""

import hashlib
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import flmm.scripts.train_keyword_selector as selector_script
import flmm.test
import flmm.train
from common.errors import Interrupted, UserError
from flmm import make_data
from flmm.build import build_dataset, read_config
from flmm.data.samples import SampleBuilder
from flmm.evaluation import RawMaps
from flmm.models.flmm import FLMM
from flmm.models.frozen_llava import FrozenLlava
from studies.flmm.pretrain_base import FreshScenes
from studies.flmm.pretrain_sam import Prompts
from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects
from tests.flmm_world import make_world
from tests.parity import assert_same_first_step

SPLITS = ("train", "val", "test", "overlap")
world = pytest.fixture(make_world, scope="module", name="world")


def train(extra, out, options):
    """flmm/train.py in this process."""
    words = [*options, "--log-every", 1, "--save-every", 1, "--batch-size", 4, *extra, "--out", out]
    flmm.train.main(flmm.train.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def head(world):
    train(["--max-steps", 1], world.folder / "run", world.options)
    return world.folder / "run/head.safetensors"


# --- options


@pytest.mark.slow
def test_every_option_of_train_has_its_effect(world, head, tmp_path):
    cache = ["--cache-attention", world.folder / "effects-cache"]
    check_effects(
        flmm.train,
        [*RUN_BASE, *world.options],
        {
            **RUN_FLAGS,
            "--config": "names the model: tests/test_flmm_data.py",
            "--data": "the data itself: tests/test_flmm_data.py",
            "--set": [
                Effect("unet.base_channels=8", "shape"),
                Effect("optim.coarse_first=2", "weights"),
                Effect("optim.mask_weight=0", "weights"),
                Effect("unet.log_maps=true", "weights"),
                Effect("data.val=null", "predictions"),
            ],
            "--base-path": Effect(world.folder / "base-1", "weights"),
            "--random-base": Effect(3, "weights"),
            "--attention": [
                Effect("eager", "weights"),  # equal up to rounding: tests/test_flmm.py
                Effect("eager", "refused", given=cache),  # the features are there already
            ],
            "--shard-base": Effect(True, "refused"),  # with two processes: tests/test_flmm_train.py
            "--cache-attention": Effect(world.folder / "another-cache", "text"),
            "--init-head": Effect(head, "weights"),
            "--targets": Effect("original", "weights"),
            "--skip-bad": "what is left out: test_what_cannot_be_read_is_left_out_and_counted",
            "--eval-every": [
                Effect(1, ("log", "same weights")),
                Effect(1, "refused", given=["--set", "data.val=null"]),
            ],
        },
        tmp_path,
    )


def test_a_cache_knows_its_precision_and_the_expressions_that_were_drawn():
    drawn, fixed = {"type": "refcoco"}, {"type": "refcoco", "text_mode": "select_first"}
    config = {"base": {}, "sam": {}, "data": {"train": [drawn], "val": [fixed]}}

    def made(*options):
        args = flmm.train.parse_args(["--config", "c.yaml", "--data", "d", "--out", "o", *options])
        return [flmm.train.made_from(config, split, args) for split in ("train", "val")]

    plain, seeded, rounded = made(), made("--seed", "2"), made("--precision", "bf16")
    assert plain[0] != seeded[0] and plain[1] == seeded[1]
    assert plain[0] != rounded[0] and plain[1] != rounded[1]


@pytest.mark.slow
def test_what_cannot_be_read_is_left_out_and_counted(world, head, tmp_path, capsys):
    data = shutil.copytree(world.folder / "data", tmp_path / "data")
    config = read_config(world.folder / "config.yaml")
    names = {split: build_dataset(config, split, data).record(0)["file_name"] for split in ("train", "test")}
    for name in names.values():  # found only when the picture is decoded
        (data / "png/images" / name).write_bytes(b"no picture")
    captions = json.loads((data / "png/png_coco_train.json").read_text())
    captions[1]["segments"][1]["segment_ids"] = ["987"]  # found at once
    (data / "png/png_coco_train.json").write_text(json.dumps(captions))
    options = ["--config", world.folder / "config.yaml", "--data", data]
    with pytest.raises(UserError, match="segment 987 .* is not in segments_info"):
        train(["--max-steps", 1], tmp_path / "run", options)
    train(["--max-steps", 2, "--skip-bad"], tmp_path / "run", options)
    told = capsys.readouterr()
    assert "1 bad items were left out, the first:" in told.err and f"{names['train']}: not a" in told.err
    words = [*options, "--split", "test", "--head", head, "--out", tmp_path / "test"]
    with pytest.raises(UserError, match=f"{names['test']}: not a readable picture"):
        flmm.test.main(flmm.test.parse_args([str(word) for word in words]))
    words += ["--skip-bad", "--overwrite"]
    flmm.test.main(flmm.test.parse_args([str(word) for word in words]))
    files = {row["file"] for row in json.loads((tmp_path / "test/masks.json").read_text())}
    assert len(files) == 2 and names["test"] not in files
    assert json.loads((tmp_path / "test/results.json").read_text())["skipped"] == 1


@pytest.mark.slow
def test_every_option_of_the_keyword_selectors_training_has_its_effect(world, tmp_path):
    check_effects(
        selector_script,
        [*RUN_BASE, *world.options, "--records", 8, "--lr", 0.1],
        {
            **RUN_FLAGS,
            "--config": "names the model: tests/test_flmm_data.py",
            "--data": "the data itself: tests/test_flmm_data.py",
            "--set": Effect(f"base.path={world.folder / 'base-1'}", "weights"),
            "--records": Effect(5, "weights"),
            "--val-records": Effect(1, "predictions"),
        },
        tmp_path,
    )


def test_a_selectors_data_are_checked_before_its_base_is_loaded(world, tmp_path):
    words = [*world.options, "--set", "base.path=nowhere", "data.val=null", "--out", tmp_path / "selector"]
    with pytest.raises(UserError, match="names no data for 'val'"):
        selector_script.main(selector_script.parse_args([str(word) for word in words]))


def test_what_the_configuration_says_about_training_holds_until_the_command_line_says_otherwise():
    recipe = {
        "lr": 0.5,
        "epochs": 7,
        "batch_size": 6,
        "accum": 3,
        "weight_decay": 0.2,
        "warmup": 9.0,
        "clip": 2.0,
    }
    args = flmm.train.parse_args("--config c --data d --out o --learning-rate 0.1 --accum 2".split())
    flmm.train.settle_options(args, {"optim": recipe, "base": {}})
    for name, value in {**recipe, "lr": 0.1, "accum": 2}.items():
        assert getattr(args, name) == value, name


def test_a_warm_up_rounds_down_as_mmengines_does():
    assert [flmm.train.warmup_steps(0.03, steps) for steps in (20, 34, 66, 640)] == [0, 1, 1, 19]
    assert flmm.train.warmup_steps(5, 100) == 5


@pytest.mark.slow
def test_the_learning_rate_rises_and_falls_as_mmengine_lets_it(world, tmp_path):
    """LinearLR from 1e-5 of the peak over the warm-up, then CosineAnnealingLR to zero, by optimizer step."""
    extra = ["--max-steps", 8, "--warmup", 4, "--lr", 1e-3]
    train(extra, tmp_path / "run", world.options)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    rising = [1e-5 + (1 - 1e-5) * k / 3 for k in range(4)]
    falling = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    factors = [line["lr"] / 1e-3 for line in lines if "lr" in line]
    assert factors == pytest.approx(rising + falling, abs=1e-9)


def test_the_weight_decay_holds_for_every_trained_tensor(world, tmp_path, monkeypatch):
    """As upstream: also for vectors, which the other rooms leave out."""
    made = []
    original = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    train(["--max-steps", 1, "--weight-decay", 0.25], tmp_path / "run", world.options)
    [group] = made[0].param_groups
    assert group["weight_decay"] == 0.25 and group["betas"] == (0.9, 0.999)
    assert any(p.ndim == 1 for p in group["params"])


# --- the loop


@pytest.mark.slow
def test_accumulated_pictures_weigh_every_phrase_as_one_batch_does(world, tmp_path):
    for batch, accum in ((4, 1), (1, 4)):
        extra = ["--max-steps", 1, "--batch-size", batch, "--accum", accum]
        train(extra, tmp_path / f"{batch}", world.options)
    assert_same_first_step(tmp_path / "4", tmp_path / "1")


def test_a_stop_signal_in_the_closing_validation_ends_the_run_at_once(world, tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def validate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the validation went on")

    monkeypatch.setattr(flmm.train, "validate", validate)
    try:
        with pytest.raises(Interrupted, match="step-00000002"):
            train(["--max-steps", 2], tmp_path / "run", world.options)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not (tmp_path / "run/head.safetensors").exists()


def test_a_loss_that_is_not_finite_is_refused_by_name_and_never_saved(world, tmp_path, monkeypatch):
    original, calls = FLMM.compute_loss, []

    def poisoned(self, outputs, masks):
        calls.append(1)
        parts = original(self, outputs, masks)
        return {name: value * math.nan for name, value in parts.items()} if len(calls) == 3 else parts

    monkeypatch.setattr(FLMM, "compute_loss", poisoned)
    extra = ["--max-steps", 4, "--batch-size", 2, "--accum", 2, "--log-every", 50]
    with pytest.raises(UserError, match="loss is nan at step 2; batch: 0000100"):
        train(extra, tmp_path / "run", world.options)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


# --- what reaches the model


def digest(sample) -> str:
    """A sample's picture as the base sees it."""
    return hashlib.sha256(sample["pixel_values"].numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def arrays(world):
    """{split: (names, digests)} as the data sets give them."""
    base = FrozenLlava.load(world.folder / "base-0", template="plain", question="Describe.")
    config, builder = read_config(world.folder / "config.yaml"), SampleBuilder.of(base)
    found = {}
    for split in (*SPLITS, "refcoco_test"):
        data = build_dataset(config, split, world.folder / "data", builder)
        samples = [data[i] for i in range(len(data))]
        found[split] = ({s["file_name"] for s in samples}, {digest(s) for s in samples})
        assert len(found[split][1]) == len(samples)
    return found


def test_no_picture_of_one_split_is_in_another_by_name_or_by_content(arrays):
    for i, one in enumerate(SPLITS):
        for two in SPLITS[i + 1 :]:
            assert not arrays[one][0] & arrays[two][0] and not arrays[one][1] & arrays[two][1], (one, two)
    assert arrays["refcoco_test"] == arrays["test"]  # two formats of the same scenes


def spy(monkeypatch, module):
    """Collect what the base sees: (gradients are on, digest)."""
    seen, original = [], module.extract

    def extract(base, encoder, samples, **options):
        seen.extend((torch.is_grad_enabled(), digest(sample)) for sample in samples)
        return original(base, encoder, samples)

    monkeypatch.setattr(module, "extract", extract)
    return seen


def test_training_sees_training_pictures_alone_and_validation_the_others(
    world, arrays, tmp_path, monkeypatch
):
    seen = spy(monkeypatch, flmm.train)
    train(["--max-steps", 2], tmp_path / "run", world.options)
    assert {d for learning, d in seen if learning} == arrays["train"][1]
    assert {d for learning, d in seen if not learning} == arrays["val"][1]


@pytest.mark.slow
def test_a_cache_holds_each_split_apart(world, arrays, tmp_path):
    train(["--max-steps", 1, "--cache-attention", tmp_path / "cache"], tmp_path / "run", world.options)
    for split in ("train", "val"):
        cached = flmm.train.CachedFeatures(tmp_path / "cache" / split)
        assert {cached[i]["file_name"] for i in range(len(cached))} == arrays[split][0]


def test_scores_are_of_the_asked_split_and_the_raw_map_is_chosen_without_it(
    world, head, arrays, tmp_path, monkeypatch
):
    seen, fitted = spy(monkeypatch, flmm.test), []
    original = RawMaps.fit

    def fit(self, feature, gt):
        fitted.append(hashlib.sha256(gt.numpy().tobytes()).hexdigest())
        original(self, feature, gt)

    monkeypatch.setattr(RawMaps, "fit", fit)
    words = [*world.options, "--head", head, "--controls", "--pictures", 0, "--out", tmp_path / "test"]
    flmm.test.main(flmm.test.parse_args([str(word) for word in words]))
    assert {d for _, d in seen} == arrays["test"][1]
    data = build_dataset(read_config(world.folder / "config.yaml"), "train", world.folder / "data", None)
    masks = [torch.from_numpy(data.record(i)["masks"]) for i in range(len(data))]
    assert fitted == [hashlib.sha256(m.numpy().tobytes()).hexdigest() for m in masks]


def test_the_keyword_selector_learns_from_training_captions_and_is_scored_on_others(
    world, arrays, tmp_path, monkeypatch
):
    learned, scored = set(), set()
    loss, score = selector_script.keyword_loss, selector_script.score

    def keyword_loss(selector, captions, device):
        learned.update(caption["name"] for caption in captions)
        return loss(selector, captions, device)

    def scores(selector, captions, device):
        scored.update(caption["name"] for caption in captions)
        return score(selector, captions, device)

    monkeypatch.setattr(selector_script, "keyword_loss", keyword_loss)
    monkeypatch.setattr(selector_script, "score", scores)
    words = [*world.options, "--max-steps", 2, "--batch-size", 4, "--out", tmp_path / "selector"]
    selector_script.main(selector_script.parse_args([str(word) for word in words]))
    assert learned == arrays["train"][0] and scored == arrays["val"][0]


def test_scenes_take_the_place_of_nothing_else(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="holds something else; choose a new folder"):
            make_data.main(make_data.parse_args(["--out", str(out)]))


def test_the_scenes_of_pre_training_are_in_no_split(monkeypatch):
    """A scene is named by seed and index, so the ranges of indices of the three scripts must not touch."""
    for module in ("studies.flmm.pretrain_base", "studies.flmm.pretrain_sam"):
        monkeypatch.setattr(f"{module}.make_scene", lambda seed, index, **_: index)
    monkeypatch.setattr("studies.flmm.pretrain_base.SampleBuilder.of", lambda base: None)
    base, most = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0)), 10**7
    for seed in (0, 9, 99):
        first, second = FreshScenes(base, seed, most), Prompts(seed, most)
        assert max(make_data.FIRST_INDEX.values()) + most <= first.scene(0)
        assert first.scene(most) < second.scene(0)


# --- scores of the selector


def test_f1_equals_that_of_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.rand(n, generator=generator) > 0.4, torch.rand(n, generator=generator) > 0.6) for n in (9, 30)
    ]
    predicted, wanted = (torch.cat(part).numpy() for part in zip(*pairs))
    precision, recall, f1, _ = precision_recall_fscore_support(wanted, predicted, average="binary")
    ours = selector_script.f1(pairs)
    assert [ours[k] for k in ("precision", "recall", "F1")] == pytest.approx(
        [precision, recall, f1], abs=1e-6
    )
