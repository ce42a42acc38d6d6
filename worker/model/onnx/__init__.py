"""A BERT or RoBERTa classifier in ONNX Runtime on a CPU, from its config.json and weights, without torch or transformers.

``architecture`` reads config.json, ``weights`` says which weights the files must hold, ``graph`` builds the ONNX graph
and ``session`` computes it.
"""
