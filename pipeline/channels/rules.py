"""One rule per operator. What is not here freezes what it touches and is counted."""

from collections.abc import Callable, Sequence

from onnx import NodeProto

from hardware.graph.operators import ELEMENTWISE, POOLS, REDUCTIONS, RESHAPES, SAME
from pipeline.channels import rules_channelwise as channelwise
from pipeline.channels import rules_layers as layers
from pipeline.channels import rules_movement as movement
from pipeline.channels.labels import Value
from pipeline.channels.propagation import Trace

Rule = Callable[[Trace, NodeProto, Sequence[Value | None]], list[Value]]

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, channelwise.elementwise),
    **dict.fromkeys(REDUCTIONS, channelwise.reduce),
    # Data movement.
    **dict.fromkeys(SAME, movement.same),
    **dict.fromkeys(RESHAPES, movement.reshape),
    "Concat": movement.concat,
    "DepthToSpace": movement.depth_to_space,
    "Expand": movement.expand,
    "Gather": movement.gather,
    "GatherND": movement.gather_nd,
    "Pad": movement.pad,
    "Slice": movement.slice_,
    "SpaceToDepth": movement.space_to_depth,
    "Split": movement.split,
    "Tile": movement.tile,
    "Transpose": movement.transpose,
    # Layers.
    "Conv": layers.conv,
    "ConvTranspose": layers.conv_transpose,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    # Norms, and others that mix channels.
    "BatchNormalization": channelwise.batch_norm,
    "GroupNormalization": channelwise.group_norm,
    "InstanceNormalization": channelwise.instance_norm,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), channelwise.layer_norm),
    **dict.fromkeys(
        ("Hardmax", "LRN", "LogSoftmax", "LpNormalization", "Softmax"), channelwise.mixing
    ),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum", "TopK"), channelwise.ordered),
    # Pixels.
    **dict.fromkeys(POOLS, channelwise.pool),
    **dict.fromkeys(("Resize", "Upsample"), channelwise.resize),
    **dict.fromkeys(("GridSample", "RoiAlign"), channelwise.sampled),
    **dict.fromkeys(
        ("Constant", "ConstantOfShape", "Range", "Shape", "Size"), channelwise.shape_only
    ),
}
