"""Words become tokens here and nowhere else: whatever a user or an annotation writes is text.

Tokenizers look for their control tokens in any text, so that a caption with "<image>", "<|im_end|>" or
"<tool_call>" in it would bring a second picture, the end of the turn or a call. `encode_text` splits them
into the ordinary tokens of their letters; every other text gets the tokens that it always had.
"""

import json
import re

from tokenizers import Tokenizer

from common.errors import UserError

# Some tokenizers keep ordinary letters among their added tokens (DeepSeek: "õ"); these stay tokens. What is
# written in brackets steers the model, whether or not the tokenizer calls it special.
MARKUP = re.compile(r"^\s*(<.*>|\[.*\]|\{.*\})\s*$", re.DOTALL)

WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")  # Chinese has no blanks: each character is one


def words_of(text: str) -> list:
    """Words of a text to compare it by: without punctuation and capitals."""
    return WORD.findall(text.lower())


def control_tokens(tokenizer) -> dict:
    """{id: text} of the added tokens that steer a model instead of being words; kept beside the tokenizer."""
    if not hasattr(tokenizer, "added_tokens_decoder"):
        return {}  # a bare function from text to ids
    size, control = getattr(tokenizer, "flmm_control", (None, None))
    if size != len(tokenizer):
        added = tokenizer.added_tokens_decoder
        control = {i: str(t) for i, t in added.items() if t.special or MARKUP.match(str(t))}
        tokenizer.flmm_control = len(tokenizer), control
    return control


def refuse_halves(text: str, source=""):
    """UserError where `text` holds half a character, as bytes that are no UTF-8 and cut JSON leave it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        where = f"{source}: " if source else ""
        raise UserError(f"{where}{text!r} holds what is no character; write it anew in UTF-8") from None


def encode_text(tokenizer, text: str, source="") -> list[int]:
    """Ids of `text` without special tokens around it; the control tokens in it are split into letters.
    source: what an error names."""
    refuse_halves(text, source)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    control = control_tokens(tokenizer)
    if not control.keys() & set(ids):
        return ids
    ids = _without_control(tokenizer).encode(text, add_special_tokens=False).ids
    if control.keys() & set(ids):  # a vocabulary that holds the token as a word, too: letter by letter
        ids = [i for letter in text for i in _without_control(tokenizer).encode(letter).ids]
    return ids


def _without_control(tokenizer) -> Tokenizer:
    """A copy of the tokenizer's backend that knows no control token; made once, kept beside the tokenizer."""
    size, plain = getattr(tokenizer, "flmm_plain", (None, None))
    if size != len(tokenizer):
        control = set(control_tokens(tokenizer).values())
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in control]
        # templates of the post-processor name special tokens, and nothing is to be added here anyway
        content = {**content, "post_processor": None, "padding": None, "truncation": None}
        plain = Tokenizer.from_str(json.dumps(content))
        tokenizer.flmm_plain = len(tokenizer), plain
    return plain


def encode_parts(tokenizer, parts, **options) -> list[int]:
    """Ids of the parts [(text, is it a user's words?)] of a prompt. options: for the tokenizer, which adds
    its special tokens around the whole unless they say otherwise.

    Parts of a template keep their control tokens; those in a user's words are split into letters. Where no
    words hold any, all parts are tokenised as one string, as upstream does; else one by one.
    """
    control = control_tokens(tokenizer).keys()
    words = [text for text, users in parts if users]
    for text in words:
        refuse_halves(text)
    if not any(control & set(tokenizer(text, add_special_tokens=False).input_ids) for text in words):
        return tokenizer("".join(text for text, _ in parts), **options).input_ids
    (first, _), *rest = parts
    ids = tokenizer(first, **options).input_ids
    for text, users in rest:
        ids += encode_text(tokenizer, text) if users else tokenizer(text, add_special_tokens=False).input_ids
    return ids
