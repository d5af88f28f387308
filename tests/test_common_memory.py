"""The memory plan of --dry-run against what a run takes."""

import ctypes
import gc
import os
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from common import train as loop
from common.memory import LiveBytes, lines_of, memory_table
from common.tiny_llm import make_llm
from tests import forked
from tests.sharded import fsdp2_on_cpu, world
from tests.worlds import ct, cwt, em, grounding  # noqa: F401  fixtures

# gVisor's kernel has none
needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system starts no new peak of memory"
)
LARGE_LLM = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE_CWT = (
    "signal_len=1000 patch_size_time=20 cwt_scales=32 patch_size_freq=8 embed_dim=384 depth=6 num_heads=6 "
    "decoder_embed_dim=128 decoder_depth=2 decoder_num_heads=4"
).split()


def resident(name):
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, the most so far."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure():
    """In the fork: print what is resident before the model is there, before the first step, and at most in
    the steps."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    make_accelerator, batches, update = loop.make_accelerator, loop.batches, loop.update

    def made(*arguments, **options):
        gc.collect()
        print("memory before", resident("VmRSS"))
        return make_accelerator(*arguments, **options)

    def drawn(*arguments, **options):
        first = True
        for batch in batches(*arguments, **options):
            if first:  # evaluation and its pictures are over
                gc.collect()
                # Frozen weights lie in a mapped file, which counts only when they have been looked at.
                for model in arguments[0].accelerator._models:
                    held = [getattr(p, "_local_tensor", p).detach() for p in model.parameters()]
                    sum(float(part.flatten()[::1024].sum()) for part in held)
                print("memory ready", resident("VmRSS"))
                Path("/proc/self/clear_refs").write_text("5")
            first = False
            yield batch

    def updated(run, *rest):
        norm = update(run, *rest)
        print("memory most", resident("VmHWM"), flush=True)
        return norm

    for module in list(sys.modules.values()):
        for old, new in ((make_accelerator, made), (batches, drawn), (update, updated)):
            if getattr(module, old.__name__, None) is old:
                setattr(module, old.__name__, new)


def taken(text, weights):
    """GiB that the steps took and that data, log and pictures take, of `measure` and a model of `weights`
    GiB."""
    told = re.findall(r"memory (\w+) (\d+)", text)
    before, ready, most = (
        max(int(number) / 2**30 for word, number in told if word == wanted)
        for wanted in ("before", "ready", "most")
    )
    beside = max(0, ready - before - weights)
    return most - before - beside, beside


def large_llm(source, folder) -> Path:
    """A language model of 24 M parameters with the tokenizer of `source`."""
    make_llm(folder / "large", AutoTokenizer.from_pretrained(source), **LARGE_LLM)
    return folder / "large"


def em_train(good, tmp):
    return ["--llm-model-path", large_llm(good / "llm", tmp), "--batch-size", 8]


def cwt_train(good, tmp):
    return ["--set", *LARGE_CWT, "--batch-size", 8, "--windows", 16]


def flmm_train(good, tmp):
    return ["--set", f"sam.path={good / 'sam'}", "unet.base_channels=96", "--batch-size", 2]


def dia_train(good, tmp):
    return ["--lang-encoder-path", large_llm(good / "llm", tmp)]


TRAININGS = [
    ("em", "train", em_train),
    ("cwt", "train", cwt_train),
    ("grounding", "train", flmm_train),
    ("ct", "train", dia_train),
]


@needs_peaks
@pytest.mark.slow
@pytest.mark.parametrize("world_name, command, large", TRAININGS)
def test_the_plan_is_what_a_run_takes_to_a_fifth(request, tmp_path, world_name, command, large):
    folder = request.getfixturevalue(world_name)
    script, arguments = folder.commands[command]
    line = [str(a) for a in (*arguments(folder.folder), *large(folder.folder, tmp_path), "--max-steps", 2)]
    line[line.index(str(folder.folder / "run"))] = str(tmp_path / "run")
    done = forked.call(script, [*line, "--dry-run"], tmp_path / "log")
    assert done.returncode == 0 and not (tmp_path / "run").exists(), done.text
    row = next(text for text in done.text.splitlines() if text.startswith("one GPU")).split()
    weights, plan = float(row[-5]), float(row[-1])
    done = forked.call(script, line, tmp_path / "log", before=measure)
    assert done.returncode == 0, done.text
    took, beside = taken(done.text, weights)
    print(f"{world_name} {command}: {plan:.3f} GiB planned, {took:.3f} taken beside {beside:.3f}")
    assert plan == pytest.approx(took, rel=0.2)


def sharded_measure():
    """In the fork: FSDP2, with `measure`."""
    fsdp2_on_cpu()
    measure()


@needs_peaks
@pytest.mark.slow
@pytest.mark.parametrize("mode, before", [("DDP", measure), ("FSDP2, 2 GPUs", sharded_measure)])
def test_the_plan_of_two_processes_is_what_each_takes_to_a_fifth(request, tmp_path, mode, before):
    made = request.getfixturevalue("em")
    script, arguments = made.commands["train"]
    line = [str(a) for a in (*arguments(made.folder), *em_train(made.folder, tmp_path), "--max-steps", 2)]
    line[line.index(str(made.folder / "run"))] = str(tmp_path / "run")
    done = world(script, [*line, "--dry-run"], tmp_path / "log")
    assert done.returncode == 0, done.text
    rows = {text[:20].strip(): text[20:].split() for text in done.text.splitlines()}
    plan, held = float(rows[mode][-1]), float(rows["one GPU"][0]) / (1 if mode == "DDP" else 2)
    done = world(script, line, tmp_path / "log", before=before)
    assert done.returncode == 0, done.text
    took, beside = taken(done.text, held)
    print(f"{mode}: {plan:.3f} GiB planned, {took:.3f} taken beside {beside:.3f}")
    assert plan == pytest.approx(took, rel=0.2)


def test_what_lives_is_counted_while_it_lives():
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        view = known.view(10, 100)
        one = known + 1
        two = one * 2
        assert live.live == live.peak == 8000 and view.shape == (10, 100)
        del one
        gc.collect()
        assert live.live == 4000 and live.peak == 8000
        alive = weakref.ref(two)
    assert alive() is not None


def test_sharding_divides_what_it_divides():
    table = memory_table(weights=800, trained=100, peak=1000, layer=40, root=80, gpus=8)
    assert table["one GPU"]["together"] == 800 + 800 + 1000
    assert table["DDP"]["together"] == table["one GPU"]["together"] + 400
    shard = table["FSDP2, 8 GPUs"]
    assert shard["weights"] == 100 + 80 + 2 * 40 and shard["gradients"] == 50 and shard["optimizer"] == 100
    assert shard["activations"] == 600 and shard["together"] == 260 + 100 + 600 + 50
    small = memory_table(weights=800, trained=100, peak=10, layer=800, root=0, gpus=2)
    assert small["FSDP2, 2 GPUs"]["weights"] == 800
    assert small["one GPU"]["together"] == 800 + 800 + 400 + 400  # the optimizer's step needs room of its own
    assert lines_of(table)[1].split() == ["one", "GPU", "0.000", "0.000", "0.000", "0.000", "0.000"]
