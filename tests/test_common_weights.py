"""Published weight files: every form is read, nothing runs code, nothing is loaded silently wrong."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import atomic_dir, atomic_path, atomic_write, link
from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from common.weights import load_weights, read_checkpoint, read_weights, strip_prefixes


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


@pytest.fixture
def tensors():
    torch.manual_seed(1)
    return {k: torch.randn_like(v) for k, v in model().state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write(tensors, path):
    """Write in the form that the suffix of `path` names."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".pt"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."]
)
def test_every_file_form_and_leading_prefix(tmp_path, tensors, suffix, prefix):
    path = tmp_path / ("w" + suffix)
    named = {prefix + k: v for k, v in tensors.items()}
    write(named, path)
    assert same(read_weights(path), tensors)


@pytest.mark.parametrize(
    "nest", [("model",), ("state_dict",), ("model_state_dict",), ("module",), ("model", "module")]
)
def test_nested_weights_are_unwrapped(tmp_path, tensors, nest):
    content = tensors
    for name in reversed(nest):
        content = {name: content, "epoch": 3, "config": {"a": [1]}}
    torch.save(content, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), tensors)


def test_file_of_torch_before_1_6(tmp_path, tensors):
    torch.save(tensors, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "w.pth"), tensors)


def test_sharded_folder_and_index_that_points_outside(tmp_path, tensors):
    keys = list(tensors)
    save_file({k: tensors[k] for k in keys[:2]}, tmp_path / "a.safetensors")
    save_file({k: tensors[k] for k in keys[2:]}, tmp_path / "b.safetensors")
    index = {k: "a.safetensors" if k in keys[:2] else "b.safetensors" for k in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(read_weights(tmp_path), tensors)
    index[keys[0]] = "../secret.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match="outside the folder"):
        read_weights(tmp_path)


def test_prefix_words_inside_a_key_stay():
    assert strip_prefixes("module.encoder.module.weight") == "encoder.module.weight"


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_malicious_file_runs_nothing(tmp_path):
    bomb = Bomb(tmp_path / "boom")
    torch.save({"w": bomb}, tmp_path / "a.pth")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(bomb))
    for name in ("a.pth", "b.bin"):
        with pytest.raises(UserError, match="could run code|not a readable"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 1, 9, 200, -1])
def test_cut_file_is_one_error(tmp_path, tensors, suffix, keep):
    path = tmp_path / ("w" + suffix)
    write(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="copy it again|refused"):
        read_weights(path)


@pytest.mark.parametrize(
    "content, said",
    [(torch.ones(3), "expected a dictionary"), ({"epoch": 3}, "no tensors"), ({}, "no tensors")],
)
def test_file_without_weights(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=said):
        read_weights(tmp_path / "w.pth")


def test_text_that_calls_itself_a_checkpoint(tmp_path):
    for i, text in enumerate(("root:x:0:0:root", "80 \n", "(dp0\n", "garbage ' \x00")):
        (tmp_path / f"{i}.pth").write_text(text)
        with pytest.raises(UserError, match="copy it again|refused"):
            read_weights(tmp_path / f"{i}.pth")


def test_missing_file_and_empty_folder(tmp_path):
    for call, path in (
        (read_weights, tmp_path / "none.pth"),
        (read_checkpoint, tmp_path / "none.pth"),
        (read_weights, tmp_path),
    ):
        with pytest.raises(UserError, match=re.escape(str(path))):
            call(path)


def test_report_names_every_kind(tensors, capsys):
    given = {**tensors, "decoder.weight": torch.ones(1), "what.weight": torch.ones(1)}
    given["1.bias"] = torch.ones(7)
    del given["0.bias"]
    target = model()
    report = load_weights(target, given, "w.pth", ignore=("decoder.",))
    assert (report.loaded, report.missing) == (["0.weight", "1.weight"], ["0.bias"])
    assert (report.unexpected, report.ignored) == (["what.weight"], ["decoder.weight"])
    assert report.mismatched == [("1.bias", (7,), (2,))]
    text = capsys.readouterr().out
    for word in (
        "loaded 2 of 4",
        "missing (1): 0.bias",
        "unexpected (1): what.weight",
        "1.bias (7,) -> (2,)",
    ):
        assert word in text
    assert torch.equal(target[0].weight, given["0.weight"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_anywhere_in_a_weight_is_refused_and_named(tensors, bad):
    tensors["0.weight"][2, 1] = bad
    with pytest.raises(UserError, match=f"w.pth: 0.weight holds {bad}"):
        load_weights(model(), tensors, "w.pth")


def test_converted_keys_are_counted(tensors):
    report = load_weights(
        model(),
        {"x." + k: v for k, v in tensors.items()},
        "w",
        convert=lambda t: {k[2:]: v for k, v in t.items()},
    )
    assert len(report.converted) == 4


def test_too_little_loaded_is_an_error_and_changes_nothing(tensors):
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    for given in ({"other." + k: v for k, v in tensors.items()}, {"0.weight": tensors["0.weight"]}):
        with pytest.raises(UserError, match="fits this model in only"):
            load_weights(target, given, "w.pth")
    assert same(target.state_dict(), before)


def test_atomic_writes_leave_old_content_on_failure(tmp_path):
    atomic_write(tmp_path / "a.txt", "older")
    with open(tmp_path / "a.txt") as reader:
        atomic_write(tmp_path / "a.txt", "old")
        assert reader.read() == "older"
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise ZeroDivisionError
    with atomic_dir(tmp_path / "d") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "d") as folder:
        raise ZeroDivisionError
    with atomic_dir(tmp_path / "d") as folder:
        (folder / "y").write_text("2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "d"]
    assert (tmp_path / "a.txt").read_text() == "old" and [p.name for p in (tmp_path / "d").iterdir()] == ["y"]


def test_link_moves_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        link(tmp_path, "last", tmp_path / name)
        assert (tmp_path / "last").resolve() == tmp_path / name


def test_user_error_is_one_line_and_status_2(tmp_path):
    code = """from common.errors import UserError, run
def main():
    raise UserError('a.h5: /iq is\\n missing')
run(main)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: a.h5: /iq is missing\n"


def test_tiny_llm_loads_again_and_knows_every_language(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = make_tokenizer(
        ["the signal is 调制 BPSK"] * 3, vocab_size=300, special_tokens=("<IQ_START>",)
    )
    made = make_llm(tmp_path / "llm", tokenizer, seed=3)
    again, words = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "llm"),
        AutoTokenizer.from_pretrained(tmp_path / "llm"),
    )
    text = "Привет, 肺部 CT ✓ <IQ_START>x"
    assert words.decode(words(text).input_ids, clean_up_tokenization_spaces=False) == text
    assert len(words("<IQ_START>").input_ids) == 1
    ids = torch.tensor([words("the signal").input_ids])
    assert torch.equal(made(ids).logits, again(ids).logits)
    chat = words.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi<|end|><|assistant|>"
    make_llm(tmp_path / "same", tokenizer, seed=3)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (
        tmp_path / "llm/model.safetensors"
    ).read_bytes()
