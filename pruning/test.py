"""Test a pruned model: the reports it writes and their scores, perplexity, latency and memory.

    python pruning/test.py --pruned-model-path pruned/hf_drop23_28 --texts reports.txt --out-dir results
    python pruning/test.py --data data/dia_pangu --lang-model-path path/to/llm --out-dir results \\
        --pruned-model-path pruned/pytorch_model_pruned_drop23_28_merged_clean_v0112_en_cpu.bin \\
        --prune-map-path pruned/prune_layer_map_drop23_28_v0112_en_cpu.json

Of a report model it writes <prefix>_<tag>.csv with the columns ID, Question, Ground Truth, Pred and GT_labels
(UTF-8), <prefix>_<tag>_per_sample_timing.csv, _timing.json and _scores.json; of a plain language model
_scores.json with perplexity, latency and memory. Upstream: after-pruning-tools/test_pruned_{CN,EN}_cli.py.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator
from torch import nn

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_csv, atomic_json
from common.errors import UserError, run
from common.files import reading
from common.run import one_process, seed_everything
from pruning.layers import decoder_layers, longest
from pruning.pruning_tools.language_model import read_map
from pruning.sensitivity_analyse.eval_metric import perplexity
from pruning.sensitivity_analyse.load_model import (
    add_pruned_arguments,
    check_kind,
    check_words,
    load_model,
    read_texts,
)

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}  # upstream's


def parse_args(argv=None):
    p = Parser(__doc__)
    add_model_arguments(p.add_argument_group("model"))
    add_test_arguments(p.add_argument_group("data and test"))

    # names as upstream's, so that results of both lie side by side: <prefix>_<tag>
    out = p.add_argument_group("results")
    out.add_argument("--out-dir", "--out", type=Path, required=True, help="folder of the results")
    out.add_argument(
        "--out-prefix",
        help="first part of their names; left out: dia-pangu-pruned, of a plain language model llm",
    )
    out.add_argument(
        "--tag-style", choices=("c", "drop"), default="drop", help="second part: c23_28 or drop23_28"
    )
    out.add_argument(
        "--tag-override",
        help="the second part itself; left out: the tag of the map, else the name of the checkpoint",
    )
    return p.parse_args(argv)


def add_model_arguments(group):
    add_pruned_arguments(group)
    group.add_argument("--lora-alpha", type=float, help="alpha of LoRA, where nothing else says it")


def add_test_arguments(group):
    # which of the two there is decides what kind of model is tested
    group.add_argument("--data", type=Path, help="a CTRG folder, to test a report model")
    group.add_argument(
        "--texts", type=Path, help="texts, one a line or a .jsonl file, to test a plain language model"
    )
    group.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="partition of --data"
    )
    group.add_argument(
        "--limit", type=number(int, 0), default=0, help="use only the first samples; 0: use all"
    )

    # plain language models: what a perplexity is taken over, because numbers compare only if that is equal
    group.add_argument(
        "--max-length", type=number(int, 2), default=512, help="longest text in tokens; longer ones are cut"
    )
    group.add_argument(
        "--window",
        type=number(int, 2),
        help="score the texts as one stream in windows of so many tokens, as published perplexities do "
        "(2048); left out: each text by itself",
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks for the package lm-eval, by its names (arc_easy) or as .yaml files of your own; with "
        "--limit only the first items of each",
    )

    # report models: how reports are written; greedy by default, so that two models compare without chance
    group.add_argument("--cache", type=Path, help="folder for prepared volumes")
    group.add_argument("--batch-size", type=number(int, 1), default=16, help="samples at a time")
    group.add_argument(
        "--max-new-tokens", type=number(int, 1), default=300, help="longest report in tokens (upstream 300)"
    )
    group.add_argument(
        "--do-sample", action="store_true", help="sample as upstream: temperature 0.7, top-k 50, top-p 0.95"
    )
    group.add_argument("--seed", type=int, default=20, help="random seed of the sampling (upstream 20)")


def make_name(args) -> str:
    """The second part of the results' names."""
    # upstream's test scripts say c23_28 where its pruning tool says drop23_28
    if args.tag_override:
        return args.tag_override
    path = args.pruned_model_path.absolute()
    tag = path.stem if path.is_file() else path.name  # llama-3.1 is no llama-3
    if args.prune_map_path:
        tag = read_map(args.prune_map_path).get("tag", tag)
    return tag.replace("drop", "c", 1) if args.tag_style == "c" else tag


def nearest_rank(values, fraction: float) -> float:
    """Percentile as upstream: the value at position round((n - 1) * fraction) of the sorted list."""
    return sorted(values)[round((len(values) - 1) * fraction)]


@torch.no_grad()
def text_losses(model, tokenizer, texts, max_length: int = 512) -> torch.Tensor:
    """(N, 2): the summed loss and the number of scored tokens of each text, cut to `max_length` tokens.

    A text of fewer than two tokens predicts nothing: both are 0.
    """
    # one at a time: no padding, and the longest text decides the memory
    losses = [token_losses(model, tokenizer(text).input_ids[:max_length]) for text in texts]
    return torch.tensor([[some.sum().item(), len(some)] for some in losses], dtype=torch.float64)


@torch.no_grad()
def stream_losses(model, tokenizer, texts, window: int = 2048, piece: int | None = None) -> torch.Tensor:
    """`text_losses` of the texts as one stream, an empty line between them, in windows of `window` tokens.

    That is how perplexity on WikiText is published: no overlap, each window's first token is not scored.
    piece: a row for every so many scored tokens of a window, for intervals; left out: a row for each window.
    """
    # the windows do not overlap, so the first tokens of each are judged after very little text
    ids = tokenizer("\n\n".join(texts)).input_ids
    rows = []
    for start in range(0, len(ids), window):
        losses = token_losses(model, ids[start : start + window])
        parts = losses.split(piece) if piece and len(losses) else [losses]
        rows += [[some.sum().item(), len(some)] for some in parts]
    return torch.tensor(rows, dtype=torch.float64)


def token_losses(model, ids: list[int], piece: int = 512) -> torch.Tensor:
    """(N - 1,) float64: the loss of each token but the first, from `piece` float32 logits at a time."""
    # one token predicts nothing
    if len(ids) < 2:
        return torch.zeros(0, dtype=torch.float64)

    # half-precision logits (N - 1, V) stay as they are: a float32 copy of all would be the largest tensor
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    parts = zip(logits.split(piece), tokens[0, 1:].split(piece))
    losses = [nn.functional.cross_entropy(a.float(), b, reduction="none").double().cpu() for a, b in parts]
    return torch.cat(losses)


@torch.no_grad()
def latency(lang_model, prompt_tokens: int = 64, new_tokens: int = 32, repeats: int = 3) -> dict:
    """Time and size of a language model.

    seconds: to generate `new_tokens` after a prompt of `prompt_tokens`, the fastest of `repeats`. parameters
    and weight_bytes: tied tensors count once. kv_cache_bytes_per_token: keys and values of all layers.
    """
    # made-up ids, the first three left out, which are often special tokens: time does not depend on words
    embedding = lang_model.get_input_embeddings().weight
    prompt = torch.arange(prompt_tokens, device=embedding.device)[None] % (len(embedding) - 3) + 3

    # always the same number of new tokens, so that models compare; the fastest of them, which no other
    # process on the machine has disturbed
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        lang_model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        times.append(time.perf_counter() - start)

    # what it weighs, and what each token of context adds
    unique = {id(p): p for p in lang_model.parameters()}.values()
    return {
        "seconds": min(times),
        "tokens_per_second": new_tokens / min(times),
        "parameters": sum(p.numel() for p in unique),
        "weight_bytes": sum(p.numel() * p.element_size() for p in unique),
        "kv_cache_bytes_per_token": cache_bytes(lang_model, prompt[:, :8]),
    }


@torch.no_grad()
def cache_bytes(lang_model, prompt) -> int:
    """Bytes of keys and values that the model really keeps for each token of a prompt (1, N)."""
    # the cache itself is asked: not every layer of a hybrid keeps keys and values
    past = lang_model(input_ids=prompt, use_cache=True).past_key_values
    kept = [
        getattr(layer, part, None) for layer in getattr(past, "layers", []) for part in ("keys", "values")
    ]
    return sum(t.numel() * t.element_size() for t in kept if torch.is_tensor(t)) // prompt.shape[1]


def check(args, processes: int = 1):
    """Refuse what is missing and what would have no effect, before anything is loaded."""
    # two processes would write one file
    one_process(processes, "a model is scored")
    check_kind(args)

    # what belongs to the other kind of model
    if args.texts:
        only_reports = ["lang_model_path", "lora_alpha", "split", "cache", "batch_size", "max_new_tokens"]
        refuse(args, [*only_reports, "do_sample", "seed"], "with --texts")
        if args.window:
            refuse(args, ["max_length"], "beside --window")
    else:
        refuse(args, ["trust_remote_code", "max_length", "window", "tasks"], "with --data")
        if not args.do_sample:
            refuse(args, ["seed"], "without --do-sample")

    # a name that is given has no style
    if args.tag_override:
        refuse(args, ["tag_style"], "beside --tag-override")


def score_texts(args, device):
    """Return (language model, its scores on --texts)."""
    model, tokenizer = load_model(args.pruned_model_path, trust_remote_code=args.trust_remote_code)
    placed = read_texts(args.texts, args.limit or None)
    check_words(model, tokenizer, placed)
    places, texts = zip(*placed.items())

    # (rows, 2): summed loss and scored tokens, so that the mean is over tokens and not over texts
    score, option = (stream_losses, "window") if args.window else (text_losses, "max_length")
    losses = score(model.to(device), tokenizer, texts, longest(model, args, option))

    # they count among "texts" and score nothing, so it is told
    unscored = (losses[:, 1] == 0).nonzero().flatten().tolist()
    if len(unscored) == len(losses):
        raise UserError(f"{args.texts}: no text has two tokens, so that nothing can be scored")
    if unscored:
        parts, first = ("windows", "") if args.window else ("texts", f", first {places[unscored[0]]}")
        count = f"{len(unscored)} of {len(losses)} {parts}"
        print(f"{count} have fewer than two tokens and are not scored{first}")

    # the number of tokens stands beside the perplexity: two tokenizers cut the same text differently
    scores = {"texts": len(texts), "tokens": int(losses[:, 1].sum()), "perplexity": perplexity(losses)}
    if args.tasks:
        scores |= score_tasks(model, tokenizer, args.tasks, args.limit)
    return model, scores


def score_tasks(model, tokenizer, tasks, limit: int) -> dict:
    """{"<task> <metric>": value} of lm-eval's zero-shot scores, the optional package that papers use."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--tasks needs the package lm-eval ({error}); pip install lm-eval") from error

    # a task by name is lm-eval's own; of a file it wants the folder, and the name that stands inside
    names, folders = [], set()
    for task in tasks:
        file = Path(task)
        if file.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        with reading(file, "lm-eval task"):
            # lm-eval's own tags, such as !function, stay unread here
            names.append(re.search(r"""(?m)^task:\s*["']?([^\s"'#]+)""", file.read_text(encoding="utf-8"))[1])
        folders.add(str(file.resolve().parent))

    # an unknown name is refused before the model runs
    manager = TaskManager(include_path=sorted(folders) or None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"--tasks {unknown[0]}: lm-eval knows no such task; lm-eval ls tasks lists its own")

    # the model as it stands in memory, not read a second time from its folder
    with reading(" ".join(tasks), "list of lm-eval tasks"):
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=names,
            limit=limit or None,
            task_manager=manager,
        )
    # beside numbers the rows hold texts, such as a task's alias
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, row in found["results"].items()
        for metric, value in row.items()
        if isinstance(value, float)
    }


def score_reports(args, device, stem: Path):
    """Write the reports of one partition and their timing beside `stem`; return (language model, scores)."""
    from pruning import report_model  # dia_pangu's code, which plain language models do not need

    # the model; reading it is timed as upstream does
    started = time.perf_counter()
    model, text, config = report_model.load_report_model(
        args.pruned_model_path, args.lang_model_path, args.prune_map_path, args.lora_alpha
    )
    if not config["lora"]:
        refuse(args, ["lora_alpha"], "for a checkpoint without LoRA")
    model = model.to(device)
    loaded = time.perf_counter() - started

    # volumes go through the vision part once; the reports and their losses start from its tokens
    samples = report_model.Encoded(
        model, text, config, args.data, args.split, args.limit, args.cache, batch=args.batch_size
    )

    # the reports, in upstream's columns
    sampling = SAMPLING if args.do_sample else {}
    made = report_model.write_reports(model, text, samples, args.max_new_tokens, args.batch_size, **sampling)
    items = [samples[i] for i in range(len(samples))]
    truths, labels = [s["report"] for s in items], [s["cls_labels"].tolist() for s in items]
    rows = [
        {
            "ID": sample["id"],
            "Question": question,
            "Ground Truth": sample["report"],
            "Pred": report,
            "GT_labels": json.dumps(sample["cls_labels"].tolist()),
        }
        for sample, question, report in zip(items, made["questions"], made["reports"])
    ]
    atomic_csv(stem.with_name(stem.name + ".csv"), rows)

    # how long each took
    times = made["milliseconds"]  # equal within a batch, whose time is shared out
    rows = [{"ID": s["id"], "InferTimeMs": f"{taken:.2f}"} for s, taken in zip(items, times)]
    atomic_csv(stem.with_name(stem.name + "_per_sample_timing.csv"), rows)
    timing = {
        "load_seconds": loaded,
        "avg_ms": sum(times) / len(times),
        "min_ms": min(times),
        "max_ms": max(times),
        **{f"p{p}_ms": nearest_rank(times, p / 100) for p in (50, 90, 95, 99)},
    }
    atomic_json(stem.with_name(stem.name + "_timing.json"), timing)

    # what they are worth: the losses are those of the true reports, not of the written ones
    losses = report_model.report_losses(model, text, samples, args.batch_size)
    return model.lang_model, report_model.report_scores(truths, made["reports"], labels, losses)


def main(args):
    # contradictions end the run before a model is read; accelerate is asked for the device alone
    accelerator = Accelerator()
    check(args, accelerator.num_processes)
    device = accelerator.device
    seed_everything(args.seed)
    prefix = args.out_prefix or ("llm" if args.texts else "dia-pangu-pruned")
    stem = args.out_dir / f"{prefix}_{make_name(args)}"

    # quality: perplexity of texts, or the scores of written reports
    if args.texts:
        lang_model, scores = score_texts(args, device)
    else:
        lang_model, scores = score_reports(args, device, stem)

    # cost: the language model alone; peak memory is that of the CPU, not of a GPU
    scores |= {
        "layers": len(decoder_layers(lang_model)),
        **latency(lang_model),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    atomic_json(stem.with_name(stem.name + "_scores.json"), scores)
    for name, value in scores.items():
        print(f"  {name:28} {shown(value)}")
    print(f"wrote {stem}_scores.json")


def shown(value) -> str:
    """A score for the screen: four digits behind the point where it is a number with a fraction."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main, parse_args())
