"""The five projects' trainings under DDP and FSDP2: train, save, go on with two processes or one, export."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import cwt_mae.finetune
import cwt_mae.train
import em_mllm.finetune
import flmm.train
from common.errors import UserError
from common.sharding import refuse_sharding
from tests import toy_run
from tests.sharded import checkpoint_weights, deepspeed_2_on_cpu, deepspeed_3_on_cpu, fsdp2_on_cpu, world
from tests.worlds import ct, cwt, em, grounding, llm  # noqa: F401  fixtures

pytestmark = pytest.mark.slow
SHARDED = [("em", "pretrain"), ("em", "train"), ("ct", "train"), ("llm", "heal")]
WHOLE = [cwt_mae.train, cwt_mae.finetune, em_mllm.finetune, flmm.train]
DDP = [("cwt", "train"), ("cwt", "finetune"), ("grounding", "train")]


class Training:
    """One project's training of two steps; each is saved."""

    def __init__(self, request, tmp_path):
        name, command = request.param
        self.name = command
        self.more = ["--head", "mlp"] if command == "finetune" else []  # the other head has dropout
        self.folder, self.tmp = request.getfixturevalue(name), tmp_path
        self.script, self.arguments = self.folder.commands[command]

    def __call__(self, out, *more, processes=2, sharded=False):
        line = [str(a) for a in self.arguments(self.folder.folder)]
        line[line.index(str(self.folder.folder / "run"))] = str(out)
        line = [a for a in line if a != "--overwrite"]
        line += ["--max-steps", "2", "--save-steps", "1", "--logging-steps", "1", *self.more, *map(str, more)]
        # as many samples in a step with one process as with two
        line += ["--per-device-train-batch-size", 2 // processes]
        before = fsdp2_on_cpu if sharded else None
        return world(self.script, line, self.tmp / "log", processes, before)


@pytest.fixture(params=SHARDED, ids=["-".join(t) for t in SHARDED])
def training(request, tmp_path):
    return Training(request, tmp_path)


def step(out, number):
    return checkpoint_weights(out / f"checkpoints/step-{number:08d}")


def exported(out):
    """{file: {key: tensor}} of what a run leaves for other scripts."""
    files = {}
    for path in sorted(p for p in out.rglob("*") if "checkpoints" not in p.parts and "last" not in p.parts):
        if path.suffix == ".safetensors":
            files[str(path.relative_to(out))] = load_file(path)
        elif path.suffix == ".bin":
            files[str(path.relative_to(out))] = torch.load(path, weights_only=True)
    return files


def assert_near(one, two, start=None):
    """Equal keys, and tensors whose difference is small beside what the last step changed: Adam makes a whole
    step of a gradient near zero, whatever its sign."""
    both = one.keys() & two.keys()  # a whole checkpoint keeps shared tensors under one of their names
    assert both == min(one.keys(), two.keys(), key=len)
    change = sum((one[k] - start[k]).double().square().sum() for k in both) if start else None
    error = sum((one[k] - two[k]).double().square().sum() for k in both)
    scale = change if start else sum(one[k].double().square().sum() for k in one)
    assert scale > 0 and (error / scale).sqrt() < (0.05 if start else 1e-4), (error, scale)


def cut(out, to):
    """A copy of a run that has only its first step."""
    shutil.copytree(out / "checkpoints/step-00000001", to / "checkpoints/step-00000001")
    shutil.copy(out / "config.json", to)
    return to


def test_a_sharded_run_saves_resumes_on_two_and_one_and_exports_the_whole_model(training, tmp_path):
    runs = {"ddp": False, "fsdp2": True}
    for name, sharded in runs.items():
        done = training(tmp_path / name, sharded=sharded)
        assert done.returncode == 0, done.text
    start, end = step(tmp_path / "ddp", 1), step(tmp_path / "ddp", 2)
    assert_near(end, step(tmp_path / "fsdp2", 2), start)

    # what others read has the same keys and shapes, and the values that were trained
    one, two = exported(tmp_path / "ddp"), exported(tmp_path / "fsdp2")
    assert one.keys() == two.keys() and one
    for file in one:
        assert {k: v.shape for k, v in one[file].items()} == {k: v.shape for k, v in two[file].items()}
        assert_near(one[file], two[file])

    # either kind of checkpoint goes on, sharded or not, on two processes or one
    assert list((tmp_path / "fsdp2/checkpoints/step-00000001").glob("pytorch_model_fsdp_0/*.distcp"))
    for name, origin, processes, sharded in (
        ("shards on two", "fsdp2", 2, True),
        ("shards on one", "fsdp2", 1, False),
        ("whole to shards", "ddp", 2, True),
        ("whole on one", "ddp", 1, False),
    ):
        if name == "whole to shards" and "heal" not in training.name:
            continue  # the code is common's: one project shows it
        out = cut(tmp_path / origin, tmp_path / name)
        done = training(out, "--resume", processes=processes, sharded=sharded)
        assert done.returncode == 0 and "resumed from" in done.text, (name, done.text)
        assert_near(end, step(out, 2), start)


@pytest.mark.parametrize("training", DDP, ids=["-".join(t) for t in DDP], indirect=True)
def test_a_run_of_two_processes_goes_on_with_two_and_with_one(training, tmp_path):
    done = training(tmp_path / "ddp")
    assert done.returncode == 0, done.text
    start, end = step(tmp_path / "ddp", 1), step(tmp_path / "ddp", 2)
    for processes in (2, 1):
        out = cut(tmp_path / "ddp", tmp_path / f"on {processes}")
        done = training(out, "--resume", processes=processes)
        assert done.returncode == 0 and "resumed from" in done.text, done.text
        assert_near(end, step(out, 2), start)
        one, two = exported(tmp_path / "ddp"), exported(out)
        assert one.keys() == two.keys() and one
        for file in one:
            assert_near(one[file], two[file])


@pytest.mark.parametrize("script", WHOLE)
def test_small_models_refuse_to_be_sharded_in_one_line(script, tmp_path):
    scenes = Path(flmm.train.__file__).parent / "configs/tiny/scenes.yaml"
    options = {
        flmm.train: ["--config", scenes, "--base-path", "none"],
        cwt_mae.finetune: ["--task", "rhythm", "--pretrained", "none"],
        em_mllm.finetune: ["--train", "none", "--test", "none", "--encoder", "cnn"],
    }
    data = [] if script is em_mllm.finetune else ["--data", "none"]
    line = [*data, "--out", tmp_path / "run", *options.get(script, [])]
    done = world(script, line, tmp_path / "log", before=fsdp2_on_cpu)
    assert done.returncode == 2 and "Traceback" not in done.text, done.text
    said = [line for line in done.text.splitlines() if line.startswith("error: FSDP2 would")]
    assert len(said) == 1 and "leave ACCELERATE_CONFIG unset" in said[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_small_models_refuse_deepspeed_too(stage):
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(is_fsdp2=False, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(UserError, match=f"ZeRO stage {stage} would spread this model .*, but use DDP"):
        refuse_sharding(accelerator, "use DDP")


@pytest.mark.parametrize("mode", [fsdp2_on_cpu, deepspeed_2_on_cpu, deepspeed_3_on_cpu])
def test_every_mode_clips_warms_up_and_accumulates_as_one_process(tmp_path, mode):
    if mode is not fsdp2_on_cpu:
        pytest.importorskip("deepspeed")
    options = ["--max-steps", 4, "--save-every", 2, "--clip", 0.3, "--warmup", 3]

    def run(name, *more, processes=2, before=mode):
        samples = ["--batch-size", 8 // processes, "--accum", 2]
        line = ["--out", tmp_path / name, *options, *samples, *more]
        done = world(toy_run, line, tmp_path / "log", processes, before)
        assert done.returncode == 0, done.text
        return [line for line in done.text.splitlines() if line.startswith(("step", "final"))]

    def numbers(line):
        return [float(part.split()[1]) for part in line.split(" | ")[1:4]]

    one, many = run("one", processes=1, before=None), run("many")
    assert len(one) == len(many) == 5
    for a, b in zip(one[:4], many):
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-3)
    shutil.rmtree(tmp_path / "many/checkpoints/step-00000004")
    again = run("many", "--resume")
    assert [numbers(line) for line in again[:2]] == [numbers(line) for line in many[2:4]]
    if mode is not fsdp2_on_cpu:
        done = world(toy_run, ["--out", tmp_path / "many", "--resume"], tmp_path / "log", 1)
        assert done.returncode == 2 and "resume it with ACCELERATE_CONFIG=zero2 or zero3" in done.text


def test_muon_needs_whole_matrices(request, tmp_path):
    folder = request.getfixturevalue("em")
    script, arguments = folder.commands["pretrain"]
    line = [*map(str, arguments(folder.folder)), "--optimizer", "muon"]
    done = world(script, line, tmp_path / "log", before=fsdp2_on_cpu)
    assert done.returncode == 2 and "take --optimizer adamw" in done.text
