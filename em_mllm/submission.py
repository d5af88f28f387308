"""The answer file of the competition:
{"team_name", "model_name", "evaluation_time", "answers": [{"id", "pred"}]}."""

from datetime import datetime

from common.checkpoint import atomic_json
from common.errors import UserError
from common.files import read_json
from em_mllm.options import looks_like_choice, parse_options

TIME = "%Y-%m-%d %H:%M:%S"


def write_submission(path, answers, team_name: str, model_name: str):
    """Write the answers to the four-choice questions among `answers` to `path`."""
    content = {
        "team_name": team_name,
        "model_name": model_name,
        "evaluation_time": datetime.now().strftime(TIME),
        "answers": [{"id": a["id"], "pred": a["pred"]} for a in answers if "pred" in a],
    }
    atomic_json(path, content)


def validate_submission(path, questions) -> str:
    """Check an answer file against the question records `questions`.

    Returns a summary in one line; raises UserError naming the first fault.
    """
    content = read_json(path, {"team_name": str, "model_name": str, "evaluation_time": str, "answers": list})
    for name in ("team_name", "model_name"):
        if not content[name]:
            raise UserError(f"{path}: {name} is empty; write a name")
    try:
        datetime.strptime(content["evaluation_time"], TIME)
    except ValueError as error:
        raise UserError(
            f"{path}: evaluation_time is {content['evaluation_time']!r}, expected YYYY-MM-DD HH:MM:SS"
        ) from error
    # of a question whose options cannot be read, any letter may be the answer
    wanted = {r.get("id"): parse_options(r) for r in questions if parse_options(r) or looks_like_choice(r)}
    unread = sum(not options for options in wanted.values())
    seen = set()
    for n, answer in enumerate(content["answers"]):
        _check_answer(f"{path}: answers[{n}]", answer, wanted, seen)
        seen.add(answer["id"])
    if missing := [i for i in wanted if i not in seen]:
        raise UserError(f"{path}: {len(missing)} questions have no answer, the first is id {missing[0]}")
    said = f"; the options of {unread} questions could not be read, any letter was taken" if unread else ""
    return f"{path}: valid, {len(seen)} answers{said}"


def _check_answer(where: str, answer, wanted: dict, seen: set):
    """Raise UserError unless `answer` answers one of the questions `wanted` {id: options} that is not among
    `seen`."""
    if not isinstance(answer, dict) or type(answer.get("id")) is not int:
        raise UserError(f"{where}: id is missing or not a whole number")
    if answer["id"] not in wanted:
        raise UserError(f"{where}: id {answer['id']} is not among the questions")
    if answer["id"] in seen:
        raise UserError(f"{where}: id {answer['id']} is answered twice")
    options = wanted[answer["id"]] or "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if answer.get("pred") not in options:
        raise UserError(f"{where}: pred is {answer.get('pred')!r}, expected one of {', '.join(options)}")
