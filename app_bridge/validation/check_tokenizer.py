"""The tokenizer files, as swift-transformers reads them, and the app's prompt through them.

Read in swift-transformers 0.1.18 to 0.1.24 (`Tokenizers/Tokenizer.swift`, `BPETokenizer.swift`, `PreTokenizer.swift`,
`Normalizer.swift`, `PostProcessor.swift`, `Decoder.swift`) and in mlx-swift-examples 2.21.2
(`MLXLMCommon/Evaluate.swift`: an answer ends at the tokenizer's own eos token or unknown token, whatever config.json
says).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from app_bridge.subject import AGAIN, Subject, kind_of, listed, shortened
from app_bridge.validation.check_config import integer
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
_ADDED = f"{contract.TOKENIZER} and {contract.TOKENIZER_CONFIG}: added tokens"
_QUESTION = "Describe the image."
_TEXT = "A \"Café\" isn't at 12:30,  it's #5 (東京 🙂)!\n\n\tYes."  # NFC; cases, signs, blanks, bytes beyond ASCII


def check_tokenizer(subject: Subject, config: dict[str, Any] | None, rows: int | None, tokens: int | None) -> None:
    """Everything about the tokenizer; `rows` of the embedding table, image tokens of a picture: None where unknown."""
    settings, document = subject.read_json(contract.TOKENIZER_CONFIG), subject.read_json(contract.TOKENIZER)
    if settings is None or document is None:
        return
    tokenizer = _load(subject, document)
    _check_class(subject, settings)
    if tokenizer is None:
        return
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
    ids: dict[str, int] = document["model"]["vocab"] | added  # the library would number added tokens anew
    _check_components(subject, document, ids)
    if not _is_stale(subject, settings, added):
        _check_special(subject, settings, config, added)
        _check_unknown(subject, settings, ids, added)
        _check_prompt_tokens(subject, tokenizer, tokens)
    _check_text(subject, settings, tokenizer)
    limit = rows if rows is not None else integer((config or {}).get("vocab_size"))
    beyond = sorted((number, token) for token, number in ids.items() if limit is not None and number >= limit)
    if beyond:
        subject.error(
            "vocabulary-size",
            f"{contract.TOKENIZER}: {beyond[-1][1]!r}",
            f"id {beyond[-1][0]} ({len(beyond)} such tokens)",
            f"ids below {limit}, the rows of the embedding table",
            "use the tokenizer that the model was trained with",
        )
    _check_template(subject, settings)
    subject.checked.append(f"{contract.TOKENIZER}: {len(ids)} tokens, {len(added)} of them added; the app's prompt")


def _load(subject: Subject, document: Mapping[str, Any]) -> Tokenizer | None:
    model = document.get("model")
    if not isinstance(model, dict) or "merges" not in model or not isinstance(model.get("vocab"), dict):
        subject.error(
            "tokenizer-model",
            f"{contract.TOKENIZER}: model",
            kind_of(model.get("type") if isinstance(model, dict) else model),
            "BPE with vocab and merges",
            "use the tokenizer that the model was trained with",
        )
        return None
    try:
        return Tokenizer.from_file(str(subject.folder / contract.TOKENIZER))
    except Exception as error:  # the library raises plain ones
        subject.error(
            "tokenizer-unreadable",
            contract.TOKENIZER,
            shortened(" ".join(str(error).split())),
            "a tokenizer's document",
        )
        return None


def _check_class(subject: Subject, settings: Mapping[str, Any]) -> None:
    name = settings.get("tokenizer_class")
    if not isinstance(name, str) or name.replace("Fast", "") not in _CLASSES:
        where = f"{contract.TOKENIZER_CONFIG}: tokenizer_class"
        subject.error(
            "tokenizer-class",
            where,
            kind_of(name),
            "Qwen2Tokenizer, or another of swift-transformers' byte-pair classes",
        )


def _check_components(subject: Subject, document: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    for component, known in _TYPES.items():
        for kind in _types(document.get(component)):
            if kind not in known.split():
                where = f"{contract.TOKENIZER}: {component}"
                subject.error("tokenizer-component", where, kind_of(kind), f"one of swift-transformers': {known}")
    if "ByteLevel" in _types(document.get("pre_tokenizer")):
        lost = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in ids]
        if lost:
            where = f"{contract.TOKENIZER}: model.vocab"
            subject.error(
                "tokenizer-bytes",
                where,
                f"no token for {listed(sorted(lost))}",
                "one for each byte: the app crashes at the first text with another",
            )


def _types(component: Any) -> Iterator[Any]:
    """The types in a component of tokenizer.json, those inside a Sequence, too."""
    if isinstance(component, dict):
        yield component.get("type")
        for part in _PARTS:
            for inner in component.get(part) or []:
                yield from _types(inner)


def _is_stale(subject: Subject, settings: Mapping[str, Any], added: Mapping[str, int]) -> bool:
    """Whether the two tokenizer files are of two tokenizers."""
    decoder = settings.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return False
    said = {str(entry.get("content")): number for number, entry in decoder.items() if isinstance(entry, dict)}
    other = sorted(token for token, number in said.items() if str(added.get(token)) != number)
    if other:
        subject.error(
            "tokenizer-stale",
            f"{contract.TOKENIZER} and {contract.TOKENIZER_CONFIG}",
            f"other ids for {listed(other)}",
            "the same added tokens in both",
            "take both files from the model's own export",
        )
    return bool(other)


def _check_special(
    subject: Subject, settings: Mapping[str, Any], config: Mapping[str, Any] | None, added: Mapping[str, int]
) -> None:
    """The image token, the marks of a turn and the token that ends it."""
    facts = subject.facts
    stale = contract.TOKENIZER in subject.changed and contract.CONFIG not in subject.changed
    image = added.get(facts.image_token)
    said = integer((config or {}).get("image_token_index"))
    if image is None:
        subject.error(
            "image-token",
            _ADDED,
            f"no {facts.image_token}",
            f"{facts.image_token} as a token of its own: the app writes it for each image token",
            "export again, or change the app's imageToken",
        )
    elif said is not None and said != image:
        where = f"{contract.CONFIG}: image_token_index"
        if stale:
            where = f"{contract.TOKENIZER} and {contract.TOKENIZER_CONFIG}, changed since the export"
        subject.error(
            "tokenizer-stale" if stale else "image-token-index",
            where,
            f"{facts.image_token} is {image}, image_token_index {said}",
            "the same: the app looks for that id to put the picture's features there",
            AGAIN,
        )
    marks = set(re.findall(r"<\|[^<>|]+\|>", facts.turn + facts.prompt_end))
    lost = sorted(marks - added.keys())
    if lost:
        subject.error("turn-token", _ADDED, f"no {listed(lost)}", "each a token of its own: the app's prompt has them")
    _check_end(subject, settings, config, added)


def _check_end(
    subject: Subject, settings: Mapping[str, Any], config: Mapping[str, Any] | None, added: Mapping[str, int]
) -> None:
    """An answer ends at the tokenizer's eos token, so that has to be what ends a turn."""
    end, eos = _end(subject), _token(settings, "eos_token")
    where = f"{contract.TOKENIZER_CONFIG}: eos_token"
    if eos != end:
        expected = f"{end!r}, which ends a turn: the app stops at this and at unk_token, nowhere else"
        subject.error("eos-token", where, kind_of(eos), expected)
        return
    said = (config or {}).get("eos_token_id")
    ids = said if isinstance(said, list) else [said]
    if said is not None and added.get(end) not in ids:
        subject.warning(
            "eos-token-id",
            f"{contract.CONFIG}: eos_token_id",
            kind_of(said),
            f"{added.get(end)}, the id of {end}",
            "export again; the published app goes by the tokenizer, later loaders by this key, too",
        )


def _check_unknown(
    subject: Subject, settings: Mapping[str, Any], ids: Mapping[str, int], added: Mapping[str, int]
) -> None:
    """The unknown token ends an answer, too, and text that has it is written as bytes: it can't be a token in use."""
    unknown = _token(settings, "unk_token")
    if not isinstance(unknown, str) or unknown not in ids or unknown == _end(subject):
        return
    if unknown not in added or unknown in prompt(subject, subject.facts.image_token):
        subject.warning(
            "unk-token",
            f"{contract.TOKENIZER_CONFIG}: unk_token",
            f"{unknown!r}, a token of the {'prompt' if unknown in added else 'vocabulary'}",
            "null, or a token that no text has: the app ends an answer there",
            "export again, or set unk_token to null",
        )


def _token(settings: Mapping[str, Any], name: str) -> Any:
    """A special token in tokenizer_config.json: text, or an object with text."""
    said = settings.get(name)
    return said.get("content") if isinstance(said, dict) else said


def _end(subject: Subject) -> str:
    """What ends a turn."""
    return subject.facts.turn.rpartition("{content}")[2].strip()


def _check_prompt_tokens(subject: Subject, tokenizer: Tokenizer, tokens: int | None) -> None:
    """The app's whole prompt, tokenized: the image tokens in one row, and nothing put before or after it."""
    image = tokenizer.token_to_id(subject.facts.image_token)  # its own number
    if image is None or tokens is None:
        return
    text = prompt(subject, _QUESTION + subject.facts.image_token * tokens)
    ids, bare = (tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False))
    if ids != bare:
        subject.error(
            "tokenizer-adds-tokens",
            f"{contract.TOKENIZER}: post_processor",
            f"{len(ids) - len(bare)} tokens around the prompt",
            "none: the app's prompt is complete",
            "use the tokenizer that the model was trained with",
        )
    if bare.count(image) != tokens:
        got = f"{bare.count(image)} of {tokens}"
        subject.error(
            "image-token",
            f"{contract.TOKENIZER}: {subject.facts.image_token}",
            got,
            "one token each, as the app writes them",
        )


def _check_text(subject: Subject, settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Text comes back from its tokens as it was: another normalizer or decoder shows up in every answer."""
    if settings.get("clean_up_tokenization_spaces") is not False:
        subject.warning(
            "text-clean-up",
            f"{contract.TOKENIZER_CONFIG}: clean_up_tokenization_spaces",
            kind_of(settings.get("clean_up_tokenization_spaces")),
            "false: without it the app takes the blanks before . , ? ! and 's out of every answer",
        )
    if any(finding.rule in ("tokenizer-bytes", "tokenizer-component") for finding in subject.findings):
        return
    back = tokenizer.decode(tokenizer.encode(_TEXT, add_special_tokens=False).ids, skip_special_tokens=False)
    if back != _TEXT:
        subject.error(
            "tokenizer-text",
            f"{contract.TOKENIZER}: normalizer, pre_tokenizer and decoder",
            f"{back!r} for {_TEXT!r}",
            "the same text: a byte-level tokenizer loses nothing",
            "use the tokenizer that the model was trained with",
        )


def prompt(subject: Subject, content: str) -> str:
    """What the app makes of one question."""
    facts = subject.facts
    said = (("system", facts.system_prompt), ("user", content))
    turns = (facts.turn.replace("{role}", role).replace("{content}", text) for role, text in said)
    return facts.turn_separator.join(turns) + facts.prompt_end


def _check_template(subject: Subject, settings: Mapping[str, Any]) -> None:
    """The app builds its prompt itself; the artefact's template says what the model was trained with."""
    template, where = settings.get("chat_template"), f"{contract.TOKENIZER_CONFIG}: chat_template"
    if not isinstance(template, str):
        subject.checked.append(f"{where}: none to compare the app's prompt with")
        return
    tokens = {name: _token(settings, name) for name in settings if name.endswith("_token")}
    try:
        rendered = render(template, [{"role": "user", "content": _QUESTION}], tokens)
    except TemplateFault as error:
        subject.warning("chat-template", where, shortened(str(error)), "a template for a list of messages")
        return
    if rendered != (written := prompt(subject, _QUESTION)):
        subject.warning(
            "prompt",
            where,
            f"the app writes {written!r}",
            f"{rendered!r}, as the model was trained",
            "expect worse answers, or change the app's prompt",
        )
