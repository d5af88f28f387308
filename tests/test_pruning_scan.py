"""Masks, the three scan methods, distances, resuming, choosing."""

import csv
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from common.errors import Interrupted, UserError
from common.tiny_llm import make_llm, make_tokenizer
from pruning import test, train
from pruning.layers import decoder_layers, longest, remove_layers, without_layers
from pruning.pruning_tools import count_params, prune_llm, prune_width
from pruning.sensitivity_analyse import choose_layers, eval_metric, layer_mask, scan_methods
from pruning.sensitivity_analyse import layer_sensitivity_scan as scanner
from pruning.sensitivity_analyse.layer_mask import MODES, ProjHeadMaskWrapper, mask_attention_layer, masked
from pruning.sensitivity_analyse.load_model import builtin_prompts, read_texts
from studies.recipe import options
from tests import pruning_zoo
from tests.pruning_zoo import call

KINDS = "llama qwen2 qwen3 gemma3_text phi3 gpt_neox gpt2 opt cohere mixtral".split()


def make(kind="llama", attention="sdpa", **config):
    """A tiny decoder of three layers, with biases where the class has them."""
    own = {"num_hidden_layers": 3, "attention_bias": True, **({"n_layer": 3} if kind == "gpt2" else {})}
    settings = {**pruning_zoo.ZOO[kind], **own, **config}
    return pruning_zoo.make(kind, settings, attn_implementation=attention)


def prompts(lengths=(7, 11, 11), vocabulary=64):
    generator = torch.Generator().manual_seed(1)
    return [
        {"name": str(i), "input_ids": torch.randint(3, vocabulary, (1, n), generator=generator)}
        for i, n in enumerate(lengths)
    ]


def scores(records, kinds):
    return [[v[k] for v in r["variants"] for k in (*kinds, "nll")] for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", KINDS)
def test_cached_and_wavefront_scores_equal_naive_in_every_decoder(model_type, attention):
    model, kinds = make(model_type, attention), ("l1_mean", "kl", "rms", "l1_last")
    modes = ["attention", "mlp", "head"] + (["v", "qk"] if model_type != "gpt_neox" else [])
    variants = scan_methods.list_variants(model, modes)
    naive = scores(
        [scan_methods.scan_batch(model, [p], variants, kinds, "naive")[0] for p in prompts()], kinds
    )
    for method in ("cached", "wavefront"):
        assert scores(scan_methods.scan_batch(model, prompts(), variants, kinds, method), kinds) == [
            pytest.approx(row, rel=1e-5, abs=1e-6) for row in naive
        ]
    assert max(max(row) for row in naive) > 1e-3, "nothing was masked"


@pytest.mark.parametrize("method", scan_methods.METHODS)
def test_a_batch_of_unequal_prompts_gives_each_its_own_scores(method):
    model, kinds = make("qwen3"), ("kl",)
    variants = scan_methods.list_variants(model, ["v"])
    together = scan_methods.scan_batch(model, prompts((3, 12, 7)), variants, kinds, method)
    for p, record in zip(prompts((3, 12, 7)), together):
        alone = scan_methods.scan_batch(model, [p], variants, kinds, method)[0]
        assert scores([record], kinds) == [
            pytest.approx(row, rel=1e-5, abs=1e-7) for row in scores([alone], kinds)
        ]
        assert record["block_influence"] == pytest.approx(alone["block_influence"], abs=1e-6)


@torch.no_grad()
def test_angles_are_those_of_the_last_token_in_half_turns():
    model, batch = make(), prompts((5, 9))
    records = scan_methods.scan_batch(model, batch, scan_methods.list_variants(model, []), ("kl",))
    for prompt, record in zip(batch, records):
        states = model(prompt["input_ids"], output_hidden_states=True).hidden_states[
            :3
        ]  # what each layer is given
        for a in range(3):
            for b in range(3):
                cosine = torch.cosine_similarity(
                    states[a][0, -1].double(), states[b][0, -1].double(), dim=0
                ).clamp(-1, 1)
                assert record["angles"][a][b] == pytest.approx(
                    torch.arccos(cosine).item() / 3.14159265, abs=1e-3
                )


@pytest.mark.parametrize("what, most", [("CHUNK", 3 * 96), ("ROOM", 1), ("ROOM", 200_000)])
def test_scores_do_not_depend_on_the_free_memory(what, most, monkeypatch):
    """CHUNK: three positions at a time. ROOM: one variant at a time, and some heads at a time."""
    model, variants = make(), scan_methods.list_variants(make(), ["v", "head"])
    whole = scan_methods.scan_batch(model, prompts(), variants, eval_metric.DISTANCES)
    monkeypatch.setattr(scan_methods, what, most)
    pieces = scan_methods.scan_batch(model, prompts(), variants, eval_metric.DISTANCES)
    assert scores(pieces, eval_metric.DISTANCES) == [
        pytest.approx(row, rel=1e-5, abs=1e-7) for row in scores(whole, eval_metric.DISTANCES)
    ]


def test_leave_one_out_is_the_model_without_that_layer():
    model, prompt = make("gemma3_text"), prompts()[0]
    record = scan_methods.scan_batch(model, [prompt], scan_methods.list_variants(model, []), ("kl",))[0]
    labels = prompt["input_ids"]
    for variant in record["variants"]:
        with without_layers(model, [variant["layer"]]):
            if decoder_layers(model)[0].self_attn.layer_idx != 0:
                pytest.fail("kept layers were not renumbered")
        with masked(model, variant["layer"], "layer"), torch.no_grad():
            assert variant["nll"] == pytest.approx(
                model(input_ids=labels, labels=labels).loss.item(), rel=1e-5
            )


@torch.no_grad()
def test_masks_that_should_agree_do_and_others_differ():
    model, ids = make(), prompts()[0]["input_ids"]
    out = {}
    for mode in MODES:
        with masked(model, 1, mode, head=2 if mode == "head" else None):
            out[mode] = model(ids).logits
    assert torch.equal(out["v"], out["qv"]), "with V = 0 the weights cannot matter"
    assert torch.allclose(out["q"], out["k"], atol=1e-6) and torch.allclose(out["q"], out["qk"], atol=1e-6)
    distinct = ["q", "v", "head", "attention", "mlp", "layer"]
    for i, a in enumerate(distinct):
        for b in distinct[i + 1 :]:
            assert not torch.allclose(out[a], out[b], atol=1e-4), (a, b)


@torch.no_grad()
def test_all_heads_off_one_by_one_is_attention_without_its_bias():
    model, ids = make(), prompts()[0]["input_ids"]
    with (
        masked(model, 0, "head", 0),
        masked(model, 0, "head", 1),
        masked(model, 0, "head", 2),
        masked(model, 0, "head", 3),
    ):
        heads = model(ids).logits
    with masked(model, 0, "v"):
        assert torch.allclose(heads, model(ids).logits, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_model_is_whole_again_after_an_exception(mode):
    model, ids = make(), prompts()[0]["input_ids"]
    before, modules = model(ids).logits, [id(m) for m in model.modules()]
    with pytest.raises(RuntimeError), masked(model, 1, mode, head=0):
        raise RuntimeError
    assert torch.equal(model(ids).logits, before) and [id(m) for m in model.modules()] == modules


def test_a_mask_set_before_the_first_forward_is_kept():
    wrapper = ProjHeadMaskWrapper(torch.nn.Linear(8, 8), head_dim=4)
    wrapper.set_all_zero()
    assert wrapper(torch.randn(2, 8)).abs().max() == 0
    wrapper.set_all_one()
    x = torch.randn(2, 8)
    assert torch.equal(wrapper(x), wrapper.base_linear(x))


@torch.no_grad()
def test_upstreams_three_functions_switch_and_restore():
    model, ids = make(), prompts()[0]["input_ids"]
    before = model(ids).logits
    enable_mask, disable_mask, restore = mask_attention_layer(model, 0, mode="v_only")
    assert torch.equal(model(ids).logits, before)
    enable_mask()
    assert not torch.allclose(model(ids).logits, before)
    disable_mask()
    assert torch.equal(model(ids).logits, before)
    restore()
    assert type(decoder_layers(model)[0].self_attn.v_proj) is torch.nn.Linear


@pytest.mark.parametrize("kind", eval_metric.DISTANCES)
def test_distances_are_zero_for_equal_and_shifted_logits_and_positive_otherwise(kind):
    a, b = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    assert eval_metric.logprob_distance(a, a, kind) == 0
    assert eval_metric.logprob_distance(a, a + 7.5, kind) < 1e-5
    assert eval_metric.logprob_distance(a, b, kind) > 0.01


def test_distances_are_those_of_their_formulas():
    logits, other = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(2)).double()
    p, q = logits.log_softmax(-1).numpy(), other.log_softmax(-1).numpy()
    rows, best = np.arange(5), p.argmax(-1)
    wanted = {
        "l1_mean": np.abs(p - q).mean(),
        "l2_mean": np.sqrt(((p - q) ** 2).sum(-1)).mean(),
        "rms": np.sqrt(((p - q) ** 2).mean()),
        "kl": np.mean([entropy(np.exp(a), np.exp(b)) for a, b in zip(p, q)]),
        "l1_last": np.abs(p[-1] - q[-1]).mean(),
        "top1": np.abs(p[rows, best] - q[rows, best]).mean(),
    }
    assert wanted.keys() == set(eval_metric.DISTANCES)
    for kind, value in wanted.items():
        assert eval_metric.logprob_distance(logits, other, kind) == pytest.approx(value, rel=1e-6), kind


@torch.no_grad()
@pytest.mark.parametrize("head", [0, 2])
def test_a_head_that_is_off_takes_no_part_in_the_output_projection(head):
    model, ids = make(), prompts()[0]["input_ids"]
    with masked(model, 1, "head", head):
        off = model(ids).logits
    weight = decoder_layers(model)[1].self_attn.o_proj.weight
    weight.view(32, 4, 8)[:, head] = 0  # (hidden, query heads, width of a head)
    assert torch.allclose(off, model(ids).logits, atol=1e-6)


def test_kl_of_a_tiny_change_keeps_its_digits():
    a = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    b = a + 1e-3 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(1))
    exact = (
        torch.nn.functional.kl_div(
            b.double().log_softmax(-1), a.double().log_softmax(-1), reduction="none", log_target=True
        )
        .sum(-1)
        .mean()
        .item()
    )
    single = (
        eval_metric.position_distances(a.log_softmax(-1), b.log_softmax(-1), "kl").mean().item()
    )  # as the scan does
    assert single == pytest.approx(exact, rel=1e-3) and eval_metric.logprob_distance(
        a, b, "kl"
    ) == pytest.approx(exact, rel=1e-3)


def test_an_interrupted_scan_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    model, journal, calls = make(), tmp_path / "s.records.jsonl", []
    whole = scanner.scan(model, prompts(), ["v"], ("kl",))
    real = scanner.scan_batch

    def twice(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scanner, "scan_batch", twice)
    with pytest.raises(KeyboardInterrupt):
        scanner.scan(model, prompts(), ["v"], ("kl",), journal=journal)
    journal.write_text(journal.read_text() + '{"name": "cut he')  # killed in mid-line
    resumed = scanner.scan(model, prompts(), ["v"], ("kl",), journal=journal, resume=True)
    assert len(calls) == 4, "prompts that were scored already must not run again"
    assert json.dumps(resumed) == json.dumps(whole)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(UserError, match="scanned with model"):
        scanner.scan(model, prompts(), ["v"], ("kl",), journal=journal, resume=True)


@torch.no_grad()
def test_generation_without_layers_equals_a_model_built_smaller():
    model = make("gemma3_text")
    ids = prompts()[0]["input_ids"]
    small = make("gemma3_text", num_hidden_layers=2)
    state = {
        k.replace("layers.2.", "layers.1."): v for k, v in model.state_dict().items() if "layers.1." not in k
    }
    small.load_state_dict(state)
    small.config.layer_types = [model.config.layer_types[0], model.config.layer_types[2]]
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    before = model.generate(ids, **settings)
    restore = remove_layers(model, [1])
    assert torch.equal(model(ids).logits, small(ids).logits)
    assert torch.equal(model.generate(ids, **settings), small.generate(ids, **settings))
    restore()
    assert torch.equal(model.generate(ids, **settings), before) and model.config.num_hidden_layers == 3


def test_greedy_takes_the_best_next_layer_and_beam_is_never_worse():
    model, calibration = make(num_hidden_layers=5), prompts((9, 10))
    first = choose_layers.loss_without(model, calibration)
    drop, trace = choose_layers.search(model, calibration, 3, 1)
    assert trace[1][0] == (min((k for k in first if k >= 0), key=first.get),)
    assert trace[-1][1] == pytest.approx(choose_layers.loss_without(model, calibration, drop)[-1], rel=1e-5)
    wide, wide_trace = choose_layers.search(model, calibration, 3, 10)
    assert wide_trace[-1][1] <= trace[-1][1] + 1e-9 and len(wide) == 3
    from itertools import combinations

    best = min(combinations(range(5), 3), key=lambda s: choose_layers.loss_without(model, calibration, s)[-1])
    assert wide == list(best), "a beam wider than all sets must find the best one"


def test_single_shot_criteria_take_the_lowest_scores():
    rows = [
        {"mode": m, "layer": i, "head": None, "distance": d, "score_mean": v}
        for m, d, values in (
            ("v", "kl", [3, 1, 2, 0.5]),
            ("layer", "block_influence", [0.1, 5, 5, 0.2]),
            ("layer", "kl", [9, 0, 0.1, 9]),
            ("layer", "nll_change", [0, 0, 5, 5]),
        )
        for i, v in enumerate(values)
    ]
    assert choose_layers.choose("sensitivity", 2, 4, rows)[0] == [1, 3]
    assert choose_layers.choose("block_influence", 2, 4, rows)[0] == [0, 3]
    assert choose_layers.choose("leave_one_out", 2, 4, rows)[0] == [1, 2]
    assert choose_layers.choose("perplexity", 2, 4, rows)[0] == [0, 1]
    angles = [[[abs(a - b) if (a, b) != (2, 4) else 0.1 for b in range(5)] for a in range(5)]]
    assert choose_layers.choose("angular", 2, 4, rows, angles)[0] == [2, 3]
    assert choose_layers.choose("last", 2, 4)[0] == [2, 3] and choose_layers.choose("first", 2, 4)[0] == [
        0,
        1,
    ]
    sets = {tuple(choose_layers.choose("random_keep0", 2, 4, seed=s)[0]) for s in range(20)}
    assert len(sets) > 1 and not any(0 in s for s in sets)
    assert choose_layers.choose("random", 2, 4, seed=3) == choose_layers.choose("random", 2, 4, seed=3)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_window_is_scored_in_one_wavefront(count, monkeypatch):
    model, calibration = make(num_hidden_layers=5), prompts((9, 12))
    wanted = [
        choose_layers.loss_without(model, calibration, range(s, s + count))[-1] for s in range(6 - count)
    ]
    runs = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda *call: runs.append(len(call[1][0])))
    drop, loss = choose_layers.best_window(model, calibration, count)
    start = min(range(len(wanted)), key=wanted.__getitem__)
    assert drop == list(range(start, start + count)) and loss == pytest.approx(wanted[start], rel=1e-5)
    behind = sum(range(6 - count))  # layer passes of the windows, beside those of the whole model
    assert sum(runs) == 2 * (5 + behind), "layers run that no window needs"


def test_budget_is_met_with_as_few_layers_as_possible():
    model = make(num_hidden_layers=6)
    total, each = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in decoder_layers(model)[0].parameters()),
    )
    assert choose_layers.layers_for_budget(model, total - each) == 1
    assert choose_layers.layers_for_budget(model, total - each - 1) == 2
    for impossible in (total, 10):
        with pytest.raises(UserError, match="--target-params"):
            choose_layers.layers_for_budget(model, impossible)

    # a mixture whose first three layers are small: how many go depends on which
    mixture = pruning_zoo.make("deepseek_v3", pruning_zoo.ZOO["deepseek_v3"])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(mixture)]
    target = sum(p.numel() for p in mixture.parameters()) - max(sizes)
    orders = {"small ones first": range(6), "large ones first": range(5, -1, -1)}
    needed = {
        name: choose_layers.layers_for_budget(mixture, target, pick=lambda count, order=order: order[:count])
        for name, order in orders.items()
    }
    assert sizes[0] < sizes[-1] and needed == {"small ones first": 2, "large ones first": 1}


@torch.no_grad()
def test_a_search_passes_by_sets_whose_layers_others_work_with():
    """Gemma's last layers work with the keys of the last own layer of their kind; only naive passes run."""
    settings = {**pruning_zoo.GEMMA, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 6}
    model, calibration = pruning_zoo.make("gemma4_text", settings), prompts((9,), 90)
    alone = choose_layers.loss_without(model, calibration)
    assert alone.keys() == {-1, *range(6)}
    with masked(model, 4, "layer"):
        ids = calibration[0]["input_ids"]
        assert alone[4] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    drop, _ = choose_layers.search(model, calibration, 3, 6)
    assert 3 not in drop or {4, 5} <= {*drop}
    with pytest.raises(UserError, match="--criterion window: .* share keys and values.*by greedy or beam"):
        choose_layers.best_window(model, calibration, 2)


@torch.no_grad()
def test_a_layer_that_takes_no_further_rows_is_scanned_by_other_methods():
    """As layers that look up the words of a prompt, row by row."""
    model, words = make(), prompts((9,))[0]["input_ids"]
    layer = decoder_layers(model)[1]
    layer.register_forward_pre_hook(lambda module, args: [words[row] for row in range(len(args[0]))] and None)
    variants = scan_methods.list_variants(model, [])
    found = {
        m: scan_methods.scan_batch(model, prompts((9,)), variants, (), m)[0] for m in ("cached", "naive")
    }
    losses = [[v["nll"] for v in record["variants"]] for record in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(UserError, match="takes no rows beside those of its prompts .*use --method cached"):
        scan_methods.scan_batch(model, prompts((9,)), variants, ())
    assert choose_layers.loss_without(model, prompts((9,)))[0] == pytest.approx(losses[1][0], rel=1e-5)


@torch.no_grad()
def test_budgets_in_bytes_and_seconds():
    model = make(num_hidden_layers=6).bfloat16()
    total, each = (sum(p.numel() for p in m.parameters()) for m in (model, decoder_layers(model)[0]))
    assert choose_layers.layers_for_budget(model, 2 * (total - each), in_bytes=True) == 1
    assert choose_layers.layers_for_budget(model, 2 * (total - each) - 1, in_bytes=True) == 2

    def seconds(model):
        return 1.0 + len(decoder_layers(model))

    assert choose_layers.layers_for_time(model, 5.0, seconds) == 2
    assert choose_layers.layers_for_time(model, 4.9, seconds) == 3 and len(decoder_layers(model)) == 6
    for impossible in (7.0, 1.5):
        with pytest.raises(UserError, match="--target-seconds"):
            choose_layers.layers_for_time(model, impossible, seconds)


@pytest.mark.slow
def test_the_default_is_the_loss_without_a_layer_and_the_scan_says_so(folder, tmp_path, capsys):
    out = tmp_path / "s.csv"
    call(scanner, model=folder, out=out)
    said = capsys.readouterr().out.split("without each alone: ")[1].split(",")[0].split()[0]
    flags = {"records": out.with_suffix(".records.jsonl"), "ratio": 0.25, "out": tmp_path / "plan.json"}
    call(choose_layers, **flags)
    (choice,) = json.loads((tmp_path / "plan.json").read_text())["choices"]
    assert choice["criterion"] == "perplexity" and choice["drop_layers"] == said
    capsys.readouterr()

    # upstream's measure goes by the distance that the CSV shows, and warns at the ends
    call(choose_layers, **flags, criterion="sensitivity")
    least = min(csv.DictReader(open(out)), key=lambda row: float(row["score_mean"]))["layer"]
    assert json.loads((tmp_path / "plan.json").read_text())["choices"][0]["drop_layers"] == least
    assert "warning: sensitivity chose layer" in capsys.readouterr().err


def test_builtin_prompts_are_balanced():
    lines = [
        json.loads(line)
        for line in open(scanner.Path(scanner.__file__).with_name("prompts.jsonl"), encoding="utf-8")
    ]
    sets = [line["set"] for line in lines]
    assert len(builtin_prompts()) == 18 and {s: sets.count(s) for s in sets} == {
        "english": 6,
        "chinese": 6,
        "radiology": 6,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm") / "tiny"
    make_llm(path, make_tokenizer(builtin_prompts(), 400), num_hidden_layers=4)
    return path


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "phi3", "mixtral"])
def test_every_family_goes_the_whole_way(model_type, tmp_path):
    """Chosen by loss, pruned on disk, counted, healed, tested: configs and projections have other names."""
    tokenizer = make_tokenizer(builtin_prompts(), 400)
    model = make(model_type, vocab_size=len(tokenizer), max_position_embeddings=256)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(builtin_prompts()[:4]))
    folder, texts = tmp_path / "model", tmp_path / "texts.txt"
    plan = tmp_path / "plan.json"
    call(choose_layers, "--model", folder, prompts=texts, criterion="greedy", ratio=0.3, out=plan)
    spec = json.loads(plan.read_text())["choices"][0]["drop_layers"]
    call(prune_llm, ckpt=folder, out_dir=tmp_path, plan=plan)
    pruned = tmp_path / f"hf_drop{spec}_{spec}"
    loaded, ids = AutoModelForCausalLM.from_pretrained(pruned).eval(), prompts()[0]["input_ids"]
    with without_layers(model, [int(spec)]):
        assert torch.equal(loaded(ids).logits, model(ids).logits) and loaded.config.num_hidden_layers == 2
    count = count_params.describe(pruned, count_params.parse_args([str(pruned)]))["total"]
    assert count["layers"] == 2 and count["KV-cache of 2048 tokens, bytes"] > 0
    with torch.enable_grad():
        run = {"max_steps": 2, "gradient_accumulation_steps": 1, "out": tmp_path / "healed"}
        call(train, pruned_model_path=pruned, texts=texts, **run)
        assert train.set_trained(loaded, full=True) and all(
            p.requires_grad for p in decoder_layers(loaded).parameters()
        )
    call(test, pruned_model_path=tmp_path / "healed/model", texts=texts, out_dir=tmp_path / "results")
    assert json.loads(next((tmp_path / "results").glob("*_scores.json")).read_text())["layers"] == 2


def test_lora_on_modules_that_are_not_there_is_one_line(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("a text of several words\n")
    with pytest.raises(UserError, match="no linear module 'c_attn'; it has .*q_proj"):
        paths = {"pruned_model_path": folder, "texts": tmp_path / "texts.txt", "out": tmp_path / "x"}
        call(train, **paths, lora_target_modules="c_attn")


def test_the_records_are_those_of_the_prompts_that_were_asked_for(tmp_path):
    """A prompt that stands twice counts twice, whatever the batches, and on a second start too."""
    model, journal = make(), tmp_path / "s.records.jsonl"
    for batch_size in (1, 4):
        found = scanner.scan(model, prompts() * 2, [], ("kl",), batch_size=batch_size, journal=journal)
        assert len(found) == 6
        for again in (False, True):
            if again:
                scanner.scan(model, prompts() * 2, [], ("kl",), journal=journal, resume=True)
            records, distance = choose_layers.read_records(journal)
            assert sorted(r["key"] for r in records) == sorted(r["key"] for r in found) and distance == "kl"
    scanner.scan(model, prompts()[:2], [], ("kl",), journal=journal, resume=True)
    assert [r["name"] for r in choose_layers.read_records(journal)[0]] == ["0", "1"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[:2], "1 of 2 prompts are not scanned"),
        (lambda lines: lines[:1], "2 of 2 prompts are not scanned"),
        (lambda lines: [*lines[:2], lines[2][:40]], "not a whole records file"),
        (lambda lines: ['{"text": "a"}'] * 2, "not a whole records file"),
        (lambda lines: ["layer,score_mean"], "not a whole records file"),
        (lambda lines: [], "not a whole records file"),
        (lambda lines: [lines[0].replace('"kl"', ""), *lines[1:]], "not a whole records file"),
    ],
)
def test_records_that_are_not_whole_are_refused(change, message, tmp_path):
    journal = tmp_path / "s.records.jsonl"
    scanner.scan(make(), prompts()[:2], [], ("kl",), journal=journal)
    journal.write_text("\n".join(change(journal.read_text().splitlines())))
    with pytest.raises(UserError, match=message):
        choose_layers.read_records(journal)


def test_scores_that_are_no_numbers_choose_nothing():
    rows = [
        {"mode": "layer", "layer": i, "distance": "nll_change", "score_mean": v}
        for i, v in enumerate([1, math.nan])
    ]
    with pytest.raises(
        UserError, match="nll_change of layer 1 with layer off is no number; .*--dtype float32"
    ):
        scanner.layer_scores(rows, "layer", "nll_change")


@pytest.mark.slow
def test_command_writes_upstreams_columns_and_the_plan_names_layers(folder, tmp_path, capsys):
    out = tmp_path / "layer_sensitivity.csv"
    words = ["--model", folder, "--out", out, "--mode", "qv", "mlp", "--sanity_check"]
    call(scanner, *words)
    printed = capsys.readouterr().out
    assert (
        out.read_text().splitlines()[0] == "layer,score_mean,score_std,prompt_count"
        and len(out.read_text().splitlines()) == 5
    )
    assert "Layer 00, mean=" in printed and out.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(UserError, match="--resume"):
        call(scanner, *words)
    plan = tmp_path / "plan.json"
    records = out.with_suffix(".records.jsonl")
    call(choose_layers, records=records, criterion="sensitivity", mode="qv", ratio=0.5, out=plan)
    assert json.loads(plan.read_text())["choices"][0]["layers_left"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mode", "z_only"], "--mode z"),
        (["--model", "nowhere"], "config.json"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--task-samples", "4"], "--task-samples has no effect without --task-data"),
        (["--task-data", "x", "--dtype", "float16"], "--dtype has no effect with --task-data"),
    ],
)
def test_bad_arguments_are_named(folder, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        call(scanner, "--model", folder, "--out", tmp_path / "s.csv", *arguments)


@pytest.mark.parametrize("words", [["--max-tokens", "1"], ["--batch-size", "0"], ["--distance", "l3"]])
def test_numbers_out_of_range_end_with_one_line_and_status_2(words, capsys):
    with pytest.raises(SystemExit) as leaving:
        scanner.parse_args(["--model", "x", *words])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and words[0] in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--criterion", "greedy", "--model", "x", "--mode", "mlp"], "--mode has no effect"),
        (["--criterion", "last", "--model", "x", "--distance", "kl"], "--distance has no effect"),
        (["--criterion", "last", "--model", "x", "--seeds", "3"], "--seeds has no effect"),
        (["--criterion", "greedy", "--model", "x", "--beam-width", "3"], "--beam-width has no effect"),
        (["--criterion", "greedy"], "--model is needed"),
        (["--criterion", "block_influence"], "needs --records"),
        (["--criterion", "last"], "give --records or --model"),
        (
            ["--criterion", "last", "--records", "x", "--prompts", "y"],
            "--prompts has no effect without --model",
        ),
    ],
)
def test_options_of_choosing_without_effect_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        call(choose_layers, "--ratio", "0.5", *words)


def test_interrupting_the_command_says_how_to_go_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "scan_batch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="--resume"):
        call(scanner, model=folder, out=tmp_path / "s.csv")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "{}", "line 1"),
        ("b.txt", "\n \n", "no prompts"),
        ("c.jsonl", "x", "line 1"),
        ("d.jsonl", '\n{"text": "a"}\n\n{"text": 5}\n', "line 4 is no JSON object with a text"),
        ("e.jsonl", '{"text": "a \\ud800"}', "line 1"),
        ("f.jsonl", '{"text": ""}\n', "no prompts"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)


def test_a_text_is_a_line_of_the_file_and_keeps_its_number(tmp_path):
    lines = ["first", "", "page\fbreak and \u2028 another", " ", "last"]
    (tmp_path / "t.txt").write_text("\r\n".join(lines), encoding="utf-8")
    (tmp_path / "t.JSONL").write_text(
        "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    for name in ("t.txt", "t.JSONL"):
        wanted = {f"{tmp_path / name}, line {n}": lines[n - 1] for n in (1, 3, 5)}
        assert read_texts(tmp_path / name) == wanted


@pytest.mark.parametrize("kind, more", [("gpt2", {}), ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64})])
def test_texts_are_as_long_as_a_table_of_positions_at_most(kind, more, tmp_path, capsys):
    model, texts = tmp_path / "m", tmp_path / "t.txt"
    make_llm(model, make_tokenizer(["the lung is clear"], 300), kind, max_position_embeddings=128, **more)
    texts.write_text("the lung is clear " * 100 + "\nthe lung")
    words = {"pruned_model_path": model, "texts": texts}
    call(scanner, model=model, prompts=texts, out=tmp_path / "s.csv")
    call(test, **words, out_dir=tmp_path)
    call(train, **words, max_steps=1, accum=1, batch_size=1, out=tmp_path / "healed")
    window = {**words, "out_dir": tmp_path, "window": 129}
    more = {"model": model, "prompts": texts, "max_tokens": 129, "out": tmp_path / "x.csv"}
    longer = {**words, "max_length": 129, "out": tmp_path / "x"}
    for script, flags in ((test, window), (scanner, more), (train, longer)):
        with pytest.raises(UserError, match=r"129: this model has positions for 128 tokens"):
            call(script, **flags)
    call(test, **{**window, "window": 128})
    rotary = make(max_position_embeddings=8)
    args = test.parse_args(options({**words, "out_dir": tmp_path}))
    capsys.readouterr()
    assert longest(rotary, args, "max_length") == 512, "rotary positions go on"
    assert not capsys.readouterr().out
    for wide, told in ((8, 0), (9, 1)):
        assert longest(rotary, test.parse_args(options({**window, "window": wide})), "window") == wide
        told = [f"windows of {wide} are beyond the 8 positions of config.json"] * told
        assert [line.split(";")[0] for line in capsys.readouterr().out.splitlines()] == told


def test_results_of_names_with_a_dot_lie_apart(tmp_path):
    assert scanner.beside(Path("scan.v1"), ".png").name == "scan.v1.png"
    assert scanner.beside(Path("a b.csv"), ".all.csv").name == "a b.all.csv"
    for name in ("llama-3.1", "llama-3.1.bin"):
        (tmp_path / name).mkdir() if name.endswith("1") else (tmp_path / name).write_text("")
        words = {"pruned_model_path": tmp_path / name, "texts": "t.txt", "out_dir": tmp_path}
        assert test.make_name(test.parse_args(options(words))) == "llama-3.1"


def test_prompts_that_are_too_short_are_left_out_and_told(folder, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("The heart is of normal size.\n\na\nThe lung is clear.\n")
    words = {"prompts": tmp_path / "t.txt", "model": folder, "out": tmp_path / "x"}
    texts = {"pruned_model_path": folder, "texts": tmp_path / "t.txt", "out": tmp_path / "x"}
    (tmp_path / "map.json").write_text(
        json.dumps({"new_layers": 4, "layer_id_map": {i: i for i in range(4)}})
    )
    repair = {"repair": "linear", "teacher": folder, "prune_map_path": tmp_path / "map.json"}
    scripts = {
        scanner: words,
        choose_layers: {**words, "criterion": "greedy", "ratio": 0.5},
        prune_width: {**words, "mlp_ratio": 0.5},
        train: {**texts, **repair},
    }
    for i, (script, flags) in enumerate(scripts.items()):
        call(script, **{**flags, "out": tmp_path / f"{i}"})
        out = capsys.readouterr().out
        assert (
            f"1 of 3 texts have fewer than two tokens and are left out, first {tmp_path}/t.txt, line 3" in out
        )
    (tmp_path / "t.txt").write_text("a\nb\n")
    for script, flags in scripts.items():
        with pytest.raises(UserError, match="t.txt: no text has two tokens"):
            call(script, **flags)
    with pytest.raises(UserError, match="t.txt: no text has two tokens"):
        train.text_rows(tmp_path / "t.txt", without_end(folder), 8)
    (tmp_path / "t.txt").write_text("a\nThe lung is clear.\n")
    assert [row["id"][-6:] for row in train.text_rows(tmp_path / "t.txt", without_end(folder), 8)] == [
        "line 2"
    ]


@pytest.fixture
def grown(tmp_path):
    """A folder of a Qwen 2 whose tokenizer lacks the end of text of its class, which transformers adds."""
    tokenizer = make_tokenizer(builtin_prompts(), 400)
    make_llm(tmp_path / "m", tokenizer, "qwen2", num_hidden_layers=4)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>"}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(settings))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == len(tokenizer) + 1
    return tmp_path / "m"


def test_a_word_that_the_model_has_no_row_for_is_named_with_its_text(grown, tmp_path):
    (tmp_path / "t.txt").write_text("the lung is clear\nx <|endoftext|> y\n")
    words = {"prompts": tmp_path / "t.txt", "model": grown, "out": tmp_path / "x"}
    texts = {"pruned_model_path": grown, "texts": tmp_path / "t.txt", "out": tmp_path / "x"}
    rows = len(make_tokenizer(builtin_prompts(), 400))
    named = rf"t.txt, line 2: the word '<\|endoftext\|>' is number {rows}, the model's table has {rows} rows"
    for script, flags in ((scanner, words), (train, texts), (test, texts), (test, {**texts, "window": 8})):
        with pytest.raises(UserError, match=named):
            call(script, **flags)
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_stays_as_it_was_byte_for_byte(grown, tmp_path):
    (tmp_path / "t.txt").write_text("the lung is clear\na\nthe heart is of normal size\n")
    texts = {"texts": tmp_path / "t.txt", "max_steps": 2, "accum": 1, "batch_size": 1}
    call(train, pruned_model_path=grown, **texts, out=tmp_path / "healed")
    width = {"prompts": tmp_path / "t.txt", "mlp_ratio": 0.5, "out": tmp_path / "narrow"}
    call(prune_width, model=grown, **width)
    for folder in (tmp_path / "healed/model", tmp_path / "narrow"):
        for file in grown.glob("*token*"):
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def without_end(folder):
    """A tokenizer that has no end-of-text token, as those of some older models."""
    _, tokenizer = train.load_model(folder)
    tokenizer.eos_token = None
    return tokenizer


def test_a_model_that_is_no_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=32, d_model=16, num_layers=2, d_kv=4, num_heads=2, d_ff=16)
    with pytest.raises(UserError, match="only decoders"):
        decoder_layers(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("form", [(1, 2), [1, 2], namedtuple("Output", ["states", "weights"])(1, 2), 1])
def test_new_states_take_the_form_of_the_old(form):
    new = layer_mask.as_output(form, 7)
    assert type(new) is type(form) and layer_mask.states_of(new) == 7
    assert form == 1 or new[1] == 2


def test_mixed_projections_say_which_modes_work():
    with pytest.raises(UserError, match="attention"):
        with masked(make("gpt_neox"), 0, "v"):
            pass


@pytest.mark.slow
def test_bench_of_the_real_size_runs_small(capsys, bfloat16):
    from bench.pruning import real_size

    rows = real_size(
        torch.device("cpu"), 1, layers=4, hidden=64, vocabulary=256, drops=((), (1, 2)), tokens=4
    )
    assert {"naive", "wavefront", "latency, 4 layers", "latency, 2 layers"} <= rows.keys()
