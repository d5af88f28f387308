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


def line(text, **places):
    """A function of the folder f that gives the words of the command line `text`; places: its other names."""
    return lambda f: [word.format(f=f, **places) for word in text.split()]


def made(script, words, log):
    """Run what must work: a good input that is refused would let every mutant pass."""
    done = forked.call(script, words, log)
    assert done.returncode == 0, done.text


def good(home, commands, results=()):
    """Check that every command works on the good input; results: {command: {file of its run: name to keep it
    under}}."""
    folder = home / "good"
    for name, (script, arguments) in commands.items():
        made(script, arguments(folder), home / "log.txt")
        for file, kept in dict(results).get(name, {}).items():
            (folder / "run" / file).rename(folder / kept)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return SimpleNamespace(folder=folder, commands=commands)


@once
def cwt(tmp_path_factory):
    """Labelled records with a split, PPG as csv, a pre-trained model and a classifier."""
    home = tmp_path_factory.mktemp("cwt")
    drawn = line("--out {f} --subjects 6 --seconds 60 --ppg 1")
    made(cwt_mae.make_data, drawn(home / "good"), home / "log.txt")
    tiny = (
        "--model-fs 50 --set signal_len=200 patch_size_time=20 cwt_scales=8 patch_size_freq=8 embed_dim=16 "
        "depth=1 num_heads=2 decoder_embed_dim=16 decoder_depth=1 decoder_num_heads=2 --windows 8 "
        "--eval-windows 4"
    )
    given = "--split {f}/labelled/split.json --cache {home}/cache --overwrite --out {f}/run"
    step = "--batch-size 8 --max-steps 1"
    tune = "--pretrained {f}/base.safetensors --task rhythm --folds 2"
    commands = {
        "train": (cwt_mae.train, f"--data {{f}}/labelled {{f}}/ppg {given} {tiny} {step}"),
        "finetune": (cwt_mae.finetune, f"--data {{f}}/labelled {given} {step} {tune}"),
        "test": (
            cwt_mae.test,
            f"--data {{f}}/labelled {given} --model {{f}}/tuned.safetensors --resamples 10",
        ),
    }
    commands = {name: (script, line(text, home=home)) for name, (script, text) in commands.items()}
    results = {"train": "base.safetensors", "finetune": "tuned.safetensors"}
    return good(home, commands, {name: {"model.safetensors": kept} for name, kept in results.items()})


@once
def em(tmp_path_factory):
    """Questions about signals, a pre-trained encoder, a tiny LLM, and recordings of several formats."""
    home = tmp_path_factory.mktemp("em")
    folder, log = home / "good", home / "log.txt"
    made(em_mllm.make_data, line("--out {f}/data --train 2 --val 1 --test 1 --points 128")(folder), log)
    made(studies.em_mllm.make_llm, line("--out {f}/llm --steps 1")(folder), log)
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
    about = {"core:datatype": "cf32_le", "core:sample_rate": 1e6, "core:version": "1.0.0"}
    meta = {"global": about, "captures": [{"core:sample_start": 0}], "annotations": []}
    (folder / "b.sigmf-meta").write_text(json.dumps(meta))
    run, data = "--max-steps 1 --overwrite", "--task-dir {f}/data/train --val-dir {f}/data/val"
    parts = "--signal-encoder-path {f}/encoder --llm-model-path {f}/llm --signal-tokens 2"
    ask = "--model {f}/model --llm-model-path {f}/llm --max-new-tokens 2 --iq {f}"
    commands = {
        "pretrain": (
            em_mllm.pretrain,
            line(f"--data {{f}}/data/train --config {{f}}/sizes.json {run} --out {{f}}/run"),
        ),
        "train": (em_mllm.train, line(f"{data} {parts} {run} --output-dir {{f}}/run")),
        "npy": (em_mllm.test, line(f"{ask}/a.npy")),
        "sigmf": (em_mllm.test, line(f"{ask}/b.sigmf-meta")),
    }
    return good(home, commands, {"pretrain": {"encoder": "encoder"}, "train": {"model": "model"}})


@once
def grounding(tmp_path_factory):
    """Scenes in the PNG and RefCOCO formats, a random base, a tiny SAM and a head."""
    home = tmp_path_factory.mktemp("flmm")
    folder, scenes = home / "good", line("--out {f}/data --train 2 --val 1 --test 1 --overlap 1 --side 64")
    made(flmm.make_data, scenes(folder), home / "log.txt")
    tokenizer = tiny_tokenizer()
    save_base(tiny_model("llava", tokenizer), tokenizer, folder / "base")
    tiny_sam().save_pretrained(folder / "sam")
    shutil.copy(Path(flmm.train.__file__).parent / "configs/tiny/scenes.yaml", folder / "scenes.yaml")
    model = (
        "--config {f}/scenes.yaml --data {f}/data --base-path {f}/base --overwrite --out {f}/run "
        "--set sam.path={f}/sam unet.base_channels=4"
    )
    score = f"{model} --head {{f}}/head.safetensors --pictures 0 --split"
    commands = {
        "train": (flmm.train, line(f"{model} --max-steps 1 --batch-size 2")),
        "test": (flmm.test, line(f"{score} test")),
        "refcoco": (flmm.test, line(f"{score} refcoco_test")),
    }
    return good(home, commands, {"train": {"head.safetensors": "head.safetensors"}})


@once
def ct(tmp_path_factory):
    """Phantoms in the CTRG format, a tiny language model and a checkpoint."""
    home = tmp_path_factory.mktemp("dia")
    folder = home / "good"
    made(dia_pangu.make_data, line("--out {f}/data --train 2 --val 1 --test 1")(folder), home / "log.txt")
    annotation = json.loads((folder / "data/annotation_en.json").read_text())
    tokenizer = make_tokenizer([item["finding"] for item in annotation["train"]], 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "bias": True}
    make_llm(folder / "llm", tokenizer, "PanguEmbedded", **sizes)
    torch.manual_seed(0)
    config = json.loads(json.dumps(TINY))
    model, _ = build_model(config, folder / "llm")
    save_model(model.state_dict(), folder / "model", config)
    given = "--data {f}/data --lang-encoder-path {f}/llm --out {f}/run"
    step = (
        "--stage pre --size tiny --per-device-train-batch-size 2 --gradient-accumulation-steps 1 "
        "--max-steps 1 --overwrite"
    )
    commands = {
        "train": (dia_pangu.src.train, line(f"{given} {step}")),
        "test": (
            dia_pangu.src.test,
            line(f"--ckpt-path {{f}}/model {given} --max-new-tokens 2 --evidence 0"),
        ),
    }
    return good(home, commands)


@once
def llm(tmp_path_factory):
    """A tiny language model, prompts to scan it with, and a pruned copy with its map."""
    home = tmp_path_factory.mktemp("pruning")
    folder = home / "good"
    texts = [f"the lung number {i} is clear and the heart is not enlarged" for i in range(8)]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    make_llm(folder / "llm", make_tokenizer(texts, 300), "llama", **sizes)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:2]))
    step = "--max-steps 1 --gradient-accumulation-steps 1 --overwrite --out {f}/run"
    commands = {
        "prune": (
            pruning.pruning_tools.prune_llm,
            line("--ckpt {f}/llm --drop-layers 1 --overwrite --out-dir {f}/run"),
        ),
        "scan": (
            pruning.sensitivity_analyse.layer_sensitivity_scan,
            line("--model {f}/llm --prompts {f}/prompts.jsonl --overwrite --out {f}/run/scan.csv"),
        ),
        "heal": (pruning.train, line(f"--pruned_model_path {{f}}/llm --texts {{f}}/prompts.jsonl {step}")),
    }
    return good(home, commands)
