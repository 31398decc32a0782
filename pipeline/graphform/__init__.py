"""An ONNX graph as a torch module that can be trained, pruned and exported."""

from pipeline.graphform.building import graph_form, network_of_file, rebuild
from pipeline.graphform.module import GraphForm, Roles

__all__ = ["GraphForm", "Roles", "graph_form", "network_of_file", "rebuild"]
