"""Write what exporters compute at run time, shapes above all, into the model as constants.

After `simplify` a model has no `Shape` of a static value, no sequences, no convolution bias that is
only zeros, no local functions, and every node has a name of its own. What a parameter's *values*
decide is left alone, so every parameter keeps its name and the channel analysis finds its slices.

On 13 networks (ResNet, DenseNet, ShuffleNet, Res2Net, EdgeNeXt, ...) onnxscript 0.7.2 folds
constants as we need it once `should_fold` spares the parameters. What else was tried lost names:
its `optimize` folds norms and parameters into new ones, onnx-ir 1.1.0 by itself leaves `Shape`, and
onnxslim 0.1.98 folds weights and leaves `CastLike` and `SplitToSequence`.
"""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from hardware.errors import ModelError
from hardware.graph.model import (
    INTEGERS,
    attributes,
    complete_shapes,
    drop_dead,
    initializers,
    name_nodes,
    opset,
    shapes,
    to_array,
)
from hardware.graph.operators import CONVOLUTIONS, RANDOM

LARGEST = 1 << 20  # elements of a folded constant; what is larger stays computed
ASIDE = "espalier.aside"  # the domain of nodes that constant folding must not touch


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its shape arithmetic folded and its awkward operators rewritten.

    Raises:
        ModelError: a constant cannot be computed, because the file contradicts itself.
    """
    simple = _fold_constants(model)
    name_nodes(simple)
    complete_shapes(simple)
    _reshape_instead_of_gather(simple)
    _spell_out_splits(simple)
    _drop_zero_biases(simple)
    drop_dead(simple)
    return simple


def _fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which all is computed that depends on constants and static shapes only."""
    # Constant folding drops a Dropout, which does nothing in evaluation; graph forms train with it.
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _move_dropouts(copy, "", ASIDE)
    parameters = {t.name for t in copy.graph.initializer if t.data_type not in INTEGERS}

    def should_fold(node: ir.Node) -> bool:
        read = {value.name for value in node.inputs if value is not None}
        return not parameters & read and node.op_type not in RANDOM

    program = ir.from_proto(copy)
    common.InlinePass()(program)
    try:
        fold_constants(program, should_fold=should_fold, output_size_limit=LARGEST)
    except RuntimeError as error:
        raise ModelError(f"{error}: {error.__cause__}. The file contradicts itself.") from error
    common.RemoveUnusedNodesPass()(program)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program)
    common.ClearMetadataAndDocStringPass()(program)
    folded: onnx.ModelProto = ir.to_proto(program)
    _move_dropouts(folded, ASIDE, "")
    return folded


def _move_dropouts(model: onnx.ModelProto, old: str, new: str) -> None:
    """Give the Dropout nodes of one domain another, in place."""
    for node in model.graph.node:
        if node.op_type == "Dropout" and node.domain == old:
            node.domain = new


def _reshape_instead_of_gather(model: onnx.ModelProto) -> None:
    """Replace a `Gather` of all elements in their order (`as_strided`) by a `Reshape`, in place."""
    known, constants = shapes(model), initializers(model)
    for node in model.graph.node:
        if node.op_type != "Gather" or attributes(node).get("axis", 0) != 0:
            continue
        source, indices = known.get(node.input[0]), constants.get(node.input[1])
        if source is None or len(source) != 1 or indices is None:
            continue
        if not np.array_equal(to_array(indices).reshape(-1), np.arange(source[0])):
            continue
        target = np.array(tuple(indices.dims), dtype=np.int64)
        model.graph.initializer.append(numpy_helper.from_array(target, f"{node.name}_shape"))
        node.op_type = "Reshape"
        del node.attribute[:]
        node.input[1] = f"{node.name}_shape"


def _spell_out_splits(model: onnx.ModelProto) -> None:
    """Give every `Split` its sizes as an input, in place, so that they can be carved."""
    if opset(model) < 13:
        return
    known = shapes(model)
    for node in model.graph.node:
        if node.op_type != "Split" or (len(node.input) > 1 and node.input[1]):
            continue
        axis = attributes(node).get("axis", 0)
        parts = [known.get(name) for name in node.output]
        if any(part is None for part in parts):
            continue
        sizes = [part[axis] for part in parts if part is not None]
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(sizes, dtype=np.int64), f"{node.name}_sizes")
        )
        del node.input[1:]
        node.input.append(f"{node.name}_sizes")
        for attribute in list(node.attribute):
            if attribute.name == "num_outputs":
                node.attribute.remove(attribute)


def _drop_zero_biases(model: onnx.ModelProto) -> None:
    """Remove biases that are constant zeros and no parameter (exporters write them), in place."""
    zero_names = {
        tensor.name
        for tensor in model.graph.initializer
        if "." not in tensor.name
        and len(tensor.dims) == 1
        and tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
        and not to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type in CONVOLUTIONS and zero_names.intersection(node.input[2:]):
            del node.input[2:]
