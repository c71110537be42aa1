"""Text to token ids and back.

`base`      the protocol every tokenizer obeys, and the names of the special tokens
`byte_bpe`  byte-level byte-pair encoding, trained on the data or loaded from a file
"""
