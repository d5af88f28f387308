"""Small good inputs of every project and the commands that read them, as fixtures for test_bad_input.py and
test_faults.py.

A world is a folder and {command: (script, function of a folder like it that gives the command line)}; every
command writes to <folder>/run, and was seen to work on the good input: a command that always fails would pass
every test of failure.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import cwt_mae.finetune
import cwt_mae.make_data
import cwt_mae.test
import cwt_mae.train
import dia_pangu.make_data
import dia_pangu.src.test
import dia_pangu.src.train
import em_mllm.make_data
import em_mllm.pretrain
import em_mllm.test
import em_mllm.train
import flmm.make_data
import flmm.test
import flmm.train
import pruning.pruning_tools.prune_llm
import pruning.sensitivity_analyse.layer_sensitivity_scan
import pruning.train
import studies.em_mllm.make_llm
from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu.src.Model.build import TINY, build_model, save_model
from flmm.models.tiny import save_base, tiny_model, tiny_sam, tiny_tokenizer
from tests import forked
from tests.once import once

__all__ = ["cwt", "em", "grounding", "ct", "llm"]
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests fork


def made(script, *arguments, log):
    """Run what must work: a good input that is refused would let every mutant pass."""
    done = forked.call(script, arguments, log)
    assert done.returncode == 0, done.text


def good(home, log, commands, results=()):
    """Check that every command works on the good input; results: {command: {file of its run: name to keep it
    under}}."""
    folder = home / "good"
    for name, (script, arguments) in commands.items():
        made(script, *arguments(folder), log=log)
        for file, kept in dict(results).get(name, {}).items():
            (folder / "run" / file).rename(folder / kept)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return SimpleNamespace(folder=folder, commands=commands)


@once
def cwt(tmp_path_factory):
    """Labelled records with a split, PPG as csv, a pre-trained model and a classifier."""
    home = tmp_path_factory.mktemp("cwt")
    tiny = (
        "--model-fs 50 --set signal_len=200 patch_size_time=20 cwt_scales=8 patch_size_freq=8 embed_dim=16 "
        "depth=1 num_heads=2 decoder_embed_dim=16 decoder_depth=1 decoder_num_heads=2 --windows 8 "
        "--eval-windows 4"
    ).split()
    made(
        cwt_mae.make_data,
        "--out",
        home / "good",
        "--subjects",
        6,
        "--seconds",
        60,
        "--ppg",
        1,
        log=home / "log.txt",
    )

    def labelled(f, *more):
        return [
            "--data",
            f / "labelled",
            *more,
            "--split",
            f / "labelled/split.json",
            "--cache",
            home / "cache",
            "--overwrite",
            "--out",
            f / "run",
        ]

    step = ["--batch-size", 8, "--max-steps", 1]
    return good(
        home,
        home / "log.txt",
        {
            "train": (cwt_mae.train, lambda f: [*labelled(f, f / "ppg"), *tiny, *step]),
            "finetune": (
                cwt_mae.finetune,
                lambda f: [
                    *labelled(f),
                    *step,
                    "--pretrained",
                    f / "base.safetensors",
                    "--task",
                    "rhythm",
                    "--folds",
                    2,
                ],
            ),
            "test": (
                cwt_mae.test,
                lambda f: [*labelled(f), "--model", f / "tuned.safetensors", "--resamples", 10],
            ),
        },
        {
            "train": {"model.safetensors": "base.safetensors"},
            "finetune": {"model.safetensors": "tuned.safetensors"},
        },
    )


@once
def em(tmp_path_factory):
    """Questions about signals, a pre-trained encoder, a tiny LLM, and recordings of several formats."""
    home = tmp_path_factory.mktemp("em")
    folder, log = home / "good", home / "log.txt"
    made(
        em_mllm.make_data,
        "--out",
        folder / "data",
        "--train",
        2,
        "--val",
        1,
        "--test",
        1,
        "--points",
        128,
        log=log,
    )
    made(studies.em_mllm.make_llm, "--out", folder / "llm", "--steps", 1, log=log)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": [16, 1],
        "max_seq_len": [144, 1],
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
        "attention_type": "sdpa",
    }
    (folder / "sizes.json").write_text(json.dumps(sizes))
    iq = np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32)
    np.save(folder / "a.npy", iq)
    iq.tofile(folder / "b.sigmf-data")
    (folder / "b.sigmf-meta").write_text(
        json.dumps(
            {
                "global": {"core:datatype": "cf32_le", "core:sample_rate": 1e6, "core:version": "1.0.0"},
                "captures": [{"core:sample_start": 0}],
                "annotations": [],
            }
        )
    )
    run = ["--max-steps", 1, "--overwrite"]

    def ask(name):
        return em_mllm.test, lambda f: [
            "--model",
            f / "model",
            "--llm-model-path",
            f / "llm",
            "--iq",
            f / name,
            "--max-new-tokens",
            2,
        ]

    return good(
        home,
        log,
        {
            "pretrain": (
                em_mllm.pretrain,
                lambda f: [
                    "--data",
                    f / "data/train",
                    "--config",
                    f / "sizes.json",
                    *run,
                    "--out",
                    f / "run",
                ],
            ),
            "train": (
                em_mllm.train,
                lambda f: [
                    "--task-dir",
                    f / "data/train",
                    "--val-dir",
                    f / "data/val",
                    "--signal-encoder-path",
                    f / "encoder",
                    "--llm-model-path",
                    f / "llm",
                    "--signal-tokens",
                    2,
                    *run,
                    "--output-dir",
                    f / "run",
                ],
            ),
            "npy": ask("a.npy"),
            "sigmf": ask("b.sigmf-meta"),
        },
        {"pretrain": {"encoder": "encoder"}, "train": {"model": "model"}},
    )


@once
def grounding(tmp_path_factory):
    """Scenes in the PNG and RefCOCO formats, a random base, a tiny SAM and a head."""
    home = tmp_path_factory.mktemp("flmm")
    folder, log = home / "good", home / "log.txt"
    made(
        flmm.make_data,
        "--out",
        folder / "data",
        "--train",
        2,
        "--val",
        1,
        "--test",
        1,
        "--overlap",
        1,
        "--side",
        64,
        log=log,
    )
    tokenizer = tiny_tokenizer()
    save_base(tiny_model("llava", tokenizer), tokenizer, folder / "base")
    tiny_sam().save_pretrained(folder / "sam")
    shutil.copy(Path(flmm.train.__file__).parent / "configs/tiny/scenes.yaml", folder / "scenes.yaml")

    def model(f):
        return [
            "--config",
            f / "scenes.yaml",
            "--data",
            f / "data",
            "--base-path",
            f / "base",
            "--overwrite",
            "--out",
            f / "run",
            "--set",
            f"sam.path={f / 'sam'}",
            "unet.base_channels=4",
        ]

    def test(split):
        return flmm.test, lambda f: [
            *model(f),
            "--head",
            f / "head.safetensors",
            "--split",
            split,
            "--pictures",
            0,
        ]

    return good(
        home,
        log,
        {
            "train": (flmm.train, lambda f: [*model(f), "--max-steps", 1, "--batch-size", 2]),
            "test": test("test"),
            "refcoco": test("refcoco_test"),
        },
        {"train": {"head.safetensors": "head.safetensors"}},
    )


@once
def ct(tmp_path_factory):
    """Phantoms in the CTRG format, a tiny language model and a checkpoint."""
    home = tmp_path_factory.mktemp("dia")
    folder, log = home / "good", home / "log.txt"
    made(dia_pangu.make_data, "--out", folder / "data", "--train", 2, "--val", 1, "--test", 1, log=log)
    reports = [
        item["finding"] for item in json.loads((folder / "data/annotation_en.json").read_text())["train"]
    ]
    make_llm(
        folder / "llm",
        make_tokenizer(reports, 300),
        "PanguEmbedded",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        bias=True,
    )
    torch.manual_seed(0)
    config = json.loads(json.dumps(TINY))
    model, _ = build_model(config, folder / "llm")
    save_model(model.state_dict(), folder / "model", config)
    return good(
        home,
        log,
        {
            "train": (
                dia_pangu.src.train,
                lambda f: [
                    "--stage",
                    "pre",
                    "--size",
                    "tiny",
                    "--data",
                    f / "data",
                    "--lang-encoder-path",
                    f / "llm",
                    "--per-device-train-batch-size",
                    2,
                    "--gradient-accumulation-steps",
                    1,
                    "--max-steps",
                    1,
                    "--overwrite",
                    "--out",
                    f / "run",
                ],
            ),
            "test": (
                dia_pangu.src.test,
                lambda f: [
                    "--ckpt-path",
                    f / "model",
                    "--data",
                    f / "data",
                    "--lang-encoder-path",
                    f / "llm",
                    "--max-new-tokens",
                    2,
                    "--evidence",
                    0,
                    "--out",
                    f / "run",
                ],
            ),
        },
    )


@once
def llm(tmp_path_factory):
    """A tiny language model, prompts to scan it with, and a pruned copy with its map."""
    home = tmp_path_factory.mktemp("pruning")
    folder = home / "good"
    texts = [f"the lung number {i} is clear and the heart is not enlarged" for i in range(8)]
    make_llm(
        folder / "llm",
        make_tokenizer(texts, 300),
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:2]))
    return good(
        home,
        home / "log.txt",
        {
            "prune": (
                pruning.pruning_tools.prune_llm,
                lambda f: ["--ckpt", f / "llm", "--drop-layers", "1", "--overwrite", "--out-dir", f / "run"],
            ),
            "scan": (
                pruning.sensitivity_analyse.layer_sensitivity_scan,
                lambda f: [
                    "--model",
                    f / "llm",
                    "--prompts",
                    f / "prompts.jsonl",
                    "--overwrite",
                    "--out",
                    f / "run/scan.csv",
                ],
            ),
            "heal": (
                pruning.train,
                lambda f: [
                    "--pruned_model_path",
                    f / "llm",
                    "--texts",
                    f / "prompts.jsonl",
                    "--max-steps",
                    1,
                    "--gradient-accumulation-steps",
                    1,
                    "--overwrite",
                    "--out",
                    f / "run",
                ],
            ),
        },
    )
