"""em_mllm: EM-134K and EM-Bench come in as their lines are, and are scored as published and as mended."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rouge_score")

import em_mllm.convert
import em_mllm.em_bench
from common.errors import UserError
from common.tiny_llm import make_tokenizer
from em_mllm.dataset import QuestionDataset, read_questions, task_pairs
from em_mllm.em_bench import mended, published
from em_mllm.options import looks_like_choice, parse_options

CHOICE = [
    ("B", "B. FM"),
    ("B", "B"),
    ("A", ""),
    ("C", "The answer is C"),
    ("D", "A"),
    ("A", "Amplitude?"),
    ("A signal", "A signal of some kind"),
    ("", "A"),
]
OPEN = [
    ("increase the power of the link", "increase the power of the link"),
    ("hop to another frequency", "hop frequency"),
    ("hop to another frequency", ""),
    ("提高发射功率", "提高发射功率"),
]


def tasks():
    item = lambda pair: {"answer": pair[0], "model_response": pair[1]}
    return {"Modulation": [item(p) for p in CHOICE], "Anti_CJ": [item(p) for p in OPEN]}


def test_published_summary_drops_empty_answers_compares_first_characters_and_mixes_scales():
    scores = published(tasks())
    # of the six pairs that are left: B B, B B, C T, D A, A A ("Amplitude?" begins with A), A A
    assert scores["Modulation_Accuracy"] == pytest.approx(400 / 6)
    # equal texts 1; "hop frequency" of 4 words: precision 1, recall 1/2; Chinese has no words for it: 0
    assert scores["Anti_CJ_ROUGE-L"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    rest = [scores["Anti_CJ_ROUGE-L"], scores["Anti_CJ_BLEU"]]
    assert scores["Overall_Avg_Score"] == pytest.approx((400 / 6 + sum(rest)) / 3)


def test_mended_summary_counts_empty_answers_reads_letters_and_keeps_scales_apart():
    scores = mended(tasks())
    choice, free = scores["choice"]["Modulation"], scores["open"]["Anti_CJ"]
    assert (choice["count"], choice["empty"], choice["without_key"], choice["unread"]) == (7, 1, 1, 2)
    assert choice["accuracy"] == pytest.approx(3 / 7)  # the two B and "The answer is C"
    assert (free["count"], free["empty"]) == (4, 1)
    assert free["rougeL"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert scores["mean_accuracy"] == choice["accuracy"] and scores["mean_rougeL"] == free["rougeL"]
    assert all(0 <= scores[f"mean_{name}"] <= 1 for name in ("accuracy", "rougeL", "bleu"))


def test_files_of_results_and_predictions_give_the_same_scores(tmp_path):
    (tmp_path / "results").mkdir()
    with open(tmp_path / "predictions.jsonl", "w", encoding="utf-8") as lines:
        for task, items in tasks().items():
            (tmp_path / f"results/{task}.json").write_text(json.dumps(items, ensure_ascii=False), "utf-8")
            for item in items:
                row = {"task": task, "answer": item["answer"] or None, "text": item["model_response"]}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    scores = []
    for name, option in (("results", "results"), ("predictions.jsonl", "predictions")):
        args = SimpleNamespace(results=None, predictions=None, out=tmp_path / f"out-{option}")
        setattr(args, option, tmp_path / name)
        em_mllm.em_bench.main(args)
        scores.append((args.out / "scores.json").read_text())
    assert json.loads(scores[0])["mended"]["choice"] == json.loads(scores[1])["mended"]["choice"]
    assert json.loads(scores[0])["published"] == pytest.approx(json.loads(scores[1])["published"])


def turn(role, value):
    return {"from": role, "value": value}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def convert(tmp_path, *paths):
    words = ["merlin", *map(str, paths), "--out", str(tmp_path / "out")]
    em_mllm.convert.main(em_mllm.convert.parse_args(words))


def test_lines_of_conversations_come_in_with_signals_in_the_middle_of_a_turn(tmp_path):
    rng = np.random.default_rng(0)
    signal = lambda points: rng.standard_normal((points, 2)).round(3).tolist()
    one, two = signal(64), [signal(64), signal(64)]
    ask = "Look at <iq_data> and choose. (A) FM (B) AM"
    path = write_lines(
        tmp_path / "Modulation.jsonl",
        {"id": "m1", "conversations": [turn("human", ask), turn("gpt", "B")], "iq_data": one},
        {
            "id": 2,
            "conversations": [turn("user", "哪两个？<iq_data><iq_data>"), turn("gpt", "甲")],
            "iq_data": two,
        },
        {
            "conversations": [
                turn("system", "You are an expert."),
                turn("human", "<iq_data>\nWhat?"),
                turn("gpt", "FM"),
                turn("human", "Sure?"),
                turn("gpt", ""),
            ],
            "iq_data": np.array(signal(96)).T.tolist(),
        },
    )
    convert(tmp_path, path)
    records = json.loads((tmp_path / "out/Modulation.json").read_text(encoding="utf-8"))
    assert [r["question"] for r in records] == [
        "Look at and choose. (A) FM (B) AM",
        "哪两个？",
        "You are an expert.\nWhat?",
        "You are an expert.\nWhat?\nFM\nSure?",
    ]
    assert [r.get("answer") for r in records] == ["B", "甲", "FM", None]
    assert [r["iq_index_in_h5"] for r in records] == [0, [1, 2], 0, 1]
    assert [r["source_id"] for r in records] == ["m1", 2, 2, 2]
    tokenizer = make_tokenizer(["Look at and choose"] * 3, 300)
    data = QuestionDataset(task_pairs(tmp_path / "out"), tokenizer, with_answers=False)
    assert [len(data[i]["iq"]) for i in range(4)] == [1, 2, 1, 1] and len(data[2]["iq"][0]) == 96
    scale = np.abs(one).max()
    np.testing.assert_allclose(data[0]["iq"][0], np.array(one) / scale, atol=1e-6)


def test_options_of_an_earlier_turn_are_none_of_a_later_one(tmp_path):
    ask, why = "<iq_data> 哪一个？(A) FM (B) AM", "为什么？"
    turns = [turn("human", ask), turn("gpt", "B"), turn("human", why), turn("gpt", "包络在变。")]
    line = json.dumps({"conversations": turns, "iq_data": [[0, 1]] * 8}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(line.encode("gbk"))
    convert(tmp_path, tmp_path / "x.jsonl")
    one, two = read_questions(tmp_path / "out/x.json")
    assert parse_options(one) == {"A": "FM", "B": "AM"} and two["question"].endswith(f"B\n{why}")
    assert parse_options(two) == {} and not looks_like_choice(two)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"conversations": [], "iq_data": [[0, 1]]}, "line 1: conversations: holds no turn of human"),
        ({"conversations": [turn("robot", "x")], "iq_data": [[0, 1]]}, "from is 'robot'"),
        ({"conversations": [turn("gpt", "x")], "iq_data": [[0, 1]]}, "answers no question"),
        ({"conversations": [turn("human", "x")], "iq_data": [[0, 1, 2]]}, "expected pairs of I and Q"),
        ({"conversations": [turn("human", "x")], "iq_data": []}, "expected pairs of I and Q"),
        ({"conversations": "x", "iq_data": []}, "conversations is text"),
        ({"conversations": [turn("human", "x")]}, "no field 'iq_data'"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, record, words):
    with pytest.raises(UserError, match=words) as error:
        convert(tmp_path, write_lines(tmp_path / "x.jsonl", record))
    assert "x.jsonl" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_two_files_of_one_name_do_not_overwrite_each_other(tmp_path):
    (tmp_path / "b").mkdir()
    record = {"conversations": [turn("human", "x")], "iq_data": [[0, 1]]}
    with pytest.raises(UserError, match="two files are called x"):
        convert(tmp_path, *(write_lines(tmp_path / name, record) for name in ("x.jsonl", "b/x.jsonl")))
