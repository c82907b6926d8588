"""`fastvlm audit PACKAGE`: is this package a program that the Neural Engine runs well?

A static check of any .mlpackage, ours or anyone's, from its saved bytes, on any machine. What it looks for is the table
`neural_engine_rules.json`. It says what the published guidance says of the graph; where Core ML really places each
operation is the compute plan's to say, on a Mac.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm.common.errors import UserError
from fastvlm.common.units import format_bytes
from model_export.audit import compute_plan
from model_export.audit import rules as audit_rules
from model_export.mil import MILError, Program, read_package
from model_export.mil.blob import stored_tensors
from model_export.mil.costs import Cost, Graph, cost_of, padded_size_of, size_of

# Operations that compute nothing; each count is shown, also when it is 0.
DATA_MOVEMENT = ("transpose", "reshape", "squeeze", "expand_dims", "slice", "split", "concat", "gather")
_COSTLIEST = 10


def audit(package: Path, function: str | None = None) -> dict[str, Any]:
    """Figures and findings of every function of a package, or of one; "passed" when there is no finding.

    Raises UserError when the package cannot be read or has no such function.
    """
    try:
        program = read_package(package)
        for _ in stored_tensors(program):  # reads each one's header
            pass
    except MILError as error:
        raise UserError(str(error)) from error
    if function is not None and function not in program.functions:
        raise UserError(f"{package}: no function {function!r}; it has {', '.join(sorted(program.functions))}")
    return audit_program(program, function)


def audit_program(program: Program, function: str | None = None) -> dict[str, Any]:
    """`audit` of a program that is already read."""
    names = [function] if function is not None else sorted(program.functions)
    graphs = {name: Graph(program.functions[name]) for name in names}
    stored = {key: size for graph in graphs.values() for key, size in _stored(graph).items()}
    functions = {name: _function(program, graph) for name, graph in graphs.items()}
    counts = Counter(finding["rule"] for part in functions.values() for finding in part["findings"])
    return {
        "package": str(program.path),
        "specification_version": program.specification_version,
        "default_function": program.default_function,
        "weights": {"bytes": sum(stored.values()), "tensors": len(stored)},
        "functions": functions,
        "rules": {key: counts[key] for key in audit_rules.rules()},
        "passed": not counts,
    }


def _stored(graph: Graph) -> dict[Any, int]:
    """Every weight of a function once: identity -> bytes as stored. In the weight file, functions may share them."""
    return {key: size for item in graph.operations for key, (_, size) in graph.weights(item).items()}


def _function(program: Program, graph: Graph) -> dict[str, Any]:
    operations = Counter(operation.type for operation in graph.operations)
    costs = [cost_of(graph, operation) for operation in graph.operations]
    described = graph.function
    return {
        "opset": described.opset,
        "inputs": {item.name: str(item.type) for item in described.inputs},
        "outputs": {name: str(graph.types.get(name)) for name in described.block.outputs},
        "operations": dict(sorted(operations.items())),
        "data_movement": {
            kind: sum(count for type, count in operations.items() if type == kind or type.startswith(f"{kind}_"))
            for kind in DATA_MOVEMENT
        },
        "scaled_activations": _scaled_activations(graph),
        "weights": {"bytes": sum(_stored(graph).values()), "forms": _forms(graph)},
        **_totals(graph, costs),
        "padding": _padding(graph),
        "costliest": _costliest(graph, costs),
        "findings": audit_rules.findings(program, graph),
    }


def _forms(graph: Graph) -> dict[str, int]:
    """The number of compressed weights by their constexpr operation."""
    forms = Counter(item.type for item in graph.constants if item.type.startswith("constexpr_"))
    return dict(sorted(forms.items()))


def _scaled_activations(graph: Graph) -> dict[str, int]:
    """The number of activations that take x / 2^k by type (see `model_export.encoder.scaled`): a clip, multiplied back,
    feeds them."""
    counts: Counter[str] = Counter()
    for operation in graph.operations:
        if operation.type not in ("gelu", "sigmoid", "softmax"):
            continue
        source, multiplied = operation, False
        while names := graph.live(source):
            source = graph.producer.get(names[0], source)
            if source.type != "mul" or len(names) > 1:
                break
            multiplied = True
        if multiplied and source.type == "clip":
            counts[operation.type] += 1
    return dict(sorted(counts.items()))


def _totals(graph: Graph, costs: list[Cost]) -> dict[str, Any]:
    """Sums over the operations. Where shapes are unknown they are sums of what is known, and the unknown is named."""
    macs = sum(cost.macs or 0 for cost in costs)
    total = sum(cost.bytes for cost in costs)
    by_type: Counter[str] = Counter()
    for cost in costs:
        by_type.update(cost.by_type)
    return {
        "macs": macs,
        "macs_unknown": [item.name for item, cost in zip(graph.operations, costs) if cost.macs is None],
        "bytes": {
            "total": total,
            "inputs": sum(cost.inputs for cost in costs),
            "outputs": sum(cost.outputs for cost in costs),
            "weights": sum(cost.weights for cost in costs),
            "by_type": dict(sorted(by_type.items())),
        },
        "intensity": macs / total if total else None,
    }


def _padding(graph: Graph) -> dict[str, Any]:
    """Bytes by which the results grow when their last axis is padded as on the engine, and the worst one."""
    alignment = audit_rules.rules()["last-axis"].threshold["alignment_bytes"]
    wasted = {}
    for operation in graph.operations:
        for item in operation.outputs:
            size, padded = size_of(item.type), padded_size_of(item.type, alignment)
            if size and padded:
                wasted[f"{item.name} {item.type}"] = padded - size
    worst = max(wasted, key=wasted.__getitem__, default=None)
    return {"bytes": sum(wasted.values()), "worst": worst, "worst_bytes": wasted[worst] if worst is not None else 0}


def _costliest(graph: Graph, costs: list[Cost]) -> list[dict[str, Any]]:
    """The operations with most multiply-accumulates, then most bytes."""
    order = sorted(zip(graph.operations, costs), key=lambda pair: (-(pair[1].macs or 0), -pair[1].bytes))
    return [
        {
            "operation": operation.name,
            "type": operation.type,
            "shape": str(operation.outputs[0].type) if operation.outputs else "",
            "macs": cost.macs,
            "bytes": cost.bytes,
            "intensity": cost.intensity,
        }
        for operation, cost in order[:_COSTLIEST]
    ]


def lines(document: dict[str, Any]) -> list[str]:
    """The document as text."""
    weights = document["weights"]
    head = (
        f"{format_bytes(weights['bytes'])} of weights in {weights['tensors']} tensors, those inside the program counted"
    )
    text = [f"{document['package']}: specification {document['specification_version']}, {head}"]
    for name, part in document["functions"].items():
        text += ["", *_figures(name, part), *_findings(part["findings"])]
    if "compute_plan" in document:
        text += ["", *compute_plan.lines(document["compute_plan"])]
    count = sum(document["rules"].values())
    rules = sum(count > 0 for count in document["rules"].values())
    verdict = f"{count} findings by {rules} rules" if count else f"no finding by {len(document['rules'])} rules"
    return [*text, f"{document['package']}: {verdict}"]


def _figures(name: str, part: dict[str, Any]) -> Iterator[str]:
    interface = [", ".join(f"{key} {type}" for key, type in part[side].items()) for side in ("inputs", "outputs")]
    yield f"{name} ({part['opset']}): {interface[0]} -> {interface[1]}"
    counts = sorted(part["operations"].items(), key=lambda pair: -pair[1])
    yield f"  {sum(part['operations'].values())} operations: {', '.join(f'{count} {type}' for type, count in counts)}"
    yield f"  data movement: {', '.join(f'{count} {kind}' for kind, count in part['data_movement'].items())}"
    if part["scaled_activations"]:
        counts_of = ", ".join(f"{count} {type}" for type, count in part["scaled_activations"].items())
        yield f"  activations that take x / 2^k, so that float16 holds it: {counts_of}"
    if part["weights"]["forms"]:
        yield f"  weights: {', '.join(f'{count} {form}' for form, count in part['weights']['forms'].items())}"
    moved, intensity = part["bytes"], part["intensity"]
    kinds = ", ".join(f"{format_bytes(size)} {dtype}" for dtype, size in moved["by_type"].items())
    yield f"  {part['macs'] / 1e9:,.2f} GMAC, {format_bytes(moved['total'])} moved ({kinds})" + (
        f", {intensity:.1f} MAC/byte" if intensity is not None else ""
    )
    if part["macs_unknown"]:
        yield f"  not counted, their shapes are unknown: {', '.join(part['macs_unknown'])}"
    padding = part["padding"]
    yield f"  padding of last axes: {format_bytes(padding['bytes'])}, most for {padding['worst']}"
    yield f"  {'GMAC':>9} {'share':>6} {'MB':>9} {'MAC/byte':>9}  operation"
    for row in part["costliest"]:
        macs = row["macs"] or 0
        share = macs / part["macs"] if part["macs"] else 0.0
        figures = f"{macs / 1e9:9.3f} {share:6.1%} {row['bytes'] / 1e6:9.2f} {row['intensity'] or 0:9.1f}"
        yield f"  {figures}  {row['operation']} ({row['type']}) {row['shape']}"


def _findings(findings: list[dict[str, Any]]) -> Iterator[str]:
    rules = audit_rules.rules()
    for key in dict.fromkeys(finding["rule"] for finding in findings):
        group = [finding for finding in findings if finding["rule"] == key]
        yield f"  [{key}] {rules[key].title}: {len(group)}"
        yield f"    why: {rules[key].reason}"
        for remedy in dict.fromkeys(finding["remedy"] for finding in group):
            same = [finding for finding in group if finding["remedy"] == remedy]
            yield f"    remedy: {remedy}"
            yield f"    source: {', '.join(same[0]['source'])}"
            for item in same:
                yield f"      {item['operation']} ({item['type']}) {item['shape']}: {item['found']}"
