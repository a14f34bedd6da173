"""The tokenizer: the `tokenizers` library behind the few calls that a language model needs, and chat templates.

A tokenizer.json says everything about the text; which token ends a text, which one pads, and how a chat is written down
stand in the files beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .hf_config import read_json
from .hub import need

OLD = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")     # what tokenizer.json replaces
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. tokens: names such as "eos_token" -> the token's text; chat_template: Jinja, or None.

    backend is the object of the `tokenizers` library. It neither cuts nor pads: that is the batch's business.
    """

    def __init__(self, backend: Any, tokens: dict[str, str] | None = None, chat_template: str | None = None) -> None:
        self.backend, self.tokens, self.chat_template = backend, dict(tokens or {}), chat_template
        backend.no_truncation()
        backend.no_padding()
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the tokens that the model expects around it ([CLS] and [SEP], a beginning of text …).

        Raises ValueError for what is no text, or has halves of characters (surrogates, as bytes that are no UTF-8 become).
        """
        return list(self._encoded(text, add_special_tokens).ids)

    def _encoded(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:                                  # what the library makes of bytes that were no UTF-8, too
            raise ValueError(f"got {text!r:.60}, expected a text of whole characters: is it UTF-8?") from None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids (T,). Raises ValueError for an id that is not in the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise ValueError(f"ids from {min(ids)} to {max(ids)}, expected 0 to {len(self) - 1}: are they this tokenizer's?")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def encode_words(self, words: Sequence[str], *, add_special_tokens: bool = True) -> tuple[list[int], list[int | None]]:
        """(ids, for each id the index of its word) of words that are joined by blanks; None for a special token.

        Raises ValueError for a word without a character, since no token would be its own.
        """
        owner: list[int] = []                              # of each character of the text; a blank belongs to the next word
        for i, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"word {i} is {word!r}, expected at least one character that is not a blank: leave it out")
            owner += [i] * (len(word) + (i > 0))
        found = self._encoded(" ".join(words), add_special_tokens)
        last = [stop - 1 if stop > start else start for start, stop in found.offsets]      # a blank alone may have width 0
        return list(found.ids), [None if special else owner[min(at, len(owner) - 1)]
                                 for at, special in zip(last, found.special_tokens_mask)]

    def chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """A conversation [{"role": "user", "content": "…"}, …] as the text that the model was trained on.

        add_generation_prompt: end where the model's answer begins. The text holds its special tokens already, so encode it with
        add_special_tokens=False. The template is a program from outside: it runs in Jinja's sandbox.

        Raises ValueError without a template, and for messages that it refuses.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template, expected a model tuned for conversations: join the texts "
                             "yourself")
        jinja2: Any = need("jinja2")
        sandbox: Any = need("jinja2.sandbox")
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                            extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return environment.from_string(self.chat_template).render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **self.tokens)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"the chat template refuses the messages ({error}): expected a list of role and content, in the "
                             "order that the model knows") from None

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its name, such as "mask_token"; None if there is none."""
        return self.backend.token_to_id(self.tokens[name]) if name in self.tokens else None

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text."""
        return self.token_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills up a batch."""
        return self.token_id("pad_token")

    def __len__(self) -> int:
        """One more than the largest id."""
        return self.size

    def save(self) -> dict[str, str]:
        """The files that hold this tokenizer, tokenizer.json and tokenizer_config.json, and what to write into them."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.tokens
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {"tokenizer.json": self.backend.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


def read_tokenizer(folder: Path, model_config: dict[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model's folder, or None if it has no file of one.

    Raises ValueError for a tokenizer.json that is damaged, or has ids that a model of this vocabulary does not know.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        old = [name for name in OLD if (folder / name).is_file()]
        if old:
            raise ValueError(f"{folder} has {old[0]} but no tokenizer.json, expected one: load the tokenizer in transformers "
                             "and save_pretrained it once")
        return None
    backend = from_json(path.read_text(encoding="utf-8", errors="replace"), path)
    options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    more = read_json(folder / "special_tokens_map.json") if (folder / "special_tokens_map.json").is_file() else {}
    tokens = {name: text for name in SPECIAL if (text := _text(options.get(name)) or _text(more.get(name)))}
    for name in ("bos", "eos", "pad"):                     # the model's config knows ids, where the tokenizer's knows nothing
        number = model_config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if f"{name}_token" not in tokens and isinstance(number, int) and 0 <= number < 2**31:
            text = backend.id_to_token(number)
            tokens |= {f"{name}_token": text} if text else {}
    template = options.get("chat_template")
    if isinstance(template, list):                         # several by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return checked(Tokenizer(backend, tokens, template if isinstance(template, str) else None), vocab_size, path)


def from_json(text: str, where: Any) -> Any:
    """The backend that a tokenizer.json describes. Raises ValueError if it describes none."""
    tokenizers: Any = need("tokenizers")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:                             # the library raises nothing more special
        raise ValueError(f"{where} is not a tokenizer ({error}): copy or download it again") from None


def checked(tokenizer: Tokenizer, vocab_size: int, where: Any) -> Tokenizer:
    """The tokenizer, if the model knows all of its ids. (A model may know more: some tables are filled to a round number.)"""
    if not 0 < len(tokenizer) <= vocab_size:
        raise ValueError(f"{where} has {len(tokenizer)} ids, expected at most the model's vocabulary of {vocab_size}: do the "
                         "two belong together?")
    return tokenizer


def _text(token: Any) -> str | None:
    """A special token in a config: its text, or an object with its text as content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _refuse(message: str) -> None:
    raise ValueError(message)
