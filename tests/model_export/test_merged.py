"""`fastvlm merge`: a whole checkpoint in the base's layout, with the tensors that base and adapter make together."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.dtypes import torch_dtype
from tests.conftest import Answer
from tests.fastvlm.checkpoint import trained
from tests.fastvlm.checkpoint.test_adapter_faults import CONFIG, Q_A, WEIGHTS, tensors, write


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write(tmp_path / "adapter")
    return tmp_path / "adapter"


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("layout", ["fast_vlm", "llava_qwen2"])
@pytest.mark.parametrize(("stored", "dtype", "shards"), [("bfloat16", None, 3), ("float32", "float16", 1)])
def test_the_result_is_base_and_adapter(
    make_checkpoint: Callable[..., Path],
    adapter: Path,
    tmp_path: Path,
    cli: Callable[..., Answer],
    layout: str,
    stored: str,
    dtype: str | None,
    shards: int,
) -> None:
    base, out = make_checkpoint(layout=layout, form="folded", dtype=stored, shards=shards), tmp_path / "out"
    before = files(base), files(adapter)
    words = ["merge", base, "--adapter", adapter, "--output-dir", out, *(["--dtype", dtype] if dtype else [])]
    assert cli(*words, "--dry-run").code == 0 and not out.exists()
    answer = cli(*words, "--json")
    assert answer.code == 0 and answer.document["changed_tensors"] == 2, answer.err
    assert (files(base), files(adapter)) == before
    merged, whole, plain = open_checkpoint(out), open_checkpoint(base, adapter=adapter), open_checkpoint(base)
    assert len(merged.files) == shards and not merged.warnings and merged.layout == layout
    for name, info in whole.tensors.items():
        expected = whole.read(name).to(torch_dtype(dtype or stored))
        assert torch.equal(merged.read(name), expected)
        if dtype is None and info.change is None:
            assert torch.equal(merged.read(name), plain.read(name))
    changed = [name for name in plain.tensors if not torch.equal(merged.read(name).float(), plain.read(name).float())]
    assert dtype is not None or len(changed) == 2
    assert (out / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes() and "merged" in (
        out / "NOTICE"
    ).read_text()
    assert json.loads((out / "merge.json").read_text())["adapter_files"].keys() == {CONFIG, WEIGHTS}
    before_again = {name: content for name, (content, _) in files(out).items()}
    assert cli(*words).code == 2  # it is there
    assert cli(*words, "--overwrite").code == 0
    assert {name: content for name, (content, _) in files(out).items()} == before_again


@pytest.mark.parametrize("form", ["folded", "training"])
def test_transformers_loads_it_whole(
    make_checkpoint: Callable[..., Path], tmp_path: Path, cli: Callable[..., Answer], form: str
) -> None:
    """A resized vocabulary, its tokenizer, an untied head: what PEFT trained, loaded by Transformers itself."""
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer, FastVlmForConditionalGeneration

    base, folder, out = make_checkpoint(form=form, tied=True), tmp_path / "adapter", tmp_path / "out"
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<box>"])
    model = trained.load(base)
    model.resize_token_embeddings(577)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wrapped = trained.train(model, config, folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor([[5, 576, 9]])).logits
    assert cli("merge", base, "--adapter", folder, "--output-dir", out).code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, info = FastVlmForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(name.endswith("num_batches_tracked") for name in info["missing_keys"])
    with torch.no_grad():
        np.testing.assert_allclose(loaded(input_ids=torch.tensor([[5, 576, 9]])).logits, expected, atol=2e-5)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<box>") == tokenizer.convert_tokens_to_ids("<box>")
    assert open_checkpoint(out).model_config.text.vocab_size == 577


def test_what_is_refused(tiny_llava: Path, adapter: Path, tmp_path: Path, cli: Callable[..., Answer]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "photo.jpg").write_bytes(b"x")
    words = ("merge", tiny_llava, "--adapter", adapter, "--output-dir")
    assert "is no merged checkpoint" in cli(*words, other, "--overwrite").err and files(other)
    for inside in (tiny_llava, adapter, adapter / "out"):
        assert cli(*words, inside).code == 2
    tensors(**{Q_A: np.full((4, 64), 1e6, np.float32)})(adapter)
    answer = cli(*words, tmp_path / "out", "--dtype", "float16")
    assert answer.code == 2 and "q_proj" in answer.err and not (tmp_path / "out").exists()
    assert cli(*words, tmp_path / "out").code == 0
