"""flmm: the scripts as a user starts them; resume, several processes, one-line errors."""

import gc
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flmm.train as trainer
from common.errors import UserError
from flmm.scripts.demo import grounded_conversation_demo as demo
from flmm.scripts.visual_cot.visual_cot import contains, mask_to_crop
from tests import forked
from tests.flmm_world import make_world
from tests.parity import assert_same_first_step, assert_same_scores

ROOT = Path(__file__).resolve().parents[1]
world = pytest.fixture(make_world, scope="module", name="world")


def call(*arguments, cwd=ROOT, processes=1, ok=True):
    """Run a script in processes of its own; returns stdout, or stderr where it must fail with status 2."""
    done = forked.run_file(*arguments, cwd=cwd, processes=processes, CUDA_VISIBLE_DEVICES="")
    if ok:
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    [line] = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    return line


def train(world, out, *extra, **options):
    words = [*world.options, "--out", out, "--log-every", 1, *extra]
    return call(ROOT / "flmm/train.py", *words, **options)


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]  # the closing validation has a line of its own


@pytest.mark.slow
def test_resumed_equals_uninterrupted_to_the_bit_and_two_processes_equal_one(world, tmp_path):
    length = ("--max-steps", 3, "--batch-size", 4, "--save-every", 1)
    train(world, tmp_path / "whole", *length)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    for name in ("step-00000002", "step-00000003"):  # as if it had been stopped after the first step
        shutil.rmtree(tmp_path / "cut/checkpoints" / name)
    (tmp_path / "cut/head.safetensors").unlink()
    train(world, tmp_path / "cut", *length, "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 3
    one, cut = load_file(tmp_path / "whole/head.safetensors"), load_file(tmp_path / "cut/head.safetensors")
    assert all(torch.equal(one[k], cut[k]) for k in one)
    train(world, tmp_path / "two", "--max-steps", 1, "--batch-size", 2, processes=2)
    assert_same_first_step(tmp_path / "whole", tmp_path / "two")


@pytest.mark.slow
def test_no_step_needs_more_memory_than_an_earlier_one(world, tmp_path, monkeypatch):
    """Every step sees all eight pictures; bytes are counted by the allocator, so one kept map of one phrase
    would show."""
    gc.collect()  # what earlier tests left is not freed within a step
    steps, watch, original = [], [], trainer.lr_at

    def next_step(*args, **options):  # called once per optimizer step
        if watch:
            watch[0].__exit__(None, None, None)
            events = watch.pop().profiler.kineto_results.events()
            sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
            steps.append((max(np.cumsum(sizes)), sum(sizes)))
        cpu = [torch.profiler.ProfilerActivity.CPU]
        watch.append(torch.profiler.profile(activities=cpu, profile_memory=True))
        watch[0].__enter__()
        return original(*args, **options)

    monkeypatch.setattr(trainer, "lr_at", next_step)
    length = ["--batch-size", 8, "--max-steps", 9, "--log-every", 3, "--out", tmp_path / "run"]
    in_process(trainer.main, trainer.parse_args, monkeypatch, *world.options, *length)
    watch[0].__exit__(None, None, None)
    peaks, kept = zip(*steps)
    # the order of the pictures moves the peak by three per cent
    assert len(steps) == 8 and max(peaks[4:]) <= 1.05 * max(peaks[1:4]), peaks
    assert abs(sum(kept[2:])) < 2000, kept  # nothing stays behind: one phrase's maps alone are 3 KB


@pytest.mark.slow
def test_a_sharded_base_gives_the_losses_of_the_whole_one(world, tmp_path):
    held = []
    for name, options in (("whole", []), ("sharded", ["--shard-base"])):
        out = train(world, tmp_path / name, "--max-steps", 1, "--batch-size", 2, *options, processes=2)
        held.append(int(re.search(r"([\d,]+) held by this process", out)[1].replace(",", "")))
    assert held[1] < 0.8 * held[0]
    assert_same_first_step(tmp_path / "whole", tmp_path / "sharded")
    assert "needs several processes" in train(world, tmp_path / "one", "--shard-base", ok=False)


@pytest.mark.slow
def test_a_head_is_trained_from_the_cache_scored_and_used(world, tmp_path):
    head, cache = tmp_path / "run/head.safetensors", tmp_path / "cache"
    options = ("--max-steps", 2, "--batch-size", 4, "--cache-attention", cache)
    out = train(world, tmp_path / "run", *options)
    assert "base: cached features" in out and "val_miou" in out
    shutil.rmtree(cache / "val")  # as if the first run had been cut short: only what is missing is written
    written = (cache / "train/features-00000.h5").stat().st_mtime_ns
    again = train(world, tmp_path / "again", *options, "--targets", "original")
    assert "base: cached features" in again and "val_miou" in again
    assert (cache / "train/features-00000.h5").stat().st_mtime_ns == written

    scoring = [ROOT / "flmm/test.py", *world.options, "--head", head]
    scoring += ["--controls", "--pictures", 2, "--out"]
    text = call(*scoring, tmp_path / "test")
    call(*scoring, tmp_path / "two", processes=2)  # the same scores, phrase by phrase
    for file in ("phrases.csv", "results.json"):
        assert_same_scores(tmp_path / "test" / file, tmp_path / "two" / file)
    results = json.loads((tmp_path / "test/results.json").read_text())
    controls = {"whole", "centre", "union", "other", "other_coarse", "raw", "mean", "heads", "fusion"}
    assert set(results["controls"]) == controls and f"{results['phrases']} phrases" in text
    assert len(list((tmp_path / "test/overlays").glob("*.png"))) == 2
    assert len(json.loads((tmp_path / "test/masks.json").read_text())) == results["phrases"]

    Image.new("CMYK", (50, 40)).save(tmp_path / "p.jpg")
    script = ROOT / "flmm/scripts/demo/grounded_conversation_demo.py"
    asked = ["--image", tmp_path / "p.jpg", "--text", "a red car; sky", "--out", tmp_path / "g"]
    out = call(script, *world.options[:2], "--head", head, *asked, cwd=script.parent)
    assert out.count("score") == 2 and (tmp_path / "g.png").is_file()
    assert json.loads((tmp_path / "g.json").read_text())["phrases"] == ["a red car", "sky"]


@pytest.mark.parametrize("steps", [4, 640])
def test_the_demo_says_that_its_head_comes_from_a_smoke_run(tmp_path, monkeypatch, capsys, steps):
    head = tmp_path / "flmm/head-llava-0/head.safetensors"
    head.parent.mkdir(parents=True)
    head.write_bytes(b"")
    (head.parent / "metrics.json").write_text(json.dumps({"steps": steps}))
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr(demo.Grounder, "load", lambda config, head, selector: head)
    assert demo.load_grounder(demo.parse_args(["--image", "p.png"])) == head
    assert ("trained for 4 steps, as --smoke does" in capsys.readouterr().err) == (steps == 4)


def in_process(main, parse, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main(parse())


@pytest.mark.parametrize(
    "arguments,reason",
    [
        (["--image", "{world}/none.jpg", "--text", "x"], "none.jpg: no such file"),
        (["--image", "{world}/p.png", "--text", " ; x"], "empty phrase"),
        # whatever the base is, it is not loaded before the head was found
        (["--image", "{world}/p.png", "--text", "x"], "none.pth: no such weight file"),
    ],
)
def test_the_demo_refuses_before_it_writes(world, tmp_path, monkeypatch, arguments, reason):
    Image.new("RGB", (40, 30)).save(world.folder / "p.png")
    arguments = [a.format(world=world.folder) for a in arguments]
    with pytest.raises(UserError, match=reason):
        options = [*world.options[:2], "--head", "none.pth", "--out", tmp_path / "refused"]
        in_process(demo.main, demo.parse_args, monkeypatch, *options, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments,reason",
    [
        (["--data", "/nowhere"], "nowhere"),
        (["--set", "base.family=gpt"], "base.family is 'gpt'"),
        (["--set", "base.family=mgm"], "no class for this base"),
        (["--set", "sam.path=/nowhere/sam.pth"], "sam.path /nowhere/sam.pth: no such file"),
    ],
)
def test_train_refuses_before_it_makes_a_run_folder(world, tmp_path, monkeypatch, arguments, reason):
    arguments = [*world.options, "--out", tmp_path / "x", *arguments]
    with pytest.raises(UserError, match=reason):
        in_process(trainer.main, trainer.parse_args, monkeypatch, *arguments)
    assert not (tmp_path / "x").exists()


def test_a_refusal_is_one_line_and_status_two(tmp_path):
    words = ["--config", tmp_path / "none.yaml", "--data", tmp_path, "--out", tmp_path / "x"]
    line = call(ROOT / "flmm/train.py", *words, ok=False)
    assert "none.yaml: no such file" in line


def test_crop_of_a_chain_of_thought_is_clipped_and_scored_offline():
    mask = torch.zeros(40, 60)
    mask[10:12, 50:52] = 1
    assert mask_to_crop(mask, 1.0) == [42, 2, 58, 18]  # at least 8 pixels to each side
    assert mask_to_crop(mask, 9.0) == [0, 0, 60, 40]
    assert contains("It says STOP.", "stop") == 1 and contains("go", "stop") == 0
    assert contains("I do not know", "no") == 0 and contains("一辆红色的车", "红色。") == 1
