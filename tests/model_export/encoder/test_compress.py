"""Compressed weights in the package: coremltools and the executor decode what was meant, the manifest says it."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import rewritten, snr_db

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.cli import run
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from model_export import contract, encoder_forms, mil
from model_export.__main__ import build_parser
from model_export.artefact import read_manifest
from model_export.config import DEPLOYMENT_TARGETS, ExportConfig
from model_export.encoder import compress, vision
from model_export.encoder.channel_first import channel_first
from model_export.encoder.coreml import coremltools
from model_export.encoder.package import SPECIFICATION, WEIGHTS, check_package
from model_export.mil.dtypes import POLICIES
from model_export.mil.plan import make_plan
from quantization.coreml.compression import COMPRESSIONS
from quantization.coreml.compression import compress as compressed_weight

pytestmark = pytest.mark.slow

# Every form, each on layers of several shapes; the first match decides, and some do not fit.
NEW = {
    "stem.*": "palette8",
    "stages.0.*": "palette6",
    "stages.1.*": "palette4",
    "stages.2.blocks.0.*": "palette4-g16-scaled",
    "stages.2.*": "palette6-g16",
    "stages.3.blocks.*": "int4-b32",
    "stages.3.*": "int8",
    "stages.4.blocks.0.token_mixer.*": "palette8-g16",
    "stages.4.blocks.0.mlp.fc1": "fp16",
    "stages.4.blocks.0.mlp.*": "palette4-g16",
    "stages.4.*": "palette8",
}
# The forms that iOS 16 has.
OLD = {"stages.4.*.fc?": "palette4", "stages.4.*": "palette8", "stages.[13].*": "int8", "*": "palette6"}
SPECIFICATIONS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}


def call(*arguments: Any) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run(build_parser, [str(argument) for argument in arguments])
    return code, errors.getvalue()


def rules_file(folder: Path, rules: Any) -> Path:
    """A recipe with rules {glob over the encoder's layers: form} (text is written as it is)."""
    path = folder / "rules.json"
    path.write_text(rules if isinstance(rules, str) else json.dumps(encoder_recipe(rules)))
    return path


def encoder_recipe(rules: dict[str, Any]) -> dict[str, Any]:
    schemes = [
        {"pattern": f"vision_encoder.{glob}", "scheme": {"mode": "coreml", "form": form}}
        for glob, form in rules.items()
    ]
    return {"name": "rules", "version": 2, "rules": [*schemes, {"pattern": "*", "scheme": {"dtype": "float16"}}]}


def packaged(checkpoint: Path, target: Path, **settings: Any) -> tuple[Path, dict[str, Any]]:
    config = ExportConfig(checkpoint, target.with_name("out"), **settings)
    prepare = read_preprocessor(checkpoint)
    drawn = lambda size: pictures.pixels(prepare, size)  # noqa: E731
    return target, vision.export_vision(open_checkpoint(checkpoint), config, target, drawn)


@pytest.fixture(scope="module")
def new(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An artefact with all forms, by the command, and what the command logged."""
    folder = tmp_path_factory.mktemp("compressed")
    flags = ("--vision-quant", rules_file(folder, NEW))
    code, log = call("vision", "--checkpoint", tiny_checkpoint, "--output-dir", folder / "new", *flags)
    assert code == 0, log
    return folder / "new", log


@pytest.fixture(scope="module")
def old(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A package with iOS 16's forms for iOS 16, and what the export says of it."""
    folder = tmp_path_factory.mktemp("compressed")
    settings = {"vision_quant": str(rules_file(folder, OLD)), "minimum_deployment_target": "iOS16"}
    return packaged(tiny_checkpoint, folder / contract.PACKAGE, **settings)


@pytest.fixture(scope="module")
def plain(tiny_artefact: Path) -> Path:
    """The fp16 package of the same checkpoint."""
    return tiny_artefact / contract.PACKAGE


# --- oracles


def program_of(package: Path, function: str = "main") -> Any:
    """A saved function as coremltools reads it."""
    coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = coremltools().utils.load_spec(str(package))
    return load(spec, spec.specificationVersion, str((package / WEIGHTS).parent)).functions[function]


def weights_of(package: Path, function: str = "main") -> dict[str, np.ndarray]:
    """Weight of each convolution, decoded by coremltools; by the name of the layer, with underscores."""
    found = {}
    for operation in program_of(package, function).operations:
        if operation.op_type == "conv":
            maker = operation.weight.op
            value = maker.val.val if maker.op_type == "const" else maker.materialized_val_inference()
            found[maker.name.removeprefix("p_fastvit_").partition("_weight")[0]] = value
    return found


def executor_weights(package: Path, function: str = "main") -> dict[str, np.ndarray]:
    """The same as the executor decodes them: those of constexpr operations only."""
    program = mil.read_package(package)
    one = program.functions[function]
    made = {o.outputs[0].name: o.outputs[0].type for o in one.block.operations if o.type.startswith("constexpr_")}
    made = {name: type for name, type in made.items() if not name.endswith("_palette")}  # not yet scaled
    shown = replace(one, block=replace(one.block, outputs=(*one.block.outputs, *made)))
    constants = make_plan(program, shown, POLICIES["as-typed"], 1 << 30).constants
    return {
        name.removeprefix("p_fastvit_").partition("_weight")[0]: exactly(constants[name].numpy(), type.dtype)
        for name, type in made.items()
    }


def exactly(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers that the executor holds as float32, in their type."""
    typed = values.astype({"fp16": np.float16, "fp32": np.float32}[dtype])
    assert np.array_equal(typed.astype(np.float32), values)
    return typed


def expected_weights(plain: Path, forms: dict[str, str]) -> dict[str, np.ndarray]:
    """The fp16 package's weights, those with a form decoded from it."""
    expected = weights_of(plain)
    for layer, form in forms.items():
        name = layer.replace(".", "_")
        expected[name] = compressed_weight(expected[name], COMPRESSIONS[form]).decode()
    return expected


def first_match(rules: dict[str, str], layers: list[str]) -> dict[str, str | None]:
    """Globs by hand: * is any text, ? one character, [13] one of these."""
    import re

    def matches(glob: str, layer: str) -> bool:
        return re.fullmatch(glob.replace(".", r"\.").replace("*", ".*").replace("?", "."), layer) is not None

    return {layer: next((form for glob, form in rules.items() if matches(glob, layer)), None) for layer in layers}


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()]


def blob(package: Path, operation: str, parameter: str) -> int:
    """Where in weight.bin an operation's constant begins."""
    program = coremltools().utils.load_spec(str(package)).mlProgram.functions["main"]
    operations = program.block_specializations[program.opset].operations
    (found,) = [one for one in operations if one.outputs[0].name == operation]
    if parameter in found.attributes:  # of a const, and of iOS 16's constexpr operations
        offset = found.attributes[parameter].blobFileValue.offset
    else:
        offset = found.inputs[parameter].arguments[0].value.blobFileValue.offset
    header = (package / WEIGHTS).read_bytes()[offset : offset + 64]
    assert header[:4] == b"\xef\xbe\xad\xde"
    return int.from_bytes(header[16:24], "little")


def blobs(package: Path) -> int:
    """How many constants are in weight.bin: each has a header that begins with a sentinel, at a multiple of 64."""
    data = (package / WEIGHTS).read_bytes()
    return sum(data[at : at + 4] == b"\xef\xbe\xad\xde" for at in range(64, len(data), 64))


def computed(package: Path, pixels: np.ndarray, function: str | None = None) -> np.ndarray:
    return mil.load(package, function_name=function).predict({contract.INPUT: pixels})[contract.OUTPUT]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(3).random((1, 3, 128, 128), dtype=np.float32)


@pytest.fixture(scope="module")
def in_torch(tiny_checkpoint: Path) -> Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]:
    """Features of the PyTorch encoder, in float64, with these weights in its convolutions."""

    def features(weights: dict[str, np.ndarray], pixels: np.ndarray, checkpoint: Path = tiny_checkpoint) -> np.ndarray:
        encoder = channel_first(vision.folded_encoder(open_checkpoint(checkpoint))[0]).double()
        layers = {name.replace(".", "_"): layer for name, layer in encoder.named_modules()}
        for name, weight in weights.items():
            layers[name].weight.data = torch.from_numpy(weight.astype(np.float64))
        with torch.no_grad():
            return encoder.forward_features(torch.from_numpy(pixels).double()).flatten(2).transpose(1, 2).numpy()

    return features


# --- what is written


def test_coremltools_and_the_executor_decode_what_was_meant(
    new: tuple[Path, str], old: tuple[Path, Any], plain: Path
) -> None:
    for package, facts, forms in (
        (new[0] / contract.PACKAGE, read_manifest(new[0])["vision"], set(COMPRESSIONS)),
        (*old, {"palette4", "palette6", "palette8", "int8"}),
    ):
        chosen = facts["compression"]["forms"]
        assert set(chosen.values()) == forms
        expected = expected_weights(plain, chosen)
        assert differing(weights_of(package), expected) == []
        decoded = executor_weights(package)
        assert decoded.keys() == {layer.replace(".", "_") for layer in chosen}
        assert differing(decoded, {name: expected[name] for name in decoded}) == []
        # the control: every compressed layer has changed, and no other
        assert {*differing(expected, weights_of(plain))} == decoded.keys()


def test_flipped_bytes_show_in_their_layers_alone(new: tuple[Path, str], tmp_path: Path) -> None:
    """In a table, in packed 4-bit indices, in packed 6-bit ones, in integers and in a block's scale."""
    source = new[0] / contract.PACKAGE
    places = {
        "stages_1_blocks_0_mlp_fc1": ("palette4", "lut"),
        "stages_1_blocks_0_mlp_fc2": ("palette4", "indices"),
        "stages_2_blocks_1_mlp_fc1": ("palette6_g16", "indices"),
        "stages_2_blocks_0_mlp_fc1": ("palette4_g16_scaled", "scale"),
        "stages_3_downsample_proj_1_reparam_conv": ("int8", "data"),
        "stages_3_blocks_0_mlp_fc1": ("int4_b32", "scale"),
    }
    package = shutil.copytree(source, tmp_path / contract.PACKAGE)
    data = bytearray((package / WEIGHTS).read_bytes())
    for layer, (form, parameter) in places.items():
        data[blob(source, f"p_fastvit_{layer}_weight_to_fp16_{form}", parameter) + 1] ^= 0x15
    (package / WEIGHTS).write_bytes(data)
    assert {*differing(weights_of(package), weights_of(source))} == places.keys()
    assert {*differing(executor_weights(package), executor_weights(source))} == places.keys()


def test_computes_as_the_fp16_program_with_decoded_weights(
    new: tuple[Path, str], old: tuple[Path, Any], plain: Path, pixels: np.ndarray, in_torch: Any, tmp_path: Path
) -> None:
    """Bit for bit, by writing the decoded weights over those of the fp16 package; and as PyTorch with them."""
    for number, (package, facts) in enumerate(
        ((new[0] / contract.PACKAGE, read_manifest(new[0])["vision"]), (old[0], old[1]))
    ):
        decoded = expected_weights(plain, facts["compression"]["forms"])
        patched = shutil.copytree(plain, tmp_path / f"{number}.mlpackage")
        data = bytearray((patched / WEIGHTS).read_bytes())
        for layer in facts["compression"]["forms"]:
            name = layer.replace(".", "_")
            start = blob(plain, f"p_fastvit_{name}_weight_to_fp16", "val")
            data[start : start + decoded[name].nbytes] = decoded[name].tobytes()
        (patched / WEIGHTS).write_bytes(data)
        features = computed(package, pixels)
        assert np.array_equal(features, computed(patched, pixels))
        assert snr_db(in_torch(decoded, pixels), features) > 48
        assert snr_db(in_torch({}, pixels), features) < 40  # the control: compression costs more than float16


def test_manifest_names_every_layer(new: tuple[Path, str], old: tuple[Path, Any], plain: Path) -> None:
    for facts, rules in ((read_manifest(new[0])["vision"], NEW), (old[1], OLD)):
        forms, reasons = facts["compression"]["forms"], facts["compression"]["wide"]
        layers = [*forms, *reasons]
        assert sorted(name.replace(".", "_") for name in layers) == sorted(weights_of(plain))
        for layer, form in first_match(rules, layers).items():
            if layer in forms:
                assert forms[layer] == form
            elif form is None:
                assert reasons[layer] == "no rule matches it"
            elif form == "fp16":
                assert reasons[layer] == f"the rule {layer} says so"
            else:
                assert "do not divide" in reasons[layer] or "not fewer than" in reasons[layer]
    reasons = read_manifest(new[0])["vision"]["compression"]["wide"]
    assert reasons["stages.3.blocks.0.mlp.conv.conv"] == "1 input channel(s) do not divide into blocks of 32"
    assert reasons["stem.1.reparam_conv"].endswith("bytes are not fewer than the 144 of fp16")
    line = next(line for line in new[1].splitlines() if line.startswith("compressed: "))
    assert f"compressed: {42 - len(reasons)} of 42 layers" in line and f"{len(reasons)} stay float16" in line


def test_weight_file_is_as_large_as_predicted(new: tuple[Path, str], old: tuple[Path, Any], plain: Path) -> None:
    """Weights, biases, and for each constant a header of 64 bytes and up to 63 of alignment."""
    biases = (plain / WEIGHTS).stat().st_size - sum(weight.nbytes for weight in weights_of(plain).values())
    for package, facts in ((new[0] / contract.PACKAGE, read_manifest(new[0])["vision"]), old):
        said = facts["compression"]
        forms = {layer.replace(".", "_"): COMPRESSIONS[form] for layer, form in said["forms"].items()}
        shapes = {name: weight.shape for name, weight in weights_of(plain).items()}
        assert said["weight_bytes"] == compress.size_of(shapes, forms)
        assert said["float16_weight_bytes"] == sum(weight.nbytes for weight in weights_of(plain).values())
        size = (package / WEIGHTS).stat().st_size
        more = 128 * (blobs(package) - blobs(plain))  # tables and scales beside the weights
        assert more > 0
        predicted = said["weight_bytes"] + biases
        assert 0.99 * predicted - 64 * blobs(plain) < size < 1.01 * predicted + more
        assert size < 0.6 * (plain / WEIGHTS).stat().st_size


def test_several_resolutions_store_compressed_weights_once(
    new: tuple[Path, str], tiny_checkpoint: Path, pixels: np.ndarray, in_torch: Any, tmp_path: Path
) -> None:
    settings = {"vision_quant": str(rules_file(tmp_path, NEW))}
    several, facts = packaged(tiny_checkpoint, tmp_path / "several.mlpackage", resolutions=(64,), **settings)
    single = new[0] / contract.PACKAGE
    assert facts["functions"] == ["encode_128", "encode_64", "main"]
    extra = (several / WEIGHTS).stat().st_size - (single / WEIGHTS).stat().st_size
    assert 0 <= extra < 0.03 * (single / WEIGHTS).stat().st_size
    expected = weights_of(single)
    for function in facts["functions"]:
        assert differing(weights_of(several, function), expected) == []
    features = computed(single, pixels)
    for function in ("main", "encode_128"):
        assert np.array_equal(computed(several, pixels, function), features)
    assert not np.array_equal(computed(several, pixels + np.float32(1e-3)), features)
    small = pixels[:, :, :64, :64].copy()
    assert snr_db(in_torch(expected, small), computed(several, small, "encode_64")) > 45


def test_powers_of_two_and_compressed_weights_go_together(
    tiny_checkpoint: Path, pixels: np.ndarray, in_torch: Any, tmp_path: Path
) -> None:
    """A GELU whose values leave float16: the weights before and after it, scaled, are compressed like any other."""
    hot = {
        r"stages\.3\.blocks\.0\.mlp\.fc1\.(weight|bias)": 1e5,
        r"stages\.3\.blocks\.0\.mlp\.fc2\.weight": 1e-5,
    }
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "hot", hot)
    rules = {"stages.3.*.fc1": "int4-b32", "stages.3.*.fc2": "palette4-g16-scaled", "*": "palette6"}
    package, facts = packaged(checkpoint, tmp_path / contract.PACKAGE, vision_quant=str(rules_file(tmp_path, rules)))
    assert facts["fp16"]["activation_exponents"].keys() == {"stages.3.blocks.0.mlp.act"}
    forms = facts["compression"]["forms"]
    assert forms["stages.3.blocks.0.mlp.fc1"] == "int4-b32"
    decoded = weights_of(package)
    assert {weight.dtype for weight in decoded.values()} == {np.dtype(np.float16)}
    small = {layer.replace(".", "_") for layer in forms}
    assert differing(executor_weights(package), {name: decoded[name] for name in small}) == []
    prepared = channel_first(vision.folded_encoder(open_checkpoint(checkpoint))[0])
    folded, _ = vision.folded_encoder(open_checkpoint(checkpoint))
    drawn = pictures.pixels(read_preprocessor(checkpoint), pixels.shape[-1])
    scaled = vision.range_safe(folded, drawn)[0].fastvit
    meant = {}
    for layer, form in forms.items():
        weight = scaled.get_submodule(layer).weight.detach()
        factor = float(weight.abs().max() / prepared.get_submodule(layer).weight.abs().max())
        weight = weight.half().numpy()
        name = layer.replace(".", "_")
        meant[name] = compressed_weight(weight, COMPRESSIONS[form]).decode()
        assert np.array_equal(decoded[name].astype(np.float16), meant[name]), layer
        meant[name] = meant[name].astype(np.float64) / factor
    assert snr_db(in_torch(meant, pixels, checkpoint), computed(package, pixels)) > 45
    control = meant | {"stages_3_blocks_0_mlp_fc1": meant["stages_3_blocks_0_mlp_fc1"] * 1.05}
    assert not snr_db(in_torch(control, pixels, checkpoint), computed(package, pixels)) > 45


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "target"),
    [(form.name, target) for form in COMPRESSIONS.values() for target in SPECIFICATIONS if target >= form.target],
)
def test_every_form_on_all_layers_at_every_target(
    form: str, target: str, tiny_checkpoint: Path, plain: Path, pixels: np.ndarray, in_torch: Any, tmp_path: Path
) -> None:
    settings = {"vision_quant": form, "minimum_deployment_target": target}
    package, facts = packaged(tiny_checkpoint, tmp_path / contract.PACKAGE, **settings)
    assert facts["specification_version"] == SPECIFICATIONS[target]
    forms = facts["compression"]["forms"]
    assert set(forms.values()) == {form} and len(forms) > 15
    expected = expected_weights(plain, forms)
    assert differing(weights_of(package), expected) == []
    decoded = executor_weights(package)
    assert differing(decoded, {name: expected[name] for name in decoded}) == [] and len(decoded) == len(forms)
    assert snr_db(in_torch(expected, pixels), computed(package, pixels)) > 45


# --- deployment targets


def test_newer_forms_raise_the_target_in_plain_sight(new: tuple[Path, str], old: tuple[Path, Any]) -> None:
    document = read_manifest(new[0])
    assert document["config"]["minimum_deployment_target"] == "iOS18"
    needs = {
        f"--vision-quant {name}"
        for name in NEW.values()
        if COMPRESSIONS.get(name, COMPRESSIONS["int8"]).target == "iOS18"
    }
    assert document["config"]["newer_target"] == dict.fromkeys(needs, "iOS18") and len(needs) == 5
    assert document["config"]["vision_quant"] == NEW
    assert document["vision"]["specification_version"] == 9
    lines = [line for line in new[1].splitlines() if line.startswith("deployment target iOS18: ")]
    assert len(lines) == 5 and all("new in iOS18" in line for line in lines)
    assert old[1]["specification_version"] == 7


def test_older_targets_are_refused(tmp_path: Path) -> None:
    for form in COMPRESSIONS.values():
        for target in DEPLOYMENT_TARGETS:
            refused = DEPLOYMENT_TARGETS.index(target) < DEPLOYMENT_TARGETS.index(form.target)
            settings = {"vision_quant": form.name, "minimum_deployment_target": target}
            with contextlib.ExitStack() as stack:
                if refused:
                    stack.enter_context(pytest.raises(UserError, match=f"{target}: too old for .*{form.name}, new in"))
                ExportConfig(tmp_path / "in", tmp_path / "out", **settings)


# --- what is refused


def test_patterns_without_a_layer_are_all_named(tmp_path: Path) -> None:
    rules = encoder_forms.load(str(rules_file(tmp_path, {"nothing": "int8", "*": "int8", "stages.9.*": "fp16"})))
    with pytest.raises(UserError, match=r"matches no layer: nothing, stages\.9\.\*; a layer is stages\.0\.a") as error:
        compress.assign(rules, {"stages.0.a": (64, 64, 1, 1)})
    assert "\n" not in str(error.value)


def test_layers_that_stay_in_float16() -> None:
    shapes = {"a": (64, 64, 1, 1)}
    nothing = compress.assign(encoder_forms.load("fp16"), shapes)
    assert not nothing.forms and not nothing.uncompressed
    # a layer with too small a share of the encoder
    some = compress.assign(encoder_forms.load("int8"), {"a": (1024, 1024, 1, 1), "b": (16, 4, 1, 1)})
    assert list(some.forms) == ["a"] and "64 weights, less than" in some.uncompressed["b"]


def test_weight_without_a_place_is_named(tiny_checkpoint: Path) -> None:
    encoder = channel_first(vision.folded_encoder(open_checkpoint(tiny_checkpoint))[0])
    layer = "final_conv.se.fc1"
    stored = compress.compressed(encoder, {layer: COMPRESSIONS["int8"]})
    coremltools()
    from coremltools.converters.mil.mil import Program

    program = Program()
    program.functions["main"] = program_of_nothing()
    with pytest.raises(CheckFailed, match=r"no place in the program: final_conv\.se\.fc1"):
        compress.store(program, stored, "iOS17")
    encoder.get_submodule(layer).weight.data[0, 0] = 1e6
    with pytest.raises(CheckFailed, match=r"do not fit float16, compressed or not: final_conv\.se\.fc1$"):
        compress.compressed(encoder, {layer: COMPRESSIONS["int8"]})


def program_of_nothing() -> Any:
    from coremltools.converters.mil.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))])
    def program(x):  # type: ignore[no-untyped-def]
        return mb.relu(x=x)

    return program.functions["main"]


def test_package_that_is_not_compressed_as_it_says_is_seen(new: tuple[Path, str]) -> None:
    package = new[0] / contract.PACKAGE
    facts = check_package(package, {"main": 128}, 256)
    assert facts["operations"]["conv"] == 42 and (package / SPECIFICATION).is_file()
    counted = {name: count for name, count in facts["operations"].items() if name.startswith("constexpr_")}
    said = [COMPRESSIONS[form] for form in read_manifest(new[0])["vision"]["compression"]["forms"].values()]
    scaled = sum(form.per_channel_scale for form in said)
    blocks = sum(form.kind == "linear" for form in said)  # at iOS 18, int8 is a block of all input channels
    assert counted == {
        "constexpr_blockwise_shift_scale": blocks + scaled,
        "constexpr_lut_to_dense": sum(form.kind == "palette" for form in said),
    }
