"""Comparison with golden data of the official implementation; the command is `tools.check_parity`.

golden        one golden file: its arrays, which of them were compared, and the row that comes out
subject       one checkpoint directory: its config, and its models, loaded when first needed
media         images, videos and signals of a prompt as inputs of the model
decoder       text and multimodal forward passes, FoPE tables
towers        vision and time-series towers
generation    greedy decoding
training      losses and gradients
stored        configs, weights, FP8 dequantisation, name patterns, frequencies
text          tokenizer and chat template
w8a8          forward pass with quantised activations, by definition
plan          which check covers which file
"""
