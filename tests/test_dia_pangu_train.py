"""dia_pangu: training and its launcher, resume, processes, dry run, one scan."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from dia_pangu.src.Model.build import build_model, save_model
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
from tests import forked
from tests.golden import ROOT
from tests.parity import assert_same_first_step
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL, python


def train(data, llm, out, *more, processes=1):
    config = out.parent / "small.json"
    config.write_text(json.dumps(SMALL))
    return forked.run_file(
        ROOT / "dia_pangu" / "train.py",
        "--stage",
        "ft",
        "--data",
        data,
        "--lang-encoder-path",
        llm,
        "--config",
        config,
        "--out",
        out,
        "--lora-dropout",
        "0",
        "--learning-rate",
        "3e-3",
        "--warmup-steps",
        "2",
        "--logging-steps",
        "1",
        "--flip",
        "0.1",
        *more,
        processes=processes,
    )


def curve(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_accumulation_processes_and_resume_give_the_same_training(data, llm, tmp_path):
    whole = train(
        data,
        llm,
        tmp_path / "whole",
        "--max-steps",
        3,
        "--per-device-train-batch-size",
        4,
        "--gradient-accumulation-steps",
        1,
        "--save-steps",
        1,
    )
    assert whole.returncode == 0, whole.stderr
    reference = curve(tmp_path / "whole")
    assert len(reference) == 3 and all(np.isfinite(list(reference.values())))
    for name, batch, accumulate, processes in (("accumulated", 1, 4, 1), ("two", 2, 1, 2)):
        result = train(
            data,
            llm,
            tmp_path / name,
            "--max-steps",
            1,
            "--per-device-train-batch-size",
            batch,
            "--gradient-accumulation-steps",
            accumulate,
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
        assert_same_first_step(tmp_path / "whole", tmp_path / name)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000003")
    weights = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    again = train(
        data,
        llm,
        tmp_path / "whole",
        "--max-steps",
        3,
        "--per-device-train-batch-size",
        4,
        "--gradient-accumulation-steps",
        1,
        "--save-steps",
        1,
        "--resume",
    )
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    resumed = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert curve(tmp_path / "whole") == reference
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["lora_alpha"] == 16


@pytest.mark.slow
def test_dry_run_counts_the_published_parameters_without_weights(llm, tmp_path):
    folder = tmp_path / "pangu"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "PanguEmbedded",
                "vocab_size": 153376,
                "hidden_size": 4096,
                "intermediate_size": 12800,
                "num_hidden_layers": 34,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "bias": True,
                "rms_norm_eps": 1e-5,
                "rope_theta": 16000000.0,
                "max_position_embeddings": 32768,
                "tie_word_embeddings": False,
            }
        )
    )
    result = python(
        ROOT / "dia_pangu" / "train.py",
        "--stage",
        "ft",
        "--data",
        tmp_path,
        "--out",
        tmp_path / "o",
        "--dry-run",
        "--lang-encoder-path",
        folder,
    )
    assert result.returncode == 0, result.stderr
    layer = MyEmbedding(num_embeddings=1, embedding_dim=4096)
    vision = sum(p.numel() for n, p in layer.named_parameters() if n != "weight")
    assert f"{8030887936 + 1810432 + vision:,} parameters" in result.stdout
    assert "trains lang_model (LoRA): 136 tensors, 1,810,432 values" in result.stdout
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_user_errors_are_one_line(data, llm, tmp_path):
    for arguments, message in (
        (["--data", tmp_path / "nowhere", "--lang-encoder-path", llm], "no such data folder"),
        (["--data", data, "--lang-encoder-path", tmp_path], "no config.json"),
        (["--data", data], "--lang-encoder-path is needed"),
        (
            ["--data", data, "--lang-encoder-path", llm, "--size", "tiny", "--train", "nothing"],
            "no parameter has such a name",
        ),
    ):
        result = python(
            ROOT / "dia_pangu" / "train.py", "--stage", "pre", "--out", tmp_path / "out", *arguments
        )
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert (
            result.returncode == 2
            and len(errors) == 1
            and message in errors[0]
            and "Traceback" not in result.stderr
        ), result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_scan_gives_a_report(data, llm, tmp_path):
    model, _ = build_model(json.loads(json.dumps(SMALL)), llm)
    save_model(model.state_dict(), tmp_path / "model", SMALL)
    result = python(
        ROOT / "dia_pangu" / "test.py",
        "--ckpt-path",
        tmp_path / "model",
        "--lang-encoder-path",
        llm,
        "--volume",
        data / "volumes" / "3.nii.gz",
        "--max_new_tokens=8",
        "--out",
        tmp_path / "out",
    )
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "dia-pangu.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ID"] for row in rows] == ["3"] and list(rows[0]) == [
        "ID",
        "Question",
        "Ground Truth",
        "Pred",
        "GT_labels",
    ]
    with open(tmp_path / "out" / "findings.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 14
    assert (tmp_path / "out" / "evidence" / "3.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_launcher_works_from_elsewhere(data, llm, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    environment = {
        **os.environ,
        "DATA": str(data),
        "LLM": str(llm),
        "OUT": "run",
        "PYTHON": sys.executable,
        "NPROC_PER_NODE": "1",
    }
    command = [
        "bash",
        str(ROOT / "dia_pangu" / "run_train.sh"),
        "--stage",
        "pre",
        "--config",
        "small.json",
        "--max_steps",
        "1",
        "--gradient_accumulation_steps",
        "2",
    ]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "pytorch_model.bin").is_file()
    saved = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    assert set(saved) == set(build_model(json.loads(json.dumps(SMALL)), llm)[0].state_dict())
    result = python("-m", "dia_pangu.train", "--help", cwd=ROOT)
    assert result.returncode == 0 and "--gradient-accumulation-steps" in result.stdout
