"""dia_pangu: training and its launcher, resume, processes, dry run, one scan."""

import csv
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common.train
from dia_pangu.src import test as report_script
from dia_pangu.src import train as script
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Model.build import build_model, save_model
from dia_pangu.src.Model.multimodality_model import TRAINED
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
from studies.recipe import options
from tests import forked
from tests.golden import ROOT
from tests.parity import assert_same_first_step
from tests.quick_python import python
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL, call


def train(data, llm, out, *more, processes=1):
    """Train stage ft for a few steps; more: further options."""
    config = out.parent / "small.json"
    config.write_text(json.dumps(SMALL))
    named = {"data": data, "lang_encoder_path": llm, "config": config, "out": out}
    usual = {"stage": "ft", "lora_dropout": 0, "lr": 3e-3, "warmup": 2, "log_every": 1, "flip": 0.1}
    return forked.run_file(
        ROOT / "dia_pangu/train.py", *options({**named, **usual}), *more, processes=processes
    )


def curve(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_accumulation_and_processes_give_the_same_first_step(data, llm, tmp_path):
    one_step = ["--max-steps", 1, "--lr-scheduler-type", "constant_with_warmup"]
    for name, batch, accum, processes in (("whole", 4, 1, 1), ("accumulated", 1, 4, 1), ("two", 2, 1, 2)):
        sizes = ["--batch-size", batch, "--accum", accum]
        done = train(data, llm, tmp_path / name, *one_step, *sizes, processes=processes)
        assert done.returncode == 0, done.stderr
    for name in ("accumulated", "two"):
        assert_same_first_step(tmp_path / "whole", tmp_path / name)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(data, llm, tmp_path):
    steps = ["--max-steps", 4, "--batch-size", 4, "--accum", 1, "--save-every", 2]
    whole = train(data, llm, tmp_path / "whole", *steps)
    assert whole.returncode == 0, whole.stderr
    reference = curve(tmp_path / "whole")
    assert len(reference) == 4 and all(np.isfinite(list(reference.values())))
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000004")
    weights = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    again = train(data, llm, tmp_path / "whole", *steps, "--resume")
    assert again.returncode == 0 and "resumed from" in again.stdout, again.stderr
    resumed = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert curve(tmp_path / "whole") == reference
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["lora_alpha"] == 16


def stop_in_each_step():
    """In the fork: a stop signal arrives while the first step is counted, which here also saves."""
    plain = common.train.update

    def update(*arguments):
        norm = plain(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return norm

    script.update = update


def test_a_stop_in_a_step_that_also_saves_is_obeyed(data, llm, tmp_path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(SMALL))
    arguments = ["--data", data, "--lang-encoder-path", llm, "--config", config, "--out", tmp_path / "run"]
    arguments += ["--max-steps", 4, "--batch-size", 2, "--accum", 1, "--save-every", 1]
    done = forked.call(script, arguments, tmp_path / "log.txt", before=stop_in_each_step)
    assert done.returncode == 128 + signal.SIGTERM and "run the same command with --resume" in done.text, (
        done.text
    )
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(data, llm, tmp_path):
    done = train(data, llm, tmp_path / "run", "--max-steps", 8, "--save-every", 1, "--lr", 1e20, "--accum", 1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "batch: " in errors[0], done.stderr
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        for file in folder.glob("*.safetensors"):
            assert all(torch.isfinite(value).all() for value in load_file(file).values()), file


def test_gradient_checkpointing_keeps_the_gradient_and_recomputes(llm, data):
    """The gradients are equal, and a layer runs forward a second time."""
    gradients, calls = {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, text = build_model(SMALL, llm)
        model.set_trained(TRAINED["pre"])
        if checkpointing:
            options = {"use_reentrant": False}
            model.lang_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()
        count = []
        layer = model.lang_model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        batch = collate([CTRGDataset(data, "train", Grid((16, 16, 16)), text)[0]])
        model(**{key: batch[key] for key in script.BATCH_KEYS})["loss"].backward()
        gradients[checkpointing], calls[checkpointing] = (
            model.embedding_layer.perceiver.latents.grad,
            len(count),
        )
    assert torch.allclose(gradients[True], gradients[False], atol=1e-6)
    assert calls == {False: 1, True: 2}


@pytest.mark.slow
def test_dry_run_counts_the_published_parameters_without_weights(llm, tmp_path):
    folder = tmp_path / "pangu"
    folder.mkdir()
    widths = {"hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 34}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "bias": True, "rms_norm_eps": 1e-5}
    rest = {"rope_theta": 16000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False}
    config = {"model_type": "PanguEmbedded", "vocab_size": 153376, **widths, **heads, **rest}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--stage", "ft", "--data", tmp_path, "--out", tmp_path / "o", "--dry-run"]
    done = call(script, *arguments, "--lang-encoder-path", folder, log=tmp_path / "log.txt")
    assert done.returncode == 0, done.text
    layer = MyEmbedding(num_embeddings=1, embedding_dim=4096)
    vision = sum(p.numel() for n, p in layer.named_parameters() if n != "weight")
    assert f"{8030887936 + 1810432 + vision:,} parameters" in done.text
    assert "trains lang_model (LoRA): 136 tensors, 1,810,432 values" in done.text
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_user_errors_are_one_line(data, llm, tmp_path):
    for arguments, message in (
        (["--data", tmp_path / "nowhere", "--lang-encoder-path", llm], "no such data folder"),
        (["--data", data, "--lang-encoder-path", tmp_path], "no config.json"),
        (["--data", data], "--lang-encoder-path is needed"),
        (["--data", data, "--lang-encoder-path", llm, "--train", "nothing"], "no parameter has such a name"),
        (
            ["--data", data, "--lang-encoder-path", llm, "--lr-scheduler-type", "constant", "--warmup", 5],
            "--warmup has no effect",
        ),
    ):
        done = call(script, "--size", "tiny", "--out", tmp_path / "out", *arguments, log=tmp_path / "log.txt")
        errors = [line for line in done.text.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.text
        assert "Traceback" not in done.text and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_scan_gives_a_report(data, llm, tmp_path):
    model, _ = build_model(SMALL, llm)
    save_model(model.state_dict(), tmp_path / "model", SMALL)
    arguments = ["--ckpt-path", tmp_path / "model", "--lang-encoder-path", llm, "--max_new_tokens=8"]
    arguments += ["--volume", data / "volumes" / "3.nii.gz", "--out", tmp_path / "out"]
    done = call(report_script, *arguments, log=tmp_path / "log.txt")
    assert done.returncode == 0, done.text
    with open(tmp_path / "out" / "dia-pangu.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ID"] for row in rows] == ["3"]
    assert list(rows[0]) == ["ID", "Question", "Ground Truth", "Pred", "GT_labels"]
    with open(tmp_path / "out" / "findings.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 14
    assert (tmp_path / "out" / "evidence" / "3.png").stat().st_size > 5000
    for option in (["--limit", 3], ["--top-k", 5], ["--control", "swap"]):  # without effect for one scan
        done = call(report_script, *arguments, *option, log=tmp_path / "log.txt")
        assert done.returncode == 2 and f"error: {option[0]}" in done.text, done.text


@pytest.mark.slow
def test_the_launcher_works_from_elsewhere(data, llm, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    given = {"DATA": str(data), "LLM": str(llm), "OUT": "run", "PYTHON": python(), "NPROC_PER_NODE": "1"}
    flags = "--stage pre --config small.json --max_steps 1 --gradient_accumulation_steps 2".split()
    command = ["bash", str(ROOT / "dia_pangu/run_train.sh"), *flags]
    environment = {**os.environ, **given}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "pytorch_model.bin").is_file()
    saved = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    assert set(saved) == set(build_model(SMALL, llm)[0].state_dict())
