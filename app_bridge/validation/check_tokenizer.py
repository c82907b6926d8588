"""The tokenizer files, as swift-transformers reads them, and the app's prompt through them.

Read in swift-transformers 0.1.18 to 0.1.24 (`Tokenizers/Tokenizer.swift`, `BPETokenizer.swift`, `PreTokenizer.swift`,
`Normalizer.swift`, `PostProcessor.swift`, `Decoder.swift`) and in mlx-swift-examples 2.21.2
(`MLXLMCommon/Evaluate.swift`: an answer ends at the tokenizer's own eos token or unknown token, whatever config.json
says).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from app_bridge.app.facts import AppFacts
from app_bridge.rules import finding
from app_bridge.validation.check_config import integer
from app_bridge.validation.subject import Subject, kind_of, listed
from fastvlm.common.findings import Steps
from fastvlm.data.chat_template import TemplateFault, render
from model_export import contract

# `knownTokenizers` of 0.1.18 that are byte-pair encoders; a suffix Fast is dropped.
_CLASSES = tuple(
    f"{name}Tokenizer"
    for name in ("CodeGen", "CodeLlama", "Cohere", "Falcon", "GPT2", "Gemma", "Llama", "PreTrained", "Qwen2", "Whisper")
)
# The types that each factory has; another one is a fatalError.
_TYPES = {
    "normalizer": "Sequence Prepend Replace Lowercase NFD NFC NFKD NFKC Bert BertNormalizer Precompiled StripAccents"
    " Strip",
    "pre_tokenizer": "Sequence ByteLevel Punctuation Digits Split Whitespace WhitespaceSplit Metaspace"
    " BertPreTokenizer",
    "post_processor": "TemplateProcessing ByteLevel RobertaProcessing BertProcessing Sequence",
    "decoder": "Sequence WordPiece ByteLevel Replace ByteFallback Fuse Strip Metaspace",
}
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a Sequence
_FILES = f"{contract.TOKENIZER} and {contract.TOKENIZER_CONFIG}"
_QUESTION = "Describe the image."
_TEXT = "A \"Café\" isn't at 12:30,  it's #5 (東京 🙂)!\n\n\tYes."  # NFC; cases, signs, blanks, bytes beyond ASCII


@dataclass(frozen=True)
class Files:
    """The tokenizer's documents. ids: all tokens. added: the added ones. config: config.json, {} where unreadable."""

    facts: AppFacts
    settings: dict[str, Any]
    document: dict[str, Any]
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    ids: Mapping[str, int]
    added: Mapping[str, int]

    @property
    def end(self) -> str:
        """The text that ends a turn."""
        return self.facts.turn.rpartition("{content}")[2].strip()

    def special(self, name: str) -> Any:
        """A special token in tokenizer_config.json: text, or an object with text."""
        value = self.settings.get(name)
        return value.get("content") if isinstance(value, dict) else value


def check_tokenizer(
    subject: Subject, config: dict[str, Any] | None, rows: int | None, tokens: int | None
) -> Steps[None]:
    """Check the tokenizer's files, and the app's prompt through them.

    Args:
        subject: the artefact.
        config: config.json, None where it can't be read.
        rows: of the embedding table, None where unknown.
        tokens: that stand for a picture, None where unknown.
    """
    files = yield from read_tokenizer(subject, config)
    if files is None:
        return
    sound = yield from check_components(files)
    if not (yield from check_same(files)):
        yield from _check_image_token(files, subject.changed)
        yield from _check_turn(files)
        yield from _check_prompt_tokens(files, tokens)
    yield from check_text(files, sound)
    limit = rows if rows is not None else integer(files.config.get("vocab_size"))
    beyond = sorted((number, token) for token, number in files.ids.items() if limit is not None and number >= limit)
    if beyond:
        number, token = beyond[-1]
        got = f"id {number} ({len(beyond)} such tokens)"
        yield finding("vocabulary-size", f"{contract.TOKENIZER}: {token!r}", got, limit=limit)
    yield from _check_template(subject, files)
    counts = f"{len(files.ids)} tokens, {len(files.added)} of them added"
    subject.checked.append(f"{contract.TOKENIZER}: {counts}; the app's prompt")


def read_tokenizer(subject: Subject, config: Mapping[str, Any] | None) -> Steps[Files | None]:
    """The tokenizer's documents as swift-transformers loads them; None after a finding that leaves nothing to check."""
    settings = yield from subject.read_json(contract.TOKENIZER_CONFIG)
    document = yield from subject.read_json(contract.TOKENIZER)
    if settings is None or document is None:
        return None
    name = settings.get("tokenizer_class")
    if not isinstance(name, str) or name.replace("Fast", "") not in _CLASSES:
        yield finding("tokenizer-class", f"{contract.TOKENIZER_CONFIG}: tokenizer_class", kind_of(name))
    tokenizer = yield from _load(subject, document)
    if tokenizer is None:
        return None
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
    ids: dict[str, int] = document["model"]["vocab"] | added  # the library would number added tokens anew
    return Files(subject.facts, settings, document, config or {}, tokenizer, ids, added)


def _load(subject: Subject, document: Mapping[str, Any]) -> Steps[Tokenizer | None]:
    model = document.get("model")
    if not isinstance(model, dict) or "merges" not in model or not isinstance(model.get("vocab"), dict):
        got = kind_of(model.get("type") if isinstance(model, dict) else model)
        yield finding("tokenizer-model", f"{contract.TOKENIZER}: model", got)
        return None
    try:
        return Tokenizer.from_file(str(subject.folder / contract.TOKENIZER))
    except Exception as error:  # the library raises plain ones
        yield finding("tokenizer-unreadable", contract.TOKENIZER, shorten(str(error), 80, placeholder="…"))
        return None


def check_components(files: Files) -> Steps[bool]:
    """Return whether swift-transformers has all of the tokenizer's steps, and a token for each byte."""
    sound = True
    for component, known in _TYPES.items():
        for kind in _types(files.document.get(component)):
            if kind not in known.split():
                sound = False
                yield finding("tokenizer-component", f"{contract.TOKENIZER}: {component}", kind_of(kind), known=known)
    bytewise = "ByteLevel" in _types(files.document.get("pre_tokenizer"))
    lost = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if bytewise and letter not in files.ids]
    if lost:
        sound, got = False, f"no token for {listed(sorted(lost))}"
        yield finding("tokenizer-bytes", f"{contract.TOKENIZER}: model.vocab", got)
    return sound


def _types(component: Any) -> Iterator[Any]:
    """The types in a component of tokenizer.json, those inside a Sequence, too."""
    if isinstance(component, dict):
        yield component.get("type")
        for part in _PARTS:
            for inner in component.get(part) or []:
                yield from _types(inner)


def check_same(files: Files) -> Steps[bool]:
    """Return whether the two tokenizer files are of two tokenizers."""
    decoder = files.settings.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    stated = {str(entry.get("content")): number for number, entry in entries if isinstance(entry, dict)}
    other = sorted(token for token, number in stated.items() if str(files.added.get(token)) != number)
    if other:
        yield finding("tokenizer-stale", _FILES, f"other ids for {listed(other)}")
    return bool(other)


def _check_image_token(files: Files, changed: frozenset[str]) -> Steps[None]:
    """The image token is a token of its own, with the id that config.json has."""
    token, index = files.facts.image_token, integer(files.config.get("image_token_index"))
    number = files.added.get(token)
    if number is None:
        yield finding("image-token", f"{_FILES}: added tokens", f"no {token}", token=token)
    elif index is not None and index != number:
        rule, where = "image-token-index", f"{contract.CONFIG}: image_token_index"
        if contract.TOKENIZER in changed and contract.CONFIG not in changed:
            rule, where = "tokenizer-stale/image", f"{_FILES}, changed since the export"
        yield finding(rule, where, f"{token} is {number}, image_token_index {index}")


def _check_turn(files: Files) -> Steps[None]:
    """The marks of a turn are tokens. An answer ends at the tokenizer's eos token, which has to be what ends a turn,
    and at its unknown token, which therefore can't be a token in use."""
    marks = set(re.findall(r"<\|[^<>|]+\|>", files.facts.turn + files.facts.prompt_end))
    if lost := sorted(marks - files.added.keys()):
        yield finding("turn-token", f"{_FILES}: added tokens", f"no {listed(lost)}")
    eos, unknown = files.special("eos_token"), files.special("unk_token")
    ids = files.config.get("eos_token_id")
    number = files.added.get(files.end)
    if eos != files.end:
        yield finding("eos-token", f"{contract.TOKENIZER_CONFIG}: eos_token", kind_of(eos), end=repr(files.end))
    elif ids is not None and number not in (ids if isinstance(ids, list) else [ids]):
        yield finding("eos-token-id", f"{contract.CONFIG}: eos_token_id", kind_of(ids), number=number, end=files.end)
    if not isinstance(unknown, str) or unknown not in files.ids or unknown == files.end:
        return
    if unknown not in files.added or unknown in prompt(files.facts, files.facts.image_token):
        got = f"{unknown!r}, a token of the {'prompt' if unknown in files.added else 'vocabulary'}"
        yield finding("unk-token", f"{contract.TOKENIZER_CONFIG}: unk_token", got)


def _check_prompt_tokens(files: Files, tokens: int | None) -> Steps[None]:
    """The app's whole prompt, tokenized: the image tokens in one row, and nothing put before or after it."""
    image = files.tokenizer.token_to_id(files.facts.image_token)  # its own number
    if image is None or tokens is None:
        return
    text = prompt(files.facts, _QUESTION + files.facts.image_token * tokens)
    ids, bare = (files.tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False))
    if ids != bare:
        where, got = f"{contract.TOKENIZER}: post_processor", f"{len(ids) - len(bare)} tokens around the prompt"
        yield finding("tokenizer-adds-tokens", where, got)
    if bare.count(image) != tokens:
        where, got = f"{contract.TOKENIZER}: {files.facts.image_token}", f"{bare.count(image)} of {tokens}"
        yield finding("image-token/each", where, got)


def check_text(files: Files, sound: bool) -> Steps[None]:
    """Text comes back from its tokens as it was: another normalizer or decoder shows up in every answer."""
    clean_up = files.settings.get("clean_up_tokenization_spaces")
    if clean_up is not False:
        where = f"{contract.TOKENIZER_CONFIG}: clean_up_tokenization_spaces"
        yield finding("text-clean-up", where, kind_of(clean_up))
    if not sound:
        return
    ids = files.tokenizer.encode(_TEXT, add_special_tokens=False).ids
    if (back := files.tokenizer.decode(ids, skip_special_tokens=False)) != _TEXT:
        where = f"{contract.TOKENIZER}: normalizer, pre_tokenizer and decoder"
        yield finding("tokenizer-text", where, f"{back!r} for {_TEXT!r}")


def prompt(facts: AppFacts, content: str) -> str:
    """The prompt that the app builds of one question."""
    turns = (
        facts.turn.replace("{role}", role).replace("{content}", text)
        for role, text in (("system", facts.system_prompt), ("user", content))
    )
    return facts.turn_separator.join(turns) + facts.prompt_end


def _check_template(subject: Subject, files: Files) -> Steps[None]:
    """The app builds its prompt itself; the artefact's template says what the model was trained with."""
    template, where = files.settings.get("chat_template"), f"{contract.TOKENIZER_CONFIG}: chat_template"
    if not isinstance(template, str):
        subject.checked.append(f"{where}: none to compare the app's prompt with")
        return
    tokens = {name: files.special(name) for name in files.settings if name.endswith("_token")}
    try:
        rendered = render(template, [{"role": "user", "content": _QUESTION}], tokens)
    except TemplateFault as error:
        yield finding("chat-template", where, shorten(str(error), 80, placeholder="…"))
        return
    if rendered != (written := prompt(files.facts, _QUESTION)):
        yield finding("prompt", where, f"the app writes {written!r}", rendered=repr(rendered))
