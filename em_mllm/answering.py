"""Answers of a model to collated questions: generated text, and the likelihood of every option."""

import torch

from em_mllm.options import candidate, extract_letter, parse_options

INPUTS = ("iq", "iq_lengths", "fs", "signal_index", "input_ids", "attention_mask")
SIGNALS = ("iq", "iq_lengths", "fs")


@torch.no_grad()
def ask(model, tokenizer, batch, records, max_new_tokens: int, wordings=None) -> list[dict]:
    """Generate for one collated batch and score the options of its questions with options; one dict per
    record.

    wordings: of complete answers, as the model was trained ({"zh": template, "en": template}).
    """
    inputs = {k: batch[k] for k in INPUTS}
    stop = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")} - {None}
    how = dict(do_sample=False, eos_token_id=sorted(stop), pad_token_id=tokenizer.pad_token_id)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **how)
    texts = [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    options = [parse_options(r) for r in records]
    likelihood = score_options(model, tokenizer, inputs, records, options, wordings)
    answers = []
    for i, (record, text) in enumerate(zip(records, texts)):
        answer = {"id": record.get("id"), "text": text}
        if options[i]:
            extracted = extract_letter(text, options[i])
            best = list(options[i])[int(likelihood[i].argmax())]
            answer |= {
                "options": options[i],
                "extracted": extracted,
                "pred": extracted or best,
                "likeliest": best,
                "scores": [round(float(v), 5) for v in likelihood[i]],
            }
        answers.append(answer)
    return answers


def score_options(model, tokenizer, inputs, records, options, wordings) -> dict:
    """{row: log-likelihood of each option's complete answer} of the rows that have options."""
    scored = [i for i, o in enumerate(options) if o]
    if not scored:
        return {}
    encode = lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tails = [
        [encode(candidate(records[i]["question"], a, n, wordings)) for a, n in options[i].items()]
        for i in scored
    ]
    part = {k: v if k in SIGNALS else v[scored] for k, v in inputs.items()}
    return dict(zip(scored, model.option_scores(options=tails, **part)))
