"""Repairs without training: exact where a map exists, never worse on what judges them, and combined with
others."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cwt_mae.test
from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from pruning import repair, test, train
from pruning.layers import decoder_layers, remove_layers
from pruning.pruning_tools import prune_llm
from pruning.repair import REPAIRS, gaps, least_squares, mean_loss, merge_map, repair_gaps
from pruning.sensitivity_analyse import layer_sensitivity_scan
from tests import pruning_zoo
from tests.pruning_zoo import GPT, call


def prompts(count=8, length=12):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 90, (1, length), generator=generator)} for _ in range(count)]


def cut(model, drop):
    student = copy.deepcopy(model)
    remove_layers(student, drop)
    return student


def test_gaps_are_stretches_of_neighbours():
    assert gaps([2, 3, 4, 7, 9, 10]) == [(2, 4), (7, 7), (9, 10)] and gaps([]) == []


@pytest.mark.parametrize("kind, settings", [("llama", {"mlp_bias": True}), ("gpt2", GPT)])
def test_a_map_merged_into_the_last_matrix_maps_its_output(kind, settings):
    model = pruning_zoo.make(kind, settings)
    down = decoder_layers(model)[1].mlp.down_proj if kind == "llama" else decoder_layers(model)[1].mlp.c_proj
    matrix = torch.randn(32, 32, dtype=torch.double)
    x = torch.randn(5, 48 if kind == "llama" else 128)
    wanted = down(x).double() @ matrix
    merge_map(down, matrix)
    assert torch.allclose(down(x).double(), wanted, atol=1e-4)


def test_least_squares_finds_the_map_that_made_the_targets():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 16, generator=generator, dtype=torch.double)
    matrix = torch.randn(16, 16, generator=generator, dtype=torch.double)
    assert torch.allclose(least_squares(inputs, inputs @ matrix, 0.0), matrix, atol=1e-6)
    shrunk = least_squares(inputs, inputs @ matrix, 1e6)
    assert torch.allclose(shrunk, torch.eye(16, dtype=torch.double), atol=1e-3), (
        "a ridge pulls to doing nothing"
    )


@torch.no_grad()
def test_a_gap_that_only_adds_a_map_of_the_mlp_before_it_is_repaired_exactly():
    """Layer 2 gets what layer 1's MLP added as its own, times a matrix: a least-squares map undoes its
    loss."""
    teacher = pruning_zoo.make("llama", {})
    layers, matrix = decoder_layers(teacher), torch.randn(32, 32) * 0.3
    added = {}
    layers[1].mlp.register_forward_hook(lambda module, args, output: added.update(mlp=output))
    layers[2].register_forward_hook(lambda module, args, output: args[0] + added["mlp"] @ matrix)
    student = cut(teacher, [2])
    some = prompts(16)
    rows = repair_gaps("linear", student, teacher, [2], some[1:], some[:1])
    assert rows[0]["setting"] in (0.0, 0.01) and rows[0]["loss_before"] > rows[0]["loss_after"] + 0.1
    assert rows[0]["loss_after"] == pytest.approx(mean_loss(teacher, some[:1]), abs=0.02)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", REPAIRS)
@pytest.mark.parametrize("drop", [[2, 3], [1, 4], [0, 1]])
def test_a_repair_is_kept_only_where_it_lowers_the_loss_of_what_it_was_not_fitted_to(kind, drop):
    teacher = pruning_zoo.make("qwen3", {})
    student, some = cut(teacher, drop), prompts()
    before = copy.deepcopy(student)
    rows = repair_gaps(kind, student, teacher, drop, some[2:], some[:2])
    assert [row["gap"] for row in rows] == [f"{a}-{b}" for a, b in gaps(drop)]
    last = rows[-1]["loss_after"]
    assert (
        mean_loss(student, some[:2]) == pytest.approx(last, abs=1e-4)
        and last <= mean_loss(before, some[:2]) + 1e-5
    )
    if all(row["loss_after"] == row["loss_before"] for row in rows):
        for a, b in zip(student.parameters(), before.parameters()):
            assert torch.equal(a, b), "no repair helps, and something changed"


def test_texts_that_take_turns_are_all_among_those_that_judge(monkeypatch):
    seen = []
    monkeypatch.setattr(repair, "repair_gaps", lambda *args: seen.extend(args[-2:]) or [])
    repair.repair(None, None, [1], ["linear"], ["report", "prose"] * 4)
    fitted, judges = seen
    assert set(judges) == set(fitted) == {"report", "prose"} and len(fitted) + len(judges) == 8


def test_a_factor_that_does_not_help_leaves_half_precision_as_it_was(monkeypatch):
    """Multiplied and divided again, bfloat16 values are others."""
    teacher = pruning_zoo.make("llama", {}).bfloat16()
    student = cut(teacher, [2, 3])
    before = copy.deepcopy(student)
    monkeypatch.setattr(repair, "mean_loss", lambda model, prompts: 1.0)
    (row,) = repair_gaps("compensate", student, teacher, [2, 3], prompts(), prompts(2))
    assert row["setting"] is None
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters()))


def test_a_replacement_layer_comes_nearer_to_what_the_gap_returned_and_nothing_else_moves(monkeypatch):
    teacher = pruning_zoo.make("llama", {})
    student, some = cut(teacher, [2, 3]), prompts(6)
    before = copy.deepcopy(student)

    def distance(model, prompts):
        (mine,) = repair.states_behind(model, prompts, [decoder_layers(model)[1]])
        (wanted,) = repair.states_behind(teacher, prompts, [decoder_layers(teacher)[3]])
        return ((mine - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item()

    # random models speak no language: what judges is the distance itself
    monkeypatch.setattr(repair, "mean_loss", distance)
    monkeypatch.setattr(repair, "RATES", (1e-7, 0.01))
    (row,) = repair_gaps("replace", student, teacher, [2, 3], some, some[:2])
    assert row["setting"] == 0.01 and row["loss_after"] < 0.7 * row["loss_before"]
    assert distance(student, some[:2]) == pytest.approx(row["loss_after"], rel=1e-4)
    for (name, a), b in zip(before.named_parameters(), student.parameters()):
        assert torch.equal(a, b) == (".layers.1." not in name), name


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_compensation_scales_the_state_and_nothing_else(tied):
    model = pruning_zoo.make("llama", {"tie_word_embeddings": tied, "rms_norm_eps": 1e-12})
    ids, seen = prompts(1)[0]["input_ids"], []
    hook = decoder_layers(model)[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = model(ids).logits
    repair.scale(*repair.writers_before(model, list(decoder_layers(model))[:3]), 1.5)
    after = model(ids).logits
    hook.remove()
    assert torch.allclose(seen[-1], 1.5 * seen[0], atol=1e-4)
    for layer in decoder_layers(model)[3:]:  # the rest writes as strongly: then all is as it was
        layer.self_attn.o_proj.weight *= 1.5
        layer.mlp.down_proj.weight *= 1.5
    assert torch.allclose(model(ids).logits, before, atol=1e-3) and not torch.allclose(
        after, before, atol=1e-2
    )


@pytest.mark.parametrize(
    "kind, name",
    [
        ("llama", "norm"),
        ("bloom", "ln_f"),
        ("lfm2", "embedding_norm"),
        ("mbart", "decoder.layer_norm"),
        ("bert", ""),
    ],
)
def test_the_final_norm_is_the_one_behind_the_layers_whatever_its_name(kind, name):
    model = pruning_zoo.make(kind, pruning_zoo.ZOO[kind])
    if name:
        wanted = model.get_submodule(f"{model.base_model_prefix}.{name}")
        assert repair.final_norm(model) is wanted and not wanted._forward_hooks
    else:
        with pytest.raises(UserError, match="BertLMHeadModel: no final norm"):
            repair.final_norm(model)


def test_an_mlp_that_is_normalised_again_is_refused():
    teacher = pruning_zoo.make("gemma2", {"sliding_window": 4})
    with pytest.raises(UserError, match="changes its MLP's output"):
        repair_gaps("linear", cut(teacher, [2]), teacher, [2], prompts(), prompts(2))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """llm/ (bfloat16, 4 layers), texts.txt and pruned/hf_drop1_2."""
    root = tmp_path_factory.mktemp("repair")
    lines = [f"Report {i}: the lung number {i} is clear and the heart is of normal size." for i in range(12)]
    (root / "texts.txt").write_text("\n".join(lines))
    tokenizer = make_tokenizer(lines, 300)
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    model = make_llm(root / "llm", tokenizer, **sizes)
    model.to(torch.bfloat16).save_pretrained(root / "llm")
    call(prune_llm, ckpt=root / "llm", out_dir=root / "pruned", drop_layers="1-2")
    return root


def heal(world, out, *words):
    own = ["--pruned-model-path", world / "pruned/hf_drop1_2", "--texts", world / "texts.txt"]
    run = ["--batch-size", "4", "--accum", "1", "--max-steps", "2", "--lr", "0.01", "--warmup", "0"]
    trains = not {"none", "linear", "compensate", "replace"} & set(words[-1:])
    call(train, *own, "--out", out, *(run if trains else []), *words)
    return out / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways", [["full"], ["last"], ["lora"], ["linear", "lora"], ["compensate", "replace"], ["none"]]
)
def test_a_bfloat16_model_is_repaired_in_every_way_and_saved_as_it_was(world, tmp_path, ways):
    closed = {"linear", "compensate", "replace"} & set(ways)
    teacher = ["--teacher", world / "llm"] if closed else []
    folder = heal(world, tmp_path / "out", *teacher, "--repair", *ways)
    config = json.loads((folder / "config.json").read_text())
    written = load_file(folder / "model.safetensors")
    assert {str(value.dtype) for value in written.values()} == {"torch.bfloat16"}
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and len(decoder_layers(loaded)) == 2
    before = load_file(world / "pruned/hf_drop1_2/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], written[name])}
    assert bool(changed) == (ways != ["none"])
    if ways == ["last"]:
        assert "lm_head.weight" in changed and "model.embed_tokens.weight" not in changed
    if ways == ["full"]:
        assert not any("embed" in name or "lm_head" in name for name in changed)


def test_final_norm_and_head_train_where_they_are_asked_for(world, tmp_path):
    folder = heal(world, tmp_path / "out", "--also", "norm", "head")
    before, after = (load_file(f / "model.safetensors") for f in (world / "pruned/hf_drop1_2", folder))
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--repair", "lora", "full"], "only one of lora, last and full"),
        (["--repair", "none", "lora"], "none stands alone"),
        (["--repair", "linear"], "needs --teacher"),
        (["--repair", "lora", "lora"], "name each once"),
        (["--repair", "last", "--full"], "--repair has no effect beside --full"),
        (["--repair", "none", "--lr", "1"], "--lr has no effect"),
        (["--repair", "last", "--lora-r", "2"], "--lora-r has no effect"),
    ],
)
def test_ways_of_repair_that_contradict_each_other_are_refused(words, message):
    own = ["--pruned-model-path", "x", "--texts", "t", "--out", "y"]
    with pytest.raises(UserError, match=message):
        train.check(train.parse_args([*own, *words]))


def test_a_closed_form_needs_to_know_what_is_missing(world, tmp_path):
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (world / "pruned/hf_drop1_2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    words = ["--pruned-model-path", folder, "--texts", world / "texts.txt", "--out", tmp_path / "out"]
    words += ["--teacher", world / "llm", "--repair", "linear"]
    with pytest.raises(UserError, match="name it with --prune-map-path"):
        call(train, *words)


def test_packed_rows_hold_every_token_once_and_no_padding(world):
    _, tokenizer = train.load_model(world / "llm")
    rows = train.text_rows(world / "texts.txt", tokenizer, 16, pack=True)
    apart = train.text_rows(world / "texts.txt", tokenizer, 512)
    assert torch.equal(torch.cat([r["ids"] for r in rows]), torch.cat([r["ids"] for r in apart]))
    assert all(len(row["ids"]) == 16 for row in rows[:-1])


@torch.no_grad()
def test_perplexity_of_a_stream_is_that_of_its_windows(world):
    model, tokenizer = train.load_model(world / "llm", "float32")
    texts = ["The lung is clear.", "The heart is of normal size and shape."]
    ids = torch.tensor(tokenizer("\n\n".join(texts)).input_ids)
    losses = test.stream_losses(model, tokenizer, texts, 8)
    assert losses[:, 1].sum() == len(ids) - len(ids.split(8))
    for window, (loss, count) in zip(ids.split(8), losses.tolist()):
        wanted = model(input_ids=window[None], labels=window[None]).loss.item() if len(window) > 1 else 0.0
        assert loss == pytest.approx(wanted * count, rel=1e-5)


def test_a_text_of_one_token_is_not_scored_and_a_file_of_such_is_refused(world, tmp_path, capsys):
    def score(text):
        (tmp_path / "t.txt").write_text(text)
        words = ["--pruned-model-path", world / "llm", "--texts", tmp_path / "t.txt", "--out", tmp_path / "r"]
        call(test, *words)
        return json.loads(next((tmp_path / "r").glob("*_scores.json")).read_text())["perplexity"]

    alone = score("The heart is of normal size.\n")
    assert score("The heart is of normal size.\na\n") == pytest.approx(alone, rel=1e-6)
    assert "1 of 2 texts have fewer than two tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="no text has two tokens"):
        score("a\n")


def test_a_model_is_scored_by_one_process():
    with pytest.raises(UserError, match="without torchrun"):
        test.check(None, processes=2)


@pytest.mark.parametrize("script", [layer_sensitivity_scan, cwt_mae.test])
def test_other_scripts_that_write_alone_are_refused_several_processes_too(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "Accelerator", lambda: SimpleNamespace(num_processes=2, device="cpu"))
    options = ["--model", tmp_path, "--data", tmp_path] if script is cwt_mae.test else ["--model", tmp_path]
    with pytest.raises(UserError, match="by one process; start the script without torchrun"):
        script.main(script.parse_args([str(word) for word in [*options, "--out", tmp_path / "out"]]))


def test_tasks_of_ones_own_are_scored_by_lm_eval(world, tmp_path):
    pytest.importorskip("lm_eval")
    items = [{"ask": "The lung", "choices": [" is clear", " xq zv"], "right": 0}] * 2
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"task": "own_choice", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{ask}}"}
    task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "right"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "own.jsonl")}}}
    task |= {"metric_list": [{"metric": "acc"}]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in task.items()]
    (tmp_path / "own.yaml").write_text("\n".join(lines))
    words = ["--pruned-model-path", world / "llm", "--texts", world / "texts.txt", "--out", tmp_path / "r"]
    call(test, *words, "--tasks", tmp_path / "own.yaml")
    found = json.loads(next((tmp_path / "r").glob("*_scores.json")).read_text())
    assert found["own_choice acc"] in (0.0, 1.0)
    with pytest.raises(UserError, match="lm-eval knows no such task"):
        call(test, *words, "--tasks", "not_a_task")


def test_tasks_without_the_package_are_refused_in_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="--tasks needs the package lm-eval .*pip install lm-eval"):
        test.score_tasks(None, None, ["arc_easy"], 0)
