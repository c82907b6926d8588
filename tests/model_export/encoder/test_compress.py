"""Compressed weights in the package: coremltools and the executor decode what was meant, the manifest says it."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from encoders import computed, exported, forms_recipe, rewritten
from torch import nn

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from model_export import contract, encoder_forms
from model_export.config import DEPLOYMENT_TARGETS, ExportConfig
from model_export.encoder import compress, vision
from model_export.encoder.channel_first import channel_first
from model_export.encoder.coreml import coremltools
from model_export.encoder.package import WEIGHTS, check_package
from quantization.coreml.compression import COMPRESSIONS
from quantization.coreml.compression import compress as compressed_weight
from tests.helpers import snr_db

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
Made = tuple[Path, dict[str, Any]]  # a package, and what the export says of it


def packaged(checkpoint: Path, target: Path, rules: dict[str, str], **settings: Any) -> Made:
    recipe = forms_recipe(target.with_name("rules.json"), rules)
    return target, exported(checkpoint, target, vision_quant=recipe, **settings)


@pytest.fixture(scope="module")
def new(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All forms."""
    return packaged(tiny_checkpoint, tmp_path_factory.mktemp("compressed") / contract.PACKAGE, NEW)


@pytest.fixture(scope="module")
def old(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """iOS 16's forms for iOS 16."""
    target = tmp_path_factory.mktemp("compressed") / contract.PACKAGE
    return packaged(tiny_checkpoint, target, OLD, minimum_deployment_target="iOS16")


@pytest.fixture(scope="module")
def plain(tiny_artefact: Path) -> Path:
    """The fp16 package of the same checkpoint."""
    return tiny_artefact / contract.PACKAGE


# --- oracles


def weights_of(package: Path, function: str = "main") -> dict[str, np.ndarray]:
    """Weight of each convolution, decoded by coremltools; by the name of the layer, with underscores."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = coremltools().utils.load_spec(str(package))
    program = load(spec, spec.specificationVersion, str((package / WEIGHTS).parent)).functions[function]
    found = {}
    for operation in program.operations:
        if operation.op_type == "conv":
            maker = operation.weight.op
            value = maker.val.val if maker.op_type == "const" else maker.materialized_val_inference()
            found[maker.name.removeprefix("p_fastvit_").partition("_weight")[0]] = value
    return found


def expected_weights(plain: Path, forms: dict[str, str]) -> dict[str, np.ndarray]:
    """The fp16 package's weights, those with a form decoded from it."""
    expected = weights_of(plain)
    for layer, form in forms.items():
        name = layer.replace(".", "_")
        expected[name] = compressed_weight(expected[name], COMPRESSIONS[form]).decode()
    return expected


def first_match(rules: dict[str, str], layer: str) -> str | None:
    """Globs by hand: * is any text, ? one character, [13] one of these."""
    patterns = {glob.replace(".", r"\.").replace("*", ".*").replace("?", "."): form for glob, form in rules.items()}
    return next((form for pattern, form in patterns.items() if re.fullmatch(pattern, layer)), None)


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()}


def features(encoder: nn.Module, weights: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Features of a PyTorch encoder, in float64, with these weights in its convolutions."""
    encoder = copy.deepcopy(encoder).double()
    layers = {name.replace(".", "_"): layer for name, layer in encoder.named_modules()}
    for name, weight in weights.items():
        layers[name].weight.data = torch.from_numpy(weight.astype(np.float64))
    with torch.no_grad():
        return encoder.forward_features(torch.from_numpy(pixels).double()).flatten(2).transpose(1, 2).numpy()


# --- what is written


@pytest.mark.parametrize("made", ["new", "old"])
def test_decodes_to_what_was_meant(
    made: str, plain: Path, pixels: np.ndarray, tiny_encoder: nn.Module, request: Any
) -> None:
    """By coremltools, and by the executor (which decodes bit for bit as coremltools does: test_mil_constexpr)."""
    package, facts = request.getfixturevalue(made)
    forms = facts["compression"]["forms"]
    assert {*forms.values()} == ({*COMPRESSIONS} if made == "new" else {"palette4", "palette6", "palette8", "int8"})
    decoded, original = expected_weights(plain, forms), weights_of(plain)
    assert differing(weights_of(package), decoded) == set()
    # the control: every compressed layer has changed, and no other
    assert differing(decoded, original) == {layer.replace(".", "_") for layer in forms}
    result = computed(package, pixels)
    assert snr_db(features(tiny_encoder, decoded, pixels), result) > 48
    assert snr_db(features(tiny_encoder, {}, pixels), result) < 40  # the control: it costs more than float16


@pytest.mark.parametrize("made", ["new", "old"])
def test_manifest_names_every_layer_and_its_size(made: str, plain: Path, request: Any) -> None:
    package, facts = request.getfixturevalue(made)
    said, original = facts["compression"], weights_of(plain)
    forms, reasons = said["forms"], said["wide"]
    assert sorted(name.replace(".", "_") for name in (*forms, *reasons)) == sorted(original)
    for layer in (*forms, *reasons):
        form = first_match(NEW if made == "new" else OLD, layer)
        if layer in forms:
            assert forms[layer] == form
        elif form in (None, "fp16"):
            assert reasons[layer] == ("no rule matches it" if form is None else f"the rule {layer} says so")
        else:
            assert "do not divide" in reasons[layer] or "not fewer than" in reasons[layer]
    full = sum(weight.nbytes for weight in original.values())
    biases = (plain / WEIGHTS).stat().st_size - full
    assert said["float16_weight_bytes"] == full and said["weight_bytes"] < 0.6 * full
    # for each table and scale a header of 64 bytes and up to 63 of alignment
    assert abs((package / WEIGHTS).stat().st_size - said["weight_bytes"] - biases) < 128 * 3 * len(forms)
    assert check_package(package, {"main": 128}, 256)["operations"]["conv"] == 42
    kinds = [COMPRESSIONS[form] for form in forms.values()]
    palettes, scaled = sum(form.kind == "palette" for form in kinds), sum(form.per_channel_scale for form in kinds)
    shift = ("constexpr_blockwise_shift_scale", "constexpr_affine_dequantize")[made == "old"]
    counted = {name: n for name, n in facts["operations"].items() if name.startswith("constexpr_")}
    assert counted == {shift: len(kinds) - palettes + scaled, "constexpr_lut_to_dense": palettes}


def test_several_resolutions_store_compressed_weights_once(
    new: Made, tiny_checkpoint: Path, pixels: np.ndarray, tiny_encoder: nn.Module, tmp_path: Path
) -> None:
    several, facts = packaged(tiny_checkpoint, tmp_path / "several.mlpackage", NEW, resolutions=(64,))
    single, _ = new
    assert facts["functions"] == ["encode_128", "encode_64", "main"]
    extra = (several / WEIGHTS).stat().st_size - (single / WEIGHTS).stat().st_size
    assert 0 <= extra < 0.03 * (single / WEIGHTS).stat().st_size
    expected = weights_of(single)
    for function in facts["functions"]:
        assert differing(weights_of(several, function), expected) == set()
    assert np.array_equal(computed(several, pixels), computed(single, pixels))
    small = pixels[:, :, :64, :64].copy()
    assert snr_db(features(tiny_encoder, expected, small), computed(several, small, function="encode_64")) > 45


def test_powers_of_two_and_compressed_weights_go_together(
    tiny_checkpoint: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    """A GELU whose values leave float16: the weights before and after it, scaled, are compressed like any other."""
    hot = {
        r"stages\.3\.blocks\.0\.mlp\.fc1\.(weight|bias)": 1e5,
        r"stages\.3\.blocks\.0\.mlp\.fc2\.weight": 1e-5,
    }
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "hot", hot)
    rules = {"stages.3.*.fc1": "int4-b32", "stages.3.*.fc2": "palette4-g16-scaled", "*": "palette6"}
    package, facts = packaged(checkpoint, tmp_path / contract.PACKAGE, rules)
    assert facts["fp16"]["activation_exponents"].keys() == {"stages.3.blocks.0.mlp.act"}
    forms, decoded = facts["compression"]["forms"], weights_of(package)
    assert forms["stages.3.blocks.0.mlp.fc1"] == "int4-b32"
    prepared = channel_first(vision.folded_encoder(open_checkpoint(checkpoint))[0])
    drawn = pictures.pixels(read_preprocessor(checkpoint), pixels.shape[-1])
    scaled = vision.range_safe(vision.folded_encoder(open_checkpoint(checkpoint))[0], drawn)[0].fastvit
    meant = {}
    for layer, form in forms.items():
        weight, name = scaled.get_submodule(layer).weight.detach(), layer.replace(".", "_")
        factor = float(weight.abs().max() / prepared.get_submodule(layer).weight.abs().max())
        compressed = compressed_weight(weight.half().numpy(), COMPRESSIONS[form]).decode()
        assert np.array_equal(decoded[name], compressed), layer
        meant[name] = compressed.astype(np.float64) / factor
    result = computed(package, pixels)
    assert snr_db(features(prepared, meant, pixels), result) > 45
    control = meant | {"stages_3_blocks_0_mlp_fc1": meant["stages_3_blocks_0_mlp_fc1"] * 1.05}
    assert not snr_db(features(prepared, control, pixels), result) > 45


# --- what is refused


def test_older_targets_are_refused(tmp_path: Path) -> None:
    def refused(form: str, target: str) -> bool:
        try:
            ExportConfig(tmp_path / "in", tmp_path / "out", vision_quant=form, minimum_deployment_target=target)
        except UserError as error:
            assert f"{target}: too old for " in str(error)
            return True
        return False

    order = DEPLOYMENT_TARGETS.index
    for form in COMPRESSIONS.values():
        for target in DEPLOYMENT_TARGETS:
            assert refused(form.name, target) == (order(target) < order(form.target))


def test_layers_that_stay_in_float16(tmp_path: Path) -> None:
    shapes = {"stages.0.a": (1024, 1024, 1, 1), "b": (16, 4, 1, 1)}
    nothing = compress.assign(encoder_forms.load("fp16"), shapes)
    assert not nothing.forms and not nothing.uncompressed
    some = compress.assign(encoder_forms.load("int8"), shapes)  # one has too small a share of the encoder
    assert list(some.forms) == ["stages.0.a"] and "64 weights, less than" in some.uncompressed["b"]
    rules = encoder_forms.load(
        forms_recipe(tmp_path / "rules.json", {"nothing": "int8", "*": "int8", "stages.9.*": "fp16"})
    )
    with pytest.raises(UserError, match=r"matches no layer: nothing, stages\.9\.\*; a layer is stages\.0\.a"):
        compress.assign(rules, shapes)


def test_weight_without_a_place_or_beyond_float16_is_named(tiny_encoder: nn.Module) -> None:
    encoder: Any = copy.deepcopy(tiny_encoder)
    layer = "final_conv.se.fc1"
    stored = compress.compressed(encoder, {layer: COMPRESSIONS["int8"]})

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))])
    def program(x):  # type: ignore[no-untyped-def]
        return mb.relu(x=x)

    with pytest.raises(CheckFailed, match=r"no place in the program: final_conv\.se\.fc1"):
        compress.store(program, stored, "iOS17")
    encoder.get_submodule(layer).weight.data[0, 0] = 1e6
    with pytest.raises(CheckFailed, match=r"do not fit float16, compressed or not: final_conv\.se\.fc1$"):
        compress.compressed(encoder, {layer: COMPRESSIONS["int8"]})
