"""The tokenizer files, as swift-transformers reads them, and the app's prompt through them.

Read in swift-transformers 0.1.18 to 0.1.24 (`Tokenizers/Tokenizer.swift`, `BPETokenizer.swift`, `PreTokenizer.swift`,
`Normalizer.swift`, `PostProcessor.swift`, `Decoder.swift`) and in mlx-swift-examples 2.21.2
(`MLXLMCommon/Evaluate.swift`: an answer ends at the tokenizer's own eos token or unknown token, whatever config.json
says).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from app_bridge.app.facts import AppFacts
from app_bridge.validation.check_config import integer
from app_bridge.validation.subject import OWN_TOKENIZER, Subject, error_at, kind_of, listed, shortened, warn_at
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
class _Files:
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
        """What ends a turn."""
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
    settings = yield from subject.read_json(contract.TOKENIZER_CONFIG)
    document = yield from subject.read_json(contract.TOKENIZER)
    if settings is None or document is None:
        return
    name = settings.get("tokenizer_class")
    if not isinstance(name, str) or name.replace("Fast", "") not in _CLASSES:
        where, expected = f"{contract.TOKENIZER_CONFIG}: tokenizer_class", "Qwen2Tokenizer, or another of"
        yield error_at("tokenizer-class", where, kind_of(name), f"{expected} swift-transformers' byte-pair classes")
    tokenizer = yield from _load(subject, document)
    if tokenizer is None:
        return
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
    ids: dict[str, int] = document["model"]["vocab"] | added  # the library would number added tokens anew
    files = _Files(subject.facts, settings, document, config or {}, tokenizer, ids, added)
    sound = yield from _check_components(files)
    if not (yield from _check_same(files)):
        yield from _check_image_token(files, subject.changed)
        yield from _check_turn(files)
        yield from _check_prompt_tokens(files, tokens)
    yield from _check_text(files, sound)
    limit = rows if rows is not None else integer(files.config.get("vocab_size"))
    beyond = sorted((number, token) for token, number in ids.items() if limit is not None and number >= limit)
    if beyond:
        number, token = beyond[-1]
        got = f"id {number} ({len(beyond)} such tokens)"
        expected = f"ids below {limit}, the rows of the embedding table"
        yield error_at("vocabulary-size", f"{contract.TOKENIZER}: {token!r}", got, expected, OWN_TOKENIZER)
    yield from _check_template(subject, files)
    subject.checked.append(f"{contract.TOKENIZER}: {len(ids)} tokens, {len(added)} of them added; the app's prompt")


def _load(subject: Subject, document: Mapping[str, Any]) -> Steps[Tokenizer | None]:
    model = document.get("model")
    if not isinstance(model, dict) or "merges" not in model or not isinstance(model.get("vocab"), dict):
        got = kind_of(model.get("type") if isinstance(model, dict) else model)
        expected = "BPE with vocab and merges"
        yield error_at("tokenizer-model", f"{contract.TOKENIZER}: model", got, expected, OWN_TOKENIZER)
        return None
    try:
        return Tokenizer.from_file(str(subject.folder / contract.TOKENIZER))
    except Exception as error:  # the library raises plain ones
        got = shortened(" ".join(str(error).split()))
        yield error_at("tokenizer-unreadable", contract.TOKENIZER, got, "a tokenizer's document")
        return None


def _check_components(files: _Files) -> Steps[bool]:
    """Return whether swift-transformers has all of the tokenizer's steps, and a token for each byte."""
    sound = True
    for component, known in _TYPES.items():
        for kind in _types(files.document.get(component)):
            if kind not in known.split():
                sound, where = False, f"{contract.TOKENIZER}: {component}"
                yield error_at("tokenizer-component", where, kind_of(kind), f"one of swift-transformers': {known}")
    bytewise = "ByteLevel" in _types(files.document.get("pre_tokenizer"))
    lost = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if bytewise and letter not in files.ids]
    if lost:
        sound, got = False, f"no token for {listed(sorted(lost))}"
        expected = "one for each byte: the app crashes at the first text with another"
        yield error_at("tokenizer-bytes", f"{contract.TOKENIZER}: model.vocab", got, expected)
    return sound


def _types(component: Any) -> Iterator[Any]:
    """The types in a component of tokenizer.json, those inside a Sequence, too."""
    if isinstance(component, dict):
        yield component.get("type")
        for part in _PARTS:
            for inner in component.get(part) or []:
                yield from _types(inner)


def _check_same(files: _Files) -> Steps[bool]:
    """Return whether the two tokenizer files are of two tokenizers."""
    decoder = files.settings.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    stated = {str(entry.get("content")): number for number, entry in entries if isinstance(entry, dict)}
    other = sorted(token for token, number in stated.items() if str(files.added.get(token)) != number)
    if other:
        got, remedy = f"other ids for {listed(other)}", "take both files from the model's own export"
        yield error_at("tokenizer-stale", _FILES, got, "the same added tokens in both", remedy)
    return bool(other)


def _check_image_token(files: _Files, changed: frozenset[str]) -> Steps[None]:
    """The image token is a token of its own, with the id that config.json has."""
    token, index = files.facts.image_token, integer(files.config.get("image_token_index"))
    number = files.added.get(token)
    if number is None:
        expected = f"{token} as a token of its own: the app writes it for each image token"
        remedy = "export again, or change the app's imageToken"
        yield error_at("image-token", f"{_FILES}: added tokens", f"no {token}", expected, remedy)
    elif index is not None and index != number:
        rule, where = "image-token-index", f"{contract.CONFIG}: image_token_index"
        if contract.TOKENIZER in changed and contract.CONFIG not in changed:
            rule, where = "tokenizer-stale", f"{_FILES}, changed since the export"
        expected = "the same: the app looks for that id to put the picture's features there"
        yield error_at(rule, where, f"{token} is {number}, image_token_index {index}", expected)


def _check_turn(files: _Files) -> Steps[None]:
    """The marks of a turn are tokens. An answer ends at the tokenizer's eos token, which has to be what ends a turn,
    and at its unknown token, which therefore can't be a token in use."""
    marks = set(re.findall(r"<\|[^<>|]+\|>", files.facts.turn + files.facts.prompt_end))
    if lost := sorted(marks - files.added.keys()):
        expected = "each a token of its own: the app's prompt has them"
        yield error_at("turn-token", f"{_FILES}: added tokens", f"no {listed(lost)}", expected)
    eos, unknown = files.special("eos_token"), files.special("unk_token")
    ids = files.config.get("eos_token_id")
    number = files.added.get(files.end)
    if eos != files.end:
        expected = f"{files.end!r}, which ends a turn: the app stops at this and at unk_token, nowhere else"
        yield error_at("eos-token", f"{contract.TOKENIZER_CONFIG}: eos_token", kind_of(eos), expected)
    elif ids is not None and number not in (ids if isinstance(ids, list) else [ids]):
        remedy = "export again; the published app goes by the tokenizer, later loaders by this key, too"
        where = f"{contract.CONFIG}: eos_token_id"
        yield warn_at("eos-token-id", where, kind_of(ids), f"{number}, the id of {files.end}", remedy)
    if not isinstance(unknown, str) or unknown not in files.ids or unknown == files.end:
        return
    if unknown not in files.added or unknown in prompt(files.facts, files.facts.image_token):
        got = f"{unknown!r}, a token of the {'prompt' if unknown in files.added else 'vocabulary'}"
        expected = "null, or a token that no text has: the app ends an answer there"
        remedy = "export again, or set unk_token to null"
        yield warn_at("unk-token", f"{contract.TOKENIZER_CONFIG}: unk_token", got, expected, remedy)


def _check_prompt_tokens(files: _Files, tokens: int | None) -> Steps[None]:
    """The app's whole prompt, tokenized: the image tokens in one row, and nothing put before or after it."""
    image = files.tokenizer.token_to_id(files.facts.image_token)  # its own number
    if image is None or tokens is None:
        return
    text = prompt(files.facts, _QUESTION + files.facts.image_token * tokens)
    ids, bare = (files.tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False))
    if ids != bare:
        where, got = f"{contract.TOKENIZER}: post_processor", f"{len(ids) - len(bare)} tokens around the prompt"
        yield error_at("tokenizer-adds-tokens", where, got, "none: the app's prompt is complete", OWN_TOKENIZER)
    if bare.count(image) != tokens:
        where, got = f"{contract.TOKENIZER}: {files.facts.image_token}", f"{bare.count(image)} of {tokens}"
        yield error_at("image-token", where, got, "one token each, as the app writes them")


def _check_text(files: _Files, sound: bool) -> Steps[None]:
    """Text comes back from its tokens as it was: another normalizer or decoder shows up in every answer."""
    clean_up = files.settings.get("clean_up_tokenization_spaces")
    if clean_up is not False:
        where = f"{contract.TOKENIZER_CONFIG}: clean_up_tokenization_spaces"
        expected = "false: without it the app takes the blanks before . , ? ! and 's out of every answer"
        yield warn_at("text-clean-up", where, kind_of(clean_up), expected)
    if not sound:
        return
    ids = files.tokenizer.encode(_TEXT, add_special_tokens=False).ids
    if (back := files.tokenizer.decode(ids, skip_special_tokens=False)) != _TEXT:
        where = f"{contract.TOKENIZER}: normalizer, pre_tokenizer and decoder"
        expected = "the same text: a byte-level tokenizer loses nothing"
        yield error_at("tokenizer-text", where, f"{back!r} for {_TEXT!r}", expected, OWN_TOKENIZER)


def prompt(facts: AppFacts, content: str) -> str:
    """What the app makes of one question."""
    turns = (
        facts.turn.replace("{role}", role).replace("{content}", text)
        for role, text in (("system", facts.system_prompt), ("user", content))
    )
    return facts.turn_separator.join(turns) + facts.prompt_end


def _check_template(subject: Subject, files: _Files) -> Steps[None]:
    """The app builds its prompt itself; the artefact's template says what the model was trained with."""
    template, where = files.settings.get("chat_template"), f"{contract.TOKENIZER_CONFIG}: chat_template"
    if not isinstance(template, str):
        subject.checked.append(f"{where}: none to compare the app's prompt with")
        return
    tokens = {name: files.special(name) for name in files.settings if name.endswith("_token")}
    try:
        rendered = render(template, [{"role": "user", "content": _QUESTION}], tokens)
    except TemplateFault as error:
        yield warn_at("chat-template", where, shortened(str(error)), "a template for a list of messages")
        return
    if rendered != (written := prompt(files.facts, _QUESTION)):
        expected, remedy = f"{rendered!r}, as the model was trained", "expect worse answers, or change the app's prompt"
        yield warn_at("prompt", where, f"the app writes {written!r}", expected, remedy)
