"""A BERT or RoBERTa classifier in ONNX Runtime on a CPU, from its config.json and weights, without torch or transformers.

``architecture`` says what config.json means, ``weights`` what the file must hold, ``graph`` builds the ONNX graph and
``session`` computes it.
"""
