"""A Core AI bundle, against Apple's Swift engine: metadata.json, and the prompt through the tokenizer's template."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from textwrap import shorten
from typing import Any, TypeVar

from app_bridge.app.engine import EngineFacts
from app_bridge.rules import finding
from app_bridge.validation.check_assets import check_assets, check_interfaces, inside
from app_bridge.validation.check_config import check_keys, integer, value_at
from app_bridge.validation.check_tokenizer import Files, check_components, check_same, check_text, read_tokenizer
from app_bridge.validation.subject import Subject, kind_of
from fastvlm.common.findings import Finding, Steps
from fastvlm.data.chat_template import TemplateFault, render
from fastvlm.data.prompt import IMAGE, SYSTEM, encode_prompt, render_prompt
from model_export.coreai import contract
from model_export.coreai.packages import check_installed

_QUESTION = "Describe the image."
_POSITIVE = ("language.max_context_length", "language.vocab_size", "vision.image_size", "vision.image_token_count")
_DEFAULTED = ("vision.image_mean", "vision.image_std", "vision.image_strategy")  # by what another model needs
_SYSTEM = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
_ASSET_SUFFIXES = (contract.SUFFIX, f"{contract.SUFFIX}c")
Value = TypeVar("Value")


def check_bundle(subject: Subject, facts: EngineFacts, ours: bool) -> Steps[None]:
    """Check a bundle as the engine reads it.

    Args:
        facts: of the engine.
        ours: an export of ours wrote it, which names its tensors and writes every key.

    Raises:
        UserError: Core AI's packages, with Apple's runtime, are not installed.
    """
    check_installed()
    if subject.folder.suffix in _ASSET_SUFFIXES:
        yield finding("bundle-name", str(subject.folder.name), f"the suffix {subject.folder.suffix}")
    metadata = yield from subject.read_json(contract.METADATA)
    if metadata is None:
        return
    faulty = yield from check_keys(contract.METADATA, metadata, facts.metadata, "kind", facts.kind)
    sound = _without(metadata, faulty)
    yield from _check_settings(sound, facts, faulty, ours)
    subject.checked.append(f"{contract.METADATA}: {len(facts.metadata)} keys, and what the engine takes without them")
    found = yield from check_assets(subject, sound, ours)
    yield from check_interfaces(subject, sound, found, facts, ours)
    yield from _check_tokenizer(subject, sound, facts)


def _without(metadata: dict[str, Any], faulty: set[str]) -> dict[str, Any]:
    """metadata.json without the values that a finding is about."""
    sound = {key: dict(value) if isinstance(value, dict) else value for key, value in metadata.items()}
    for path in faulty:
        owner, _, name = path.rpartition(".")
        inner = sound.get(owner) if owner else sound
        if isinstance(inner, dict):
            inner.pop(name, None)
    return sound


def _check_settings(metadata: Mapping[str, Any], facts: EngineFacts, faulty: set[str], ours: bool) -> Iterator[Finding]:
    """Each value of metadata.json by itself."""

    def at(path: str) -> Any:
        return value_at(metadata, path)

    def finding_at(rule: str, path: str, got: object, **values: object) -> Finding:
        return finding(rule, f"{contract.METADATA}: {path}", got, **values)

    version = at("metadata_version")
    if version not in (None, facts.metadata_version):
        yield finding_at("metadata-version", "metadata_version", kind_of(version), version=facts.metadata_version)
    for path in _POSITIVE:
        if (number := integer(at(path))) is not None and number < 1:
            yield finding_at("config-value", path, number)
    if at("language.embedded_tokenizer") is False:
        yield finding_at("tokenizer-embedded", "language.embedded_tokenizer", "false")
    defaults = {key.path: key.default for key in facts.metadata}
    factor = at("vision.rescale_factor")
    if (factor if factor is not None else defaults.get("vision.rescale_factor")) != contract.RESCALE_FACTOR:
        yield finding_at("rescale-factor", "vision.rescale_factor", kind_of(factor))
    for path in _DEFAULTED:
        if at(path) is None and path not in faulty:
            rule = "image-default" if ours else "image-default/elsewhere"
            yield finding_at(rule, path, f"nothing, so the engine takes {kind_of(defaults[path])}")
    for path in ("vision.image_mean", "vision.image_std"):
        if isinstance(numbers := at(path), list) and len(numbers) < 3:
            yield finding_at("list-length", path, f"{len(numbers)} numbers")
        elif path == "vision.image_std" and numbers and 0 in numbers[:3]:
            yield finding_at("normalisation/zero", path, numbers[:3])
    if isinstance(strategy := at("vision.image_strategy"), str) and strategy not in facts.strategies:
        known = ", ".join(facts.strategies)
        yield finding_at("strategy-unknown", "vision.image_strategy", kind_of(strategy), known=known)


def _below(folder: str, steps: Steps[Value]) -> Steps[Value]:
    """What steps about a folder's files yield, with the folder's name before the file's."""
    while True:
        try:
            problem = next(steps)
        except StopIteration as end:
            value: Value = end.value
            return value
        yield replace(problem, where=f"{folder}/{problem.where}")


def _check_tokenizer(subject: Subject, metadata: Mapping[str, Any], facts: EngineFacts) -> Steps[None]:
    """The tokenizer's files, and the engine's prompt through them. Without tokenizer.json it would ask the hub."""
    name = contract.TOKENIZER
    if not inside(subject, name):
        yield finding("asset-outside", name, "a link")
        return
    folder = Subject(subject.folder / name, subject.facts, subject.changed)
    files = yield from _below(name, read_tokenizer(folder, {}))
    if files is None:
        return
    sound = yield from _below(name, check_components(files))
    yield from _below(name, check_text(files, sound))
    stale = yield from _below(name, check_same(files))
    vocabulary = integer(value_at(metadata, "language.vocab_size"))
    beyond = max((number, token) for token, number in files.ids.items())
    if vocabulary is not None and beyond[0] >= vocabulary:
        yield finding("vocabulary-size", f"{name}: {beyond[1]!r}", f"id {beyond[0]}", limit=vocabulary)
    if stale:
        return
    yield from _check_stop(files, facts)
    yield from _check_prompt(subject, metadata, files, facts)


def _check_stop(files: Files, facts: EngineFacts) -> Iterator[Finding]:
    """An answer ends at the tokenizer's eos and at the engine's own stop token, nowhere else."""
    settings = f"{contract.TOKENIZER}/tokenizer_config.json"
    if facts.stop_token not in files.added:
        yield finding("stop-token", f"{contract.TOKENIZER}: added tokens", f"no {facts.stop_token}")
    if (eos := files.special("eos_token")) not in files.added:
        yield finding("eos-token/engine", f"{settings}: eos_token", kind_of(eos))


def _check_prompt(subject: Subject, metadata: Mapping[str, Any], files: Files, facts: EngineFacts) -> Iterator[Finding]:
    """The engine's one message, the image token and the text, through the template: the token comes out once, and for
    a FastVLM the rest as it was trained."""
    where, template = f"{contract.TOKENIZER}/tokenizer_config.json: chat_template", files.settings.get("chat_template")
    number = integer(value_at(metadata, "vision.image_token_id"))
    if number is None:
        return
    token = {value: key for key, value in files.added.items()}.get(number)
    if token is None:
        other = files.tokenizer.id_to_token(number)
        got = f"{number}, {'no token' if other is None else f'the ordinary token {other!r}'}"
        yield finding("image-token/id", f"{contract.METADATA}: vision.image_token_id", got)
        return
    special = {name: files.special(name) for name in files.settings if name.endswith("_token")}
    message = f"{token}\n{_QUESTION}"
    try:
        rendered = render(template, [{"role": "user", "content": message}], special)
    except TemplateFault as error:
        got = shorten(str(error), 80, placeholder="…")
        yield finding("chat-template/engine", where, got, token=facts.fallback_token)
        return
    ids = files.tokenizer.encode(rendered, add_special_tokens=False).ids
    if (count := ids.count(number)) != 1:
        yield finding("image-token/once", where, f"{token} {count} times", fallback=facts.fallback_token)
        return
    context = integer(value_at(metadata, "language.max_context_length"))
    pictures = integer(value_at(metadata, "vision.image_token_count"))
    if context is not None and pictures is not None and 0 < context <= (length := len(ids) - 1 + pictures):
        got = f"{context} positions"
        yield finding("context-short", f"{contract.METADATA}: language.max_context_length", got, length=length)
    if token != IMAGE:
        subject.checked.append(f"{where}: {token} comes out once; no FastVLM, so the rest of the prompt is not known")
    elif not rendered.startswith(_SYSTEM):
        yield finding("system-line", where, repr(rendered[:40]), system=repr(_SYSTEM))
    elif ids != encode_prompt(_callable(files), _QUESTION, number, 1)[0].tolist():
        yield finding("prompt/engine", where, repr(rendered), rendered=repr(render_prompt(_QUESTION)))
    else:
        subject.checked.append(f"{where}: the engine's prompt is the one that the model was trained with")


def _callable(files: Files) -> Callable[..., dict[str, list[int]]]:
    """The tokenizer as Transformers has it."""
    return lambda text, **how: {"input_ids": files.tokenizer.encode(text, **how).ids}
