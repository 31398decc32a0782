"""Which ONNX operators belong together. Every such list is written here, under what it means."""

from onnx import NodeProto

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
# Products of what flows through the network, with weights or with one another.
PRODUCTS = CONVOLUTIONS | {"Gemm", "MatMul"}
# Products with a bias of their own, so that a batch norm can be folded into them.
BIASED_PRODUCTS = PRODUCTS - {"MatMul"}

# fmt: off
POOLS = frozenset({
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool",
})
REDUCTIONS = frozenset({
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
})

# They compute every element of their result from the elements at the same place.
ELEMENTWISE = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Where", "Xor",
})
# fmt: on
# What reads and writes pixel by pixel: a runtime runs it inside the node that computes its input,
# and skips the pixels of it that nobody reads.
PIXELWISE = ELEMENTWISE | {"BatchNormalization", "Identity"}

# Data movement. These return the elements of their first input, in their order.
SAME = frozenset({"Cast", "CastLike", "Dropout", "Identity"})
RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
VIEWS = SAME | RESHAPES
# These return elements of their inputs elsewhere, or some of them, or some several times.
MOVEMENTS = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Gather", "GatherND", "Pad", "Slice", "SpaceToDepth"}
    | {"Split", "Tile", "Transpose"}
)

# They return the shape of their input, whatever its numbers are.
SIZES = frozenset({"Shape", "Size"})
# Their result differs from run to run.
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike"}
)


def is_standard(node: NodeProto) -> bool:
    """Return whether a node's operator is one of ONNX's own."""
    return node.domain in ("", "ai.onnx")
