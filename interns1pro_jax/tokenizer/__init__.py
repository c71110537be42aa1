"""Text to token ids and back.

`base`        the protocol every tokenizer obeys, and the names of the special tokens
`byte_bpe`    byte-level byte-pair encoding, trained on the data or loaded from a file
`scientific`  the released tokenizer: byte-level BPE, and segment models for SMILES, protein and DNA/RNA
`released`    its files; `words` plain text; `segments` one segment model; `detection` finds notations in text; `smiles` judges them
`chat`        conversations by the released template, and what of them is learnt; `messages` their form and media
`decoding`    ids to text, whole or as they come

    tokenizer = ScientificTokenizer.load(directory)  # of the released layout
    tokenizer.encode("aspirin is CC(=O)OC1=CC=CC=C1C(=O)O")
    tokenizer.encode_chat([{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "a model"}]).loss_mask
"""
