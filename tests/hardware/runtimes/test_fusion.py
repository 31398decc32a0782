from hardware.runtimes.fusion import nodes_behind
from tests.hardware.models import residual


def test_a_conv_called_after_its_activation_is_found_behind_it():
    # ONNX Runtime calls a fused convolution after the value that its activation writes.
    executed = [("stem_relu",), ("pool0",), ("a_relu",), ("b",), (), ("c",), ("d_relu6",)]

    owners = nodes_behind(residual(), executed)

    assert owners[0] == ("stem", "act0")
    assert owners[2] == ("block.conv1", "act1")
    assert owners[3] == ("block.conv2", "add", "act2")
    assert owners[4] == ()
    assert owners[6] == ("depthwise", "act3")


def test_several_heads_of_one_executed_node_all_count():
    owners = nodes_behind(residual(), [("linear", "depthwise", "act3", "odd")])

    assert owners == (("linear", "depthwise", "odd", "act3"),)


def test_a_node_that_was_executed_by_itself_is_nobodys_tail():
    owners = nodes_behind(residual(), [("stem",), ("act0",)])

    assert owners == (("stem",), ("act0",))


def test_nodes_without_a_name_go_by_their_output():
    model = residual()
    for node in model.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""

    assert nodes_behind(model, [("stem_relu",)]) == (("stem_out", "stem_relu"),)
