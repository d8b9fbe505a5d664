"""Everything that comes from or goes to other frameworks.

`convert` turns PyTorch checkpoints into teachers and variables back into PyTorch state dicts, `export` writes a saved
net as PyTorch or safetensors weights, ONNX or StableHLO. `torch_nets` writes the PyTorch module beside PyTorch weights,
and `onnx_graph` translates a JAX function to an ONNX graph.
"""
