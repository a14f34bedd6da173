"""Text from a language model, piece by piece, as its tokens come.

A token is a piece of bytes, not of text: a character outside ASCII may need several. So the text of all tokens so far is
decoded again at each step, and what is new in it is handed out once it ends with a whole character.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..nn import Transformer, stream
from .tokenizer import Tokenizer

NEW_TOKENS = 256                                           # at most, where nothing else is said
PARTIAL = "\N{REPLACEMENT CHARACTER}"                      # what a decoder writes for bytes that are no whole character


def stream_text(model: Transformer, tokenizer: Tokenizer | None, prompt: str, *, max_new_tokens: int | None = None,
                chat: bool | None = None, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
                adapter_name: str | None = None, seed: int = 0) -> Iterator[str]:
    """The model's continuation of a prompt, or its answer to it, as pieces of text; "".join of them is all of it.

    chat: whether the prompt is a user's message, written down by the tokenizer's chat template (default: if it has one).
    max_new_tokens: by default as many as the context has room for, at most 256; the end of text stops it before. adapter_name:
    one of the model's, or "__base__"; by default the active ones are at work. The other options are those of `generate`.

    Raises ValueError for an empty prompt, one that leaves no room in the context, a model that is no language model, one
    without a tokenizer, and for chat=True without a template; ImportError without jinja2 where a template is used.
    """
    ids = prompt_ids(model, tokenizer, prompt, chat)
    assert tokenizer is not None
    count = new_tokens(model, ids, max_new_tokens, NEW_TOKENS)
    names = None if adapter_name is None else [adapter_name]
    tokens = stream(model, [ids], count, adapter_names=names, temperature=temperature,
                    top_k=top_k, top_p=top_p, eos_token_id=tokenizer.eos_token_id, seed=seed)
    return pieces(tokenizer, ids, (int(token[0]) for token in tokens))


def new_tokens(model: Transformer, ids: Sequence[int], wanted: int | None, most: int) -> int:
    """How many tokens may come after a prompt: those wanted, or (None) as many as the context has room for, up to `most`.

    Raises ValueError if the prompt is empty, or the context has no room for those wanted, or for any.
    """
    room = model.cfg.max_len - len(ids)
    if not ids:
        raise ValueError("the tokenizer makes no token of the prompt, expected at least one: give some text")
    if wanted is not None and wanted < 0:
        raise ValueError(f"{wanted} new tokens are wanted, expected at least 0")
    if room < (1 if wanted is None else wanted):
        raise ValueError(f"the prompt has {len(ids)} tokens and {'at least 1' if wanted is None else wanted} new ones are "
                         f"wanted, expected at most {model.cfg.max_len} together, the model's context: shorten the prompt, or "
                         "ask for fewer")
    return min(room, most) if wanted is None else wanted


def prompt_ids(model: Transformer, tokenizer: Tokenizer | None, prompt: str, chat: bool | None = None) -> list[int]:
    """The ids that stand before the model's first own token. Arguments and errors as in `stream_text`."""
    if not model.cfg.causal or model.cfg.head != "lm":
        raise ValueError(f"the model is causal={model.cfg.causal} with head={model.cfg.head!r}, expected a causal language "
                         "model: take one that was made to write")
    if tokenizer is None:
        raise ValueError("the model's folder has no tokenizer, expected its tokenizer.json: add the file, or give ids to "
                         "generate")
    if not prompt:
        raise ValueError("the prompt is empty, expected at least one character")
    if tokenizer.chat_template is not None if chat is None else chat:
        return tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]), add_special_tokens=False)
    return tokenizer.encode(prompt)


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text that tokens add to a prompt, held back while it ends in the midst of a character.

    A last character that never becomes whole is left out.
    """
    ids, text = list(prompt), ""
    shown = len(tokenizer.decode(ids, skip_special_tokens=True))
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(text) > shown and not text.endswith(PARTIAL):
            yield text[shown:]
            shown = len(text)
    if rest := text[shown:].rstrip(PARTIAL):
        yield rest
