"""One rule per operator. What is not here freezes what it touches and is counted."""

from collections.abc import Callable, Sequence

from onnx import NodeProto

from pipeline.channels import rules_channelwise as channelwise
from pipeline.channels import rules_layers as layers
from pipeline.channels import rules_movement as movement
from pipeline.channels.labels import Value
from pipeline.channels.propagation import Trace

Rule = Callable[[Trace, NodeProto, Sequence[Value | None]], list[Value]]

# Operators that compute every element of their result from the elements at the same place.
# fmt: off
ELEMENTWISE = [
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Where", "Xor",
]

REDUCTIONS = [
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
]
# fmt: on

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, channelwise.elementwise),
    **dict.fromkeys(REDUCTIONS, channelwise.reduce),
    # Data movement.
    **dict.fromkeys(("Cast", "CastLike", "Dropout", "Identity"), movement.same),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), movement.reshape),
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
    **dict.fromkeys(
        ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"),
        channelwise.pool,
    ),
    **dict.fromkeys(("Resize", "Upsample"), channelwise.resize),
    **dict.fromkeys(("GridSample", "RoiAlign"), channelwise.sampled),
    **dict.fromkeys(
        ("Constant", "ConstantOfShape", "Range", "Shape", "Size"), channelwise.shape_only
    ),
}
